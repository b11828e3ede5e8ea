"""The columns and texts of scripts/compare.py: each cell is what `quantized` and `perplexity` give."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.errors import UserError
from osp.evaluation.compare import COLUMNS, FORMAT_COLUMNS, VARIANTS, column_spec, compare, compare_one, markdown, score
from osp.evaluation.config import CompareConfig
from osp.evaluation.language_model import LanguageModel
from osp.evaluation.perplexity import Text, perplexity
from osp.evaluation.texts import read_text
from osp.model.transformer import build_model
from osp.model_config import NormConfig
from osp.quant.apply import draw_calibration, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec
from osp.run.evaluations import Comparison, ComparisonRecord, Result, Score, read_comparison, write_evaluation
from osp.run.read import read_run
from osp.schema import build
from tests.conftest import made_text

NAMES = (*COLUMNS, *VARIANTS, *FORMAT_COLUMNS)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Return two texts to measure and one for calibration."""
    paths = [tmp_path / f"{name}.txt" for name in ("first", "second", "calibration")]
    for seed, path in enumerate(paths):
        path.write_text("".join(made_text(3, seed=seed)))
    return [str(path) for path in paths]


def wanted(files: list[str], *columns: str, **keys: Any) -> CompareConfig:
    quant = QuantSpec(calibration=files[2], calibration_tokens=96, **keys.pop("quant", {}))
    defaults = {"texts": tuple(files[:2]), "seq_len": 32, "max_tokens": 64, "methods": "none", "progress": False}
    return CompareConfig(columns=columns, quant=quant, **(defaults | keys))


def specs_of(config: CompareConfig) -> dict[str, QuantSpec]:
    return {column: column_spec(column, config.quant) for column in config.columns}


def test_every_column_is_made_from_quant() -> None:
    quant = {"calibration": "a.txt", "calibration_tokens": 96, "seed": 3, "w_clip": False}
    static = QuantSpec(w_bits=4, a_bits=4, static_activations=True, o_proj_by_head=False, **quant)
    given = {"calibration": "a.txt", "calibration_tokens": 96, "seed": 3}
    specs = specs_of(CompareConfig(columns=NAMES, quant=QuantSpec(a_group_size=None, **quant)))
    assert tuple(specs) == NAMES
    assert specs == {
        "16-16-16": QuantSpec(**quant),
        "4-8-16": QuantSpec(4, 8, 16, **quant),
        "4-8-8": QuantSpec(4, 8, 8, **quant),
        "4-4-16": QuantSpec(4, 4, 16, **quant),
        "4-4-4": QuantSpec(4, 4, 4, **quant),
        "4-4-4 +Had": QuantSpec(4, 4, 4, ffn_hadamard=True, **quant),
        "4-4-4 folded": QuantSpec(4, 4, 4, fold_gains=True, **quant),
        "static 8-8": dataclasses.replace(static, w_bits=8, a_bits=8),
        "static 4-4": static,
        "W4A16": DEPLOYED["w4a16_g128"],
        "NVFP4": dataclasses.replace(DEPLOYED["nvfp4"], **given),
        "MXFP4": DEPLOYED["mxfp4"],
        "QAT W4A4": QuantSpec(4, 4, 16, w_clip=False),
        "QAT W4A16": dataclasses.replace(DEPLOYED["w4a16_g128"], w_clip=False),
        "QAT NVFP4": dataclasses.replace(DEPLOYED["nvfp4"], w_clip=False, **given),
    }
    grouped = QuantSpec(a_group_size=8)
    assert specs_of(CompareConfig(columns=("static 4-4",), quant=grouped))["static 4-4"].a_group_size is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["4-4-4", "4-4-5"],
            r"columns\[1\]='4-4-5': must be one of 16-16-16, .*4-4-4 \+Had, .*static 4-4, .*MXFP4, .*QAT NVFP4$",
        ),
        ([], r"columns=\[\]: must have at least 1 item"),
        ("4-4-4", r"columns='4-4-4': must be a list; write columns=\[4-4-4\]"),
    ],
)
def test_unknown_column_is_refused_with_the_choices(columns: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(CompareConfig, {"columns": columns})
    assert build(CompareConfig, {"columns": list(NAMES)}).columns == NAMES


def test_comparison_of_averaged_weights_is_kept_beside_the_other(
    averaged_run: Path, files: list[str], tmp_path: Path
) -> None:
    shutil.copytree(averaged_run, tmp_path / "run")
    made: dict[str, Comparison] = {}
    for weights in ("averaged", "trained"):
        paths = (str(tmp_path / "run"),)
        config = dataclasses.replace(wanted(files, "4-4-4"), paths=paths, weights=weights, kurtosis_tokens=64)
        (made[weights],) = compare(config).models
    folder = tmp_path / "run" / "evaluation" / "compare"
    assert {path.name for path in folder.iterdir()} == {"step_00000004.json", "step_00000004_averaged.json"}
    run = read_run(tmp_path / "run")
    assert (run.comparison, run.averaged) == (made["trained"], made["averaged"])
    assert [c.name for c in made.values()] == ["run, averaged", "run"]
    assert made["trained"].bits != made["averaged"].bits
    assert "| run, averaged |" in markdown(list(made.values()), ("4-4-4",))


def test_cells_of_named_columns_and_of_every_text(llama: LanguageModel, files: list[str], tmp_path: Path) -> None:
    config = wanted(files, "static 4-4", "4-4-4", "4-4-4 +Had")
    *_, comparison = compare_one(llama, config)
    assert {row: tuple(cells) for row, cells in comparison.bits.items()} == {"": config.columns, "+Had": ("4-4-4",)}
    calibration = draw_calibration(read_text(files[2], llama).tokens, config.quant, seq_len=32)
    for column, spec in specs_of(config).items():
        with quantized(llama.model, spec, calibration=calibration):
            values = [perplexity(llama.model, read_text(f, llama), seq_len=32, max_tokens=64) for f in files[:2]]
        first, second = (value.perplexity for value in values)
        assert comparison.bits[""][column] == Score(first, None, {"first.txt": first, "second.txt": second})
        assert comparison.hashes[column] == spec.hash
    assert comparison.bits["+Had"]["4-4-4"] == comparison.bits[""]["4-4-4 +Had"]
    path = tmp_path / "record.json"
    write_evaluation(path, ComparisonRecord(models=(comparison,)))
    assert read_comparison(path).models == (comparison,)

    lines = markdown([comparison], config.columns).split("\n")
    cells = [comparison.bits[""][column].perplexities for column in config.columns]
    for i, text in enumerate(("first.txt", "second.txt")):
        title, _, head, _, row, had = lines[6 * i + i : 6 * i + i + 6]
        assert title == f"Perplexity of {text}"
        assert head == "| model | ex. kurtosis | static 4-4 | 4-4-4 | 4-4-4 +Had |"
        assert row == f"| {llama.name} | {comparison.kurtosis:.2f} | {' | '.join(f'{c[text]:.2f}' for c in cells)} |"
        assert had == f"| +Had |  |  | {cells[2][text]:.2f} |  |"
    spec = specs_of(config)["static 4-4"]
    assert f"calibration {files[2]} 96 tokens" in str(spec)
    assert f"- static 4-4: {spec} [{spec.hash}]" in lines


def test_table_4_is_printed_for_every_text(llama: LanguageModel, files: list[str]) -> None:
    *_, comparison = compare_one(llama, wanted(files, "16-16-16"))
    scores = {"RTN": Score(3.0, 0.5, {"first.txt": 3.0, "second.txt": 4.0}), "+ QuaRot": Score(None, None)}
    first, second = markdown([dataclasses.replace(comparison, methods=scores)], ["16-16-16"]).split("second.txt\n")[:2]
    assert "| RTN | 50.0/3.00 |\n| + QuaRot | - |" in first
    assert "| RTN | 4.00 |\n| + QuaRot | - |" in second


def test_perplexities_that_overflow_are_infinite_in_the_record(tmp_path: Path) -> None:
    results = [Result("a[len=2]", "perplexity", 2.0), Result("a", "bits per byte", 1.0)]
    results.append(Result("b[len=2]", "perplexity", math.inf))
    texts = [Text(name, torch.zeros(2), torch.zeros(2), "") for name in "ab"]
    cell = score(results, texts)
    assert cell == Score(2.0, None, {"a": 2.0, "b": math.inf})
    model = Comparison("m", "0", None, "what", {"": {"4-4-4": cell}}, {}, {}, texts={"a": "0", "b": "1"})
    write_evaluation(tmp_path / "a.json", ComparisonRecord(models=(model,)))
    (read,) = read_comparison(tmp_path / "a.json").models
    assert read == model
    assert "| m | - | inf |" in markdown([read], ["4-4-4"])


def test_column_that_was_named_is_not_left_out(llama: LanguageModel, files: list[str]) -> None:
    """Of the default columns a format that does not fit is left out; a named one is an error."""
    with pytest.raises(UserError, match=r"^columns=W4A16: .*: quant.w_group_size=128 does not divide"):
        next(compare_one(llama, wanted(files, "16-16-16", "W4A16")))
    with pytest.raises(UserError, match=r"quant.calibration=.*first.txt is a text that is measured"):
        next(compare_one(llama, wanted([*files[:2], files[0]], "16-16-16", "static 8-8")))


def test_model_without_any_column_says_why(llama: LanguageModel, files: list[str]) -> None:
    config = wanted(files, "4-4-4", quant={"rotation": "quarot"})
    model = dataclasses.replace(llama.model.config, norm=NormConfig(name="layernorm"))
    subject = dataclasses.replace(llama, model=build_model(model, seed=0).eval())
    with pytest.raises(UserError, match=r"quant.rotation=quarot: a rotation does not pass through the norm layernorm"):
        next(compare_one(subject, config))
