"""What is evaluated: a model with its tokenizer, from a run, a checkpoint or a Hugging Face folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from osp.config import Config, from_dict
from osp.data import load_tokenizer
from osp.data.tokenizer import eos_id
from osp.distributed import device_of
from osp.errors import UserError
from osp.model.hf_llama import check_vocabulary, is_hf, load_hf, load_hf_tokenizer
from osp.model.transformer import Transformer
from osp.run.checkpoint import Checkpoint, find, load_model


@dataclass(frozen=True)
class LanguageModel:
    """A model in eval mode, its tokenizer, and where both come from."""

    name: str
    folder: Path  # what the user named
    model: Transformer
    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int | None
    config: Config | None = None  # of the run that trained it; None: a Hugging Face folder
    run: Path | None = None  # its folder
    step: int | None = None  # of the checkpoint
    conversion: dict[str, Any] | None = None  # what scripts/convert.py wrote into the checkpoint

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def begin_id(self) -> int:
        """The token before a text; `UserError` if the model has none."""
        token = self.bos_id if self.bos_id is not None else self.eos_id
        if token is None:
            raise UserError(f"{self.folder}: names no token to begin a text with (bos_token_id in its config.json)")
        return token

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without BOS and EOS."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def sha256(self) -> str:
        return model_sha256(self.model)


def model_sha256(model: Transformer) -> str:
    """A hash of names, shapes and fp32 values of all parameters and buffers: the same model, the same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def open_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The language model that `path` names, on `device`, its matmuls in `dtype`.

    Raises `UserError` if it is neither a run, a checkpoint nor a Hugging Face Llama, or the tokenizer does not fit.
    """
    folder = Path(path)
    checkpoint = find_model(folder)
    found = _open_hf(folder) if checkpoint is None else _open_checkpoint(folder, checkpoint)
    found.model.to(device).compute_dtype = dtype
    return found


def find_model(folder: Path) -> Path | None:
    """The checkpoint that `folder` names, None for a Hugging Face folder; `UserError` if there is no model."""
    if is_hf(folder):
        return None
    checkpoint = find(folder)
    if checkpoint is None:
        raise UserError(
            f"{folder}: no model; name a run with a checkpoint, a checkpoint, or a Hugging Face folder (config.json)"
        )
    return checkpoint


def _open_hf(folder: Path) -> LanguageModel:
    tokenizer, special = load_hf_tokenizer(folder)  # first: a mistake there is found before the weights are read
    return LanguageModel(folder.resolve().name, folder, load_hf(folder), tokenizer, special.bos_id, special.eos_id)


def _open_checkpoint(folder: Path, checkpoint_folder: Path) -> LanguageModel:
    checkpoint = Checkpoint(checkpoint_folder)
    config = from_dict(checkpoint.manifest["config"])
    run = checkpoint_folder.resolve().parent.parent
    tokenizer = load_tokenizer(run / "tokenizer.json")
    check_vocabulary(run / "tokenizer.json", tokenizer, rows=config.model.vocab_size)
    end = eos_id(tokenizer, config.tokenizer.eos_token)
    conversion = checkpoint.manifest.get("conversion")
    return LanguageModel(
        config.run.name,
        folder,
        load_model(checkpoint_folder),
        tokenizer,
        # documents follow each other in training: what precedes one is the end of another
        bos_id=end if conversion is None else conversion["bos_id"],
        eos_id=end,
        config=config,
        run=run,
        step=checkpoint.step,
        conversion=conversion,
    )
