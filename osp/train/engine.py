"""DeepSpeed behind one class: the only file that calls `deepspeed.initialize`.

Parameters, gradients, accumulation and reduction are fp32 for DeepSpeed, on every ZeRO stage and number of ranks; the
model casts weights to its compute dtype at each matmul. The DeepSpeed JSON is derived here from our settings and nobody
edits it. DeepSpeed is imported inside functions: it is slow, and its accelerator is fixed at import.
"""

import itertools
import logging
import resource
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osp.config import OptimizerConfig
from osp.distributed import deepspeed_logger
from osp.optim import PartitionedOptimizer, Trainable, groups_of

# Gradients are copied through a buffer of this many elements on their way to the reduction; DeepSpeed's default is 7
# times larger, and it allocates the buffer anew in every step
_BUCKET = 2**26

log = logging.getLogger(__name__)


def reduces_to_owners(world_size: int) -> bool:
    """Whether ZeRO-1 and -2 reduce each part of a bucket to the rank that owns it, rather than all of it to all.

    It sends half the bytes. Each part is a collective of its own, whose latency grows with the ranks: so only on as
    many as a host has.
    """
    return world_size <= 8


def deepspeed_config(
    *,
    zero_stage: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    grad_clip: float,
    world_size: int,
    num_parameters: int,
    device: torch.device,
) -> dict[str, Any]:
    """The DeepSpeed JSON. No precision block (fp32 throughout), no optimizer, no scheduler: those are ours."""
    return {
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": grad_clip,  # of the raw gradient: DeepSpeed clips before it calls our optimizer
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": min(_BUCKET, max(num_parameters, 1)),
            # a group is cut into sub-groups of this size, which would tear its matrices into several flat tensors
            "sub_group_size": 2**60,
            # a stream of its own for the reduction pays where there is something to send
            "overlap_comm": device.type == "cuda" and world_size > 1 and zero_stage > 1,
            "contiguous_gradients": True,
            "use_multi_rank_bucket_allreduce": not reduces_to_owners(world_size),
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A model and its optimizer on all ranks.

    One optimizer step is `gradient_accumulation_steps` times `backward(engine(...))`, then `set_step`, then `step`:

        for micro_batch in micro_batches:
            engine.backward(engine(micro_batch) / global_tokens)
        engine.set_step(number, factor)
        engine.step()
    """

    def __init__(
        self,
        model: Trainable,
        config: OptimizerConfig,
        *,
        zero_stage: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        grad_clip: float,
        device: torch.device,
    ) -> None:
        """`init_distributed` has run. Collective."""
        import deepspeed

        parameters = list(model.named_parameters(remove_duplicate=False))
        assert all(p.dtype == torch.float32 for _, p in parameters), (
            "parameters are fp32; the model casts at the matmul"
        )
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.groups = groups_of(model, config)
        self.optimizer = PartitionedOptimizer(self.groups)
        self.deepspeed_config = deepspeed_config(
            zero_stage=zero_stage,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            grad_clip=grad_clip,
            world_size=self.world_size,
            num_parameters=sum(p.numel() for _, p in parameters),
            device=device,
        )
        self._stage = zero_stage
        self._micro_step = 0
        logger = deepspeed_logger()
        logger.setLevel(logging.ERROR)  # it warns that our optimizer is unknown to it
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=cast(nn.Module, model),
            optimizer=self.optimizer,
            config=self.deepspeed_config,
            dist_init_required=False,
        )
        logger.setLevel(logging.WARNING)
        self._zero: Any = self._engine.optimizer
        self.optimizer.bind(self._share_masters(), stage=zero_stage, rank=self.rank, world_size=self.world_size)

    @property
    def module(self) -> nn.Module:
        """The model itself. Below ZeRO-3 it can be called without the engine, for evaluation say."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @property
    def is_boundary(self) -> bool:
        """Whether the next `backward` is the last one before `step`."""
        return self._micro_step == self.gradient_accumulation_steps - 1

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`: this rank's and micro batch's share of the global mean loss.

        The shares of all micro batches and ranks of a step add up to the loss whose gradient is applied:
        loss = sum of token losses here / valid tokens of the whole step everywhere.
        """
        assert self._micro_step < self.gradient_accumulation_steps, "step() or discard_gradients() is due"
        self._engine.set_gradient_accumulation_boundary(self.is_boundary)
        # DeepSpeed averages over ranks and accumulation; the shares are to be summed. scale_wrt_gas=False undoes the
        # one, the factor the other (exactly for 2^n ranks).
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        self._micro_step += 1

    def set_step(self, number: int, factor: float, *, record: bool = False) -> None:
        """Before `step`: its number, from 1, and learning rate over peak rate. record: for `optimizer_statistics`."""
        self.optimizer.set_step(number, factor, record=record)

    def step(self) -> bool:
        """Clip, update, and tell whether it was done: False, and no weight changed, if the gradient is not finite."""
        assert self._micro_step == self.gradient_accumulation_steps, (self._micro_step, "backward passes")
        self._micro_step = 0
        self._engine.step()
        return self._engine.was_step_applied()

    @torch.no_grad()
    def gradient_norms(self) -> tuple[list[str], Tensor]:
        """Before `step`: the names of all parameters and the norms of their raw gradients, (parameters,) fp64.

        The norm of the whole gradient is the norm of these. Collective.
        """
        assert self._micro_step == self.gradient_accumulation_steps, (self._micro_step, "backward passes")
        names = [name for group in self.groups for name in group["names"]]
        places = {name: i for i, name in enumerate(names)}
        indices, pieces = [], []
        for index, intervals in enumerate(self.optimizer.intervals()):
            # ZeRO holds this rank's part of a group as a list of tensors, one after the other with padding between
            gradients = list(self._zero.averaged_gradients[index])
            offsets = [0, *itertools.accumulate(g.numel() for g in gradients)]
            at = dict(zip(offsets, gradients, strict=False))
            for name, interval in intervals:
                indices.append(places[name])
                pieces.append(at[interval.offset].view(-1)[: interval.size])
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if pieces:
            norms = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces]).double()
            squares.index_add_(0, torch.tensor(indices, device=self.device), norms.square())
        return names, self.all_reduce_sum(squares).sqrt()

    def discard_gradients(self) -> None:
        """Forget what has been accumulated since the last `step`. Collective only in that all ranks must do it."""
        self._micro_step = 0
        self._zero.zero_grad(set_to_none=True)
        # as DeepSpeed does after an overflow
        if self._stage == 3:
            self._zero.averaged_gradients = {}
        else:
            for index in range(len(self._zero.bit16_groups)):
                self._zero.averaged_gradients[index] = None
                self._zero.all_grad_tensors[index] = None

    def optimizer_statistics(self) -> dict[str, float]:
        """`update_rms/ROLE` of a step with `record`, `param_norm`, `param_norm/ROLE`, `lr/ROLE`. Collective; syncs.

        The update is what was subtracted for the gradient's sake: with rate and scale, without weight decay.
        """
        numels, rates = self.optimizer.numels(), self.optimizer.learning_rates()
        updates, parameters = self.optimizer.update_squares(), self.optimizer.parameter_squares()
        zero = torch.zeros((), device=self.device)
        # a rank may hold nothing of a role, yet all must reduce the same vector
        squares = torch.stack([updates.get(role, zero) for role in numels] + [parameters[role] for role in numels])
        sums = self.all_reduce_sum(squares.double()).tolist()
        update_sums, parameter_sums = sums[: len(numels)], sums[len(numels) :]
        return {
            **{f"lr/{role}": rate for role, rate in rates.items()},
            **{f"update_rms/{r}": (s / numels[r]) ** 0.5 for r, s in zip(numels, update_sums, strict=True)},
            **{f"param_norm/{r}": s**0.5 for r, s in zip(numels, parameter_sums, strict=True)},
            "param_norm": sum(parameter_sums) ** 0.5,
        }

    def local_state(self) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
        """(name, start, stop, {"weight": ..., "momentum" or "exp_avg" and "exp_avg_sq": ...}) of this rank's share.

        1-D fp32 views of elements [start, stop) of the flattened parameter; every element of every parameter is on
        exactly one rank. To load, copy into them on every rank, then call `sync_weights_from_master`.
        """
        return self.optimizer.local_state()

    def rng_state(self) -> dict[str, Tensor]:
        """State of the random generators of this rank by device type, uint8.

        Nothing in training draws from them today: rows, weights and samples have generators of their own.
        """
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def set_rng_state(self, states: Mapping[str, Tensor]) -> None:
        """Continue the generators of this rank; those of a device it does not have, or a rank there was not, stay."""
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    @torch.no_grad()
    def sync_weights_from_master(self) -> None:
        """Make the model's parameters equal the master weights after those were written. Collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        # the partitions are the masters (`_share_masters`); small parameters, which DeepSpeed keeps whole, are stale
        self._zero._partition_all_parameters()
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def gathered_parameters(self) -> Any:
        """Context in which every parameter is whole on every rank, for a look at weights under ZeRO-3. Collective."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.module.parameters()), enabled=self._stage == 3)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank; in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def memory(self) -> float:
        """Peak memory of this rank in bytes: allocated on the GPU, or resident in the CPU process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def close(self) -> None:
        """Release the hooks and buffers DeepSpeed put on the model."""
        self._engine.destroy()

    def _share_masters(self) -> list[Tensor]:
        """The flat master weights of each group, made to share memory with the model's own weights.

        DeepSpeed expects half-precision weights and clones an fp32 master from them. Ours are fp32, so the clone would
        be the same numbers twice.
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
