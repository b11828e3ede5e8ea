"""Every source gives its documents in order, and bad input gives one message that names file and line."""

import gzip
import itertools
import json
import lzma
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from osp.config import DataConfig, SourceConfig, TextConfig, from_dict
from osp.data.sources import SOURCES, Backcopy, Source, make_source
from osp.errors import UserError

SHARED = Path(__file__).parents[2] / "../shared/data"


def documents(config: TextConfig) -> Iterator[str]:
    return make_source(config).documents()


def read(*paths: Path, text_field: str = "text") -> list[str]:
    return list(documents(DataConfig(source="text", paths=tuple(map(str, paths)), text_field=text_field)))


def zstd(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)  # as the command line tool does
    half = len(data) // 2  # two frames in one file, as parallel compressors write them
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("newline_at_end", [True, False])
def test_json_gives_one_document_per_line(
    texts: list[str], tmp_path: Path, kind: str, compression: str, newline_at_end: bool
) -> None:
    # ensure_ascii=False puts U+2028 and U+0085 into the file as they are
    lines = "\n".join(json.dumps({"id": 1, "body": text}, ensure_ascii=False) for text in texts)
    path = tmp_path / f"records{kind}{compression}"
    path.write_bytes(COMPRESS[compression]((lines + "\n" * newline_at_end).encode()))
    assert read(path, text_field="body") == texts
    assert read(tmp_path, text_field="body") == texts


@pytest.mark.parametrize("kind", [".txt", ".md", ".py"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_text_file_is_one_document(tmp_path: Path, kind: str, compression: str) -> None:
    (tmp_path / f"a{kind}{compression.upper()}").write_bytes(COMPRESS[compression]("\ufeffä\r\nb\0".encode()))
    assert read(tmp_path) == ["ä\r\nb\0"]


def test_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\r\n\r\n{"text": "\ufeffb"}\r\n'.encode())
    assert read(tmp_path) == ["a", "\ufeffb"]


def skippable(data: bytes) -> bytes:
    return 0x184D2A53.to_bytes(4, "little") + len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_archives_may_have_several_frames(tmp_path: Path, compression: str) -> None:
    one, two = (COMPRESS[compression](b'{"text": "%d"}\n' % i) for i in range(2))
    nothing = COMPRESS[compression](b"")
    padding = skippable(b"size") if compression == ".zst" else bytes(5000)  # as pzstd writes, and tapes
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(one + nothing + padding + two + padding)
    assert read(path) == ["0", "1"]
    path.write_bytes(b"")
    assert read(path) == []
    path.write_bytes(one + two[:-3])
    with pytest.raises(UserError, match=r"the archive is damaged or cut short"):
        read(path)
    path.write_bytes(one + two[:2] + b"?" + two[3:])  # xz's reader for Python takes this for the end
    with pytest.raises(UserError, match=r"the archive is damaged or cut short"):
        read(path)
    path.write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"the archive is damaged or cut short"):
        read(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_archive_that_is_cut_anywhere_is_an_error(tmp_path: Path, compression: str) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(20))
    content = {".zst": zstandard.compress}.get(compression, COMPRESS[compression])(lines)  # in one frame
    path = tmp_path / f"a.jsonl{compression}"
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"the archive is damaged or cut short"):
            read(path)


def test_zst_of_long_windows_is_read_also_in_turn_with_another(tmp_path: Path) -> None:
    """`zstd --long=31` asks for a window of 2 GiB; each part of a mixture has its own decompressor."""
    lines = {name: [name * 500 + str(i) for i in range(300)] for name in "ab"}
    for name, texts in lines.items():
        compressor = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
        ).compressobj()  # of unknown size: the window is not made smaller
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (tmp_path / f"{name}.jsonl.zst").write_bytes(compressor.compress(content) + compressor.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 2**31
    parts = tuple(SourceConfig(paths=(str(tmp_path / f"{name}.jsonl.zst"),)) for name in "ab")
    mixed = list(documents(DataConfig(source="mixture", mixture=parts)))
    assert mixed == [text for pair in zip(lines["a"], lines["b"], strict=True) for text in pair]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.zst", ".txt.xz", ".parquet"])
def test_document_that_would_fill_the_memory_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osp.data.sources.MOST_BYTES", 1000)
    path = tmp_path / f"a{suffix}"
    for size in (900, 300_000):
        content = ("a" * size).encode()
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["b", content.decode()]}), path)
        elif suffix.startswith(".txt"):
            path.write_bytes(COMPRESS[path.suffix](content))
        else:
            compress = COMPRESS[path.suffix if path.suffix in COMPRESS else ""]
            path.write_bytes(compress(b'{"text": "b"}\n{"text": "' + content + b'"}'))
        if size == 900:
            assert read(path)[-1] == content.decode()
    with pytest.raises(UserError, match=rf"a{suffix}(, (line|row) 2)?: longer than 256 MiB; split it into several"):
        read(path)


def test_parquet_gives_one_document_per_row(texts: list[str], tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_parquet_strings_of_every_type_are_read(tmp_path: Path, kind: Any) -> None:
    texts = ["one", None, "ä", "one", ""]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path) == ["one", "", "ä", "one", ""]


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        read(tmp_path)


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    files = {"b.md": "b\r\n", "a/z.py": "az\u2028", "a/y.txt": "ay", "c.TXT": "c", "skipped.csv": "no"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path) == ["ay", "az\u2028", "b\r\n", "c"]
    fingerprint = make_source(DataConfig(source="text", paths=(str(tmp_path),))).fingerprint()
    assert [path for path, _, _ in fingerprint] == [
        str(tmp_path / name) for name in ("a/y.txt", "a/z.py", "b.md", "c.TXT")
    ]


def test_what_a_folder_has_besides_text_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "corpus"
    for name in ("sub", ".git", ".ipynb_checkpoints", "sub/one.jsonl"):
        (folder / name).mkdir(parents=True)
    for name in ("a.pdf", "sub/b.PDF", "LICENSE", "c.csv.gz", ".hidden.txt", ".git/a.txt", "d.\x1b[31m"):
        (folder / name).write_text("x")
    (folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_text('{"text": "stale"}\n')
    (folder / "package.json").write_text('{\n "text": "of a program"\n}\n')
    (folder / "settings.json").write_text('{"level": 1}\n')
    (folder / "records.json").write_text('{"text": "records"}\n')
    (folder / "sub/one.jsonl/a.md").write_text("of a folder called one.jsonl")
    (folder / "loop").symlink_to(tmp_path)
    (folder / "nowhere.txt").symlink_to("missing.txt")
    (folder / "linked.txt").symlink_to("sub/one.jsonl/a.md")
    os.mkfifo(folder / "pipe.jsonl")
    config = DataConfig(source="text", paths=(str(folder),))
    assert list(documents(config)) == ["of a folder called one.jsonl", "records", "of a folder called one.jsonl"]
    make_source(config).fingerprint()
    assert list(documents(config))
    (message,) = [record.message for record in caplog.records]
    head, _, counts = message.rpartition(" left out: ")
    assert head == f"data.paths: folder {folder}: 13"
    assert set(counts.split(", ")) == {
        "hidden 3",
        "linked folder or device 3",
        ".json 2",
        ".pdf 2",
        "no suffix 1",
        ".gz 1",
        r".\x1b[31m 1",
    }


def test_folder_without_anything_else_is_read_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path) == ["a"]
    assert not caplog.records


OUTPUT = {
    "run": ("config.yaml", "metrics.jsonl", "environment.json", "forensics/step_1.md"),
    "run that just begins": ("config.yaml", "tokenizer.json", "a.txt"),
    "shards": ("manifest.json", "tokenizer.json", "train-00000.bin", "a.txt"),
    "shards without manifest": ("lock", "tokenizer.json", "a.txt"),
    "exported model": ("config.json", "tokenizer.json", "README.md", "model.safetensors"),
    "ablation": ("ablation.json", "ablation.md", "runs/a/b.txt"),
    "wandb": ("debug-internal.log", "latest-run", "run-1/files/requirements.txt"),
}


def test_own_output_in_a_folder_is_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "note.md").write_text("note")
    config = DataConfig(source="text", paths=(str(tmp_path),))
    before = make_source(config).fingerprint()
    for folder, files in OUTPUT.items():
        for file in files:
            path = tmp_path / "deep" / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"text": "output"}\n')
    assert list(documents(config)) == ["note"]
    assert make_source(config).fingerprint() == before
    assert "7 left out: folder of a run, shards or model 7" in caplog.text


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null"])
def test_devices_and_pipes_are_refused_not_read(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.txt").symlink_to(target)
    for name in ("pipe.jsonl", "device.txt"):
        with pytest.raises(UserError, match=rf"^data.paths: .*{name} is a device, pipe or socket; name a file or a f"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"folder .* holds no file that ends in \.txt, "):
        read(tmp_path)


def test_names_that_are_not_utf8_are_read_and_reported(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe8")
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(folder / os.fsdecode(b"\xff.parquet"))
    (folder / os.fsdecode(b"\xfe.jsonl.zst")).write_bytes(zstandard.compress(b'{"text": "z"}'))
    (folder / os.fsdecode(b"\xfd.txt")).write_text("t")
    assert sorted(read(folder)) == ["p", "t", "z"]
    json.dumps(make_source(DataConfig(source="text", paths=(str(folder),))).fingerprint()).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"bad\.jsonl, line 3: malformed JSON"),
        (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"bad\.jsonl, line 2: no field 'text'.*\['body', 'id'\]"),
        (b'{"text": 5}\n', r"bad\.jsonl, line 1: field 'text' holds int, not a string"),
        (b"[" * 100_000 + b"\n", r"bad\.jsonl, line 1: malformed JSON \(nested too deeply\)"),
        (b'[{"text": "a"},\n', r"bad\.jsonl, line 1: malformed JSON .*; a line holds one object$"),
        (b'{"text": "a\0"}\n', r"bad\.jsonl, line 1: malformed JSON"),
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


def test_integer_of_thousands_of_digits_is_a_field_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "7" * 5000 + "}\n")
    assert read(tmp_path) == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "not an archive"])
def test_damaged_archive_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    lines = "".join(json.dumps({"text": os.urandom(1000).hex()}) + "\n" for _ in range(400)).encode()
    content = COMPRESS[suffix](lines)
    middle = len(content) * 3 // 4
    path = tmp_path / f"bad.jsonl{suffix}"
    path.write_bytes(
        {
            "cut": content[:middle],
            "overwritten": content[:middle] + b"\xff" * 1000 + content[middle + 1000 :],
            "not an archive": lines,
        }[damage]
    )
    # overwritten bytes may also decompress to a bad record, which is reported first
    where = r"(after )?line" if damage == "overwritten" else "after line"
    with pytest.raises(UserError, match=rf"bad.jsonl{suffix}, {where} \d+: "):
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
        r"^data.source='csv': unknown source; choose from python_stdlib, text, hf, mixture, backcopy$",
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


def test_changed_files_of_a_local_data_set_change_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "one"}\n')
    part = SourceConfig(source="hf", dataset=str(tmp_path))
    source = make_source(DataConfig(source="mixture", mixture=(part,)))
    before = source.fingerprint()
    assert source.fingerprint() == before == [make_source(part).fingerprint()]
    path.write_text('{"text": "other"}\n')
    assert source.fingerprint() != before
    assert make_source(SourceConfig(source="hf", dataset="allenai/c4")).fingerprint() is None


def test_local_data_set_may_be_called_like_a_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "of the working directory"}\n')  # what the loader would read
    monkeypatch.chdir(tmp_path)
    assert list(documents(SourceConfig(source="hf", dataset="json"))) == ["one"]


def test_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"text": ["one", None, "two"]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(tmp_path / "splits")
    assert list(documents(SourceConfig(source="hf", dataset=str(tmp_path / "one")))) == ["one", "", "two"]
    splits = str(tmp_path / "splits")
    assert list(documents(SourceConfig(source="hf", dataset=splits, split="test"))) == ["two"]
    with pytest.raises(UserError, match=r"split nope: cannot be read after record 0: Directory .*/splits/nope not f"):
        list(documents(SourceConfig(source="hf", dataset=splits, split="nope")))


@pytest.mark.parametrize(
    "files",
    [
        {"a.jsonl": b""},
        {"a.jsonl.gz": gzip.compress(os.urandom(1000))[:-9]},
        {"a.jsonl": b'{"text": "a"}', "README.md": b"---\n: : [\n---\n"},
        {"a.jsonl": b'{"text": "a"}', "dataset_infos.json": b"[1]"},
        {"state.json": b"[1]", "dataset_info.json": b"{}"},
    ],
    ids=lambda files: list(files)[-1],
)
def test_damaged_local_data_set_is_one_line(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^data.dataset=[^\n]*, split train: cannot be read after record 0: \S[^\n]+$"):
        list(documents(SourceConfig(source="hf", dataset=str(tmp_path))))


def test_data_set_that_is_a_file_or_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"^data.dataset=.*a.jsonl is a file; name its folder, or use data=text$"):
        make_source(SourceConfig(source="hf", dataset=str(tmp_path / "a.jsonl")))
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"cannot be read after record 0: Dataset scripts are no longer supported"):
        list(documents(SourceConfig(source="hf", dataset=str(tmp_path))))


@pytest.mark.timeout(120)  # the libraries' own retries take longer
def test_missing_data_set_fails_in_seconds() -> None:
    with pytest.raises(UserError, match=r"data\.dataset=osp-tests/no-such-data-set cannot be reached"):
        list(documents(SourceConfig(source="hf", dataset="osp-tests/no-such-data-set")))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_archive_is_read() -> None:
    source = DataConfig(source="text", paths=(str(SHARED / "corpus/train_mix.jsonl.xz"),))
    first = [text for text, _ in zip(documents(source), range(500), strict=False)]
    assert sum(map(len, first)) > 1_000_000


def test_backcopy_repeats_the_symbol_before_a_trigger_and_else_follows_one_table() -> None:
    config = DataConfig(source="backcopy")
    texts = list(itertools.islice(documents(config), 300))  # of two blocks
    assert texts == list(itertools.islice(documents(config), 300))
    assert len(set(texts)) == 300
    assert {len(text) for text in texts} == {4096}
    assert {*"".join(texts)} == {*Backcopy.SYMBOLS}
    following: dict[str, list[Counter[str]]] = {symbol: [Counter(), Counter()] for symbol in Backcopy.SYMBOLS}
    for number, text in enumerate(texts):
        for before, symbol, after in zip(text, text[1:], text[2:], strict=False):
            if symbol in Backcopy.TRIGGERS:
                assert after == before
            else:
                following[symbol][number % 2][after] += 1
    for halves in following.values():  # both halves of the documents show the same table
        for symbol in () if not halves[0] else Backcopy.SYMBOLS:
            first, second = (half[symbol] / half.total() for half in halves)
            assert abs(first - second) < 6 * max(1e-6, first * (1 - first) / halves[1].total() * 2) ** 0.5 + 0.002
    share = sum(text.count(trigger) for text in texts for trigger in Backcopy.TRIGGERS) / (300 * 4096)
    assert 0.1 < share < 0.25


def test_backcopy_is_no_part_of_a_mixture() -> None:
    part = {"source": "backcopy", "weight": 1.0}
    data = {"source": "mixture", "mixture": [part]}
    with pytest.raises(UserError, match=r"data\.mixture\[0\]\.source='backcopy': unknown source; choose from"):
        make_source(from_dict({"data": data, "train": {"steps": 1}}).data)
