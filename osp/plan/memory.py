"""Bytes that one rank holds, part by part, from shapes alone: those of DeepSpeed, of our optimizer and of autograd.

The parts are those of DeepSpeed 0.19 with fp32 weights and gradients, as `osp.train.engine` sets it up; tests hold them
against the tensors of a running engine. B micro batch, T tokens of a row, D hidden, V vocabulary, W ranks.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from osp.config import Config
from osp.model.transformer import Block, CausalAttention, Transformer
from osp.optim.rules import FP32, Group
from osp.optim.zero import Batch, flat_size, rank_intervals
from osp.train.engine import deepspeed_config

# DeepSpeed's stage3_param_persistence_threshold, _max_live_parameters and _prefetch_bucket_size, in elements
PERSISTENT, LIVE, PREFETCHED = 100_000, 10**9, 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most, by part, and at the moments when most of them are there together."""

    weights: int
    gathered_weights: int  # ZeRO-3: whole ones of the layers at work
    optimizer_state: int
    gradients: int  # while micro batches are accumulated
    reduction: int  # buffers on the way to other ranks
    activations: int  # kept for the backward pass, bf16 copies of weights included
    working_set: int  # on top of them: logits of a chunk, or what one block makes on its way back
    reduced_gradients: int  # at the optimizer step: of every parameter that this rank holds a part of, whole
    update: int  # at the optimizer step: a flat gradient, and the exchange and Newton-Schulz of one batch

    def backward(self, *, accumulated: bool) -> int:
        """When the loss is taken or the last block goes back; its gradients are there if batches came before."""
        gradients = self.gradients if accumulated else 0
        return self._lasting + gradients + self.reduction + self.activations + self.working_set

    @property
    def reduce(self) -> int:
        """At the end of the last backward pass."""
        return self._lasting + self.gradients + self.reduction

    @property
    def step(self) -> int:
        return self._lasting + self.reduced_gradients + self.update

    def peak(self, *, accumulated: bool) -> int:
        return max(self.backward(accumulated=accumulated), self.reduce, self.step)

    @property
    def _lasting(self) -> int:
        return self.weights + self.gathered_weights + self.optimizer_state


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch: kept between forward and backward pass, and largest on top of that."""

    kept: int
    working_set: int


def memory(
    config: Config,
    groups: Sequence[Group],
    work: Sequence[Sequence[Sequence[Batch]]],
    activations: Activations,
    *,
    world_size: int,
    stage: int,
    accumulation: int,
    native_bf16: bool,
) -> Memory:
    """`work`: the batches of every rank, by group and rank. native_bf16: whether the planned device has it."""
    numels = [[torch.Size(shape).numel() for shape in group["shapes"]] for group in groups]
    flats = [flat_size(sizes, world_size=world_size, stage=stage) for sizes in numels]
    every = [numel for sizes in numels for numel in sizes]
    flat, total, largest = sum(flats), sum(every), max(every)
    state = sum(size * len(group["update_rule"].STATE_NAMES) for size, group in zip(flats, groups, strict=True))
    settings: dict[str, Any] = deepspeed_config(
        zero_stage=stage,
        micro_batch_size=1,
        gradient_accumulation_steps=accumulation,
        grad_clip=config.train.grad_clip,
        world_size=world_size,
        num_parameters=total,
        device=torch.device("cuda"),
    )["zero_optimization"]
    bucket = settings["reduce_bucket_size"]
    copied = max(bucket, largest)  # the collective works on a copy; a parameter beyond the bucket goes by itself
    persistent = sum(numel for numel in every if numel <= PERSISTENT)
    if stage == 3:
        # a single rank's parts are the whole parameters
        weights, gathered = (flat + persistent, min(total, LIVE + PREFETCHED)) if world_size > 1 else (flat, 0)
        gradients = reduced = flat
    else:
        weights, gathered = world_size * flat, 0
        reduced = max(touched(numels, rank, world_size=world_size, stage=stage) for rank in range(world_size))
        # at stage 2 those of a micro batch are added to those of the ones before
        gradients = total if stage == 1 else reduced * (2 if accumulation > 1 else 1)
    return Memory(
        weights=FP32 * weights,
        gathered_weights=FP32 * gathered,
        optimizer_state=FP32 * state,
        gradients=FP32 * gradients,
        reduction=FP32 * (bucket * (2 if settings["overlap_comm"] and stage < 3 else 1) + copied),
        activations=activations.kept,
        working_set=activations.working_set,
        reduced_gradients=FP32 * reduced,
        update=max(
            FP32 * size
            + max(
                group["update_rule"].workspace_bytes(group, size, batches, native_bf16=native_bf16)
                for batches in ranks or [[]]
            )
            for size, group, ranks in zip(flats, groups, work, strict=True)
        ),
    )


def touched(numels: Sequence[Sequence[int]], rank: int, *, world_size: int, stage: int) -> int:
    """Elements of all parameters that a rank holds a part of: DeepSpeed keeps their gradients whole (stages 1, 2)."""
    return sum(
        sizes[index]
        for sizes in numels
        for index in {iv.index for iv in rank_intervals(sizes, rank=rank, world_size=world_size, stage=stage)}
    )


def activations(config: Config, model: Transformer, *, micro_batch_size: int, compiled: bool) -> Activations:
    """What one micro batch keeps: the model's own forward pass, and back, on tensors without memory.

    Blocks that are `compiled` keep what torch.compile's partitioner decides to keep; with `activation_checkpointing` a
    block keeps its input, and one block at a time all the rest.
    """
    train, rows = config.train, (micro_batch_size, config.train.seq_len)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.self_attn.attend = FusedAttention()
    ids = torch.empty(rows, dtype=torch.long, device="meta")
    documents = ids if train.document_mask else None
    x, whole = kept(model, lambda: model.hidden_states(ids, document_ids=documents))
    inputs = _block_inputs(model, ids, documents)
    blocks = [kept(model, lambda layer=layer: layer(*inputs))[1] for layer in model.layers]
    outside = whole - sum(blocks)
    if compiled:
        blocks = [kept_compiled(model.layers[0], inputs)] * len(blocks)
    if train.activation_checkpointing:
        stored = x.numel() * x.element_size()
        blocks = [stored] * len(blocks) + [max(blocks)]
    loss = peak(lambda: model.lm_head(x.detach().requires_grad_(), ids, train.loss_chunk_tokens))
    back = peak(lambda: model.layers[0](*inputs).sum().backward())
    own = sum(p.numel() for p in model.layers[0].parameters())
    # the gradients of the block are counted with the gradients
    return Activations(outside + sum(blocks), max(loss, back - max(blocks) - FP32 * own, 0))


class FusedAttention(CausalAttention):
    """The operators that scaled_dot_product_attention takes on a GPU, which a tensor without memory has to be told."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].transpose(1, 2)
        bias = torch.zeros_like(mask, dtype=q.dtype).expand(q.shape[0], q.shape[1], *mask.shape[2:])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0].transpose(1, 2)


def kept(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of `forward` and the bytes that autograd keeps for its backward pass, parameters not counted."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for storage in found.values())


def kept_compiled(block: nn.Module, inputs: tuple[Any, ...]) -> int:
    """The bytes that a compiled block keeps: the outputs of its forward graph, its input in place of its result."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    found: dict[int, int] = {}

    def forward(graph: torch.fx.GraphModule, _: Any) -> Any:
        (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
        for value in (node.meta["val"] for node in results if node is not None and node.op != "placeholder"):
            if isinstance(value, Tensor):
                found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return graph.forward

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
    )
    # after another plan of this process torch would take its sizes for symbols
    torch.compile(block, backend=backend, dynamic=False)(*inputs)
    return sum(found.values())


def peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at a time in tensors of its making."""
    with Allocations() as allocations:
        run()
    return allocations.peak


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, and of those alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            storage = x.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.current -= num_bytes


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _block_inputs(model: Transformer, ids: Tensor, documents: Tensor | None) -> tuple[Any, ...]:
    """x, cos, sin and mask as the first block gets them."""
    caught: list[tuple[Any, ...]] = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    model.hidden_states(ids, document_ids=documents)
    hook.remove()
    x, cos, sin, mask, *_ = caught[0]
    return x.detach().requires_grad_(), cos, sin, mask
