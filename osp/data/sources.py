"""Sources of documents: one class per source, registered in `SOURCES` under the name that `data.source` uses.

To add a source, subclass `Source` and add the class to `SOURCES`; preparation, shard folders and mixtures ask the class
for everything they need. A document may be empty: preparation leaves empty documents out.
"""

import contextlib
import io
import logging
import lzma
import os
import re
import string
import sys
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from osp.config import DataConfig, TextConfig
from osp.data.tokenizer import HUB_TIMEOUT
from osp.errors import UserError, as_user_error
from osp.files import parse_json, printable

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = ".txt, .md, .py, .jsonl, .ndjson, .json (each also with .gz, .xz or .zst), .parquet"
FORMAT = re.compile(r"\.(?:parquet$|(?:txt|md|py|jsonl|ndjson|json)(?=$|\.gz$|\.xz$|\.zst$))", re.IGNORECASE)


def _zstandard() -> Any:
    import zstandard  # a machine that reads no .zst files may lack it

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".zst": _zstandard,
}
PIECE = 2**12  # compressed bytes to expand at a time, at most 32,768-fold
MOST_BYTES = 2**28  # of a record, and of a compressed text
TOO_LONG = f"longer than {MOST_BYTES >> 20} MiB; split it into several"
# Files that are together only in a run, shards (the second while they begin), a model, an ablation or a folder of W&B
OWN = "config.yaml metrics.jsonl, manifest.json tokenizer.json, lock tokenizer.json, config.yaml tokenizer.json, "
OWN += "config.json tokenizer.json, ablation.json ablation.md, debug-internal.log latest-run"
OWN_FOLDERS = [set(names.split()) for names in OWN.split(", ")]

logger = logging.getLogger(__name__)
report_once = cache(logger.info)  # the child of `start_preparing`, whose level is higher, reports nothing again


class Source(ABC):
    """A stream of documents whose order depends on its configuration alone."""

    IN_MIXTURE = True  # may be a part of a mixture
    OF_CHARACTERS = False  # each character is a token, and the tokenizer is made for that
    TRIGGERS: str = ""  # characters after which the character before them is repeated

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        """Check `config`, the whole `data` or a part of `data.mixture`. key: its name in messages"""
        self.config, self.key = config, key
        self.label = config.source  # first part of the name of the folder with the shards

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield the texts of the source."""

    @abstractmethod
    def fingerprint(self) -> Any:
        """Return JSON that identifies the content without reading it: changed files give another value."""


class PythonStdlib(Source):
    """The running interpreter's standard library: one document per module, sorted by path."""

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        self.label = f"python_stdlib-{sys.version_info.major}.{sys.version_info.minor}"

    def documents(self) -> Iterator[str]:
        root = Path(sysconfig.get_path("stdlib"))
        for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
            if {"site-packages", "dist-packages", "__pycache__"}.isdisjoint(name.split("/")):
                # a few test modules are written in other encodings
                with contextlib.suppress(UnicodeDecodeError):
                    yield (root / name).read_bytes().decode()

    def fingerprint(self) -> Any:
        return [sys.version, sysconfig.get_path("stdlib")]


class TextFiles(Source):
    """Local files: a .txt, .md or .py file is one document, a record of a .json, .jsonl or .parquet file is one."""

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        if not config.paths:
            raise UserError(f"{key}.paths is empty; name files or folders, for example {key}.paths=[corpus.jsonl]")
        self.label = Path(config.paths[0]).name.split(".")[0]

    def documents(self) -> Iterator[str]:
        for path in list_files(self.config.paths, self.config.text_field):
            kind = FORMAT.findall(path.name)[0].lower()
            with as_user_error(f"cannot read {path}: ", EOFError, OSError):
                if kind == ".parquet":
                    yield from _parquet_documents(path, self.config.text_field)
                elif kind in TEXT_SUFFIXES:
                    yield _text(path)
                else:
                    yield from _json_documents(path, self.config.text_field)

    def fingerprint(self) -> Any:
        return _sizes_and_times(list_files(self.config.paths, self.config.text_field))


class HubDataset(Source):
    """A Hugging Face data set, streamed; a null is an empty document."""

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        if not config.dataset:
            raise UserError(f"{key}.dataset is not set; name a Hugging Face data set, for example allenai/c4")
        if Path(config.dataset).is_file():
            raise UserError(f"{key}.dataset={config.dataset} is a file; name its folder, or use data=text")
        self.label = f"{config.dataset}-{config.subset}" if config.subset else config.dataset

    def documents(self) -> Iterator[str]:
        import datasets
        import huggingface_hub

        config, dataset, number = self.config, str(self.config.dataset), 0
        name = f"data.dataset={dataset}" + (f" (subset {config.subset})" if config.subset else "")
        try:
            if Path(dataset).is_dir():
                dataset = os.path.join(os.curdir, dataset)  # a folder called json is not the loader of that name
            else:
                with as_user_error(f"{name} cannot be reached from the Hugging Face hub: ", Exception):
                    huggingface_hub.HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
            is_dict = Path(dataset, "dataset_dict.json").exists()
            if is_dict or Path(dataset, "state.json").exists():  # by save_to_disk
                stream = datasets.load_from_disk(os.path.join(dataset, config.split * is_dict))
            else:
                stream = datasets.load_dataset(dataset, config.subset, split=config.split, streaming=True)
            for number, record in enumerate(stream, start=1):
                is_null = record.get(config.text_field, "") is None
                yield "" if is_null else _text_of(record, config.text_field, where=f"{name}, record {number}")
        except UserError:
            raise
        except Exception as error:  # whatever the readers of `datasets` raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name}, split {config.split}: cannot be read after record {number}: {reason}") from error

    def fingerprint(self) -> Any:
        folder = Path(str(self.config.dataset))
        return _sizes_and_times(_files_in(folder)[0]) if folder.is_dir() else None  # on the hub it is constant


class Mixture(Source):
    """Several sources, interleaved so that their shares of the bytes follow their weights."""

    IN_MIXTURE = False

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        assert isinstance(config, DataConfig)
        if not config.mixture:
            raise UserError(f"{key}.source=mixture but {key}.mixture is empty; list at least one source")
        self.weights = [part.weight for part in config.mixture]
        self.parts = [make_source(part, f"{key}.mixture[{i}]") for i, part in enumerate(config.mixture)]

    def documents(self) -> Iterator[str]:
        """Yield the documents of all parts; the next part is the one with the fewest bytes relative to its weight.

        Bytes stand for tokens, which are not known yet. When a part ends, the others continue.
        """
        streams = [part.documents() for part in self.parts]
        num_bytes = [0] * len(streams)
        alive = list(range(len(streams)))
        while alive:
            i = min(alive, key=lambda i: num_bytes[i] / self.weights[i])
            text = next(streams[i], None)
            if text is not None:
                num_bytes[i] += max(1, len(text.encode()))  # an endless run of empty documents still takes its turns
                yield text
                continue
            alive.remove(i)
            if alive:
                part = self.parts[i].config
                name = " ".join(filter(None, [part.source, part.dataset, part.subset, *part.paths]))
                logger.warning("data.mixture: %s is exhausted; continuing without it", name)

    def fingerprint(self) -> Any:
        return [part.fingerprint() for part in self.parts]


class Backcopy(Source):
    """The Bigram-Backcopy task (Guo et al. 2024, arXiv 2410.13835): documents of 64 symbols, without a text.

    The symbol after one of the `TRIGGERS` is the one before it. Every other symbol is drawn from a distribution that
    depends on the symbol before it, the same in all documents: in proportion to u^8 for uniform random u, for triggers
    to 5 u^8.
    """

    IN_MIXTURE = False
    OF_CHARACTERS = True
    SYMBOLS, TRIGGERS = string.ascii_letters + string.digits + "+-", "xyz"
    DOCUMENTS, LENGTH, AT_ONCE = 4096, 4096, 256  # 16.8 million symbols

    def documents(self) -> Iterator[str]:
        symbols, number = np.array(list(self.SYMBOLS)), len(self.SYMBOLS)
        triggers = [self.SYMBOLS.index(symbol) for symbol in self.TRIGGERS]
        shares = _uniform(0, number * number).reshape(number, number) ** 8
        shares[:, triggers] *= 5
        bounds = np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)[:, :-1]
        for block in range(1, self.DOCUMENTS // self.AT_ONCE + 1):
            draws = _uniform(block, self.LENGTH * self.AT_ONCE).reshape(self.LENGTH, self.AT_ONCE)
            chains = np.zeros((self.LENGTH + 2, self.AT_ONCE), dtype=np.int64)
            for i, draw in enumerate(draws, start=2):
                drawn = (bounds[chains[i - 1]] <= draw[:, None]).sum(1)
                chains[i] = np.where(np.isin(chains[i - 1], triggers), chains[i - 2], drawn)
            yield from ("".join(symbols[chain]) for chain in chains[2:].T)

    def fingerprint(self) -> Any:
        return [self.SYMBOLS, self.TRIGGERS, self.DOCUMENTS, self.LENGTH, self.AT_ONCE]


def _uniform(seed: int, number: int) -> np.ndarray[Any, Any]:
    """Return uniform random numbers in [0, 1), the same in every version of NumPy, which guarantees raw bits only."""
    return (np.random.Philox(np.random.SeedSequence([seed])).random_raw(number) >> 11) * 2.0**-53


SOURCES: dict[str, type[Source]] = {
    "python_stdlib": PythonStdlib,
    "text": TextFiles,
    "hf": HubDataset,
    "mixture": Mixture,
    "backcopy": Backcopy,
}
NO_TEXT = "none"  # source of a model that was converted from a Hugging Face folder: its text is not here


def make_source(config: TextConfig, key: str = "data") -> Source:
    """Return the source that `config` names. Raises `UserError` if it is unknown or its configuration incomplete."""
    if config.source == NO_TEXT:
        raise UserError(f"{key}.source=none: this model was converted and has no training text; name a source")
    choices = [name for name, kind in SOURCES.items() if kind.IN_MIXTURE or isinstance(config, DataConfig)]
    if config.source not in choices:
        raise UserError(f"{key}.source={config.source!r}: unknown source; choose from {', '.join(choices)}")
    return SOURCES[config.source](config, key)


def is_documents(path: Path, text_field: str) -> bool:
    """Return whether a file of a folder is read: by its name, and .json, which may be anything, by its first record."""
    if not path.name.lower().endswith(".json"):
        return bool(FORMAT.search(path.name))
    with contextlib.suppress(OSError, UserError):
        return next(_json_documents(path, text_field), None) is not None
    return False


def list_files(paths: tuple[str, ...], text_field: str) -> list[Path]:
    """Return the files of `data.paths` that are read, in order; a folder gives its files sorted by path."""
    files: list[Path] = []
    for entry in map(Path, paths):
        if not os.path.exists(entry):
            raise UserError(f"data.paths: {entry} does not exist")
        if os.path.isdir(entry):
            every, left_out = _files_in(entry)
            inside = [path for path in every if is_documents(path, text_field)]
            left_out.update(path.suffix.lower() or "no suffix" for path in sorted({*every}.difference(inside)))
            counts = ", ".join(f"{kind} {count}" for kind, count in left_out.most_common(12))
            if left_out:
                report_once(printable(f"data.paths: folder {entry}: {left_out.total()} left out: {counts}"))
            if not inside:
                raise UserError(f"data.paths: folder {entry} holds no file that ends in {SUFFIXES}")
            files += inside
        elif not os.path.isfile(entry):
            raise UserError(f"data.paths: {entry} is a device, pipe or socket; name a file or a folder")
        elif not FORMAT.search(entry.name):
            raise UserError(f"data.paths: cannot tell the format of {entry}; its name must end in {SUFFIXES}")
        else:
            files.append(entry)
    return files


def _files_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the files below `folder`, sorted by path, without the output of this framework; count what is left out."""
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=lambda _: left_out.update(["unreadable folder"])):
        if Path(parent) != folder and any(own <= {*folders, *names} for own in OWN_FOLDERS):
            left_out["folder of a run, shards or model"] += 1
            folders.clear()
            continue
        visible = [Path(parent, name) for name in folders + names if not name.startswith(".")]
        regular = [path for path in visible if os.path.isfile(path)]
        left_out["hidden"] += len(folders + names) - len(visible)
        folders[:] = [path.name for path in visible if os.path.isdir(path) and not path.is_symlink()]
        left_out["linked folder or device"] += len(visible) - len(regular) - len(folders)
        files += regular
    return sorted(files), +left_out


def _sizes_and_times(files: list[Path]) -> list[Any]:
    return [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]


def _json_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield one document per line. Lines end at "\\n" only: str.splitlines() would also split at U+2028."""
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            where = f"{path}, line {number}"
            if len(line) > MOST_BYTES:
                raise UserError(f"{where}: {TOO_LONG} records")
            if not line.strip():
                continue
            text = decode_utf8(line, path, line=number)
            with as_user_error(f"{where}: malformed JSON (", ValueError, after="); a line holds one object"):
                record = parse_json(text)
            yield _text_of(record, text_field, where=where)
    except EOFError as error:
        raise UserError(f"{path}, after line {number}: {error}") from error


def _text_of(record: Any, text_field: str, *, where: str) -> str:
    """Return the text of a record. Raises `UserError` if it has none."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise UserError(f"{where}: no field {text_field!r}; set data.text_field to one of {sorted(record)[:20]}")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} holds {type(text).__name__}, not a string")
    # JSON can encode half a surrogate pair
    with as_user_error(f"{where}: field {text_field!r} is no valid Unicode (", UnicodeEncodeError, after=")"):
        text.encode()
    return text


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, decompressed frame by frame; raise `EOFError` if the archive is damaged.

    The libraries' own readers overlook a missing end (zstandard) or a damaged second frame (lzma).
    """
    decompressor = DECOMPRESSORS.get(path.suffix.lower())
    with path.open("rb") as file:
        if decompressor is None:
            yield from iter(partial(file.read, 2**17), b"")
            return
        data = file.read(PIECE)
        try:
            while data:
                frame = decompressor()
                while not frame.eof:
                    if not (data := data or file.read(PIECE)):
                        raise EOFError("its end is missing")
                    yield frame.decompress(data)
                    data = frame.unused_data
                while not (data := data.lstrip(b"\0")) and (data := file.read(PIECE)):  # zeros may fill a block
                    pass
        except (
            EOFError,
            lzma.LZMAError,
            zlib.error,
            getattr(sys.modules.get("zstandard"), "ZstdError", EOFError),
        ) as error:
            raise EOFError(f"the archive is damaged or cut short ({error})") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; the last one is only the beginning of a line that is too long."""
    rest = bytearray()
    for piece in _pieces(path):
        lines, end, tail = piece.rpartition(b"\n")
        if end:
            yield from io.BytesIO(rest + lines + end)
            rest = bytearray()
        rest += tail
        if len(rest) > MOST_BYTES:
            break
    yield bytes(rest)


def _text(path: Path) -> str:
    """Return the text of a .txt, .md or .py file. Compressed files have a limit, as their size on disk says little."""
    content = bytearray()
    for piece in _pieces(path):
        content += piece
        if len(content) > MOST_BYTES and path.suffix.lower() in DECOMPRESSORS:
            raise UserError(f"{path}: {TOO_LONG} files")
    return decode_utf8(content, path, line=1)


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield one document per row; a null is an empty document."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(pyarrow.OSFile(os.fsencode(path))) as file:
            columns = sorted(file.schema_arrow.names)
            if text_field not in columns:
                raise UserError(f"{path}: no column {text_field!r}; set data.text_field to one of {columns[:20]}")
            kind = file.schema_arrow.field(text_field).type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f"{path}: column {text_field!r} holds {kind}, not strings")
            batches = file.iter_batches(batch_size=32, columns=[text_field])
            for row, value in enumerate((value for batch in batches for value in batch.column(0)), start=1):
                text = value.as_py() or ""
                if len(text) > MOST_BYTES:
                    raise UserError(f"{path}, row {row}: {TOO_LONG} records")
                yield text
    except (pyarrow.ArrowException, UnicodeDecodeError, KeyError) as error:  # KeyError: two columns of one name
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def decode_utf8(data: bytes | bytearray, path: Path, *, line: int) -> str:
    """Decode text; `UserError` names the first line that is not UTF-8. line: of the file, where `data` begins."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {bad_line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
