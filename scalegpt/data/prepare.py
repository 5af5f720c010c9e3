"""Prepare text for training: tokenise it, hold out a part, and cache the token files by the text's content."""

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
from scalegpt.config.tokenizer import is_file
from scalegpt.data.cache import cache_errors, cache_folder, cached_with, checked, find_cached, something_else, tokens_in
from scalegpt.data.foreign.given import open_given
from scalegpt.data.leftovers import remove_abandoned
from scalegpt.data.prepared import prepared_at
from scalegpt.data.remote.inputs import as_paths
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.sidecar import VERSION
from scalegpt.data.split import Split, choose_split
from scalegpt.data.text.corpus import Corpus, survey
from scalegpt.data.text.documents import OUTSIDE_LINK, is_folder, is_prepared
from scalegpt.data.text.ignoring import Selection
from scalegpt.data.text.reading import Source, read_documents
from scalegpt.data.tokenizers import HFTokenizer, TokenIds, Tokenizer, load_tokenizer, make_tokenizer
from scalegpt.data.writer import TokenWriter
from scalegpt.errors import InputError
from scalegpt.inputs import paths_of
from scalegpt.storage import check_space, disk_errors
from scalegpt.system.cores import usable_cores
from scalegpt.text import one_line

Progress = Callable[[int, int], None]
_Encoded = tuple[int, TokenIds, int, bool, bool]

RECIPE = 2
"""Version of the preparation, part of the cache's keys; it increases when the same text gives other tokens than before.

From version 2 on, the training part of a divided document ends with end-of-text too.
"""

MOST_SOURCES = 100_000
"""The most source files that the sidecar lists, so that it stays small enough to be read at once."""

_MAX_THREADS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Preparation:
    """A surveyed corpus, the tokenizer and split to apply to it, and the resulting cache key.

    Attributes:
        tokenizer: the tokenizer, if it is a file; None: the one of the kind ``kind``.
        kind: the tokenizer's kind.
        earlier_keys: the cache keys that earlier releases gave to the same text and settings, for which they made other
            tokens: those before :data:`RECIPE` existed, and those that put no token before a document.
    """

    corpus: Corpus
    tokenizer: HFTokenizer | None
    kind: str
    split: Split
    key: str
    earlier_keys: tuple[str, ...]


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
        progress: called with the bytes of text tokenised so far and the bytes of all text.

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

    Folders of text may receive logs, notes and results during training, so a change of them is only warned of. If any input
    is not a folder of text, all inputs are prepared as they are now.

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
    with cache_errors():
        kept = cached_with(digest) if are_folders else None
    file = _tokenizer_file(data)
    if kept is None or (file is not None and file.text_digest != kept.tokenizer.text_digest):
        return prepare_cached(data, begun_with=digest, progress=progress), None
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
    corpus = survey(
        as_paths(inputs, beside or cache_folder() / "standard-input"),
        settings.encoding,
        text_field=settings.text_field,
        want_characters=settings.tokenizer == "char",
        as_text=settings.as_text,
        selection=Selection.of(settings),
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
    return corpus


def _tokenizer_file(settings: DataConfig) -> HFTokenizer | None:
    """The tokenizer of the settings, if it is a file."""
    return load_tokenizer(settings.tokenizer, settings.end_of_text) if is_file(settings.tokenizer) else None


def _survey(inputs: Sequence[str | Path], settings: DataConfig, beside: Path | None = None) -> _Preparation:
    tokenizer = _tokenizer_file(settings)
    corpus = survey_reporting(inputs, settings, beside)
    split = choose_split(corpus.sources, settings.val_fraction)
    identity = {
        "version": VERSION,
        "tokenizer": settings.tokenizer if tokenizer is None else tokenizer.digest,
        "encoding": corpus.encoding,
        "val_fraction": settings.val_fraction,
        "sources": [source.identity for source in corpus.sources],
    }
    kind = settings.tokenizer if tokenizer is None else tokenizer.kind
    before = {**identity, "tokenizer": settings.tokenizer if tokenizer is None else tokenizer.text_digest}
    key, *earlier = dict.fromkeys((_key({**identity, "ways": RECIPE}), _key({**before, "ways": RECIPE}), _key(before)))
    return _Preparation(corpus, tokenizer, kind, split, key, tuple(earlier))


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _existing(out: Path, work: _Preparation) -> TokenSet | None:
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
            f"out {one_line(out)} holds tokens of the same text from an older version of ScaleGPT, which put fewer tokens "
            "between documents; train on them as they are, choose another --out, or remove them first"
        )
    raise something_else(out)


def _make(work: _Preparation, out: Path, progress: Progress | None) -> TokenSet:
    """Tokenise the corpus into the folder ``out``; if another process makes the folder first, open it instead."""
    tokenizer = work.tokenizer or make_tokenizer(work.kind, work.corpus.characters)
    with disk_errors(out):
        remove_abandoned(out)
    check_space(out, int(work.corpus.text_bytes * tokenizer.ids_per_byte * tokenizer.dtype.itemsize))
    with TokenWriter(out, tokenizer.dtype) as writer:
        with closing(_encoded(work.corpus.sources, tokenizer)) as stream:  # stops its threads when writing fails
            _write_tokens(work, tokenizer, stream, writer, progress)
        for split, count in writer.counts.items():
            if not count:
                first = one_line(work.corpus.sources[0].path)
                raise InputError(f"{first}: no tokens are left for {split}; give more text")
        if writer.commit(_sidecar(work, tokenizer), tokenizer.files):
            return open_tokens(out)
    finished_elsewhere = _existing(out, work)
    if finished_elsewhere is None:
        raise InputError(f"out {out} was changed by another process meanwhile; run the command again")
    return finished_elsewhere


def _write_tokens(
    work: _Preparation, tokenizer: Tokenizer, stream: Iterator[_Encoded], writer: TokenWriter, progress: Progress | None
) -> None:
    total, before = work.corpus.bytes, 0
    beginning, ending = (
        np.array([] if token is None else [token], dtype=tokenizer.dtype)
        for token in (tokenizer.document_start, tokenizer.end_of_text)
    )
    begun, first = -1, 0  # the source that is being written, and the offset of its text in the training tokens
    is_new = True
    for index, ids, read, ends, is_last in stream:
        split = "val" if index in work.split.held_out else "train"
        if is_new:
            writer.append(split, beginning)
        if index != begun:
            begun, first = index, writer.counts["train"]
        writer.append(split, ids)
        is_new = ends
        if is_last:
            before += work.corpus.sources[index].bytes
            if work.split.method == "tails":
                count = writer.counts["train"] - first
                # nanoGPT cuts at int(n * 0.9): the same formula gives the same split.
                kept = max(1, int(count * (1 - work.split.fraction)))
                if kept < count:
                    writer.hold_out_tail(first + kept)
                    writer.append("val", ending)
        if ends:
            writer.append(split, ending)  # every document ends with end-of-text; a divided one ends so in both parts
        if progress is not None:
            progress(before + (0 if is_last else read), total)


def _encoded(sources: Sequence[Source], tokenizer: Tokenizer) -> Generator[_Encoded, None, None]:
    """Encode all documents in order, in pieces of their text, on several threads, a bounded number of pieces ahead.

    Yields:
        For each piece: its source's index, its ids, the bytes of the source read so far, whether it ends a document, and it.
    """
    threads = min(_MAX_THREADS, usable_cores())
    waiting: deque[tuple[int, Future[TokenIds], int, bool, bool]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            before = ""
            for index, piece, read, ends, is_last in _pieces(sources):
                waiting.append((index, pool.submit(tokenizer.encode_after, before, piece), read, ends, is_last))
                before = "" if ends else piece
                if len(waiting) > threads + 2:
                    index, ids, read, ends, is_last = waiting.popleft()
                    yield index, ids.result(), read, ends, is_last
            while waiting:
                index, ids, read, ends, is_last = waiting.popleft()
                yield index, ids.result(), read, ends, is_last
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(sources: Sequence[Source]) -> Iterator[tuple[int, str, int, bool, bool]]:
    """Read all documents piece by piece.

    Yields:
        As :func:`_encoded`, but with a piece's text in place of its ids. A piece is yielded when the next one has been read,
        since only then is it known whether it is the last.
    """
    for index, source in enumerate(sources):
        held: tuple[str, int, bool] | None = None
        for piece in read_documents(source):
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
        "tokenizer": {key: value for key, value in tokenizer.as_dict().items() if key != "files"},  # they lie beside it
        "documents": work.corpus.documents,
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
