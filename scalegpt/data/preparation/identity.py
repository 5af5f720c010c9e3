"""What a preparation is: a surveyed corpus, a tokenizer and a split; and the key that its tokens have in the cache."""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from scalegpt.config import DataConfig
from scalegpt.data.preparation.batches import Position
from scalegpt.data.preparation.split import WHOLE_DOCUMENTS_FROM, Split, choose_split
from scalegpt.data.remote.inputs import name_of
from scalegpt.data.sidecar import VERSION
from scalegpt.data.text.corpus import Corpus
from scalegpt.data.text.reading import Source
from scalegpt.data.tokenizers import HFTokenizer, Tokenizer, make_tokenizer

RECIPE = 3
"""Version of the preparation, part of the cache's keys; it increases when the same text gives other tokens than before.

From version 2 on, the training part of a divided document ends with end-of-text too. From version 3 on, documents are held
out whole by their hashes alone.
"""

MOST_SOURCES = 100_000
"""The most source files that the sidecar lists, so that it stays small enough to be read at once."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """A surveyed corpus, the tokenizer and split to apply to it, and the resulting cache key.

    Attributes:
        tokenizer: the tokenizer, if it is a file; None: the one of the kind ``kind``.
        kind: the tokenizer's kind.
        settings: how the text is prepared.
        earlier_keys: the cache keys that earlier releases gave to the same text and settings, for which they made other
            tokens: those of an earlier :data:`RECIPE`, and those that put no token before a document.
    """

    corpus: Corpus
    tokenizer: HFTokenizer | None
    kind: str
    settings: DataConfig
    split: Split
    key: str
    earlier_keys: tuple[str, ...]

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: the text has too many characters for a ``char`` tokenizer, or GPT-2's files are missing.
        """
        return self.tokenizer or make_tokenizer(self.kind, self.corpus.characters)

    def sidecar(self, tokenizer: Tokenizer, end: Position) -> dict[str, Any]:
        """The entries of the sidecar that say where the tokens come from; ``end`` is the position at the end."""
        split: dict[str, Any] = {"method": self.split.method, "val_fraction": self.split.fraction}
        if self.split.method == "documents":
            split["held_out_documents"] = end.held_out
        dropped = {"duplicates": end.duplicates} if self.settings.deduplicate else {}
        return {
            "key": self.key,
            "tokenizer": {key: value for key, value in tokenizer.as_dict().items() if key != "files"},  # beside it
            "documents": end.documents,
            **dropped,
            "bytes": self.corpus.bytes,
            "split": split,
            "encoding": self.corpus.encoding,
            "encodings": sorted({source.encoding for source in self.corpus.sources}),
            "skipped": dict(self.corpus.skipped.counts),
            "sources": [_described(source) for source in self.corpus.sources[:MOST_SOURCES]],
        }


def identify(corpus: Corpus, tokenizer: HFTokenizer | None, settings: DataConfig) -> Preparation:
    """Choose the split of a surveyed corpus, and compute the keys.

    Args:
        corpus: the corpus.
        tokenizer: the tokenizer of the settings, if it is a file.
        settings: how to prepare the text.
    """
    split = choose_split(corpus.sources, settings.val_fraction)
    if split.method == "tails" and corpus.documents >= WHOLE_DOCUMENTS_FROM:
        _log.warning(
            "the end of each document is held out: whole documents, chosen by their hashes, would be far less or far more "
            "than the share %g of the text",
            split.fraction,
        )
    identity = {
        "version": VERSION,
        "tokenizer": settings.tokenizer if tokenizer is None else tokenizer.digest,
        "encoding": corpus.encoding,
        "val_fraction": settings.val_fraction,
        "sources": [source.identity for source in corpus.sources],
    }
    before = {**identity, "tokenizer": settings.tokenizer if tokenizer is None else tokenizer.text_digest}
    present = {"ways": RECIPE, "shard_tokens": settings.shard_tokens, "deduplicate": settings.deduplicate}
    key, *earlier = dict.fromkeys(
        _key(values)
        for values in (
            {**identity, **present}, {**before, **present}, {**identity, "ways": 2}, {**before, "ways": 2}, before,
        )
    )  # fmt: skip
    kind = settings.tokenizer if tokenizer is None else tokenizer.kind
    return Preparation(corpus, tokenizer, kind, settings, split, key, tuple(earlier))


def _described(source: Source) -> dict[str, Any]:
    records = {} if source.form is None else {"form": source.form, "documents": source.documents}
    return {
        "path": name_of(source.path), "bytes": source.bytes, "sha256": source.sha256, "encoding": source.encoding, **records,
    }  # fmt: skip


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
