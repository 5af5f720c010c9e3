"""From a configuration to a prepared job: everything that can be refused is refused here, before the first step."""

import os
import re
from dataclasses import replace
from typing import Any

from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.backends.capabilities import (
    check_attention,
    check_precision,
    device_name,
    resolve_compile,
)
from scalegpt.backends.ports import use_loopback
from scalegpt.backends.precision import resolve_precision
from scalegpt.checkpoint import store
from scalegpt.config import ModelConfig, ParallelConfig, RunConfig
from scalegpt.data.shards import TokenSet
from scalegpt.errors import InputError
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.batches import BatchPlan, sequences_per_rank
from scalegpt.planner.checks import check_installed, check_optimizer, check_ranks, with_expected_vocabulary
from scalegpt.planner.length import length_notes
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.planner.memory.states import training_bytes
from scalegpt.storage import check_space
from scalegpt.training.data_setup import fix_data, open_data, tokens_to_keep
from scalegpt.training.job import Job
from scalegpt.training.loggers import Logger
from scalegpt.training.memory import MemoryWatch, predicted_line
from scalegpt.training.planning import settle_layout
from scalegpt.training.request import Request
from scalegpt.training.resilience import oom
from scalegpt.training.resilience.rollback import restore
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.beginning import write_directory
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import try_writing
from scalegpt.training.runs.history import read_history
from scalegpt.training.runs.launch_marks import begun_before, went_back_before
from scalegpt.training.runs.rate_change import rate_change
from scalegpt.training.runs.resume import (
    first_stretch,
    goes_on_with,
    newest_whole_checkpoint,
    resumed_line,
    starting_point,
)
from scalegpt.training.runs.summary import describe, plan_summary, total_steps
from scalegpt.training.runs.unused_settings import unused

LONGEST_NAME = 200
"""File systems allow 255; ``--fresh`` appends a number."""

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def prepare(request: Request, world: World, stop: StopRequest | None = None) -> Job:
    """Resolve, check and build everything, in the order in which a user wants to hear of mistakes.

    Args:
        request: what to train.
        world: the ranks.
        stop: whether this process was asked to stop meanwhile; None: nobody can.

    Raises:
        InputError: a setting, the data or the run's directory will not do; then nothing in that directory was changed.
        Stopped: a rank was asked to stop; likewise, its lock aside.
    """
    stop = stop or StopRequest()
    check_name(request.run.name)
    request = world.on_first(lambda: _as_begun(request))
    settled, open_, shrunk = world.on_first(lambda: _settled(request, world))
    timed = with_expected_vocabulary(settled, request.given).model
    run, compiled, warning = _resolve_device_settings(settled, timed, world, open_)
    # Before any data are read, so that a run that cannot fit is refused at once.
    reopen = request.open
    expected = with_expected_vocabulary(run, request.given)
    chosen = settle_layout(expected, world, open_=open_, margin=request.margin, reopen=reopen)
    check_optimizer(chosen.run)
    check_installed(chosen.run.parallel.backend)
    if world.size == 1 and chosen.run.parallel.backend != "plain":
        use_loopback()  # refuses a machine without one before anything is written
    logger = Logger(speaks=world.is_first, total=total_steps(run.train, chosen.batch), every=run.train.log_every)
    kept = world.on_first(lambda: _tokens_to_keep(request, run))
    data, digest = open_data(run, request.given, world, logger, stop, kept)
    run = fix_data(run, request.given, data)
    if run.model.vocab_size != chosen.run.model.vocab_size:
        chosen = settle_layout(run, world, open_=open_, margin=request.margin, reopen=reopen)
    run, plan = replace(chosen.run, data=run.data), chosen.batch
    run = replace(run, parallel=run.parallel.changed(zero_stage=run.parallel.stage))
    settings = _deepspeed_settings(run, plan, world)
    prompt = _prompt(run, data)
    directory, changes = world.on_first(lambda: _claim_directory(request, run, plan, world.size))
    run = replace(run, name=directory.path.name)
    stop.check(world)
    # Before the checkpoints are looked at: another process may be writing them.
    weaknesses = [f"warning: {weakness}" for weakness in world.on_first(directory.lock)]
    try:
        found = newest_whole_checkpoint(directory, world, trusted=request.trust_checkpoint, step=request.resume_step)
        progress, others = world.on_first(
            lambda: starting_point(found, directory, run, data, digest, allowed=request.allow_change)
        )
    except InputError:
        directory.unlock()
        raise
    history = world.on_first(lambda: read_history(directory.metrics, progress.step, run.train.spike_window))
    if warning:
        logger.say(f"warning: {warning}")
    if run.train.warmup_steps >= total_steps(run.train, plan) > 0:
        logger.say(f"warning: the warm-up of {run.train.warmup_steps} steps never ends; use a smaller --warmup_steps")
    logger.say(describe(run, plan, world, data, compiled=compiled))
    back = request.resume_step is not None
    again = goes_on_with(directory.path.name, request.run.name, fresh=request.fresh, back=back)
    began = [f"fresh    a new run in {directory.path}; {again} goes on with it later"] if request.fresh else []
    gaps = world.on_first(lambda: [f"warning: {gap}" for gap in directory.gaps(history)])
    idle = [f"warning: {line}" for line in unused(run, plan, request.given)]
    length = length_notes(run.train, plan.tokens, request.given | request.stated)
    for note in (
        *idle, *length, *chosen.notes, *shrunk, predicted_line(chosen.plan), *began, *weaknesses, *found.notes, *gaps,
    ):  # fmt: skip
        logger.say(note)
    watch = MemoryWatch(world.device)
    backend = _build(run, plan, world, settings, compiled=compiled)
    if found.checkpoint is None:
        backend.load_weights(backend.model.initial_weights(run.train.seed))
    else:
        restore(backend, found.checkpoint, progress)
        logger.say(resumed_line(found.checkpoint.path, progress, total_steps(run.train, plan), found.past.steps))
    for key, change in {**changes, **others}.items() if progress.step < total_steps(run.train, plan) else ():
        logger.say(f"changed  {key}: {change}")
    for line in world.on_first(lambda: _rate_change(directory, run, plan, progress.step)):
        logger.say(line)
    summary = {**plan_summary(run, plan, world, settings), "memory": chosen.plan.memory(), "speed": chosen.plan.speed()}
    stretch = first_stretch(run, plan, data, digest, progress)
    stop.check(world)
    world.on_first(lambda: write_directory(directory, run, summary, stretch, found, history, request.resume_step))
    return Job(
        run=run,
        world=world,
        plan=plan,
        data=data,
        data_digest=digest,
        prompt=prompt,
        backend=backend,
        directory=directory,
        logger=logger,
        total_steps=total_steps(run.train, plan),
        progress=progress,
        stretch=stretch,
        history=history,
        resumed=found.checkpoint is not None,
        memory=chosen.plan,
        watch=watch,
        stop=stop,
        again=again,
    )


def _rate_change(directory: RunDirectory, run: RunConfig, plan: BatchPlan, step: int) -> list[str]:
    total = total_steps(run.train, plan)
    return rate_change(directory.read_config(), directory.read_plan(), run.train, step, total)


def _as_begun(request: Request) -> Request:
    """The request as a launcher's restart must read it: what its first start began, or went back to, goes on."""
    step = request.resume_step
    if step is not None and went_back_before(request.runs_dir / request.run.name, step):
        return replace(request, resume_step=None)
    begun = begun_before(request.runs_dir, request.run.name) if request.fresh else None
    return request if begun is None else replace(request, run=replace(request.run, name=begun), fresh=False)


def check_name(name: str) -> None:
    """Refuse a model name that is no plain folder name.

    Raises:
        InputError: it holds a separator, starts with a dot, or is too long.
    """
    if len(name) > LONGEST_NAME:
        raise InputError(
            f"model_name {name[:20]}… has {len(name):,} characters; give a --model_name of at most {LONGEST_NAME}"
        )
    if not _FOLDER_NAME.fullmatch(name):
        raise InputError(
            f"model_name {name!r} must be a plain folder name: give a --model_name of letters, digits, '.', '_', '-'"
        )


def _resolve_device_settings(
    run: RunConfig, model: ModelConfig, world: World, open_: frozenset[str]
) -> tuple[RunConfig, bool, str | None]:
    """Fix the precision, try the attention backend, decide on compiling.

    Args:
        run: as far as it is resolved.
        model: its model as it will be, whose matmuls are timed on a CPU.
        world: the ranks.
        open_: the settings that the planner chooses later.
    """
    train = run.train
    if "backend" not in open_:
        check_ranks(run, world.size)
    # Measured on a CPU, so one rank decides for all.
    rows = train.micro_batch * model.block_size
    precision = world.on_first(lambda: resolve_precision(train.precision, world.device, model, rows))
    if "backend" not in open_:
        check_precision(run.parallel.backend, precision, world.device)
    check_attention(train.attention, precision, world.device, run.model.head_size, dropout=run.model.dropout > 0)
    compiled, warning = resolve_compile(train.compile, world.device)
    return replace(run, train=train.changed(precision=precision)), compiled, warning


def _settled(request: Request, world: World) -> tuple[RunConfig, frozenset[str], list[str]]:
    """The run as earlier processes of it settled it, what is open still, and a word on a micro batch that was too large."""
    if request.fresh:
        return request.run, request.open, []
    directory = RunDirectory(request.runs_dir / request.run.name)
    run, open_ = _settled_layout(request, directory, world)
    found = oom.shrunk(run, directory, ranks=world.size, device=device_name(world.device))
    return (run, open_, []) if found is None else (found[0], open_ - {"micro_batch"}, [found[1]])


def _settled_layout(request: Request, directory: RunDirectory, world: World) -> tuple[RunConfig, frozenset[str]]:
    """The run, with what it leaves open as an earlier process of the same run settled it; and what is open still."""
    run = directory.settle(request.run, request.given)
    found = directory.settled_layout(request.open, ranks=world.size, device=device_name(world.device))
    layout = {key: found[key] for key in ParallelConfig.settings() if key in found}
    tried = replace(
        run,
        train=run.train.changed(**{key: value for key, value in found.items() if key not in layout}),
        parallel=run.parallel.changed(**layout, **({"ds_config": None} if layout else {})),
    )
    if sequences_per_rank(tried, world.size) % tried.train.micro_batch:
        return run, request.open  # the step is divided otherwise now
    return tried, request.open - found.keys()


def _deepspeed_settings(run: RunConfig, plan: BatchPlan, world: World) -> dict[str, Any] | None:
    if run.parallel.backend != "deepspeed":
        return None
    return deepspeed_settings(run, grad_accum=plan.grad_accum, ranks=world.size, on_cuda=world.device.type == "cuda")


def _build(
    run: RunConfig, plan: BatchPlan, world: World, settings: dict[str, Any] | None, *, compiled: bool
) -> Backend:
    """The model in its backend, its weights still to come."""
    model = build_model(run, compiled=compiled, device=world.device)
    return make_backend(run, world, plan.grad_accum, model, optimizer_factory(run.train), settings)


def _tokens_to_keep(request: Request, run: RunConfig) -> str | None:
    directory = RunDirectory(request.runs_dir / run.name)
    return None if request.fresh else tokens_to_keep(directory, run, given=request.given, allowed=request.allow_change)


def _prompt(run: RunConfig, data: TokenSet) -> list[int]:
    """What the samples continue: the prompt given, else the end of a text, else the first held-out token.

    Raises:
        InputError: the vocabulary lacks a part of the prompt.
    """
    given, tokenizer = run.train.sample_prompt, data.tokenizer
    if not given:
        end = tokenizer.end_of_text
        return [end if end is not None and end < run.model.vocab_size else int(data.val[0])]
    try:
        tokens = [int(token) for token in tokenizer.encode(given)]
    except InputError as error:
        raise InputError(f"sample_prompt: {error}") from None
    if max(tokens) >= run.model.vocab_size:
        raise InputError(
            f"sample_prompt {given!r} holds token {max(tokens)}, past the vocabulary of {run.model.vocab_size}; "
            "give another --sample_prompt"
        )
    return tokens


def _claim_directory(
    request: Request, run: RunConfig, plan: BatchPlan, ranks: int
) -> tuple[RunDirectory, dict[str, str]]:
    """The run's directory, which can be written and has room, and what is otherwise than before; first rank only."""
    directory = RunDirectory.choose(request.runs_dir, run, fresh=request.fresh, allowed=request.allow_change)
    parent = request.runs_dir
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runs_dir {parent}: {error.strerror}; choose another --runs_dir") from None
    if not os.access(parent, os.W_OK):
        raise InputError(f"runs_dir {parent} cannot be written; choose another --runs_dir")
    try_writing(directory.path, directory.checkpoints)
    _check_space(directory, run, plan)
    return directory, directory.changes(run, ranks=ranks)


def _check_space(directory: RunDirectory, run: RunConfig, plan: BatchPlan) -> None:
    """Refuse a run whose checkpoints the disk cannot hold: those it keeps, and one more while the oldest is replaced.

    Raises:
        InputError: too little is free.
    """
    train = run.train
    ever = 1 + (total_steps(train, plan) // train.checkpoint_every if train.checkpoint_every else 0)
    more = min(ever, train.keep_checkpoints + train.keep_best + 1) - len(store.find_checkpoints(directory.checkpoints))
    states = training_bytes(run.model, train)
    check_space(directory.checkpoints, max(0, more) * (sum(states.values()) - states["gradients"]))
