"""Quantization written down value by value in float64, and a Llama that uses it, independent of osp.quant.grid."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from osp.model.attention import rotary_table
from osp.model.transformer import Block, Transformer, build_model
from osp.model_config import ModelConfig, NormConfig
from osp.quant.spec import QuantSpec


def naive_grid(values: list[float], bits: int, symmetric: bool) -> tuple[float, int, int, int]:
    """Return (scale, zero, lowest level, highest level) of the grid that reaches the extremes."""
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return (max(abs(v) for v in values) / high or 1.0), 0, low, high
    least, most = min(0.0, *values), max(0.0, *values)
    scale = (most - least) / (2**bits - 1) or 1.0
    return scale, round(-least / scale), 0, 2**bits - 1


def naive_levels(values: list[float], bits: int, symmetric: bool, clip: bool) -> tuple[list[int], float, int]:
    """Return (integer of each value, scale, zero)."""

    def levels(scale: float) -> list[int]:
        return [min(max(round(v / scale) + zero, low), high) for v in values]

    def error(scale: float) -> float:
        return sum(abs(scale * (n - zero) - v) ** 2.4 for n, v in zip(levels(scale), values, strict=True))

    full, zero, low, high = naive_grid(values, bits, symmetric)
    scale = min((full * (1 - i / 100) for i in range(80 if clip else 1)), key=error)
    return levels(scale), scale, zero


def naive_quantize(
    x: np.ndarray, bits: int, *, symmetric: bool, group_size: int | None = None, clip: bool = False
) -> np.ndarray:
    """Return x (rows, channels) with every group of channels of every row on its grid."""
    size = group_size or x.shape[1]
    out = np.empty_like(x)
    for r in range(x.shape[0]):
        for c in range(0, x.shape[1], size):
            levels, scale, zero = naive_levels(x[r, c : c + size].tolist(), bits, symmetric, clip)
            out[r, c : c + size] = [scale * (n - zero) for n in levels]
    return out


def sylvester(n: int) -> np.ndarray:
    """Return (n, n) with entries (-1)^(number of common binary digits of i and j) / sqrt(n); n is a power of two."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / math.sqrt(n)


def naive_logits(model: Transformer, ids: list[int], spec: QuantSpec, sites: Collection[str]) -> np.ndarray:
    """Return the logits (T, V) of a sequence, quantized only at `sites`; for rmsnorm and an unrotated stream."""
    config = model.config
    size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    eps = 1e-6

    def weight(name: str) -> np.ndarray:
        value = w[f"{name}.weight"]
        site = name.split(".")[-1]
        if site == "down_proj" and ffn_rotated:
            value = value @ sylvester(config.intermediate_size)
        if site not in sites:
            return value
        return naive_quantize(
            value, spec.w_bits, symmetric=spec.w_symmetric, group_size=spec.w_group_size, clip=spec.w_clip
        )

    def activation(site: str, x: np.ndarray, group_size: int | None = spec.a_group_size) -> np.ndarray:
        if site not in sites:
            return x
        return naive_quantize(x, spec.a_bits, symmetric=spec.a_symmetric, group_size=group_size)

    def cache(site: str, x: np.ndarray) -> np.ndarray:
        """Return the quantized x (T, K) of one head."""
        if site not in sites:
            return x
        return naive_quantize(x, spec.kv_bits, symmetric=spec.kv_symmetric, group_size=spec.kv_group_size)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def rope(x: np.ndarray) -> np.ndarray:
        cos, sin = (part.double().numpy() for part in rotary_table(size, len(x), config.rope_theta, "cpu"))
        turned = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * (cos + 1j * sin)
        return np.concatenate((turned.real, turned.imag), axis=1)

    ffn_rotated = spec.ffn_hadamard and bool({"down_proj", "down_proj_in"} & set(sites))
    qk_rotated = spec.qk_hadamard and "k" in sites
    turn = sylvester(size) if qk_rotated else np.eye(size)
    x = weight("embed_tokens")[ids]
    for i in range(config.num_hidden_layers):
        h = activation("attn_in", norm(f"layers.{i}.input_layernorm", x))
        q, k, v = (h @ weight(f"layers.{i}.self_attn.{name}").T for name in ("q_proj", "k_proj", "v_proj"))
        columns: list[Any] = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            q_h = rope(q[:, head * size : (head + 1) * size]) @ turn
            k_h = cache("k", rope(k[:, kv * size : (kv + 1) * size]) @ turn)
            v_h = v[:, kv * size : (kv + 1) * size]
            if config.attention.value_gate:
                w_h, b_h = (w[f"layers.{i}.self_attn.value_gate.{part}"] for part in ("weight", "bias"))
                v_h = v_h / (1 + np.exp(-(v_h @ w_h[kv * size : (kv + 1) * size] + b_h[kv])))[:, None]
            v_h = cache("v", v_h)
            scores = q_h @ k_h.T / math.sqrt(size)
            if cap := config.attention.logit_cap:
                scores = cap * np.tanh(scores / cap)
            scores = np.where(np.tri(len(ids)) == 1, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            more = np.exp(-scores.max(-1, keepdims=True)) if config.attention.off_by_one else 0
            columns.append(p / (more + p.sum(-1, keepdims=True)) @ v_h)
        out = np.concatenate(columns, axis=1)
        if config.attention.gate:
            out = out / (1 + np.exp(-h @ weight(f"layers.{i}.self_attn.attention_gate").T))
        o = activation("o_proj_in", out, size if spec.o_proj_by_head else None)
        x = x + o @ weight(f"layers.{i}.self_attn.o_proj").T
        h = activation("mlp_in", norm(f"layers.{i}.post_attention_layernorm", x))
        gate = h @ weight(f"layers.{i}.mlp.gate_proj").T
        f = gate / (1 + np.exp(-gate)) * (h @ weight(f"layers.{i}.mlp.up_proj").T)
        if config.ffn_norm:
            f = norm(f"layers.{i}.mlp.ffn_norm", f)
        f = activation("down_proj_in", f @ sylvester(config.intermediate_size) if ffn_rotated else f)
        x = x + f @ weight(f"layers.{i}.mlp.down_proj").T
    return activation("head_in", norm("norm", x)) @ weight("lm_head").T


def outlier_model(*, seed: int = 0, **shape: Any) -> Transformer:
    """Return a small Llama in float64 with grouped queries, gains that differ and one large channel."""
    values = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "norm": NormConfig(name="rmsnorm"),
        **shape,
    }
    model = build_model(ModelConfig(**values), seed=seed).double().eval()
    model.compute_dtype = torch.float64
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=draw) + 0.5)
        model.embed_tokens.weight[:, 3] *= 8
        for layer in model.layers:
            assert isinstance(layer, Block)
            layer.mlp.up_proj.weight[5] *= 8
    return model


def some_tokens(count: int, length: int, *, seed: int = 0, vocab_size: int = 96) -> torch.Tensor:
    return torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
