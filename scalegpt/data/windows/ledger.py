"""Which windows of the data each optimizer step consumed.

The order of a run's windows is a pure function of seed, block size, and the size and share of each source
(:mod:`.sampler`). It does not depend on the number of ranks. A step consumes the next windows of that order; only
a rollback after a loss spike skips windows. So ``data_ledger.jsonl`` needs a line only for the run's first step, and for each
later step at which the data, the batch, or the position in the order changes. The windows of any step follow from these lines
without reading the data.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scalegpt.data.windows.sampler import MixtureSampler
from scalegpt.errors import InputError
from scalegpt.inputs import MIXTURE_BLOCK
from scalegpt.storage import write_atomic
from scalegpt.structured import read_lines

if TYPE_CHECKING:  # it imports the tokenizers, which take a while
    from scalegpt.data.windows.mixture import Mixture

_MOST = 10**16
"""The largest step, window number or token count that a line may state."""

_MOST_PER_STEP = 10**7
"""The largest number of windows per step that a line may state."""

_LONGEST_LINE = 1 << 24
"""Characters of the longest line that is read or written: it lists every file of every source."""


@dataclass(frozen=True)
class Window:
    """One training sample.

    Attributes:
        order: position of the window in its step's global batch, from 0; it does not depend on ranks or micro batches.
        number: position of the window in the run's order of windows, from 0, counted over all epochs.
        source: the source of the data, as the user named it; in lines of earlier releases the token file.
        file: path of the token file in which the window begins.
        offset: position of the window's first token in the file, in tokens from the beginning of the file.
        length: number of tokens, ``block_size + 1``: the inputs and the last target. Those beyond the end of the file are the
            first ones of the source's next file.
    """

    order: int
    number: int
    source: str
    file: str
    offset: int
    length: int


class LedgerFile(NamedTuple):
    """Training tokens in a file.

    Attributes:
        path: path of the file.
        first: position of the first of these tokens, in tokens from the beginning of the file.
        tokens: number of tokens.
    """

    path: str
    first: int
    tokens: int


@dataclass(frozen=True)
class LedgerSource:
    """A source of the data.

    Attributes:
        name: the source as the user named it.
        share: number of its windows in a block (:class:`~scalegpt.data.windows.sampler.MixtureSampler`).
        tokens: number of its training tokens.
        data: the digest of its tokens (:attr:`scalegpt.data.shards.TokenSet.digest`).
        files: the files of its training tokens, in their order.
    """

    name: str
    share: int
    tokens: int
    data: str
    files: tuple[LedgerFile, ...]

    def same_tokens(self, other: "LedgerSource") -> bool:
        """Whether another source gives the same windows; names and paths may differ."""
        return (self.share, self.tokens, self.data) == (other.share, other.tokens, other.data)

    @property
    def in_words(self) -> str:
        """Name, part of all windows and number of tokens."""
        return f"{self.share / MIXTURE_BLOCK:.4g} {self.name} ({self.tokens:,} tokens)"


def ledger_sources(data: "Mixture") -> tuple[LedgerSource, ...]:
    """The sources of a run's data as the ledger lists them."""
    return tuple(
        LedgerSource(
            name=source.name,
            share=source.share,
            tokens=len(source.tokens.train),
            data=source.digest,
            files=tuple(
                LedgerFile(str(part.path.absolute()), part.offset // part.dtype.itemsize, part.count)
                for part in source.tokens.train.parts
            ),
        )
        for source in data.sources
    )


def change_of_sources(before: tuple[LedgerSource, ...], now: tuple[LedgerSource, ...]) -> str:
    """What differs between the sources before and now, in words; empty where shares and numbers of tokens are the same."""
    if [(source.share, source.tokens) for source in before] == [(source.share, source.tokens) for source in now]:
        return ""
    if len(before) == len(now) == 1:
        (source,) = now
        where = source.files[0].path if len(source.files) == 1 else source.name
        return f", {where} of {before[0].tokens:,} → {source.tokens:,} tokens"
    return f", {' + '.join(each.in_words for each in before)} → {' + '.join(each.in_words for each in now)}"


@dataclass(frozen=True)
class Stretch:
    """A line of the ledger: a range of steps that consume consecutive windows of the same data in equal batches.

    Attributes:
        first_step: the first step of the range, counted from 1 as in ``metrics.jsonl``.
        first_window: the :attr:`Window.number` of the first window that ``first_step`` consumes.
        windows_per_step: number of windows that a step consumes, over all ranks and micro steps.
        block_size: T, the number of targets in a window.
        seed: the run's seed.
        data: the digest of the data (:attr:`scalegpt.data.windows.mixture.Mixture.digest`).
        reason: why a new line begins at this step.
        sources: the sources of the data.
    """

    first_step: int
    first_window: int
    windows_per_step: int
    block_size: int
    seed: int
    data: str
    reason: str
    sources: tuple[LedgerSource, ...]

    def window_of(self, step: int) -> int:
        """The position (:attr:`Window.number`) of the first window that a step consumes."""
        return self.first_window + (step - self.first_step) * self.windows_per_step

    def starting_at(self, step: int) -> "Stretch":
        """A copy of this stretch that begins at another step; each step has the same windows in both."""
        return replace(self, first_step=step, first_window=self.window_of(step))

    def continues(self, before: "Stretch") -> bool:
        """Whether ``before``, extended, gives this stretch's steps the same windows; names, paths and reason may differ."""
        ours = before.starting_at(self.first_step)
        same = len(ours.sources) == len(self.sources) and all(map(LedgerSource.same_tokens, ours.sources, self.sources))
        return same and replace(ours, sources=self.sources, reason=self.reason) == self

    def windows(self, step: int) -> list[Window]:
        """The windows of a step, in their order in the global batch; the step is one of this stretch (range of steps)."""
        first = self.window_of(step)
        sizes, shares = ([getattr(source, key) for source in self.sources] for key in ("tokens", "share"))
        drawn = MixtureSampler(sizes, shares, self.block_size, self.seed).windows(first, self.windows_per_step)
        ends = [list(accumulate(file.tokens for file in source.files)) for source in self.sources]
        found = []
        for order, (number, start) in enumerate(zip(drawn.sources.tolist(), drawn.starts.tolist(), strict=True)):
            source, at = self.sources[number], bisect_right(ends[number], start)
            file = source.files[at]
            offset = file.first + start - (ends[number][at] - file.tokens)
            found.append(Window(order, first + order, source.name, file.path, offset, self.block_size + 1))
        return found


class Ledger:
    """The file ``data_ledger.jsonl`` of a run.

    Args:
        path: path of the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Stretch]:
        """All lines of the ledger as stretches, earliest step first; empty if the file does not exist.

        A line that a crash cut short is skipped: the run had not taken any step of that line yet.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            lines = read_lines(self.path, longest=_LONGEST_LINE)
            return [stretch for _, values in lines if (stretch := _parse(values)) is not None]
        except FileNotFoundError:
            return []

    def append(self, stretch: Stretch) -> None:
        """Append a stretch and sync the file, unless the last stretch, extended, gives its steps the same windows.

        Raises:
            OSError: the file cannot be written.
            InputError: the data have more files than a line can list.
        """
        known = self.read()
        if known and stretch.continues(known[-1]):
            return
        if len(_line(stretch)) > _LONGEST_LINE:
            files = sum(len(source.files) for source in stretch.sources)
            raise InputError(f"{self.path} cannot list {files:,} token files; put the tokens into fewer, larger files")
        self._write([*known, stretch])

    def forget_after(self, step: int) -> None:
        """Delete the ledger's lines (stretches) that begin after a step.

        Raises:
            OSError: the file cannot be written.
        """
        known = self.read()
        kept = [stretch for stretch in known if stretch.first_step <= step]
        if len(kept) != len(known):
            self._write(kept)

    def stretch_of(self, step: int) -> Stretch | None:
        """The ledger's entry (a range of steps with the same data and batch) that covers a step; None if none does."""
        return _stretch_of(self.read(), step)

    def windows(self, steps: Iterable[int]) -> Iterator[tuple[int, list[Window]]]:
        """Yield each given step with its windows.

        Raises:
            InputError: the ledger does not cover a step.
        """
        known = self.read()
        for step in steps:
            stretch = _stretch_of(known, step)
            if stretch is None:
                raise InputError(self._unknown(step, is_empty=not known))
            if stretch.window_of(step) > _MOST:
                raise InputError(f"{self.path}: it lists more windows than a run can consume; restore it from a backup")
            yield step, stretch.windows(step)

    def _unknown(self, step: int, *, is_empty: bool) -> str:
        """The message for a step whose windows are not known: the reason and the remedy."""
        if not self.path.exists():
            reason = "is missing"
        elif is_empty:
            reason = "has no line that can be read"
        else:
            reason = f"has no entry for step {step}: the file may have been cut short or replaced"
        return f"{self.path} {reason}; restore it from a backup: no other file records which windows a step consumed"

    def _write(self, stretches: list[Stretch]) -> None:
        write_atomic(self.path, "".join(map(_line, stretches)), durable=True)


def _line(stretch: Stretch) -> str:
    return json.dumps(asdict(stretch)) + "\n"


def _stretch_of(known: list[Stretch], step: int) -> Stretch | None:
    return next((each for each in reversed(known) if each.first_step <= step), None)


def _parse(values: dict[str, Any]) -> Stretch | None:
    """Make a stretch (a line of the ledger) from the line's JSON object; None if the object is not a valid stretch."""
    values = _in_todays_form(values)
    listed = values.get("sources")
    if not isinstance(listed, list) or values.keys() != {each.name for each in fields(Stretch)}:
        return None
    sources = tuple(source for each in listed if (source := _parse_source(each, values["block_size"])) is not None)
    stretch = Stretch(**{**values, "sources": sources})
    if any(type(getattr(stretch, each.name)) is not each.type for each in fields(stretch) if each.name != "sources"):
        return None
    if len(sources) < len(listed) or sum(source.share for source in sources) != MIXTURE_BLOCK:
        return None
    counts = (stretch.first_step, stretch.windows_per_step, stretch.block_size)
    is_one = min(counts) >= 1 and max(counts) <= _MOST and stretch.windows_per_step <= _MOST_PER_STEP
    return stretch if is_one and 0 <= stretch.first_window <= _MOST and 0 <= stretch.seed < 2**63 else None


def _in_todays_form(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a line; those of earlier releases, with one token file, as a source that is named after its file."""
    if "sources" in values or not values.keys() >= {"file", "tokens", "data"}:
        return values
    source = {
        "name": values["file"], "share": MIXTURE_BLOCK, "tokens": values["tokens"], "data": values["data"],
        "files": [[values["file"], 0, values["tokens"]]],
    }  # fmt: skip
    return {**{key: value for key, value in values.items() if key not in {"file", "tokens"}}, "sources": [source]}


def _parse_source(values: Any, block_size: Any) -> LedgerSource | None:
    if not isinstance(values, dict) or values.keys() != {each.name for each in fields(LedgerSource)}:
        return None
    listed = values["files"]
    if not isinstance(listed, list) or not all(_is_file(each) for each in listed):
        return None
    source = LedgerSource(**{**values, "files": tuple(LedgerFile(*each) for each in listed)})
    if any(type(getattr(source, each.name)) is not each.type for each in fields(source) if each.name != "files"):
        return None
    is_one = type(block_size) is int and block_size < source.tokens <= _MOST and 1 <= source.share <= MIXTURE_BLOCK
    return source if is_one and sum(file.tokens for file in source.files) == source.tokens else None


def _is_file(values: Any) -> bool:
    if not isinstance(values, list) or [type(value) for value in values] != [str, int, int]:
        return False
    first, tokens = values[1:]
    return bool(0 <= first <= _MOST and 1 <= tokens <= _MOST)
