"""Texts for perplexity: WikiText-2, any file, the validation split of a run."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from osp.config import Config, SourceConfig
from osp.data.loader import Layout, Shards
from osp.data.sources import SOURCES, Source, is_documents, make_source
from osp.data.tokenizer import FILE_NAME, load_tokenizer, spec_hash, token_bytes
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.perplexity import Text
from osp.files import read_utf8
from osp.run.checkpoint import Checkpoint, find
from osp.run.folder import training_shards

log = logging.getLogger(__name__)

WIKITEXT2 = "wikitext2"
HELD_OUT = "held_out"
COPIED = "copied"  # of HELD_OUT the tokens that can be copied from earlier ones
HUB_WIKITEXT2 = SourceConfig(source="hf", dataset="Salesforce/wikitext", subset="wikitext-2-raw-v1", split="test")


def read_texts(names: Sequence[str], subject: LanguageModel, *, text_field: str = "text") -> list[Text]:
    """Return the texts; several of one name are named by the shortest ends of their paths that differ."""
    texts = [read_text(name, subject, text_field=text_field) for name in names]
    paths = [Path(os.path.abspath(name)).parts for name in names]
    named = []
    for text, path in zip(texts, paths, strict=True):
        others = [place for other, place in zip(texts, paths, strict=True) if place != path and other.name == text.name]
        length = next(n for n in range(1, len(path) + 1) if all(place[-n:] != path[-n:] for place in others))
        suffix = text.name.removeprefix(path[-1]) if text.name.startswith(path[-1]) else ""
        named.append(replace(text, name="/".join(path[-length:]) + suffix) if others else text)
    return named


def read_text(name: str, subject: LanguageModel, *, text_field: str = "text") -> Text:
    """Return the text called `name` in the tokens of `subject`, or raise `UserError`.

    Args:
        name: `wikitext2`, the raw test split from the Hugging Face hub; `FILE.raw`, the same from a file; `held_out`,
            the validation split of the run that trained the subject; `copied`, only its tokens that can be copied; a
            run folder, its validation split; a file or folder of documents, each followed by the end-of-text token as
            in training; any other file, one text.
        subject: The model whose tokenizer is used.
        text_field: Field of a record that holds the document.
    """
    path, folder = Path(name), None
    if name in (HELD_OUT, COPIED):
        if subject.config is None or subject.config.data.source == "none":
            raise UserError(
                f"{name}: {subject.folder} is no run; name the run folder whose split you mean, or a file of text"
            )
        folder = find(subject.folder)
    elif path.is_dir() and (folder := find(path)):
        name = f"{path.name}/{HELD_OUT}"
    if folder:
        shards = training_shards(folder, instead="name a file of text: texts=[FILE] or text=FILE")
        config = Checkpoint(folder).config
        text = held_out(name, shards, subject.tokenizer, Layout.of(config))
        return copied(text, config, subject) if name == COPIED else text
    if path.suffix == ".raw":
        lines = read_utf8(path, name=name).removesuffix("\n").split("\n")
        text = wikitext([line + "\n" for line in lines])
        return encode(WIKITEXT2 if "wiki.test" in path.name else path.stem, [text], subject)
    if path.is_file() and not is_documents(path, text_field) and name != WIKITEXT2:
        return encode(path.name, [read_utf8(path, name=name)], subject)
    file = SourceConfig(source="text", paths=(name,), text_field=text_field)
    try:
        texts = list(make_source(HUB_WIKITEXT2 if name == WIKITEXT2 else file).documents())
    except UserError as error:  # it names the key of a training run
        reason = str(error).removeprefix("data.paths: ").replace("data.text_field", "text_field")
        if name == WIKITEXT2:
            reason = f"{name}: {reason.removeprefix('data.dataset=')}; name the file instead: texts=[wiki.test.raw]"
        raise UserError(reason) from error
    texts = [wikitext(texts)] if name == WIKITEXT2 else [text for text in texts if text]
    return encode(path.name, texts, subject)


def wikitext(lines: list[str]) -> str:
    """Return WikiText as published perplexities read it: lines, line ends included, joined by two; blank ones empty."""
    return "\n\n".join(line if line.strip() else "" for line in lines)


def encode(name: str, texts: list[str], subject: LanguageModel) -> Text:
    """Return `texts` in the subject's tokens; of several texts each is followed by the end-of-text token."""
    separator = [subject.eos_id] if len(texts) > 1 and subject.eos_id is not None else []
    ids = [token for text in texts for token in subject.encode(text) + separator]
    digest = hashlib.sha256("\0".join(texts).encode())
    result = _text(name, np.array(ids, dtype=np.int64), digest.hexdigest(), subject.tokenizer)
    num_bytes, known = sum(len(text.encode()) for text in texts), int(result.token_bytes.sum())
    if known < num_bytes:
        reason = "the tokenizer loses the others, or its normalization is shorter"
        log.warning("%s: the tokens stand for %d of %d bytes of the text; %s", name, known, num_bytes, reason)
    return result


def held_out(name: str, shards: Path, tokenizer: Tokenizer, layout: Layout, *, max_tokens: int | None = None) -> Text:
    """Return the validation split, or its first `max_tokens`, of shards that were made with this tokenizer.

    With a start token it consists of sequences as in training.
    """
    split = Shards(shards, "val")
    if _encoding(load_tokenizer(shards / FILE_NAME)) != _encoding(tokenizer):
        raise UserError(f"{name}: {shards} holds the tokens of another tokenizer than the model's")
    tokens = np.concatenate(split.tokens or [np.zeros(0, np.int64)])
    sequences = _sequences(tokens, layout, split.manifest.eos_id)
    row = sequences.shape[1] if layout.has_start else None
    tokens = sequences.reshape(-1)[:max_tokens].astype(np.int64)
    digest = hashlib.sha256("".join(shard.sha256 for shard in split.manifest.val.shards).encode())
    return replace(_text(name, tokens, digest.hexdigest(), tokenizer), row=row)


def copied(text: Text, config: Config, subject: LanguageModel) -> Text:
    """Return `text` with only the tokens counted that a model can copy from earlier ones of their sequence."""
    length, triggers = text.row or 1, SOURCES.get(config.data.source, Source).TRIGGERS
    rows = text.tokens[: len(text.tokens) // length * length].view(-1, length)
    counted = torch.zeros_like(rows, dtype=torch.bool)
    if config.data.repeat:
        counted[:, config.data.repeat + 1 :] = True
    elif triggers:
        ids = torch.tensor([subject.tokenizer.token_to_id(symbol) for symbol in triggers])
        counted[:, 3:] = torch.isin(rows[:, 2:-1], ids)
    else:
        raise UserError(
            f"{COPIED}: {subject.folder} was trained without data.repeat and data=backcopy; take {HELD_OUT}"
        )
    return replace(text, tokens=rows.flatten(), counted=counted.flatten())


def training_text(subject: LanguageModel) -> torch.Tensor:
    """Return the first training shard of the subject's run, for calibration; see `first_shard`."""
    folder = find(subject.folder) if subject.config else None
    if folder is None or subject.config is None:
        raise UserError(f"quant.calibration=train: {subject.folder} is no run; name a text, quant.calibration=FILE")
    shards = training_shards(folder, instead="name a text, quant.calibration=FILE")
    return first_shard(shards, Layout.of(subject.config))


def first_shard(folder: Path, layout: Layout) -> torch.Tensor:
    """Return the first training shard in `folder`: its tokens, int64 (N,), or with a start token sequences (R, T+1)."""
    shards = Shards(folder, "train")
    shards.check_hash(0)
    return torch.from_numpy(_sequences(shards.tokens[0], layout, shards.manifest.eos_id).astype(np.int64))


def _encoding(tokenizer: Tokenizer) -> str:
    """Return a hash of what decides the tokens of a text: all but the tokens that are put around it."""
    return spec_hash(json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": None}))


def _sequences(tokens: np.ndarray, layout: Layout, eos_id: int) -> np.ndarray:
    """Return the tokens as they are; with a start token, the sequences that training reads, (R, T+1)."""
    return layout.within(len(tokens)).read(tokens, slice(None), eos_id) if layout.has_start else tokens


def _text(name: str, ids: np.ndarray, sha256: str, tokenizer: Tokenizer) -> Text:
    if len(ids) < 2:
        raise UserError(f"{name}: the text has {len(ids)} tokens; there is nothing to predict")
    sizes = token_bytes(tokenizer)
    return Text(name, torch.from_numpy(ids), torch.from_numpy(sizes[ids]), sha256)
