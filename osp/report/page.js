"use strict";
// Draws the charts of a report from the JSON beside this script: options for ECharts, text and tables from the same
// numbers. A chart is built when it scrolls into view, so that opening the page costs what one screen costs.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
const own = (table, key) => (table && Object.hasOwn(table, key) ? table[key] : undefined); // not what every object has
const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// Both ramps are monotone in lightness: they read the same without colour.
const HEAT = {
  false: ["#f4f1ea", "#f6d7a0", "#ee9c53", "#cf4f3f", "#8a1a43", "#35092c"],
  true: ["#1d2130", "#43205f", "#86296b", "#cc4658", "#f5823b", "#fbd65a"],
};
const DEPTH = { false: ["#a9b7e8", "#3f6fb5", "#1b4f72", "#0b2a3c"], true: ["#3b5b8f", "#4f9fd0", "#8fd6d6", "#f2f7c8"] };
const BAD = ["alert", "nonfinite"]; // events drawn as solid lines
const PARTS = ["run0", "run1", "run2", "run3", "run4", "run5"];
const view = { from: 0, to: Infinity }; // the steps of the chart that is being drawn
const state = { shown: data.runs.map(() => true), x: "linear", from: 0, stat: null, run: 0 };

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not finite";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}
function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e3) return +(value / 1e3).toPrecision(3) + "k";
  if (size !== 0 && size < 0.001) return value.toExponential(0);
  return String(+value.toPrecision(3));
}
function mix(ramp, share) {
  const at = Math.min(Math.max(share, 0), 1) * (ramp.length - 1), low = Math.min(Math.floor(at), ramp.length - 2);
  const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) => Math.round(part(ramp[low], i) + (at - low) * (part(ramp[low + 1], i) - part(ramp[low], i))));
  return `rgb(${mixed.join(",")})`;
}
const steps = (from, to) => (from === to ? `step ${number(to)}` : `steps ${number(from)} to ${number(to)}`);
const several = data.runs.length > 1;

// A step on an axis: in full as long as it is short.
const stepName = (value) => (value < 1e5 ? number(value) : short(value));
// Names of axes in free corners.
const named = (texts) => texts.map(([text, place]) => ({
  type: "text", silent: true, ...place, style: { text, fill: colour("soft"), font: "11px system-ui, -apple-system, sans-serif" },
}));

// ---- curves -------------------------------------------------------------------------------------------------------

function axes(log) {
  const text = { color: colour("soft"), fontSize: 11 };
  return {
    animation: false,
    textStyle: { fontFamily: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif" },
    grid: { left: 8, right: 22, top: 12, bottom: 22, containLabel: true },
    xAxis: {
      type: state.x === "log" ? "log" : "value", min: state.x === "log" ? Math.max(1, view.from) : view.from, max: "dataMax",
      axisLine: { lineStyle: { color: colour("line") } }, axisTick: { show: false }, splitLine: { show: false },
      name: "step", nameLocation: "middle", nameGap: 24, nameTextStyle: text,
      axisLabel: { ...text, formatter: stepName, hideOverlap: true, showMaxLabel: true }, axisPointer: { label: { show: false } },
    },
    yAxis: {
      type: log ? "log" : "value", scale: true, splitNumber: 4,
      axisLabel: { ...text, formatter: short }, splitLine: { lineStyle: { color: colour("grid") } },
      axisLine: { show: false }, axisTick: { show: false }, minorTick: { show: false },
    },
    tooltip: {
      trigger: "axis", confine: true, transitionDuration: 0, backgroundColor: colour("card"), borderColor: colour("line"),
      textStyle: { color: colour("ink"), fontSize: 12 }, axisPointer: { type: "line", lineStyle: { color: colour("soft"), type: [3, 3] } },
    },
  };
}
// One curve: {name, colour, x, y, faint, run}. A value below `floor` is drawn on it; the tooltip tells the true one.
function series(curve, log, floor) {
  const points = [];
  for (let i = 0; i < curve.x.length; i++) {
    if (curve.x[i] < view.from || curve.x[i] > view.to) continue;
    const y = curve.y[i];
    points.push([state.x === "log" ? Math.max(curve.x[i], 1) : curve.x[i], y === null ? null : log ? Math.max(y, floor ?? 1e-12) : y, y]);
  }
  return {
    type: "line", name: curve.name, data: points, color: curve.colour, symbol: "circle", symbolSize: 4,
    showSymbol: points.length < 40, lineStyle: { width: curve.faint ? 1 : 1.8, opacity: curve.faint ? 0.35 : 1, type: curve.run >= PARTS.length ? [6, 4] : "solid" }, silent: true,
  };
}
// The tooltip of the library omits curves without a point at exactly this step; this one shows the nearest point.
function tooltip(curves) {
  return (items) => {
    const at = items[0].value[0];
    const rows = curves
      .filter((curve) => curve.x.length)
      .map((curve) => ({ curve, i: nearest(curve.x, at) }))
      .map(({ curve, i }) => ({ curve, x: curve.x[i], value: curve.y[i] }))
      .sort((a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity));
    const shown = rows.slice(0, 10).map((row) =>
      `<div><span class="swatch" style="background:${row.curve.colour}"></span> ${escape(row.curve.name)}${row.curve.mean ? ", mean" : ""} ` +
      `<b>${number(row.value)}</b>${row.x === at ? "" : ` <span class="soft">at ${number(row.x)}</span>`}</div>`);
    const more = rows.length > 10 ? `<div class="soft">and ${rows.length - 10} lower</div>` : "";
    const tokens = data.tokens_per_step ? ` <span class="soft">${short(at * data.tokens_per_step)} tokens</span>` : "";
    return `<div class="values"><b>step ${number(at)}</b>${tokens}${shown.join("")}${more}</div>`;
  };
}
function nearest(x, at) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle;
    else high = middle;
  }
  return at - x[low] <= x[high] - at ? low : high;
}
function linesOption(figure) {
  const spec = data.lines[figure.dataset.lines];
  const keys = [...new Set(spec.curves.map((curve) => curve.key))];
  const curves = spec.curves.filter((curve) => state.shown[curve.run]).map((curve) => ({
    ...curve, name: curve.name || data.runs[curve.run],
    colour: colour(PARTS[(keys.length > 1 ? keys.indexOf(curve.key) : curve.run) % PARTS.length]),
  }));
  const option = axes(spec.log);
  option.series = curves.map((curve) => series(curve, spec.log));
  option.tooltip.formatter = tooltip(curves);
  if (keys.length > 1) {
    option.grid.top = 30;
    option.legend = { top: 0, left: 0, icon: "roundRect", itemHeight: 4, itemWidth: 14, textStyle: { color: colour("soft"), fontSize: 11 }, data: [...new Set(curves.map((c) => c.name))] };
  }
  const marks = [
    ...spec.levels.map((level) => ({ yAxis: level.y, lineStyle: { color: colour("soft"), type: [6, 4] }, label: { show: true, formatter: level.text, position: "insideEndTop", color: colour("soft"), fontSize: 11 } })),
    ...spec.events.filter((event) => state.shown[event.run] && event.step >= view.from && event.step <= view.to).map((event, i) => ({ xAxis: event.step, name: event.kind,
      lineStyle: { color: colour(BAD.includes(event.kind) ? "bad" : "warn"), type: BAD.includes(event.kind) ? "solid" : [2, 3] },
      label: { show: spec.events.length < 8, formatter: event.kind, position: "insideEndTop", offset: [0, 13 * i], color: colour("soft"), fontSize: 11 } })),
  ];
  if (marks.length && option.series.length) option.series[0].markLine = { silent: true, symbol: "none", label: { show: false }, data: marks };
  return option;
}

// ---- sites: one statistic at one kind of site, curves and a heatmap -----------------------------------------------

function cells(figure) {
  const stat = figure.dataset.stat || state.stat;
  return { stat, spec: data.stats[stat], runs: own(own(data.sites, stat), figure.dataset.kind) || [] };
}
const layerName = (layer) => (layer === null ? "whole model" : `layer ${layer}`);

// One run: a curve for each layer. Several: each run's largest layer.
function siteCurves(runs) {
  const curves = [];
  runs.forEach((cell, run) => {
    if (!cell || !state.shown[run]) return;
    const x = cell.x.map((pair) => pair[1]);
    if (several) {
      const y = x.map((_, i) => cell.v.reduce((top, row) => (row[i] === null ? top : top === null ? row[i] : Math.max(top, row[i])), null));
      curves.push({ name: data.runs[run], colour: colour("run" + (run % PARTS.length)), x, y, run, key: "" });
    } else {
      cell.v.forEach((y, i) => curves.push({
        name: cell.layers[i] === null ? data.runs[run] : layerName(cell.layers[i]), x, y, run, key: String(i),
        colour: cell.layers[i] === null ? colour("run0") : mix(DEPTH[dark.matches], i / Math.max(cell.v.length - 1, 1)),
      }));
    }
  });
  return curves;
}
function siteCurvesOption(figure) {
  const { spec, runs } = cells(figure);
  const curves = siteCurves(runs);
  const values = curves.flatMap((curve) => curve.y.filter((v) => v !== null));
  const log = Math.max(...values) > 20 * Math.max(Math.min(...values), spec.floor); // one decade reads better linear
  const option = axes(log);
  option.series = curves.map((curve) => series(curve, log, spec.floor));
  option.tooltip.formatter = tooltip(curves);
  return option;
}
function heatmap(what, x, y, values, low, high, label, tip) {
  const text = { color: colour("soft"), fontSize: 11 };
  const axis = { type: "category", axisTick: { show: false }, axisLine: { show: false }, axisLabel: { ...text, hideOverlap: true }, splitArea: { show: false } };
  return {
    animation: false,
    textStyle: { fontFamily: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif" },
    graphic: named([[what, { left: 8, top: 3 }]]),
    grid: { left: 8, right: 62, top: 20, bottom: 22, containLabel: true },
    xAxis: { ...axis, data: x, name: "step", nameLocation: "middle", nameGap: 24, nameTextStyle: text }, yAxis: { ...axis, data: y },
    visualMap: {
      type: "continuous", min: low, max: high, dimension: 2, right: 0, top: "middle", itemWidth: 9, itemHeight: 120, text: [label(high), label(low)],
      textGap: 5, textStyle: text, formatter: label, inRange: { color: HEAT[dark.matches] }, hoverLink: false, padding: 0,
    },
    tooltip: { confine: true, transitionDuration: 0, backgroundColor: colour("card"), borderColor: colour("line"), textStyle: { color: colour("ink"), fontSize: 12 }, formatter: tip },
    series: [{ type: "heatmap", data: values, progressive: 0, emphasis: { itemStyle: { borderColor: colour("ink"), borderWidth: 1 } } }],
  };
}
function siteHeatOption(figure) {
  const { stat, spec, runs } = cells(figure);
  const cell = runs[state.run];
  if (!cell) return null;
  const [low, high] = spec.range.map((value) => Math.log10(Math.max(value, spec.floor)));
  const values = [];
  cell.v.forEach((row, layer) => row.forEach((value, i) => {
    if (value !== null && cell.x[i][1] >= view.from) values.push([i, layer, Math.log10(Math.max(value, spec.floor)), value]);
  }));
  return heatmap("layer", cell.x.map((pair) => stepName(pair[1])), cell.layers.map((l) => l ?? ""), values, low, Math.max(high, low + 0.1), (v) => short(10 ** v),
    ({ value }) => `<div class="values"><b>${steps(...cell.x[value[0]])}</b><div>${layerName(cell.layers[value[1]])} <b>${number(value[3])}</b></div></div>`);
}
// ---- drawing: when in view, again when something is chosen --------------------------------------------------------

const OPTIONS = { lines: linesOption, curves: siteCurvesOption, heat: siteHeatOption };
const charts = new Map();
const visible = new Set();

function draw(plot) {
  [view.from, view.to] = plot.range || [state.from, Infinity];
  const option = OPTIONS[plot.dataset.plot](plot.closest("figure"));
  let chart = charts.get(plot);
  if (!option) {
    if (chart) chart.clear();
    return;
  }
  if (!chart) {
    chart = echarts.init(plot, null, { renderer: "canvas" });
    charts.set(plot, chart);
    keyboard(plot, chart);
    zoom(plot, chart);
  }
  chart.setOption(option, { notMerge: true });
}
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !visible.has(target)) {
      visible.add(target);
      draw(target);
    }
  }
}, { rootMargin: "200px" });

function redraw() {
  describe();
  visible.forEach((plot) => {
    plot.range = null;
    observer.unobserve(plot);
  });
  visible.clear();
  all(".plot").forEach((plot) => observer.observe(plot));
}
// Arrow keys walk along the steps of the first curve; what is shown is also announced.
function keyboard(plot, chart) {
  let index = -1;
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") chart.dispatchAction({ type: "hideTip" });
    if (move === undefined) return;
    const points = chart.getOption().series[0]?.data || [];
    index = Math.min(Math.max(index + move, 0), points.length - 1);
    chart.dispatchAction({ type: "showTip", seriesIndex: 0, dataIndex: index });
    event.preventDefault();
    requestAnimationFrame(() => ($("#announce").textContent = all(".values", plot).map((tip) => tip.innerText).join("; ")));
  });
}
// With a mouse: drag over a range of steps to see only that, double-click for everything.
function zoom(plot, chart) {
  if (plot.dataset.plot === "heat") return;
  let from = null;
  const at = (event) => chart.convertFromPixel({ gridIndex: 0 }, [event.offsetX, event.offsetY])?.[0];
  chart.getZr().on("mousedown", (event) => (from = { x: event.offsetX, step: at(event) }));
  chart.getZr().on("mouseup", (event) => {
    if (from && Math.abs(event.offsetX - from.x) > 8) {
      plot.range = [from.step, at(event)].sort((a, b) => a - b).map(Math.round);
      draw(plot);
    }
    from = null;
  });
  chart.getZr().on("dblclick", () => {
    plot.range = null;
    draw(plot);
  });
}

// ---- labels and tables --------------------------------------------------------------------------------------------

function describe() {
  all("figure[data-kind]").forEach((figure) => {
    const { spec, runs } = cells(figure), words = runs.some(Boolean) ? "its numbers are in the table below" : "not measured in these runs";
    all(".plot", figure).forEach((plot) => plot.setAttribute("aria-label", `${spec.title}: ${words}`));
  });
  if (state.stat) $("#says").textContent = data.stats[state.stat].says;
}
function rowsOf(figure) {
  if (figure.dataset.lines) {
    const spec = data.lines[figure.dataset.lines];
    const rows = spec.curves.filter((c) => !c.faint).flatMap((curve) =>
      curve.x.map((x, i) => [data.runs[curve.run] + (curve.name ? `, ${curve.name}` : ""), number(x), number(curve.y[i])]));
    return [["run", "step", "value"], rows];
  }
  const rows = cells(figure).runs.flatMap((cell, run) => (cell ? cell.v.flatMap((row, layer) =>
    row.map((v, i) => [data.runs[run], layerName(cell.layers[layer]), number(cell.x[i][1]), number(v)])) : []));
  return [["run", "layer", "step", "value"], rows];
}
function fillTable(details) {
  const [head, rows] = rowsOf(details.closest("figure"));
  const every = Math.ceil(rows.length / 400); // the page stays usable; the whole is in the run folder
  const kept = rows.filter((_, i) => i % every === 0 || i === rows.length - 1);
  const cut = every > 1 ? `<caption class="soft">every ${every}th of ${rows.length} numbers; all of them are in metrics.jsonl</caption>` : "";
  details.querySelector(".scroll").innerHTML =
    `<table>${cut}<thead><tr>${head.map((h) => `<th scope="col">${escape(h)}</th>`).join("")}</tr></thead><tbody>` +
    kept.map((row) => `<tr>${row.map((v) => `<td>${escape(v)}</td>`).join("")}</tr>`).join("") + "</tbody></table>";
}

// ---- controls -----------------------------------------------------------------------------------------------------

function choose(selector, key, convert = String) {
  const select = $(selector);
  if (!select) return;
  state[key] = convert(select.value);
  select.addEventListener("change", () => {
    state[key] = convert(select.value);
    redraw();
    all("details[open]").forEach((details) => details.closest("figure") && fillTable(details));
  });
}
choose("#stat", "stat");
choose("#heat-run", "run", Number);
choose("#x", "x");
choose("#from", "from", Number);
all(".legend button").forEach((button, run) => button.addEventListener("click", () => {
  state.shown[run] = !state.shown[run];
  button.setAttribute("aria-pressed", state.shown[run]);
  redraw();
}));
all("figure details").forEach((details) => details.addEventListener("toggle", () => details.open && fillTable(details)));
dark.addEventListener("change", redraw);
// A link into a closed part of the page opens it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) if (part.matches("details")) part.open = true;
  if (target) all(":scope > details", target).forEach((details) => (details.open = true));
}
addEventListener("hashchange", unfold);
unfold();
// A link into the page must not scroll its target below the sticky bars.
function clearBars() {
  const bars = all(".bar").filter((bar) => getComputedStyle(bar).position === "sticky");
  document.documentElement.style.scrollPaddingTop = bars.reduce((sum, bar) => sum + bar.offsetHeight, 10) + "px";
}
let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    charts.forEach((chart) => chart.resize());
    clearBars();
  }, 80);
});
clearBars();
const links = all(".bar nav a");
const sections = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (entry.isIntersecting) links.forEach((link) => link.classList.toggle("here", link.hash === "#" + entry.target.id));
}), { rootMargin: "-25% 0px -70% 0px" });
all("main > section").forEach((section) => sections.observe(section));
redraw();
requestAnimationFrame(() => requestAnimationFrame(() => (document.documentElement.dataset.ready = performance.now())));
