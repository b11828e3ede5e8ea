"""The commands of benchmarks/run_gpu.sh are valid, a failure does not end it, the benchmarks count correctly, and the
page of results agrees with the log."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import entry
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from verify_resume import VerifyResumeConfig

from osp.config import from_dict
from osp.model.transformer import build_model
from osp.model_config import ModelConfig, NormConfig
from osp.schema import build
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import breakdown
import growth

RUN_GPU = ROOT / "benchmarks" / "run_gpu.sh"


def dry_run() -> dict[str, list[str]]:
    """Return step name -> command."""
    done = subprocess.run([RUN_GPU, "--dry-run", "out"], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: shlex.split(command) for name, _, command in rows}


STEPS = dry_run()


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
    if script.startswith("scripts/"):
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(entry, "launch", lambda _, *args, **options: entry.run(seen.append, *args, **options))
        runpy.run_path(str(ROOT / script), run_name="__main__")
        (values,) = seen
        if (verify := values.pop("verify", None)) is not None:
            build(VerifyResumeConfig, verify, path="verify")
        from_dict(values)
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser) -> None:
        parse(self)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_gpu_run_covers_every_open_measurement() -> None:
    words = {Path(command[0]).name for command in STEPS.values()}
    assert {"train_step.py", "muon_step.py", "monitor.py", "norms.py", "generate.py", "quant_eval.py"} <= words
    assert {"verify_resume.py", "overhead.py", "growth.py"} <= words
    models = " ".join(" ".join(command) for command in STEPS.values())
    assert all(f"--model {name}" in models for name in ("osp_1b", "374m", "60m"))


def test_gpu_run_continues_after_a_failure_and_names_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $1"\ncase $1 in *muon_step*) exit 3 ;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run([RUN_GPU, "--python", python, out], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"failed: muon_osp_1b: exit status 3, see {out}/muon_osp_1b.log"
    rows = [line.split("\t") for line in (out / "summary.tsv").read_text().splitlines()[1:]]
    assert {name: status for name, status, _ in rows} == {n: "3" if n == "muon_osp_1b" else "0" for n in STEPS}
    assert (out / "growth.log").read_text() == "ran benchmarks/growth.py\n"


def tiny(**options: Any) -> ModelConfig:
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
    model = build_model(tiny(), seed=0)
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
    assert all(parts[name] > 0 for name in breakdown.PARTS if name != "waiting")


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
