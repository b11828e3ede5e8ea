"""Checkpoints by parameter name, independent of ranks, ZeRO stages and engines.

    checkpoints/step_00000100/rank_00000.safetensors   slices of fp32 weights and optimizer state; the rank's RNG
                              buffers.safetensors      model buffers (norm statistics)
                              manifest.json            step, tokens, positions, config, parameter shapes, checksums
    checkpoints/latest                                 the name of the newest complete checkpoint

A tensor of a rank file is the slice [start, start + numel) of a flattened parameter. Its key is `KIND/NAME@start`,
KIND being `weight`, `average` (osp.optim.average) or an optimizer state such as `momentum`. Every rank writes its own
share, so no rank ever holds the whole optimizer state; a reader on any topology takes the slices it needs. A checkpoint
is written under a temporary name, flushed to disk, renamed, and only then named by `latest`. No file can hold code.
"""

import dataclasses
import functools
import glob
import json
import logging
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
from typing_extensions import TypedDict

from osp.config import CheckpointConfig, Weights, from_dict
from osp.errors import UserError, as_user_error
from osp.files import flush, read_json, sha256_of, write_text
from osp.model.transformer import Transformer, meta_model
from osp.schema import Count, CountOrZero, build

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BUFFERS = "buffers.safetensors"
CLOSE_SECONDS = 10.0  # for the write of an abandoned save: a disk that hangs must not keep the process alive

log = logging.getLogger(__name__)

Slice = tuple[str, int, int, dict[str, Tensor]]  # parameter name, start, stop, kind -> flat fp32 slice
StoredSlice = tuple[Any, str, int, int]  # open file, key in it, start, stop
Written = tuple[dict[str, dict[str, Any]], float, str | None]  # by one rank: size and checksum of files, seconds, error
GatherObjects = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class _File:
    bytes: CountOrZero
    sha256: str


@dataclass(frozen=True)
class _Conversion:
    """Present in a checkpoint that scripts/convert.py wrote: weights only, no data to continue on."""

    steps: tuple[str, ...]  # what was done, in words
    bos_id: CountOrZero | None  # the token that begins a text, where it is not the one that ends it
    stop_ids: tuple[CountOrZero, ...] = ()  # the tokens that end a generated text, where they are several


@dataclass(frozen=True)
class Position:
    """What a run reads, and how far it is. Older versions recorded the first four keys."""

    next_step: CountOrZero  # see osp.data.loader.data_step
    rows_per_step: Count
    tokenizer_hash: str | None = None
    seed: CountOrZero | None = None
    next_row: CountOrZero | None = None  # number of the next sequence; None: next_step * rows_per_step
    shards: str | None = None  # absolute path of the folder of shards
    from_run: str | None = None  # the same, relative to the run folder
    content: tuple[str, ...] = ()  # see osp.data.manifest.content

    @property
    def row(self) -> int:
        return self.next_step * self.rows_per_step if self.next_row is None else self.next_row


class _Average(TypedDict):
    updates: CountOrZero


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
    data: Position | None = None
    conversion: _Conversion | None = None
    average: _Average | None = None  # of the weights, where slices of this kind are


class Checkpoint:
    """A complete checkpoint on disk. Opening it checks that every file exists with its size; `verify` reads them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.step: int = self.manifest["step"]
        self.tokens: int = self.manifest["tokens"]
        self.shapes: dict[str, list[int]] = self.manifest["shapes"]  # whole shape of every parameter
        data = self.manifest.get("data")
        self.data = build(Position, data) if data else Position(self.step, 1)  # of a conversion, which reads nothing
        with as_user_error(f"{folder / MANIFEST}: not the configuration of a run: ", UserError):
            self.config = from_dict(self.manifest["config"])
        for name, entry in self.manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: named by {MANIFEST} but missing; take an older checkpoint")
            size, expected = path.stat().st_size, entry["bytes"]
            if size != expected:
                raise UserError(f"{path}: damaged, {size} bytes instead of {expected}; take an older checkpoint")

    def verify(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Compare this rank's share of the files with their checksums. Raises `UserError` that names a damaged file."""
        for name in sorted(self.manifest["files"])[rank::world_size]:
            path = self.folder / name
            if sha256_of(path) != self.manifest["files"][name]["sha256"]:
                raise UserError(f"{path}: damaged, its checksum is not the one in {MANIFEST}; take an older checkpoint")
        _ = self._slices  # raises for a key that is no slice

    def check_weights(self, weights: Weights) -> None:
        """Raise `UserError` if the checkpoint lacks these weights."""
        if weights == "averaged" and not self.manifest.get("average"):
            raise UserError(f"{self.folder}: weights=averaged, but it has no average; set weights=trained")

    def kinds(self, name: str) -> list[str]:
        """Return what is stored of a parameter: "weight" and the names of its optimizer states."""
        return sorted(kind for kind, parameter in self._slices if parameter == name)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Return [start, stop) of a parameter's flattened `kind` ("weight", "momentum", ...), fp32 (stop - start,)."""
        out = torch.empty(stop - start)
        filled = 0
        for file, key, first, last in sorted(self._slices.get((kind, name), []), key=lambda stored: stored[2]):
            low, high = start + filled, min(stop, last)
            if first <= low < high:
                out[filled : high - start] = file.get_slice(key)[low - first : high - first]
                filled = high - start
        if filled != stop - start:
            problem = f"{kind} of {name} covers {filled} of the {stop - start} values wanted"
            raise UserError(f"{self.folder}: {problem}; it was written by another optimizer or model")
        return out

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Return the RNG states of a rank by device type; empty if the run had fewer ranks."""
        stored = {name: pieces[0] for (kind, name), pieces in self._slices.items() if kind == "rng"}
        own = {name.split("_")[0]: piece for name, piece in stored.items() if name.endswith(f"_{rank:05d}")}
        return {device: file.get_tensor(key) for device, (file, key, *_) in own.items()}

    @functools.cached_property
    def _slices(self) -> dict[tuple[str, str], list[StoredSlice]]:
        """The slices of every (kind, parameter), from the headers of the files."""
        slices: dict[tuple[str, str], list[StoredSlice]] = {}
        for path in (self.folder / name for name in self.manifest["files"] if name != BUFFERS):
            with as_user_error(f"{path}: not a safetensors file: ", SafetensorError):
                file: Any = safe_open(path, framework="pt").__enter__()
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                try:
                    label, start = key.rsplit("@", 1)
                    kind, parameter = label.split("/", 1)
                    (length,) = file.get_slice(key).get_shape()
                    stored = (file, key, int(start), int(start) + length)
                except ValueError as error:
                    raise UserError(f"{path}: {key!r} is no slice of a checkpoint, KIND/NAME@START") from error
                slices.setdefault((kind, parameter), []).append(stored)
        return slices


@dataclass(frozen=True)
class Saved:
    """Outcome of a save, the same on all ranks. Times are of the slowest rank."""

    step: int
    folder: Path
    error: str | None  # why the checkpoint does not exist; None: it does
    num_bytes: int = 0
    blocked_seconds: float = 0.0  # time that training stood still
    write_seconds: float = 0.0  # time in the background


class Saver:
    """Write checkpoints in the background, where nothing is exchanged. Collective: all ranks call the same in order.

        saver.begin(...)    copies this rank's state to host memory and starts to write it
        saver.advance()     once `write_done` on all ranks: rank 0 renames the folder and updates `latest`
        saver.advance()     once `write_done` again on all ranks: returns the outcome

    Training continues between the calls; `advance` waits for work that is not done. token: part of the name of the
    temporary folder, the same on all ranks and unique to this process. gather: returns the values of all ranks.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, token: str, rank: int, gather: GatherObjects):
        self.folder, self.config = folder, config
        self._token, self._rank, self._gather = token, rank, gather
        self._host: dict[str, Tensor] = {}  # reused by every save: allocating page-locked memory is slow
        self._manifest: dict[str, Any] = {}
        self._final = self._temporary = folder  # of the save in progress
        self._thread = ThreadPoolExecutor(1, "osp-save")
        self._writing: Future[Written] | None = None
        self._publishing: Future[str | None] | None = None  # follows _writing; its result is an error on rank 0
        self._written: list[Written] = []  # by all ranks
        self._blocked = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is in progress: `begin` was called, `finish` was not."""
        return self._writing is not None

    @property
    def write_done(self) -> bool:
        """Whether the work since the last call is done: this rank's files are written, or rank 0 has published all."""
        background = self._publishing or self._writing
        return background is not None and background.done()

    def begin(
        self, slices: Iterable[Slice], *, rng: dict[str, Tensor], buffers: dict[str, Tensor], manifest: dict[str, Any]
    ) -> None:
        """Copy this rank's state to host memory and start to write it. `format` and `files` join the `manifest`."""
        assert not self.busy, "finish() the last save first"
        began = time.perf_counter()
        tensors = {f"{kind}/{name}@{start}": x for name, start, _, states in slices for kind, x in states.items()}
        tensors |= {f"rng/{device}_{self._rank:05d}@0": state for device, state in rng.items()}
        files = {f"rank_{self._rank:05d}.safetensors": self._to_host(tensors)}
        if self._rank == 0:
            files[BUFFERS] = self._to_host(buffers)
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        self._manifest = manifest
        self._final = self.folder / f"step_{manifest['step']:08d}"
        self._temporary = self.folder / f".{self._final.name}.{self._token}.tmp"
        self._writing = self._thread.submit(self._write, files)
        self._blocked = time.perf_counter() - began

    def advance(self) -> Saved | None:
        """Wait for the files of every rank and let rank 0 publish them; return the outcome at the second call."""
        assert self._writing is not None, "begin() a save first"
        began = time.perf_counter()
        if self._publishing is None:
            self._written = self._gather(self._writing.result())
            self._publishing = self._thread.submit(self._publish if self._rank == 0 else lambda: None)
            self._blocked += time.perf_counter() - began
            return None
        error = self._publishing.result()
        self._writing = self._publishing = None
        outcomes = self._gather((error, self._blocked + time.perf_counter() - began))
        return Saved(
            step=self._manifest["step"],
            folder=self._final,
            error=outcomes[0][0],
            num_bytes=sum(entry["bytes"] for files, *_ in self._written for entry in files.values()),
            blocked_seconds=max(seconds for _, seconds in outcomes),
            write_seconds=max(seconds for _, seconds, _ in self._written),
        )

    def finish(self) -> Saved:
        """Wait for the save in progress and return its outcome. Collective."""
        return self.advance() or self.finish()

    def close(self) -> None:
        """End the thread after old checkpoints are removed. A save that was not finished is abandoned."""
        background: list[Future[Any]] = [future for future in (self._writing, self._publishing) if future]
        _, hanging = wait(background, timeout=CLOSE_SECONDS)
        self._thread.shutdown(wait=not hanging)

    def _to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for key, values in tensors.items():
            if key not in self._host:
                self._host[key] = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)
            copies[key] = self._host[key].copy_(values.detach(), non_blocking=True)
        return copies

    def _write(self, contents: dict[str, dict[str, Tensor]]) -> Written:
        """In the background: write this rank's files and flush them to disk."""
        began, files, error = time.perf_counter(), {}, None
        try:
            self.folder.mkdir(exist_ok=True)  # not its parent: a run folder that was removed stays removed
            self._temporary.mkdir(exist_ok=True)
            for name, tensors in contents.items():
                files[name] = write_tensors(self._temporary / name, tensors)
        except (OSError, SafetensorError) as problem:
            error = f"{self._final}: {problem}"
        return files, time.perf_counter() - began, error

    def _publish(self) -> str | None:
        """In the background of rank 0: write the manifest, rename the folder, update `latest`. Return the error."""
        errors = [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(self._written) if error]
        files = {name: entry for files, *_ in self._written for name, entry in files.items()}
        manifest = {"format": FORMAT, **self._manifest, "files": files}
        try:
            if errors:
                raise OSError(errors[0])
            # metrics and events of the steps before
            for lines in filter(Path.is_file, self.folder.parent.glob("*.jsonl")):
                flush(lines)
            write_text(self._temporary / MANIFEST, json.dumps(manifest, indent=1))
            flush(self._temporary)
            remove(self._final)
            self._temporary.rename(self._final)
            flush(self.folder)
            write_text(self.folder / LATEST, self._final.name + "\n")
        except OSError as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return str(error)
        # in the background too: some file systems take seconds to remove a large file
        self._thread.submit(prune, self.folder, keep_last=self.config.keep_last, keep_every=self.config.keep_every)
        return None


def load(checkpoint: Checkpoint, slices: Iterable[Slice], model: nn.Module) -> None:
    """Copy a checkpoint of any topology into the slices of this rank and into the buffers of `model`."""
    with torch.no_grad():
        for name, start, stop, states in slices:
            for kind, values in states.items():
                values.copy_(checkpoint.read(kind, name, start, stop))
        with as_user_error(f"{checkpoint.folder / BUFFERS}: missing or damaged (", OSError, SafetensorError, after=")"):
            stored = load_file(checkpoint.folder / BUFFERS)
        for name, buffer in model.named_buffers():
            if name not in stored or stored[name].shape != buffer.shape:
                raise UserError(f"{checkpoint.folder}: {BUFFERS} lacks {name}; it was written by another model")
            buffer.copy_(stored[name])


def checkpoint_bytes(shapes: dict[str, list[int]], states_per_weight: float) -> int:
    """Return the size of a checkpoint: fp32 weights, and `states_per_weight` fp32 optimizer values for each."""
    return int(4 * sum(torch.Size(shape).numel() for shape in shapes.values()) * (1 + states_per_weight))


def candidates(path: Path) -> list[Path]:
    """Return the checkpoint folders that `path` names, best first; empty if there are no checkpoints.

    `path` is a checkpoint, or a run folder or its `checkpoints`: these name the target of `latest` and all older ones.
    """
    if (path / MANIFEST).exists():
        return [path]
    for folder in (path, path / "checkpoints"):
        complete = sorted((manifest.parent for manifest in folder.glob(f"step_*/{MANIFEST}")), reverse=True)
        if newest := _latest(folder):
            # a damaged `latest` names no step: then every complete checkpoint counts as older
            return [newest, *(p for p in complete if p.name < newest.name or newest.name[:5] != "step_")]
        if complete:
            return complete
    return []


def find(path: Path) -> Path | None:
    """Return the first of `candidates(path)`, None without any."""
    return next(iter(candidates(path)), None)


def prune(folder: Path, *, keep_last: int, keep_every: int = 0) -> None:
    """Remove all checkpoints but the newest `keep_last` (0: keep all) and the multiples of `keep_every` steps.

    Keeps the target of `latest`, and every incomplete checkpoint: another process may be writing it.
    """
    try:
        newest = _latest(folder)
        complete = sorted(manifest.parent for manifest in folder.glob(f"step_*/{MANIFEST}"))
        for old in complete[:-keep_last] if keep_last else []:
            step = old.name.removeprefix("step_")
            kept = keep_every and step.isdigit() and int(step) % keep_every == 0
            if old != newest and not kept:
                remove(old)
    except OSError as error:
        log.warning("%s: old checkpoints are not removed: %s", folder, error)


def copies_to_write(folder: Path, config: CheckpointConfig, *, first: int, last: int) -> int:
    """Return how many more checkpoints than now `folder` holds at most while a run goes from step `first` to `last`."""
    existing = {int(p.parent.name[5:]) for p in folder.glob(f"step_*/{MANIFEST}") if p.parent.name[5:].isdigit()}
    regular = range((first // config.every + 1) * config.every, last, config.every) if config.every else ()
    kept, beside = existing.union(regular), 1  # when the last one is written, beside them
    if config.keep_last:
        multiples = {step for step in kept if config.keep_every and step % config.keep_every == 0}
        kept = multiples.union(sorted(kept)[-config.keep_last :])
        beside += max(existing, default=0) > first  # a run that has gone back keeps its newest beside later ones
    return max(1, len(kept) + beside - len(existing))


def remove(folder: Path) -> None:
    """Remove a checkpoint. A crash in between leaves no half of it under its name."""
    if folder.exists():
        away = folder.with_name(f".{folder.name}.removed.tmp")
        shutil.rmtree(away, ignore_errors=True)
        folder.rename(away)
        shutil.rmtree(away)


def remove_unfinished(folder: Path, token: str) -> None:
    """Remove the half-written and half-removed folders of a dead process with this token."""
    for path in [*folder.glob(f".step_*.{glob.escape(Path(token).name)}.tmp"), *folder.glob(".step_*.removed.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def load_model(path: str | Path, *, weights: Weights = "trained") -> Transformer:
    """Return the trained model of a run folder or checkpoint, fp32 on the CPU, in eval mode; needs no DeepSpeed.

    weights: `averaged` reads the running average of its weights. Raises `UserError` if the run kept none.
    """
    if (folder := find(Path(path))) is None:
        raise UserError(f"{path}: neither a run folder with a checkpoint nor a checkpoint")
    checkpoint = Checkpoint(folder)
    checkpoint.check_weights(weights)
    checkpoint.verify()
    model = meta_model(checkpoint.config.model)
    shapes = checkpoint.shapes
    if other := next((name for name, p in model.named_parameters() if shapes.get(name) != list(p.shape)), None):
        raise UserError(f"{folder / MANIFEST}: its shape of {other} is not that of its config; take another checkpoint")
    wanted = 4 * sum(parameter.numel() for parameter in model.parameters())
    held = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
    if wanted > held:  # before memory is allocated
        raise UserError(f"{folder}: a model of {wanted} bytes cannot be in files of {held}; take another checkpoint")
    model.to_empty(device="cpu")
    load(checkpoint, whole_parameters(model, "weight" if weights == "trained" else "average"), model)
    if weights == "averaged":
        model.refresh_norms()  # the stored statistics are from the trained weights
    return model.eval()


def whole_parameters(model: nn.Module, kind: str = "weight") -> Iterator[Slice]:
    """Yield the slices of a rank that holds every parameter as this kind, and nothing else."""
    for name, parameter in model.named_parameters():
        yield name, 0, parameter.numel(), {kind: parameter.detach().view(-1)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, with every key of `_Manifest` present and of its type."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: no checkpoint, {MANIFEST} is missing")
    with as_user_error(f"{path}: not a manifest: ", UserError):
        manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a manifest but a {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}")
    known = {field.name for field in dataclasses.fields(_Manifest)}
    with as_user_error(f"{path}: damaged: ", UserError, after="; take an older checkpoint"):
        build(_Manifest, {key: value for key, value in manifest.items() if key in known})
    for name in manifest["files"]:
        if Path(name).name != name or name in ("", ".", "..") or len(name.encode()) > 255:
            raise UserError(f"{path}: names the file {name!r} outside of its folder")
    return manifest


def _latest(folder: Path) -> Path | None:
    """Return the target of the file `latest`, always inside `folder`; None without the file."""
    path = folder / LATEST
    if not path.is_file():  # a pipe would be read without end
        return None
    name = Path(path.read_text(encoding="utf-8", errors="replace").strip()).name[:60]
    return folder / name if name else None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write and flush a safetensors file; return its size and checksum."""
    save_file(tensors, path)
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
