"""Functions that the ranks of `test_memory.py` run; spawned processes import this module."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from osp.config import CheckpointConfig, Config
from osp.distributed import add_up, gather_objects
from osp.run.checkpoint import Saver
from osp.train.engine import Engine
from osp.train.resolve import resolve
from osp.train.setup import build_engine


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the storages of these tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def flat(values: Any) -> list[Tensor]:
    """Return the tensors in a list or table of lists."""
    if isinstance(values, dict):
        return flat(list(values.values()))
    return [t for value in values for t in flat(value)] if isinstance(values, list) else [values]


def weights(engine: Engine, stage: int) -> int:
    zero, parameters = engine._zero, cast(list[Any], list(engine.module.parameters()))
    if stage < 3:
        return num_bytes([*parameters, *zero.bit16_groups_flat, *zero.single_partition_of_fp32_groups])
    parts = [p.ds_tensor for p in parameters]
    return num_bytes([*parameters, *parts, *zero.fp16_partitioned_groups_flat, *zero.fp32_partitioned_groups_flat])


def gradients(engine: Engine, stage: int) -> int:
    zero = engine._zero
    kept = [zero.averaged_gradients] if stage == 3 else [zero.averaged_gradients, zero.all_grad_tensors]
    own = [p.grad for p in engine.module.parameters()]
    if stage == 3:
        kept.append(list(zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()))
    return num_bytes([*own, *(t for t in flat(kept) if t is not None)])


class Collectives(TorchDispatchMode):
    """Count the bytes of the whole tensors of collectives, by the name of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            whole = max(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
            name = str(func).split(".")[1].strip("_")
            self.counts[name] = self.counts.get(name, 0) + whole
        return func(*args, **(kwargs or {}))


def held(configs: list[Config], folder: Path) -> list[dict[str, int]]:
    """Return the bytes of a real engine on this rank for each configuration: by part, exchanged, of a checkpoint."""
    return [measure(config, folder / str(i)) for i, config in enumerate(configs)]


def measure(config: Config, folder: Path) -> dict[str, int]:
    stage, measured = config.engine.zero_stage, {}
    resolved = resolve(config, device=torch.device("cpu"), world_size=dist.get_world_size())
    engine = build_engine(resolved)
    tokens = torch.zeros(resolved.micro_batch_size, config.train.seq_len, dtype=torch.long)
    with Collectives() as collectives:
        for _ in range(engine.gradient_accumulation_steps):
            measured["accumulated"] = gradients(engine, stage)  # by the micro batches before
            engine.backward(engine(tokens, tokens).loss / config.train.tokens_per_step)
        measured["weights"] = weights(engine, stage)
        measured["reduced_gradients"] = gradients(engine, stage)
        measured["exchange"] = exchanged(engine)
    for kind in ("allreduce", "reduce_scatter", "allgather"):
        measured[kind] = sum(count for name, count in collectives.counts.items() if kind in name)
    measured["reduce"] = collectives.counts.get("reduce", 0)
    measured["optimizer_state"] = num_bytes(t for state in engine.optimizer.state.values() for t in state.values())
    saver = Saver(folder, CheckpointConfig(), token="t", rank=engine.rank, gather=gather_objects)
    saver.begin(engine.optimizer.local_state(), rng=engine.rng_state(), buffers={}, manifest={"step": 1})
    saved = saver.finish()
    assert saved.error is None
    measured["checkpoint"] = saved.num_bytes
    saver.close()
    engine.close()
    return measured


def exchanged(engine: Engine) -> int:
    """Return the bytes that this rank sends to other ranks by all-to-all in one optimizer step."""
    sent, original = [0], dist.all_to_all_single

    def count(received: Tensor, values: Tensor, *, output_split_sizes: list[int], input_split_sizes: list[int]) -> Any:
        sent[0] += values.element_size() * (sum(input_split_sizes) - input_split_sizes[engine.rank])
        return original(received, values, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes)

    dist.all_to_all_single = count
    engine.step(1, 1.0, norm=add_up(engine.gradient_squares()).sum().sqrt().item())
    dist.all_to_all_single = original
    return sent[0]
