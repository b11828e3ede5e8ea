"""Bytes that one rank holds, part by part, computed from shapes.

They describe DeepSpeed 0.19 as `osp.train.engine` configures it; tests compare them with a running engine.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from osp.config import Config
from osp.model.attention import document_mask
from osp.model.transformer import Block, CausalAttention, Transformer
from osp.optim.optimizer import whole_groups
from osp.optim.rules import FP32, ElementwiseRule, Group
from osp.optim.zero import Round, flat_size, rank_intervals
from osp.plan.config import PlanConfig
from osp.train.engine import zero_settings

# DeepSpeed's stage3_param_persistence_threshold, _max_live_parameters and _prefetch_bucket_size, in elements
PERSISTENT, LIVE, PREFETCHED = 100_000, 10**9, 50_000_000


def rank_memory(
    groups: Sequence[Group],
    work: Sequence[Sequence[Round]],
    kept: tuple[int, int],
    options: PlanConfig,
    *,
    stage: int,
    num: int,
    average: bool = False,
) -> dict[str, int]:
    """Return the bytes of the fullest rank at one ZeRO stage, by part, and `peak`.

    work: the rounds of every rank. kept: the result of `activation_bytes`. num: micro batches of a step.
    average: whether there is a running average of the weights.
    """
    world_size, layout = options.world_size, {"world_size": options.world_size, "stage": stage}
    numels = [[shape.numel() for shape in group["shapes"]] for group in groups]
    flats = [flat_size(sizes, **layout) for sizes in numels]
    every = [numel for sizes in numels for numel in sizes]
    flat, total = sum(flats), sum(every)
    settings = zero_settings(stage, world_size=world_size, num_parameters=total, device=torch.device("cuda"))
    bucket = settings["reduce_bucket_size"]
    # the collective works on a copy; a parameter larger than the bucket is sent separately
    buffers = bucket * (2 if settings["overlap_comm"] and stage < 3 else 1) + max(bucket, *every)
    weights, gathered = flat if stage == 3 else world_size * flat, 0
    if stage == 3:
        gradients = reduced = flat
        if world_size > 1:  # a single rank's parts are the whole parameters
            weights += sum(numel for numel in every if numel <= PERSISTENT)
            gathered = min(total, LIVE + PREFETCHED)
    else:
        touched = [0] * world_size  # elements of all parameters that a rank holds a part of
        for counts, rank in itertools.product(numels, range(world_size)):
            indices = {interval.index for interval in rank_intervals(counts, rank=rank, **layout)}
            touched[rank] += sum(counts[index] for index in indices)
        reduced = max(touched)  # their gradients are kept whole
        # stage 2 adds the gradients of a micro batch to the accumulated ones
        gradients = total if stage == 1 else reduced * (2 if num > 1 else 1)
    whole, bf16 = whole_groups(groups), options.machine.bf16
    states, spaces = 0, [round_bytes(whole, one, native_bf16=bf16) for rounds in work for one in rounds]
    for size, rule in zip(flats, (group["update_rule"] for group in groups), strict=True):
        states += size * (len(rule.STATE_NAMES) + average)
        spaces += [rule.ELEMENT_BYTES * size] if isinstance(rule, ElementwiseRule) else []
    sizes = {
        "weights": FP32 * weights,
        "gathered_weights": FP32 * gathered,  # ZeRO-3: whole weights of the layers in use, at most
        "optimizer_state": FP32 * states,
        "gradients": FP32 * gradients,  # while micro batches are accumulated
        "reduction": FP32 * buffers,
        "activations": kept[0],  # kept for the backward pass, bf16 copies of weights included
        "working_set": kept[1],  # on top of them: logits of a chunk, or the backward pass of one block
        "reduced_gradients": FP32 * reduced,  # at the optimizer step
        "update": FP32 * flat + max(spaces),  # at the optimizer step: flat gradients, and the workspace of a rule
        "reserved": int(2**30 * options.machine.reserved),
    }
    backward = FP32 * (buffers + (gradients if num > 1 else 0)) + sum(kept)
    # gradients become flat group by group, and in one buffer are freed together
    copied = flat if settings["contiguous_gradients"] else max(flats)
    most = max(backward, FP32 * (gradients + buffers), FP32 * (reduced + copied), sizes["update"])
    return sizes | {"peak": sizes["reserved"] + FP32 * (weights + gathered + states) + most}


def round_bytes(groups: Sequence[Group], work: Round, *, native_bf16: bool) -> int:
    """Return the most bytes that the update of a round of these groups allocates on a rank.

    The local values, one after another: the exchange to whole parameters; the directions so far and the workspace of
    the next one; the exchange of all directions in fp32.
    """
    held = FP32 * sum(share.num_held for share in work.shares)
    moved = 0 if work.sends is None else FP32 * sum(len(share.owned) * share.numel for share in work.shares)
    most = done = 0
    for share in work.shares:
        group = groups[share.group]
        space, result = group["update_rule"].direction_bytes(group, len(share.owned), native_bf16=native_bf16)
        most, done = max(most, done + space), done + result
    return held + moved + max(most, done + held if moved else 0)


def activation_bytes(config: Config, model: Transformer, *, micro_batch_size: int, compiled: bool) -> tuple[int, int]:
    """Return the bytes kept between forward and backward pass of a micro batch, and the largest working set on top.

    Runs the model on meta tensors. A `compiled` block keeps what the partitioner of torch.compile decides to keep; with
    `activation_checkpointing` every block keeps its input, and one block at a time everything else.
    """
    train = config.train
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.self_attn.attend = FusedAttention()
    ids = torch.empty((micro_batch_size, train.seq_len), dtype=torch.long, device="meta")
    documents = ids if train.document_mask and train.attention != "flex" else None  # flex keeps what flash keeps
    weights = list(model.parameters())
    x, whole = kept(lambda: model.hidden_states(ids, document_ids=documents)[0], besides=weights)
    mask = None if documents is None else document_mask(documents)
    inputs = (x.detach().requires_grad_(), *model.rotary(train.seq_len, x.device), mask)  # of a block
    blocks = [kept(lambda layer=layer: layer(*inputs)[0], besides=weights)[1] for layer in model.layers]
    outside = whole - sum(blocks)
    if compiled:
        # the partitioner of torch.compile decides what is kept; dynamic: a second plan would make symbols of the sizes
        block = torch.compile(model.layers[0], backend="aot_eager_decomp_partition", dynamic=False)
        blocks = [kept(lambda: block(*inputs)[0], besides=[weights, inputs[1:]])[1]] * len(blocks)
    if train.activation_checkpointing:
        blocks = [x.numel() * x.element_size()] * len(blocks) + [max(blocks)]
    if (cap := config.model.attention.logit_cap) is not None and train.attention != "flex":  # blocks of logits count
        model.set_submodule("layers.0.self_attn.attend", CausalAttention(logit_cap=cap))
    loss = peak(lambda: model.lm_head(x.detach().requires_grad_(), ids))
    back = peak(lambda: model.layers[0](*inputs)[0].sum().backward())
    gradients = FP32 * sum(p.numel() for p in model.layers[0].parameters())  # counted with the gradients
    return outside + sum(blocks), max(loss, back - max(blocks) - gradients, 0)


class FusedAttention(CausalAttention):
    """The operators that scaled_dot_product_attention selects on a GPU; on meta tensors they must be named."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].transpose(1, 2)
        bias = torch.zeros_like(mask, dtype=q.dtype).expand(q.shape[0], q.shape[1], *mask.shape[2:])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0].transpose(1, 2)


def kept(forward: Callable[[], Tensor], *, besides: Any) -> tuple[Tensor, int]:
    """Return the result of `forward` and the bytes that autograd keeps for its backward pass, without `besides`."""
    saved: set[torch.UntypedStorage] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for storage in saved - _storages(besides))


def peak(run: Callable[[], object]) -> int:
    """Return the most bytes at a time in the tensors that `run` creates."""
    with _Allocations() as allocations:
        run()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Find the most bytes at a time in storages that operations create inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._alive.update(_storages(out) - inputs)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive))
        return out


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    """Return the storages of all tensors in a tree."""
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
