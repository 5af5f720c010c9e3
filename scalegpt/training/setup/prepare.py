"""Turns a request into a job that is ready to train. All settings and data are checked here, before the first step."""

from dataclasses import replace
from typing import Any

from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.backends.ports import use_loopback
from scalegpt.config import RunConfig
from scalegpt.config.backends import DEEPSPEED
from scalegpt.errors import InputError
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.checks import check_installed, check_optimizer
from scalegpt.planner.length import length_notes
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.training.job import Job, document_end
from scalegpt.training.memory import predicted_line
from scalegpt.training.output.logger import Logger
from scalegpt.training.profile.recorder import check_profile
from scalegpt.training.request import Request
from scalegpt.training.resilience.rollback import restore
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.changes import rate_change
from scalegpt.training.runs.resume import first_stretch, resume_hint, resumed_line
from scalegpt.training.runs.summary import (
    describe,
    mixture_warnings,
    plan_summary,
    predicted_speed,
    sources_summary,
    total_steps,
    unused,
)
from scalegpt.training.setup.data import ReadyData, prepare_data
from scalegpt.training.setup.directory import Start, open_run, write_start
from scalegpt.training.setup.origin import Opened, open_initial
from scalegpt.training.setup.planning import Planned, choose_layout
from scalegpt.training.setup.resolve import Resolved, resolve_request
from scalegpt.training.trackers.table import check_trackers


def prepare(request: Request, world: World, stop: StopRequest | None = None) -> Job:
    """Resolve, plan, prepare the data, open the run's folder and build the model; all ranks must call it together.

    Args:
        request: the user's request.
        world: the ranks.
        stop: records whether this process is asked to stop during the set-up; None: it cannot be stopped.

    Raises:
        InputError: a setting, the data or the run's directory cannot be used. No file of the run's directory but the lock was
            changed.
        Stopped: a rank was asked to stop. No file of the run's directory but the lock was changed.
    """
    stop = stop or StopRequest()
    resolved = resolve_request(request, world)
    world.on_first(lambda: check_trackers(request.run.train.trackers, request.runs_dir))
    initial = open_initial(resolved.request, world)
    planned = _plan(resolved, resolved.run, world)
    train = planned.run.train
    logger = Logger(
        speaks=world.is_first,
        total=total_steps(train, planned.batch),
        every=train.log_every,
        plain=request.progress == "plain",
    )
    data = prepare_data(resolved.request, world, logger, stop)
    if initial is not None:
        initial.check_tokenizer(planned.run, data.tokens.tokenizer)
    if data.model.vocab_size != planned.run.model.vocab_size:
        planned = _plan(resolved, replace(resolved.run, model=data.model), world)
    parallel = planned.run.parallel
    run = replace(planned.run, data=data.settings, parallel=parallel.changed(zero_stage=parallel.stage))
    logger.total = total_steps(run.train, planned.batch)
    check_profile(run.train, logger.total)
    settings = _deepspeed_settings(run, planned.batch, world)
    document_end(run, data.tokens.tokenizer)
    prompt = _prompt(run, data)
    start = open_run(resolved.request, run, planned.batch, data, world, stop)
    try:
        run = replace(run, name=start.directory.path.name)
        return _make_job(resolved, planned, start, run, data, initial, prompt, settings, world, logger, stop)
    except BaseException:
        start.directory.unlock()
        raise


def _make_job(
    resolved: Resolved,
    planned: Planned,
    start: Start,
    run: RunConfig,
    data: ReadyData,
    initial: Opened | None,
    prompt: list[int],
    settings: dict[str, Any] | None,
    world: World,
    logger: Logger,
    stop: StopRequest,
) -> Job:
    """Describe the run, build and load the backend, and write the files that the run's folder needs before the first step."""
    steps = logger.total
    asked = resolved.request
    hint = resume_hint(run.name, asked.run.name, fresh=asked.fresh, goes_back=asked.resume_step is not None)
    _describe(resolved, planned, start, run, data, world, logger, hint)
    model = build_model(run, compiled=resolved.compiled, device=world.device)
    model.set_packing(document_end(run, data.tokens.tokenizer))
    backend = make_backend(run, world, planned.batch.grad_accum, model, optimizer_factory(run.train), settings)
    _load(backend, start, run, initial, steps, logger)
    _report_changes(start, run, steps, world, logger)
    stretch = first_stretch(run, planned.batch, data.tokens, data.digest, start.progress)
    stop.check(world)
    plan_file = {
        **plan_summary(run, planned.plan, world, settings),
        "sources": sources_summary(run.train, planned.batch, data.tokens),
    }
    kept = {**data.tokens.tokenizer.files, **({} if initial is None else initial.kept)}
    world.on_first(lambda: write_start(start, run, plan_file, stretch, asked.resume_step, kept))
    return Job(
        run=run,
        world=world,
        batch_plan=planned.batch,
        plan=planned.plan,
        data=data.tokens,
        data_digest=data.digest,
        prompt=prompt,
        backend=backend,
        directory=start.directory,
        logger=logger,
        total_steps=steps,
        progress=start.progress,
        stretch=stretch,
        history=start.history,
        resumed=start.choice.checkpoint is not None,
        stop=stop,
        resume_hint=hint,
        compiled=resolved.compiled,
    )


def _plan(resolved: Resolved, run: RunConfig, world: World) -> Planned:
    """Choose the layout of a run, and check that this installation can train with it.

    Raises:
        InputError: nothing fits, or the optimizer, the backend or the loopback interface cannot be used.
    """
    request = resolved.request
    planned = choose_layout(run, world, open_=resolved.open, margin=request.margin, reopen=request.open)
    check_optimizer(planned.run)
    check_installed(planned.run.parallel.backend)
    if world.size == 1 and not planned.run.parallel.spec.one_process:
        use_loopback()  # refuses a machine without a loopback interface before anything is written
    return planned


def _deepspeed_settings(run: RunConfig, batch: BatchPlan, world: World) -> dict[str, Any] | None:
    if run.parallel.spec is not DEEPSPEED:
        return None
    return deepspeed_settings(run, grad_accum=batch.grad_accum, ranks=world.size, on_cuda=world.device.type == "cuda")


def _prompt(run: RunConfig, data: ReadyData) -> list[int]:
    """Return the token ids that samples continue.

    These are the ids of ``sample_prompt``, after the token that begins a text if the tokenizer has one. Without a
    prompt it is that token alone, else the end-of-text token, else the first held-out token.

    Raises:
        InputError: a token of the prompt is not in the vocabulary.
    """
    given, vocab_size = run.train.sample_prompt or "", run.model.vocab_size
    try:
        ids = data.tokens.tokenizer.prompt_ids(given)
    except InputError as error:
        raise InputError(f"sample_prompt: {error}") from None
    if not given and (not ids or max(ids) >= vocab_size):
        return [int(data.tokens.val.parts[0][0])]
    if max(ids) >= vocab_size:
        raise InputError(
            f"sample_prompt {given!r} holds token {max(ids)}, outside the vocabulary of {vocab_size}; "
            "give another --sample_prompt"
        )
    return ids


def _describe(
    resolved: Resolved,
    planned: Planned,
    start: Start,
    run: RunConfig,
    data: ReadyData,
    world: World,
    logger: Logger,
    hint: str,
) -> None:
    """Print the run's description, and every note and warning of the stages."""
    request, batch, steps = resolved.request, planned.batch, total_steps(run.train, planned.batch)
    if resolved.warning:
        logger.say(f"warning: {resolved.warning}")
    if run.train.warmup_steps >= steps > 0:
        logger.say(f"warning: the warm-up of {run.train.warmup_steps} steps never ends; use a smaller --warmup_steps")
    logger.say(describe(run, batch, world, data.tokens, compiled=resolved.compiled))
    for line in (
        *(f"warning: {each}" for each in unused(run, batch, request.given)),
        *(f"warning: {each}" for each in mixture_warnings(run.train, batch, data.tokens)),
        *length_notes(run.train, batch.tokens, request.given | request.stated),
        *planned.notes,
        *resolved.notes,
        predicted_line(planned.plan),
        *filter(None, [predicted_speed(planned.plan)]),
        *_files(start, fresh=request.fresh),
        *([f"fresh    a new run in {start.directory.path}; {hint} resumes it later"] if request.fresh else []),
        *start.notes,
    ):
        logger.say(line)


def _files(start: Start, *, fresh: bool) -> tuple[str, ...]:
    """The line that names the folder of a new run, and that of its checkpoints if it is elsewhere.

    There is none for a resumed run, whose other lines name it.
    """
    if fresh or start.choice.checkpoint is not None:
        return ()
    elsewhere = f"; checkpoints in {start.directory.checkpoints}" if start.directory.is_kept_elsewhere() else ""
    return (f"files    {start.directory.path}/{elsewhere}",)


def _load(backend: Backend, start: Start, run: RunConfig, initial: Opened | None, steps: int, logger: Logger) -> None:
    """Load the initial weights into a backend, or the state of the checkpoint to resume from."""
    checkpoint = start.choice.checkpoint
    if checkpoint is None and initial is not None:
        backend.load_weights(initial.origin.weights(run.model))
        logger.say(f"weights  from {run.train.init_from}")
        return
    if checkpoint is None:
        backend.load_weights(backend.model.initial_weights(run.train.seed))
        return
    restore(backend, checkpoint, start.progress)
    logger.say(resumed_line(checkpoint.path, start.progress, steps, start.choice.past.last_step))


def _report_changes(start: Start, run: RunConfig, steps: int, world: World, logger: Logger) -> None:
    """Print the settings that differ from the run so far, if steps are left, and the effect on the learning rate."""
    directory, step = start.directory, start.progress.step
    for key, change in start.changes.items() if step < steps else ():
        logger.say(f"changed  {key}: {change}")
    lines = world.on_first(lambda: rate_change(directory.read_config(), directory.read_plan(), run.train, step, steps))
    for line in lines:
        logger.say(line)
