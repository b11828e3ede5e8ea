"""From a configuration to a trainer in its run folder; `scripts/train.py` calls `train`.

Every mistake in the configuration, data, machine or folder is reported here, before the first step.
"""

import logging
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from osp.config import AT_TOP, Config, WandbMode, to_dict
from osp.data.loader import Layout, Loader, data_step
from osp.data.manifest import content, load_manifest, same_text
from osp.data.prepare import start_preparing
from osp.data.sources import make_source
from osp.data.tokenizer import existing_tokenizer, vocab_size
from osp.device import compute_deterministically, native_fp8, prepare_attention, prepare_cpu
from osp.distributed import Peers, device_of_rank, gather_objects, init_distributed, is_main, on_all_ranks, on_main
from osp.errors import LostRankError, UserError
from osp.model.build_norms import bound_warning
from osp.model.fp8 import check_fp8, fp8_linear
from osp.model.loss import fused_token_losses
from osp.model.transformer import build_model, meta_model, parameter_shapes
from osp.optim.groups import build_groups
from osp.run.checkpoint import Checkpoint, candidates, checkpoint_bytes, load
from osp.run.folder import STOPPED, Found, begin, check_disk, end, open_run
from osp.run.logger import Logger, check_wandb
from osp.run.read import differences
from osp.train.engine import Engine
from osp.train.resolve import Resolved, resolve
from osp.train.trainer import Trainer
from osp.train.validate import stored_summary

log = logging.getLogger(__name__)

# Keys that decide what trained weights compute or read, and those among them that only matter before the first step.
MEANING = ("model.", *AT_TOP, "tokenizer.eos_token")
INITIAL = ("model.init", "model.scale_residual_init", "model.max_position_embeddings")
INITIAL += ("norm.init", "norm.alpha", "norm.lam")
ORDER = ("train.seed", "train.seq_len", "data.bos", "data.repeat")  # keys that decide the order of the sequences


class CompleteRun(Exception):  # noqa: N818 - no error
    """The run in the folder was complete before; its closing summary."""


def train(config: Config) -> None:
    """Run or continue the training that `config` describes. Collective: every rank calls it.

    Raises `UserError` only before the first step, `RunError` if the run cannot go on, `StoppedError` after a signal.
    """
    try:
        trainer = setup(config)
    except CompleteRun as complete:
        if is_main():
            log.info("this run is complete\n%s", complete)
        return
    with trainer.stop.listen():  # listen until all is closed: a launcher may pass a signal on after the run has ended
        try:
            trainer.fit()
        finally:
            trainer.close()


def setup(config: Config) -> Trainer:
    """Return the trainer of `config`, with everything checked and the run folder begun or continued. Collective."""
    if config.train.deterministic:
        compute_deterministically()
    device, world_size = device_of_rank(config.engine.device), int(os.environ.get("WORLD_SIZE", "1"))
    resolved = resolve(config, device=device, world_size=world_size)
    prepare_attention(resolved.config.train.attention, device)
    build_groups(meta_model(resolved.config.model), config.optimizer)  # raises if a rule does not fit
    make_source(config.data)  # raises if it is unknown or names nothing to read
    resolved.build_schedule()  # raises if its phases do not fit
    resolved.build_samples()
    init_distributed(config.engine.device, timeout_seconds=config.engine.timeout)
    if device.type == "cpu":
        prepare_cpu(config.engine.threads)
    peers = Peers()  # from here on: preparing the text may take hours, while the other ranks wait
    try:
        return _set_up(config, resolved, peers)
    except BaseException as error:
        dead = peers.cause(error)
        peers.dismiss()
        if dead:
            raise LostRankError(f"before the first step: {dead}; start all of them again") from error
        raise


def _set_up(given: Config, resolved: Resolved, peers: Peers) -> Trainer:
    """Do what `setup` does once the process group is up. Collective."""
    config, device, world_size = resolved.config, resolved.device, resolved.world_size
    if any(other != [given, config] for other in gather_objects([given, config])):
        raise UserError("the ranks have different configurations; start all of them with the same command and files")
    shapes = parameter_shapes(config.model)
    if config.train.precision == "fp8":
        _check_fp8(resolved, shapes)
    wandb_mode: WandbMode = on_main(lambda: check_wandb(config.logger))
    found: Found = on_main(lambda: open_run(config))
    folder, checkpoint = found.folder, first_whole(found.resumable)
    if checkpoint:
        check_continues(config, checkpoint, shapes)
        check_length(given, checkpoint)
        if checkpoint.step == resolved.total_steps and checkpoint.folder in found.checkpoints:
            end_complete_run(folder, checkpoint)
    averages = config.average.kind != "none"
    step, num_bytes = checkpoint.step if checkpoint else 0, checkpoint_bytes(shapes, 1.5 + averages)
    on_main(lambda: check_disk(folder, num_bytes, config.checkpoint, first=step, last=resolved.last_step))
    if is_main() and (warning := bound_warning(config.model)):
        log.warning(warning)
    if not config.tokenizer.train:  # known before any text is read
        on_main(lambda: _check_vocabulary(config, vocab_size(existing_tokenizer(config.tokenizer))))
    shards = on_main(lambda: start_preparing(config.data, config.tokenizer, progress=config.logger.progress))
    _check_vocabulary(config, load_manifest(shards).vocab_size)
    origin, expected = on_main(lambda: position_in(shards, config, checkpoint)) if checkpoint else ((0, 0), ())
    loader = Loader(
        shards,
        Layout.of(config),
        rows_per_step=config.train.tokens_per_step // config.train.seq_len,
        micro_batch_size=resolved.micro_batch_size,
        rank=dist.get_rank(),
        world_size=world_size,
        seed=config.train.seed,
        document_ids=config.train.document_mask,
        skip_steps=config.data.skip_steps,
        origin=origin,
        expected=expected,
        pin=device.type == "cuda",
    )
    engine = build_engine(resolved)
    if checkpoint is None and config.checkpoint.init_from is not None:
        load_initial_weights(config.checkpoint.init_from, engine)
    before, tokenizer = checkpoint.folder if checkpoint else None, shards / "tokenizer.json"
    ranks = {"world_size": world_size, "device": str(device)}
    lock = on_main(lambda: begin(found, config, checkpoint=before, tokenizer=tokenizer, **ranks))
    logger = None
    if is_main():
        logger = Logger(folder, config, step=step, total_steps=resolved.total_steps, mode=wandb_mode)
    trainer = Trainer(resolved, engine, loader, folder, logger, peers=peers, lock=lock)
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer


def end_complete_run(folder: Path, last: Checkpoint) -> None:
    """Raise `CompleteRun` if the run has its summary: that needs neither text nor room on the disk. Collective."""
    if summary := on_main(lambda: stored_summary(folder)):
        if is_main() and not (folder / STOPPED).exists():  # killed after its summary
            end(folder, "complete", step=last.step, tokens=last.tokens, total_steps=last.step)
        raise CompleteRun(summary)


def first_whole(folders: list[Path]) -> Checkpoint | None:
    """Return the first undamaged checkpoint, None if `folders` is empty. Collective; every rank reads a share.

    Raises `UserError` if all are damaged: replacing an existing run by a new one is the user's decision.
    """
    if not folders:
        return None
    first, *others = folders
    try:
        on_all_ranks(lambda: Checkpoint(first).verify(rank=dist.get_rank(), world_size=dist.get_world_size()))
    except UserError as damage:
        if not others:
            raise
        if is_main():
            log.warning("%s: trying the one before", str(damage).removesuffix("; take an older checkpoint"))
        return first_whole(others)
    return Checkpoint(first)


def check_continues(config: Config, checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> None:
    """Raise `UserError` unless `config` can go on from `checkpoint`."""
    if checkpoint.manifest.get("conversion") is not None:
        raise UserError(
            f"{checkpoint.folder}: a converted model, without the state of an optimizer; start from it with "
            "checkpoint.init_from"
        )
    changed = differences(to_dict(checkpoint.config), to_dict(config))
    if others := [change for change in changed if change.startswith(MEANING) and not change.startswith(INITIAL)]:
        raise UserError(
            f"{checkpoint.folder}: its model has other values than this configuration ({'; '.join(others[:4])}); set "
            "the old values, since a run keeps its model"
        )
    if checkpoint.shapes != shapes:
        raise UserError(f"{checkpoint.folder}: its model has other parameters than this configuration's")
    if (steps := config.train.steps) is not None and checkpoint.step > steps:
        raise UserError(f"{checkpoint.folder} is of step {checkpoint.step}, beyond train.steps={steps}; raise that")
    before, now = checkpoint.config.data.skip_steps, config.data.skip_steps
    position = data_step(checkpoint.step, before)
    if {pair for pair in before if pair[0] <= position} != {pair for pair in now if pair[0] <= position}:
        raise UserError(
            f"data.skip_steps={[list(pair) for pair in now]} changes what was read before step "
            f"{checkpoint.step}, where {checkpoint.folder} continues; go back with resume=CHECKPOINT to one before it"
        )


def check_length(given: Config, checkpoint: Checkpoint) -> None:
    """Raise `UserError` if `train.tokens` cannot be counted in steps, because earlier steps had another size."""
    total, size, seen = given.train.tokens, given.train.tokens_per_step, checkpoint.tokens
    if total is not None and given.train.steps is None and seen != checkpoint.step * size:
        steps = checkpoint.step + max(0, math.ceil((total - seen) / size))
        raise UserError(
            f"train.tokens={total}: the {checkpoint.step} steps of {checkpoint.folder} had {seen} tokens, not "
            f"{size} each; set train.steps={steps} instead"
        )


def position_in(shards: Path, config: Config, checkpoint: Checkpoint) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Return where `shards` are read on after `checkpoint`, and the content that they must have; see `Loader`.

    Another run's state may go on with another text, from its first sequence. Raises `UserError` if the tokenizer is
    another one, if a run's own text has changed, or if the next sequence in the same text cannot be determined.
    """
    data, before, now = checkpoint.data, checkpoint.config, content(load_manifest(shards))
    run = checkpoint.folder.resolve().parent.parent
    own = run == Path(config.run.dir).resolve()
    subject = f"run.dir={config.run.dir}" if own else f"resume={config.resume}"
    another = f"choose another run.name, and set resume={run}" if own else "set"
    if data.tokenizer_hash not in (None, now[0]):
        raise UserError(
            f"{subject} was trained with another tokenizer than {shards}; {another} tokenizer=file "
            f"tokenizer.path={run / 'tokenizer.json'}"
        )
    changed = differences(to_dict(before), to_dict(config))
    same = same_text(data.content, now) if data.content else not any(key.startswith("data.") for key in changed)
    if own and not same:
        raise UserError(
            f"{subject} was trained on another text than {shards} holds now; choose another run.name; with "
            f"resume={run} that one goes on with the new text"
        )
    order = [change for change in changed if change.startswith(ORDER)]
    if same and order:
        raise UserError(
            f"{subject} has read part of {shards}, and its next sequence is unknown with other values ("
            f"{'; '.join(order)}); set the old ones, or begin with the weights: checkpoint.init_from={run}"
        )
    if changed:
        log.info("continues with: %s", ", ".join(changed))
    if same:
        return (data.next_step, data.row), data.content
    log.warning("%s holds another text than %s has read: it is read from its beginning", shards, checkpoint.folder)
    return (data.next_step, 0), ()


def build_engine(resolved: Resolved) -> Engine:
    """Return the engine with the initialised model inside. Collective."""
    config, train = resolved.config, resolved.config.train
    model = build_model(config.model, seed=train.seed, device=resolved.device)
    model.compute_dtype = resolved.compute_dtype
    if train.precision == "fp8":
        model.use_in_blocks(fp8_linear(emulate=not native_fp8(resolved.device)))
    model.activation_checkpointing = train.activation_checkpointing
    model.set_attention(train.attention)
    model.set_penalty(config.penalty)
    model.lm_head.z_loss, model.lm_head.chunk_tokens = train.z_loss, resolved.loss_chunk_tokens
    if resolved.compiled:
        model.lm_head.compiled_losses = torch.compile(fused_token_losses, dynamic=False)  # last chunk: another graph
        for layer in model.layers:
            layer.compile()
    return Engine(model, resolved)


def load_initial_weights(path: str, engine: Engine) -> None:
    """Load the weights and norm statistics of `checkpoint.init_from` into the engine's model. Collective."""
    checkpoint = first_whole(candidates(Path(path)))
    assert checkpoint is not None, "resolve() checks that there is one"
    slices = (
        (name, start, stop, {"weight": states["weight"]})
        for name, start, stop, states in engine.optimizer.local_state()
    )
    load(checkpoint, slices, engine.module)
    engine.sync_weights_from_master()
    if is_main():
        norm = checkpoint.config.model.norm.name
        log.info("starting from %s, norm=%s, with its model and tokenizer", checkpoint.folder, norm)


def _check_fp8(resolved: Resolved, shapes: dict[str, list[int]]) -> None:
    """Raise `UserError` if fp8 cannot be computed; warn if it is emulated."""
    fp8_linear(emulate=not native_fp8(resolved.device))  # raises without torchao
    if native_fp8(resolved.device):
        check_fp8(shapes, resolved.micro_batch_size * resolved.config.train.seq_len)
    elif is_main():
        log.warning("train.precision=fp8: %s has no fp8; it is emulated, which rounds but is slow", resolved.device)


def _check_vocabulary(config: Config, num_tokens: int) -> None:
    """Raise `UserError` if the tokenizer has tokens that the model has no embedding for."""
    if num_tokens > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {num_tokens}; "
            f"set model.vocab_size={num_tokens} or more"
        )
