"""Every source gives its documents in order, and bad input gives one message that names file and line."""

import gzip
import json
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from osp.config import DataConfig, SourceConfig, TextConfig, from_dict
from osp.data.sources import SOURCES, Source, make_source
from osp.errors import UserError

SHARED = Path(__file__).parents[2] / "../shared/data"


def documents(config: TextConfig) -> Iterator[str]:
    return make_source(config).documents()


def read(*paths: Path, text_field: str = "text") -> list[str]:
    return list(documents(DataConfig(source="text", paths=tuple(map(str, paths)), text_field=text_field)))


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor(write_checksum=True)  # as the command line tool does
    half = len(data) // 2  # two frames in one file, as parallel compressors write them
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.xz": lzma.compress,
    ".jsonl.zst": zstd,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("newline_at_end", [True, False])
def test_jsonl_gives_one_document_per_record(
    texts: list[str], tmp_path: Path, suffix: str, newline_at_end: bool
) -> None:
    # ensure_ascii=False puts U+2028 and U+0085 into the file as they are
    lines = "\n".join(json.dumps({"id": 1, "body": text}, ensure_ascii=False) for text in texts)
    path = tmp_path / f"records{suffix}"
    path.write_bytes(COMPRESS[suffix]((lines + "\n" * newline_at_end).encode()))
    assert read(path, text_field="body") == texts


def test_parquet_gives_one_document_per_row(texts: list[str], tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "records.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None], "n": list(range(len(texts) + 1))}), path)
    assert read(path) == [*texts, ""]
    with pytest.raises(UserError, match=r"records\.parquet: column 'n' holds int64, not strings"):
        read(path, text_field="n")
    with pytest.raises(UserError, match=r"no column 'body'; set data\.text_field to one of \['n', 'text'\]"):
        read(path, text_field="body")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"records\.parquet: not a readable parquet file"):
        read(path)


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    files = {"b.md": "b\r\n", "a/z.py": "az\u2028", "a/y.txt": "ay", "c.TXT": "c", "skipped.csv": "no"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path) == ["ay", "az\u2028", "b\r\n", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"bad\.jsonl, line 3: malformed JSON"),
        (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"bad\.jsonl, line 2: no field 'text'.*\['body', 'id'\]"),
        (b'{"text": 5}\n', r"bad\.jsonl, line 1: field 'text' holds int, not a string"),
        (b'{"text": null}\n', r"bad\.jsonl, line 1: field 'text' holds NoneType, not a string"),
        (b'["text"]\n', r"bad\.jsonl, line 1: expected a JSON object, found list"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"bad\.jsonl, line 2: not UTF-8 \(byte 0xff\)"),
        (b'{"text": "\\ud800"}\n', r"bad\.jsonl, line 1: field 'text' is no valid Unicode"),
    ],
)
def test_bad_record_is_named_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_undecodable_text_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 3: not UTF-8 \(byte 0xe9\)"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "not an archive"])
def test_damaged_archive_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    lines = "".join(json.dumps({"text": os.urandom(1000).hex()}) + "\n" for _ in range(400)).encode()
    content = COMPRESS[suffix](lines)
    middle = len(content) * 3 // 4
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(
        {
            "cut": content[:middle],
            "overwritten": content[:middle] + b"\xff" * 1000 + content[middle + 1000 :],
            "not an archive": lines,
        }[damage]
    )
    # overwritten bytes may also decompress to a bad record, which is reported first
    where = r"(after )?line" if damage == "overwritten" else "after line"
    with pytest.raises(UserError, match=rf"bad{suffix}, {where} \d+: "):
        read(path)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"folder .* holds no file that ends in \.txt, "):
        read(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"cannot tell the format of .*table\.csv; its name must end in \.txt"):
        read(tmp_path / "table.csv")


def test_python_stdlib_is_all_modules_in_order() -> None:
    modules = list(documents(DataConfig()))
    assert next(documents(SourceConfig(source="python_stdlib"))) == modules[0]
    root = Path(sysconfig.get_path("stdlib"))
    positions = [
        modules.index((root / name).read_bytes().decode()) for name in ("abc.py", "json/decoder.py", "zipapp.py")
    ]
    assert positions == sorted(positions)
    assert sum(map(len, modules)) > 5_000_000


def test_python_stdlib_skips_installed_packages_and_other_encodings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"b.py": b"b = 1\r\n", "a/c.py": b"c", "site-packages/x.py": b"x", "__pycache__/y.py": b"", "l.py": b"\xe9"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(documents(DataConfig())) == ["c", "b = 1\r\n"]


class Listed(Source):
    """The texts of `TEXTS[data.dataset]`."""

    TEXTS: ClassVar[dict[str, list[str]]] = {}

    def documents(self) -> Iterator[str]:
        yield from self.TEXTS[str(self.config.dataset)]

    def fingerprint(self) -> None:
        return None


def test_mixture_follows_the_weights_and_keeps_every_order(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": 0.7, "b": 0.25, "c": 0.05}
    for name, num_texts, size in (("a", 3000, 30), ("b", 900, 60), ("c", 20, 5)):
        texts = [f"{name}{i}" + "x" * (size + 7 * i % 11) for i in range(num_texts)]
        monkeypatch.setitem(Listed.TEXTS, name, texts)
    monkeypatch.setitem(SOURCES, "listed", Listed)
    parts = tuple(SourceConfig(source="listed", dataset=name, weight=weight) for name, weight in weights.items())
    mixed = list(documents(DataConfig(source="mixture", mixture=parts)))
    for name, texts in Listed.TEXTS.items():
        assert [text for text in mixed if text[0] == name] == texts
    end = next(i for i, text in enumerate(mixed) if text.startswith("c19"))
    shares = [sum(len(text) for text in mixed[:end] if text[0] == name) for name in weights]
    for share, weight in zip(shares, weights.values(), strict=True):
        assert share / sum(shares) == pytest.approx(weight, abs=70 / sum(shares))
    # b ends last: its end is the end of all
    assert [record.message for record in caplog.records] == [
        "data.mixture: listed c is exhausted; continuing without it",
        "data.mixture: listed a is exhausted; continuing without it",
    ]


def test_mixture_reads_its_sources_in_turn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "' + name * 10 + '"}\n' * 1)
    parts = tuple(SourceConfig(paths=(str(tmp_path / f"{name}.jsonl"),), weight=w) for name, w in [("a", 1), ("b", 3)])
    config = DataConfig(source="mixture", mixture=parts)
    assert list(documents(config)) == ["a" * 10, "b" * 10]
    assert make_source(config).fingerprint() == [make_source(part).fingerprint() for part in parts]


def test_fingerprint_changes_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    config = DataConfig(source="text", paths=(str(tmp_path),))
    before = make_source(config).fingerprint()
    assert make_source(config).fingerprint() == before
    (tmp_path / "a.txt").write_text("other")
    assert make_source(config).fingerprint() != before


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"source": "csv"},
        r"^data.source='csv': unknown source; choose from python_stdlib, text, hf, mixture$",
    ),
    "no text": ({"source": "none"}, r"^data.source=none: this model was converted and has no training text"),
    "no paths": ({"source": "text"}, r"^data.paths is empty; .*data.paths=\[corpus.jsonl\]$"),
    "no data set": ({"source": "hf"}, r"^data.dataset is not set; .*allenai/c4$"),
    "empty mixture": ({"source": "mixture"}, r"^data.source=mixture but data.mixture is empty; list at least one"),
    "part without paths": ({"source": "mixture", "mixture": [{}]}, r"^data.mixture\[0\].paths is empty"),
    "part without data set": (
        {"source": "mixture", "mixture": [{"paths": ["a"]}, {"source": "hf"}]},
        r"^data.mixture\[1\].dataset is not set",
    ),
    "mixture in a mixture": (
        {"source": "mixture", "mixture": [{"source": "mixture"}]},
        r"^data.mixture\[0\].source='mixture': unknown source; choose from python_stdlib, text, hf$",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_source_is_refused_in_one_line(case: str) -> None:
    values, message = UNFIT[case]
    with pytest.raises(UserError, match=message):
        make_source(from_dict({"train": {"steps": 1}, "data": values}).data)


def test_hub_source_streams_a_local_data_set(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t or None}) + "\n" for t in texts))
    config = SourceConfig(source="hf", dataset=str(tmp_path))
    assert list(documents(config)) == texts
    with pytest.raises(UserError, match=r"^data\.dataset=\S+, record 1: no field .body.; set data\.text_field to"):
        list(documents(SourceConfig(source="hf", dataset=str(tmp_path), text_field="body")))
    with pytest.raises(UserError, match=r"\(subset nope\), split train: cannot be read after record 0: .*nope"):
        list(documents(SourceConfig(source="hf", dataset=str(tmp_path), subset="nope")))
    with pytest.raises(UserError, match=r"split nope: cannot be read after record 0: .*nope"):
        list(documents(SourceConfig(source="hf", dataset=str(tmp_path), split="nope")))


@pytest.mark.timeout(120)  # the libraries' own retries take longer
def test_missing_data_set_fails_in_seconds() -> None:
    with pytest.raises(UserError, match=r"data\.dataset=osp-tests/no-such-data-set cannot be reached"):
        list(documents(SourceConfig(source="hf", dataset="osp-tests/no-such-data-set")))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_archive_is_read() -> None:
    source = DataConfig(source="text", paths=(str(SHARED / "corpus/train_mix.jsonl.xz"),))
    first = [text for text, _ in zip(documents(source), range(500), strict=False)]
    assert sum(map(len, first)) > 1_000_000
