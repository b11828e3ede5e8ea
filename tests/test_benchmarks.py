"""The commands of benchmarks/run_gpu.sh are valid, a failure does not end it, the benchmarks count correctly, and the
page of results agrees with the log."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import entry
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import Interval, Kernel

from osp.config import Config, from_dict
from osp.model.transformer import build_model
from osp.model_config import ModelConfig, NormConfig
from osp.train.setup import setup
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import breakdown
import growth
import monitor
import norms
import overhead
import train_step

RUN_GPU = ROOT / "benchmarks" / "run_gpu.sh"


PARTS = ("part1", "part2")


def dry_run(part: str) -> dict[str, tuple[int, list[str]]]:
    """Return step name -> (limit in seconds, command)."""
    done = subprocess.run([RUN_GPU, "--dry-run", part, "out"], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (int(limit), shlex.split(command)) for name, limit, command in rows}


LIMITED = {part: dry_run(part) for part in PARTS}
STEPS = {name: command for steps in LIMITED.values() for name, (_, command) in steps.items()}


RESULTS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
SOURCES = "".join(
    (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
    for name in ("LOG.md", "ablation_nano.md", "ablation_nano_past.md")
)


def numbers_of(text: str) -> list[tuple[float, int]]:
    """Return the numbers of a text that have a decimal point or a comma, with their decimals."""
    found = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w]|\.\d)", text)
    values = [word.strip(",").replace(",", "") for word in found if re.search(r"\.|,\d", word)]
    return [(float(value), len(value.partition(".")[2])) for value in values]


def test_every_figure_of_the_page_is_in_the_log() -> None:
    """A figure of a table may be rounded. Commands and commits are left out."""
    logged = {value for value, _ in numbers_of(SOURCES)}
    rows = [re.sub(r"`[^`]*`", "", line) for line in RESULTS.splitlines() if line.startswith("|")]
    shown = [number for row in rows for number in numbers_of(row)]
    assert len(shown) > 60
    missing = [value for value, decimals in shown if not any(round(x, decimals) == value for x in logged)]
    assert not missing


def test_every_commit_of_the_page_is_in_the_log() -> None:
    commits = set(re.findall(r"\b(?=[a-f]*\d)[0-9a-f]{7}\b", RESULTS))
    assert len(commits) > 8
    assert not {commit for commit in commits if commit not in SOURCES}


def test_page_lists_every_benchmark() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts <= set(re.findall(r"\w+\.py", RESULTS.split("## Run them")[1]))


class ParsedError(Exception):
    """Raised when a benchmark has accepted its arguments."""


@pytest.mark.parametrize("name", STEPS)
def test_command_of_the_gpu_run_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = STEPS[name]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    if script == "-m":
        pytest_, *options = arguments
        assert (pytest_, options[:5]) == ("pytest", ["-q", "-p", "no:cacheprovider", "-m", "gpu"])
        assert all((ROOT / path).exists() for path in options[5:])
        return
    if script.startswith("scripts/"):
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(entry, "launch", lambda _, *args, **options: entry.run(seen.append, *args, **options))
        runpy.run_path(str(ROOT / script), run_name="__main__")
        from_dict(seen[0])
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser) -> None:
        parse(self)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("part", PARTS)
def test_limits_of_a_part_add_up_to_its_budget(part: str) -> None:
    """A part ends before 4 or 8 minutes even if each of its steps takes too long."""
    budget = int(re.findall(rf"{part}\) budget=(\d+)", RUN_GPU.read_text())[0])
    assert sum(limit for limit, _ in LIMITED[part].values()) <= budget
    assert budget + 5 < {"part1": 230, "part2": 470}[part]  # 5: --kill-after


def test_no_step_of_the_gpu_run_measures_two_contenders_of_the_large_model() -> None:
    large = {name: command for name, command in STEPS.items() if "osp_1b" in command}
    contenders = [command[command.index("--contenders") + 1 :] for command in large.values()]
    assert sorted(contenders) == [["osp adamw"], ["osp muon"], ["transformers"]]
    assert len({command[command.index("--out") + 1] for command in large.values()}) == 1
    assert [name for name, command in large.items() if "--keep" not in command] == ["train_osp_1b_muon"]
    assert [name for name in large if name in LIMITED["part1"]] == ["train_osp_1b_muon"]


def test_gpu_run_covers_every_open_measurement() -> None:
    words = {Path(command[0]).name for command in STEPS.values()}
    assert {"train_step.py", "muon_step.py", "norms.py", "generate.py", "quant_eval.py", "overhead.py"} <= words
    models = " ".join(" ".join(command) for command in STEPS.values())
    assert all(f"--model {name}" in models for name in ("osp_1b", "374m", "60m"))


FAILING = {"part1": ("start", "train_step.py --model nano"), "part2": ("muon_step", "muon_step.py")}


@pytest.mark.parametrize("part", PARTS)
def test_gpu_run_continues_after_a_failure_and_names_it(part: str, tmp_path: Path) -> None:
    failing, command = FAILING[part]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ran $1"\necho "| a | table |"\ncase "$*" in *"{command}"*) exit 3 ;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run([RUN_GPU, part, "--python", python, out], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"failed: {failing}: exit status 3, see {out}/{failing}.log"
    assert done.stdout.count("| a | table |") == len(LIMITED[part])
    rows = [line.split("\t") for line in (out / f"{part}.tsv").read_text().splitlines()[1:]]
    assert {name: status for name, status, _ in rows} == {n: "3" if n == failing else "0" for n in LIMITED[part]}
    last = list(LIMITED[part])[-1]
    assert (out / f"{last}.log").read_text().startswith(f"ran {STEPS[last][0]}\n")


@pytest.mark.parametrize("venv", [True, False])
def test_gpu_run_finds_a_python_and_osp_by_itself(venv: bool, tmp_path: Path) -> None:
    """The project's python where there is one, else python3; `osp` is not installed, and what was on the path stays."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "tests").mkdir()
    script = shutil.copy(RUN_GPU, tmp_path / "benchmarks")
    folders = {"project": tmp_path / ".venv" / "bin", "system": tmp_path / "bin"}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        for program in ("python", "python3"):
            (folder / program).write_text(f'#!/bin/sh\necho "{name} $0 $PYTHONPATH $HF_HUB_OFFLINE $WANDB_MODE"\n')
            (folder / program).chmod(0o755)
    if not venv:
        shutil.rmtree(tmp_path / ".venv")
    environment = {**os.environ, "PATH": f"{folders['system']}:{os.environ['PATH']}", "PYTHONPATH": "/wheels"}
    subprocess.run([script, "part1", tmp_path / "out"], capture_output=True, check=True, env=environment)
    place = "project .venv/bin/python" if venv else f"system {folders['system']}/python3"
    assert (tmp_path / "out" / "data.log").read_text() == f"{place} {tmp_path}:/wheels 1 disabled\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: '' is no part; the first argument is part1 or part2"),
        (["build/gpu"], "error: 'build/gpu' is no part; the first argument is part1 or part2"),
        (["part1", "--python"], "error: --python  is no program"),
        (["part1", "--fast"], "error: unknown option --fast; the options are --dry-run and --python PYTHON"),
    ],
)
def test_wrong_argument_of_the_gpu_run_is_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([RUN_GPU, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


def test_gpu_run_needs_no_optional_package() -> None:
    """Every benchmark of it, and the training that they start, can be imported without packages for other purposes."""
    modules = {Path(command[0]).stem for command in STEPS.values() if command[0].startswith("benchmarks/")}
    missing = ("wandb", "zstandard", "torchao", "gguf", "compressed_tensors", "lm_eval")
    lines = ["import sys", f"sys.path.append({str(ROOT / 'benchmarks')!r})"]
    lines += [f"sys.modules[{name!r}] = None" for name in missing]
    lines += [f"import {name}" for name in ("osp.train.setup", "transformers.models.llama", *sorted(modules))]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)


def settings(**values: Any) -> argparse.Namespace:
    """Return arguments of train_step.py, monitor.py and overhead.py."""
    sizes: dict[str, Any] = {
        "model": "nano",
        "rows": 2,
        "accumulate": 4,
        "seq_len": 32,
        "tokens_per_step": 64,
        "threads": None,
    }
    return argparse.Namespace(**sizes | {"precision": "fp32", "compile": None, "child": None} | values)


@pytest.fixture(autouse=True)
def folders_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run folders of benchmarks be removed with tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_benchmarks_ask_for_no_room_on_the_disk() -> None:
    """Only overhead.py, which measures saving, keeps a checkpoint."""
    sizes = {"layers": 1, "width": 64, "seq_len": 64, "micro_batch": 1}
    configs = [train_step.run_config(settings()), monitor.run_config(settings(child="off")), growth.config_of(**sizes)]
    assert [(c.checkpoint.every, c.checkpoint.keep_last) for c in configs] == [(0, 1)] * 3
    assert overhead.run_config(settings()).checkpoint.keep_last == 1
    assert {c.logger.wandb for c in configs} == {"disabled"}


def test_contender_decides_optimizer_and_compilation() -> None:
    names = ("osp adamw", "osp muon", "osp adamw compiled", "osp muon compiled")
    configs = [train_step.run_config(settings(child=name, compile=False)) for name in names]
    assert [c.optimizer.rules["matrix"] for c in configs] == ["adamw", "muon"] * 2
    assert [c.train.compile for c in configs] == [False, False, True, True]
    assert {(c.train.tokens_per_step, c.train.micro_batch_size) for c in configs} == {(256, 2)}


# --- train_step.py: micro batches and the tail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micros", "micro"),
    [
        ([[0.28, 0.30, 0.31, 0.35], [0.20, 0.30, 0.29, 0.40]], 0.30),  # without the first and the last
        ([[0.28, 0.35], [0.26, 0.35]], 0.27),  # the last reduces the gradients
        ([[0.28], [0.30]], 0.29),
    ],
)
def test_tail_is_what_a_step_takes_once(micros: list[list[float]], micro: float) -> None:
    measured, tail = train_step.split_step([1.4, 1.6], micros)
    assert measured == pytest.approx(micro)
    assert tail == pytest.approx(1.5 - len(micros[0]) * micro)


def test_step_of_half_a_million_tokens_is_predicted_from_a_smaller_one() -> None:
    """osp_1b's sizes: 32 micro batches of 16,384 tokens of 0.3 s, and a tail of 0.2 s."""
    micros = [[0.3] * 4] * 2
    figures = train_step.speeds([1.4] * 2, micros, micro_tokens=16_384, flops_per_token=6e9, peak_tflops=500.0)
    assert figures["predicted_seconds"] == pytest.approx(32 * 0.3 + 0.2)
    assert figures["tokens_per_second"] == pytest.approx(65_536 / 1.4)
    flops = 16_384 * 6e9 / 500e12  # seconds of a micro batch at the peak
    assert figures["micro_mfu"] == pytest.approx(flops / 0.3)
    assert figures["mfu"] == pytest.approx(4 * flops / 1.4)
    assert figures["predicted_mfu"] == pytest.approx(32 * flops / 9.8)


def test_prediction_of_the_measured_step_is_its_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "STEP_TOKENS", 4 * 100)
    micros = [[0.1, 0.2, 0.21, 0.3]] * 2
    figures = train_step.speeds([1.0, 1.2], micros, micro_tokens=100, flops_per_token=1.0, peak_tflops=None)
    assert figures["predicted_seconds"] == pytest.approx(1.1)
    assert figures["predicted_mfu"] is None


class FakeEvents:
    """`torch.cuda.Event` on a made-up clock: every event is 2 ms times its number later than the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.milliseconds, self.recorded, self.waits = 0.0, 0, 0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                outer.milliseconds += 2.0 * outer.recorded
                outer.recorded += 1
                self.at = outer.milliseconds

            def elapsed_time(self, later: "Event") -> float:
                assert outer.waits == 1, "the GPU has not passed the event"
                return later.at - self.at

        def synchronize() -> None:
            outer.waits += 1

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_passes_are_timed_by_events_without_waiting_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvents(monkeypatch)
    marks = train_step.Marks(time.perf_counter)
    marks.begin()
    marks.begin()  # of the second micro batch
    marks.add()
    marks.add()
    torch.cuda.synchronize()
    assert marks.take_spans() == pytest.approx([0.002, 0.004])
    assert marks.points == []


def test_norms_are_timed_by_the_median_of_a_queue_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    events, calls = FakeEvents(monkeypatch), []
    monkeypatch.setattr(norms, "ON_GPU", True)
    seconds = norms.seconds_of(lambda: calls.append(events.recorded), 5)
    assert seconds == pytest.approx(0.006)  # of 2, 4, 6, 8 and 10 ms
    assert calls == [0, 0, 0, 1, 2, 3, 4, 5]  # three for warm-up, then one before each event


def test_marked_trainer_takes_the_same_steps(tiny: Callable[..., Config]) -> None:
    """Marks change nothing, and a step has one for each of its four backward passes."""
    marks = train_step.Marks(time.perf_counter)
    marked, plain = train_step.Ours(tiny(name="marked"), marks), setup(tiny(name="plain"))
    for step in range(2):
        marked.step(step)
        marks.add()
        spans = marks.take_spans()
        assert len(spans) == 5
        assert min(spans) > 0
        plain.train_step(step, record=False)
    for x, y in zip(marked.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    marked.trainer.close()
    plain.close()


def test_step_that_is_not_taken_is_no_measurement(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    contender = train_step.Ours(tiny(), train_step.Marks(time.perf_counter))
    monkeypatch.setattr(contender.trainer, "train_step", lambda step, **_: None)
    contender.trainer.failure = "the loss is not finite"
    with pytest.raises(RuntimeError, match="step 3 was not taken: the loss is not finite"):
        contender.step(2)
    contender.trainer.close()


def test_peer_accumulates_the_gradient_of_the_whole_step(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gradients = tiny("model.embed_proj=false"), []
    for rows, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        marks = train_step.Marks(time.perf_counter)
        arguments = settings(rows=rows, accumulate=accumulate, child="transformers")
        peer = train_step.Peer(config, arguments, marks)
        before = [p.detach().clone() for p in peer.model.parameters()]
        monkeypatch.setattr(peer, "optimizer", torch.optim.SGD(peer.model.parameters(), lr=1.0))
        peer.step(0)
        assert len(marks.points) == accumulate + 1
        gradients.append([x - p.detach() for x, p in zip(before, peer.model.parameters(), strict=True)])
    assert 0.1 < sum(g.square().sum() for g in gradients[0]) < 1.0  # not clipped
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


# --- train_step.py: contenders and the file --------------------------------------------------------------------------


def made_figures(predicted: float, *, step: float = 1.0, device: str = "a GPU", **others: Any) -> dict[str, Any]:
    figures = train_step.speeds([step], [[0.2]], micro_tokens=64, flops_per_token=1e9, peak_tflops=1.0)
    return figures | {"predicted_seconds": predicted, "after_seconds": 0.1, "peak_gib": 2.0, "device": device} | others


def run_train_step(
    monkeypatch: pytest.MonkeyPatch, children: dict[str, list[Any]], out: Path, *options: str
) -> tuple[int, list[dict[str, Any] | None]]:
    """Run main() with made-up children; return the exit status and the file as each child found it."""
    found: list[dict[str, Any] | None] = []

    def run_child(name: str) -> Iterator[Any]:
        found.append(json.loads(out.read_text()) if out.exists() else None)
        yield from children[name]

    monkeypatch.setattr(train_step, "run_child", run_child)
    command = ["train_step.py", "--rounds", "1", "--out", str(out), *options, "--contenders", *children]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        train_step.main()
    assert isinstance(end.value.code, int)
    return end.value.code, found


def test_file_is_written_after_each_contender(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    children = {
        "transformers": ["out of memory"],
        "osp adamw": [made_figures(9.2), made_figures(9.2, time={"matmuls": 0.7, "waiting": 0.3})],
        "osp muon": [made_figures(9.384, step=1.25)],
    }
    status, found = run_train_step(monkeypatch, children, out)
    assert status == 1
    assert found[0] is None
    assert found[1] is not None
    assert found[1]["failed"] == {"transformers": "out of memory"}
    assert found[2] is not None
    assert [len(rounds) for rounds in found[2]["results"].values()] == [0, 1, 0]
    assert found[2]["results"]["osp adamw"][0]["time"] == {"matmuls": 0.7, "waiting": 0.3}
    assert json.loads(out.read_text())["muon_over_adamw"] == {"osp muon over osp adamw": [pytest.approx(1.02)]}
    shown = capsys.readouterr().out
    assert "osp muon over osp adamw, a step of 524,288 tokens: 1.0200 (1.0200 to 1.0200)\n" in shown
    assert "| osp adamw | 64 | 1.00 (1.00 to 1.00) | 1.000 | 2.00 | 6.4% |\n" in shown
    assert "| osp muon | 51 | 0.80 (0.80 to 0.80) | 1.250 | 2.00 | 5.1% |\n" in shown
    assert "| transformers | failed | | | | |\n" in shown
    assert "| osp muon | 0.2000 | 32.0% | 1.0500 | 0.1000 | 9.384 |" in shown
    assert "| osp adamw | 0.700 | 0.300 | 1.000 |\n" in shown
    assert "add up to" not in shown


def test_parts_beyond_the_wall_time_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children = {"osp muon": [made_figures(9.0, time={"matmuls": 0.8, "other": 0.3})]}
    assert run_train_step(monkeypatch, children, tmp_path / "a.json")[0] == 0
    assert "osp muon: the parts add up to 1.100 s and a step takes 1.000 s" in capsys.readouterr().out


def test_figures_survive_a_profile_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children = {"osp muon": [made_figures(9.0), "no profiler here"]}
    assert run_train_step(monkeypatch, children, tmp_path / "a.json")[0] == 1
    written = json.loads((tmp_path / "a.json").read_text())
    assert (len(written["results"]["osp muon"]), written["failed"]) == (1, {"osp muon": "no profiler here"})
    captured = capsys.readouterr()
    assert "| osp muon | 64 |" in captured.out
    assert "no profiler here" in captured.err


def test_kept_contenders_are_in_the_same_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    run_train_step(monkeypatch, {"osp muon": [made_figures(9.384)]}, out, "--profile")
    run_train_step(monkeypatch, {"osp adamw": [made_figures(9.2, device="another GPU")]}, out, "--keep")
    assert list(json.loads(out.read_text())["results"]) == ["osp adamw", "osp muon"]
    shown = capsys.readouterr().out
    assert "osp muon over osp adamw, a step of 524,288 tokens: 1.0200" in shown
    assert "different devices" in shown
    status, found = run_train_step(monkeypatch, {"transformers": []}, out, "--keep", "--seq-len", "2048")
    assert (status, found) == (2, [])
    error = f"error: --keep: {out} has --seq-len 256, not 2048; choose another --out\n"
    assert capsys.readouterr().err.endswith(error)


def test_child_tells_its_figures_before_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    lines = ("print('{')", f"print({train_step.FIGURES!r} + '[1, 2]', flush=True)", "raise MemoryError(sys.argv[1:])")
    child.write_text("import sys\n" + "\n".join(lines))
    monkeypatch.setattr(train_step, "__file__", str(child))
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--rows", "4"])
    figures, error = train_step.run_child("osp muon")
    assert figures == [1, 2]
    assert str(error).endswith("MemoryError: ['--rows', '4', '--child', 'osp muon']\n")


# --- breakdown.py ----------------------------------------------------------------------------------------------------


def event(name: str, *kernels: tuple[str, int], parent: Any = None, start: int = 0, on_gpu: int = 0) -> Any:
    """Return an event as torch's profiler makes them: of an operator with its kernels, or of on_gpu us on the GPU."""
    return SimpleNamespace(
        name=name,
        kernels=[Kernel(kernel, 0, us) for kernel, us in kernels],
        cpu_parent=parent,
        sequence_nr=-1,
        self_cpu_time_total=0.0,
        time_range=Interval(start, start + on_gpu),
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
        is_user_annotation="#" in name and on_gpu > 0,
    )


def test_kernels_that_no_operator_owns_are_not_waiting() -> None:
    """A product, two optimizer kernels, a Triton kernel without an operator, and the region of the optimizer."""
    optimizer = event("Optimizer.step#Muon.step", ("Optimizer.step#Muon.step", 500_000))
    events = [
        event("aten::mm", ("nvjet", 400_000)),
        optimizer,
        event("aten::add_", ("add", 100_000), ("add", 100_000), parent=optimizer),
        event("cudaLaunchKernel", ("add", 100_000)),  # lists a kernel of the optimizer again
        event("nvjet", on_gpu=400_000),
        event("add", start=400_000, on_gpu=100_000),
        event("add", start=500_000, on_gpu=100_000),
        event("triton_poi_fused_mul", start=600_000, on_gpu=150_000),
        event("Optimizer.step#Muon.step", start=400_000, on_gpu=500_000),
    ]
    parts = breakdown.parts_of_events(events, 1.0, on_gpu=True)
    shown = {"matmuls": 0.4, "optimizer": 0.2, "no operator": 0.15, "waiting": 0.25}
    assert {name: seconds for name, seconds in parts.items() if seconds} == pytest.approx(shown)
    assert breakdown.parts_of_events(events, 0.5, on_gpu=True)["waiting"] == 0


def small(**options: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        norm=NormConfig(name="rmsnorm"),
        **options,
    )


def test_every_operation_of_a_step_belongs_to_one_part() -> None:
    model = build_model(small(), seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 96, (8, 16))

    def step() -> None:
        model(ids, ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    breakdown.mark_norms(model)
    parts = breakdown.parts_of_time(step, 2.0)
    assert sum(parts.values()) == pytest.approx(2.0)
    assert set(parts) == set(breakdown.PARTS)
    assert all(parts[name] > 0 for name in breakdown.PARTS if name not in ("no operator", "waiting"))


def test_norms_are_counted_in_forward_and_backward_and_nothing_else_is() -> None:
    """All of the forward and backward of a model of norms is norms; without norms, none of it is."""
    norm, linear = nn.RMSNorm(512), nn.Linear(512, 512)
    x = torch.randn(64, 512, requires_grad=True)
    breakdown.mark_norms(nn.ModuleList([norm, linear]))
    of_norm = breakdown.parts_of_time(lambda: norm(x).backward(x), 1.0)
    of_linear = breakdown.parts_of_time(lambda: linear(x).backward(x), 1.0)
    assert of_norm["norms"] > 0.5
    assert of_linear["norms"] == 0
    assert of_linear["matmuls"] > 0.5


def test_memory_by_part_is_counted_in_bytes() -> None:
    """A linear layer without bias keeps its input, a cross-entropy the log-probabilities."""
    model = nn.Sequential(nn.Linear(8, 96, bias=False))
    x, targets = torch.randn(10, 8), torch.zeros(10, dtype=torch.long)
    state = [torch.zeros(96 * 8), torch.zeros(())]
    parts = breakdown.parts_of_memory(lambda: F.cross_entropy(model(x), targets), model, state, logits=0)
    counted = {name: round(size * 2**30) for name, size in parts.items()}
    small = counted.pop("activations") - 4 * 80  # the input, then targets and the sum of weights
    assert 80 <= small <= 100
    assert counted == {
        "weights": 4 * 768,
        "gradients": 4 * 768,
        "optimizer state": 4 * 769,
        "logits": 4 * 960,
    }


def test_flops_of_newton_schulz_equal_the_flops_of_its_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from osp.optim.muon import newton_schulz

    config = growth.config_of(layers=1, width=64, seq_len=64, micro_batch=1)
    shapes = [(64, 64)] * 4 + [(172, 64)] * 2 + [(64, 172)] + [(64, 64)] * 2  # attention, MLP, EmbProj
    with FlopCounterMode(display=False) as counter:
        for shape in shapes:
            newton_schulz(torch.randn(shape), config.optimizer.ns_steps, dtype=torch.float32)
    assert growth.newton_schulz_flops(config) == counter.get_total_flops()


def test_collectives_are_counted_as_ring_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.dist, "get_rank", lambda: 1)
    counted, x = growth.Collectives(world_size=4), torch.zeros(100)
    assert counted._sent("allreduce_", ([x],)) == ("all_reduce", 2 * 3 / 4 * 400)
    assert counted._sent("_reduce_scatter_base_", (x[:25], x)) == ("reduce_scatter", 3 / 4 * 400)
    assert counted._sent("_allgather_base_", (x, x[:25])) == ("all_gather", 3 / 4 * 400)
    assert counted._sent("alltoall_base_", (x, x, None, [25] * 4, [10, 40, 30, 20])) == ("all_to_all", 4 * 60)
    with pytest.raises(AssertionError, match="gather_"):
        counted._sent("gather_", ())


def test_growth_page_has_a_chart_for_each_curve() -> None:
    """A speed that falls with the flops is the expected one; a speed that falls with their square is slow."""
    points = [{"x": x, "tokens_per_second": 100 / x, "flops": 10.0 * x} for x in (1, 2, 4)]
    slow = [{**p, "tokens_per_second": 100 / p["x"] ** 2} for p in points]
    common = {"stage": 1, "seconds": 0.1, "muon": 0.0, "expected": 200.0, "expected_muon": 10.0}
    ranks = [{"x": x, "bytes": 100.0 * (x - 1), **common} for x in (1, 2, 4)]
    charts = growth.charts_of({"layers": points, "width": slow, "ranks": ranks})
    assert [chart["title"] for chart in charts] == [
        "Tokens per second against layers",
        "Tokens per second against width",
        "Bytes sent by a rank in a step",
        "CPU time of a step on a rank, equal sequences",
    ]
    assert "at worst 1.00 of the expected time" in charts[0]["words"]
    assert "at worst 4.00 of the expected time" in charts[1]["words"]
    html = growth.page(charts, "a machine")
    assert json.loads(html.split('id="data">')[1].split("</script>")[0])[0]["curves"][1]["dashed"] is True
    assert html.count('<div class="plot"') == 4
    assert "https://" not in html.replace(Path(growth.report_page.HERE, "echarts.min.js").read_text(), "")
