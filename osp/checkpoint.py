"""Checkpoints that know parameters by name and nothing of ranks, ZeRO stages or engines.

    checkpoints/step_00000100/rank_00000.safetensors   slices of fp32 weights and optimizer state
                              buffers.safetensors      model buffers (norm statistics)
                              manifest.json            step, tokens, config, parameter shapes, checksums
    checkpoints/latest                                 the name of the newest complete checkpoint

A tensor of a rank file is the slice [start, start + numel) of a flattened parameter; its key is `KIND/NAME@start` with
KIND `weight`, or a state of the optimizer such as `momentum`. Every rank writes what it holds, so that nobody ever has
the whole optimizer state in memory; a reader of any topology takes the slices it needs. A checkpoint is written under
a temporary name, flushed to disk and renamed, and only then named by `latest`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osp.config import ModelConfig, UserError, from_dict
from osp.model import Transformer

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BUFFERS = "buffers.safetensors"

Slice = tuple[str, int, int, dict[str, Tensor]]  # parameter name, start, stop, kind -> flat fp32 slice


@dataclass(frozen=True)
class Piece:
    """Where [start, stop) of one flattened tensor lies: the key inside a file."""

    file: Path
    key: str
    start: int
    stop: int


class Checkpoint:
    """A complete checkpoint on disk, verified against its manifest when opened."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{folder}: no checkpoint, {MANIFEST} is missing") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / MANIFEST}: not a manifest: {error}") from error
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"{folder}: checkpoint format {self.manifest.get('format')!r}; this version reads {FORMAT}")
        for name, entry in self.manifest["files"].items():
            path = folder / Path(name).name  # a manifest cannot point outside its folder
            if not path.exists():
                raise UserError(f"{path}: named by {MANIFEST} but missing; take an older checkpoint")
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                raise UserError(f"{path}: damaged, its checksum is not the one in {MANIFEST}; take an older checkpoint")
        self._pieces = self._index()

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def model_config(self) -> ModelConfig:
        return from_dict(self.manifest["config"]).model

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter by name."""
        return self.manifest["shapes"]

    def buffers(self) -> dict[str, Tensor]:
        return load_file(self.folder / BUFFERS)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) fp32: that interval of the flattened `kind` ("weight", "momentum", ...) of a parameter."""
        out = torch.empty(stop - start)
        filled = 0
        for piece in self._pieces.get((kind, name), []):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                with safe_open(piece.file, framework="pt") as file:
                    values = file.get_slice(piece.key)[low - piece.start : high - piece.start]
                out[low - start : high - start] = values
                filled += high - low
        if filled != stop - start:
            raise UserError(
                f"{self.folder}: {kind} of {name} covers {filled} of the {stop - start} values wanted; "
                "it was written by another optimizer or model"
            )
        return out

    def _index(self) -> dict[tuple[str, str], list[Piece]]:
        pieces: dict[tuple[str, str], list[Piece]] = {}
        for name in self.manifest["files"]:
            path = self.folder / Path(name).name
            if path.name == BUFFERS:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                        label, start = key.rsplit("@", 1)
                        kind, parameter = label.split("/", 1)
                        length = file.get_slice(key).get_shape()[0]
                        piece = Piece(path, key, int(start), int(start) + length)
                        pieces.setdefault((kind, parameter), []).append(piece)
            except SafetensorError as error:
                raise UserError(f"{path}: not a safetensors file: {error}") from error
        return pieces


def save(
    folder: Path,
    slices: Iterable[Slice],
    *,
    step: int,
    tokens: int,
    config: dict[str, Any],
    extra: dict[str, Any],
    shapes: dict[str, list[int]],
    buffers: dict[str, Tensor],
    rank: int,
    barrier: Callable[[], None],
    gather: Callable[[Any], list[Any]],
) -> Path:
    """Write checkpoint `step` into `folder` and point `latest` at it; all ranks call it together.

    slices: what this rank holds. gather: the values of all ranks, in order, on every rank.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    tensors = {
        f"{kind}/{name}@{start}": values.detach().cpu().contiguous()
        for name, start, _, states in slices
        for kind, values in states.items()
    }
    written = [_write(temporary / f"rank_{rank:05d}.safetensors", tensors)]
    if rank == 0:
        written.append(
            _write(temporary / BUFFERS, {name: b.detach().cpu().contiguous() for name, b in buffers.items()})
        )
    files = {name: entry for entries in gather(written) for name, entry in entries}
    if rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "tokens": tokens,
            "config": config,
            "shapes": shapes,
            "files": files,
            **extra,
        }
        _write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _write_text(folder / LATEST, final.name + "\n")
    barrier()
    return final


def load(checkpoint: Checkpoint, slices: Iterable[Slice], model: nn.Module) -> None:
    """Fill the slices that this rank holds, and the model's buffers, from a checkpoint of any topology."""
    with torch.no_grad():
        for name, start, stop, states in slices:
            for kind, values in states.items():
                values.copy_(checkpoint.read(kind, name, start, stop))
        stored = checkpoint.buffers()
        for name, buffer in model.named_buffers():
            buffer.copy_(stored[name])


def find(path: Path) -> Path | None:
    """The checkpoint folder that `path` means: a checkpoint, a `checkpoints` folder or a run folder; None if none."""
    if (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).exists():
            return folder / Path((folder / LATEST).read_text(encoding="utf-8").strip()).name
    return None


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints (0: keep all); never the one that `latest` names."""
    if keep_last:
        newest = find(folder)
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            if old != newest:
                shutil.rmtree(old)


def checkpoint_bytes(shapes: dict[str, list[int]], states_per_weight: float) -> int:
    """Size of a checkpoint: fp32 weights and `states_per_weight` fp32 optimizer values for each."""
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    return int(4 * numel * (1 + states_per_weight))


def load_model(path: str | Path) -> Transformer:
    """The trained model of a run folder or checkpoint, fp32 on the CPU, in eval mode.

    Needs neither DeepSpeed nor Hydra. Raises `UserError` if there is no checkpoint or it is damaged.
    """
    folder = find(Path(path))
    if folder is None:
        raise UserError(f"{path}: neither a run folder with a checkpoint nor a checkpoint")
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.model_config)
    model.to_empty(device="cpu")
    load(checkpoint, _whole_parameters(model), model)
    return model.eval()


def _whole_parameters(model: nn.Module) -> Iterator[Slice]:
    for name, parameter in model.named_parameters():
        yield name, 0, parameter.numel(), {"weight": parameter.detach().view(-1)}


def _write(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Write and flush a safetensors file; its name with size and checksum."""
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _write_text(path: Path, text: str) -> None:
    """Replace the file at once, flushed to disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
