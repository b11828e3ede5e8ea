"""Text of files is text on a page: a payload in every string of every file adds no element and runs nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from osp.report.page import write_report
from tests.browser import CHROMIUM, Browser
from tests.fuzzing import check_page
from tests.made_run import made_run, write_evaluations
from tests.report.test_report import DRAW_ALL

PAYLOAD = "</script></title></style>'\"`><img src=http://out/x onerror=\"document.title='ran'\"><!--{{ 7 * 7 }}\u2028"
OPEN_ALL = """document.querySelectorAll('details').forEach((part) => (part.open = true));
document.querySelectorAll('select').forEach((select) => [...select.options].forEach((option) => {
  select.value = option.value;
  select.dispatchEvent(new Event('change'));
}));"""


def spoilt(tree: Any) -> Any:
    """Return a tree of JSON with the payload behind every text and in one more key of every table."""
    if isinstance(tree, dict):
        table = {key: spoilt(value) for key, value in tree.items()}
        return table | dict.fromkeys([PAYLOAD][: len(table)], next(iter(table.values()), None))
    if isinstance(tree, list):
        return [spoilt(value) for value in tree]
    return tree + PAYLOAD if isinstance(tree, str) else tree


def spoil(run: Path) -> None:
    """Write the payload everywhere in a run folder; metrics get keys of every statistic with it as a site."""
    for path in [*run.glob("*.json"), *run.glob("evaluation/**/*.json")]:
        path.write_text(json.dumps(spoilt(json.loads(path.read_text()))))
    (run / "config.yaml").write_text(yaml.safe_dump(spoilt(yaml.safe_load((run / "config.yaml").read_text()))))
    for name in ("metrics.jsonl", "probes.jsonl", "events.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        for line in lines:
            line.update(spoilt(line))
            for key in [key for key in line if key.startswith("monitor/")]:
                line[key.rpartition("/")[0] + "/" + PAYLOAD.replace("/", "\\")] = line[f"{key}{PAYLOAD}"] = line[key]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def spoilt_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs, whose folders' names are payloads too."""
    folder = tmp_path_factory.mktemp("spoilt")
    runs = [folder / f"{name}<img src=x onerror=alert(1)>" for name in "ab"]
    for number, run in enumerate(runs):
        spoil(write_evaluations(made_run(run, steps=30, layers=2, probe_every=10, seed=number)))
    assert write_report(runs, folder / "page.html") == []
    return folder / "page.html"


def test_payload_adds_no_element(spoilt_page: Path) -> None:
    text = spoilt_page.read_text()
    check_page(text)
    assert text.count("{{ 7 * 7 }}") > 100


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    browser = Browser()
    yield browser
    browser.close()


def test_payload_does_not_run(spoilt_page: Path, browser: Browser) -> None:
    browser.open(spoilt_page)
    assert browser.run("document.title") == "2 runs compared - osp report"
    browser.run(OPEN_ALL)
    browser.run(DRAW_ALL)
    browser.wait(
        lambda: browser.run("[...document.querySelectorAll('figure .scroll')].some((d) => d.querySelector('td'))")
    )
    for selector in ("[data-lines=train_loss] .plot", "[data-plot=heat]"):
        browser.hover(selector)
    assert browser.run("document.title") == "2 runs compared - osp report"
    assert browser.run("document.querySelectorAll('img, iframe, [onerror], [onload]').length") == 0
    assert browser.errors == []  # no request to a network either
