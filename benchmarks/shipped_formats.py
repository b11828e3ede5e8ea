"""Measure what shipping in 4 bits costs: runs, exported in every format, read by the client of each file.

    python benchmarks/shipped_formats.py RUN RUN ... --out build/shipped_formats.json

Each run is exported in every format of `FILES`, the program that users have reads the same held-out windows from the
file, and the cost is its cross-entropy minus the one of the same run's file in fp32. Fake quantization adds formats
that no file has, and models whose norms' gains are folded into the matrices before rounding. Runs of one recipe that
differ in their seed share a column: a run is named RECIPE-seedN, as `scripts/ablation.py` does.

Writes the JSON file, and the tables beside it (.md). What the JSON file has already is not measured again. Q4_K_M needs
llama-cpp-python and is left out without it.
"""

import argparse
import collections
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import statistics
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from choices import group
from torch import Tensor

from osp.ablation.table import WORDS
from osp.device import prepare_cpu
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.texts import read_text, training_text
from osp.model.fold import absorb_projections, fold_norm_gains
from osp.model.sites import hook_site, site_names
from osp.model.transformer import Transformer
from osp.quant.apply import draw_calibration, quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.spec import QuantSpec
from osp.run.folder import environment
from osp.run.metrics import key_regex
from osp.run.read import read_run
from osp.schema import build
from osp.tables import markdown_table

Logits = Callable[[Tensor], Tensor]  # token ids (B, T) -> logits (B, T, V)
Values = dict[str, Any]

PARTS = 16  # of the text; the spread of a cost over them gives its standard error
BATCH = 16  # windows that a model reads at a time


@dataclass(frozen=True)
class File:
    """What `scripts/export.py` writes for these keys."""

    format: str
    scheme: str | None = None
    quant: tuple[tuple[str, Any], ...] = ()  # keys of `quant` that are not the default
    llama_cpp: bool = False  # llama.cpp makes a Q4_K_M file of it


FILES = {  # by the row of the table
    "fp32": File("hf"),
    "W8A8": File("compressed-tensors", "W8A8"),
    "W4A16, RTN": File("compressed-tensors", "W4A16", (("w_clip", False),)),
    "W4A16, clip": File("compressed-tensors", "W4A16"),
    "W4A16, GPTQ": File("compressed-tensors", "W4A16", (("method", "gptq"),)),
    "W4A16_G32": File("compressed-tensors", "W4A16_G32"),
    "NVFP4A16": File("compressed-tensors", "NVFP4A16"),
    "NVFP4": File("compressed-tensors", "NVFP4"),
    "MXFP4A16": File("compressed-tensors", "MXFP4A16"),
    "MXFP4": File("compressed-tensors", "MXFP4"),
    "GGUF F32": File("gguf", "f32"),
    "GGUF Q8_0": File("gguf", "q8_0"),
    "GGUF Q4_0": File("gguf", "q4_0"),
    "GGUF Q4_K_M": File("gguf", "f32", llama_cpp=True),
}
FAKE = "16-16-16"
REFERENCES = {"files": "fp32", "fake": FAKE, "folded": FAKE}  # kind of measurement -> the row that costs nothing
FOLDED = {"w4a16_g128": "W4A16, clip", "nvfp4": "NVFP4", "mxfp4": "MXFP4", "q4_0": "GGUF Q4_0"}  # and the same unfolded
# Activations alone, for models with a planted outlier; and how much larger its channel is made.
PLANTED = {
    "int8 per token": {"a_bits": 8, "a_symmetric": True, "o_proj_by_head": False},
    "int8 per tensor, static": {"a_bits": 8, "a_symmetric": True, "o_proj_by_head": False, "static_activations": True},
    "int4 per token": {"a_bits": 4, "a_symmetric": True, "o_proj_by_head": False},
    "MXFP4, blocks of 32": {"a_bits": 4, "a_format": "mxfp4", "o_proj_by_head": False},
    "NVFP4, blocks of 16": {"a_bits": 4, "a_format": "nvfp4", "o_proj_by_head": False},
}
FACTORS = (1, 16, 256, 4096)
PAIRS = (("osp", "adam"), ("osp", "muon"), ("osp_plus", "osp"))  # recipes that are compared


def research_specs() -> dict[str, QuantSpec]:
    """Return quantizations that no file has, by the row of their table. `A8` and `A4` leave the weights alone."""
    rows = {}
    for bits in (8, 4):
        for name, static in (("per token", False), ("per tensor, static", True)):
            values = {"a_bits": bits, "a_symmetric": True, "o_proj_by_head": False, "static_activations": static}
            rows[f"A{bits}, {name}"] = build(QuantSpec, values)
    return rows | {f"4-4-4, `{name}`": build(QuantSpec, group("quant", name)) for name in ("osp_paper", "strict")}


def plant_outlier(model: Transformer, factor: float, channel: int = 0) -> None:
    """Multiply one input channel of every down_proj by `factor`, a power of two: the model computes the same bits.

    The channel is the product of the row of up_proj and the gate; the column of down_proj is divided by the factor.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.up_proj.weight"):
            parameter.data[channel] *= factor
        if name.endswith("mlp.down_proj.weight"):
            parameter.data[:, channel] /= factor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders of one data set, tokenizer and length")
    parser.add_argument("--files", nargs="*", choices=FILES, default=list(FILES), help="rows of the table")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the held-out split, from its start")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--fake", nargs="*", choices=("research", "folded", "planted"), default=["research", "folded"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("build/shipped_formats.json"))
    arguments = parser.parse_args()
    prepare_cpu(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results: Values = {"runs": {}}
    if arguments.out.is_file():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    for path in arguments.runs:
        for values in measure_run(path, results["runs"].get(path.resolve().name), arguments):
            results["runs"][path.resolve().name] = values
            check_comparable(results["runs"])
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = as_markdown(results)
    arguments.out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def measure_run(path: Path, known: Values | None, arguments: argparse.Namespace) -> Iterator[Values]:
    """Yield the numbers of one run after each measurement. known: the numbers of an earlier call, which are kept."""
    subject = open_model(path)
    if subject.config is None or subject.run is None:
        raise UserError(f"{path}: is no run of scripts/train.py")
    text, length = read_text("held_out", subject), subject.config.train.seq_len
    windows = text.tokens[: min(arguments.tokens, len(text.tokens)) // length * length].view(-1, length)
    print(f"{subject.name}: {len(windows)} windows of {length} tokens", flush=True)
    matrices = [p for name, p in subject.model.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    values: Values = {
        "recipe": subject.name.partition("-seed")[0],
        "seed": subject.config.train.seed,
        "text_sha256": text.sha256,
        "tokens": windows.numel(),
        "window": length,
        "block_weights": sum(p.numel() for p in matrices),
        "model_sha256": subject.sha256(),
        "trained": json.loads((subject.run / "environment.json").read_text(encoding="utf-8"))[0]["git"],
        "measured": (now := environment()),
        "commits": [*dict.fromkeys([*(known or {}).get("commits", []), now["git"]])],  # of all measurements
        "outliers": outliers(subject.run),
        **{kind: dict((known or {}).get(kind, {})) for kind in (*REFERENCES, "planted")},
    }
    changed = [key for key in ("model_sha256", "text_sha256", "tokens") if known and known[key] != values[key]]
    if changed:
        raise UserError(f"{path}: {changed[0]} is not the one of {arguments.out}; name another file with --out")
    for row in (row for row in arguments.files if row not in values["files"]):
        if (measured := measure_file(path, FILES[row], windows, arguments)) is not None:
            values["files"][row] = measured
            print(f"  file {row}: {measured['nats']:.5f}", flush=True)
            yield values
    yield from measure_fake_rows(subject, windows, values, arguments)


def measure_fake_rows(
    subject: LanguageModel, windows: Tensor, values: Values, arguments: argparse.Namespace
) -> Iterator[Values]:
    """Yield `values` with the numbers of fake quantization as they come; the model is changed at the end."""
    model, plain = subject.model, {FAKE: QuantSpec()}
    for factor in FACTORS if "planted" in arguments.fake else ():
        if str(factor) not in values["planted"]:
            plant_outlier(model, factor)
            specs = plain | {row: build(QuantSpec, keys) for row, keys in PLANTED.items()}
            measured = {row: measure_fake(subject, windows, spec, arguments) for row, spec in specs.items()}
            values["planted"][str(factor)] = {"largest": largest_input(model, windows[:BATCH]), "rows": measured}
            plant_outlier(model, 1 / factor)
            print(f"  outlier times {factor}", flush=True)
            yield values
    for kind in (kind for kind in ("research", "folded") if kind in arguments.fake):
        specs, known = research_specs(), values["fake"]
        if kind == "folded":
            absorb_projections(model)
            fold_norm_gains(model)
            specs, known = {name: DEPLOYED[name] for name in FOLDED}, values["folded"]
        for row, spec in (plain | specs).items():
            if row not in known:
                known[row] = measure_fake(subject, windows, spec, arguments)
                yield values


def largest_input(model: Transformer, windows: Tensor) -> float:
    """Return the largest |x| at the input of any down_proj."""
    largest = [0.0]
    with ExitStack() as stack, torch.no_grad():
        for name in site_names(len(model.layers), ("down_proj_in",)):
            stack.callback(hook_site(model, name, lambda x: largest.append(x.abs().max().item())).remove)
        model(windows)
    return max(largest)


def outliers(run: Path) -> dict[str, float]:
    """Return the quantities of `scripts/ablation.py` that say how large activations are, by the monitor of the run."""
    series, quantities = read_run(run).series, {}
    for name in ("kurtosis", "osp_script", "down_proj_max", "down_proj_kurtosis"):
        about = WORDS["quantities"][name]
        last = [each.last for key, each in series.items() if re.fullmatch(key_regex(about["key"]), key)]
        over_layers = max if about.get("largest") else statistics.fmean
        quantities[name] = over_layers(last) if last else math.nan
    return quantities


# ---- the same windows, read by a model or by the client of a file ----------------------------------------------------


def code_length(logits: Logits, windows: Tensor) -> Values:
    """Return the cross-entropy of windows (N, T) in nats per token, and of `PARTS` consecutive parts of them.

    Every token but the first of a window is predicted, as by `osp.evaluation.perplexity`. The last part takes the
    remainder.
    """
    nats = []
    with torch.no_grad():
        for batch in windows.split(BATCH):
            scores = logits(batch)[:, :-1].double()
            each = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            nats += each.view(len(batch), -1).mean(1).tolist()
    size = max(1, len(nats) // PARTS)
    starts = [*range(0, len(nats), size)][:PARTS]
    ends = [*starts[1:], len(nats)]
    parts = [statistics.fmean(nats[start:end]) for start, end in zip(starts, ends, strict=True)]
    return {"nats": statistics.fmean(nats), "parts": [round(part, 7) for part in parts]}


def measure_file(run: Path, file: File, windows: Tensor, arguments: argparse.Namespace) -> Values | None:
    """Return code length, size and client of a file of `run`; None without llama.cpp where it is needed."""
    from osp.convert.export import FORMATS, export

    if file.llama_cpp and importlib.util.find_spec("llama_cpp") is None:
        return None
    target, quant = FORMATS[file.format], build(QuantSpec, dict(file.quant))
    if target.quantization(file.scheme or "", quant).needs_calibration:
        quant = dataclasses.replace(quant, calibration_tokens=arguments.calibration_tokens)
    spec = target.quantization(file.scheme or "", quant)
    words, spec_hash = str(spec), spec.hash
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / ("model.gguf" if file.format == "gguf" else "model")
        export(run, path, format=file.format, scheme=file.scheme, quant=quant)
        if file.llama_cpp:
            source, path = path, Path(scratch) / "q4_k_m.gguf"
            quantize_by_llama_cpp(source, path)
            words, spec_hash = "Q4_K_M by llama.cpp", ""
        client = target.open(path, torch.device("cpu"))
        sizes, types = stored_bytes(path)
        return {
            **code_length(client.logits, windows),
            "client": client.name,
            "quant": words,
            "hash": spec_hash,
            "bytes": sum(sizes.values()),
            "block_bytes": sum(size for name, size in sizes.items() if is_of_a_matrix_in_a_block(name)),
            "types": types,
        }


def quantize_by_llama_cpp(source: Path, target: Path) -> None:
    """Write `target` as `llama-quantize source target Q4_K_M` does."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters))
    if status:
        raise UserError(f"{source}: llama.cpp does not quantize it, status {status}")


def stored_bytes(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of each tensor of a folder of safetensors or a GGUF file, and the types in the blocks."""
    tensors: dict[str, tuple[int, str]] = {}
    if path.is_file():
        from gguf import GGUFReader

        tensors = {each.name: (int(each.n_bytes), each.tensor_type.name) for each in GGUFReader(path).tensors}
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                tensors[name] = end - begin, about["dtype"]
    types = collections.Counter(kind for name, (_, kind) in tensors.items() if is_of_a_matrix_in_a_block(name))
    return {name: size for name, (size, _) in tensors.items()}, dict(types)


def is_of_a_matrix_in_a_block(tensor: str) -> bool:
    """Return whether a stored tensor is one, or the scales of one, by the names of Hugging Face or GGUF."""
    return tensor.startswith(("model.layers.", "blk.")) and "norm" not in tensor


def measure_fake(subject: LanguageModel, windows: Tensor, spec: QuantSpec, arguments: argparse.Namespace) -> Values:
    """Return the code length of a model under a quantization."""
    calibration = None
    if spec.needs_calibration:
        spec = dataclasses.replace(spec, calibration_tokens=arguments.calibration_tokens)
        calibration = draw_calibration(training_text(subject), spec, seq_len=windows.shape[1])
    with quantized(subject.model, spec, calibration=calibration):
        length = code_length(lambda ids: subject.model(ids).logits, windows)
    return {**length, "quant": str(spec), "hash": spec.hash}


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a format costs one run, in nats per token."""

    nats: float
    parts: tuple[float, ...]  # of the text

    def __sub__(self, other: "Cost") -> "Cost":
        """Return how much more this is, on the same parts of the text."""
        return Cost(self.nats - other.nats, tuple(a - b for a, b in zip(self.parts, other.parts, strict=True)))

    @property
    def error(self) -> float:
        """Standard error of `nats` over the parts of the text."""
        return statistics.stdev(self.parts) / math.sqrt(len(self.parts))


def cost(run: Values, kind: str, row: str) -> Cost:
    """Return the cross-entropy of a row minus the one of the row that costs nothing."""
    measured, plain = (run[kind][name] for name in (row, REFERENCES[kind]))
    return Cost(measured["nats"], tuple(measured["parts"])) - Cost(plain["nats"], tuple(plain["parts"]))


def verdict(differences: list[Cost]) -> str:
    """Return `more` or `less` if the first of two recipes loses it for every seed, by over twice the error of the text.

    With two seeds that says that both pairs of models differ, not by how much other seeds would.
    """
    if all(each.nats > 2 * each.error for each in differences):
        return "more"
    if all(each.nats < -2 * each.error for each in differences):
        return "less"
    return "not clear"


def check_comparable(runs: Values) -> None:
    """Raise `UserError` unless all runs were measured on the same windows, and each recipe and seed is there once."""
    for key in ("text_sha256", "tokens", "window"):
        if len({run[key] for run in runs.values()}) > 1:
            raise UserError(f"the runs differ in {key}; runs of one data set, tokenizer and length are compared")
    (recipe, seed), count = collections.Counter((r["recipe"], r["seed"]) for r in runs.values()).most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} runs are of recipe {recipe} and seed {seed}")


def as_markdown(results: Values) -> str:
    """Return the page of tables."""
    runs = results["runs"]
    first, machine = next(iter(runs.values())), next(iter(runs.values()))["measured"]
    commits = {
        "trained": dict.fromkeys(str(run["trained"]) for run in runs.values()),
        "measured": dict.fromkeys(str(commit) for run in runs.values() for commit in run["commits"]),
    }
    seeds = sorted({run["seed"] for run in runs.values()})
    clients = dict.fromkeys(file["client"] for run in runs.values() for file in run["files"].values())
    lines = [
        "# What a shipped 4-bit file costs",
        "",
        f"- text: held_out, SHA-256 {first['text_sha256']}",
        f"- {first['tokens']:,} tokens of it, in windows of {first['window']}; costs are nats per token",
        f"- seeds: {', '.join(map(str, seeds))}; ± is the standard deviation over them",
        f"- clients: {', '.join(clients)}",
        f"- machine: {machine['cpus']} cores, torch {machine['torch']}, Python {machine['python']}",
        *(f"- {what} at commit {', '.join(found)}" for what, found in commits.items()),
        f"- command: python benchmarks/shipped_formats.py RUN ... ({', '.join(runs)})",
    ]
    for title, says, head, rows in (table for table in tables(list(runs.values())) if table[-1]):
        lines += ["", f"## {title}", "", says, "", markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def tables(runs: list[Values]) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """Yield title, caption, head and rows of each table."""
    recipes = list(dict.fromkeys(run["recipe"] for run in runs))
    rows = {kind: list(dict.fromkeys(row for run in runs for row in run[kind])) for kind in REFERENCES}
    titles = [f"`{recipe}`" for recipe in recipes]
    rows["files"] = [row for row in FILES if row in rows["files"]]
    example = {row: run for run in reversed(runs) for row in run["files"]}  # all runs have one shape

    def over_seeds(number: Callable[[Values], float], digits: int) -> list[str]:
        """Return a number of each recipe, over the runs that have it."""
        by_recipe: dict[str, list[float]] = {recipe: [] for recipe in recipes}
        for run in runs:
            with suppress(KeyError):  # not measured yet
                by_recipe[run["recipe"]].append(number(run))
        return [spread(numbers, digits) for numbers in by_recipe.values()]

    def costs(kind: str, row: str) -> list[str]:
        return over_seeds(lambda run: cost(run, kind, row).nats, 4)

    quantities = {
        "excess kurtosis of the residual stream": ("kurtosis", 2),
        "the same, by the paper's script": ("osp_script", 2),
        "max abs at `down_proj`": ("down_proj_max", 0),
        "excess kurtosis at `down_proj`": ("down_proj_kurtosis", 0),
    }
    models = [[title, *over_seeds(lambda r, k=key: r["outliers"][k], d)] for title, (key, d) in quantities.items()]
    yield "Models", "By the monitor at the end of each run.", ["", *titles], models
    perplexities, lost = [], []
    for row in rows["files"]:
        perplexities.append([row, *over_seeds(lambda run, row=row: math.exp(run["files"][row]["nats"]), 2)])
        bits = f"{block_bits(example[row], row):.2f}"
        if row == REFERENCES["files"]:
            lost.append([f"{row}: perplexity", bits, *perplexities[-1][1:]])
        else:
            lost.append([row, bits, *costs("files", row)])
    says = "Cross-entropy of a file minus the one of the fp32 file. Bits: per weight of a block, scales included."
    yield "Cost of each file", says, ["file", "bits", *titles], lost
    yield "Perplexity of each file", "By its client.", ["file", *titles], perplexities
    says = "Whether the first recipe loses more by the format, with its cost minus the other's for each seed. " + (
        "`more` and `less`: for every seed, by over twice the standard error of the text."
    )
    pairs = [pair for pair in PAIRS if set(pair) <= set(recipes)]
    against = [
        [row, *(compared(runs, row, *pair) for pair in pairs)] for row in rows["files"] if row != REFERENCES["files"]
    ]
    yield "Recipe against recipe", says, ["file", *(f"`{a}` against `{b}`" for a, b in pairs)], against
    specs = {name: measured["quant"] for run in runs for name, measured in run["fake"].items()}
    research = [[row, *costs("fake", row)] for row in rows["fake"] if row != FAKE]
    yield "By fake quantization", "Without a file.", ["quantization", *titles], research
    folded = [[row, *over_seeds(lambda run, row=row: folding(run, row), 4)] for row in rows["folded"] if row != FAKE]
    says = (
        "The gains of the norms are folded into the matrices that read them before rounding (fake quantization): cost "
        "minus the one of the file, in which the norms keep their gains."
    )
    yield "Gains folded into the matrices", says, ["quantization", *titles], folded
    with_outlier = [run for run in runs if run["planted"]]
    if with_outlier:
        yield planted(with_outlier)
    specs |= {name: measured["quant"] for run in runs for name, measured in run["files"].items()}
    yield "Quantizations", "In words.", ["row", "quantization"], [[name, words] for name, words in specs.items()]
    types = {row: run["files"][row]["types"] for row, run in example.items()}
    stored = [[row, ", ".join(f"{n} {kind}" for kind, n in counts.items())] for row, counts in types.items()]
    yield "Stored types", "Of the matrices of the blocks and their scales.", ["file", "tensors"], stored


def planted(runs: list[Values]) -> tuple[str, str, list[str], list[list[str]]]:
    """Return title, caption, head and rows of the table of models with a planted outlier."""

    def lost(run: Values, factor: str, row: str) -> float:
        measured = run["planted"][factor]["rows"]
        return measured[row]["nats"] - measured[FAKE]["nats"]

    factors = list(runs[0]["planted"])
    largest = [spread([run["planted"][factor]["largest"] for run in runs], 0) for factor in factors]
    rows = [[row, *(spread([lost(run, f, row) for run in runs], 4) for f in factors)] for row in PLANTED]
    recipes = ", ".join(f"`{run['recipe']}` of seed {run['seed']}" for run in runs)
    says = (
        f"{recipes}: one input channel of every down_proj is multiplied, which leaves the outputs as they are. The "
        "weights have 16 bits."
    )
    head = ["activations", *(f"times {factor}" for factor in factors)]
    return "A planted outlier", says, head, [["max abs at `down_proj`", *largest], *rows]


def folding(run: Values, row: str) -> float:
    """Return how much more a quantization costs with folded gains than in a file."""
    return cost(run, "folded", row).nats - cost(run, "files", FOLDED[row]).nats


def block_bits(run: Values, row: str) -> float:
    """Return the bits per weight of the matrices of the blocks in a file."""
    return 8 * run["files"][row]["block_bytes"] / run["block_weights"]


def compared(runs: list[Values], row: str, first: str, second: str) -> str:
    """Return whether recipe `first` loses more in a file than `second`, and by how much for each seed."""
    by_seed = {(run["recipe"], run["seed"]): cost(run, "files", row) for run in runs if row in run["files"]}
    seeds = sorted(seed for recipe, seed in by_seed if recipe == first and (second, seed) in by_seed)
    differences = [by_seed[first, seed] - by_seed[second, seed] for seed in seeds]
    if not differences:
        return "-"
    return f"{verdict(differences)}: {', '.join(f'{each.nats:+.4f}' for each in differences)}"


def spread(values: list[float], digits: int) -> str:
    """Return `mean±deviation` over seeds, the number alone for one seed, and `-` for none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean}±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
