"""From a configuration to a prepared job: everything that can be refused is refused here, before the first step."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scalegpt.backends import World, build_model, make_backend
from scalegpt.backends.capabilities import check_attention, device_name, resolve_compile, resolve_precision
from scalegpt.checkpoint import store
from scalegpt.checkpoint.store import Progress
from scalegpt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from scalegpt.config.run import PLANNED_BY_DEFAULT
from scalegpt.data.prepare import prepare_cached
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.data.writer import check_space
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan, sequences_per_rank
from scalegpt.planner.checks import check_ranks
from scalegpt.planner.deepspeed_settings import deepspeed_settings
from scalegpt.planner.parameters import count_parameters, format_bytes
from scalegpt.planner.search import MARGIN
from scalegpt.planner.states import training_bytes
from scalegpt.training import oom
from scalegpt.training.choice import settle_layout
from scalegpt.training.loggers import Logger, human_count
from scalegpt.training.memory import MemoryWatch, predicted_line
from scalegpt.training.optimizers import optimizer_factory
from scalegpt.training.rundir import RunDirectory
from scalegpt.training.stopping import StopRequest
from scalegpt.training.trainer import Job

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        run: the configuration, with ``auto`` where the machine or the data decide.
        runs_dir: the folder of all runs.
        fresh: start anew beside an earlier run of this name.
        given: the settings that the user named on the command line or in a file; the others are a preset's or defaults.
        stated: those that the preset names.
        margin: share of a card's memory that what is chosen leaves free.
    """

    run: RunConfig
    runs_dir: Path
    fresh: bool
    given: frozenset[str] = frozenset()
    stated: frozenset[str] = frozenset()
    margin: float = MARGIN

    @property
    def open(self) -> frozenset[str]:
        """The settings that the planner chooses: what is ``auto``, and by default the micro batch and what to recompute.

        A preset's stage is one of its backend's: with another backend it is open too.
        """
        by_default = PLANNED_BY_DEFAULT - self.given - (self.stated - {"micro_batch"})
        stage = {"zero_stage"} - self.given if "backend" in self.run.auto else frozenset()
        return self.run.auto | by_default | stage


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
    settled, open_, shrunk = world.on_first(lambda: _settled(request, world))
    run, compiled, warning = _resolve_device_settings(settled, world, open_)
    # Before any data are read, so that a run that cannot fit is refused at once.
    chosen = settle_layout(_with_expected_vocab(run, request.given), world, open_=open_, margin=request.margin)
    logger = Logger(speaks=world.is_first, total=total_steps(run.train, chosen.batch), every=run.train.log_every)
    data = _open_data(run, request.given, world, logger, stop)
    run = _fix_data(run, request.given, data)
    if run.model.vocab_size != chosen.run.model.vocab_size:
        chosen = settle_layout(run, world, open_=open_, margin=request.margin)
    run, plan = replace(chosen.run, data=run.data), chosen.batch
    run = replace(run, parallel=run.parallel.changed(zero_stage=run.parallel.stage))
    settings = _deepspeed_settings(run, plan, world)
    prompt = _prompt(run, data)
    digest = world.on_first(lambda: data.digest)
    directory, checkpoint, progress = world.on_first(lambda: _claim_directory(request, run, plan, data, digest))
    run = replace(run, name=directory.path.name)
    stop.check(world)
    world.on_first(directory.lock)
    if warning:
        logger.say(f"warning: {warning}")
    if run.train.warmup_steps >= total_steps(run.train, plan) > 0:
        logger.say(f"warning: the warm-up of {run.train.warmup_steps} steps never ends; use a smaller --warmup_steps")
    logger.say(describe(run, plan, world, data, compiled=compiled))
    for note in chosen.notes:
        logger.say(note)
    if shrunk:
        logger.say(shrunk)
    logger.say(predicted_line(chosen.plan))
    watch = MemoryWatch(world.device)
    model = build_model(run, compiled=compiled)
    backend = make_backend(run, world, plan.grad_accum, model, optimizer_factory(run.train), settings)
    if checkpoint is None:
        backend.load_weights(backend.model.initial_weights(run.train.seed))
    else:
        # The optimizer's own count leaves out the steps that were skipped.
        backend.load_states(store.read_states(checkpoint), progress.step - progress.skipped_steps)
        backend.load_scaler(progress.loss_scale, progress.good_steps)
        logger.say(f"resumed  from {checkpoint}, step {progress.step} of {total_steps(run.train, plan)}")
    summary = {**plan_summary(run, plan, world, settings), "memory": chosen.plan.memory(), "speed": chosen.plan.speed()}
    stop.check(world)
    world.on_first(lambda: _write_directory(directory, run, summary, progress.step))
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
        resumed=checkpoint is not None,
        memory=chosen.plan,
        watch=watch,
        stop=stop,
    )


def check_name(name: str) -> None:
    """Refuse a model name that is no plain folder name.

    Raises:
        InputError: it holds a separator, or starts with a dot.
    """
    if not _FOLDER_NAME.fullmatch(name):
        raise InputError(
            f"model_name {name!r} must be a plain folder name: give a --model_name of letters, digits, '.', '_', '-'"
        )


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
        f"states   {format_bytes(sum(training_bytes(model, train).values()))} for weights, gradients and moments in all",
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
        "model_state_bytes": training_bytes(run.model, run.train),
        "deepspeed": settings,
        "torch": torch.__version__,
    }


def _resolve_device_settings(run: RunConfig, world: World, open_: frozenset[str]) -> tuple[RunConfig, bool, str | None]:
    """Fix the precision, try the attention backend, decide on compiling."""
    train = run.train
    if "backend" not in open_:
        check_ranks(run, world.size)
    # Measured on a CPU, so one rank decides for all.
    precision = world.on_first(lambda: resolve_precision(train.precision, world.device))
    check_attention(train.attention, precision, world.device, run.model.head_size, dropout=run.model.dropout > 0)
    compiled, warning = resolve_compile(train.compile, world.device)
    return replace(run, train=train.changed(precision=precision)), compiled, warning


def _settled(request: Request, world: World) -> tuple[RunConfig, frozenset[str], str | None]:
    """The run as earlier processes of it settled it, what is open still, and a word on a micro batch that was too large."""
    if request.fresh:
        return request.run, request.open, None
    directory = RunDirectory(request.runs_dir / request.run.name)
    run, open_ = _settled_layout(request, directory, world)
    found = oom.shrunk(run, directory, ranks=world.size, device=device_name(world.device))
    return (run, open_, None) if found is None else (found[0], open_ - {"micro_batch"}, found[1])


def _settled_layout(request: Request, directory: RunDirectory, world: World) -> tuple[RunConfig, frozenset[str]]:
    """The run, with what it leaves open as an earlier process of the same run settled it; and what is open still."""
    run = directory.settle(request.run)
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


def _with_expected_vocab(run: RunConfig, given: frozenset[str]) -> RunConfig:
    """The run with the vocabulary that its data will give it, as far as that is known before they are read.

    Characters bring a vocabulary that only the text knows; until then it is taken to be as large as that of bytes.
    """
    kind, size = run.data.tokenizer, run.model.vocab_size
    if size and ("vocab_size" in given or kind == "gpt2"):
        return run
    expected = ModelConfig().vocab_size if kind == "gpt2" else make_tokenizer("byte").padded_vocab_size
    return run.with_vocab(expected)


def _deepspeed_settings(run: RunConfig, plan: BatchPlan, world: World) -> dict[str, Any] | None:
    if run.parallel.backend != "deepspeed":
        return None
    return deepspeed_settings(run, grad_accum=plan.grad_accum, ranks=world.size, on_cuda=world.device.type == "cuda")


def _open_data(run: RunConfig, given: frozenset[str], world: World, logger: Logger, stop: StopRequest) -> TokenSet:
    """Prepare and check the data once on each machine, then open it on every rank."""
    if run.data.input_file is None:
        raise InputError("no data: give --input_file with a text file, a folder, or a folder of prepared tokens")

    def work() -> str:
        data = prepare_cached(run.data, progress=_progress(logger, stop))
        model = _fix_data(run, given, data).model
        data.check_vocabulary(model.vocab_size)
        data.check_block_size(model.block_size)
        return str(data.path)

    return open_tokens(Path(world.on_each_machine(work)))


def _progress(logger: Logger, stop: StopRequest) -> Callable[[int, int], None]:
    """Say how far a long preparation is, at each tenth; end it where that is asked."""
    said = {0}

    def show(done: int, total: int) -> None:
        stop.check_alone()
        tenth = 10 * done // max(total, 1)
        if total > 50_000_000 and tenth not in said:
            said.add(tenth)
            logger.say(f"preparing data: {human_count(done)} of {human_count(total)} bytes")

    return show


def _fix_data(run: RunConfig, given: frozenset[str], data: TokenSet) -> RunConfig:
    """Name the tokenizer that prepared data have, and take its vocabulary where the user has not given one.

    A preset's 50,304 rows are GPT-2's vocabulary: of no use to bytes or characters, and thirty times as slow.

    Raises:
        InputError: the user asks for another tokenizer than prepared data have.
    """
    kind = data.tokenizer.kind
    if "tokenizer" in given and run.data.tokenizer != kind:
        raise InputError(
            f"{run.data.input_file} was prepared with the {kind} tokenizer, not {run.data.tokenizer}; "
            f"leave out --tokenizer, or give the text itself as --input_file"
        )
    run = replace(run, data=run.data.changed(tokenizer=kind))
    if run.model.vocab_size and ("vocab_size" in given or kind == "gpt2"):
        return run
    return run.with_vocab(data.tokenizer.padded_vocab_size)


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
    request: Request, run: RunConfig, plan: BatchPlan, data: TokenSet, digest: str
) -> tuple[RunDirectory, Path | None, Progress]:
    """The run's directory, the checkpoint to go on from, and where that stands; first rank only."""
    directory = RunDirectory.choose(request.runs_dir, run, fresh=request.fresh)
    parent = request.runs_dir
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runs_dir {parent}: {error.strerror}; choose another --runs_dir") from None
    if not os.access(parent, os.W_OK):
        raise InputError(f"runs_dir {parent} cannot be written; choose another --runs_dir")
    _check_space(directory, run, plan)
    checkpoint = directory.newest_checkpoint()
    if checkpoint is None:
        return directory, None, Progress(step=0, tokens=0)
    return directory, checkpoint, _read_progress(checkpoint, run, data, digest)


def _check_space(directory: RunDirectory, run: RunConfig, plan: BatchPlan) -> None:
    """Refuse a run whose checkpoints the disk cannot hold: those it keeps, and one more while the oldest is replaced.

    Raises:
        InputError: too little is free.
    """
    train = run.train
    ever = 1 + (total_steps(train, plan) // train.checkpoint_every if train.checkpoint_every else 0)
    more = min(ever, train.keep_checkpoints + 1) - len(store.find_checkpoints(directory.checkpoints))
    states = training_bytes(run.model, train)
    check_space(directory.checkpoints, max(0, more) * (sum(states.values()) - states["gradients"]))


def _read_progress(checkpoint: Path, run: RunConfig, data: TokenSet, digest: str) -> Progress:
    """How far a checkpoint is, if it is whole and of this data.

    Raises:
        InputError: it is damaged, or was trained on other tokens.
    """
    header = store.read_header(checkpoint)
    trained_with = json.dumps(header.tokenizer, sort_keys=True)
    if trained_with != json.dumps(data.tokenizer.as_dict(), sort_keys=True) or header.data not in {None, digest}:
        raise InputError(
            f"{checkpoint} was trained on other tokens than {run.data.input_file} gives; use the data it was trained "
            "on, another --model_name, or --fresh to start anew beside it"
        )
    return header.progress


def _write_directory(directory: RunDirectory, run: RunConfig, plan: dict[str, Any], step: int) -> None:
    """Write what a run that goes on begins with; a finished one keeps its own. First rank only."""
    if step >= plan["steps"] > 0 and directory.config.is_file():
        return
    directory.create(run, plan)
    directory.forget_after(step)
