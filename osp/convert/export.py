"""Write a trained model in a format that other programs load, and a certificate of what was measured on the file.

    open -> check -> fold, pad -> quantize -> write -> read back with the client -> certify -> rename

What a user can get wrong is found before the folding. The files get their names at the end, all of them or none.
"""

import contextlib
import dataclasses
import logging
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from osp.config import ModelConfig
from osp.convert.file_certificate import ClientModel, FileCertificate, compare_tokens, describe_files, observe
from osp.convert.file_format import DTYPES, FileFormat, Source
from osp.convert.hf_export import HuggingFace, check_exportable, size_in_bytes, stock_llama
from osp.convert.model_card import FOUR_BITS, model_card
from osp.convert.same_function import (
    COMPARED_TOKENS,
    FILE_NAME,
    check_same_function,
    check_same_perplexity,
    compared_perplexity,
    observe_function,
    read_certificate,
)
from osp.errors import UserError
from osp.evaluation.evaluate import read_calibration
from osp.evaluation.language_model import open_model
from osp.evaluation.texts import read_text
from osp.files import new_folder, write_text
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec
from osp.run.folder import environment

log = logging.getLogger(__name__)

FORMATS: dict[str, FileFormat] = {made.name: made for made in (HuggingFace(),)}
NOT_IN_A_BLOCK = re.compile(r"norm|embed|embd|head|^output\.|bias|rope_freqs")  # names of tensors that may keep 16 bits
CLIENTS = ("transformers", "compressed-tensors", "gguf", "llama-cpp-python")  # whose versions are recorded


def export(
    run: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    scheme: str | None = None,
    quant: QuantSpec | None = None,
    dtype: str | None = None,
    ffn_multiple: int | None = None,
    max_shard_size: str = "5GB",
    text: str = "held_out",
    device: torch.device | str = "cpu",
) -> FileCertificate:
    """Write the model of a run or checkpoint to the new file or folder `out`, and its certificate.

    Raises `UserError` and leaves nothing if the format cannot hold the model, or if the file does not compute the same.
    The arguments are keys of `ExportConfig`.
    """
    out, target, name = Path(out), FORMATS[format], scheme or ""
    spec, stored_dtype = target.quantization(name, quant or QuantSpec()), target.unquantized_dtype(name, dtype)
    shard_bytes, beside = size_in_bytes(max_shard_size), target.file_names(out)
    with new_folder(out, files=beside) as folder:
        subject = open_model(run, device=device)
        if subject.run is None:
            raise UserError(f"{run}: is a Hugging Face folder already; name a run or a checkpoint")
        model, context, width = subject.model, subject.context, subject.model.config.intermediate_size
        check_exportable(model.config, path=run)
        multiple = ffn_multiple or target.ffn_multiple(name)
        padded = dataclasses.replace(model.config, intermediate_size=width + -width % multiple)
        _check_widths(target, name, padded)
        target.check(padded, subject.tokenizer, name)
        conversion, tokens = read_certificate(subject), read_text(text, subject)
        calibration = read_calibration(subject, spec, measured=[tokens], seq_len=subject.window)

        sha256, function = subject.sha256(), observe_function(model)
        trained = observe("osp, not quantized", model, tokens, subject)
        llama = stock_llama(model, ffn_multiple=multiple)
        folding = check_same_function("folding projections and scales", function, observe_function(llama))
        llama.config = dataclasses.replace(llama.config, max_position_embeddings=context)
        for parameter in llama.parameters():
            parameter.data = parameter.data.to(stored_dtype).float()
        path = folder / out.name if beside else folder
        with quantized(llama, spec, calibration=calibration, progress=True) as state:
            target.write(Source(llama, subject, context, stored_dtype, shard_bytes), state, name, path)
            fake = observe("osp, fake quantization", llama, tokens, subject)
        dtype_name = next(key for key, value in DTYPES.items() if value == stored_dtype)
        if spec.is_identity:
            check_same_perplexity(tokens, trained.perplexity, fake.perplexity, dtype=dtype_name)
        client = target.open(path, llama.embed_tokens.weight.device)
        certificate = FileCertificate(
            file=out.name,
            files=describe_files(path),
            format=format,
            scheme=scheme,
            quantization=str(spec),
            quantization_hash=spec.hash,
            dtype=dtype_name,
            model={"name": subject.name, "path": str(subject.folder), "sha256": sha256, "step": subject.step},
            context=context,
            ffn_width=(width, padded.intermediate_size),
            folding=folding,
            text=tokens.name,
            text_sha256=tokens.sha256,
            tokens=min(len(tokens.tokens), COMPARED_TOKENS),
            window=subject.window,
            trained=trained,
            fake=fake,
            client=observe(client.name, ClientModel(client, llama.config), tokens, subject),
            tolerance=target.tolerance,
            same_tokens=compare_tokens(client, subject),
            above_four_bits=tuple(target.above_four_bits(path)),
            versions=_versions(),
        )
        certificate.check()
        wide = [tensor for tensor in certificate.above_four_bits if not NOT_IN_A_BLOCK.search(tensor)]
        if spec.w_bits <= 4 and wide:
            raise UserError(f"{wide[0]} has more than 4 bits; not written")
        write_text(folder / (beside[0] if beside else FILE_NAME), certificate.json())
        card = certificate.markdown() + "\n"
        if not beside:
            four_bits = None
            if spec.is_identity:
                with quantized(llama, FOUR_BITS):
                    four_bits = compared_perplexity(llama, tokens, subject.window)
            card = model_card(subject, certificate, four_bits, conversion)
        write_text(folder / (beside[1] if beside else "README.md"), card)
    if hint := target.hint(out, name):
        log.info(hint)
    return certificate


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
        fix = "set ffn_multiple=null" if "intermediate_size" in wrong[0] else f"choose {' or '.join(fitting)}"
        raise UserError(f"scheme={scheme}: {wrong[0]}; {fix}")


def _versions() -> dict[str, Any]:
    """Return `environment()`, without the name of the machine, and the versions of the clients' libraries."""
    versions = {key: value for key, value in environment().items() if key not in ("host", "command")}
    for package in CLIENTS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
