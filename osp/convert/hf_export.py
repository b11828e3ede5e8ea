"""A trained model as a stock Hugging Face Llama, which `transformers` loads without our code.

Projections and scales are folded into the weights, and an SSNorm becomes an RMSNorm with equal gains.
Nothing else changes, since names and layout are Hugging Face's already. A tied head stays tied unless a
scale is folded into the embedding only.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, processors
from torch import Tensor

from osp.convert.change_norm import change_config
from osp.convert.file_format import DTYPES, Client, FileFormat, LlamaSource
from osp.convert.same_function import check_same_function, observe_function
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel
from osp.files import write_text
from osp.model.build_norms import block_norm, final_norm, final_norm_name
from osp.model.fold import fold_into_weights, norm_gain, pad_ffn, residual_norms
from osp.model.hf_llama import BODY, CONFIG, GENERATION, HEAD, REQUIRED, TOKENIZER, load_hf, load_hf_tokenizer
from osp.model.norms import NORMS
from osp.model.transformer import Transformer, meta_model
from osp.model_config import ModelConfig, NormConfig
from osp.quant.apply import Quantized

SHARD_BYTES = 5 * 10**9  # upper bound of a file of weights


class HuggingFace(FileFormat):
    """A folder with `config.json`, safetensors and `tokenizer.json`."""

    name = "hf"
    dtypes = ("fp32", "bf16")

    def ffn_multiple(self, scheme: str) -> int:
        return 128  # what W4A16 in groups of 128 needs, which other programs make of the folder

    def write(self, source: LlamaSource, state: Quantized, scheme: str, path: Path) -> None:
        subject, dtype = source.subject, next(name for name, value in DTYPES.items() if value == source.dtype)
        ids = {"bos_id": subject.bos_id, "eos_id": subject.eos_id}
        packed = self.pack(source, state, scheme)
        write_llama(source.model, path, dtype=dtype, packed=packed, **ids)
        write_tokenizer(subject, path)
        if not packed:
            loaded = load_hf(path).to(subject.device)
            check_same_function("reading back the files", observe_function(source.model), observe_function(loaded))

    def pack(self, source: LlamaSource, state: Quantized, scheme: str) -> Mapping[str, dict[str, Tensor]]:
        """Return parameter -> what is written instead of it, as name -> tensor."""
        return {}

    def open(self, path: Path, device: torch.device) -> Client:
        try:
            return InTransformers(path, device)
        except ImportError:
            name = "osp, because transformers is not installed"
            return InOsp(load_hf(path).to(device), load_hf_tokenizer(path)[0], name)

    def above_four_bits(self, path: Path) -> list[str]:
        files = [safe_open(file, framework="pt") for file in sorted(path.glob("*.safetensors"))]
        names = [name for file in files for name in file.keys()]  # noqa: SIM118 - no mapping
        return [name for name in names if name.endswith((".weight", ".bias"))]  # packed ones have other endings


class InTransformers:
    """A folder loaded by `transformers`; also the client of quantized folders that it reads."""

    def __init__(self, path: Path, device: torch.device):
        with quiet():
            import transformers

            self.name = f"transformers {transformers.__version__}"
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids.to(self.model.device), use_cache=False).logits.float().cpu()

    def encode(self, text: str) -> list[int] | None:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@dataclass
class InOsp:
    """A file that was read into a model and a tokenizer of this library."""

    model: Transformer
    tokenizer: Tokenizer
    name: str

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        logits = self.model(ids.to(self.model.embed_tokens.weight.device)).logits
        assert logits is not None
        return logits.float().cpu()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, and warnings of what the libraries import, from the terminal."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def stock_llama(model: Transformer, *, ffn_multiple: int) -> Transformer:
    """Return `model`, which is changed and shares the weights, as one of RMSNorms and a padded FFN, fp32."""
    fold_into_weights(model)
    pad_ffn(model, multiple=ffn_multiple)
    eps = model.norm.eps
    assert isinstance(eps, float)
    llama = meta_model(dataclasses.replace(model.config, norm=NormConfig(name="rmsnorm", eps=eps)))
    llama.load_state_dict(_tensors(model) | {HEAD: model.lm_head.weight.detach()}, assign=True)
    llama.tie_weights()
    return llama.eval()


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the parameters of a folded model by our names, with a gain per channel for every norm."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    device = model.embed_tokens.weight.device
    gains = {name: norm_gain(norm, model.config.hidden_size) for name, norm, _ in residual_norms(model)}
    return tensors | {f"{name}.weight": gain.float().to(device) for name, gain in gains.items()}


def check_exportable(config: ModelConfig, *, path: str | Path) -> None:
    """Raise `UserError` with the reason and a fix if no stock Llama computes the same as the model at `path`."""
    for key, name in (("norm.name", config.norm.name), ("norm.final", final_norm_name(config.norm))):
        if reason := NORMS[name].not_rmsnorm:
            fix = _suggest_conversion(config, path)
            raise UserError(f"{key}={name}: a stock Llama has no such norm, {reason}; {fix}")
    for key, holds, what in (
        ("norm.placement=peri", config.norm.placement == "peri", "norm after a sublayer"),
        ("qk_norm=true", config.qk_norm, "norm of queries and keys"),
        ("ffn_norm=true", config.ffn_norm, "norm inside its MLP"),
        ("attention.gate=true", config.attention.gate, "gate after attention"),
        ("attention.value_gate=true", config.attention.value_gate, "gate of its values"),
        (f"attention.logit_cap={config.attention.logit_cap}", config.attention.logit_cap, "cap of attention logits"),
        ("attention.off_by_one=true", config.attention.off_by_one, "1 in the denominator of its softmax"),
        (f"model.hidden_act={config.hidden_act}", config.hidden_act != "silu", "other activation than silu in its MLP"),
        ("model.head_bias=true", config.head_bias, "bias of the head (here the folded bias of the last LayerNorm)"),
    ):
        if holds:
            raise UserError(f"{key}: a stock Llama has no {what}")
    eps = {norm.eps for norm in (block_norm(config), final_norm(config))}
    if len(eps) > 1:
        raise UserError(f"the norms have several eps, {sorted(map(str, eps))}; a stock Llama has one for all")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"model.hidden_size={config.hidden_size} is no multiple of model.num_attention_heads="
            f"{config.num_attention_heads}, which transformers requires of a Llama with any head_dim"
        )


def _suggest_conversion(config: ModelConfig, path: str | Path) -> str:
    """Return the fix for a norm that a stock Llama does not have."""
    try:
        check_exportable(change_config(config, "rmsnorm"), path=path)
    except UserError as error:
        reason = f" ({error})" if NORMS[config.norm.name].mean is not None else ""
        return f"runs with norm=ssnorm and norm=rmsnorm export{reason}"
    return f"convert it first: python scripts/convert.py {path} to=rmsnorm out=DIR"


def write_llama(
    model: Transformer,
    folder: Path,
    *,
    dtype: str,
    bos_id: int | None,
    eos_id: int | None,
    packed: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the weights of a model without projections, and its `config.json` for all versions of transformers.

    The weights are safetensors of at most `SHARD_BYTES` each (no tensor is cut), and an index if there are several.
    packed: parameter -> what is written instead of it, see `HuggingFace.pack`.
    """
    config = model.config
    scaling = None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
    if scaling and scaling["rope_type"] == "linear":
        scaling = {"rope_type": "linear", "factor": scaling["factor"]}
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, key) for key in (*REQUIRED, "max_position_embeddings", "rope_theta")},
        **{key: getattr(config, key) for key in ("hidden_act", "attention_bias", "mlp_bias")},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rope_scaling": scaling,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    _write_json(folder / CONFIG, values)
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in _tensors(model).items()}
    for name, parts in (packed or {}).items():
        del tensors[name]
        tensors |= parts
    stored = {name if name == HEAD else BODY + name: tensor.cpu() for name, tensor in tensors.items()}
    # it would print the name of the temporary folder; its logger has the name of its file
    logging.getLogger(inspect.getfile(save_torch_state_dict)).setLevel(logging.WARNING)
    try:
        save_torch_state_dict(stored, folder, max_shard_size=SHARD_BYTES)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error
    for path in folder.glob("*.safetensors"):  # safetensors creates them 0600; make them as readable as the other files
        path.chmod((folder / CONFIG).stat().st_mode)


def write_tokenizer(subject: LanguageModel, folder: Path) -> None:
    """Write the run's tokenizer.json and the settings of `transformers`."""
    assert subject.run is not None
    shutil.copyfile(subject.run / TOKENIZER, folder / TOKENIZER)
    ids = (subject.bos_id, subject.eos_id)
    bos, eos = (None if token_id is None else subject.tokenizer.id_to_token(token_id) for token_id in ids)
    if subject.begins_with_bos:  # `transformers` adds what the file adds, whatever add_bos_token says
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        parts = [tokenizer.post_processor] * (tokenizer.post_processor is not None)
        begin = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(str(bos), subject.begin_id)])
        tokenizer.post_processor = processors.Sequence([*parts, begin])
        tokenizer.save(str(folder / TOKENIZER))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": subject.begins_with_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": subject.context,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    stops = subject.eos_id if len(subject.stop_ids) < 2 else list(subject.stop_ids)
    _write_json(folder / GENERATION, {"bos_token_id": subject.bos_id, "eos_token_id": stops})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
