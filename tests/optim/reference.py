"""A small model with one parameter of every kind, and the paper's optimizer as a plain loop in one process.

An oracle for the partitioned optimizer, written from the paper without `osp.optim`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.model_config import Heads

VOCAB, HIDDEN, WIDE, ODD = 11, 8, 24, (5, 7)
ROWS, TOKENS = 16, 6


class Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.weight.ndim == 2 else x * self.weight


class Block(nn.Module):
    """A square matrix, a vector gain, a scalar gain and a matrix whose number of elements is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.gain, self.scale, self.odd = Weight(HIDDEN, HIDDEN), Weight(HIDDEN), Weight(1), Weight(*ODD)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.square(self.gain(x)))
        return x + F.pad(self.odd(self.scale(x)[..., : ODD[1]]), (0, HIDDEN - ODD[0]))


class Model(nn.Module):
    """5 square, 5 odd, 2 tall, 1 wide matrix: counts that 2 and 4 ranks do not divide, and fewer than 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
        self.up, self.gate, self.down = Weight(WIDE, HIDDEN), Weight(WIDE, HIDDEN), Weight(HIDDEN, WIDE)
        self.head = Weight(VOCAB, HIDDEN)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.4 if parameter.ndim == 2 else 1 + 0.1 * noise)

    def parameter_roles(self) -> dict[str, str]:
        kinds = {"embedding": "embedding", "head": "head"}
        return {
            name: kinds.get(name.split(".")[0], "matrix" if parameter.ndim == 2 else "gain")
            for name, parameter in self.named_parameters()
        }

    def parameter_heads(self) -> dict[str, Heads]:
        """Return 2 heads for the output of square matrices, 6 for `gate`, and 3 for the input of `down`."""
        squares = {f"blocks.{i}.square.weight": Heads(2, 0) for i in range(5)}
        return {**squares, "gate.weight": Heads(6, 0), "down.weight": Heads(3, 1)}

    def forward(self, ids: Tensor) -> Tensor:
        """Return the sum of the token losses; label -100 does not count. ids: (B, 2, T), inputs and labels"""
        x = self.embedding(ids[:, 0])
        for block in self.blocks:
            x = block(x)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids[:, 1].flatten(), reduction="sum", ignore_index=-100)


class OneRole:
    """Parameters of one role, as a model for `build_groups`. heads: matrices that divide into heads, by name."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], role: str = "matrix", heads: dict[str, Heads] | None = None
    ):
        self.parameters, self.role, self.heads = parameters, role, heads or {}

    def parameter_roles(self) -> dict[str, str]:
        return dict.fromkeys(self.parameters, self.role)

    def parameter_heads(self) -> dict[str, Heads]:
        return self.heads

    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.parameters.items())


def batch(step: int) -> tuple[Tensor, int]:
    """Return the sequences (ROWS, 2, T) of a step and the number of valid labels, which differs between sequences."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCAB, (ROWS, 2, TOKENS), generator=generator)
    ids[:, 1][torch.rand(ROWS, TOKENS, generator=generator) < torch.linspace(0, 0.8, ROWS)[:, None]] = -100
    return ids, int((ids[:, 1] >= 0).sum())


def factor(step: int) -> float:
    return 1.0 - 0.1 * step


def train(
    *,
    steps: int,
    clip: float,
    lr: float,
    adam_lr: float,
    decay: float,
    gain_decay: float | None = None,
    per_head: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights by name and gradient norms after plain training. per_head: each head is one matrix."""
    model, norms = Model(), []
    state: dict[str, list[Tensor]] = {
        name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()
    }
    roles, heads = model.parameter_roles(), model.parameter_heads() if per_head else {}
    for step in range(steps):
        ids, count = batch(step)
        model.zero_grad()
        (model(ids) / count).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()))
        shrink = min(1.0, clip / (norms[-1] + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = grads[name] * shrink
                wd = decay if gain_decay is None or roles[name] != "gain" else gain_decay
                if roles[name] in ("matrix", "gain"):
                    count, dim = heads.get(name, (1, 0))
                    blocks = zip(g.chunk(count, dim), state[name][0].chunk(count, dim), strict=True)
                    direction = torch.cat([osp_direction(*block) for block in blocks], dim)
                    p -= lr * factor(step) * (direction + wd * p)
                else:
                    p -= adam_lr * factor(step) * (adam_direction(g, state[name], step + 1) + wd * p)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def osp_direction(g: Tensor, buf: Tensor) -> Tensor:
    buf.copy_(g + 0.95 * buf)
    u = g + 0.95 * buf
    if u.ndim < 2:
        return 0.2 * max(u.shape) ** 0.5 * u / (u.norm() + 1e-8)
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * max(u.shape) ** 0.5 * (x.T if u.shape[0] > u.shape[1] else x)


def adam_direction(g: Tensor, state: list[Tensor], step: int) -> Tensor:
    state[0].copy_(0.9 * state[0] + 0.1 * g)
    state[1].copy_(0.95 * state[1] + 0.05 * g * g)
    return (state[0] / (1 - 0.9**step)) / ((state[1] / (1 - 0.95**step)).sqrt() + 1e-8)
