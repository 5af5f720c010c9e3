"""Which windows of the data each optimizer step consumed.

The order of a run's windows is a pure function of seed, block size and number of tokens (:mod:`scalegpt.data.sampler`). It
does not depend on the number of ranks. A step consumes the next windows of that order; only a rollback after a loss spike
skips windows. So ``data_ledger.jsonl`` needs a line only for the run's first step, and for each later step at which the data,
the batch, or the position in the order changes. The windows of any step follow from these lines without reading the data.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from scalegpt.data.sampler import WindowSampler
from scalegpt.errors import InputError
from scalegpt.storage import write_atomic
from scalegpt.structured import read_lines

_MOST = 10**16
"""The largest step, window number or token count that a line may state."""

_MOST_PER_STEP = 10**7
"""The largest number of windows per step that a line may state."""


@dataclass(frozen=True)
class Window:
    """One training sample.

    Attributes:
        order: position of the window in its step's global batch, from 0; it does not depend on ranks or micro batches.
        number: position of the window in the run's order of windows, from 0, counted over all epochs.
        file: path of the token file.
        offset: position of the window's first token in the file, in tokens.
        length: number of tokens, ``block_size + 1``: the inputs and the last target.
    """

    order: int
    number: int
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stretch:
    """A line of the ledger: a range of steps that consume consecutive windows of the same data in equal batches.

    Attributes:
        first_step: the first step of the range, counted from 1 as in ``metrics.jsonl``.
        first_window: the :attr:`Window.number` of the first window that ``first_step`` consumes.
        windows_per_step: number of windows that a step consumes, over all ranks and micro steps.
        block_size: T, the number of targets in a window.
        seed: the run's seed.
        tokens: number of tokens in the file.
        file: path of the file of training tokens.
        data: the digest of the data (:attr:`scalegpt.data.shards.TokenSet.digest`).
        reason: why a new line begins at this step.
    """

    first_step: int
    first_window: int
    windows_per_step: int
    block_size: int
    seed: int
    tokens: int
    file: str
    data: str
    reason: str

    def window_of(self, step: int) -> int:
        """The position (:attr:`Window.number`) of the first window that a step consumes."""
        return self.first_window + (step - self.first_step) * self.windows_per_step

    def starting_at(self, step: int) -> "Stretch":
        """A copy of this stretch that begins at another step; each step has the same windows in both."""
        return replace(self, first_step=step, first_window=self.window_of(step))

    def continues(self, before: "Stretch") -> bool:
        """Whether ``before``, extended, gives this stretch's steps the same windows; path and reason may differ."""
        ours = before.starting_at(self.first_step)
        return replace(ours, file=self.file, reason=self.reason) == self

    def windows(self, step: int) -> list[Window]:
        """The windows of a step, in their order in the global batch; the step is one of this stretch (range of steps)."""
        first = self.window_of(step)
        starts = WindowSampler(self.tokens, self.block_size, self.seed).starts(first, self.windows_per_step)
        return [
            Window(order, first + order, self.file, int(start), self.block_size + 1)
            for order, start in enumerate(starts)
        ]


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
            return [stretch for _, values in read_lines(self.path) if (stretch := _parse(values)) is not None]
        except FileNotFoundError:
            return []

    def append(self, stretch: Stretch) -> None:
        """Append a stretch and sync the file, unless the last stretch, extended, gives its steps the same windows.

        Raises:
            OSError: the file cannot be written.
        """
        known = self.read()
        if known and stretch.continues(known[-1]):
            return
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
        write_atomic(self.path, "".join(json.dumps(asdict(stretch)) + "\n" for stretch in stretches), durable=True)


def _stretch_of(known: list[Stretch], step: int) -> Stretch | None:
    return next((each for each in reversed(known) if each.first_step <= step), None)


def _parse(values: dict[str, Any]) -> Stretch | None:
    """Make a stretch (a line of the ledger) from the line's JSON object; None if the object is not a valid stretch."""
    if values.keys() != {each.name for each in fields(Stretch)}:
        return None
    stretch = Stretch(**values)
    if any(type(getattr(stretch, each.name)) is not each.type for each in fields(stretch)):
        return None
    counts = (stretch.first_step, stretch.windows_per_step, stretch.block_size, stretch.tokens - stretch.block_size)
    is_one = min(counts) >= 1 and max(counts) <= _MOST and stretch.windows_per_step <= _MOST_PER_STEP
    return stretch if is_one and 0 <= stretch.first_window <= _MOST and 0 <= stretch.seed < 2**63 else None
