"""Write a trained model in a format that other programs load, and a certificate of what was measured on the file.

    open -> check -> fold, pad -> quantize -> write -> read back with the client -> certify -> rename

What a user can get wrong is found before the folding. The files get their names at the end, all of them or none.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch

from osp.convert.config import ExportConfig
from osp.convert.file_certificate import ClientModel, FileCertificate, compare_tokens, describe_files, observe
from osp.convert.file_format import DTYPES, FileFormat, LlamaSource
from osp.convert.gguf_file import Gguf
from osp.convert.hf_export import HuggingFace, check_exportable, stock_llama
from osp.convert.model_card import FOUR_BITS, model_card
from osp.convert.packed import CompressedTensors
from osp.convert.same_function import (
    COMPARED_TOKENS,
    FILE_NAME,
    Difference,
    check_same_function,
    check_same_perplexity,
    compared_perplexity,
    observe_function,
    read_certificate,
)
from osp.errors import UserError
from osp.evaluation.evaluate import note_training, read_calibration
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.texts import read_text
from osp.files import new_folder, write_text
from osp.model.transformer import Transformer
from osp.model_config import ModelConfig
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec
from osp.run.folder import environment

log = logging.getLogger(__name__)

# A last bit of fp32 that differs can flip the rounding of an activation, and the layers behind amplify it. Relative to
# the perplexity of 16,384 tokens up to 2.4e-4 in models of 1.3 M parameters; fewer tokens differ by more.
TOLERANCE_OF_ACTIVATIONS = 1e-3
FORMATS: dict[str, FileFormat] = {made.name: made for made in (HuggingFace(), CompressedTensors(), Gguf())}


def export(run: str | Path, out: str | Path, *, device: torch.device | str = "cpu", **keys: Any) -> FileCertificate:
    """Write the model of a run or checkpoint to the new file or folder `out`. keys: the others of `ExportConfig`.

    Raises `UserError` and leaves nothing if the format cannot hold the model, or the file does not compute the same.
    """
    config, out = ExportConfig(**keys), Path(out)
    target, scheme = _choose_format(config), config.scheme or ""
    spec, dtype = target.quantization(scheme, config.quant), target.unquantized_dtype(scheme, config.dtype)
    beside, multiple = target.file_names(out), config.ffn_multiple or target.ffn_multiple(scheme)
    with new_folder(out, files=beside) as folder:
        subject, path = open_model(run, device=device, weights=config.weights), folder / out.name if beside else folder
        _check_model(subject, target, scheme, multiple=multiple)
        conversion, text = read_certificate(subject), read_text(config.text, subject)
        if len(text.tokens) < subject.window:
            log.warning("text=%s: %d tokens are less than a window of %d", text.name, len(text.tokens), subject.window)
        note_training(subject, spec)
        calibration = read_calibration(subject, spec, measured=[text], seq_len=subject.window)

        origin = {"name": subject.name, "path": str(run), "sha256": subject.sha256(), "step": subject.step}
        origin["weights"] = subject.weights
        width, trained = subject.model.config.intermediate_size, observe("osp", subject.model, text, subject)
        llama, folding = _fold(subject, ffn_multiple=multiple, dtype=DTYPES[dtype])
        with quantized(llama, spec, calibration=calibration, progress=True) as state:
            target.write(LlamaSource(llama, subject, DTYPES[dtype]), state, scheme, path)
            fake = observe("osp, fake quantization", llama, text, subject)
        four_bits = None
        if spec.is_identity:
            check_same_perplexity(text, trained.perplexity, fake.perplexity, dtype=dtype)
            with quantized(llama, FOUR_BITS):
                four_bits = compared_perplexity(llama, text, subject.window)
        client = target.open(path, llama.embed_tokens.weight.device)
        certificate = FileCertificate(
            file=out.name,
            files=describe_files(path),
            format=target.name,
            scheme=config.scheme,
            quantization=f"{spec} [{spec.hash}]",
            dtype=dtype,
            model=origin,
            context=subject.context,
            ffn_width=(width, llama.config.intermediate_size),
            folding=folding,
            text={"name": text.name, "sha256": text.sha256, "tokens": min(len(text.tokens), COMPARED_TOKENS)},
            window=subject.window,
            trained=trained,
            fake=fake,
            client=observe(client.name, ClientModel(client, llama.config), text, subject),
            tolerance=max(target.tolerance, TOLERANCE_OF_ACTIVATIONS if spec.a_bits < 16 else 0.0),
            same_tokens=compare_tokens(client, subject),
            above_four_bits=tuple(target.above_four_bits(path)),
            versions={key: value for key, value in environment().items() if key not in ("host", "command")},
        )
        certificate.check(w_bits=spec.w_bits)
        write_text(folder / (beside[0] if beside else FILE_NAME), json.dumps(dataclasses.asdict(certificate), indent=2))
        card = certificate.markdown() if beside else model_card(subject, certificate, conversion, four_bits)
        write_text(folder / (beside[1] if beside else "README.md"), card)
    if hint := target.hint(out, scheme):
        log.info(hint)
    return certificate


def _choose_format(config: ExportConfig) -> FileFormat:
    """Return the format; raise `UserError` if another one has the scheme."""
    for name, other in FORMATS.items():
        if config.scheme in other.schemes and config.scheme not in FORMATS[config.format].schemes:
            raise UserError(f"scheme={config.scheme}: format={config.format} has no such scheme; set format={name}")
    return FORMATS[config.format]


def _check_model(subject: LanguageModel, target: FileFormat, scheme: str, *, multiple: int) -> None:
    """Raise `UserError` if the format cannot hold the model or its tokenizer."""
    if subject.run is None:
        raise UserError(f"{subject.folder}: is a Hugging Face folder already; name a run or a checkpoint")
    config = subject.model.config
    check_exportable(config, path=subject.folder)
    width = config.intermediate_size
    config = dataclasses.replace(config, intermediate_size=width + -width % multiple)
    _check_widths(target, scheme, config)
    target.check(config, subject.tokenizer, scheme)


def _fold(subject: LanguageModel, *, ffn_multiple: int, dtype: torch.dtype) -> tuple[Transformer, Difference]:
    """Return the stock Llama with values that `dtype` holds, and what folding and padding changed before rounding."""
    function, tied = observe_function(subject.model), subject.model.config.tie_embeddings
    llama = stock_llama(subject.model, ffn_multiple=ffn_multiple)
    if tied and not llama.config.tie_embeddings:
        log.info("embedding and head are written as two matrices: a scale is folded into the embedding")
    folding = check_same_function("folding projections and scales", function, observe_function(llama))
    llama.config = dataclasses.replace(llama.config, max_position_embeddings=subject.context)
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return llama, folding


def _check_widths(target: FileFormat, scheme: str, config: ModelConfig) -> None:
    """Raise `UserError` if the groups of a scheme do not divide what a matrix reads."""
    widths = {
        "model.hidden_size": config.hidden_size,
        "model.num_attention_heads * head_dim": config.num_attention_heads * config.head_size,
        "model.intermediate_size": config.intermediate_size,
    }

    def remainders(spec: QuantSpec) -> list[str]:
        size = (spec.w_group_size or spec.number_format("w").block_size or 1) if spec.w_bits < 16 else 1
        return [f"groups of {size} channels do not divide {key}={n}" for key, n in widths.items() if n % size]

    if wrong := remainders(target.schemes[scheme]) if scheme else []:
        fitting = [name for name, spec in target.schemes.items() if not remainders(spec)]
        fix = "set ffn_multiple=null" if "intermediate_size" in wrong[0] else f"choose from {', '.join(fitting)}"
        raise UserError(f"scheme={scheme}: {wrong[0]}; {fix}")
