"""Prepares a run's data once on each machine, and opens them on every rank. A resumed run keeps its earlier tokens."""

from contextlib import suppress
from dataclasses import dataclass

from scalegpt.backends import World
from scalegpt.checkpoint.reader import read_manifest
from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.presets import as_file
from scalegpt.config.run import DATA, DataConfig
from scalegpt.config.tokenizer import NAMES, is_file, same_kind
from scalegpt.data.foreign.given import found_at
from scalegpt.data.foreign.opening import tokenizer_setting
from scalegpt.data.prepare import Progress
from scalegpt.data.prepared import prepared_at
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.tokenizers import HFTokenizer, load_tokenizer
from scalegpt.data.windows.mixture import Mixture, Place, prepare_mixture
from scalegpt.errors import InputError
from scalegpt.text import one_line
from scalegpt.training.job import document_end
from scalegpt.training.output.logger import Logger
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.units import human_count

REPORTED_FROM = 50_000_000
"""If the text has more bytes than this, its preparation reports progress."""


@dataclass(frozen=True)
class ReadyData:
    """The tokens of a run, and the settings that follow from them.

    Attributes:
        tokens: the training and held-out tokens of all sources, opened on this rank.
        digest: SHA-256 of the tokenizer and the tokens, and of the shares of several sources.
        settings: the data settings, with the kind of tokenizer that made the tokens.
        model: the model settings, with a vocabulary that fits the tokens.
    """

    tokens: Mixture
    digest: str
    settings: DataConfig
    model: ModelConfig


def prepare_data(request: Request, world: World, logger: Logger, stop: StopRequest) -> ReadyData:
    """Prepare and check the data once on each machine, then open them on every rank; all ranks must call it together.

    The request has the tokenizer of the prepared tokens, if any (:func:`with_tokenizer_of_tokens`).

    Raises:
        InputError: the data cannot be used, or differ between machines.
        Stopped: a rank was asked to stop.
    """
    run = request.run
    kept = world.on_first(lambda: None if request.fresh else tokens_to_keep(request))

    def work() -> tuple[tuple[Place, ...], str, list[str]]:
        tokens, changed = prepare_mixture(
            run.data, kept=kept, progress=lambda source: _progress(logger, stop, source if several else "data")
        )
        _, model = _fit_settings(run, request.given, tokens)
        packs = document_end(run, tokens.tokenizer) is not None
        tokens.check(vocab_size=model.vocab_size, block_size=model.block_size, packs_documents=packs)
        return tokens.places, tokens.digest, changed

    several = len(run.data.sources) > 1
    places, digest, changed = world.on_each_machine(work)
    if len({*world.gather(digest)}) > 1:
        raise InputError(
            f"{run.data.input_file} gives different tokens on some machines; give all machines the same files"
        )
    for each in changed:
        logger.say(f"warning: {each}; --allow_change {DATA} trains on the text as it is now")
    tokens = Mixture.open(places, run.data)
    return ReadyData(tokens, digest, *_fit_settings(run, request.given, tokens))


def tokens_to_keep(request: Request) -> dict[str, str] | None:
    """The tokens that a resumed run keeps even if their text has changed since: name of each source → digest.

    None means that the text is read as it is now, because the run has no checkpoint yet, the user asks for other data, or
    the ledger lacks the digests of several sources.
    """
    directory = RunDirectory.of(request.runs_dir, request.run)
    saved = directory.newest_checkpoint()
    earlier = None if saved is None else directory.read_config()
    if saved is None or earlier is None or not request.allow_change.isdisjoint({DATA, "tokenizer"}):
        return None
    before, now = earlier.get("data"), as_file(request.run)["data"]
    if not isinstance(before, dict):
        return None
    if "tokenizer" not in request.given:
        now |= {"tokenizer": before.get("tokenizer")}
    if same_kind(before.get("tokenizer"), now["tokenizer"]):
        now |= {"tokenizer": before.get("tokenizer")}  # the preparation compares what two files hold
    now |= {"workers": before.get("workers")}  # any number of threads makes the same tokens
    if any(now.get(key) != value for key, value in before.items()):
        return None
    try:
        digest = read_manifest(saved).header.data
    except InputError:  # the checkpoint is damaged: an earlier one of the same tokens will be chosen
        digest = next((stretch.data for stretch in reversed(directory.ledger.read())), None)
    names = [source.text for source in request.run.data.sources]
    if len(names) == 1:
        return None if digest is None else {names[0]: digest}
    listed = next((stretch.sources for stretch in reversed(directory.ledger.read()) if stretch.data == digest), ())
    found = {source.name: source.data for source in listed}
    return found if found.keys() == set(names) else None


def with_tokenizer_of_tokens(data: DataConfig, given: frozenset[str]) -> DataConfig:
    """Return the settings with the tokenizer of the prepared tokens, if a source is such; text beside them gets it too.

    A tokenizer that the user names stays: :func:`prepare_data` compares it with the tokens.

    Raises:
        InputError: the files of another program do not say which tokenizer made them, or are malformed.
    """
    if "tokenizer" in given:
        return data
    prepared = [path for source in data.sources if (path := prepared_at(source.text)) is not None]
    if not prepared:
        return data
    of_others = {path: found for path in prepared if (found := found_at(path)) is not None}
    ours = next((path for path in prepared if path not in of_others), None)
    if ours is None:
        # A tokenizer that is not the default is the one of the model that the run starts from (``init_from``).
        named = None if data.tokenizer == DataConfig().tokenizer else data.tokenizer
        return data.changed(tokenizer=tokenizer_setting(next(iter(of_others.values())), named))
    with suppress(InputError):  # prepare_data reports what is wrong with the tokens
        return data.changed(tokenizer=setting_of(open_tokens(ours)))
    return data


def setting_of(tokens: TokenSet) -> str:
    """The setting ``tokenizer`` for prepared tokens: the tokenizer's kind, or the tokens' folder, which holds its file."""
    return tokens.tokenizer.kind if tokens.tokenizer.kind in NAMES else str(tokens.path)


def _progress(logger: Logger, stop: StopRequest, what: str) -> Progress:
    """Make a callback that reports each tenth of a long preparation, and ends the preparation if a stop is requested."""
    reported = {0}

    def report(done: int, total: int, tokens: int = 0) -> None:  # noqa: ARG001 - see Progress
        stop.check_alone()
        tenth = 10 * done // max(total, 1)
        if total > REPORTED_FROM and tenth not in reported:
            reported.add(tenth)
            logger.say(f"preparing {what}: {human_count(done)} of {human_count(total)} bytes")

    return report


def _fit_settings(run: RunConfig, given: frozenset[str], tokens: Mixture) -> tuple[DataConfig, ModelConfig]:
    """Return the data settings with the tokenizer of the tokens, and the model settings with a vocabulary that fits it.

    A vocabulary that the user gave is kept. A preset's vocabulary of 50,304 is replaced for bytes and characters: most
    rows of the embedding would be unused, and the head's matmul over them would take most of a small model's time.

    Raises:
        InputError: the user names another tokenizer than that of the prepared data.
    """
    asked, made = run.data.tokenizer, tokens.tokenizer
    kind = made.kind
    if is_file(asked) and isinstance(made, HFTokenizer):
        is_same = load_tokenizer(asked, run.data.end_of_text).text_digest == made.text_digest
    else:
        is_same = asked == kind
    if "tokenizer" in given and not is_same:
        which = f"the {kind} tokenizer" if kind in NAMES else "another tokenizer.json"
        raise InputError(
            f"{one_line(tokens.sources[0].name)} was prepared with {which}, not {asked}; omit --tokenizer, or give the text "
            "itself as --input_file"
        )
    # The folder of prepared tokens holds the tokenizer.json that made them.
    data, model = run.data.changed(tokenizer=asked if is_same else setting_of(tokens.sources[0].tokens)), run.model
    if model.vocab_size and ("vocab_size" in given or kind == "gpt2"):
        return data, model
    return data, model.changed(vocab_size=tokens.tokenizer.padded_vocab_size)
