"""Every YAML composes through Hydra as in `scripts/entry.py`, builds a small model, and agrees with the paper."""

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from osp.config import Config, from_dict, to_dict
from osp.data.sources import make_source
from osp.errors import UserError
from osp.model.norms import NORMS
from osp.model.transformer import build_model, count_parameters
from osp.optim.schedule import length_in_steps
from osp.run.read import differences

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
# not groups of training: `quant` belongs to evaluation (tests/evaluation), `machine` to the plan (tests/plan),
# `scale` to the ablation (tests/ablation)
OTHERS = ("quant", "machine", "scale")
CHOICES = [
    f"{path.parent.name}={path.stem}" for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name not in OTHERS
]
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("experiment/*.yaml"))
# choices that need another key, the message that asks for it, and an override that sets it
NEEDS = {
    "data=text": ("data.paths is empty", "data.paths=[corpus.txt]"),
    "data=hf": ("data.dataset is not set", "data.dataset=allenai/c4"),
    "tokenizer=file": ("tokenizer.path=FILE", "tokenizer.path=tokenizer.json"),
}
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 8}


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    ConfigStore.instance().store(name="defaults", node=to_dict(Config()))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@functools.lru_cache
def config(*overrides: str) -> Config:
    values = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return from_dict({str(key): value for key, value in values.items()})


def chosen(choice: str) -> Config:
    """Return the quickstart with one choice, and with the key that the choice needs from the user."""
    override = f"+{choice}" if choice.startswith("experiment") else choice
    return config(override, *([NEEDS[choice][1]] if choice in NEEDS else []))


# --- every file ---------------------------------------------------------------------------------------------------


def test_groups_are_where_users_expect_them() -> None:
    assert {"nano", "60m", "130m", "374m", "osp_1b"} == {p.stem for p in CONFIGS.glob("model/*.yaml")}
    assert {*NORMS, "peri", "lns"} == {p.stem for p in CONFIGS.glob("norm/*.yaml")}  # the last two are placements
    assert {"muon", "muon_all", "adamw"} == {p.stem for p in CONFIGS.glob("optimizer/*.yaml")}
    assert {"python_stdlib", "text", "hf", "smollm_corpus"} <= {p.stem for p in CONFIGS.glob("data/*.yaml")}
    assert {"osp_1b", "adam_1b", "bhyt", "quickstart", *ROWS, *PLUS} == set(EXPERIMENTS)


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_composes_and_its_model_runs(choice: str) -> None:
    model = build_model(dataclasses.replace(chosen(choice).model, **SMALL), seed=0)
    ids = torch.arange(24).view(2, 12)
    loss = model(ids, ids).loss.item() / 24
    assert loss == pytest.approx(math.log(64), abs=1.5), "an untrained model guesses"


@pytest.mark.parametrize("choice", CHOICES)
def test_every_value_of_the_file_arrives(choice: str) -> None:
    """A key that Hydra places elsewhere, or that a later file overrides, would have no effect."""
    group, name = choice.split("=")
    values = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    values.pop("defaults", None)
    got = to_dict(chosen(choice))
    asked = NEEDS.get(choice, ("", ""))[1].split("=")[0]

    def check(given: dict[str, Any], tree: dict[str, Any], path: str) -> None:
        for key, value in given.items():
            where = f"{path}{key}"
            if isinstance(value, dict):
                check(value, tree[key], f"{where}.")
            elif where == "data.mixture":
                assert [{k: entry[k] for k in part} for part, entry in zip(value, tree[key], strict=True)] == value
            elif where != asked:
                # YAML 1.1 reads 100e9 as text, Hydra as a number
                assert tree[key] == (float(value) if value == "100e9" else value), where

    check(values, got if group == "experiment" else got[group], "" if group == "experiment" else f"{group}.")


@pytest.mark.parametrize("choice", NEEDS)
def test_choice_that_needs_another_key_names_it(choice: str) -> None:
    message, given = NEEDS[choice]
    with pytest.raises(UserError) as caught:
        make_source(config(choice).data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    make_source(config(choice, given).data)  # complete with the key


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("nano", 7.3), ("60m", 60), ("130m", 130), ("374m", 374), ("osp_1b", 1416)]
)
def test_model_has_the_size_in_its_name(name: str, millions: float) -> None:
    """Within 10%. osp_1b, with the number of the paper, and nano to the last printed digit."""
    total = count_parameters(config(f"model={name}", "model.embed_proj=false", "norm=rmsnorm").model)["total"] / 1e6
    tolerance = {"osp_1b": 1e-3, "nano": 0.03}.get(name, 0.1)
    assert total == pytest.approx(millions, rel=tolerance)


def test_374m_has_the_shape_of_its_paper() -> None:
    """arXiv 2601.09719: hidden 1024, 16 layers, 16 heads of 64, 4 key/value heads, FFN 4096."""
    model = config("model=374m").model
    assert (model.hidden_size, model.num_hidden_layers, model.intermediate_size) == (1024, 16, 4096)
    assert (model.num_attention_heads, model.kv_heads, model.head_size) == (16, 4, 64)


# --- the paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lr"), [("osp_1b", 5e-4), ("adam_1b", 5e-3)])
def test_recipe_of_the_paper(name: str, lr: float) -> None:
    """OSP section 4 and appendix A.1; SmolLM1 where the paper is silent."""
    got = config(f"+experiment={name}")
    model, train, optimizer, schedule = got.model, got.train, got.optimizer, got.schedule
    assert (model.vocab_size, model.hidden_size, model.intermediate_size) == (49152, 2048, 5504)
    assert (model.num_hidden_layers, model.num_attention_heads, model.kv_heads) == (24, 16, 16)
    assert (model.rope_theta, model.norm.eps) == (10_000.0, None)
    # as in example_modeling_flax.py, which keeps Flax's default; SmolLM1 has 1/sqrt(D), and divides by sqrt(2 L)
    assert (model.init, model.initializer_range, model.scale_residual_init) == ("fan_in", None, False)
    assert (train.tokens, train.steps) == (100_000_000_000, None)
    assert (train.seq_len, train.tokens_per_step) == (2048, 2048 * 2048)
    assert (optimizer.lr, optimizer.weight_decay, train.grad_clip) == (lr, 0.01, 1.0)
    assert optimizer.gain_decay is None, "the authors decay every parameter (mask=None)"
    assert optimizer.adam_lr in (None, lr)
    assert (optimizer.adam_betas, optimizer.adam_eps) == ((0.9, 0.95), 1e-8)
    assert (optimizer.momentum, optimizer.nesterov) == (0.95, True)
    assert (optimizer.ns_steps, optimizer.ns_coefficients) == (5, "keller_jordan")
    assert (schedule.name, schedule.final_ratio) == ("trapezoid", 0.0)
    steps = math.ceil(100e9 / 2**22)
    assert steps == 23842
    size = {"tokens_per_step": train.tokens_per_step, "total_steps": steps}
    assert length_in_steps("warmup", schedule.warmup, **size) == math.ceil(5e9 / 2**22) == 1193
    longer = {**size, "total_steps": 10 * steps}  # the paper's 1 T tokens: the warm-up stays, the decay grows
    assert length_in_steps("warmup", schedule.warmup, **longer) == 1193
    assert length_in_steps("decay", schedule.decay, **longer) == 2 * steps
    assert length_in_steps("decay", schedule.decay, **size) == math.ceil(steps / 5) == 4769
    assert (got.tokenizer.train, got.tokenizer.vocab_size) == (False, 49152)
    assert [source.weight for source in got.data.mixture] == [0.70, 0.15, 0.08, 0.06, 0.01]
    assert got.run.name == name
    assert got.run.dir == f"runs/{name}"


PAPER: dict[str, str] = {"matrix": "muon", "embed_proj": "muon", "gain": "normalized"}
ADAM: dict[str, str] = {"embedding": "adamw", "head": "adamw"}
# rows of OSP's table 2: norm, EmbProj, learning rate, rules
ROWS: dict[str, tuple[str, bool, float, dict[str, str]]] = {
    "adam": ("rmsnorm", False, 5e-3, dict.fromkeys(("matrix", "embed_proj", "gain", "embedding", "head"), "adamw")),
    "muon_all": ("rmsnorm", False, 5e-4, {**PAPER, "embedding": "muon", "head": "muon"}),
    "muon": ("rmsnorm", False, 5e-4, {**PAPER, **ADAM}),
    "muon_ssnorm": ("ssnorm", False, 5e-4, {**PAPER, **ADAM}),
    "muon_embproj": ("rmsnorm", True, 5e-4, {**PAPER, **ADAM}),
    "osp": ("ssnorm", True, 5e-4, {**PAPER, **ADAM}),
}
ROW_OF = {**{name: name for name in ROWS}, "osp_1b": "osp", "adam_1b": "adam"}


@pytest.mark.parametrize("name", ROW_OF)
def test_ablation_row(name: str) -> None:
    norm, embed_proj, lr, rules = ROWS[ROW_OF[name]]
    got = config(f"+experiment={name}")
    assert (got.model.norm.name, got.model.embed_proj) == (norm, embed_proj)
    assert (got.optimizer.lr, got.optimizer.weight_decay) == (lr, 0.01)
    assert got.optimizer.rules == rules
    assert got.run.name == name


@pytest.mark.parametrize("name", ROWS)
def test_ablation_row_works_at_any_size_and_changes_nothing_else(name: str) -> None:
    got, plain = config("model=60m", f"+experiment={name}"), config("model=60m")
    assert got.model.hidden_size == 512
    same = dataclasses.replace(
        got,
        run=plain.run,
        optimizer=dataclasses.replace(plain.optimizer),
        model=dataclasses.replace(got.model, norm=plain.model.norm, embed_proj=plain.model.embed_proj),
    )
    assert same == plain


# rows past the paper: the keys that differ from `osp`
PLUS: dict[str, list[str]] = {
    "osp_ffn_norm": ["ffn_norm: False -> True"],
    "osp_gate": ["attention.gate: False -> True"],
    "osp_kurtosis": [
        "penalty.scale: 3.0 -> rms",
        "penalty.site: block_out -> down_proj_in",
        "penalty.weight: 0.0 -> 0.001",
    ],
    "osp_off_by_one": ["attention.off_by_one: False -> True"],
    "osp_penalty": ["penalty.weight: 0.0 -> 0.01"],
    "osp_plus": ["penalty.weight: 0.0 -> 0.1"],
    "osp_per_head": ["optimizer.per_head: False -> True"],
    "osp_sigmoid": ["model.hidden_act: silu -> sigmoid"],
}


@pytest.mark.parametrize("name", PLUS)
def test_row_past_the_paper_differs_from_osp_in_its_own_keys(name: str) -> None:
    got, osp = config("model=60m", f"+experiment={name}"), config("model=60m", "+experiment=osp")
    assert differences(to_dict(osp), to_dict(got)) == PLUS[name]
    assert got.run.name == name


@pytest.mark.parametrize("model", ["nano", "374m"])
def test_bhyt_is_trained_as_in_its_scripts(model: str) -> None:
    """A point of the grid in pt_bhyt_sweep.sh of arXiv 2601.09719, with the betas of its llama_pt.yaml."""
    got = config("+experiment=bhyt", f"model={model}")
    norm, optimizer, schedule = got.model.norm, got.optimizer, got.schedule
    assert (norm.name, norm.lam, norm.lam_post, norm.kappa, norm.final) == ("bhyt", 2.0, 1.0, 10.0, None)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.gain_decay) == (5e-4, 0.1, 0.0)
    assert (optimizer.adam_betas, set(optimizer.rules.values())) == ((0.9, 0.95), {"adamw"})
    assert (schedule.name, schedule.warmup, schedule.final_ratio) == ("cosine", "5%", 0.1)
    assert not got.model.embed_proj


def test_quickstart_is_an_outlier_safe_model() -> None:
    got = config()
    assert (got.model.norm.name, got.model.embed_proj, got.model.hidden_size) == ("ssnorm", True, 256)
    assert got.optimizer.rules == ROWS["osp"][3]
    assert (got.data.source, got.run.dir) == ("python_stdlib", "runs/osp_nano")


# --- the command line wins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_norm_on_the_command_line_wins_over_the_experiment(swap: bool) -> None:
    overrides = ["+experiment=osp_1b", "norm=bhyt"]
    norm = config(*(reversed(overrides) if swap else overrides)).model.norm
    assert (norm.name, norm.lam, norm.kappa, norm.seq_len) == ("bhyt", 1.0, 10.0, 2048)


OVERRIDES: dict[str, tuple[Callable[[Config], Any], Any]] = {
    "model=60m": (lambda c: c.model.hidden_size, 512),
    "optimizer=adamw": (lambda c: c.optimizer.rules, ROWS["adam"][3]),
    "data=python_stdlib": (lambda c: (c.data.source, c.data.mixture), ("python_stdlib", ())),
    "tokenizer=train": (lambda c: (c.tokenizer.train, c.tokenizer.hub), (True, None)),
    "schedule=cosine": (lambda c: c.schedule.name, "cosine"),
    "engine=zero3": (lambda c: c.engine.zero_stage, 3),
    "optimizer.lr=1e-3": (lambda c: c.optimizer.lr, 1e-3),
    "optimizer.adam_lr=2e-3": (lambda c: c.optimizer.adam_lr, 2e-3),
    "model.embed_proj=false": (lambda c: c.model.embed_proj, False),
    "norm.eps=1e-5": (lambda c: (c.model.norm.name, c.model.norm.eps), ("ssnorm", 1e-5)),
    "train.tokens=null": (lambda c: c.train.tokens, None),
    "train.steps=50": (lambda c: c.train.steps, 50),
    "run.name=mine": (lambda c: (c.run.name, c.run.dir), ("mine", "runs/mine")),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_override_wins_over_the_experiment(override: str) -> None:
    read, expected = OVERRIDES[override]
    assert read(config("+experiment=osp_1b", *OVERRIDES)) == expected


def test_run_folder_need_not_follow_the_name() -> None:
    assert config("run.name=mine", "run.dir=/x/y").run.dir == "/x/y"


# --- the entry point ----------------------------------------------------------------------------------------------


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that calls `run` of scripts/entry.py with arguments and returns the configuration of `main`."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    spec = importlib.util.spec_from_file_location("entry", ROOT / "scripts" / "entry.py")
    assert spec is not None
    assert spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    others = {cls: instance for cls, instance in Singleton._instances.items() if cls is not GlobalHydra}
    monkeypatch.setattr(Singleton, "_instances", others)  # these tests hold an initialized Hydra

    def run(*arguments: str) -> dict[str, Any]:
        received: list[dict[str, Any]] = []

        def main(values: dict[str, Any]) -> None:
            make_source(from_dict(values).data)
            received.append(values)

        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        entry.run(main)
        return received[0]

    return run


@pytest.mark.parametrize("flag", [["--local_rank=0"], ["--local_rank", "0"]])
def test_entry_composes_what_these_tests_compose(launch: Callable[..., dict[str, Any]], flag: list[str]) -> None:
    expected = config("+experiment=osp_1b", "norm=bhyt")
    assert from_dict(launch(*flag, "+experiment=osp_1b", "norm=bhyt")) == expected


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train.stpes=5"], ("unknown key 'train.stpes'", "train.steps")),
        (["+train.stpes=5"], ("unknown key 'train.stpes'", "train.steps")),
        (["norm=batchnorm"], ("batchnorm", "ssnorm", "rmsnorm", "bhyt")),
        (["optimizer=sgd"], ("sgd", "muon", "adamw")),
        (["+experiment=osp_7b"], ("osp_7b", "osp_1b")),
        (["nrom=bhyt"], ("nrom", "norm")),
        (["train.steps=many"], ("train.steps='many'", "int")),
        (["data=text"], ("data.paths is empty",)),
        (["data=hf"], ("data.dataset is not set",)),
        (["train.steps=null"], ("the run has no length",)),
        (["train.steps"], ("train.steps",)),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, list) else "",
)
def test_mistake_on_the_command_line_is_one_line_and_status_2(
    launch: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fragments: tuple[str, ...],
) -> None:
    with pytest.raises(SystemExit) as caught:
        launch(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not [fragment for fragment in fragments if fragment not in lines[0]], lines[0]
