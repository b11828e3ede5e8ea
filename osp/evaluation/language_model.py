"""A model with its tokenizer, from a run, a checkpoint or a Hugging Face folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from osp.config import Config, Weights
from osp.data.loader import Layout
from osp.data.tokenizer import eos_id, load_tokenizer
from osp.errors import UserError
from osp.model.hf_llama import CONFIG, check_vocabulary, load_hf, load_hf_tokenizer
from osp.model.transformer import Transformer, check_finite
from osp.run.checkpoint import Checkpoint, find, load_model
from osp.run.evaluations import label

LONGEST_WINDOW = 2048  # tokens; the length at which papers measure perplexity


@dataclass(frozen=True)
class LanguageModel:
    """A model in eval mode, its tokenizer and their origin."""

    name: str
    folder: Path  # as the user named it
    model: Transformer
    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int | None
    config: Config | None = None  # of the training run; None: a Hugging Face folder
    run: Path | None = None  # folder of the training run
    step: int | None = None  # of the checkpoint
    conversion: dict[str, Any] | None = None  # entry of scripts/convert.py in the checkpoint
    stop_ids: tuple[int, ...] = ()  # tokens; each of them ends a generated text
    weights: Weights = "trained"  # that were read; `name` says `NAME, averaged` for the others

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """Tokens of a sequence that the model was trained on; of a model from elsewhere, what its config.json says."""
        if self.config is None or self.config.data.source == "none":
            return self.model.config.max_position_embeddings
        return self.config.train.seq_len

    @property
    def begins_with_bos(self) -> bool:
        """Whether every sequence of the training began with the BOS token."""
        return self.config is not None and Layout.of(self.config).has_start

    @property
    def window(self) -> int:
        """Tokens of a window for perplexity: `context`, 2048 at most."""
        return min(LONGEST_WINDOW, self.context)

    @property
    def begin_id(self) -> int:
        """The token before a text: BOS, else EOS; raises `UserError` if the model has neither."""
        token = self.bos_id if self.bos_id is not None else self.eos_id
        if token is None:
            raise UserError(f"{self.folder}: no token to begin a text with; set bos_token_id in its config.json")
        return token

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without BOS and EOS."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def sha256(self) -> str:
        return model_sha256(self.model)


def model_sha256(model: Transformer) -> str:
    """Return a hash of the names, shapes and fp32 values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def open_model(path: str | Path, *, device: torch.device | str = "cpu", weights: Weights = "trained") -> LanguageModel:
    """Return the language model at `path` on `device`, fp32, with these of its weights.

    Raises `UserError` if the path is no run, checkpoint or Hugging Face Llama, or tokenizer or weights do not fit.
    """
    folder = Path(path)
    if (checkpoint_folder := find_model(folder, weights)) is None:
        tokenizer, bos, eos, stops = load_hf_tokenizer(folder)  # before the weights, which take longer
        subject = LanguageModel(folder.resolve().name, folder, load_hf(folder), tokenizer, bos, eos, stop_ids=stops)
    else:
        checkpoint = Checkpoint(checkpoint_folder)
        config, conversion = checkpoint.config, checkpoint.manifest.get("conversion")
        run = checkpoint_folder.resolve().parent.parent
        tokenizer = load_tokenizer(run / "tokenizer.json")
        check_vocabulary(run / "tokenizer.json", tokenizer, num_embeddings=config.model.vocab_size)
        end = eos_id(tokenizer, config.tokenizer.eos_token)
        subject = LanguageModel(
            label(config.run.name, weights),
            folder,
            load_model(checkpoint_folder, weights=weights),
            tokenizer,
            # in training the end of another document comes before each one
            bos_id=end if conversion is None else conversion["bos_id"],
            eos_id=end,
            config=config,
            run=run,
            step=checkpoint.step,
            conversion=conversion,
            stop_ids=tuple((conversion or {}).get("stop_ids") or (end,)),
            weights=weights,
        )
    if max((subject.bos_id or 0, *subject.stop_ids)) >= subject.model.config.vocab_size:  # of a damaged manifest
        raise UserError(f"{folder}: the manifest names a token that the model does not have; convert the model again")
    subject.model.to(device)
    check_finite(subject.model, folder)
    return subject


def find_model(folder: Path, weights: Weights = "trained") -> Path | None:
    """Return the checkpoint in `folder`, None for a Hugging Face folder; raise `UserError` without these weights."""
    if (folder / CONFIG).is_file():
        if weights == "averaged":
            raise UserError(
                f"{folder}: weights=averaged, but a Hugging Face folder has no average; set weights=trained"
            )
        return None
    if (checkpoint := find(folder)) is None:
        raise UserError(
            f"{folder}: no model; name a run with a checkpoint, a checkpoint, or a Hugging Face folder (config.json)"
        )
    Checkpoint(checkpoint).check_weights(weights)
    return checkpoint
