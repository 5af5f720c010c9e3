"""From a configuration to a prepared job: everything that can be refused is refused here, before the first step."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.backends.capabilities import check_attention, device_name, resolve_compile, resolve_precision
from scalegpt.checkpoint import store
from scalegpt.checkpoint.store import Progress
from scalegpt.config import RunConfig, TrainConfig
from scalegpt.data.prepare import prepare_cached
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.errors import InputError
from scalegpt.planner.deepspeed_settings import deepspeed_settings
from scalegpt.planner.parameters import count_parameters, format_bytes, training_bytes
from scalegpt.training.batches import BatchPlan, plan_batches
from scalegpt.training.loggers import Logger, human_count
from scalegpt.training.optimizers import optimizer_factory
from scalegpt.training.rundir import RunDirectory
from scalegpt.training.trainer import Job

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        run: the configuration, with ``auto`` where the machine or the data decide.
        runs_dir: the folder of all runs.
        fresh: start anew beside an earlier run of this name.
        micro_fixed: whether the user gave the micro batch.
    """

    run: RunConfig
    runs_dir: Path
    fresh: bool
    micro_fixed: bool


def prepare(request: Request, world: World) -> Job:
    """Resolve, check and build everything, in the order in which a user wants to hear of mistakes.

    Raises:
        InputError: a setting, the data or the run's directory will not do.
    """
    check_name(request.run.name)
    settled = world.on_first(lambda: _settled(request))
    run, compiled, warning = _resolve_device_settings(settled, world)
    plan = plan_batches(run, world.size, micro_fixed=request.micro_fixed)
    lowered = run.train.micro_batch if plan.micro_batch < run.train.micro_batch else None
    run = replace(run, train=run.train.changed(micro_batch=plan.micro_batch, tokens_per_step=plan.tokens))
    settings = _deepspeed_settings(run, plan, world)
    logger = Logger(speaks=world.is_first, total=total_steps(run.train, plan), every=run.train.log_every)
    data = _open_data(run, world, logger)
    run = _fix_vocabulary(run, data)
    data.check_vocabulary(run.model.vocab_size)
    data.check_block_size(run.model.block_size)
    directory, checkpoint = world.on_first(lambda: _claim_directory(request, run))
    if warning:
        logger.say(f"warning: {warning}")
    if lowered:
        logger.say(
            f"micro batch {plan.micro_batch} rather than {lowered}: it divides the {plan.sequences // world.size} "
            f"sequences per rank of a step"
        )
    logger.say(describe(run, plan, world, data, compiled=compiled))
    model = build_model(run, compiled=compiled)
    backend = make_backend(run, world, plan.grad_accum, model, optimizer_factory(run.train), settings)
    progress = _load(backend, run, data, checkpoint, plan, logger)
    if world.is_first:
        directory.create(run, plan_summary(run, plan, world, settings))
        directory.forget_metrics_after(progress.step)
    world.barrier()
    return Job(run, world, plan, data, backend, directory, logger, total_steps(run.train, plan), progress)


def check_name(name: str) -> None:
    """Refuse a model name that is no plain folder name.

    Raises:
        InputError: it holds a separator, or starts with a dot.
    """
    if not _FOLDER_NAME.fullmatch(name):
        raise InputError(f"model_name {name!r} must be a plain folder name: letters, digits, '.', '_' and '-'")


def total_steps(train: TrainConfig, plan: BatchPlan) -> int:
    """Optimizer steps until ``max_iters`` or ``max_tokens``, whichever comes first."""
    by_tokens = None if train.max_tokens is None else -(-train.max_tokens // plan.tokens)
    return min(limit for limit in (train.max_iters, by_tokens) if limit is not None)


def describe(run: RunConfig, plan: BatchPlan, world: World, data: TokenSet, *, compiled: bool) -> str:
    """The lines that a run opens with."""
    model, train, parallel = run.model, run.train, run.parallel
    parameters = count_parameters(model).total
    steps = total_steps(train, plan)
    stage = "" if parallel.backend == "plain" else f" stage {parallel.stage}"
    offload = "" if parallel.offload == "none" else f", {parallel.offload} offloaded"
    epochs = steps * plan.tokens / max(1, len(data.train))
    return "\n".join((
        f"model    {parameters:,} parameters: {model.n_layer} layers, {model.n_embd} wide, {model.n_head} heads, "
        f"block {model.block_size}, vocabulary {model.vocab_size:,}",
        f"data     {len(data.train):,} training and {len(data.val):,} held-out tokens, "
        f"{data.tokenizer.kind} tokenizer; {epochs:.2f} epochs",
        f"step     {plan.tokens:,} tokens = {world.size} rank{'s' if world.size > 1 else ''} × micro batch "
        f"{plan.micro_batch} × accumulation {plan.grad_accum} × block {plan.block_size}; {steps:,} steps",
        f"machine  {world.size} × {device_name(world.device)}, {parallel.backend}{stage}{offload}, {train.precision}, "
        f"recompute {train.recompute}, {train.loss} loss{', compiled' if compiled else ''}",
        f"states   {format_bytes(sum(training_bytes(parameters).values()))} for weights, gradients and moments in all",
    ))  # fmt: skip


def plan_summary(run: RunConfig, plan: BatchPlan, world: World, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What ``plan.json`` holds: how the run is laid out."""
    count = count_parameters(run.model)
    return {
        "parameters": count.total,
        "ranks": world.size,
        "device": device_name(world.device),
        "backend": run.parallel.backend,
        "zero_stage": run.parallel.stage,
        "offload": run.parallel.offload,
        "micro_batch": plan.micro_batch,
        "grad_accum": plan.grad_accum,
        "tokens_per_step": plan.tokens,
        "steps": total_steps(run.train, plan),
        "precision": run.train.precision,
        "recompute": run.train.recompute,
        "loss": run.train.loss,
        "model_state_bytes": training_bytes(count.total),
        "deepspeed": settings,
        "torch": torch.__version__,
    }


def _resolve_device_settings(run: RunConfig, world: World) -> tuple[RunConfig, bool, str | None]:
    """Fix the precision, try the attention backend, decide on compiling."""
    train = run.train
    if run.parallel.backend == "plain" and world.size > 1:
        raise InputError(
            f"backend plain runs in one process, not {world.size}; use --backend fsdp or --backend deepspeed"
        )
    # Measured on a CPU, so one rank decides for all.
    precision = world.on_first(lambda: resolve_precision(train.precision, world.device))
    check_attention(train.attention, precision, world.device, run.model.head_size, dropout=run.model.dropout > 0)
    compiled, warning = resolve_compile(train.compile, world.device)
    return replace(run, train=train.changed(precision=precision)), compiled, warning


def _settled(request: Request) -> RunConfig:
    """The run, with what it leaves open as an earlier process of the same run settled it."""
    directory = RunDirectory(request.runs_dir / request.run.name)
    return request.run if request.fresh else directory.settle(request.run)


def _deepspeed_settings(run: RunConfig, plan: BatchPlan, world: World) -> dict[str, Any] | None:
    if run.parallel.backend != "deepspeed":
        return None
    return deepspeed_settings(run, grad_accum=plan.grad_accum, ranks=world.size, on_cuda=world.device.type == "cuda")


def _open_data(run: RunConfig, world: World, logger: Logger) -> TokenSet:
    """Prepare the data once on each machine, then open it on every rank."""
    if run.data.input_file is None:
        raise InputError("no data: give --input_file with a text file, a folder, or a folder of prepared tokens")

    def work() -> str:
        return str(prepare_cached(run.data, progress=_progress(logger)).path)

    return open_tokens(Path(world.on_each_machine(work)))


def _progress(logger: Logger) -> Callable[[int, int], None]:
    """Say how far a long preparation is, at each tenth."""
    said = {0}

    def show(done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if total > 50_000_000 and tenth not in said:
            said.add(tenth)
            logger.say(f"preparing data: {human_count(done)} of {human_count(total)} bytes")

    return show


def _fix_vocabulary(run: RunConfig, data: TokenSet) -> RunConfig:
    """Take the tokenizer's vocabulary where the configuration leaves it open."""
    return run if run.model.vocab_size else run.with_vocab(data.tokenizer.padded_vocab_size)


def _claim_directory(request: Request, run: RunConfig) -> tuple[RunDirectory, Path | None]:
    """The run's directory, and the checkpoint to go on from; first rank only."""
    directory = RunDirectory.choose(request.runs_dir, run, fresh=request.fresh)
    parent = request.runs_dir
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runs_dir {parent}: {error.strerror}; choose another --runs_dir") from None
    if not os.access(parent, os.W_OK):
        raise InputError(f"runs_dir {parent} cannot be written; choose another --runs_dir")
    return directory, directory.newest_checkpoint()


def _load(
    backend: Backend, run: RunConfig, data: TokenSet, checkpoint: Path | None, plan: BatchPlan, logger: Logger
) -> Progress:
    """Initial weights, or a checkpoint's state."""
    if checkpoint is None:
        backend.load_weights(backend.model.initial_weights(run.train.seed))
        return Progress(step=0, tokens=0)
    header = store.read_header(checkpoint)
    if json.dumps(header.tokenizer, sort_keys=True) != json.dumps(data.tokenizer.as_dict(), sort_keys=True):
        raise InputError(
            f"{checkpoint} was trained with another tokenizer or vocabulary than {run.data.input_file} has; "
            "use the data it was trained on, or --fresh"
        )
    progress = header.progress
    backend.load_states(store.read_states(checkpoint), progress.step)
    backend.load_scaler(progress.loss_scale, progress.good_steps)
    logger.say(f"resumed  from {checkpoint}, step {progress.step} of {total_steps(run.train, plan)}")
    return progress
