"""The report: one self-contained HTML file with its data, style, script and plotting library. It needs no network.

osp.report.charts collects the data; the templates page.html and document.html lay it out, and escape texts from files.

The library is Apache ECharts 6.1.0 (Apache-2.0, `dist/echarts.min.js` of the npm package, unchanged). It draws curves
and heatmaps with hover on touch screens at a quarter of plotly's size. No package on PyPI carries it alone.
"""

import functools
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from osp.config import leaves
from osp.errors import UserError
from osp.files import write_out
from osp.report import charts
from osp.report.charts import DASH, Outlier, number
from osp.run.evaluations import SiteAblation, SiteCost
from osp.run.metrics import SITE_TITLES
from osp.run.read import FREE, Run, read_run
from osp.run.verdict import USUAL, FourBitVerdict, SiteState, judge_run, judge_sites

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shown:
    """A run on a page."""

    index: int  # of its colour
    run: Run
    name: str  # in the charts
    label: str  # what sets it apart from the other runs
    outliers: list[Outlier]
    verdict: FourBitVerdict
    states: dict[str, SiteState]  # by kind of site


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the page about these run folders to `out`, return a line for each one left out; `UserError` if all are."""
    runs, left_out = [], []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError("; ".join(left_out) or "name at least one run folder")
    write_page(runs, out, left_out)
    return left_out


def write_page(runs: list[Run], out: Path, left_out: Sequence[str] = ()) -> None:
    """Write the page about `runs` to `out`; raise `UserError` where that is not possible."""
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name the file to write")
    write_out(out, page(runs, left_out))


def page(runs: list[Run], left_out: Sequence[str] = ()) -> str:
    """Return the HTML document about `runs`. left_out: notes on folders that could not be read."""
    names, labels = charts.short_names(runs), charts.labels(runs)
    shown = [
        Shown(i, run, name, label, charts.find_outliers(run), judge_run(run), {s.kind: s for s in judge_sites(run)})
        for i, (run, name, label) in enumerate(zip(runs, names, labels, strict=True))
    ]
    data = charts.chart_data(runs, names)
    titles = {stat: about["title"] for stat, about in data["stats"].items() if about["section"] == "sites"}
    comparisons = [of for run in runs for of in (run.comparison, run.averaged) if of]
    differences = charts.differences_between(runs)
    text = _template().render(
        time=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        data=data,
        runs=shown,
        notes=[*left_out, *(f"{run.folder}: {note}" for run in runs for note in run.notes)],
        legend=[(s.name, s.label if s.label != s.name else "") for s in shown] if len(runs) > 1 else [],
        last_step=max(run.step for run in runs),
        run_choice=list(enumerate(names)),
        statistic_choice=list(titles.items()),
        sites={kind: title for kind, title in SITE_TITLES.items() if any(kind in data["sites"][s] for s in titles)},
        judged={kind: SITE_TITLES[kind] for kind in USUAL if any(kind in s.states for s in shown)},
        usual=USUAL,
        terms=charts.TERMS,
        columns=dict.fromkeys(bits for c in comparisons for cells in c.bits.values() for bits in cells),
        methods=dict.fromkeys(method for c in comparisons for method in c.methods),
        specs={key: words for c in comparisons for key, words in c.specs.items()},
        differences=sorted(differences.items(), key=lambda item: (item[0].startswith(FREE), item[0])),
        free=FREE,
    )
    return f"{text}\n".encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs, as in names of files


@functools.cache  # it keeps the compiled templates
def _template() -> jinja2.Template:
    settings: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, **settings)
    environment.filters["number"] = number
    environment.filters["kurtosis"] = lambda value: f"{value:.2f}" if abs(value) < 100 else number(value)
    environment.filters["plain"] = charts.plain
    environment.filters["median"] = lambda values: statistics.median(values) if len(values) else math.nan
    environment.tests["finite"] = math.isfinite
    environment.filters["percent"] = lambda share: f"{100 * share:.3g}%" if math.isfinite(share) else DASH
    # line ends and control characters as in a JSON string
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)[1:-1]
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    # words between backticks are code
    environment.filters["with_code"] = lambda text: Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(text))))
    environment.globals |= {"leaves": leaves, "site_costs": site_costs}
    environment.globals["source"] = lambda name: Markup((HERE / name).read_text(encoding="utf-8"))
    return environment.get_template("page.html")


def site_costs(ablation: SiteAblation) -> list[tuple[SiteCost, float, float]]:
    """Return (site, nats that it costs alone, nats that leaving it out saves), the most costly site first."""
    costs = [(site, ablation.cost_alone(site), ablation.saving_left_out(site)) for site in ablation.sites]
    return sorted(costs, key=lambda cost: math.inf if math.isnan(cost[1]) else -cost[1])
