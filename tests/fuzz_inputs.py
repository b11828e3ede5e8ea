"""Changes to files, drawn from a seed: values of the wrong type, damaged bytes, and payloads that would run or escape.

Every payload that could run makes the file `Payloads.canary`; `HTML` would add an element to a page.
"""

import copy
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from osp.files import parse_json

HTML = '</script></title><img src=x onerror="document.title=1">'
RAW = {  # JSON that json.dumps does not write; a placeholder takes its place in the tree
    "@huge-float@": "1e400",
    "@digits@": "1" * 5000,
    "@deep-list@": "[" * 20_000 + "]" * 20_000,
    "@deep-table@": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "@half@": '"\\ud800"',
    "@nan@": "NaN",
    "@inf@": "-Infinity",
    "@twice@": '{"a": 1, "a": 2}',
}


@dataclass(frozen=True)
class Payloads:
    """Texts and objects that would make the file `canary` if something ran them, or that lead out of a folder."""

    canary: Path
    secret: Path  # a file outside of every input, which nothing may read

    @property
    def texts(self) -> list[str]:
        touch = f"touch {self.canary}"
        return [
            HTML,
            "\x1b]0;title\x07\x1b[31m",
            f"$({touch})",
            f"`{touch}`",
            f"'; {touch}; '",
            f"__import__('os').system('{touch}')",
            "${oc.env:HOME}",
            "${" + touch + "}",
            "{{ 7 * 7 }}",
            "%s%n",
            str(self.secret),
            os.path.relpath(self.secret, "/tmp/a/b"),
            f"../../{self.secret.name}",
            "a\nb",
            "\u2028",
            "a | b",
            "nul\0",
            "",
            " ",
            "-1",
            "nan",
            "x" * 10_000,
            "caf\u00e9 \u4e2d",
            "__proto__",
            "constructor",
        ]

    def values(self, draw: random.Random) -> Any:
        """Return a value of any type."""
        return draw.choice(
            [
                None, True, False, 0, 1, -1, 2, 7, 0.5, 1e-320, 1e308, -1e308, 10**9, 2**31, 2**53 + 1, 2**63, 2**70,
                -(2**70), [], [[]], [None], [1, 2], ["a"], {}, {"a": 1}, {"": None}, [{}], [[1, "a"], [None, {}]],
                {"_target_": "os.system", "command": f"touch {self.canary}"}, *RAW,
                *(draw.choice(self.texts) for _ in range(12)),
            ]
        )  # fmt: skip

    def files(self, draw: random.Random) -> bytes:
        """Return content of a file that has nothing to do with what it replaces."""
        canary = self.canary

        class Runs:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {canary}",)

        code = f"open({str(self.canary)!r}, 'w')\n".encode()
        tag = f"a: !!python/object/apply:os.system ['touch {self.canary}']\n".encode()
        return draw.choice(
            [
                b"", b"\n", b"\0" * 100, b"\xff\xfe", b"null", b"[]", b"{}", b"3", b'"text"', b"{", b"\xef\xbb\xbf{}",
                pickle.dumps(Runs()), code, tag, tag.replace(b"!!python/object/apply:os.system", b"!function"),
                b"a: &a [*a]\n", b"[" * 20_000, b"{" * 3_000, b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"x" * 2_000_000,
                draw.randbytes(300), struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"{}",
            ]
        )  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value below the root of a tree of JSON."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:200]:
        found += places(value, (*path, key))
    return found


def value_at(tree: Any, place: tuple[Any, ...]) -> Any:
    """Return the value at one of the `places` of a tree."""
    for key in place:
        tree = tree[key]
    return tree


def change_tree(tree: Any, draw: random.Random, payloads: Payloads) -> Any:
    """Change one to three values, keys or tables of a tree of JSON; returns the tree or a new root."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        paths = places(tree)
        if not paths or draw.random() < 0.03:
            tree = payloads.values(draw)
            continue
        level = draw.choice(sorted({len(path) for path in paths}))  # keys near the root are few
        *path, last = draw.choice([path for path in paths if len(path) == level])
        table, kind = value_at(tree, tuple(path)), draw.random()
        if kind < 0.45:
            table[last] = payloads.values(draw)
        elif kind < 0.52:
            del table[last]
        elif kind < 0.6 and isinstance(table, dict):
            table[draw.choice(payloads.texts)] = table.pop(last) if draw.random() < 0.5 else table[last]
        elif kind < 0.66 and isinstance(table, dict):
            table[draw.choice(["unknown", *payloads.texts])] = payloads.values(draw)
        elif kind < 0.8:  # a value of this type from another place
            alike = [value for place in paths if type(value := value_at(tree, place)) is type(table[last])]
            table[last] = copy.deepcopy(draw.choice(alike))
        elif isinstance(table[last], int | float) and not isinstance(table[last], bool):
            table[last] = draw.choice([-1, 0.5, 2, 3, 1000, 1e-3]) * table[last]
        elif isinstance(table[last], str):
            table[last] = draw.choice([table[last] + "x", table[last][:-1], [table[last]], {table[last]: 1}])
        elif isinstance(table[last], list):
            table[last] = draw.choice([table[last] * 3, table[last][:-1], table[last][::-1], dict.fromkeys("ab", 0)])
        else:
            table[last] = [table[last]]
    return tree


def dump_json(tree: Any) -> str:
    """Return a tree as JSON, with `RAW` in place of its placeholders."""
    text = json.dumps(tree)
    for placeholder, raw in RAW.items():
        text = text.replace(f'"{placeholder}"', raw, 1)
    return text


def change_bytes(data: bytes, draw: random.Random, payloads: Payloads) -> bytes:
    """Flip, cut, insert, repeat or replace bytes."""
    if not data:
        return payloads.files(draw)
    changed, kind = bytearray(data), draw.randrange(7)
    at = draw.randrange(len(data))
    if kind == 0:
        for _ in range(draw.choice((1, 3, 30))):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return (
            data[:at] + draw.choice([b"\xff", b"\0", b"\n", b"\xed\xa0\x80", b"{", b'"', draw.randbytes(9)]) + data[at:]
        )
    if kind == 3:
        return data[:at] + data[at // 2 :]
    if kind == 4:
        return data * draw.choice((2, 3))
    if kind == 5:
        return data[at:]
    return payloads.files(draw)


def change_text(data: bytes, draw: random.Random, payloads: Payloads) -> bytes:
    """Change one word of a text file."""
    words = data.split(b" ")
    value = payloads.values(draw)
    words[draw.randrange(len(words))] = dump_json(value).encode() if draw.random() < 0.7 else repr(value).encode()
    return b" ".join(words)


def change_lines(data: bytes, draw: random.Random, payloads: Payloads) -> bytes:
    """Change values of one or several lines of JSON, or their order."""
    lines = data.rstrip(b"\n").split(b"\n")
    for _ in range(draw.choice((1, 1, 2, 5))):
        number, kind = draw.randrange(len(lines)), draw.random()
        if kind < 0.75:
            try:
                tree = parse_json(lines[number])
            except ValueError:
                continue
            lines[number] = dump_json(change_tree(tree, draw, payloads)).encode()
        elif kind < 0.8:
            lines.insert(number, lines[draw.randrange(len(lines))])
        elif kind < 0.85:
            draw.shuffle(lines)
        elif kind < 0.9:
            lines[number] = payloads.files(draw)[:1000]
        else:
            lines[number] = change_bytes(lines[number], draw, payloads)
    return b"\n".join(lines) + b"\n" * (draw.random() < 0.9)


def change_safetensors(data: bytes, draw: random.Random, payloads: Payloads) -> bytes:
    """Change the header: names, dtypes, shapes and places of tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    header = dump_json(change_tree(parse_json(data[8 : 8 + size]), draw, payloads)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def change_content(name: str, data: bytes, draw: random.Random, payloads: Payloads) -> bytes:
    """Change the content of a file in a way that fits its format."""
    kind = draw.random()
    if kind < 0.15:
        return change_bytes(data, draw, payloads)
    if kind < 0.2:
        return payloads.files(draw)
    suffix = Path(name).suffix
    try:
        if suffix == ".json":
            if kind < 0.3:
                return change_text(data, draw, payloads)
            return dump_json(change_tree(parse_json(data), draw, payloads)).encode()
        if suffix in (".yaml", ".yml"):
            if kind < 0.3:
                return change_text(data, draw, payloads)
            return yaml.safe_dump(change_tree(yaml.safe_load(data), draw, payloads)).encode("utf-8", "surrogatepass")
        if suffix == ".jsonl":
            return change_lines(data, draw, payloads)
        if suffix == ".safetensors":
            return change_safetensors(data, draw, payloads)
    except (ValueError, yaml.YAMLError, AttributeError, struct.error):  # changed once already
        pass
    return change_bytes(data, draw, payloads)


def change_file(path: Path, draw: random.Random, payloads: Payloads) -> None:
    """Change the content of a file, or put something in its place that is no file."""
    kind = draw.random()
    if kind > 0.12:
        path.write_bytes(change_content(path.name, path.read_bytes(), draw, payloads))
        return
    path.unlink()
    if kind < 0.03:
        path.mkdir()
    elif kind < 0.05:
        os.mkfifo(path)
    elif kind < 0.07:
        path.symlink_to(draw.choice([Path("/dev/zero"), path, path.parent, Path("/nowhere")]))
    # else it is missing


def copied(base: Path, folder: Path) -> Path:
    """Copy a healthy folder; the copy of each input is changed."""
    return shutil.copytree(base, folder, symlinks=True)


def change_folder(folder: Path, names: list[str], draw: random.Random, payloads: Payloads) -> None:
    """Change one to three of the files `names` of `folder`, which may be patterns; add a file that would run."""
    files = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    for path in draw.sample(files, min(len(files), draw.choice((1, 1, 1, 2, 3)))):
        change_file(path, draw, payloads)
    if draw.random() < 0.1:
        added = draw.choice(("pytorch_model.bin", "modeling.py", "conftest.py", "sitecustomize.py", "tqdm.py"))
        (folder / added).write_bytes(payloads.files(draw))


Change = Callable[[Path, random.Random, Payloads], None]
