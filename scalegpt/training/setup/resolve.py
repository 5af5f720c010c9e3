"""Fills in the open settings of a request that neither the planner nor the data decide, for example the precision."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from scalegpt.backends import World
from scalegpt.backends.capabilities import check_attention, check_precision, device_name, resolve_compile
from scalegpt.checkpoint.address import Address, try_out
from scalegpt.config import ParallelConfig, RunConfig
from scalegpt.config.tokenizer import TOKENIZER_JSON, TOKENS, is_file
from scalegpt.data.prepared import prepared_at
from scalegpt.errors import InputError, RunError
from scalegpt.hardware.processor import Processor, kept
from scalegpt.planner.batches import sequences_per_rank
from scalegpt.planner.checks import check_ranks, with_expected_vocabulary
from scalegpt.speed.precision import resolve_precision
from scalegpt.speed.rates import measure_if_needed
from scalegpt.training.request import Request
from scalegpt.training.resilience import oom
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.launch_marks import begun_before, went_back_before
from scalegpt.training.runs.mirror import fetch
from scalegpt.training.setup.data import with_tokenizer_of_tokens

LONGEST_NAME = 200
"""Largest number of characters in a run's name. File systems allow 255, and ``--fresh`` appends a number."""

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Resolved:
    """A request in which the settings that depend on this machine and on the run so far are filled in.

    Attributes:
        request: the request, with the tokenizer of prepared tokens; after a restart by the launcher, it is changed to
            resume the run that the first start began.
        run: the configuration with its precision, with the layout that an earlier process of the run chose, and with the
            tokenizer and vocabulary that are expected of the data.
        open: names of the settings that the planner still has to choose.
        compiled: whether the model's blocks are compiled.
        warning: why the blocks are not compiled although the user asked for it; None: there is no such warning.
        notes: lines to print.
    """

    request: Request
    run: RunConfig
    open: frozenset[str]
    compiled: bool
    warning: str | None
    notes: tuple[str, ...]


def resolve_request(request: Request, world: World) -> Resolved:
    """Choose the precision, try the attention backend, decide on compiling; all ranks must call it together.

    Raises:
        InputError: the run's name is not a valid folder name, or this machine does not support a setting.
    """
    check_name(request.run.name)
    fetched = _reach_checkpoints(request, world)
    request, kept = world.on_first(lambda: _with_kept_tokenizer(_as_restarted(request)))
    data = world.on_first(lambda: with_tokenizer_of_tokens(request.run.data, request.given))
    request = replace(request, run=replace(request.run, data=data))
    run, open_, notes = world.on_first(lambda: _as_chosen_before(request, world))
    run = world.on_first(lambda: with_expected_vocabulary(run, request.given))
    world.on_first(lambda: _check_vocabulary(run))
    train = run.train
    if "backend" not in open_:
        check_ranks(run, world.size)
    # What is kept of processors may differ between machines, so rank 0 decides for all.
    measuring = world.on_first(_measure_processor) if world.device.type == "cpu" else ()
    precision = world.on_first(lambda: resolve_precision(run, world.device))
    if "backend" not in open_:
        check_precision(run.parallel.backend, precision, world.device)
    check_attention(train.attention, precision, world.device, run.model.head_width, dropout=run.model.dropout > 0)
    compiled, warning = resolve_compile(train.compile, world.device)
    return Resolved(
        request,
        replace(run, train=train.changed(precision=precision)),
        open_,
        compiled,
        warning,
        (*request.notes, *fetched, *kept, *measuring, *notes),
    )


def _reach_checkpoints(request: Request, world: World) -> tuple[str, ...]:
    """Try an address of checkpoints on each machine, and fetch the run's folder from beside them where it is missing.

    Returns:
        A line on the folder, if it was fetched.

    Raises:
        InputError: the address cannot be used.
    """
    directory = RunDirectory.of(request.runs_dir, request.run)
    address = directory.checkpoints
    if isinstance(address, Address):
        world.on_each_machine(lambda: try_out(address))
    note = None if request.fresh else world.on_first(lambda: fetch(directory))
    return () if note is None else (note,)


def _measure_processor() -> tuple[str, ...]:
    """Measure the rates of this machine's processor, unless they are stored, and return the lines to print."""
    damaged = kept(Processor.here(torch.__version__)).warning
    notes = () if damaged is None else (f"warning: {damaged}; they are measured again",)
    try:
        done = measure_if_needed()
    except RunError as error:  # the run needs no rates: its predicted times and its precision are then estimates
        return (*notes, f"warning: {error}; the predicted time is an estimate, and --precision auto is fp32")
    return notes if done is None else (*notes, f"speed    {done.line()}")


def check_name(name: str) -> None:
    """Refuse a model name that is not a plain folder name.

    Raises:
        InputError: the name is empty or too long, starts with a character other than a letter or digit, or has characters
            other than letters, digits, dot, underscore and hyphen.
    """
    if len(name) > LONGEST_NAME:
        raise InputError(
            f"model_name {name[:20]}… has {len(name):,} characters; give a --model_name of at most {LONGEST_NAME}"
        )
    if not _FOLDER_NAME.fullmatch(name):
        raise InputError(
            f"model_name {name!r} must be a plain folder name: give a --model_name of letters, digits, '.', '_', '-'"
        )


def _as_restarted(request: Request) -> Request:
    """Change the request if this is a launcher's restart.

    With ``--fresh``, the restart resumes the run that the first start began, instead of beginning another. With
    ``--resume_step``, if the first start has already gone back to that step, the restart resumes from the newest checkpoint.
    """
    step = request.resume_step
    if step is not None and went_back_before(request.runs_dir / request.run.name, step):
        return replace(request, resume_step=None)
    begun = begun_before(request.runs_dir, request.run.name) if request.fresh else None
    return request if begun is None else replace(request, run=replace(request.run, name=begun), fresh=False)


def _with_kept_tokenizer(request: Request) -> tuple[Request, list[str]]:
    """Change the request to use the run's copy of ``tokenizer.json``, if the original is gone and the run has a copy.

    Returns:
        The request, and a line on the copy, if it is used.
    """
    run, folder = request.run, request.runs_dir / request.run.name
    asked = run.data.tokenizer
    if request.fresh or not is_file(asked) or Path(asked).exists() or not (folder / TOKENIZER_JSON).is_file():
        return request, []
    changed = replace(run, data=run.data.changed(tokenizer=str(folder)))
    return replace(request, run=changed), [f"tokenizer {asked} is gone; the run's copy in {folder} is used"]


def _as_chosen_before(request: Request, world: World) -> tuple[RunConfig, frozenset[str], list[str]]:
    """Fill in the settings that earlier processes of the run chose.

    Returns:
        The run, the names of the settings that are still open, and a line if an earlier micro batch ran out of memory.
    """
    if request.fresh:
        return request.run, request.open, []
    directory = RunDirectory.of(request.runs_dir, request.run)
    run, open_ = _with_earlier_layout(request, directory, world)
    smaller = oom.shrunk(run, directory, ranks=world.size, device=device_name(world.device))
    return (run, open_, []) if smaller is None else (smaller[0], open_ - {"micro_batch"}, [smaller[1]])


def _with_earlier_layout(request: Request, directory: RunDirectory, world: World) -> tuple[RunConfig, frozenset[str]]:
    """Return the run with the layout that an earlier process chose, and the names of the settings that are still open.

    The layout is taken over only on the same number of ranks of the same device, and only if its micro batch divides the
    sequences per rank of a step.
    """
    run = directory.with_earlier_settings(request.run, request.given)
    earlier, plan = directory.read_config(), directory.read_plan()
    here = world.size, device_name(world.device)
    if earlier is None or plan is None or (plan.get("ranks"), plan.get("device")) != here:
        return run, request.open
    values = {**earlier, **earlier["train"]}
    chosen = {key: values[key] for key in request.open & values.keys()}
    layout = {key: chosen.pop(key) for key in ParallelConfig.settings() if key in chosen}
    with_layout = replace(
        run,
        train=run.train.changed(**chosen),
        parallel=run.parallel.changed(**layout, **({"ds_config": None} if layout else {})),
    )
    if sequences_per_rank(with_layout, world.size) % with_layout.train.micro_batch:
        return run, request.open
    return with_layout, request.open - values.keys()


def _check_vocabulary(run: RunConfig) -> None:
    """Refuse a vocabulary that lacks ids of a named tokenizer, since its last id ends every document.

    Prepared tokens may lack the largest ids; the data stage compares each id.

    Raises:
        InputError: the vocabulary is too small.
    """
    kind, size = run.data.tokenizer, run.model.vocab_size
    if size < TOKENS.get(kind, 0) and any(prepared_at(source.text) is None for source in run.data.sources):
        raise InputError(
            f"the {kind} tokenizer ends documents with id {TOKENS[kind] - 1:,}, outside the vocabulary of {size:,}; give "
            "--vocab_size auto, or another --tokenizer"
        )
