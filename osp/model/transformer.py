"""The Llama that `osp` trains: RoPE, SwiGLU, grouped-query attention, pre-norm, by default untied and no biases.

Modules and config keys have Hugging Face's names, so export renames nothing. `embed_proj` and `head_proj` are the
learnable projections of OSP; export absorbs them into the embedding and the head.

Parameters are fp32. Each layer casts its weight to the dtype of its input at the matmul, and the embedding's output has
the dtype `Transformer.compute_dtype`. So bf16 training needs neither autocast nor a second copy of the weights.

Dimensions: B batch, T tokens, D hidden, H heads, G key/value heads, K head size, F FFN, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from osp.config import PenaltyConfig
from osp.errors import UserError
from osp.model.attention import KVCache, Mask, apply_rotary, block_mask, causal_attention, document_mask, rotary_table
from osp.model.build_norms import block_norm, final_norm, inner_norm
from osp.model.loss import linear_cross_entropy
from osp.model.norms import Norm
from osp.model.penalty import activation_penalty
from osp.model_config import Heads, ModelConfig, Role, check_model

TRUNCATED_STD = 0.87962566103423978  # standard deviation of a standard normal variable within [-2, 2]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x (..., in), W (out, in) and b (out,) fp32 -> x W^T + b


def affine_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b with W and b in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Module):
    """y = x W^T + b, with W (out, in) and b (out,) cast to the dtype of x.

    In training mode `training_product`, if set, computes y.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.training_product: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self.training_product if self.training and self.training_product is not None else affine_map
        return product(x, self.weight, self.bias)


class CausalAttention(nn.Module):
    """`causal_attention` as a module, so that hooks see q, k and v after RoPE."""

    def __init__(self, *, off_by_one: bool = False, logit_cap: float | None = None):
        super().__init__()
        self.off_by_one, self.logit_cap = off_by_one, logit_cap
        self.largest: Tensor | None = None  # (H,) fp32: raised to the largest logit of each head, in training mode
        self.kernel = "sdpa"  # of `train.attention`, in training mode

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        largest, kernel = (self.largest, self.kernel) if self.training else (None, "sdpa")
        return causal_attention(q, k, v, mask, self.off_by_one, self.logit_cap, largest, kernel)


class ValueGate(nn.Module):
    """v sigmoid(w v + b) with w (K,) and b per key/value head, both 0 at first (value-state gate, arXiv 2510.09017).

    A token that should not be read closes its gate, so no head needs a sink with a value near 0. Cache and site `v`
    hold gated values. w has the role `gain`: to orthogonalize a row is to divide it by its norm, as `normalized` does.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads))

    def forward(self, v: Tensor) -> Tensor:
        gate = (v * self.weight.to(v.dtype).view(v.shape[-2:])).sum(-1) + self.bias.to(v.dtype)
        return v * torch.sigmoid(gate)[..., None]


class Attention(nn.Module):
    """Grouped-query attention. With `attention.gate` the input of o_proj is out * sigmoid(gate(x)), element by element.

    The gate removes the need for attention sinks (arXiv 2505.06708; this is the best position in the paper). It adds a
    matrix of the size of o_proj, which Muon trains like the others. At initialization it is near 1/2.

    `attention.v_scale` multiplies the gradient that flows back through the values, in training mode. The value of a
    sink collects the gradients of all queries, and a massive activation keeps them small behind the norm (arXiv
    2603.17771). The paper's V-scale multiplies v by a function of |v|^2. Used in the backward pass only, it lowers the
    norm of the first token by 68% for 0.014 nats (0.3 B parameters, the authors' reply to reviewers); here the function
    is constant. The factor cancels in Muon's update of v_proj; what acts is the gradient of the residual stream.
    """

    def __init__(self, config: ModelConfig, layer: int = 1):
        super().__init__()
        self.head_dim, self.layer = config.head_size, layer  # counted from 1
        hidden_size, bias = config.hidden_size, config.attention_bias
        query_size, key_size = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = Linear(hidden_size, query_size, bias=bias)
        self.k_proj = Linear(hidden_size, key_size, bias=bias)
        self.v_proj = Linear(hidden_size, key_size, bias=bias)
        self.o_proj = Linear(query_size, hidden_size, bias=bias)
        self.q_norm = inner_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = inner_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.attention_gate = Linear(hidden_size, query_size) if config.attention.gate else None
        self.value_gate = ValueGate(config.kv_heads, self.head_dim) if config.attention.value_gate else None
        self.v_scale = config.attention.v_scale
        self.attend = CausalAttention(off_by_one=config.attention.off_by_one, logit_cap=config.attention.logit_cap)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None = None) -> Tensor:
        # x (B, T, D) -> q (B, T, H, K), k and v (B, T, G, K)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(self.q_norm(q), cos, sin), apply_rotary(self.k_norm(k), cos, sin)
        if self.training and self.v_scale != 1:
            scaled = self.v_scale * v
            v = v.detach() + (scaled - scaled.detach())
        if self.value_gate is not None:
            v = self.value_gate(v)
        if cache is not None:
            k, v = cache.append(self.layer - 1, k, v)
        out = self.attend(q, k, v, mask).flatten(2)  # (B, T, H, K) -> (B, T, H K)
        if self.attention_gate is not None:
            out = out * torch.sigmoid(self.attention_gate(x))
        return self.o_proj(out)


# Activations f of a gated MLP (Shazeer 2020, arXiv 2002.05202) by Hugging Face's names, each with the RMS of f(z) u for
# independent standard normal z and u, which is sqrt(E[f(z)^2]). sigmoid gives the first GLU.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "silu": (F.silu, 0.5965),
    "gelu": (F.gelu, 0.6521),
    "relu2": (lambda x: F.relu(x).square(), 1.2247),
    "sigmoid": (torch.sigmoid, 0.5416),
}


class MLP(nn.Module):
    """y = down(norm(act(gate(x)) * up(x))): SwiGLU by default; the norm only with `ffn_norm`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden_size, ffn_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act, rms = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(hidden_size, ffn_size, bias=bias)
        self.up_proj = Linear(hidden_size, ffn_size, bias=bias)
        self.ffn_norm = inner_norm(config, ffn_size, init=rms) if config.ffn_norm else nn.Identity()
        self.down_proj = Linear(ffn_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (B, T, D) and the input of down_proj (B, T, F)."""
        hidden = self.ffn_norm(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(hidden), hidden


class Block(nn.Module):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x)). The two norms may share a statistic, see osp.model.norms.

    With `norm.placement=peri` a second norm follows each sublayer: x = x + norm(attention(norm(x))).
    """

    def __init__(self, config: ModelConfig, layer: int):  # counted from 1
        super().__init__()
        self.input_layernorm = block_norm(config, layer=layer, before_attention=True)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = block_norm(config, layer=layer, after_attention=True)
        self.mlp = MLP(config)
        peri = config.norm.placement == "peri"
        self.attention_output_layernorm = block_norm(config, layer=layer) if peri else nn.Identity()
        self.mlp_output_layernorm = block_norm(config, layer=layer) if peri else nn.Identity()
        self.penalty: PenaltyConfig | None = None  # in training mode

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream (B, T, D) after the block, and the penalty of the block, None without one."""
        h, carry = self.input_layernorm(x, return_carry=True)
        x = x + self.attention_output_layernorm(self.self_attn(h, cos, sin, mask, cache))
        h, hidden = self.mlp(self.post_attention_layernorm(x, carry))
        x = x + self.mlp_output_layernorm(h)
        if not self.training or self.penalty is None:
            return x, None
        return x, activation_penalty(x if self.penalty.site == "block_out" else hidden, self.penalty)


class Embedding(nn.Module):
    """Look up input ids (B, T) in W (V, D): (B, T, D) in the dtype of W.

    With `scaled` the result is multiplied by a learnable scalar that starts at sqrt(D).
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, scaled: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.scale = nn.Parameter(torch.empty(1)) if scaled else None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.weight)
        return x if self.scale is None else x * self.scale


class Head(Linear):
    """The unembedding. With targets it returns their loss and never holds all logits at once."""

    chunk_tokens = 8192  # tokens whose logits are in memory at a time while the loss is computed
    z_loss = 0.0  # `train.z_loss`, in training mode
    compiled_losses: Callable[..., Tensor] | None = None  # see `linear_cross_entropy`

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        """Return the logits, or with `targets` the pair of `linear_cross_entropy`."""
        if targets is None:
            return super().forward(x)
        x, targets, z_loss = x.flatten(0, -2), targets.flatten(), self.z_loss if self.training else 0.0
        options = {"bias": self.bias, "chunk_tokens": self.chunk_tokens, "compiled": self.compiled_losses}
        return linear_cross_entropy(x, self.weight, targets, z_loss=z_loss, **options)


class Output(NamedTuple):
    """The result of `Transformer.forward`. None: not requested."""

    loss: Tensor | None  # sum over tokens of the cross-entropy in nats, fp32, 0-dim
    logits: Tensor | None  # (B, T, V) in the compute dtype
    penalty: Tensor | None  # sum over tokens of the mean over blocks, before its weight, fp32, 0-dim
    z_loss: Tensor | None = None  # sum over tokens of log(Z)^2, before `Head.z_loss`, fp32, 0-dim


class Transformer(nn.Module):
    """The model: token ids in, an `Output` out.

    Settings are attributes, not arguments: `compute_dtype`, `activation_checkpointing` (training mode keeps the input
    of each block only), the penalty (`set_penalty`), the kernel of attention (`set_attention`), the loss's (`lm_head`).

    With `tie_embeddings` the head has no matrix: `embed_tokens.weight` is the weight of both modules, a parameter of
    one name and role, whose gradient is the sum of the gradients of both uses (Press and Wolf 2016, arXiv 1608.05859).
    It saves V D parameters with their gradient and optimizer state, and no operations.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_model(config)
        self.config = config
        self.compute_dtype = torch.float32
        self.activation_checkpointing = self.flex_attention = False
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(vocab_size, hidden_size, scaled=config.norm.embed_scale)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(1, config.num_hidden_layers + 1))
        self.norm = final_norm(config)
        self.lm_head = Head(hidden_size, vocab_size, bias=config.head_bias)
        if config.embed_proj:
            self.embed_proj = Linear(hidden_size, hidden_size)
            self.head_proj = Linear(hidden_size, hidden_size)
        else:
            self.embed_proj = self.head_proj = nn.Identity()
        self.tie_weights()
        self._rotary: tuple[Tensor, Tensor] | None = None

    def tie_weights(self) -> None:
        """Let the head have the embedding's parameter, if the model is tied."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.tie_weights()  # from the meta device every module gets another parameter
        return self

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,
    ) -> Output:
        """Return the logits, or with `targets` their loss; in training mode also penalty and z-loss, if they are on.

        input_ids: (B, T). targets: (B, T) the next token of each; `IGNORE` leaves a token out of the loss.
        document_ids: (B, T); a token attends only to tokens of the same document. cache: keys and values of the
        preceding tokens; the pass adds its own. wanted: (B,) position of the one token of each sequence whose logits
        (B, 1, V) are returned.
        """
        x, penalty = self.hidden_states(input_ids, document_ids=document_ids, cache=cache)
        if wanted is not None:
            x = x[torch.arange(len(x), device=x.device), wanted][:, None]
        if targets is None:
            return Output(None, self.lm_head(x), penalty)
        loss, squares = self.lm_head(x, targets)
        return Output(loss, None, penalty, squares if self.training and self.lm_head.z_loss else None)

    def hidden_states(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input of the head (B, T, D) and the penalty, None without one."""
        if self.training and self.flex_attention:
            mask = block_mask(torch.zeros_like(input_ids) if document_ids is None else document_ids)
        else:
            mask = None if document_ids is None else document_mask(document_ids)
        if cache is None or cache.positions is None:
            cos, sin = self.rotary(input_ids.shape[1], input_ids.device)
        else:
            mask = cache.mask(cache.positions)
            cos, sin = (table[cache.positions] for table in self.rotary(cache.width, input_ids.device))
        x = self.embed_proj(self.embed_tokens(input_ids).to(self.compute_dtype))
        penalties: list[Tensor] = []
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x, penalty = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x, penalty = layer(x, cos, sin, mask, cache)
            if penalty is not None:
                penalties.append(penalty)
        return self.head_proj(self.norm(x)), torch.stack(penalties).mean() if penalties else None

    def set_penalty(self, config: PenaltyConfig) -> None:
        """Compute the penalty of `config` in training mode; a weight of 0 turns it off."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.penalty = config if config.weight else None

    def set_attention(self, choice: str) -> None:
        """Compute attention in training mode by the kernel that `train.attention` names."""
        self.flex_attention = choice == "flex"
        for module in self.layers.modules():
            if isinstance(module, CausalAttention):
                module.kernel = choice

    def use_in_blocks(self, product: Product) -> None:
        """Compute x W^T + b of every matrix in the blocks by `product` in training mode."""
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.training_product = product

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin (T, K / 2) of the first `length` positions, from a cached table."""
        if self._rotary is None or self._rotary[0].device != device or self._rotary[0].shape[0] < length:
            config = self.config
            # not all positions at once: a configuration may allow millions, which take gigabytes
            positions = max(length, min(config.max_position_embeddings, max(2 * length, 2**16)))
            self._rotary = rotary_table(config.head_size, positions, config.rope_theta, device, config.rope_scaling)
        cos, sin = self._rotary
        return cos[:length], sin[:length]

    def parameter_roles(self) -> dict[str, Role]:
        """Return the role of every parameter by name. The optimizer derives groups and update rules from it."""
        modules: dict[str, Role] = {"embed_tokens": "embedding", "lm_head": "head"}
        modules |= {"embed_proj": "embed_proj", "head_proj": "embed_proj"}
        return {
            name: modules.get(name.split(".")[0], "matrix") if parameter.ndim == 2 else "gain"
            for name, parameter in self.named_parameters()
        }

    def parameter_heads(self) -> dict[str, Heads]:
        """Return how the matrices of attention divide into heads, by name, for `optimizer.per_head`."""
        heads, groups = self.config.num_attention_heads, self.config.kv_heads
        kinds = {"q_proj": Heads(heads, 0), "attention_gate": Heads(heads, 0), "o_proj": Heads(heads, 1)}
        kinds |= {"k_proj": Heads(groups, 0), "v_proj": Heads(groups, 0)}
        return {
            name: kinds[name.split(".")[-2]]
            for name, parameter in self.named_parameters()
            if parameter.ndim == 2 and name.split(".")[-2] in kinds
        }

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialize every parameter and buffer.

        Matrices, embedding and head are normal with standard deviation `initializer_range` (1/sqrt(D) by default),
        EmbProj matrices are orthogonal, biases are 0, and norms reset themselves. With `init=fan_in` matrices and head
        are normal with deviation 1/sqrt(inputs), cut off at two deviations and rescaled (LeCun et al. 1998; the default
        of Flax's Dense layers, hence of OSP's example code). Values are drawn on the CPU and depend only on the seed
        and the shapes, so every device and rank starts from the same model. A tied matrix starts as the embedding.
        """
        config = self.config
        std = config.initializer_range or 1 / math.sqrt(config.hidden_size)
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, Linear | Embedding):
                values = torch.empty(module.weight.shape)
                if name in ("embed_proj", "head_proj"):
                    nn.init.orthogonal_(values, generator=generator)
                else:
                    residual_output = config.scale_residual_init and name.endswith(("o_proj", "down_proj"))
                    scale = 1 / math.sqrt(2 * config.num_hidden_layers) if residual_output else 1.0
                    if config.init == "fan_in" and isinstance(module, Linear):
                        parent = scale / math.sqrt(values.shape[1]) / TRUNCATED_STD  # before it is cut off
                        nn.init.trunc_normal_(values, 0.0, parent, -2 * parent, 2 * parent, generator=generator)
                    else:
                        values.normal_(0.0, std * scale, generator=generator)
                if module is not self.lm_head or not config.tie_embeddings:
                    module.weight.copy_(values)
                if isinstance(module, Linear) and module.bias is not None:
                    module.bias.zero_()
                if isinstance(module, Embedding) and module.scale is not None:
                    module.scale.fill_(math.sqrt(config.hidden_size))
            elif isinstance(module, Norm):
                module.reset_parameters()
            elif isinstance(module, ValueGate):
                module.load_state_dict({name: torch.zeros_like(p) for name, p in module.named_parameters()})
        self.refresh_norms()

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Recompute the statistics that norms derive from weights. Under ZeRO-3 gather the parameters first."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            norm, attention = layer.post_attention_layernorm, layer.self_attn
            if norm.refreshes:
                norm.refresh(attention.v_proj.weight, attention.o_proj.weight, head_dim=attention.head_dim)

    @property
    def has_norm_statistics(self) -> bool:
        """Whether `refresh_norms` does anything."""
        return any(isinstance(module, Norm) and module.refreshes for module in self.layers.modules())


def build_model(config: ModelConfig, *, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """Return an initialized `Transformer`, allocated directly on `device`."""
    model = meta_model(config).to_empty(device=device)
    model.init_weights(seed)
    return model


def meta_model(config: ModelConfig) -> Transformer:
    """Return the model of `config` on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Transformer(config)


def check_finite(model: nn.Module, path: object) -> None:
    """Raise `UserError` that names the first weight or buffer of the model at `path` that is not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
            raise UserError(f"{path}: {name} holds infinity or nan; take an older checkpoint or other weights")


def parameter_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shape of every parameter by name, as the manifest of a checkpoint records it."""
    return {name: list(parameter.shape) for name, parameter in meta_model(config).named_parameters()}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by role, and the `total`."""
    model = meta_model(config)
    counts: Counter[str] = Counter()
    roles = model.parameter_roles()
    for name, parameter in model.named_parameters():
        counts[roles[name]] += parameter.numel()
    return {**counts, "total": counts.total()}


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the floating point operations of one training token, forward and backward: 6 N + 6 L T H K.

    N is the number of weights in matrix products: all matrices and the head, tied or not, but no lookup or gain. The
    rest is causal attention: per layer two products with T/2 keys on average in H heads of size K, at 2 flops, 3 times.
    """
    counts = count_parameters(config)
    head = "embedding" if config.tie_embeddings else "head"
    weights = sum(counts.get(role, 0) for role in ("matrix", "embed_proj", head))
    attention = config.num_hidden_layers * seq_len * config.num_attention_heads * config.head_size
    return 6 * weights + 6 * attention
