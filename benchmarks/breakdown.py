"""Split the time and the memory of a training step into parts, for `train_step.py --profile`.

Time. Every kernel (GPU) or operation (CPU) of one profiled step is assigned to the first part that matches:

    optimizer      everything inside an optimizer's step, except the peer's gradient clipping
    attention      fused attention kernels; on a CPU everything inside the attention function
    matmuls        matrix products, including the head and the loss
    loss           cross-entropy without its products
    norms          modules named *Norm, forward and backward; compiled: fused kernels with an rsqrt
    other          rotary embedding, SwiGLU, residuals, casts, gradient clipping, reductions over ranks
    no operator    kernels that no operator of torch launched, so that only their name is known
    waiting        wall time of the step in which none of the above ran

Memory. Weights, gradients and optimizer state are counted tensor by tensor. Activations are the distinct storages that
autograd keeps for backward. Logits are the ones whose last size is the vocabulary; for a chunked loss, the memory of
one chunk. The rest of the peak belongs to the allocator and libraries.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("matmuls", "attention", "norms", "loss", "optimizer", "other", "no operator", "waiting")
NORM = "osp::norm"
MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|^aten::(mm|bmm|addmm|baddbmm|linear|matmul)$|mkldnn_linear", re.I)
ATTENTION = re.compile(r"flash|fmha|attention|sdpa", re.I)
LOSS = re.compile(r"LinearCrossEntropy|cross_entropy|log_softmax|LogSoftmax|nll_loss|NllLoss", re.I)
FUSED_NORM = re.compile(r"triton_.*rsqrt")
RUNTIME = re.compile(r"cu(da)?[A-Z]")  # a call of the driver, which is no operator


def parts_of_time(step: Callable[[], object], seconds: float) -> dict[str, float]:
    """Return the seconds of each of PARTS in one call of `step`. seconds: duration of a step without the profiler."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=False) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    return parts_of_events(profiler.events() or [], seconds, on_gpu=on_gpu)


def parts_of_events(events: list[Any], seconds: float, *, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of each of PARTS. events: of the profiler, from one step that takes `seconds` without it."""
    operators = [e for e in events if e.device_type.name == "CPU"]
    norms = {e.sequence_nr for e in operators if e.sequence_nr >= 0 and any(p.name == NORM for p in _ancestors(e))}
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    if not on_gpu:
        for event in operators:
            parts[_part(event.name, [event, *_ancestors(event)], norms)] += event.self_cpu_time_total
        # the profiler slows operations down, so its shares are scaled to the duration of an ordinary step
        busy = sum(parts.values())
        return {name: value * seconds / busy for name, value in parts.items()}
    # Every kernel counts once. The lists of the operators lack the kernels that no operator launched, and calls of the
    # driver, which are numbered independently, may list an operator's kernels a second time.
    owners: dict[tuple[str, float], list[Any]] = {}
    for event in operators:
        if not RUNTIME.match(event.name):
            for kernel in event.kernels:
                owners.setdefault((kernel.name, kernel.duration), []).append(event)
    for event in events:
        if event.device_type.name != "CUDA" or event.is_user_annotation:  # a region, which contains kernels
            continue
        microseconds = event.time_range.elapsed_us()
        same = owners.get((event.name, microseconds))
        owner = same.pop() if same else None
        part = _part(event.name, [owner, *_ancestors(owner)], norms) if owner else "no operator"
        parts[part] += microseconds / 1e6
    parts["waiting"] = max(0.0, seconds - sum(parts.values()))
    return parts


def _part(name: str, events: list[Any], norms: set[int]) -> str:
    names = [event.name for event in events]
    if any("Optimizer.step" in n for n in names):
        return "optimizer"
    if ATTENTION.search(name) or any(ATTENTION.search(n) for n in names):
        return "attention"
    if MATMUL.search(name) or MATMUL.search(names[0]):
        return "matmuls"
    if any(LOSS.search(n) for n in names):
        return "loss"
    if NORM in names or FUSED_NORM.search(name) or any(e.sequence_nr in norms for e in events if e.sequence_nr >= 0):
        return "norms"
    return "other"


def _ancestors(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def mark_norms(model: nn.Module) -> None:
    """Make eager norms visible to the profiler. Not for compiled blocks, whose graphs the hooks would break."""
    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "BHyT", "DyT", "Derf", "BHyTStar")):
            regions: list[Any] = []

            def enter(*_: Any, regions: list[Any] = regions) -> None:
                regions.append(record_function(NORM))
                regions[-1].__enter__()

            def leave(*_: Any, regions: list[Any] = regions) -> None:
                regions.pop().__exit__(None, None, None)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def parts_of_memory(
    forward: Callable[[], object], model: nn.Module, state: Iterable[Tensor], *, logits: int
) -> dict[str, float]:
    """Return GiB by part. state: the optimizer's tensors. logits: bytes of one loss chunk; 0: count saved logits."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, bool]] = {}
    vocabulary = max(p.shape[0] for p in model.parameters() if p.ndim == 2)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), x.shape[-1:] == (vocabulary,)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = forward()  # kept until its storages are counted: addresses are reused
    del graph
    saved_logits = sum(size for size, of_head in kept.values() if of_head)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer state": sum(x.numel() * x.element_size() for x in state),
        "activations": sum(size for size, _ in kept.values()) - saved_logits,
        "logits": logits or saved_logits,
    }
    return {name: size / 2**30 for name, size in parts.items()}
