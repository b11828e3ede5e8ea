"""Checkpoints that know parameters by name and nothing of ranks, ZeRO stages or engines.

    checkpoints/step_00000100/rank_00000.safetensors   slices of fp32 weights and optimizer state; the rank's RNG
                              buffers.safetensors      model buffers (norm statistics)
                              manifest.json            step, tokens, positions, config, parameter shapes, checksums
    checkpoints/latest                                 the name of the newest complete checkpoint

A tensor of a rank file is the slice [start, start + numel) of a flattened parameter; its key is `KIND/NAME@start` with
KIND `weight`, or a state of the optimizer such as `momentum`. Every rank writes what it holds, so that nobody ever has
the whole optimizer state in memory; a reader of any topology takes the slices it needs. A checkpoint is written under
a temporary name, flushed to disk and renamed, and only then named by `latest`. Nothing that is read can hold code.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osp.config import Config, CountOrZero, ModelConfig, build, check_bounds, from_dict
from osp.errors import UserError
from osp.files import flush_folder, write_text
from osp.model.transformer import Transformer, meta_model

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BUFFERS = "buffers.safetensors"
CLOSE_SECONDS = 10.0  # for the write of a save that nobody will finish; a disk that hangs must not keep a run alive

log = logging.getLogger(__name__)

Slice = tuple[str, int, int, dict[str, Tensor]]  # parameter name, start, stop, kind -> flat fp32 slice


@dataclass(frozen=True)
class Piece:
    """Where [start, stop) of one flattened tensor lies: the key inside a file."""

    file: Path
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class _File:
    bytes: CountOrZero
    sha256: str


@dataclass(frozen=True)
class _Conversion:
    """Of a checkpoint that osp.convert.change_norm wrote: weights alone, and no text that it was trained on here."""

    steps: tuple[str, ...]  # what was done, in words
    bos_id: CountOrZero | None  # the token that a text begins with, where it is another than the one that ends it


@dataclass(frozen=True)
class _Manifest:
    """The keys of a manifest that a reader relies on."""

    step: CountOrZero
    tokens: CountOrZero
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, _File]
    skipped: CountOrZero = 0
    spikes: dict[str, list[float]] = field(default_factory=dict)
    conversion: _Conversion | None = None


class Checkpoint:
    """A complete checkpoint on disk. Its files are there and of the right size; `verify` reads them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.config = _read_config(folder, self.manifest["config"])
        for name, entry in self.manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: named by {MANIFEST} but missing; take an older checkpoint")
            if path.stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{path}: damaged, it has {path.stat().st_size} bytes where {MANIFEST} says {entry['bytes']}; "
                    "take an older checkpoint"
                )
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        self._open: dict[Path, Any] = {}

    def verify(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Compare this rank's share of the files with their checksums; `UserError` names one that differs."""
        for name in sorted(self.manifest["files"])[rank::world_size]:
            path = self.folder / name
            if _sha256(path) != self.manifest["files"][name]["sha256"]:
                raise UserError(f"{path}: damaged, its checksum is not the one in {MANIFEST}; take an older checkpoint")
        self._index()

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter by name."""
        return self.manifest["shapes"]

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers by name."""
        return load_file(self.folder / BUFFERS)

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter: "weight" and the states of its optimizer."""
        return sorted(kind for kind, parameter in self._index() if parameter == name)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) fp32: that interval of the flattened `kind` ("weight", "momentum", ...) of a parameter."""
        out = torch.empty(stop - start)
        filled = 0
        for piece in self._index().get((kind, name), []):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                values = self._file(piece.file).get_slice(piece.key)[low - piece.start : high - piece.start]
                out[low - start : high - start] = values
                filled += high - low
        if filled != stop - start:
            raise UserError(
                f"{self.folder}: {kind} of {name} covers {filled} of the {stop - start} values wanted; "
                "it was written by another optimizer or model"
            )
        return out

    def rng(self, rank: int) -> dict[str, Tensor]:
        """The states of the random generators of that rank, by device type; empty if it had no such rank."""
        pieces = [p for (kind, name), ps in self._index().items() if kind == "rng" for p in ps if f"{rank:05d}" in name]
        return {piece.key.split("/")[1].split("_")[0]: self._file(piece.file).get_tensor(piece.key) for piece in pieces}

    def _index(self) -> dict[tuple[str, str], list[Piece]]:
        """Kind and parameter -> where its slices are; read from the files' headers when first asked for."""
        if self._pieces:
            return self._pieces
        for name in self.manifest["files"]:
            if name == BUFFERS:
                continue
            path = self.folder / name
            for key in self._file(path).keys():  # noqa: SIM118 - safe_open is no mapping
                try:
                    label, start = key.rsplit("@", 1)
                    kind, parameter = label.split("/", 1)
                    (length,) = self._file(path).get_slice(key).get_shape()
                    piece = Piece(path, key, int(start), int(start) + length)
                except ValueError as error:
                    raise UserError(f"{path}: {key!r} is no slice of a checkpoint, KIND/NAME@START") from error
                self._pieces.setdefault((kind, parameter), []).append(piece)
        return self._pieces

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            except SafetensorError as error:
                raise UserError(f"{path}: not a safetensors file: {error}") from error
        return self._open[path]


@dataclass(frozen=True)
class Saved:
    """How a save went, the same on all ranks. Seconds are those of the slowest rank."""

    step: int
    folder: Path
    error: str | None  # why there is no such checkpoint; None: it is there
    num_bytes: int = 0
    blocked_seconds: float = 0.0  # training stood still
    write_seconds: float = 0.0  # in the background


@dataclass
class _Share:
    """What one rank has written."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> bytes, sha256
    seconds: float = 0.0
    error: str | None = None


class Saver:
    """Saves checkpoints into `folder`: copies the state to host memory, then writes while training goes on.

    All ranks call `begin`; once `through` holds everywhere `publish`, and once it does again `finish`, which also waits
    for what is missing. Between these nothing is exchanged. token: part of the temporary folder's name, the same on all
    ranks and no other process's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int,
        token: str,
        rank: int,
        gather: Callable[[Any], list[Any]],
    ):
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._token, self._rank, self._gather = token, rank, gather
        self._host: dict[str, Tensor] = {}  # kept from save to save: page-locked memory is slow to come by
        self._manifest: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, "osp-save")
        self._writing: Future[_Share] | None = None
        self._publishing: Future[str | None] | None = None  # after that; what went wrong, on the first rank
        self._shares: list[_Share] = []  # of all ranks
        self._blocked = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save has begun that is not finished."""
        return self._writing is not None

    @property
    def through(self) -> bool:
        """Whether a save is in progress, and what this rank last began to do for it in the background is over."""
        return self._background is not None and self._background.done()

    @property
    def published(self) -> bool:
        """Whether `publish` has been called for the save in progress."""
        return self._publishing is not None

    def begin(
        self, slices: Iterable[Slice], *, rng: dict[str, Tensor], buffers: dict[str, Tensor], manifest: dict[str, Any]
    ) -> None:
        """Copy what this rank holds and start writing it. manifest: all of it but the format and the files."""
        assert not self.busy, "finish() the save before"
        began = time.perf_counter()
        tensors = {
            f"{kind}/{name}@{start}": values for name, start, _, states in slices for kind, values in states.items()
        }
        tensors |= {f"rng/{device}_{self._rank:05d}@0": state for device, state in rng.items()}
        files = {f"rank_{self._rank:05d}.safetensors": self._to_host(tensors)}
        if self._rank == 0:
            files[BUFFERS] = self._to_host(buffers)
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        self._manifest = manifest
        self._writing = self._thread.submit(self._write, files)
        self._blocked = time.perf_counter() - began

    def publish(self) -> None:
        """Wait until all ranks have written, and have the first one make the checkpoint known. Collective."""
        assert self._writing is not None, "nothing has begun"
        assert self._publishing is None, "once is enough"
        began = time.perf_counter()
        self._shares = self._gather(self._writing.result())
        self._publishing = self._thread.submit(self._publish if self._rank == 0 else _nothing)
        self._blocked += time.perf_counter() - began

    def finish(self) -> Saved:
        """Wait until the checkpoint is known, or has failed. Collective."""
        if self._publishing is None:
            self.publish()
        assert self._publishing is not None
        began = time.perf_counter()
        error = self._publishing.result()
        self._writing = self._publishing = None
        outcomes = self._gather((error, self._blocked + time.perf_counter() - began))
        return Saved(
            step=self._manifest["step"],
            folder=self._final,
            error=outcomes[0][0],
            num_bytes=sum(entry["bytes"] for share in self._shares for entry in share.files.values()),
            blocked_seconds=max(seconds for _, seconds in outcomes),
            write_seconds=max(share.seconds for share in self._shares),
        )

    def close(self) -> None:
        """End the thread; a save that was begun and not finished is no checkpoint, and is not waited for long.

        Old checkpoints are removed when it returns.
        """
        if self._background is not None:
            wait([self._background], timeout=CLOSE_SECONDS)
        self._thread.shutdown(wait=self._background is None or self._background.done())

    @property
    def _background(self) -> Future[Any] | None:
        """What is under way of the save in progress."""
        return self._publishing or self._writing

    @property
    def _final(self) -> Path:
        return self.folder / f"step_{self._manifest['step']:08d}"

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self._final.name}.{self._token}.tmp"

    def _to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for key, values in tensors.items():
            if key not in self._host:
                self._host[key] = torch.empty(
                    values.shape, dtype=values.dtype, device="cpu", pin_memory=values.device.type == "cuda"
                )
            copies[key] = self._host[key].copy_(values.detach(), non_blocking=True)
        return copies

    def _write(self, files: dict[str, dict[str, Tensor]]) -> _Share:
        """In the background: this rank's files, flushed to disk."""
        began, share = time.perf_counter(), _Share()
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            for name, tensors in files.items():
                share.files[name] = _write_tensors(self._temporary / name, tensors)
        except (OSError, SafetensorError) as error:
            share.error = f"{self._final}: {error}"
        share.seconds = time.perf_counter() - began
        return share

    def _publish(self) -> str | None:
        """In the background, on rank 0: name what all have written; the error if that fails."""
        errors = [f"rank {rank}: {share.error}" for rank, share in enumerate(self._shares) if share.error]
        if errors:
            return self._give_up(errors[0])
        files = {name: entry for share in self._shares for name, entry in share.files.items()}
        manifest = {"format": FORMAT, **self._manifest, "files": files}
        try:
            write_text(self._temporary / MANIFEST, json.dumps(manifest, indent=1))
            flush_folder(self._temporary)
            remove(self._final)
            self._temporary.rename(self._final)
            flush_folder(self.folder)
            write_text(self.folder / LATEST, self._final.name + "\n")
        except OSError as error:
            return self._give_up(str(error))
        self._thread.submit(self._prune)  # some file systems take seconds to remove a large file
        return None

    def _prune(self) -> None:
        """In the background: remove the checkpoints that are not to be kept."""
        try:
            prune(self.folder, keep_last=self.keep_last, keep_every=self.keep_every)
        except OSError as error:
            log.warning("%s: old checkpoints are not removed: %s", self.folder, error)

    def _give_up(self, error: str) -> str:
        shutil.rmtree(self._temporary, ignore_errors=True)
        return error


def _nothing() -> None:
    """What the other ranks do while the first one publishes."""


def load(checkpoint: Checkpoint, slices: Iterable[Slice], model: nn.Module) -> None:
    """Fill the slices that this rank holds, and the model's buffers, from a checkpoint of any topology."""
    with torch.no_grad():
        for name, start, stop, states in slices:
            for kind, values in states.items():
                values.copy_(checkpoint.read(kind, name, start, stop))
        stored = checkpoint.buffers()
        for name, buffer in model.named_buffers():
            if name not in stored:
                raise UserError(f"{checkpoint.folder}: {BUFFERS} lacks {name}; it was written by another model")
            buffer.copy_(stored[name])


def candidates(path: Path) -> list[Path]:
    """The checkpoint folders that `path` means, the one to take first first; empty if there is none.

    A checkpoint means itself; a run folder or its `checkpoints` mean the one that `latest` names and those before it.
    """
    if (path / MANIFEST).exists():
        return [path]
    for folder in (path, path / "checkpoints"):
        complete = sorted((p.parent for p in folder.glob(f"step_*/{MANIFEST}")), reverse=True)
        if complete or (folder / LATEST).exists():
            newest = _latest(folder)
            # where `latest` is damaged and names no step, all of them are older
            older = [p for p in complete if newest is None or p.name < newest.name or newest.name[:5] != "step_"]
            return [newest, *older] if newest else older
    return []


def find(path: Path) -> Path | None:
    """The checkpoint folder that `path` means; None if there is none."""
    return next(iter(candidates(path)), None)


def prune(folder: Path, *, keep_last: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep_last` checkpoints (0: keep all) and those of every `keep_every` steps.

    What `latest` names stays, and so does whatever is no complete checkpoint: another process may be writing it.
    """
    if not keep_last:
        return
    newest = _latest(folder)
    for old in sorted(p.parent for p in folder.glob(f"step_*/{MANIFEST}"))[:-keep_last]:
        step = old.name.removeprefix("step_")
        kept = keep_every and step.isdigit() and int(step) % keep_every == 0
        if old != newest and not kept:
            remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a crash in between leaves no half of it under its name."""
    if folder.exists():
        away = folder.with_name(f".{folder.name}.removed.tmp")
        shutil.rmtree(away, ignore_errors=True)
        folder.rename(away)
        shutil.rmtree(away)


def remove_unfinished(folder: Path, token: str) -> None:
    """Remove what a process with this token, known to be gone, left half-written or half-removed."""
    for pattern in (f".step_*.{token}.tmp", ".step_*.removed.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_bytes(shapes: dict[str, list[int]], states_per_weight: float) -> int:
    """Size of a checkpoint: fp32 weights and `states_per_weight` fp32 optimizer values for each."""
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    return int(4 * numel * (1 + states_per_weight))


def seconds_to_write(folder: Path, num_bytes: int, *, sample: int = 2**26) -> float:
    """How long `num_bytes` take from memory to the disk of `folder`, by writing, flushing and hashing `sample` bytes.

    All ranks measure at the same time, as they save at the same time. Nothing is left behind.
    """
    path = folder / f".write_test.{os.getpid()}.tmp"
    sample = max(1, min(sample, num_bytes))
    began = time.perf_counter()
    try:
        _write_tensors(path, {"x": torch.zeros(sample, dtype=torch.uint8)})
    finally:
        path.unlink(missing_ok=True)
    return (time.perf_counter() - began) * num_bytes / sample


def load_model(path: str | Path) -> Transformer:
    """The trained model of a run folder or checkpoint, fp32 on the CPU, in eval mode.

    Needs neither DeepSpeed nor Hydra. Raises `UserError` if there is no checkpoint or it is damaged.
    """
    folder = find(Path(path))
    if folder is None:
        raise UserError(f"{path}: neither a run folder with a checkpoint nor a checkpoint")
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    model = meta_model(checkpoint.model_config)
    model.to_empty(device="cpu")
    load(checkpoint, whole_parameters(model), model)
    return model.eval()


def whole_parameters(model: nn.Module) -> Iterator[Slice]:
    for name, parameter in model.named_parameters():
        yield name, 0, parameter.numel(), {"weight": parameter.detach().view(-1)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every field that is read here present and of its type."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no checkpoint, {MANIFEST} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a manifest: {error}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a manifest but a {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}")
    try:
        known = {field.name for field in dataclasses.fields(_Manifest)}
        check_bounds(build(_Manifest, {key: value for key, value in manifest.items() if key in known}))
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}; take an older checkpoint") from error
    for name in manifest["files"]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{path}: names the file {name!r} outside of its folder")
    return manifest


def _read_config(folder: Path, values: dict[str, Any]) -> Config:
    """The configuration in a manifest."""
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{folder / MANIFEST}: not the configuration of a run: {error}") from error


def _latest(folder: Path) -> Path | None:
    """What the file `latest` names, inside `folder`; None without one."""
    try:
        name = Path((folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()).name
    except FileNotFoundError:
        return None
    return folder / name if name else None


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write and flush a safetensors file; its size and checksum."""
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
