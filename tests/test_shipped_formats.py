"""The benchmark of shipped formats measures the files, and docs/results.md has its tables."""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.errors import UserError
from osp.evaluation.perplexity import Text, perplexity
from osp.model.transformer import Transformer, build_model
from osp.model_config import ModelConfig, NormConfig
from tests.conftest import ROOT
from tests.documents import read_page, section

sys.path.append(str(ROOT / "benchmarks"))
import shipped_formats
from shipped_formats import Cost


def tiny_model() -> Transformer:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        norm=NormConfig(name="rmsnorm"),
    )
    return build_model(config, seed=0).eval()


def test_code_length_is_the_cross_entropy_of_the_evaluation() -> None:
    """The model computes its loss in chunks and without logits; the benchmark has the logits of a client."""
    model = tiny_model()
    ids = torch.randint(0, 64, (37 * 16,), generator=torch.Generator().manual_seed(0))
    expected = perplexity(model, Text("random", ids, torch.ones_like(ids), sha256=""), seq_len=16)
    measured = shipped_formats.code_length(lambda x: model(x).logits, ids.view(-1, 16))
    assert measured["nats"] == pytest.approx(expected.loss, abs=1e-6)


def test_a_planted_outlier_leaves_the_function_alone() -> None:
    """A factor that is a power of two leaves its bits."""
    model = tiny_model()
    ids = torch.arange(32).view(2, 16)
    expected, largest = model(ids).logits, shipped_formats.largest_input(model, ids)
    shipped_formats.plant_outlier(model, 4096, channel=3)
    assert torch.equal(model(ids).logits, expected)
    assert shipped_formats.largest_input(model, ids) > 10 * largest


@pytest.mark.parametrize(("windows", "sizes"), [(256, [16] * 16), (37, [2] * 15 + [7]), (5, [1] * 5)])
def test_parts_are_consecutive_windows(windows: int, sizes: list[int]) -> None:
    """The logits of window i give its tokens the probability exp(-i)."""
    ids = torch.zeros(windows, 8, dtype=torch.long)
    ids[:, 0] = torch.arange(windows)

    def logits(batch: Tensor) -> Tensor:
        right = torch.exp(-batch[:, :1].double() - 1e-9).expand(-1, 8)
        return torch.stack((right.log(), torch.log1p(-right)), dim=-1)

    measured = shipped_formats.code_length(logits, ids)
    of_windows = iter(range(windows))
    assert measured["nats"] == pytest.approx((windows - 1) / 2, abs=1e-6)
    assert measured["parts"] == pytest.approx([statistics.fmean(next(of_windows) for _ in range(n)) for n in sizes])


def test_bytes_of_a_folder_are_those_of_its_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(6, 2, dtype=torch.int32),
        "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(6, 1, dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.zeros(16),
        "lm_head.weight": torch.zeros(5, 16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    sizes, types = shipped_formats.stored_bytes(tmp_path)
    assert list(sizes) == sorted(tensors) or set(sizes) == set(tensors)
    assert {name: tensor.nbytes for name, tensor in tensors.items()} == sizes
    assert types == {"I32": 1, "BF16": 1}


def test_bytes_of_a_gguf_file_are_those_of_its_tensors(tmp_path: Path) -> None:
    """Q8_0 stores 34 bytes for 32 weights."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(np.ones((4, 64), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(64, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    sizes, types = shipped_formats.stored_bytes(tmp_path / "m.gguf")
    assert sizes == {"blk.0.ffn_up.weight": 4 * 64 // 32 * 34, "blk.0.ffn_norm.weight": 256}
    assert types == {"Q8_0": 1}


def test_verdict_needs_every_seed_and_twice_the_error() -> None:
    def differences(*means: float) -> list[Cost]:
        """Return costs whose standard error is 0.001."""
        return [Cost(mean, (mean - 0.001, mean + 0.001)) for mean in means]

    assert differences(0.5)[0].error == pytest.approx(0.001)
    assert shipped_formats.verdict(differences(0.003, 0.0021)) == "more"
    assert shipped_formats.verdict(differences(0.003, 0.0019)) == "not clear"
    assert shipped_formats.verdict(differences(-0.003, -0.0021)) == "less"
    assert shipped_formats.verdict(differences(-0.003, 0.003)) == "not clear"


def made_run(recipe: str, seed: int, cost: float) -> dict[str, Any]:
    """Return the numbers of a run to which `NVFP4` costs `cost` nats, in every part of the text."""

    def file(nats: float, size: int) -> dict[str, Any]:
        length = {"nats": nats, "parts": [nats, nats + 1]}
        return {**length, "client": "c", "quant": "q", "hash": "", "bytes": 9, "block_bytes": size, "types": {"U8": 7}}

    rows = {name: {"nats": 2.0, "parts": [2.0, 2.0], "quant": "q"} for name in ("16-16-16", "nvfp4")}
    return {
        "recipe": recipe,
        "seed": seed,
        "text_sha256": "f",
        "tokens": 64,
        "window": 8,
        "block_weights": 16,
        "trained": "commit",
        "measured": {"git": "commit", "cpus": 2, "torch": "2", "python": "3"},
        "outliers": {"kurtosis": 1.0, "osp_script": 1.0, "down_proj_max": 9.0, "down_proj_kurtosis": 9.0},
        "files": {"fp32": file(2.0 + seed, 64), "NVFP4": file(2.0 + seed + cost, 9)},
        "fake": rows,
        "folded": rows,
        "planted": {},
    }


def test_tables_show_means_over_seeds_and_compare_seed_by_seed() -> None:
    costs = {("adam", 0): 0.1, ("adam", 1): 0.3, ("osp", 0): 0.2, ("osp", 1): 0.5}
    runs = {f"{recipe}{seed}": made_run(recipe, seed, cost) for (recipe, seed), cost in costs.items()}
    tables = {title: rows for title, _, _, rows in shipped_formats.tables(list(runs.values()))}
    assert tables["Cost of each file"][1:] == [["NVFP4", "4.50", "0.2000±0.1414", "0.3500±0.2121"]]
    assert tables["Recipe against recipe"] == [["NVFP4", "more: +0.1000, +0.2000"]]
    assert (
        tables["Perplexity of each file"][0][1]
        == f"{(math.e**2 + math.e**3) / 2:.2f}±{(math.e**3 - math.e**2) / math.sqrt(2):.2f}"
    )
    assert tables["Gains folded into the matrices"] == [["nvfp4", "-0.2000±0.1414", "-0.3500±0.2121"]]


def test_runs_that_differ_in_their_text_are_refused() -> None:
    runs = {"a": made_run("adam", 0, 0.1), "b": made_run("adam", 1, 0.1) | {"tokens": 32}}
    with pytest.raises(UserError, match="the runs differ in tokens"):
        shipped_formats.check_comparable(runs)
    runs["b"] = made_run("adam", 0, 0.2)
    with pytest.raises(UserError, match="2 runs are of recipe adam and seed 0"):
        shipped_formats.check_comparable(runs)


def test_a_run_is_exported_and_read_by_the_clients(plain_run: Path) -> None:
    """The fp32 file computes what the model does, and Q8_0 what fake quantization does."""
    for library in ("transformers", "gguf"):
        pytest.importorskip(library)
    arguments = argparse.Namespace(files=["fp32", "GGUF Q8_0"], tokens=512, calibration_tokens=64, fake=["research"])
    *_, run = shipped_formats.measure_run(plain_run, None, arguments)
    assert run["tokens"] == 512
    assert run["files"]["fp32"]["nats"] == pytest.approx(run["fake"]["16-16-16"]["nats"], rel=1e-5)
    assert run["files"]["fp32"]["block_bytes"] > 4 * run["block_weights"]  # the FFN of 48 channels is padded
    assert set(run["files"]["GGUF Q8_0"]["types"]) == {"Q8_0"}


COMMITTED = ROOT / "benchmarks" / "shipped_formats.json"
RESULTS = json.loads(COMMITTED.read_text(encoding="utf-8"))
PAGE = section(read_page("docs/results.md"), "What a shipped 4-bit file costs")
OUTLIERS = section(read_page("docs/results.md"), "Where outliers would cost")


def test_committed_json_renders_the_committed_tables() -> None:
    page = COMMITTED.with_suffix(".md").read_text(encoding="utf-8")
    assert page == shipped_formats.as_markdown(RESULTS)


def test_tables_of_the_page_are_the_ones_of_the_benchmark() -> None:
    rows = re.findall(r"^\|.*\|$", PAGE + OUTLIERS, flags=re.MULTILINE)
    measured = COMMITTED.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 25
    assert not [row for row in rows if row not in measured]


def test_claims_of_the_page_hold() -> None:
    runs = list(RESULTS["runs"].values())
    nats = {(run["recipe"], run["seed"], row): file["nats"] for run in runs for row, file in run["files"].items()}
    for better, worse in (("osp", "adam"), ("osp_plus", "osp")):
        best = min(value for (recipe, _, row), value in nats.items() if (recipe, row) == (worse, "fp32"))
        assert all(value < best for (recipe, *_), value in nats.items() if recipe == better)
    costs = {
        (recipe, row): statistics.fmean(nats[recipe, seed, row] - nats[recipe, seed, "fp32"] for seed in (0, 1))
        for recipe, _, row in nats
    }
    assert all(costs["osp", row] > costs["adam", row] for row in ("W4A16, clip", "NVFP4", "MXFP4", "GGUF Q4_0"))
    assert costs["osp", "W4A16, GPTQ"] < costs["adam", "W4A16, GPTQ"]
    recipes = ("adam", "muon", "osp", "osp_plus")
    gptq = [1 - costs[recipe, "W4A16, GPTQ"] / costs[recipe, "W4A16, clip"] for recipe in recipes]
    assert all(0.33 < lowered < 0.67 for lowered in gptq)
    verdicts = {row: cells for row, *cells in tables_of("Recipe against recipe")}
    clear = {(row, i) for row, cells in verdicts.items() for i in (0, 1) if not cells[i].startswith("not clear")}
    assert clear == {("W4A16, RTN", 0)}
    assert verdicts["W4A16, RTN"][0].startswith("more: +0.009")
    plain, clip, by_gptq = (costs["osp", f"W4A16, {how}"] for how in ("RTN", "clip", "GPTQ"))
    assert 0.4 < 1 - clip / plain < 0.6
    assert 0.75 < 1 - by_gptq / plain < 0.85
    for name in ("NVFP4", "MXFP4"):
        alone, both = ([costs[recipe, name + part] for recipe in recipes] for part in ("A16", ""))
        assert all(a < 0.56 * b for a, b in zip(alone, both, strict=True))
        assert 0.005 <= round(min(alone), 3) <= max(alone) < 0.035
        assert 0.018 < min(both) <= max(both) < 0.075
    assert {cells[2].partition(":")[0] for cells in verdicts.values()} == {"more", "not clear"}
    static = {run: fake["A4, per tensor, static"]["nats"] - fake["16-16-16"]["nats"] for run, fake in fakes().items()}
    by_recipe = {
        recipe: statistics.fmean(static[recipe, seed] for seed in (0, 1)) / costs[recipe, "NVFP4"] for recipe in recipes
    }
    assert min(by_recipe.values()) >= 6
    assert max(by_recipe.values()) <= 20
    assert not [run for run, file in nats.items() if not math.isfinite(file)]


def tables_of(title: str) -> list[list[str]]:
    return next(rows for name, _, _, rows in shipped_formats.tables(list(RESULTS["runs"].values())) if name == title)


def fakes() -> dict[tuple[str, int], Any]:
    return {(run["recipe"], run["seed"]): run["fake"] for run in RESULTS["runs"].values()}
