"""The tutorials work: every command and program of a page runs, in the order of the page, with smaller sizes.

`SMALLER` lists every change that makes them short. The full first tutorial is a slow test.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from osp.run.checkpoint import find
from tests.conftest import ROOT, read_metrics, run_in_process

TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NO_SCRIPT = ("pip install ",)  # beginnings of lines that are not run

# Added to every command of a script; steps are divided by STEPS_OF_ONE.
STEPS_OF_ONE = 100
SMALLER: dict[str, tuple[str, ...]] = {
    "train.py": (
        *("train.tokens_per_step=256", "eval.tokens=512", "eval.every=0", "eval.sample_tokens=4", "monitor.tokens=128"),
        *("monitor.every=0", "engine.threads=1", "logger.progress=false", "data.num_workers=1"),
    ),
    "prepare.py": ("logger.progress=false", "data.num_workers=1"),
    "evaluate.py": ("max_tokens=512", "progress=false", "threads=1"),
    "generate.py": ("max_new_tokens=4", "threads=1"),
}
SMALLER_OF_PAGE: dict[str, dict[str, tuple[str, ...]]] = {  # the standard library takes half a minute to tokenize
    page: {"train.py": ("data=text", "data.paths=[corpus.jsonl]", "data.val_fraction=0.05")}
    for page in ("outliers", "four-bits")
}
SMALLER_OF_PAGE["four-bits"] = {
    "train.py": (*SMALLER_OF_PAGE["four-bits"]["train.py"], "model.hidden_size=128", "model.num_hidden_layers=1"),
    "evaluate.py": ("quant.calibration_tokens=512",),
    "export.py": ("quant.calibration_tokens=512", "threads=1"),
}
SMALLER_PROGRAM = {
    "range(400)": "range(2)",
    'glob("*.py")': 'glob("a*.py")',
    "windows = ids[: len(ids) // 128 * 128]": "windows = ids[:1024]",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the commands and programs of a tutorial in order: ("bash", a line) and ("python", a program)."""
    found = BLOCK.findall((TUTORIALS / f"{page}.md").read_text(encoding="utf-8"))
    return [
        (language, part)
        for language, content in found
        for part in (content.replace("\\\n", " ").splitlines() if language == "bash" else [content])
        if not part.startswith(NO_SCRIPT)
    ]


def run_command(command: str, monkeypatch: pytest.MonkeyPatch, added: tuple[str, ...] = ()) -> None:
    """Run `python scripts/X.py ...` in this process and in the working directory."""
    python, script, *arguments = shlex.split(command, comments=True)
    assert python == "python"
    assert script == f"scripts/{Path(script).name}"
    run_in_process(monkeypatch, Path(script).stem, *arguments, *added)


def smaller(command: str, page: str) -> tuple[str, ...]:
    """Return the overrides that make `command` short."""
    script = Path(shlex.split(command)[1]).name
    steps = re.search(r"train\.steps=(\d+)", command)
    length = (f"train.steps={int(steps[1]) // STEPS_OF_ONE}",) if steps else ()
    return (*SMALLER.get(script, ()), *SMALLER_OF_PAGE.get(page, {}).get(script, ()), *length)


def follow(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the commands and programs of a page in order; return what each wrote to stdout."""
    written = []
    for language, content in blocks(page):
        if language == "bash":
            run_command(content, monkeypatch, smaller(content, page))
        else:
            for long, short in SMALLER_PROGRAM.items():
                content = content.replace(long, short)
            exec(compile(content, f"{page}.md", "exec"), {})
        written.append(capsys.readouterr().out)
    return written


@pytest.fixture
def folder(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory of a tutorial, with a small `corpus.jsonl`."""
    (tmp_path / "corpus.jsonl").write_bytes(corpus.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(written: list[str]) -> list[float]:
    """Return the perplexities that evaluate.py printed, in order."""
    return [float(value) for text in written for value in re.findall(r"\] perplexity +([\d.]+)$", text, re.MULTILINE)]


def test_outliers(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = follow("outliers", monkeypatch, capsys)
    configs = {name: find(folder / "runs" / name) for name in ("adam", "muon", "osp")}
    assert all(configs.values())
    assert "adam" in (folder / "outliers.html").read_text(encoding="utf-8")
    table = next(text for text in written if text.startswith("run "))
    assert {line.split()[0] for line in table.splitlines()[1:]} == {"adam", "muon", "osp"}
    assert any("block_out" in text and "since" in text for text in written)  # the table of inspect_outliers.py
    assert len(results(written)) == 2


def test_your_text(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = follow("your-text", monkeypatch, capsys)
    assert len(list((folder / "my-text").iterdir())) > 50
    steps = {name: read_metrics(folder / "runs" / name)[-1]["step"] for name in ("mine", "longer", "docstrings")}
    assert steps == {"mine": 3, "longer": 4, "docstrings": 3}
    tokenizers = {name: (folder / "runs" / name / "tokenizer.json").read_bytes() for name in steps}
    assert len(set(tokenizers.values())) == 1
    assert any(text.startswith("The for statement") for text in written)
    assert any(text.startswith("step 3: training") for text in written)
    _check_mistakes(monkeypatch, capsys)


def _check_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake on the page ends with the message below it."""
    page = (TUTORIALS / "your-text.md").read_text(encoding="utf-8")
    mistakes = re.findall(r"^\$ (python scripts/.*)\nerror: (.*)$", page, flags=re.MULTILINE)
    assert len(mistakes) >= 5
    for command, message in mistakes:
        with pytest.raises(SystemExit) as stopped:
            run_command(command, monkeypatch, ("logger.progress=false",))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_from_llama(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = follow("from-llama", monkeypatch, capsys)
    certificate = json.loads((folder / "converted" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["fp64"]["relative"] < 1e-9
    assert certificate["perplexity"]["before"] == pytest.approx(certificate["perplexity"]["after"], rel=1e-6)
    exported = load_file(folder / "my-llama-safe" / "model.safetensors")
    gains = [tensor for name, tensor in exported.items() if "norm" in name]
    assert len(gains) == 7  # two in each of three layers, and the last
    assert all(bool((gain == gain[0]).all()) for gain in gains)
    assert len(results(written)) == 4
    assert "The for statement" in written[-1]


def test_four_bits(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    written = follow("four-bits", monkeypatch, capsys)
    assert len(results(written)) == 4
    for name, scheme, certificate in (("small-w4a16", "W4A16: 4-16-16", 5), ("small-nvfp4", "NVFP4: 4-4-16", 6)):
        assert f"compressed-tensors {scheme}" in written[certificate]
        packed = load_file(folder / name / "model.safetensors")
        assert len([tensor for tensor in packed if tensor.endswith(".weight_packed")]) == 7
        assert not [tensor for tensor in packed if tensor.endswith("_proj.weight")]
    assert re.search(
        r"^small-w4a16: [\d.]+ MB, torch.bfloat16, perplexity [\d.]+ on 1,024 tokens$", written[-1], re.MULTILINE
    )
    page = (TUTORIALS / "four-bits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z].*?) \| ", written[5], re.MULTILINE)  # which the page quotes
    assert rows
    assert [row for row in rows if f"| {row} | " not in page] == []


def test_every_replacement_is_used() -> None:
    programs = [content for page in TUTORIALS.glob("*.md") for _, content in blocks(page.stem)]
    assert all(any(long in program for program in programs) for long in SMALLER_PROGRAM)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_outliers_at_full_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At full length, `adam` and `muon` have outliers at the norms and blocks, and `osp` has none."""
    last: dict[str, list[float]] = {}
    for language, content in blocks("outliers"):
        if "train.py" in content:
            run_command(content, monkeypatch, ("logger.progress=false",))
        elif language == "python":
            capsys.readouterr()
            exec(compile(content, "outliers.md", "exec"), {})
            for line in capsys.readouterr().out.splitlines()[1:]:
                run, step, *cells = line.split()
                assert int(step) in (0, 1000, 2000)
                last[run] = [float(cell) for cell in cells]
    assert list(last) == ["adam", "muon", "osp"]
    (adam, adam_max, *_), (muon, muon_max, *_), (osp, osp_max, *_) = last.values()
    assert adam > 5
    assert muon > 5
    assert abs(osp) < 0.2
    assert adam_max > muon_max > 3 * osp_max
