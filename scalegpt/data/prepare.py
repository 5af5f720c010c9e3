"""From text files to token files: tokenise, hold out a part, and cache by content."""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config import DataConfig
from scalegpt.data.cache import cache_errors, cache_folder, cached_with, find_cached, something_else, tokens_in
from scalegpt.data.leftovers import remove_abandoned
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.sidecar import VERSION
from scalegpt.data.split import Split, choose_split
from scalegpt.data.text.corpus import Corpus, Source, read_pieces, survey
from scalegpt.data.text.documents import OUTSIDE_LINK, is_folder, is_prepared
from scalegpt.data.tokenizers import TokenIds, Tokenizer, make_tokenizer
from scalegpt.data.writer import TokenWriter
from scalegpt.errors import InputError
from scalegpt.storage import check_space, disk_errors
from scalegpt.system.cores import usable_cores
from scalegpt.text import one_line

Progress = Callable[[int, int], None]
_Encoded = tuple[int, TokenIds, int, bool]

RECIPE = 2
"""Raised when the same text gives other tokens. 2: the training part of a divided document ends with end-of-text too."""

MOST_SOURCES = 100_000
"""Files that the sidecar lists at most: it must stay small enough to be read at once."""

_BYTES_PER_BYTE = {"gpt2": 1.0, "byte": 2.0, "char": 2.0}
"""Bytes of tokens per byte of text. One of GPT-2's ids encodes 2.5 bytes of code or 4 of English: 1.0 leaves a margin."""

_MAX_THREADS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Preparation:
    """A surveyed corpus, what to make of it, and the key that both decide.

    Attributes:
        earlier_key: the key of the tokens that releases before :data:`RECIPE` made of the same text.
    """

    corpus: Corpus
    kind: str
    split: Split
    key: str
    earlier_key: str


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    settings: DataConfig,
    *,
    progress: Progress | None = None,
) -> TokenSet:
    """Tokenise text into a folder.

    Args:
        inputs: text files and folders of them.
        out: the folder to make. One that already holds the same preparation is used as it is.
        settings: all except ``input_file``.
        progress: called with the bytes tokenised and the bytes in all.

    Raises:
        InputError: no usable text, ``out`` holds something else, no disk space, a bad setting.
    """
    out = Path(out)
    if os.path.isfile(out):  # noqa: PTH113 - pathlib's raises where a folder is closed
        raise InputError(f"out {one_line(out)} is a file; choose another --out")
    work = _survey(inputs, settings)
    return _existing(out, work) or _make(work, out, progress)


def prepare_cached(data: DataConfig, *, begun_with: str | None = None, progress: Progress | None = None) -> TokenSet:
    """The tokens of the trainer's ``--input_file``, made now or cached by an earlier run, after reading all of them.

    Args:
        data: ``input_file`` is a text file, a folder, several with commas between, or a folder of prepared tokens,
            whose own tokenizer then holds. The other settings are :func:`prepare`'s.
        begun_with: digest of the tokens that a run began with. Tokens that an earlier release made of the same text are
            used where they are in the cache and have this digest.
        progress: as for :func:`prepare`; not called where nothing has to be tokenised.

    Raises:
        InputError: as for :func:`prepare`, or no ``input_file``, or prepared tokens that have changed since, or a cache
            that cannot be read or written.
    """
    if data.input_file is None:
        raise InputError("no data: give --input_file with a text file, a folder, or a folder of prepared tokens")
    if is_prepared(Path(data.input_file)):
        given = open_tokens(data.input_file)
        given.check_contents()
        return given
    work = _survey(_split_inputs(data.input_file), data)
    with cache_errors():
        if begun_with is not None:
            earlier = find_cached(work.earlier_key)
            if earlier is not None and earlier.digest == begun_with:
                return earlier
        return find_cached(work.key) or _make(work, cache_folder() / work.key, progress)


def prepare_again(data: DataConfig, digest: str, *, progress: Progress | None = None) -> tuple[TokenSet, str | None]:
    """The tokens that a run began with where the cache still has them, even if the folders of their text have changed.

    Logs, notes and results may be put into such folders during training. All inputs must be folders of text: a file that the
    user names is read as it is now, with everything that is named beside it.

    Args:
        data: as for :func:`prepare_cached`.
        digest: of the tokens that the run began with.
        progress: as for :func:`prepare_cached`.

    Returns:
        The tokens, and a warning where the text no longer gives them. Where the cache has lost them: the tokens that the text
        gives now.

    Raises:
        InputError: as for :func:`prepare_cached`.
    """
    inputs = [] if data.input_file is None else _split_inputs(data.input_file)
    are_folders = bool(inputs) and all(is_folder(Path(each)) and not is_prepared(Path(each)) for each in inputs)
    with cache_errors():
        kept = cached_with(digest) if are_folders else None
    if kept is None:
        return prepare_cached(data, begun_with=digest, progress=progress), None
    try:
        work = _survey(inputs, data)
    except InputError as error:
        return kept, f"{data.input_file} cannot be read as it was when this run began ({error})"
    same = kept.meta.get("key") in (work.key, work.earlier_key)
    return kept, None if same else f"{data.input_file} has changed since this run began"


def _split_inputs(text: str) -> list[str]:
    """Split at commas, unless a file has that name."""
    if os.path.exists(text):  # noqa: PTH110 - pathlib's raises where a folder is closed
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _survey(inputs: Sequence[str | Path], settings: DataConfig) -> _Preparation:
    corpus = survey(
        inputs,
        settings.encoding,
        want_characters=settings.tokenizer == "char",
        as_text=settings.as_text,
        follow_links=settings.follow_links,
    )
    if corpus.skipped.counts:
        remedies = {
            f"not {corpus.encoding}": "--encoding auto detects encodings",
            OUTSIDE_LINK: "--follow_links true follows links",
        }
        advice = "".join(f"; {text}" for reason, text in remedies.items() if reason in corpus.skipped.counts)
        _log.warning("skipped: %s%s", corpus.skipped, advice)
    if corpus.read_as_written.counts:
        _log.warning("read as they are written: %s", corpus.read_as_written)
    split = choose_split(corpus.sources, settings.val_fraction)
    identity = {
        "version": VERSION,
        "tokenizer": settings.tokenizer,
        "encoding": corpus.encoding,
        "val_fraction": settings.val_fraction,
        "sources": [(source.name, source.sha256) for source in corpus.sources],
    }
    return _Preparation(corpus, settings.tokenizer, split, _key({**identity, "ways": RECIPE}), _key(identity))


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _existing(out: Path, work: _Preparation) -> TokenSet | None:
    """Open the folder where it holds this preparation; None where there is nothing yet.

    Raises:
        UnreadableTokensError: it cannot be read.
        InputError: it holds something else, or is damaged.
    """
    found = tokens_in(out)
    if found is None or found.meta.get("key") == work.key:
        return found
    if found.meta.get("key") == work.earlier_key:
        raise InputError(
            f"out {one_line(out)} holds tokens that an earlier ScaleGPT made of the same text, with end-of-text in the "
            "held-out part only; train on them as they are, choose another --out, or remove them first"
        )
    raise something_else(out)


def _make(work: _Preparation, out: Path, progress: Progress | None) -> TokenSet:
    """Tokenise the corpus into a folder; where another process finished it first, use that."""
    tokenizer = make_tokenizer(work.kind, work.corpus.characters)
    with disk_errors(out):
        remove_abandoned(out)
    check_space(out, int(work.corpus.bytes * _BYTES_PER_BYTE[work.kind]))
    with TokenWriter(out) as writer:
        with closing(_encoded(work.corpus.sources, tokenizer)) as stream:  # stops its threads when writing fails
            _write_tokens(work, tokenizer, stream, writer, progress)
        for split, count in writer.counts.items():
            if not count:
                first = one_line(work.corpus.sources[0].path)
                raise InputError(f"{first}: no tokens are left for {split}; give more text")
        if writer.commit(_sidecar(work, tokenizer)):
            return open_tokens(out)
    finished_elsewhere = _existing(out, work)
    if finished_elsewhere is None:
        raise InputError(f"out {out} was changed by another process meanwhile; run the command again")
    return finished_elsewhere


def _write_tokens(
    work: _Preparation, tokenizer: Tokenizer, stream: Iterator[_Encoded], writer: TokenWriter, progress: Progress | None
) -> None:
    total, before = work.corpus.bytes, 0
    ending = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=np.uint16)
    first = 0  # of the document's tokens among the training tokens
    for index, ids, read, is_last in stream:
        split = "val" if index in work.split.held_out else "train"
        writer.append(split, ids)
        if is_last:
            before += work.corpus.sources[index].bytes
            if work.split.method == "tails":
                count = writer.counts["train"] - first
                # nanoGPT cuts at int(n * 0.9): the same formula gives the same split.
                kept = max(1, int(count * (1 - work.split.fraction)))
                if kept < count:
                    writer.hold_out_tail(first + kept)
                    writer.append("val", ending)
            writer.append(split, ending)  # every document ends with it, a divided one in both parts
            first = writer.counts["train"]
        if progress is not None:
            progress(before + (0 if is_last else read), total)


def _encoded(sources: Sequence[Source], tokenizer: Tokenizer) -> Generator[_Encoded, None, None]:
    """Encode all documents in order, on several threads, a bounded number of pieces ahead.

    Yields:
        The document's index, the ids of its next piece, the bytes of it read by then, and whether it is the last piece.
    """
    threads = min(_MAX_THREADS, usable_cores())
    waiting: deque[tuple[int, Future[TokenIds], int, bool]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index, piece, read, is_last in _pieces(sources):
                waiting.append((index, pool.submit(tokenizer.encode, piece), read, is_last))
                if len(waiting) > threads + 2:
                    index, ids, read, is_last = waiting.popleft()
                    yield index, ids.result(), read, is_last
            while waiting:
                index, ids, read, is_last = waiting.popleft()
                yield index, ids.result(), read, is_last
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(sources: Sequence[Source]) -> Iterator[tuple[int, str, int, bool]]:
    """Every document's pieces, each with whether it is the last, which is known only when the reader stops."""
    for index, source in enumerate(sources):
        held: tuple[str, int] | None = None
        for piece in read_pieces(source):
            if held is not None:
                yield index, *held, False
            held = piece
        assert held is not None, "the survey refuses empty documents"
        yield index, *held, True


def _sidecar(work: _Preparation, tokenizer: Tokenizer) -> dict[str, Any]:
    split: dict[str, Any] = {"method": work.split.method, "val_fraction": work.split.fraction}
    if work.split.method == "documents":
        split["held_out_documents"] = len(work.split.held_out)
    return {
        "key": work.key,
        "tokenizer": tokenizer.as_dict(),
        "documents": len(work.corpus.sources),
        "bytes": work.corpus.bytes,
        "split": split,
        "encoding": work.corpus.encoding,
        "encodings": sorted({source.encoding for source in work.corpus.sources}),
        "skipped": dict(work.corpus.skipped.counts),
        "sources": [
            {"path": str(source.path), "bytes": source.bytes, "sha256": source.sha256, "encoding": source.encoding}
            for source in work.corpus.sources[:MOST_SOURCES]
        ],
    }
