"""The data of a run: prepared once on each machine, opened on every rank; a run that resumes keeps the tokens that it has."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scalegpt.backends import World
from scalegpt.checkpoint.reader import read_manifest
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file
from scalegpt.config.run import DATA
from scalegpt.data.prepare import prepare_again, prepare_cached
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.errors import InputError
from scalegpt.training.loggers import Logger
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.units import human_count


def open_data(
    run: RunConfig, given: frozenset[str], world: World, logger: Logger, stop: StopRequest, kept: str | None
) -> tuple[TokenSet, str]:
    """Prepare and check the data once on each machine, then open it on every rank.

    Args:
        run: says which.
        given: the settings that the user named.
        world: the ranks.
        logger: for progress, and for what has changed.
        stop: ends a long preparation.
        kept: digest of the tokens that the run keeps; None: it begins, or takes what there is.

    Returns:
        The data and their digest.

    Raises:
        InputError: the data cannot be used, or machines have different ones.
    """
    if run.data.input_file is None:
        raise InputError("no data: give --input_file with a text file, a folder, or a folder of prepared tokens")

    def work() -> tuple[str, str, str | None]:
        progress = _progress(logger, stop)
        if kept is None:
            data, changed = prepare_cached(run.data, progress=progress), None
        else:
            data, changed = prepare_again(run.data, kept, progress=progress)
        model = fix_data(run, given, data).model
        data.check_vocabulary(model.vocab_size)
        data.check_block_size(model.block_size)
        return str(data.path), data.digest, changed

    path, digest, changed = world.on_each_machine(work)
    if len({*world.gather(digest)}) > 1:
        raise InputError(f"{run.data.input_file} gives other tokens on some machines; give all machines the same files")
    if changed is not None:
        logger.say(
            f"warning: {changed}; the run resumes with the tokens that it began with, which are still in {path}; "
            f"--allow_change {DATA} trains on the text as it is now"
        )
    return open_tokens(Path(path)), digest


def tokens_to_keep(
    directory: RunDirectory, run: RunConfig, *, given: frozenset[str], allowed: frozenset[str]
) -> str | None:
    """The digest of the tokens that a run resumes with, whatever has become of their text; None where that is open.

    It is open where the run has no checkpoint yet, and where the user asks for other data.

    Args:
        directory: the run's.
        run: as it is to resume.
        given: the settings that the user named.
        allowed: what the user allows to differ.
    """
    saved = directory.newest_checkpoint()
    theirs = None if saved is None else directory.read_config()
    if saved is None or theirs is None or not allowed.isdisjoint({DATA, "tokenizer"}):
        return None
    before, ours = theirs.get("data"), as_file(run)["data"]
    if not isinstance(before, dict):
        return None
    if "tokenizer" not in given:
        ours |= {"tokenizer": before.get("tokenizer")}
    if any(ours.get(key) != value for key, value in before.items()):
        return None
    try:
        return read_manifest(saved).header.data
    except InputError:  # damaged: an earlier one will be chosen, of the same tokens
        stretches = directory.ledger.read()
        return stretches[-1].data if stretches else None


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


def fix_data(run: RunConfig, given: frozenset[str], data: TokenSet) -> RunConfig:
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
