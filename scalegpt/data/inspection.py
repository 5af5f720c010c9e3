"""What ``scalegpt data inspect`` says: what is at a path, in numbers and samples, after a look at every id."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config import DataConfig
from scalegpt.data.foreign.found import Found
from scalegpt.data.foreign.given import found_at
from scalegpt.data.foreign.opening import open_found, tokenizer_of
from scalegpt.data.prepare import survey_reporting
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.sidecar import shards_of
from scalegpt.data.stored import Part, StoredTokens
from scalegpt.data.text.reading import Source, read_documents
from scalegpt.data.token_file import Progress, UnreadableTokensError, chunks_of
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.text import shown

_PREVIEW_TOKENS, _PREVIEW_CHARACTERS = 60, 200


@dataclass
class IdCounts:
    """What a pass over tokens finds.

    Attributes:
        smallest: the smallest id.
        largest: the largest id.
        outside: number of ids outside the tokenizer's vocabulary; None without a tokenizer.
        ends: number of tokens that end a document; None without a tokenizer that has one.
    """

    smallest: int
    largest: int
    outside: int | None
    ends: int | None


def count_ids(tokens: Iterable[StoredTokens], tokenizer: Tokenizer | None, progress: Progress | None) -> IdCounts:
    """Read all tokens.

    Args:
        tokens: arrays of at least one token in all.
        tokenizer: the tokenizer that made them; None: not known.
        progress: called with the bytes read so far and in all.
    """
    arrays = list(tokens)
    end = None if tokenizer is None else tokenizer.end_of_text
    found = IdCounts(1 << 62, 0, None if tokenizer is None else 0, None if end is None else 0)
    done, total = 0, sum(len(each) * each.dtype.itemsize for each in arrays)
    for chunk in (chunk for each in arrays for chunk in chunks_of(each)):
        found.smallest, found.largest = min(found.smallest, int(chunk.min())), max(found.largest, int(chunk.max()))
        if tokenizer is not None and found.outside is not None:
            found.outside += int(np.count_nonzero(chunk >= tokenizer.vocab_size))
        if found.ends is not None:
            found.ends += int(np.count_nonzero(chunk == end))
        done += chunk.nbytes
        if progress is not None:
            progress(done, total)
    return found


def inspect_tokens(
    path: str | Path, settings: DataConfig, *, named: bool, progress: Progress | None = None
) -> dict[str, Any]:
    """Describe prepared tokens, and check them.

    Args:
        path: a folder that ScaleGPT or nanoGPT prepared, or files of another program.
        settings: of another program's files, ``tokenizer`` and ``end_of_text`` say which tokenizer made them.
        named: whether the user named ``tokenizer``; else it is the one that the files name, if they do.
        progress: called with the bytes read so far and in all, while ids are checked.

    Returns:
        The values that ``--json`` prints.

    Raises:
        InputError: the files are malformed or have changed since they were prepared.
    """
    found = found_at(path)
    if found is None:
        tokens = open_tokens(path)
        tokens.check_contents()
        facts = {"format": "ScaleGPT" if tokens.meta else "nanoGPT", **describe(tokens)}
        files = {split: file.tokens.parts for split, file in tokens.files.items()}
        counts = count_ids((tokens.train, tokens.val), tokens.tokenizer, progress)
        return {**facts, **_counts(files, counts), **_previews(tokens)}
    setting = settings.tokenizer if named else found.tokenizer
    tokenizer = None if setting is None else tokenizer_of(setting, settings.end_of_text)
    for each in (*found.files, *found.held_out):
        if each.check is not None:
            each.check()
    files = {"train": tuple(each.part for each in found.files), "val": tuple(each.part for each in found.held_out)}
    counts = count_ids(_stored(found), tokenizer, progress)
    facts = {"format": found.format, "documents": found.documents, "made_with": found.made_with, "setting": setting}
    if tokenizer is None:
        tokens_by_split = {f"{split}_tokens": sum(part.count for part in parts) for split, parts in files.items()}
        return {"folder": str(path), **tokens_by_split, **facts, **_counts(files, counts)}
    tokens = open_found(found, tokenizer, settings.val_fraction)
    return {**describe(tokens), **facts, "origin": tokens.origin, **_counts(files, counts), **_previews(tokens)}


def inspect_text(path: str | Path, settings: DataConfig) -> dict[str, Any]:
    """Describe a file or a folder of text, after reading all of it.

    Args:
        path: what the user named.
        settings: how text is read.

    Returns:
        The values that ``--json`` prints; ``forms`` counts the sources of each format, and ``text`` is the first document's
        beginning.

    Raises:
        InputError: it is missing, or holds no text that the trainer reads.
    """
    corpus = survey_reporting([path], settings)
    text = next(read_documents(corpus.sources[0])).text[:_PREVIEW_CHARACTERS]
    return {
        "folder": str(path),
        "format": "text",
        "forms": dict(Counter(_form(source) for source in corpus.sources)),
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "text_bytes": corpus.text_bytes,
        "encodings": sorted({source.encoding for source in corpus.sources}),
        "skipped": dict(corpus.skipped.counts),
        "text": text,
    }


def _form(source: Source) -> str:
    """The form of a source in words: its format, its field, and how it is packed."""
    form = source.form or "plain text"
    field = "" if source.field is None else f", field {shown(source.field)}"
    return f"{form}{field}" + ("" if source.packing is None else f", in {source.packing}")


def _stored(found: Found) -> list[StoredTokens]:
    try:
        return [StoredTokens(each.part for each in files) for files in (found.files, found.held_out) if files]
    except OSError as error:
        raise UnreadableTokensError(Path(error.filename or found.path), error) from None


def _counts(files: dict[str, tuple[Part, ...]], counts: IdCounts) -> dict[str, Any]:
    return {
        "files": [
            {"path": str(part.path), "split": split, "tokens": part.count, "dtype": part.dtype.name}
            for split, parts in files.items()
            for part in parts
        ],
        "smallest_id": counts.smallest,
        "largest_id": counts.largest,
        "ids_outside_vocabulary": counts.outside,
        "end_of_text_tokens": counts.ends,
        "checked": True,
    }


def describe(tokens: TokenSet) -> dict[str, Any]:
    """The values that ``--json`` prints about prepared tokens; ``bytes`` is the size of the source text."""
    meta, tokenizer = tokens.meta, tokens.tokenizer
    return {
        "folder": str(tokens.path),
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
        "dtype": tokens.train.dtype.name,
        "train_tokens": len(tokens.train),
        "val_tokens": len(tokens.val),
        "documents": meta.get("documents"),
        "duplicates": meta.get("duplicates"),
        "split": meta.get("split"),
        "encoding": meta.get("encoding"),
        "encodings": tokens.encodings,
        "skipped": tokens.skipped,
        "bytes": meta.get("bytes"),
        "sources": meta.get("sources", []),
        "digest": tokens.digest,
        "tokenizer_digest": tokenizer.digest,
        "shards": {
            split: [{"name": each.name, "tokens": each.tokens, "sha256": each.sha256} for each in shards]
            for split, shards in (shards_of(meta) if meta else {}).items()
        },
    }


def _previews(tokens: TokenSet) -> dict[str, str]:
    parts = {"train": tokens.train, "val": tokens.val}
    return {f"{split}_text": tokens.tokenizer.decode(part[:_PREVIEW_TOKENS]) for split, part in parts.items()}
