"""The configuration: valid values arrive unchanged, invalid values give one line with key, value and fix."""

import dataclasses
import json
from typing import Any

import pytest

from osp.config import Config, OptimizerConfig, from_dict, to_dict, unknown_key
from osp.errors import UserError
from osp.model_config import check_model
from osp.run.read import differences


def tree(**changes: Any) -> dict[str, Any]:
    """Return a small valid tree with `changes`, whose keys have `__` for the dot."""
    values: dict[str, Any] = {"train": {"steps": 10}}
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return values


# --- valid values -------------------------------------------------------------------------------------------------

VALID = {
    "smallest": tree(),
    "tokens": tree(train__steps=None, train__tokens=1_000_000),
    "bhyt": tree(norm={"name": "bhyt", "lam": 2.0, "lam_post": 1.0}, train__seq_len=512),
    "mixture": tree(
        data={
            "source": "mixture",
            "mixture": [{"source": "hf", "dataset": "a/b", "weight": 0.7}, {"source": "text", "paths": ["x", "y"]}],
        }
    ),
    "text": tree(data={"source": "text", "paths": ["corpus.jsonl"]}, model__embed_proj=True),
    "tokenizer": tree(tokenizer={"train": False, "path": "tokenizer.json"}, resume=False, optimizer__adam_lr=1e-3),
    "lengths": tree(schedule={"warmup": 100, "decay": "5e9 tokens"}, engine__zero_stage=3, train__compile=True),
}


@pytest.mark.parametrize("case", VALID)
def test_round_trip(case: str) -> None:
    """Also through JSON, as the run folder stores it."""
    config = from_dict(VALID[case])
    stored = json.loads(json.dumps(to_dict(config)))
    assert stored == to_dict(config)
    assert from_dict(stored) == config
    hash(json.dumps(stored, sort_keys=True))


@pytest.mark.parametrize("case", VALID)
def test_every_given_value_arrives(case: str) -> None:
    def check(given: dict[str, Any], got: dict[str, Any], path: str = "") -> None:
        for key, value in given.items():
            if isinstance(value, dict):
                check(value, got[key], f"{path}{key}.")
            elif path + key != "data.mixture":
                assert got[key] == value, path + key

    check(VALID[case], to_dict(from_dict(VALID[case])))


def test_run_written_before_a_key_existed_has_its_default() -> None:
    """A configuration stored before the key existed gets the default."""
    now = to_dict(from_dict(tree(optimizer__per_head=True, run__name="other")))
    older = to_dict(from_dict(tree()))
    del older["penalty"], older["optimizer"]["per_head"], older["ffn_norm"]
    assert differences(older, now) == ["optimizer.per_head: False -> True"]
    assert differences(older, to_dict(from_dict(tree()))) == []


def test_from_dict_does_not_change_its_argument() -> None:
    values = tree(norm={"name": "bhyt"}, model={"hidden_size": 64})
    before = json.dumps(values)
    from_dict(values)
    assert json.dumps(values) == before


def test_defaults_come_from_the_dataclasses() -> None:
    config = from_dict(tree())
    assert dataclasses.replace(config, train=dataclasses.replace(config.train, steps=None)) == Config()


def test_numbers_are_converted_without_loss() -> None:
    config = from_dict(tree(train__steps=None, train__tokens=5e9, optimizer__lr=1, optimizer__adam_betas=[0, 0.9]))
    assert config.train.tokens == 5_000_000_000
    assert isinstance(config.train.tokens, int)
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.adam_betas == (0.0, 0.9)


def test_bhyt_takes_the_sequence_length_of_the_training() -> None:
    assert from_dict(tree(norm__name="bhyt", train__seq_len=512)).model.norm.seq_len == 512
    assert from_dict(tree(norm={"name": "bhyt", "seq_len": 99}, train__seq_len=512)).model.norm.seq_len == 99
    assert from_dict(tree(norm__name="rmsnorm")).model.norm.seq_len is None


def test_model_shape_helpers() -> None:
    model = from_dict(tree(model={"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2})).model
    assert (model.head_size, model.kv_heads) == (16, 2)
    assert from_dict(tree()).model.kv_heads == from_dict(tree()).model.num_attention_heads


# --- invalid values -----------------------------------------------------------------------------------------------

# (changes, fragments of the message: the key, the value and the fix)
WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # unknown keys
    ({"trian": {}}, ("unknown key 'trian'", "'train'")),
    ({"xyzzy": 1}, ("unknown key 'xyzzy'", "choose from", "checkpoint", "tokenizer", "norm")),
    ({"train__step": 5}, ("unknown key 'train.step'", "'train.steps'")),
    ({"model__hiden_size": 5}, ("unknown key 'model.hiden_size'", "'model.hidden_size'")),
    ({"norm__lambda": 5}, ("unknown key 'norm.lambda'",)),
    ({"norm__kapa": 5}, ("norm.kapa", "norm.kappa")),
    ({"engine__q": 5}, ("unknown key 'engine.q'", "choose from", "zero_stage")),
    ({"model__norm": {"name": "bhyt"}}, ("model.norm", "norm=...")),
    ({"data": {"source": "mixture", "mixture": [{"wieght": 1}]}}, ("data.mixture[0].wieght", "data.mixture[0].weight")),
    # types
    ({"train": 5}, ("train=5", "table", "steps")),
    ({"train__steps": "many"}, ("train.steps='many'", "int")),
    ({"train__steps": 1.5}, ("train.steps=1.5", "int")),
    ({"train__steps": True}, ("train.steps=True", "int")),
    ({"train__seq_len": None}, ("train.seq_len=None", "int")),
    ({"train__seq_len": [256]}, ("train.seq_len=[256]", "int")),
    ({"train__grad_clip": "1"}, ("train.grad_clip='1'", "number")),
    ({"train__grad_clip": False}, ("train.grad_clip=False", "number")),
    ({"train__compile": "yes"}, ("train.compile='yes'", "true or false", "auto")),
    ({"train__micro_batch_size": "big"}, ("train.micro_batch_size='big'", "int", "auto")),
    ({"train__document_mask": 1}, ("train.document_mask=1", "true or false")),
    ({"run__name": 5}, ("run.name=5", "text")),
    ({"model__embed_proj": "true"}, ("model.embed_proj='true'", "true or false")),
    ({"optimizer__lr": "5e-4x"}, ("optimizer.lr='5e-4x'", "number")),
    ({"optimizer__adam_betas": [0.9]}, ("optimizer.adam_betas=[0.9]", "element [1]")),
    ({"data__paths": "corpus.txt"}, ("data.paths='corpus.txt'", "list", "write data.paths=[corpus.txt]")),
    ({"data__paths": [1]}, ("data.paths[0]=1", "text")),
    ({"resume": 5}, ("resume=5", "text", "true or false")),
    ({"norm__eps": "small"}, ("norm.eps='small'", "number")),
    # choices
    ({"train__precision": "fp16"}, ("train.precision='fp16'", "'auto', 'fp32', 'bf16'")),
    ({"engine__zero_stage": 4}, ("engine.zero_stage=4", "1, 2 or 3")),
    ({"engine__zero_stage": True}, ("engine.zero_stage=True", "1, 2 or 3")),
    ({"engine__device": "tpu"}, ("engine.device='tpu'", "cpu", "cuda")),
    ({"schedule__name": "linear"}, ("schedule.name='linear'", "'trapezoid', 'cosine' or 'constant'")),
    ({"optimizer__ns_method": "fast"}, ("optimizer.ns_method='fast'", "'standard' or 'gram'")),
    ({"optimizer__rules": {"bias": "muon"}}, ("unknown key 'optimizer.rules.bias'", "'matrix', 'embed_proj', 'gain'")),
    ({"logger__wandb": "on"}, ("logger.wandb='on'", "'online', 'offline' or 'disabled'")),
    # ranges
    *(
        ({key: value}, (f"{key.replace('__', '.')}={value}", "at least 1"))
        for key in (
            "train__steps",
            "train__seq_len",
            "train__tokens_per_step",
            "train__micro_batch_size",
            "train__loss_chunk_tokens",
            "model__hidden_size",
            "model__num_hidden_layers",
            "model__num_attention_heads",
            "model__num_key_value_heads",
            "model__intermediate_size",
            "train__norm_refresh_every",
            "data__max_tokens",
            "engine__threads",
            "model__vocab_size",
            "optimizer__ns_steps",
            "data__shard_tokens",
            "tokenizer__sample_bytes",
            "logger__every",
            "eval__tokens",
        )
        for value in (0, -8)
    ),
    *(
        ({key: value}, (f"{key.replace('__', '.')}={value}", "at least 0"))
        for key in ("eval__every", "checkpoint__every", "checkpoint__keep_last", "eval__sample_tokens")
        for value in (-1,)
    ),
    *(
        ({key: value}, (f"{key.replace('__', '.')}={value}", words))
        for key in (
            "train__grad_clip",
            "optimizer__lr",
            "optimizer__adam_eps",
            "norm__eps",
            "optimizer__adam_lr",
            "optimizer__weight_decay",
        )
        for value, words in ((-0.5, "at least 0"), (float("nan"), "finite number"), (float("inf"), "finite number"))
    ),
    *(
        ({key: value}, (f"{key.replace('__', '.')}={value}", words))
        for key in ("model__initializer_range", "logger__peak_tflops")
        for value, words in (
            (0.0, "above 0"),
            (-1.0, "above 0"),
            (float("nan"), "finite number"),
            (float("inf"), "finite number"),
        )
    ),
    *(
        ({key: 1e300}, (f"{key.replace('__', '.')}=1e+300", "at most 1e18 in size"))
        for key in ("norm__init", "norm__alpha", "optimizer__lr", "norm__lam")
    ),
    ({"norm__init": -1e19}, ("norm.init=-1e+19", "at most 1e18 in size")),
    ({"optimizer__lr": "1" * 5000}, ("optimizer.lr='111", "5002 characters", "must be a number")),
    *(({f"norm__{key}": 0.0}, (f"norm.{key}=0.0", "above 0")) for key in ("lam", "lam_post", "kappa")),
    ({"optimizer__gain_decay": -0.1}, ("optimizer.gain_decay=-0.1", "at least 0")),
    ({"model__init": "lecun"}, ("model.init='lecun'", "'normal' or 'fan_in'")),
    ({"model__rope_theta": 1e-9}, ("model.rope_theta=1e-09", "at least 0.000001")),
    ({"model__rope_theta": 0.0}, ("model.rope_theta=0.0", "above 0")),
    ({"model__rope_theta": float("inf")}, ("model.rope_theta=inf", "finite number")),
    ({"optimizer__adam_betas": [0.9, 1.0]}, ("optimizer.adam_betas[1]=1.0", "below 1")),
    ({"optimizer__rules": "muon"}, ("optimizer.rules='muon'", "a table")),
    ({"data__num_workers": -1}, ("data.num_workers=-1", "at least 0")),
    ({"optimizer__momentum": 1.0}, ("optimizer.momentum=1.0", "below 1")),
    ({"optimizer__momentum": -0.1}, ("optimizer.momentum=-0.1", "at least 0")),
    ({"schedule__final_ratio": 1.5}, ("schedule.final_ratio=1.5", "at most 1")),
    ({"data__val_fraction": 0.0}, ("data.val_fraction=0.0", "above 0")),
    ({"data__val_fraction": 1}, ("data.val_fraction=1", "below 1")),
    # pairs
    ({"train__steps": None}, ("no length", "train.steps", "train.tokens")),
    (
        {"train__seq_len": 100, "train__tokens_per_step": 1234},
        ("train.tokens_per_step=1234", "train.seq_len=100", "1200"),
    ),
    ({"train__seq_len": 100, "train__tokens_per_step": 30}, ("train.tokens_per_step=30", "the nearest is 100")),
    ({"train__seq_len": 4096}, ("train.seq_len=4096", "model.max_position_embeddings=2048", "raise")),
    ({"model__num_attention_heads": 3}, ("model.hidden_size=256", "model.num_attention_heads=3", "divisible")),
    ({"model__num_attention_heads": 256}, ("head size 1", "even")),
    ({"model__num_key_value_heads": 3}, ("model.num_attention_heads=4", "model.num_key_value_heads=3", "divisible")),
    ({"tokenizer__vocab_size": 5000}, ("tokenizer.vocab_size=5000", "model.vocab_size=4096", "model.vocab_size=5000")),
    ({"tokenizer__train": False}, ("tokenizer.train=false", "tokenizer.path=FILE", "tokenizer.hub=NAME")),
    ({"tokenizer": {"train": False, "path": "a", "hub": "b"}}, ("exactly one", "tokenizer.path", "tokenizer.hub")),
    ({"tokenizer__path": "a.json"}, ("tokenizer.path", "tokenizer.train=false")),
    ({"tokenizer__hub": "a/b"}, ("tokenizer.hub", "tokenizer.train=false")),
    (
        {"data": {"source": "mixture", "mixture": [{"source": "python_stdlib", "weight": 0}]}},
        ("data.mixture[0].weight=0", "above 0"),
    ),
]


@pytest.mark.parametrize(("changes", "fragments"), WRONG, ids=lambda v: str(v)[:70] if isinstance(v, dict) else "")
def test_mistake_is_one_line_with_key_value_and_fix(changes: dict[str, Any], fragments: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(tree(**changes))
    message = str(caught.value)
    assert not [fragment for fragment in fragments if fragment not in message], message
    assert "\n" not in message
    assert len(message) < 300, message


def test_integer_of_thousands_of_digits_is_refused() -> None:
    """Python refuses to write it, so json.dumps and the message would fail."""
    for value in (10**5000, [-(10**5000)]):
        with pytest.raises(UserError, match=r"^optimizer\.lr(\[0\])?: an integer of 16610 bits is out of range$"):
            from_dict(tree(optimizer__lr=value))


def test_limits_are_valid_values() -> None:
    from_dict(
        tree(
            train={"steps": 1, "grad_clip": 0.0, "seq_len": 2048, "tokens_per_step": 2048, "micro_batch_size": 1},
            optimizer={"momentum": 0.0, "weight_decay": 0.0, "lr": 0.0},
            schedule={"final_ratio": 1.0},
            eval={"every": 0, "sample_tokens": 0, "tokens": 1},
            checkpoint={"every": 0, "keep_last": 0},
            tokenizer={"vocab_size": 4096},
            model={"num_key_value_heads": 1},
        )
    )


def test_check_model_is_what_from_dict_uses() -> None:
    model = dataclasses.replace(from_dict(tree()).model, num_key_value_heads=3)
    with pytest.raises(UserError, match="num_key_value_heads=3"):
        check_model(model)


@pytest.mark.parametrize(
    ("path", "fragments"),
    [
        ("train.stepz", ("unknown key 'train.stepz'", "'train.steps'")),
        ("trainn.steps", ("unknown key 'trainn'", "'train'")),
        ("norm.lamm", ("unknown key 'norm.lamm'", "'norm.lam'")),
        ("train.steps.more", ("unknown key 'train.steps.more'",)),
        ("train.steps", ("train.steps cannot be overridden",)),
    ],
)
def test_unknown_key_sentence(path: str, fragments: tuple[str, ...]) -> None:
    message = unknown_key(path)
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_derf_starts_at_a_lower_slope_with_muon() -> None:
    """arXiv 2604.01563; a given slope stays, and so do other norms and rules."""
    assert from_dict(tree(norm__name="derf")).model.norm.alpha == 0.3
    assert from_dict(tree(norm={"name": "derf", "alpha": 0.5})).model.norm.alpha == 0.5
    rules = dict.fromkeys(OptimizerConfig().rules, "adamw")
    assert from_dict(tree(norm__name="derf", optimizer__rules=rules)).model.norm.alpha is None
    assert from_dict(tree(norm__name="dyt")).model.norm.alpha is None


def test_qk_clip_with_normalized_queries_is_refused() -> None:
    assert from_dict(tree(qk_clip__tau=50.0)).qk_clip.tau == 50.0
    with pytest.raises(UserError, match=r"qk_clip.tau=50.0 with qk_norm=true.*set qk_clip.tau=null or qk_norm=false$"):
        from_dict(tree(qk_clip__tau=50.0, qk_norm=True))
