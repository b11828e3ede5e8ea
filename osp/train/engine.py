"""DeepSpeed behind one class: the only file that calls `deepspeed.initialize`.

DeepSpeed sees fp32 parameters, gradients, accumulation and reduction on every ZeRO stage and number of ranks; the model
casts weights to its compute dtype at each matmul. DeepSpeed is imported late: it is slow, and fixes its accelerator.
"""

import itertools
import logging
import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osp.distributed import add_up
from osp.optim.groups import Trainable, build_groups
from osp.optim.optimizer import PartitionedOptimizer
from osp.train.resolve import Resolved

# Elements of the reduction buffer. DeepSpeed allocates it in every step, and its default is 7 times larger.
_BUCKET = 2**26


def reduces_to_owners(world_size: int) -> bool:
    """Return whether ZeRO-1 and -2 reduce each part of a bucket to its owner only, instead of all of it to all ranks.

    That sends half the bytes in one collective per part, whose latency grows with the ranks: only inside one host.
    """
    return world_size <= 8


def zero_settings(stage: int, *, world_size: int, num_parameters: int, device: torch.device) -> dict[str, Any]:
    """Return the table `zero_optimization` of DeepSpeed's configuration."""
    return {
        "stage": stage,
        "reduce_bucket_size": min(_BUCKET, max(num_parameters, 1)),
        # DeepSpeed cuts a group into sub-groups of this size, which would split matrices among flat tensors
        "sub_group_size": 2**60,
        # a separate stream for the reduction pays only where ranks exchange gradients
        "overlap_comm": device.type == "cuda" and world_size > 1 and stage > 1,
        # one rank reduces nothing, so its gradients need not be copied to one place
        "contiguous_gradients": world_size > 1,
        **({"compute_grad_norm": False} if stage < 3 else {}),  # in fp64, before our own
        "use_multi_rank_bucket_allreduce": not reduces_to_owners(world_size),
    }


class Engine:
    """A model and its optimizer on all ranks.

    One optimizer step:

        for micro_batch in micro_batches:  # gradient_accumulation_steps of them
            engine.backward(engine(micro_batch) / global_tokens)
        engine.step(number, factor, norm=add_up(engine.gradient_squares()).sum().sqrt().item())
    """

    def __init__(self, model: Trainable, resolved: Resolved) -> None:
        """Collective. `init_distributed` must have run."""
        import deepspeed

        parameters = [p for _, p in model.named_parameters(remove_duplicate=True)]
        assert all(p.dtype == torch.float32 for p in parameters), "parameters are fp32; the model casts at the matmul"
        config = resolved.config
        self.device, self.world_size, self.rank = resolved.device, resolved.world_size, dist.get_rank()
        self.gradient_accumulation_steps = resolved.gradient_accumulation_steps
        self.groups = build_groups(model, config.optimizer)
        self.optimizer = PartitionedOptimizer(self.groups, compiled=resolved.compiled)
        self._stage, self._micro_step, self._grad_clip = config.engine.zero_stage, 0, config.train.grad_clip
        num_parameters = sum(p.numel() for p in parameters)
        settings = {  # fp32 throughout; optimizer and learning rate are ours
            "train_micro_batch_size_per_gpu": resolved.micro_batch_size,
            "gradient_accumulation_steps": resolved.gradient_accumulation_steps,
            # our optimizer clips where it reads the gradient; norms are ours too, see `gradient_squares`
            "gradient_clipping": 0.0,
            # shares of a loss add up; ZeRO-3 knows the mean only
            "gradient_allreduce_op": "mean" if self._stage == 3 else "sum",
            "timers": {"throughput": {"enabled": False}},  # it would synchronize the device in every forward pass
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero_settings(
                self._stage, world_size=self.world_size, num_parameters=num_parameters, device=self.device
            ),
        }
        logger = deepspeed.utils.logger
        logger.setLevel(logging.ERROR)  # DeepSpeed warns that it does not know our optimizer
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=cast(nn.Module, model), optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        logger.setLevel(logging.WARNING)
        self.module: nn.Module = self._engine.module  # below ZeRO-3 it can be called directly, e.g. for evaluation
        self._zero: Any = self._engine.optimizer
        layout = {"stage": self._stage, "rank": self.rank, "world_size": self.world_size}
        self.optimizer.bind(self._share_masters(), **layout, average=config.average.kind != "none")
        self.names = [name for group in self.groups for name in group["names"]]  # of all parameters
        pieces, ends = self.optimizer.pieces, itertools.accumulate((len(g["names"]) for g in self.groups), initial=0)
        places = [end + iv.index for end, piece in zip(ends, pieces, strict=False) for iv in piece.intervals]
        self._places = torch.tensor(places, dtype=torch.int64, device=self.device)  # in `names`, of this rank's parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, the share of this rank and micro batch in the global mean loss.

        Shares add up over micro batches and ranks: loss = sum of token losses here / tokens of the step everywhere.
        """
        assert self._micro_step < self.gradient_accumulation_steps, "step() or discard_gradients() is due"
        self._engine.set_gradient_accumulation_boundary(self._micro_step == self.gradient_accumulation_steps - 1)
        # ZeRO-3 averages over ranks, but shares must be summed: the factor undoes it, exactly for 2^n ranks
        loss = loss * self.world_size if self._stage == 3 else loss
        self._engine.backward(loss, scale_wrt_gas=False)  # not divided by the number of micro batches
        self._micro_step += 1

    def step(self, number: int, factor: float, *, norm: float, record: bool = False) -> None:
        """Take step `number`, from 1, at `factor` times the peak learning rate. Collective.

        norm: of the raw gradient over all ranks, finite; the gradient is clipped to the norm `train.grad_clip`. record:
        keep the statistics of the update.
        """
        assert self._micro_step == self.gradient_accumulation_steps, (self._micro_step, "backward passes")
        assert math.isfinite(norm), norm
        self._micro_step = 0
        clip = min(1.0, self._grad_clip / (norm + 1e-6)) if self._grad_clip else 1.0
        self.optimizer.set_step(number, factor, clip=clip, record=record)
        self._engine.step()
        assert self._engine.was_step_applied(), f"DeepSpeed refuses a gradient of norm {norm}"

    @torch.no_grad()
    def gradient_squares(self) -> Tensor:
        """Return, before `step`, the sum of squares of this rank's part of the raw gradient of each of `names`.

        fp64 (P,) on the device; the sums over all ranks are the squares of the gradients' norms.
        """
        assert self._micro_step == self.gradient_accumulation_steps, (self._micro_step, "backward passes")
        parts = []
        for index, piece in enumerate(self.optimizer.pieces):
            # ZeRO holds this rank's part of a group as a list of consecutive tensors with padding in between
            gradients = self._zero.averaged_gradients[index]
            offsets = [0, *itertools.accumulate(g.numel() for g in gradients)]
            at = dict(zip(offsets, gradients, strict=False))
            for interval in piece.intervals:
                parts.append(at[interval.offset].view(-1)[: interval.size])
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        if parts:
            norms = torch._foreach_norm(parts)  # pyright: ignore[reportPrivateImportUsage]
            squares.index_add_(0, self._places, torch.stack(norms).double().square())
        return squares

    def discard_gradients(self) -> None:
        """Drop the gradients accumulated since the last `step`. Every rank must call it, without communication."""
        self._micro_step = 0
        self._zero.zero_grad(set_to_none=True)
        if self._stage == 3:  # as DeepSpeed does after an overflow
            self._zero.averaged_gradients = {}
        else:
            for index in range(len(self._zero.bit16_groups)):
                self._zero.averaged_gradients[index] = None
                self._zero.all_grad_tensors[index] = None

    def optimizer_statistics(self) -> dict[str, float]:
        """Return `lr/ROLE`, `update_rms/ROLE`, `param_norm/ROLE` and `param_norm` of a step with `record`. Collective.

        The update includes learning rate and scale, but not weight decay. Waits for the device.
        """
        numels, rates = self.optimizer.numels(), {g["role"]: g["lr"] for g in self.optimizer.param_groups}
        updates, parameters = self.optimizer.update_squares, self.optimizer.parameter_squares()
        zero = torch.zeros((), device=self.device)
        # a rank may hold nothing of a role, but all ranks must reduce the same vector
        squares = torch.stack([updates.get(role, zero) for role in numels] + [parameters[role] for role in numels])
        update_sums, parameter_sums = add_up(squares.double()).view(2, -1).tolist()
        statistics = {"param_norm": sum(parameter_sums) ** 0.5}
        for (role, numel), update, parameter in zip(numels.items(), update_sums, parameter_sums, strict=True):
            statistics[f"lr/{role}"] = rates[role]
            statistics[f"update_rms/{role}"] = (update / numel) ** 0.5
            statistics[f"param_norm/{role}"] = parameter**0.5
        return statistics

    def rng_state(self) -> dict[str, Tensor]:
        """Return the RNG state of this rank by device type, uint8. Data, initial weights and samples have their own."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def set_rng_state(self, states: Mapping[str, Tensor]) -> None:
        """Restore the RNG state of this rank. Devices that are missing, here or in `states`, are left as they are."""
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    @torch.no_grad()
    def sync_weights_from_master(self) -> None:
        """Copy the master weights to the model's parameters, after a write to `optimizer.local_state()`. Collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        # the partitions are the masters (`_share_masters`); DeepSpeed keeps small parameters whole: those are stale
        self._zero._partition_all_parameters()
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the model the running average of its weights inside the context. Collective."""
        self.optimizer.swap_average()
        self.sync_weights_from_master()
        try:
            yield
        finally:
            self.optimizer.swap_average()
            self.sync_weights_from_master()

    def gathered_parameters(self) -> Any:
        """Return a context in which every rank sees whole parameters, also under ZeRO-3. Collective."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.module.parameters()), enabled=self._stage == 3)

    def memory(self) -> float:
        """Return the peak memory of this rank in bytes: allocated on the GPU, or resident in the CPU process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def close(self) -> None:
        """Release the hooks and buffers of DeepSpeed."""
        self._engine.destroy()

    def _share_masters(self) -> list[Tensor]:
        """Return the flat master weights of each group, after sharing their memory with the model's weights.

        DeepSpeed expects half-precision weights and clones fp32 masters; of fp32 weights they would be the same twice.
        """
        if self._stage == 3:
            masters, weights = self._zero.fp32_partitioned_groups_flat, self._zero.fp16_partitioned_groups_flat
        else:
            masters = self._zero.single_partition_of_fp32_groups
            weights = [pieces[self.rank] for pieces in self._zero.parallel_partitioned_bit16_groups]
        for master, weight in zip(masters, weights, strict=True):
            assert master.dtype == weight.dtype == torch.float32
            assert master.shape == weight.shape
            master.data = weight.data
        return list(masters)
