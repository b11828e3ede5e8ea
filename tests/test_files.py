"""Files that must survive, JSON from outside, and text for a terminal."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from osp.errors import UserError
from osp.files import (
    new_folder,
    parse_json,
    printable,
    read_json,
    read_lines,
    read_record,
    read_utf8,
    write_out,
    write_text,
)

NOT_JSON = {
    "deep": "[" * 100_000,
    "deep_objects": '{"a":' * 100_000,
    "cut": '{"a": [1, 2',
    "words": "hello",
    "empty": "",
    "two": "1 2",
    "a_bad_byte": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_a_value_error_of_one_line(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_json(text)
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"file\.json: malformed JSON \([^\n]+\)$"):
        read_json(path)


def test_a_huge_integer_before_deep_nesting_is_malformed() -> None:
    with pytest.raises(ValueError, match=r"^nested too deeply$"):
        parse_json("[" + "7" * 5000 + ", " + "[" * 100_000)


def test_an_integer_of_any_length_is_read() -> None:
    assert parse_json('{"a": ' + "7" * 4300 + "}") == {"a": int("7" * 4300)}
    assert parse_json('{"text": "x", "a": [' + "7" * 5000 + ", -12, 3.5]}") == {
        "text": "x",
        "a": [float("inf"), -12, 3.5],
    }


def test_readers_name_the_file_and_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "half.json").write_text(r'{"a": "\ud800"}')
    for name, reason in {".": "is not a file", "pipe": "is not a file", "none.json": "does not exist"}.items():
        with pytest.raises(UserError, match=reason):
            read_json(tmp_path / name)
        with pytest.raises(UserError, match=f"^text=X {reason}"):
            read_utf8(tmp_path / name, name="text=X")
    with pytest.raises(UserError, match=r"half\.json: malformed JSON \(half a surrogate pair\)"):
        read_json(tmp_path / "half.json")


def test_a_damaged_record_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "summary.json"
    assert read_record(path) is None
    path.write_text('{"loss": 3}')
    assert read_record(path) == {"loss": 3}
    assert not caplog.messages
    path.write_bytes(b'{"loss": \xff')
    assert read_record(path) is None
    assert re.search(r"summary\.json: malformed JSON .*; it is ignored", caplog.text)
    assert read_record(tmp_path) is None


def test_lines_of_any_kind_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b'{"step": ' + b"[" * 100_000, b'{"step": 2, "loss": "\xff"}', b"null", b'{"step": 3}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [entry["step"] for entry in read_lines(path)] == [1, 2, 3]
    assert read_lines(tmp_path) == []


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / "a.json.tmp").symlink_to(precious)
    (tmp_path / "b.json").symlink_to(precious)
    for name in ("a.json", "b.json"):
        write_text(tmp_path / name, json.dumps(name))
        assert (tmp_path / name).read_text() == json.dumps(name)
        assert not (tmp_path / name).is_symlink()
    assert precious.read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "precious"]


def test_a_new_folder_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from osp.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    out, running = tmp_path / "out[1]", tmp_path / f".out[1].{socket.gethostname()}-1.tmp"
    subprocess.run([sys.executable, "-c", program, str(out)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    running.mkdir()
    with new_folder(out) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, running])
    assert sorted(tmp_path.iterdir()) == sorted([out, running])


def test_printable_leaves_nothing_for_a_terminal_to_obey() -> None:
    assert printable("naïve 北京\tcafé Ω\n") == "naïve 北京\tcafé Ω\n"
    assert printable("\x1b]0;title\x07\r\x9b2J\u202e\udce8") == r"\x1b]0;title\x07\r\x9b2J\u202e\udce8"


def test_a_device_or_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """As root, replacing /dev/null would break the machine."""
    read, write = os.pipe()
    (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{write}")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("stdout", "null"):
        write_out(tmp_path / name, "text")
        assert (tmp_path / name).is_symlink()
    assert os.read(read, 10) == b"text"
    os.close(read)
    os.close(write)
