"""docs/quantization.md and docs/export.md name every key of their scripts, its default, and every form of a task."""

import dataclasses
import re
from typing import Any

import pytest
import yaml

from osp.convert.config import ConvertConfig, ExportConfig
from osp.convert.export import FORMATS, TOLERANCE_OF_ACTIVATIONS
from osp.convert.file_certificate import FileCertificate
from osp.convert.same_function import FP32_TOLERANCE, FP64_TOLERANCE, PERPLEXITY_TOLERANCE
from osp.evaluation.config import CompareConfig, EvaluateConfig, MeasureConfig
from osp.evaluation.local_tasks import FORMS, PAPER_TEN
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec
from tests.conftest import ROOT
from tests.documents import read_page, section

QUANTIZATION, EXPORT = read_page("docs/quantization.md"), read_page("docs/export.md")


def defaults(text: str) -> dict[str, str]:
    """Return key -> default, as written, of tables with the columns key, default and meaning."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]*) \| [^|]+ \|$", text, flags=re.MULTILINE)
    written = {}
    for keys, values in rows:
        names = re.findall(r"`(\w+)`", keys)
        given = values.replace("`", "")
        several = given.split(", ") if len(names) > 1 else [given]
        written |= dict(zip(names, several if len(several) == len(names) else several * len(names), strict=True))
    return written


def values_of(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def as_written(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_table_of_quantization_has_every_key_and_default() -> None:
    expected = {key: as_written(value) for key, value in values_of(QuantSpec()).items()}
    assert defaults(section(QUANTIZATION, "Keys")) == expected


@pytest.mark.parametrize(
    ("page", "title", "config", "left_out"),
    [
        (QUANTIZATION, "Evaluate", EvaluateConfig(), {"path", "quant"}),
        (QUANTIZATION, "Compare", CompareConfig(), {"paths", "quant", *values_of(MeasureConfig())}),
        (EXPORT, "Export", ExportConfig(), {"path", "debug", "quant"}),
        (EXPORT, "Convert", ConvertConfig(), {"path", "debug"}),
    ],
    ids=["evaluate", "compare", "export", "convert"],
)
def test_tables_of_scripts_have_every_key(page: str, title: str, config: Any, left_out: set[str]) -> None:
    """A default that is a number, a switch or a choice is written as it is; others are explained."""
    written = defaults(section(page, title))
    plain = {key: value for key, value in values_of(config).items() if key not in left_out}
    assert written.keys() == plain.keys()
    exact = {key: as_written(v) for key, v in plain.items() if isinstance(v, bool | int) or (isinstance(v, str) and v)}
    assert {key: written[key] for key in exact} == exact


def test_forms_of_tasks_and_the_papers_files_are_named() -> None:
    text = section(QUANTIZATION, "Tasks")
    for form in FORMS.values():
        assert re.search(rf"\| {', '.join(f'`{name}`' for name in form['fields'])}[, |]", text), form["fields"]
    assert not [file for _, file in PAPER_TEN.values() if f"`{file.removesuffix('.jsonl')}`" not in text]


def test_words_and_hash_of_osp_paper() -> None:
    fields = yaml.safe_load((ROOT / "configs" / "quant" / "osp_paper.yaml").read_text(encoding="utf-8"))
    spec = QuantSpec(**fields)
    assert f"\n{spec} [{spec.hash}]\n" in QUANTIZATION


def test_limits_of_the_checks_are_those_of_the_code() -> None:
    limits = (FP32_TOLERANCE, TOLERANCE_OF_ACTIVATIONS, *PERPLEXITY_TOLERANCE.values())
    limits += tuple(target.tolerance for target in FORMATS.values())
    numbers = {f"{limit:.0e}".replace("e-0", "e-") for limit in limits}
    assert not [number for number in numbers if number not in section(EXPORT, "Certificate of a file")]
    assert f"at most {FP64_TOLERANCE:.0e}".replace("e-0", "e-") in section(EXPORT, "The certificate")


def test_table_of_schemes_names_all_with_their_presets() -> None:
    rows = re.findall(r"^\| (?:`[\w-]+` )?\| `(\w+)` \| `(\w+)` \|", section(EXPORT, "Schemes"), flags=re.MULTILINE)
    schemes = {
        name: spec for target in FORMATS.values() for name, spec in target.schemes.items() if not spec.is_identity
    }
    assert {name: DEPLOYED[preset] for name, preset in rows} == schemes


def test_keys_of_the_certificate_are_in_its_table() -> None:
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \|$", section(EXPORT, "Certificate of a file"), flags=re.MULTILINE
    )
    assert re.findall(r"`(\w+)`", " ".join(rows)) == [field.name for field in dataclasses.fields(FileCertificate)]


def test_table_of_ffn_widths() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\w+) \| (\w+) \| (\w+) \|$", EXPORT, flags=re.MULTILINE)
    models = {
        path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / "configs" / "model").glob("*.yaml")
    }
    assert {name: int(width) for name, width, *_ in rows} == {
        name: model["intermediate_size"] for name, model in models.items()
    }
    for _, width, *answers in rows:
        assert answers == ["no" if int(width) % group else "yes" for group in (32, 128, 256)]
