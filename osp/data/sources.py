"""Sources of documents: one class per source, registered in `SOURCES` under the name that `data.source` uses.

To add a source, subclass `Source` and add the class to `SOURCES`; preparation, shard folders and mixtures ask the class
for everything they need. A document may be empty: preparation leaves empty documents out.
"""

import contextlib
import gzip
import io
import json
import logging
import lzma
import sys
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from osp.config import DataConfig, TextConfig
from osp.data.tokenizer import HUB_TIMEOUT, ask_hub
from osp.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet")

logger = logging.getLogger(__name__)


class Source(ABC):
    """A stream of documents whose order depends on its configuration alone."""

    IN_MIXTURE = True  # may be a part of a mixture

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
    """Local files: a .txt, .md or .py file is one document, a record of .jsonl or .parquet is one document."""

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        if not config.paths:
            raise UserError(f"{key}.paths is empty; name files or folders, for example {key}.paths=[corpus.jsonl]")
        self.label = Path(config.paths[0]).name.split(".")[0]

    def documents(self) -> Iterator[str]:
        for path in list_files(self.config.paths):
            try:
                if known_suffix(path) in TEXT_SUFFIXES:
                    yield _decode(path.read_bytes(), path, line=1)
                elif known_suffix(path) == ".parquet":
                    yield from _parquet_documents(path, self.config.text_field)
                else:
                    yield from _jsonl_documents(path, self.config.text_field)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def fingerprint(self) -> Any:
        stats = [(path, path.stat()) for path in list_files(self.config.paths)]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


class HubDataset(Source):
    """A Hugging Face data set, streamed; a null is an empty document."""

    def __init__(self, config: TextConfig, key: str = "data") -> None:
        super().__init__(config, key)
        if not config.dataset:
            raise UserError(f"{key}.dataset is not set; name a Hugging Face data set, for example allenai/c4")
        self.label = f"{config.dataset}-{config.subset}" if config.subset else config.dataset

    def documents(self) -> Iterator[str]:
        import datasets
        import huggingface_hub
        from datasets.exceptions import DatasetsError

        config, dataset, number = self.config, str(self.config.dataset), 0
        name = f"data.dataset={dataset}" + (f" (subset {config.subset})" if config.subset else "")
        try:
            if not Path(dataset).is_dir():
                with ask_hub(f"{name} cannot be reached"):
                    huggingface_hub.HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
            stream = datasets.load_dataset(dataset, config.subset, split=config.split, streaming=True)
            for number, record in enumerate(stream, start=1):
                is_null = record.get(config.text_field, "") is None
                yield "" if is_null else _text_of(record, config.text_field, where=f"{name}, record {number}")
        except UserError:
            raise
        except (OSError, ValueError, DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name}, split {config.split}: cannot be read after record {number}: {reason}") from error

    def fingerprint(self) -> Any:
        return None  # the hub's content is taken to be constant


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


SOURCES: dict[str, type[Source]] = {
    "python_stdlib": PythonStdlib,
    "text": TextFiles,
    "hf": HubDataset,
    "mixture": Mixture,
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


def known_suffix(path: Path) -> str | None:
    """Return the suffix that names the format of a file of documents, or None if there is no such format."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def list_files(paths: tuple[str, ...]) -> list[Path]:
    """Return the readable files of `data.paths` in order; a folder gives its files recursively, sorted by path."""
    files, suffixes = [], ", ".join(SUFFIXES)
    for entry in map(Path, paths):
        if not entry.exists():
            raise UserError(f"data.paths: {entry} does not exist")
        inside = sorted(path for path in entry.rglob("*") if path.is_file()) if entry.is_dir() else [entry]
        readable = [path for path in inside if known_suffix(path)]
        if entry.is_dir() and not readable:
            raise UserError(f"data.paths: folder {entry} holds no file that ends in {suffixes}")
        if not readable:
            raise UserError(f"data.paths: cannot tell the format of {entry}; its name must end in {suffixes}")
        files += readable
    return files


def _jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield one document per line. Lines end at "\\n" only: str.splitlines() would also split at U+2028."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(_decode(line, path, line=number))
                    yield _text_of(record, text_field, where=f"{path}, line {number}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: malformed JSON ({error})") from error
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of gzip or pyarrow
            raise
        raise UserError(f"{path}, after line {number}: the archive is damaged or cut short ({error})") from error


def _text_of(record: Any, text_field: str, *, where: str) -> str:
    """Return the text of a record. Raises `UserError` if it has none."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise UserError(f"{where}: no field {text_field!r}; set data.text_field to one of {sorted(record)}")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can encode half a surrogate pair
        raise UserError(f"{where}: field {text_field!r} is no valid Unicode ({error})") from error
    return text


def _open(path: Path) -> io.BufferedIOBase:
    """Open a plain or compressed file."""
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".jsonl": open}
    return openers[path.suffix.lower()](path, "rb")


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield one document per row; a null is an empty document."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise UserError(f"{path}: no column {text_field!r}; set data.text_field to one of {sorted(columns)}")
            kind = file.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column {text_field!r} holds {kind}, not strings")
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _decode(data: bytes, path: Path, *, line: int) -> str:
    """Decode UTF-8. line: the line of the file where `data` begins."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        bad_line = line + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {bad_line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error
