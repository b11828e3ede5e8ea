"""Training, quantization, generation and the probe on a device, compared with float64 on a CPU.

Every function returns a relative error and every limit is in this file, so the same comparison serves all devices:
`test_device_checks.py` runs some of them on a CPU and with planted faults, `test_gpu.py` runs all of them on a GPU.
"""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from osp.config import MonitorConfig, OptimizerConfig, PenaltyConfig
from osp.evaluation.perplexity import Text, perplexity
from osp.model.generate import Decoder
from osp.model.loss import IGNORE, fused_token_losses, linear_cross_entropy
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig, NormConfig, RopeScaling
from osp.monitor.probe import ProbeText, probe
from osp.optim.groups import build_groups
from osp.optim.muon import newton_schulz
from osp.optim.optimizer import PartitionedOptimizer
from osp.quant.apply import quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.gptq import gptq
from osp.quant.hadamard import hadamard_matrix, hadamard_transform
from osp.quant.qat import Rounding
from osp.quant.spec import QuantSpec
from tests.conftest import ROOT
from tests.optim.reference import adam_direction, osp_direction

CPU = torch.device("cpu")
VOCAB, T = 512, 64
SSNORM, RMSNORM = NormConfig("ssnorm"), NormConfig("rmsnorm")
VARIANTS: dict[str, dict[str, Any]] = {
    "ssnorm, projections": {"norm": SSNORM, "embed_proj": True},
    "rmsnorm, grouped queries": {"norm": RMSNORM, "num_key_value_heads": 2},
    "layernorm, biases": {
        "norm": NormConfig("layernorm", bias=True), "attention_bias": True, "mlp_bias": True, "head_bias": True
    },
    "crmsnorm, tied": {"norm": NormConfig("crmsnorm"), "tie_embeddings": True},
    "bhyt": {"norm": NormConfig("bhyt", seq_len=T, lns=True)},
    "bhyt_star": {"norm": NormConfig("bhyt_star")},
    "dyt, scaled embedding": {"norm": NormConfig("dyt", embed_scale=True)},
    "derf": {"norm": NormConfig("derf")},
    "peri, lns": {"norm": NormConfig("rmsnorm", placement="peri", lns=True)},
    "inner norms": {"norm": SSNORM, "qk_norm": True, "ffn_norm": True},
    "gate": {"norm": SSNORM, "attention": AttentionConfig(gate=True)},
    "value gate": {"norm": SSNORM, "attention": AttentionConfig(value_gate=True, v_scale=0.5)},
    "off by one": {"norm": SSNORM, "attention": AttentionConfig(off_by_one=True)},
    "capped": {"norm": SSNORM, "attention": AttentionConfig(logit_cap=1.0)},
    "all of attention": {
        "norm": SSNORM, "qk_norm": True, "num_key_value_heads": 2,
        "attention": AttentionConfig(gate=True, off_by_one=True, logit_cap=1.0, v_scale=0.5, value_gate=True),
    },
    "relu2, long context": {"norm": RMSNORM, "hidden_act": "relu2", "rope_scaling": RopeScaling("llama3", 8.0)},
}  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16)
# Several times the errors on a CPU. A derf model in bf16 has the largest, 0.17.
MODEL_LIMIT = {torch.float32: 2e-4, torch.bfloat16: 0.25}
CACHE_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 0.06}
ORTHOGONAL_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}
LOSS_LIMIT, OPTIMIZER_LIMIT, PROBE_LIMIT, QUANTIZATION_LIMIT = 1e-5, 3e-4, 5e-3, 0.03
SHAPES = ((6, 128, 128), (3, 128, 344), (3, 344, 128))  # of matrices that Newton-Schulz orthogonalizes
PRESETS = ("strict", "osp_paper", "hadamard", "gptq", "quarot", *DEPLOYED)


def config_of(name: str) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 2 * T,
    }  # fmt: skip
    return ModelConfig(**shape | VARIANTS[name])


def spec_of(preset: str) -> QuantSpec:
    if preset in DEPLOYED:
        return DEPLOYED[preset]
    return QuantSpec(**yaml.safe_load((ROOT / "configs" / "quant" / f"{preset}.yaml").read_text(encoding="utf-8")))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequences(count: int = 3) -> tuple[Tensor, Tensor]:
    """Return token ids and document ids, (count, T) each."""
    ids = torch.randint(0, VOCAB, (count, T), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(T).div(20, rounding_mode="floor").expand(count, -1).to(torch.int32)


@torch.no_grad()
def make_lively(model: Transformer) -> Transformer:
    """Change gains and biases: ones and zeros hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "embed_tokens" not in name:
            parameter.add_(0.3 * draw(*parameter.shape).to(parameter.device))
    model.refresh_norms()
    return model


def model_and_oracle(name: str, device: torch.device) -> tuple[Transformer, Transformer]:
    """Return a model that was built on `device`, and the same weights in float64 on the CPU."""
    model = make_lively(build_model(config_of(name), seed=0, device=device))
    return model, in_float64(model)


def build_deep(num_layers: int, device: torch.device) -> Transformer:
    """Return a model of `num_layers` blocks with every kind of norm, gate and bias that a probe looks at."""
    config = dataclasses.replace(config_of("all of attention"), num_hidden_layers=num_layers, ffn_norm=True)
    return build_model(config, seed=0, device=device)


def in_float64(model: Transformer) -> Transformer:
    oracle = copy.deepcopy(model).to("cpu").double()
    oracle.compute_dtype = torch.float64
    return oracle


def relative_error(got: Tensor, want: Tensor, *, unit: Tensor | None = None) -> float:
    """Return |got - want| / |unit|; unit: None for `want`."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    unit = want if unit is None else unit.detach()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(unit).clamp(min=1e-30))


def train_once(model: Transformer, ids: Tensor, documents: Tensor | None) -> dict[str, Tensor]:
    """Return what one training step of a model gives: losses, largest logits of heads and every gradient."""
    model.train().zero_grad(set_to_none=True)
    model.set_penalty(PenaltyConfig(weight=0.1, scale="rms"))
    model.lm_head.z_loss, model.lm_head.chunk_tokens = 1e-3, 100
    found: dict[str, Any] = {}
    for number, block in enumerate(model.layers):
        assert isinstance(block, Block)
        largest = torch.full((model.config.num_attention_heads,), -torch.inf, device=ids.device)
        found[f"largest logits of layer {number}"] = block.self_attn.attend.largest = largest
    output = model(ids, ids.roll(-1, 1), document_ids=documents)
    (output.loss + 0.1 * output.penalty).backward()
    found |= {"loss": output.loss, "penalty": output.penalty, "z_loss": output.z_loss}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.numel() > 1}
    # the terms of a scalar's gradient may cancel, so all scalars share one unit
    scalars: list[Any] = [parameter.grad for parameter in model.parameters() if parameter.numel() == 1]
    return found | ({"scalars": torch.cat(scalars)} if scalars else {})


def model_error(
    name: str, device: torch.device, dtype: torch.dtype, *, documents: bool = False, compiled: bool = False,
    checkpointing: bool = False, attention: str = "sdpa",
) -> float:  # fmt: skip
    """Return the largest error of a loss, a gradient or a head's largest logit of a variant in training.

    compiled: blocks and loss. attention: as in `train.attention`.
    """
    from torch._dynamo.utils import counters  # takes a second

    model, oracle = model_and_oracle(name, device)
    ids, document_ids = sequences()
    want = train_once(oracle, ids, document_ids if documents else None)
    model.compute_dtype, model.activation_checkpointing = dtype, checkpointing
    if compiled:
        torch._dynamo.reset()  # else code of earlier models may have used up the limit of recompilations
        counters.clear()
        for layer in model.layers:
            layer.compile()
        model.lm_head.compiled_losses = torch.compile(fused_token_losses, dynamic=False)
    model.set_attention(attention)
    got = train_once(model, ids.to(device), document_ids.to(device) if documents else None)
    assert not compiled or counters["stats"]["unique_graphs"] >= 1
    assert got.keys() == want.keys()
    errors = {key: relative_error(got[key], want[key]) for key in want}
    return max(errors.values())


def loss_error(device: torch.device, *, fused: bool = False) -> float:
    """Return the error of the loss in chunks, its z-loss and the gradients of their sum, in fp32.

    fused: by the function that training compiles, here not compiled.
    """
    x, weight, bias = draw(300, 64), draw(1000, 64, seed=1) / 8, draw(1000, seed=2)
    targets = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(3))
    targets[::7] = IGNORE
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    logits = F.linear(*leaves)
    losses = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    squares = logits.logsumexp(-1)[targets != IGNORE].square().sum()
    (losses + 0.01 * squares).backward()
    copies = [value.to(device, copy=True).requires_grad_() for value in (x, weight, bias)]
    options: dict[str, Any] = {"bias": copies[2], "chunk_tokens": 77, "z_loss": 0.01}
    options |= {"compiled": fused_token_losses} if fused else {}
    found = linear_cross_entropy(copies[0], copies[1], targets.to(device), **options)
    found[0].backward()
    pairs: list[Any] = [(found[0], losses), (found[1], squares)]
    pairs += [(copy.grad, leaf.grad) for copy, leaf in zip(copies, leaves, strict=True)]
    return max(relative_error(got, want) for got, want in pairs)


def newton_schulz_error(device: torch.device, *, method: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    """Return the error against U p(S) V^T by the singular values."""
    x = draw(*shape)
    u, singular, vt = torch.linalg.svd(x.double(), full_matrices=False)
    singular = singular / (torch.linalg.vector_norm(singular, dim=-1, keepdim=True) + 1e-8)
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    want = (u * singular[..., None, :]) @ vt
    return relative_error(newton_schulz(x.to(device), method=method, dtype=dtype), want)


def optimizer_error(
    device: torch.device, *, per_head: bool = False, method: Any = "standard", compiled: bool = False
) -> float:
    """Return the largest error of a parameter's change after three steps of every rule, against the formulas."""
    model = make_lively(build_model(config_of("ssnorm, projections"), seed=0))
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, ns_dtype="fp32", ns_method=method, per_head=per_head)
    optimizer = PartitionedOptimizer(build_groups(model, config), compiled=compiled)
    heads, clip = model.parameter_heads() if per_head else {}, 0.75
    start = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    want = {name: value.clone() for name, value in start.items()}
    state = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in start.items()}
    flats = []
    for group in optimizer.param_groups:
        flat = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        flats.append(F.pad(flat, (0, flat.numel() % 2)).to(device))
        group["params"] = [flats[-1]]
    optimizer.bind(flats, stage=1)
    for number in range(1, 4):
        gradients = {name: draw(*value.shape, seed=7 * number + i) for i, (name, value) in enumerate(start.items())}
        for group, flat in zip(optimizer.param_groups, flats, strict=True):
            gradient = torch.cat([gradients[name].flatten() for name in group["names"]])
            flat.grad = F.pad(gradient, (0, flat.numel() - gradient.numel())).to(device)
            for name in group["names"]:
                g, p = clip * gradients[name].double(), want[name]
                if group["rule"] == "adamw":
                    direction = adam_direction(g, state[name], number)
                else:
                    count, dim = heads.get(name, (1, 0))
                    blocks = zip(g.chunk(count, dim), state[name][0].chunk(count, dim), strict=True)
                    direction = torch.cat([osp_direction(*block) for block in blocks], dim)
                p -= config.lr * (direction + config.weight_decay * p)
        optimizer.set_step(number, 1.0, clip=clip, record=True)
        optimizer.step()
    got = {name: tensors["weight"].cpu() for name, _, _, tensors in optimizer.local_state()}
    return max(relative_error(got[name].view_as(p), p, unit=p - start[name]) for name, p in want.items())


def probe_error(device: torch.device, name: str = "ssnorm, projections", *, documents: bool = True) -> float:
    """Return the largest error of a figure of the probe, but for figures that turn on the rounding of one value."""
    model, oracle = model_and_oracle(name, device)
    tokens, document_ids = sequences(2)
    text, config = ProbeText(tokens, document_ids if documents else None), MonitorConfig(sites="all", statistics="all")
    got, want = probe(model, text, config), probe(oracle, text, config)
    assert got.metrics.keys() == want.metrics.keys()
    for site, reading in want.sites.items():
        place = ("channel", "row", "position", "token", "top_channel")
        assert [getattr(got.sites[site], key) for key in place] == [getattr(reading, key) for key in place], site
    discrete = ("R_L", "massive_count", "max_over_median")
    return max(
        abs(got.metrics[key] - value) / max(abs(value), 0.05)
        for key, value in want.metrics.items()
        if key.split("/")[1] not in discrete
    )


@torch.no_grad()
def quantization_error(device: torch.device, preset: str) -> float:
    """Return | |q' - y| / |q - y| - 1 |: logits q' on the device, q and y in float64, y without quantization.

    q' - q itself may be as large as q - y: one activation that is rounded to the other neighbour changes all the later
    ones. The size of the error is an average over all of them.
    """
    model, oracle = model_and_oracle("ssnorm, projections", device)
    ids, spec = sequences(8)[0], spec_of(preset)
    plain = oracle(ids).logits
    with quantized(oracle, spec, calibration=ids):
        unit = oracle(ids).logits - plain
    with quantized(model, spec, calibration=ids.to(device)):
        return abs(relative_error(model(ids.to(device)).logits, plain, unit=unit) - 1)


def qat_error(device: torch.device, scheme: str) -> float:
    """Return the same of all gradients in quantization-aware training."""
    model, oracle = model_and_oracle("ssnorm, projections", device)
    plain = gradients(oracle)
    Rounding(oracle, DEPLOYED[scheme])
    Rounding(model, DEPLOYED[scheme])
    return abs(relative_error(gradients(model), plain, unit=gradients(oracle) - plain) - 1)


def gradients(model: Transformer) -> Tensor:
    """Return all gradients of a step as one vector, on the CPU."""
    found = train_once(model, sequences()[0].to(model.embed_tokens.weight.device), None)
    return torch.cat([found[name].double().flatten().cpu() for name in found if "." in name])


@torch.no_grad()
def gptq_error(device: torch.device, **options: Any) -> float:
    """Return by how much GPTQ's objective differs from the one that float64 inputs give on a CPU, relative to it."""
    mixing = torch.eye(300) + draw(300, 300, seed=1) / 300**0.5
    weight, x = draw(64, 300, seed=2), draw(1200, 300, seed=3) @ mixing
    spec, hessian = QuantSpec(w_bits=4, method="gptq", **options), x.double().T @ x.double()

    def objective(rounded: Tensor) -> float:
        error = weight.double() - rounded.double().cpu()
        return float((error @ hessian * error).sum())

    want = objective(gptq(weight.double(), hessian, spec))
    return abs(objective(gptq(weight.to(device), hessian.float().to(device), spec)) / want - 1)


def hadamard_error(device: torch.device, size: int) -> float:
    x = draw(50, size)
    return relative_error(hadamard_transform(x.to(device)), x.double() @ hadamard_matrix(size))


def perplexity_error(device: torch.device) -> float:
    model, oracle = model_and_oracle("rmsnorm, grouped queries", device)
    ids = sequences(16)[0].flatten()
    text = Text("random", ids, torch.ones_like(ids, dtype=torch.int32), sha256="")
    logits = oracle(ids.view(-1, T)).logits[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), ids.view(-1, T)[:, 1:].flatten())
    found = perplexity(model, text, seq_len=T, batch_tokens=200)
    return relative_error(torch.tensor(found.loss), want)


@torch.no_grad()
def generation_error(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, *, compile: bool = False
) -> float:
    """Return the error of the logits of 12 tokens after two prompts, against passes without a cache."""
    model, oracle = model_and_oracle(name, device)
    model.compute_dtype = dtype
    ids = sequences(2)[0]
    prompts = [ids[0, :9].tolist(), ids[1, :5].tolist()]
    if compile:
        torch._dynamo.reset()
    decoder = Decoder(model.eval(), 2, 24, compile=compile)
    got = [decoder.read(prompts).clone()]
    texts = [list(prompt) for prompt in prompts]
    for step in range(12):
        tokens = ids[:, 20 + step]
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        got.append(decoder.read_next(tokens.to(device)).clone())
    logits = [
        oracle(torch.tensor([text])).logits[0, len(prompt) - 1 :] for prompt, text in zip(prompts, texts, strict=True)
    ]
    return relative_error(torch.stack(got, 1), torch.stack(logits))
