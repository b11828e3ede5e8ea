"""Whole runs on a small model: their files, that they learn, and that only the mathematics decides the result."""

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import yaml

import osp.model.loss as loss_module
from osp.config import Config, Deployed, LoggerConfig, from_dict, to_dict
from osp.data.loader import Batch, Loader, Shards
from osp.data.prepare import shard_folder
from osp.data.tokenizer import load_tokenizer
from osp.errors import RunError, UserError
from osp.evaluation.config import EvaluateConfig
from osp.evaluation.evaluate import evaluate
from osp.evaluation.language_model import open_model
from osp.model import attention
from osp.model.norms import BHyT
from osp.model.transformer import Block, Transformer
from osp.quant.deployed import DEPLOYED
from osp.run.checkpoint import load_model
from osp.run.logger import Logger
from osp.train import trainer
from osp.train.engine import Engine
from osp.train.setup import setup, train
from osp.train.trainer import Trainer
from osp.train.validate import validation_every
from tests.conftest import losses, overrides_of, read_metrics, run_script
from tests.distributed import run_distributed
from tests.monitor.workers import trained

Tiny = Callable[..., Config]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), (name, (a[name] - b[name]).abs().max())


def test_run_folder_describes_the_run(tiny: Tiny, plain_run: Path) -> None:
    folder, config = plain_run, tiny(f"run.dir={plain_run}", "train.attention=sdpa")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert from_dict(stored) == config
    (start,) = json.loads((folder / "environment.json").read_text())
    assert {"git", "torch", "deepspeed", "command", "world_size"} <= start.keys()
    assert (folder / "tokenizer.json").exists()
    events = read_metrics(folder)
    assert all({"step", "tokens"} <= event.keys() for event in events)
    assert all(event["tokens"] == 256 * event["step"] for event in events)
    assert [e["step"] for e in events if "train/loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if "val/loss" in e] == [3, 6]
    step = next(e for e in events if "train/loss" in e)
    for key in ("grad_norm", "tokens_per_second", "step_seconds", "data_wait_seconds", "memory_gib", "param_norm"):
        assert step[f"train/{key}"] is not None, key
    for role in ("matrix", "embed_proj", "gain", "embedding", "head"):
        assert f"train/lr/{role}" in step
        assert step[f"train/update_rms/{role}"] > 0
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == ["step_00000003", "step_00000006"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["sample"]


def test_update_rms_of_muon_is_a_fifth_of_its_learning_rate(tiny: Tiny, tmp_path: Path) -> None:
    """0.2 sqrt(max(m, n)) times a matrix of singular values near 1 has RMS 0.2 sqrt(rank / min(m, n))."""
    train(tiny("train.steps=2", "schedule.name=constant", "schedule.warmup=0"))
    step = read_metrics(tmp_path / "run")[0]
    assert step["train/lr/matrix"] == 0.01
    assert step["train/update_rms/matrix"] == pytest.approx(0.2 * 0.01, rel=0.2)  # NS5 ends in [0.7, 1.2]
    assert step["train/update_rms/gain"] == pytest.approx(0.2 * 0.01, rel=1e-4)


def test_length_of_a_run_is_in_steps_or_tokens(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.steps=null", "train.tokens=600", name="tokens"))
    assert [e["step"] for e in read_metrics(tmp_path / "tokens") if "train/loss" in e] == [1, 2, 3]  # 600 / 256
    stored = yaml.safe_load((tmp_path / "tokens" / "config.yaml").read_text())["train"]
    assert (stored["steps"], stored["tokens"]) == (3, None)
    assert tiny("train.steps=2", "train.tokens=600").train.num_steps == 2


def test_training_learns(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.steps=60", "eval.every=0", "checkpoint.every=0"))
    curve = losses(tmp_path / "run")
    assert curve[0] == pytest.approx(math.log(320), rel=0.1)  # an untrained model knows nothing
    assert curve[-1] < 0.75 * curve[0], curve


def test_validation_loss_equals_a_plain_loop(tiny: Tiny, plain_run: Path) -> None:
    model = load_model(plain_run).double()
    model.compute_dtype = torch.float64
    config = tiny()
    tokens = torch.from_numpy(Shards(shard_folder(config.data, config.tokenizer), "val").tokens[0].astype("int64"))
    tokenizer = load_tokenizer(plain_run / "tokenizer.json")
    nats, count, text = 0.0, 0, b""
    for row in range(min(1024, len(tokens) - 1) // 32):
        window = tokens[row * 32 : row * 32 + 33]
        with torch.no_grad():
            nats += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
        count += 32
        text += b"".join(_bytes(tokenizer, token) for token in window[1:].tolist())
    last = [event for event in read_metrics(plain_run) if "val/loss" in event][-1]
    assert last["val/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert last["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
def test_live_quantized_perplexity_does_not_change_training(
    stage: int, precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    same = (f"engine.zero_stage={stage}", f"train.precision={precision}")
    train(tiny(*same, name="plain"))
    train(tiny(*same, "eval.quant.every=2", "eval.quant.tokens=512", name="measured"))
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        plain, measured = ([e[key] for e in read_metrics(tmp_path / n) if key in e] for n in ("plain", "measured"))
        assert plain == measured, key
    assert_same_weights(tmp_path / "plain", tmp_path / "measured")
    events = [event for event in read_metrics(tmp_path / "measured") if "quant/seconds" in event]
    assert [event["step"] for event in events] == [2, 4, 6]
    assert not any("quant/seconds" in event for event in read_metrics(tmp_path / "plain"))
    assert all(event["quant/perplexity/4-4-4"] != event["quant/perplexity/16-16-16"] for event in events)


def test_live_quantized_perplexity_equals_a_plain_loop(tiny: Tiny, tmp_path: Path) -> None:
    """Over the same windows. It is always measured at the end, and only once in a resumed run."""
    config = tiny("eval.quant.every=4", "eval.quant.tokens=128", "checkpoint.every=4")
    interrupt_after(3, config)
    train(config)
    events = [event for event in read_metrics(tmp_path / "run") if "quant/seconds" in event]
    assert [event["step"] for event in events] == [4, 6]
    model = load_model(tmp_path / "run").double()
    model.compute_dtype = torch.float64
    windows = torch.from_numpy(
        Shards(shard_folder(config.data, config.tokenizer), "val").tokens[0][:128].astype("int64")
    ).view(4, 32)
    with torch.no_grad():
        loss = F.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert events[-1]["quant/perplexity/16-16-16"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_live_perplexity_of_a_format_equals_evaluation_of_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """Static ranges are from as many training tokens as validation tokens are measured."""
    keys = ("eval.quant.every=6", "eval.quant.tokens=128", 'eval.quant.formats=["nvfp4", "w4a16_g32"]')
    train(tiny(*keys, "monitor.enabled=true", "monitor.quant=nvfp4", 'monitor.statistics=["R_L"]', "monitor.tokens=64"))
    (event,) = [event for event in read_metrics(tmp_path / "run") if "quant/seconds" in event]
    for name in ("nvfp4", "w4a16_g32"):
        spec = dataclasses.replace(DEPLOYED[name], calibration_tokens=128) if name == "nvfp4" else DEPLOYED[name]
        measured = EvaluateConfig(path=str(tmp_path / "run"), quant=spec, max_tokens=128, progress=False, device="cpu")
        record = evaluate(open_model(tmp_path / "run"), measured)
        assert event[f"quant/perplexity/{name}"] == pytest.approx(record.results[0].value, rel=1e-6)
    errors = [event["monitor/R_L"] for event in read_metrics(tmp_path / "run") if "monitor/R_L" in event]
    assert all(0 < error < 2 for error in errors)


def test_format_that_does_not_fit_is_refused(tiny: Tiny) -> None:
    assert get_args(Deployed) == tuple(DEPLOYED)
    with pytest.raises(UserError, match=r"^eval.quant.formats does nothing with eval.quant.every=0; set the steps"):
        tiny('eval.quant.formats=["nvfp4"]')
    with pytest.raises(UserError, match=r"^eval.quant.formats=w4a16_g128: .*=128 does not divide model.hidden_size=32"):
        train(tiny('eval.quant.formats=["w4a16_g128"]', "eval.quant.every=2"))
    with pytest.raises(UserError, match=r"^monitor.quant=w4a16_g128: .*=128 does not divide model.hidden_size=32"):
        train(tiny("monitor.quant=w4a16_g128"))
    with pytest.raises(UserError, match=r"^monitor.quant='w4': .*nvfp4"):
        tiny("monitor.quant=w4")


def test_live_quantized_perplexity_refuses_zero_3(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"eval.quant.every=2 does not work with engine.zero_stage=3") as error:
        tiny("eval.quant.every=2", "engine.zero_stage=3")
    assert "\n" not in str(error.value)


def _bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of a token by the public byte-level alphabet of GPT-2, built here independently."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    text = tokenizer.id_to_token(token)
    return b"" if text == "<|endoftext|>" else bytes(table[c] for c in text)


def test_resume_after_a_crash_is_bit_identical(tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    stopped = tiny(name="stopped")
    interrupt_after(3, stopped)
    assert losses(tmp_path / "stopped") == losses(plain_run)[:4]
    train(stopped)  # the same command: resume=auto; the fourth step is taken and written once
    assert losses(tmp_path / "stopped") == losses(plain_run)
    assert_same_weights(tmp_path / "stopped", plain_run)


def interrupt_after(step: int, config: Config) -> None:
    """Train `config` and crash at the beginning of step `step` + 2: step + 1 is logged but not saved."""

    class KilledError(Exception):
        pass

    original = Trainer.train_step

    def step_or_die(self: Trainer, number: int, *, record: bool) -> dict[str, float] | None:
        if number == step + 1:
            if self.saver.busy:  # complete the save in progress
                self._log_save(self.saver.finish())
            raise KilledError
        return original(self, number, record=record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_or_die)
        with pytest.raises(KilledError):
            train(config)


def test_finished_run_is_summarized_again_without_training(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    train(config)
    before = losses(tmp_path / "run"), weights(tmp_path / "run")
    train(config)
    assert losses(tmp_path / "run") == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in weights(tmp_path / "run").items())


def test_resuming_from_another_run_starts_at_its_step(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(name="first"))
    other = tiny("train.steps=8", f"resume={tmp_path / 'first'}", name="second")
    train(other)
    assert [e["step"] for e in read_metrics(tmp_path / "second") if "train/loss" in e] == [7, 8]


def test_micro_batch_size_changes_only_rounding(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("train.micro_batch_size=1", name="one"))
    train(tiny("train.micro_batch_size=8", name="eight"))
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "eight")), atol=0, rtol=2e-5
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stage_changes_only_rounding(stage: int, tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    train(tiny(f"engine.zero_stage={stage}", name="other"))
    torch.testing.assert_close(
        torch.tensor(losses(plain_run)), torch.tensor(losses(tmp_path / "other")), atol=0, rtol=2e-5
    )


@pytest.mark.parametrize(
    ("launcher", "stage"),
    [
        (("torchrun", "--standalone", "--nproc-per-node", "2"), 3),
        (("deepspeed", "--num_gpus", "2"), 2),
        (None, 2),
    ],
)
@pytest.mark.timeout(900)
def test_ranks_change_only_rounding(
    launcher: tuple[str, ...] | None, stage: int, tiny: Tiny, plain_run: Path, tmp_path: Path
) -> None:
    """2 ranks of the real launchers, and 4 forked ones, see the same data, losses and validation as one process."""
    config = tiny(f"engine.zero_stage={stage}", name="many")
    if launcher:
        result = run_script(*overrides_of(config), launcher=launcher, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    else:
        run_distributed(trained, 4, to_dict(config))
    for key in ("train/loss", "val/loss", "val/bits_per_byte", "train/grad_norm", "train/param_norm"):
        one, many = (
            torch.tensor([e[key] for e in read_metrics(folder) if key in e])
            for folder in (plain_run, tmp_path / "many")
        )
        torch.testing.assert_close(one, many, atol=0, rtol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
    a, b = weights(plain_run), weights(tmp_path / "many")
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_waiting_for_data_is_the_wait_for_the_loader(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the exchange with ranks whose last step still runs, nor any other part of the step."""
    step, wait, count = Engine.step, Loader.wait, trainer.count_flags

    def slow_step(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.5)
        step(*args, **kwargs)

    def slow_count(*flags: bool) -> list[int]:
        time.sleep(0.5 if len(flags) > 1 else 0.0)
        return count(*flags)

    def slow_wait(self: Loader, number: int, *, seconds: float) -> bool:
        time.sleep(0.4 if number == 2 else 0.0)
        late.append(number)
        return wait(self, number, seconds=seconds) and late.count(3) != 1  # step 3 is not ready at the first look

    late = list[int]()
    monkeypatch.setattr(Engine, "step", slow_step)
    monkeypatch.setattr(trainer, "count_flags", slow_count)
    monkeypatch.setattr(Loader, "wait", slow_wait)
    train(tiny("train.steps=4", "eval.every=0", "eval.sample_tokens=0", "checkpoint.every=0"))
    steps = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    waits = [line["train/data_wait_seconds"] for line in steps]
    assert all(line["train/step_seconds"] > 1.0 for line in steps)
    assert waits[1] < 0.45, waits  # of the first step the text is read
    assert 0.4 <= waits[2] < 0.85, waits
    assert 0.5 <= waits[3] < 0.95, waits  # not ready at first: the ranks have asked each other once


def test_a_step_is_uploaded_before_its_first_forward_pass(
    tiny: Tiny, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From batches that the loader's thread pins, which only a GPU needs; neither changes a number."""
    forward, to, pins, events = Trainer._forward, Batch.to, list[bool](), list[str]()
    inside = []

    def record_forward(self: Trainer, batch: Batch) -> Any:
        events.extend(["forward"] * self.model.training)
        inside.append(True)
        output = forward(self, batch)
        inside.clear()
        return output

    def record_upload(self: Batch, device: torch.device) -> Batch:
        events.extend([] if inside else ["upload"])
        return to(self, device)

    def pinning(*args: Any, pin: bool, **kwargs: Any) -> Loader:
        pins.append(pin)
        return Loader(*args, pin=True, **kwargs)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread().name.startswith("osp-loader")
        return tensor.clone()

    monkeypatch.setattr(Trainer, "_forward", record_forward)
    monkeypatch.setattr(Batch, "to", record_upload)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr("osp.train.setup.Loader", pinning)
    train(tiny())
    assert pins == [False], "a CPU run pins nothing"
    assert events == (["upload"] * 4 + ["forward"] * 4) * 6
    assert losses(tmp_path / "run") == losses(plain_run)
    assert_same_weights(tmp_path / "run", plain_run)


def test_deterministic_changes_no_value_on_a_cpu(
    tiny: Tiny, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it read memory that nothing was written to, which torch fills with NaN here."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        run = setup(tiny("train.deterministic=true", "eval.sample_tokens=0"))
        assert torch.are_deterministic_algorithms_enabled()
        torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
        run.fit()
        run.close()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
        torch.backends.cudnn.deterministic = False
        torch.backends.cuda.enable_cudnn_sdp(True)
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        plain, strict = ([e[key] for e in read_metrics(f) if key in e] for f in (plain_run, tmp_path / "run"))
        assert plain == strict, key
    assert_same_weights(plain_run, tmp_path / "run")


def test_sample_of_a_deterministic_run_may_use_any_operation(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has no deterministic cumulative sum, which draws the tokens: it must not end a complete run."""
    allowed = []
    monkeypatch.setattr("osp.train.setup.compute_deterministically", lambda: torch.use_deterministic_algorithms(True))
    monkeypatch.setattr(
        "osp.train.validate.generate",
        lambda *_, **__: allowed.append(not torch.are_deterministic_algorithms_enabled()) or [[]],
    )
    try:
        train(tiny("train.deterministic=true", "train.steps=1"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert allowed == [True]


def test_a_step_fetches_its_figures_in_one_transfer(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, penalty and the norms of all gradients: a GPU is idle during each transfer."""
    fetched: list[str] = []
    run = setup(tiny("eval.sample_tokens=0", "penalty.weight=0.1", "train.z_loss=0.01", "train.grad_clip=0.1"))
    try:
        run.train_step(0, record=False)
        for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
            fetch = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, fetch=fetch: fetched.append(name) or fetch(x))
        metrics = run.train_step(1, record=False)
    finally:
        run.peers.dismiss()
        run.close()
    assert metrics is not None
    assert metrics["train/grad_norm"] > 0.1, "clipped"
    assert fetched == ["tolist"]


def test_non_finite_loss_stops_before_the_weights_change(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = Trainer._forward
    calls = []

    def poisoned(self: Trainer, batch: Any) -> Any:
        calls.append(batch)
        output = original(self, batch)
        return output._replace(loss=output.loss * (math.nan if len(calls) == 7 else 1.0))  # step 2, micro batch 3 of 4

    monkeypatch.setattr(Trainer, "_forward", poisoned)
    with pytest.raises(RunError, match=r"step 2: the loss is not finite in sequences 12 to 13 of"):
        train(tiny("checkpoint.every=1", "eval.every=0"))
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert (report["step"], report["rows"]) == (2, [[12, 14]])
    assert set(report["gradients"].values()) == {"nan"}
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))] == ["step_00000001"]


def test_z_loss_is_logged_and_changes_the_update_only(
    tiny: Tiny, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = Trainer._forward
    squares = []

    def remember(self: Trainer, batch: Any) -> Any:
        if self.model.training and self.step == 0:
            with torch.no_grad():
                logits = self.model(batch.tokens[:, :-1]).logits.double()
            squares.append(logits.logsumexp(-1).square().sum().item())
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_forward", remember)
    train(tiny("train.z_loss=0.1", "eval.every=0"))
    lines, plain = read_metrics(tmp_path / "run"), read_metrics(plain_run)
    steps = [line for line in lines if "train/loss" in line]
    assert steps[0]["train/z_loss"] == pytest.approx(sum(squares) / 256, rel=1e-6)
    assert losses(tmp_path / "run")[0] == losses(plain_run)[0]
    assert losses(tmp_path / "run")[1] != losses(plain_run)[1]
    assert not [line for line in plain if "train/z_loss" in line]
    model, ids = load_model(tmp_path / "run"), torch.arange(20)[None]
    model.lm_head.z_loss = 0.1
    output = model(ids, ids)
    assert output.z_loss is None
    output.loss.backward()  # in evaluation mode of the cross-entropy alone
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    weight = model.lm_head.weight.detach().double().requires_grad_()
    hidden = model.hidden_states(ids)[0].detach().double()
    F.cross_entropy((hidden @ weight.T)[0], ids[0], reduction="sum").backward()
    torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_bhyt_constants_derive_from_weights_and_are_saved(stage: int, tiny: Tiny, tmp_path: Path) -> None:
    norm = ("norm.name=bhyt", "norm.lam=1.5", "train.norm_refresh_every=2")
    train(tiny(*norm, f"engine.zero_stage={stage}", "train.steps=3", "monitor.enabled=true"))
    model = load_model(tmp_path / "run")
    assert model.config.norm.seq_len == 32
    probes = [event for event in read_metrics(tmp_path / "run") if "monitor/cost" in event]
    assert len(probes) == 4
    for event in probes:
        assert 0 < event["bhyt/var_error/layer_00"] < 1
        assert "bhyt/var_error/layer_01" in event
    # the refresh before step 3 saw the weights after step 2, so the constants are near the final ones, not equal
    for layer in model.layers:
        assert isinstance(layer, Block)
        assert isinstance(layer.post_attention_layernorm, BHyT)
        v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        repeated = v.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
        expected = (o @ repeated).square().sum() / (32 * 32)
        gain = layer.post_attention_layernorm.attention_gain
        assert gain.item() == pytest.approx(expected.item(), rel=0.1)
        assert gain.item() != expected.item()


def test_document_mask_hides_other_documents(tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    train(tiny("train.document_mask=true", name="masked"))
    packed, masked = losses(plain_run), losses(tmp_path / "masked")
    assert packed != masked
    assert packed == pytest.approx(masked, rel=0.02)


def test_training_computes_the_kernel_of_attention_that_was_decided(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flex attention, which torch refuses to train on a CPU though it can, beside the dense mask of the CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    options = ("train.document_mask=true", "train.steps=3", "qk_clip.tau=0.01", "optimizer.lr=0.001")
    train(tiny(*options, name="dense"))
    calls: list[int] = []
    attend = attention._flex_attention
    monkeypatch.setattr(attention, "_flex_attention", lambda *inputs: calls.append(1) or attend(*inputs))
    monkeypatch.setattr("osp.train.resolve._attention", lambda *_: "flex")
    train(tiny(*options, name="flex"))
    assert len(calls) == 2 * 3 * 4, "layers, steps, micro batches; validation and the sample do without"
    dense, flex = (read_metrics(tmp_path / name) for name in ("dense", "flex"))
    for name in ("train/loss", "train/attn_logit_max", "train/grad_norm", "val/loss"):
        values = [[event[name] for event in events if name in event] for events in (flex, dense)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name
        assert values[0], name


def test_activation_checkpointing_changes_nothing(tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    train(tiny("train.activation_checkpointing=true", name="recomputed"))
    assert losses(plain_run) == losses(tmp_path / "recomputed")


def test_bf16_compute_keeps_fp32_weights_and_follows_fp32(tiny: Tiny, plain_run: Path, tmp_path: Path) -> None:
    train(tiny("train.precision=bf16", name="bf16"))
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "bf16").values())
    torch.testing.assert_close(
        torch.tensor(losses(plain_run)), torch.tensor(losses(tmp_path / "bf16")), atol=0, rtol=5e-3
    )
    assert losses(plain_run) != losses(tmp_path / "bf16")


def test_compiled_blocks_and_loss_change_only_rounding(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []  # number of tokens, and whether gradients are computed

    def token_losses(logits: torch.Tensor, *arguments: Any, grad: bool, **options: Any) -> torch.Tensor:
        calls.append((len(logits), grad))
        return original(logits, *arguments, grad=grad, **options)

    original = loss_module.token_losses
    monkeypatch.setattr(loss_module, "token_losses", token_losses)
    train(tiny("train.steps=3", "train.loss_chunk_tokens=48", name="eager"))
    assert (48, True) in calls
    calls.clear()
    train(tiny("train.steps=3", "train.compile=true", name="compiled"))
    assert {grad for _, grad in calls} == {False}, "only validation computes the loss eagerly"
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "eager")), torch.tensor(losses(tmp_path / "compiled")), atol=0, rtol=1e-4
    )


def test_wandb_failing_does_not_stop_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, metrics: dict[str, float]) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    train(tiny("logger.wandb=offline"))
    assert len(losses(tmp_path / "run")) == 6
    assert "W&B is off from here on" in caplog.text


def test_unreachable_wandb_does_not_block_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its server, W&B's own `finish` returns after hours, if ever."""
    import wandb

    released = threading.Event()

    class Run:
        dir = str(tmp_path / "wandb" / "run-1" / "files")

        def define_metric(self, *_: Any, **__: Any) -> None: ...
        def log(self, metrics: dict[str, float]) -> None: ...
        def finish(self, exit_code: int) -> None:
            released.wait(60)

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    monkeypatch.setattr("osp.run.logger.SECONDS_TO_FINISH", 0.05)
    config = Config(logger=LoggerConfig(wandb="offline", progress=False))
    Logger(tmp_path, config, step=0, total_steps=2).close()
    released.set()
    assert f"`wandb sync {tmp_path / 'wandb' / 'run-1'}` sends it later" in caplog.text


def test_resumed_run_continues_the_same_wandb_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    ids = []

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...
        def log(self, metrics: dict[str, float]) -> None: ...
        def finish(self, exit_code: int) -> None: ...

    def init(**options: Any) -> Run:
        ids.append(options["id"])
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    config = tiny("logger.wandb=offline")
    interrupt_after(3, config)
    train(config)
    assert len(ids) == 2
    assert ids[0] == ids[1]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert manifest["wandb_run_id"] == ids[0]


def test_different_configuration_in_the_same_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny())
    with pytest.raises(
        UserError, match=r"another configuration \(optimizer.lr: 0.01 -> 0.02\); choose another run.name"
    ):
        train(tiny("optimizer.lr=0.02"))
    with pytest.raises(UserError, match="resume=false would overwrite it"):
        train(tiny("resume=false"))


def test_load_model_returns_the_trained_model(plain_run: Path) -> None:
    model = load_model(plain_run)
    assert isinstance(model, Transformer)
    assert model(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, 320)
    from osp import load_model as public

    assert torch.equal(public(plain_run).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("tokens_per_step", "val_tokens", "every"),
    [
        (4_096, 90_112, 367),  # 22 steps' tokens forwards are the work of 7 1/3 steps, a fiftieth of 366.7
        (4_096, 10**9, 4_070),  # eval.tokens bounds it: 10^6 / 4096 / 3 * 50
        (4_194_304, 10**9, 250),
    ],
)
def test_validation_takes_two_percent_of_the_work_by_default(tokens_per_step: int, val_tokens: int, every: int) -> None:
    config = from_dict({"train": {"steps": 10_000, "tokens_per_step": tokens_per_step}})
    assert validation_every(config, val_tokens) == every
    fixed = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=7))
    assert validation_every(fixed, val_tokens) == 7
