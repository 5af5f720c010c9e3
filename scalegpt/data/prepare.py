"""Prepare text for training: tokenise it, hold out a part, and cache the token files by the text's content."""

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from scalegpt.config import DataConfig
from scalegpt.config.tokenizer import is_file
from scalegpt.data.cache import cache_errors, cache_folder, cached_with, checked, find_cached, tokens_in
from scalegpt.data.foreign.given import open_given
from scalegpt.data.leftovers import remove_abandoned
from scalegpt.data.preparation.batches import BatchReader, Position
from scalegpt.data.preparation.encoding import BatchEncoder, encoded
from scalegpt.data.preparation.identity import Preparation, identify
from scalegpt.data.preparation.tails import TailWriter
from scalegpt.data.preparation.writer import TokenWriter, may_resume_after
from scalegpt.data.prepared import prepared_at
from scalegpt.data.remote.inputs import STANDARD_INPUT, as_paths, is_standard_input, naming_standard_input
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.text.corpus import Corpus, survey
from scalegpt.data.text.documents import OUTSIDE_LINK, is_folder, is_prepared
from scalegpt.data.text.ignoring import Selection
from scalegpt.data.tokenizers import HFTokenizer, Tokenizer, load_tokenizer
from scalegpt.errors import InputError, NoSpaceError
from scalegpt.inputs import paths_of
from scalegpt.storage import check_space, disk_errors
from scalegpt.system.cores import usable_cores
from scalegpt.text import one_line

_log = logging.getLogger(__name__)


class Progress(Protocol):
    """A callback that learns how far the work is: downloads, tokenising, and the check of what is there."""

    def __call__(self, done: int, total: int, tokens: int = 0, /) -> None:
        """Take the bytes that are done, the bytes in all, and the tokens made so far; 0 where none are made."""


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    settings: DataConfig,
    *,
    progress: Progress | None = None,
) -> TokenSet:
    """Tokenise text into a folder.

    Args:
        inputs: text files, and folders of text files.
        out: the folder to make. If it already holds tokens of the same text and settings, it is used as it is.
        settings: how to prepare the text; ``input_file`` is not used.
        progress: see :data:`Progress`.

    Raises:
        InputError: there is no usable text, ``out`` holds something else, the disk is full, or a setting is invalid.
    """
    out = Path(out)
    if os.path.isfile(out):  # noqa: PTH113 - pathlib's raises where a folder is closed
        raise InputError(f"out {one_line(out)} is a file; choose another --out")
    work = _survey(inputs, settings, out)
    return _existing(out, work) or _make(work, out, progress)


def prepare_cached(data: DataConfig, *, begun_with: str | None = None, progress: Progress | None = None) -> TokenSet:
    """The tokens of ``--input_file``: prepared by the user, cached by an earlier run, or else tokenised into the cache now.

    The token files are read whole and compared with their digests.

    Args:
        data: ``input_file`` is a text file, a folder of text, several of these separated by commas, or a folder of prepared
            tokens, whose own tokenizer is then used, or token files of another program. The other settings are as for
            :func:`prepare`.
        begun_with: the digest of the tokens that a resumed run began with. An earlier release may have made other tokens of
            the same text. If the cache has tokens of that release with this digest, they are used.
        progress: as for :func:`prepare`; not called if nothing has to be tokenised.

    Raises:
        InputError: as for :func:`prepare`; or there is no ``input_file``, prepared tokens have changed since they were made,
            or the cache cannot be read or written.
    """
    if data.input_file is None:
        raise InputError("no data: give --input_file with a text file, a folder, or a folder of prepared tokens")
    path = prepared_at(data.input_file, progress)
    if path is not None:
        return checked(open_given(path, data), progress)
    work = _survey(split_inputs(data.input_file), data)
    with cache_errors():
        if begun_with is not None:
            for key in work.earlier_keys:
                earlier = find_cached(key)
                if earlier is not None and earlier.digest == begun_with:
                    return earlier
        return find_cached(work.key) or _make(work, cache_folder() / work.key, progress)


def prepare_again(data: DataConfig, digest: str, *, progress: Progress | None = None) -> tuple[TokenSet, str | None]:
    """The tokens that a run began with, if the cache still has them, even if the text has changed since.

    Folders of text may receive logs, notes and results during training, so a change of them is only warned of. Standard input
    can be read but once, so it is not compared. If any other input is not a folder of text, all inputs are prepared as they
    are now.

    Args:
        data: as for :func:`prepare_cached`. If its tokenizer is a file that has changed since, the text is prepared anew.
        digest: the digest of the tokens that the run began with.
        progress: as for :func:`prepare_cached`.

    Returns:
        The tokens, and a warning if the text would now give other tokens, else None. If the cache no longer has the tokens,
        the tokens of the text as it is now, and None.

    Raises:
        InputError: as for :func:`prepare_cached`.
    """
    inputs = [] if data.input_file is None else split_inputs(data.input_file)
    are_folders = bool(inputs) and all(is_folder(Path(each)) and not is_prepared(Path(each)) for each in inputs)
    is_piped = STANDARD_INPUT in inputs
    with cache_errors():
        kept = cached_with(digest) if are_folders or is_piped else None
    file = _tokenizer_file(data)
    if kept is None or (file is not None and file.text_digest != kept.tokenizer.text_digest):
        return prepare_cached(data, begun_with=digest, progress=progress), None
    if is_piped:
        return kept, None
    try:
        work = _survey(inputs, data)
    except InputError as error:
        return kept, f"{data.input_file} cannot be read as it was when this run began ({error})"
    same = kept.meta.get("key") in (work.key, *work.earlier_keys)
    return kept, None if same else f"{data.input_file} has changed since this run began"


def split_inputs(text: str) -> list[str]:
    """The files and folders of one corpus that ``--input_file`` names (:func:`scalegpt.inputs.paths_of`)."""
    return paths_of(text)


def survey_reporting(inputs: Sequence[str | Path], settings: DataConfig, beside: Path | None = None) -> Corpus:
    """Survey the inputs that :func:`~scalegpt.data.remote.inputs.as_paths` takes, and log which are skipped."""
    paths = as_paths(inputs, beside or cache_folder() / "standard-input")
    with naming_standard_input():
        corpus = survey(
            paths,
            settings.encoding,
            text_field=settings.text_field,
            want_characters=settings.tokenizer == "char",
            as_text=settings.as_text,
            selection=Selection.of(settings),
        )
    if settings.text_field is not None and STANDARD_INPUT in map(str, inputs):
        _check_has_records(corpus, settings.text_field)
    if corpus.skipped.counts:
        remedies = {
            f"not {corpus.encoding}": "--encoding auto detects encodings",
            OUTSIDE_LINK: "--follow_links true follows links",
        }
        advice = "".join(f"; {text}" for reason, text in remedies.items() if reason in corpus.skipped.counts)
        _log.warning("skipped: %s%s", corpus.skipped, advice)
    if corpus.read_as_written.counts:
        _log.warning("read as they are written: %s", corpus.read_as_written)
    return corpus


def _check_has_records(corpus: Corpus, field: str) -> None:
    """Refuse standard input that was taken for plain text although the user names a field of its records."""
    if any(source.form is None and is_standard_input(source.path) for source in corpus.sources):
        raise InputError(
            f"standard input is plain text, or CSV or TSV that only a name tells, so it has no field {one_line(field)}: "
            "write it to a .csv or .tsv file and name that, or leave out --text_field"
        )


def _tokenizer_file(settings: DataConfig) -> HFTokenizer | None:
    """The tokenizer of the settings, if it is a file."""
    return load_tokenizer(settings.tokenizer, settings.end_of_text) if is_file(settings.tokenizer) else None


def _survey(inputs: Sequence[str | Path], settings: DataConfig, beside: Path | None = None) -> Preparation:
    tokenizer = _tokenizer_file(settings)
    return identify(survey_reporting(inputs, settings, beside), tokenizer, settings)


def _existing(out: Path, work: Preparation) -> TokenSet | None:
    """Open the folder ``out`` if it holds the tokens of this preparation; None if it is missing or empty.

    Raises:
        UnreadableTokensError: the folder cannot be read.
        InputError: the folder holds something else, or its tokens are damaged.
    """
    found = tokens_in(out)
    if found is None or found.meta.get("key") == work.key:
        return found
    if found.meta.get("key") in work.earlier_keys:
        raise InputError(
            f"out {one_line(out)} holds tokens of the same text from an older version of ScaleGPT, which ended documents or "
            "held them out otherwise; train on them as they are, choose another --out, or remove them first"
        )
    raise InputError(
        f"out {one_line(out)} already holds tokens of other text, or of other settings; choose another --out, or remove it "
        "first"
    )


def _make(work: Preparation, out: Path, progress: Progress | None) -> TokenSet:
    """Tokenise the corpus into the folder ``out``; if another process makes the folder first, open it instead.

    Raises:
        InputError: as for :func:`prepare`.
        KeyboardInterrupt: the user interrupted the command; the message says how to go on.
    """
    tokenizer = work.make_tokenizer()
    writer = TokenWriter(out, work.key, tokenizer.dtype, work.settings.shard_tokens)
    try:
        with writer:
            with disk_errors(out):
                remove_abandoned(out)
            is_made = writer.publish() if writer.is_finished else _fill(work, tokenizer, writer, progress)
    except BaseException as error:
        if not writer.can_resume or not may_resume_after(type(error)):
            raise
        if isinstance(error, KeyboardInterrupt):
            said = f"interrupted: the same command continues from its last record, {_share(work, writer)}"
            raise KeyboardInterrupt(said) from None
        if isinstance(error, NoSpaceError):
            raise NoSpaceError(f"{error}; the same command then continues") from None
        raise
    if is_made:
        return open_tokens(out)
    finished_elsewhere = _existing(out, work)
    if finished_elsewhere is None:
        raise InputError(f"out {out} was changed by another process meanwhile; run the command again")
    return finished_elsewhere


def _fill(work: Preparation, tokenizer: Tokenizer, writer: TokenWriter, progress: Progress | None) -> bool:
    """Write all tokens that the writer does not have yet, and commit; as :meth:`TokenWriter.commit`."""
    if writer.can_resume:
        _log.warning("going on with an interrupted preparation of the same text: %s is done", _share(work, writer))
    left = work.corpus.text_bytes * (1 - writer.record.position.read / max(1, work.corpus.bytes))
    check_space(writer.out, int(left * tokenizer.ids_per_byte * tokenizer.dtype.itemsize))
    end = _write_tokens(work, tokenizer, writer, progress)
    for split, count in writer.counts().items():
        if not count:
            first = one_line(work.corpus.sources[0].path)
            raise InputError(f"{first}: no tokens are left for {split}; give more text")
    return writer.commit(work.sidecar(tokenizer, end), tokenizer.files)


def _share(work: Preparation, writer: TokenWriter) -> str:
    return f"{writer.record.position.read / max(1, work.corpus.bytes):.0%}"


def _write_tokens(work: Preparation, tokenizer: Tokenizer, writer: TokenWriter, progress: Progress | None) -> Position:
    """Encode and write all text from the writer's record on; return the position at the end."""
    has_tails = work.split.method == "tails"
    seen = writer.seen_documents() if work.settings.deduplicate else None
    end = writer.record.position
    batches = BatchReader(work.corpus.sources, work.split, seen, end)
    if progress is not None:
        progress(end.read, work.corpus.bytes, sum(writer.counts().values()))
    tails = TailWriter(writer, tokenizer, work.split.fraction) if has_tails else None
    workers = work.settings.workers or usable_cores()
    with closing(encoded(batches, BatchEncoder(tokenizer, marks=not has_tails), workers)) as stream:
        for batch in stream:  # leaving the block stops the threads when writing fails
            end = batch.position
            if tails is not None:
                tails.write(batch, seen)
            else:
                writer.append("train", batch.train)
                writer.append("val", batch.val)
            writer.record_if_due(end, seen)
            if progress is not None:
                progress(end.read, work.corpus.bytes, sum(writer.counts().values()))
    return end
