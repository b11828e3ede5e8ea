"""A downloaded file cannot run code or reach outside its folder, and no file of a run holds a secret."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from osp.config import Config
from osp.train.setup import train
from tests.conftest import ROOT

SOURCES = sorted(path.relative_to(ROOT) for folder in ("osp", "scripts") for path in (ROOT / folder).rglob("*.py"))

# Calls that run what a file holds, by the end of their dotted name.
FORBIDDEN = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "joblib.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "tarfile.open",
    "zipfile.ZipFile",
}
# The settings that `start_preparing` passes to its child, through a pipe that no other process can write to.
ALLOWED = {("osp/data/prepare.py", "pickle.load")}
# Options that must not be true wherever they are given.
SWITCHES = {"allow_pickle", "trust_remote_code", "shell"}


def dangers(source: str) -> Iterator[str]:
    """Yield the calls of a source that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield from (name for _ in [0] if name in FORBIDDEN)
            for keyword in node.keywords:
                if keyword.arg in SWITCHES and ast.unparse(keyword.value) != "False":
                    yield f"{name}({keyword.arg}={ast.unparse(keyword.value)})"
        elif isinstance(node, ast.ImportFrom):  # `from pickle import load` would hide it
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in FORBIDDEN
            )


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_source_executes_a_file(path: Path) -> None:
    calls = {(str(path), danger) for danger in dangers((ROOT / path).read_text())}
    assert calls <= ALLOWED


def test_every_allowed_call_exists() -> None:
    assert {(path, danger) for path, _ in ALLOWED for danger in dangers((ROOT / path).read_text())} >= ALLOWED


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        ("torch.load(path)", ["torch.load"]),
        ("import pickle\nx = pickle.loads(b'')", ["pickle.loads"]),
        ("from pickle import load", ["pickle.load"]),
        ("np.load(path, allow_pickle=True)", ["np.load(allow_pickle=True)"]),
        ("np.load(path, allow_pickle=flag)", ["np.load(allow_pickle=flag)"]),
        ("load_dataset(name, trust_remote_code=True)", ["load_dataset(trust_remote_code=True)"]),
        ("yaml.load(text, Loader=yaml.Loader)", ["yaml.load"]),
        ("eval('1')", ["eval"]),
        ("model.eval()\nyaml.safe_load(text)\ntorch.compile(f)\nre.compile('a')\nnp.load(p, allow_pickle=False)", []),
    ],
)
def test_check_finds_dangerous_calls(source: str, calls: list[str]) -> None:
    assert list(dangers(source)) == calls


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "5ec2e75a",
    "HF_TOKEN": "hf_MarkerOfATokenThatMustNotLeak",
    "HUGGING_FACE_HUB_TOKEN": "hf_AnotherMarkerThatMustNotLeak",
}


def test_secret_keys_are_never_written(
    tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """In a whole run with W&B offline and a checkpoint, neither files nor output hold a key."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    train(tiny("train.steps=2", "logger.wandb=offline", f"data.cache_dir={tmp_path / 'shards'}"))
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for kind in (".wandb", ".safetensors", ".bin", ".yaml", ".json", ".jsonl"):
        assert [path for path in written if path.suffix == kind], f"no {kind} file: the test looks at too little"
    output = "".join(capfd.readouterr()) + caplog.text
    for name, value in SECRETS.items():
        assert not [str(path) for path, content in written.items() if value.encode() in content], name
        assert value not in output, name
