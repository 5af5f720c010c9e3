"""Reads the text on which a model is evaluated: text files or prepared tokens, piece by piece, in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scalegpt.checkpoint.manifest import Header
from scalegpt.config import DataConfig
from scalegpt.data.cache import cache_errors, cached_with
from scalegpt.data.foreign.given import open_for
from scalegpt.data.prepare import prepare_cached, survey_reporting
from scalegpt.data.prepared import prepared_at
from scalegpt.data.shards import TokenSet
from scalegpt.data.text import reading
from scalegpt.data.text.corpus import Corpus
from scalegpt.data.text.reading import Source, read_documents
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.data.windows.mixture import Mixture, prepare_mixture
from scalegpt.errors import InputError
from scalegpt.text import one_line

PIECE_TOKENS = 1 << 20
"""The number of prepared tokens that are read at a time."""

MOST_UNDECODED = 16 << 20
"""A document of more tokens than this is decoded in parts, to bound memory."""

Ids = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """A part of a stream of tokens.

    Attributes:
        ids: token ids, int64 [N].
        bytes: the UTF-8 bytes of the original text that are counted with this piece: those of its ids, or of documents that
            end in it.
        share: how much of the whole text has been read with this piece, from 0 to 1.
    """

    ids: Ids
    bytes: int
    share: float


class Text(NamedTuple):
    """A text on which a model is evaluated.

    Attributes:
        streams: an iterator of streams, each an iterator of pieces. Each stream is predicted on its own. The streams
            can be read once, one after another.
        documents: number of documents; None if it is not known.
        split: the split of prepared tokens; None for the text of files.
        name: the source that it is the text of, as the user named it; empty if nobody asks.
        weight: the source's part of a mixture, from 0 to 1.
    """

    streams: Iterable[Iterator[Piece]]
    documents: int | None
    split: str | None = None
    name: str = ""
    weight: float = 1.0


def text_of_files(inputs: Sequence[str | Path], tokenizer: Tokenizer, settings: DataConfig, first: int | None) -> Text:
    """The text of files, and of the files in folders. Each document is a stream of its own.

    Args:
        inputs: files and folders that the user named.
        tokenizer: the model's.
        first: the token with which each stream begins, as context for the document's first token: the token that begins
            a text, or end-of-text, if the model has seen it before documents in training; None: the first token has no
            context.
        settings: the encoding, and which files are text; the other settings are not used.

    Raises:
        InputError: a file is not text, or a folder has no text; while the streams are read: the vocabulary lacks a
            character, or a file has changed.
    """
    corpus = survey_reporting(inputs, settings)
    return Text(_documents(corpus, tokenizer, first), corpus.documents)


def _documents(corpus: Corpus, tokenizer: Tokenizer, first: int | None) -> Iterator[Iterator[Piece]]:
    before = 0
    for source in corpus.sources:
        pieces = read_documents(source)
        for piece in pieces:  # the first one of each document
            start = [] if first is None else [Piece(np.array([first]), 0, before / corpus.bytes)]
            yield chain(start, _encoded(source, chain([piece], pieces), tokenizer, before, corpus.bytes))
        before += source.bytes


def _encoded(
    source: Source, pieces: Iterator[reading.Piece], tokenizer: Tokenizer, before: int, total: int
) -> Iterator[Piece]:
    """Encode a document, whose pieces come next; ``before`` of the corpus's ``total`` bytes precede its source."""
    context = ""
    for text, read, ends in pieces:
        try:
            ids = tokenizer.encode_after(context, text).astype(np.int64)
        except InputError as error:
            raise InputError(f"input {one_line(source.path)}: {error}") from None
        yield Piece(ids, len(text.encode()), (before + read) / total)
        if ends:
            return
        context = text


def text_of_split(tokens: TokenSet, split: str) -> Text:
    """A split of prepared tokens as one stream, cut into the same windows as by evaluations in training.

    Args:
        tokens: prepared tokens, whose tokenizer is the model's.
        split: ``train`` or ``val``.
    """
    return Text(iter([_stored(tokens, split)]), _count_documents(tokens.meta, split), split)


def _stored(tokens: TokenSet, split: str) -> Iterator[Piece]:
    stored, tokenizer = tokens.files[split].tokens, tokens.tokenizer
    end = -1 if tokenizer.end_of_text is None else tokenizer.end_of_text
    around = [end, end if tokenizer.document_start is None else tokenizer.document_start]
    undecoded = np.empty(0, dtype=np.int64)  # a document is decoded as a whole, as some tokenizers need it
    for first in range(0, len(stored), PIECE_TOKENS):
        ids = stored[first : first + PIECE_TOKENS].astype(np.int64)
        read = first + len(ids)
        undecoded = np.concatenate([undecoded, ids])
        *documents, rest = np.split(undecoded, np.flatnonzero(undecoded == end) + 1)
        if end < 0 or read == len(stored) or len(rest) > MOST_UNDECODED:
            documents, rest = [*documents, rest], rest[:0]
        size = sum(len(tokenizer.decode_bytes(each[~np.isin(each, around)])) for each in documents)
        undecoded = rest
        yield Piece(ids, size, read / len(stored))


def _count_documents(meta: dict[str, Any], split: str) -> int | None:
    """The number of documents in a split, from the sidecar.

    A document that is divided between the splits counts in both.
    """
    documents, how = meta.get("documents"), meta.get("split", {})
    held_out = how.get("held_out_documents")
    if documents is None or how.get("method") != "documents" or not isinstance(held_out, int):
        return documents
    return held_out if split == "val" else documents - held_out


def tokens_of_run(header: Header) -> Mixture:
    """The tokens that a run was trained on: prepared by the user, from the cache, or prepared again from the text.

    Raises:
        InputError: the checkpoint does not name its data, or the data are missing or have changed.
    """
    data = header.config.get("data") if isinstance(header.config, dict) else None
    if header.data is None or not isinstance(data, dict) or data.get("input_file") is None:
        raise InputError("this model does not say which data it was trained on; give --input_file with a text")
    settings = DataConfig.from_mapping(data, "the checkpoint's configuration, data")
    given = str(settings.input_file)
    if len(settings.sources) > 1:
        tokens = prepare_mixture(settings)[0]
    else:
        with cache_errors():
            kept = None if prepared_at(given) is not None else cached_with(header.data)
        tokens = Mixture.alone(given, kept or prepare_cached(settings, begun_with=header.data))
    if tokens.digest != header.data:
        raise InputError(
            f"{one_line(given)} no longer gives the tokens that the run was trained on; restore it, or give "
            "--input_file with a text"
        )
    return tokens


def tokens_of_folder(folder: Path, tokenizer: Tokenizer) -> TokenSet:
    """Prepared tokens in a folder that the user named.

    Raises:
        InputError: the tokens have changed since they were prepared, or another tokenizer made them.
    """
    tokens = open_for(folder, tokenizer)
    tokens.check_contents()
    if tokens.tokenizer.text_digest != tokenizer.text_digest:
        raise InputError(
            f"{one_line(folder)} was prepared with another tokenizer ({tokens.tokenizer.kind}) than the model's "
            f"({tokenizer.kind}); give the text itself"
        )
    tokens.check_vocabulary(tokenizer.vocab_size)
    return tokens
