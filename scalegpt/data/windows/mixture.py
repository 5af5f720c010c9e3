"""The data of a run: the prepared tokens of one source, or of several that are mixed by weight.

Each source is prepared and cached by itself, so another weight costs no preparation. All sources have the same tokenizer.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalegpt.config import DataConfig
from scalegpt.data.foreign.given import open_given
from scalegpt.data.prepare import Progress, prepare_again, prepare_cached
from scalegpt.data.shards import TokenSet
from scalegpt.data.stored import StoredTokens, Tokens
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.data.windows.sampler import Batch, Windows, cut_windows
from scalegpt.errors import InputError
from scalegpt.inputs import MIXTURE_BLOCK, WeightedInput, shares_of
from scalegpt.text import distinct, one_line


class MixedTokens(NamedTuple):
    """One split of all sources.

    Attributes:
        parts: the tokens of each source.
        shares: number of windows of each source in a block of :data:`~scalegpt.inputs.MIXTURE_BLOCK`.
    """

    parts: tuple[StoredTokens | Tokens, ...]
    shares: tuple[int, ...]

    @classmethod
    def alone(cls, tokens: StoredTokens | Tokens) -> "MixedTokens":
        """The tokens of the only source."""
        return cls((tokens,), (MIXTURE_BLOCK,))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens of each source."""
        return tuple(map(len, self.parts))

    def cut(self, windows: Windows, block_size: int) -> tuple[Batch, Batch]:
        """Read windows as inputs and targets, each int64 [N, T]; see :func:`~scalegpt.data.windows.sampler.cut_windows`."""
        if len(self.parts) == 1:
            return cut_windows(self.parts[0], windows.starts, block_size)
        inputs = np.empty((len(windows.starts), block_size), dtype=np.int64)
        targets = np.empty_like(inputs)
        for source in np.unique(windows.sources):
            rows = windows.sources == source
            inputs[rows], targets[rows] = cut_windows(self.parts[source], windows.starts[rows], block_size)
        return inputs, targets


class Place(NamedTuple):
    """Where a source's prepared tokens are, so that another process can open them.

    Attributes:
        name: the source as the user named it.
        share: as in :class:`MixtureSource`.
        path: where its tokens are (:attr:`~scalegpt.data.shards.TokenSet.path`).
        digest: their digest.
    """

    name: str
    share: int
    path: str
    digest: str


@dataclass(frozen=True, eq=False)
class MixtureSource:
    """A source of a run's data.

    Attributes:
        name: the source as the user named it.
        share: number of its windows in a block of :data:`~scalegpt.inputs.MIXTURE_BLOCK`.
        tokens: its prepared tokens.
        digest: their digest.
    """

    name: str
    share: int
    tokens: TokenSet
    digest: str

    @property
    def weight(self) -> float:
        """Its part of all windows, from 0 to 1."""
        return self.share / MIXTURE_BLOCK


@dataclass(frozen=True, eq=False)
class Mixture:
    """The sources of a run's data, that with the largest weight first; often only one."""

    sources: tuple[MixtureSource, ...]

    @classmethod
    def of(cls, found: Sequence[tuple[WeightedInput, TokenSet]]) -> "Mixture":
        """Mix prepared tokens. The order in which the sources are given makes no difference.

        Raises:
            InputError: two sources have different tokenizers.
        """
        digests = [tokens.digest for _, tokens in found]
        order = sorted(range(len(found)), key=lambda index: (-found[index][0].weight, digests[index]))
        shares = shares_of([found[index][0].weight for index in order])
        mixture = cls(
            tuple(
                MixtureSource(found[index][0].text, share, found[index][1], digests[index])
                for index, share in zip(order, shares, strict=True)
            )
        )
        first = mixture.sources[0]
        for other in mixture.sources[1:]:
            if other.tokens.tokenizer.digest != first.tokens.tokenizer.digest:
                raise InputError(_other_tokenizer(first, other))
        return mixture

    @classmethod
    def alone(cls, name: str, tokens: TokenSet) -> "Mixture":
        """The data of one source."""
        return cls.of([(WeightedInput(name, 1.0), tokens)])

    @classmethod
    def open(cls, places: Sequence[Place], settings: DataConfig) -> "Mixture":
        """Open what another process has prepared with these settings."""
        return cls(
            tuple(
                MixtureSource(place.name, place.share, open_given(place.path, settings), place.digest)
                for place in places
            )
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the tokens are."""
        return tuple(Place(each.name, each.share, str(each.tokens.path), each.digest) for each in self.sources)

    @property
    def digest(self) -> str:
        """Equal digests mean equal windows: over the sources' digests and shares; of one source, its own."""
        if len(self.sources) == 1:
            return self.sources[0].digest
        parts = [f"{source.share} {source.digest}" for source in self.sources]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all sources."""
        return self.sources[0].tokens.tokenizer

    @property
    def train(self) -> MixedTokens:
        """The training tokens."""
        return self._split("train")

    @property
    def val(self) -> MixedTokens:
        """The held-out tokens."""
        return self._split("val")

    def _split(self, split: str) -> MixedTokens:
        parts = tuple(source.tokens.files[split].tokens for source in self.sources)
        return MixedTokens(parts, tuple(source.share for source in self.sources))

    @property
    def labels(self) -> tuple[str, ...]:
        """A short name of each source: that of its file or folder, which a number makes unique."""
        names = [re.sub(r"[^\w.\- ]", "_", Path(source.name).name or source.name) for source in self.sources]
        return tuple(distinct(names, "{} {}"))

    @property
    def encodings(self) -> list[str]:
        """The encodings in which the text was read, sorted; empty if they are not known."""
        return sorted({each for source in self.sources for each in source.tokens.encodings})

    def check(self, *, vocab_size: int, block_size: int, packs_documents: bool = False) -> None:
        """Check every id of every source, that each split of each fills a window, and if wanted that documents end.

        Raises:
            InputError: an id is outside the vocabulary, a split is too short, or documents cannot be told apart.
        """
        for source in self.sources:
            source.tokens.check_vocabulary(vocab_size)
            source.tokens.check_block_size(block_size)
            if packs_documents:
                source.tokens.check_document_ends()


def _other_tokenizer(first: MixtureSource, other: MixtureSource) -> str:
    one, two = first.tokens.tokenizer, other.tokens.tokenizer
    advice = "prepare all sources with one --tokenizer"
    if one.kind == two.kind == "char":
        advice = "each text has its own characters: use --tokenizer byte, gpt2 or a tokenizer.json"
    return (
        f"{one_line(first.name)} has the tokenizer {one.kind} {one.digest[:8]}, {one_line(other.name)} has {two.kind} "
        f"{two.digest[:8]}; {advice}"
    )


def prepare_mixture(
    data: DataConfig,
    *,
    kept: Mapping[str, str] | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> tuple[Mixture, list[str]]:
    """Prepare every source of ``input_file``, or take it from the cache.

    Args:
        data: the settings.
        kept: name of each source → digest of the tokens that a resumed run began with, which are used if the cache still has
            them (:func:`~scalegpt.data.prepare.prepare_again`); None: prepare the text as it is now.
        progress: makes the callback that follows the preparation of a source, from the source's name.

    Returns:
        The mixture, and a warning for each source whose text has changed since the run began.

    Raises:
        InputError: there is no ``input_file``, a source cannot be prepared, or two sources have different tokenizers.
    """
    if data.input_file is None:
        raise InputError("no data: give --input_file with a text file, a folder, or a folder of prepared tokens")
    found, warnings = [], []
    for source in data.sources:
        settings = data.changed(input_file=source.text)
        report = None if progress is None else progress(source.text)
        if kept is None:
            tokens = prepare_cached(settings, progress=report)
        else:
            tokens, changed = prepare_again(settings, kept[source.text], progress=report)
            kept_in = f"the run resumes with the tokens that it began with, which are still in {tokens.path}"
            warnings += [f"{changed}; {kept_in}"] if changed else []
        found.append((source, tokens))
    return Mixture.of(found), warnings
