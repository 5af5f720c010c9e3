"""Which windows of the data each optimizer step consumed.

The windows of a run have one order, a pure function of seed, block size and number of tokens (:mod:`scalegpt.data.sampler`),
on any number of ranks. A step consumes the next windows of that order; only a rollback after a loss spike skips some. So a
run needs one line where its counting starts, and another where it changes: ``data_ledger.jsonl``, from which the windows of
any step follow without reading the data.
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
"""The largest number of a step, window or token."""

_MOST_PER_STEP = 10**7
"""The most windows of a step."""


@dataclass(frozen=True)
class Window:
    """One training sample.

    Attributes:
        order: its place in the global batch of its step, from 0, independent of ranks and micro batches.
        number: its place in the run's order of windows, counted over all epochs.
        file: the token file.
        offset: of its first token in the file, in tokens.
        length: in tokens, the last target included: ``block_size + 1``.
    """

    order: int
    number: int
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stretch:
    """Steps that consume consecutive windows: a line of the ledger.

    Attributes:
        first_step: the first of them, counted from 1 as in ``metrics.jsonl``.
        first_window: the number of its first window.
        windows_per_step: over all ranks and micro steps.
        block_size: T.
        seed: the run's.
        tokens: the number in the file.
        file: the training tokens.
        data: the digest of the data.
        reason: why a new line begins here.
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
        """The number of a step's first window."""
        return self.first_window + (step - self.first_step) * self.windows_per_step

    def starting_at(self, step: int) -> "Stretch":
        """The same windows for the same steps, written from another step on."""
        return replace(self, first_step=step, first_window=self.window_of(step))

    def continues(self, before: "Stretch") -> bool:
        """Whether another stretch gives our steps the same windows; the file may have moved."""
        ours = before.starting_at(self.first_step)
        return replace(ours, file=self.file, reason=self.reason) == self

    def windows(self, step: int) -> list[Window]:
        """The windows of one of its steps, in their order within the global batch."""
        first = self.window_of(step)
        starts = WindowSampler(self.tokens, self.block_size, self.seed).starts(first, self.windows_per_step)
        return [
            Window(order, first + order, self.file, int(start), self.block_size + 1)
            for order, start in enumerate(starts)
        ]


class Ledger:
    """``data_ledger.jsonl``.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Stretch]:
        """All stretches, in the order of their steps; none where there is no file.

        A line that a crash cut short is skipped: its run had not continued yet.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return [stretch for _, values in read_lines(self.path) if (stretch := _parse(values)) is not None]
        except FileNotFoundError:
            return []

    def append(self, stretch: Stretch) -> None:
        """Add a stretch durably, unless the last one gives the same windows.

        Raises:
            OSError: it cannot be written.
        """
        known = self.read()
        if known and stretch.continues(known[-1]):
            return
        self._write([*known, stretch])

    def forget_after(self, step: int) -> None:
        """Drop the stretches that begin after a step.

        Raises:
            OSError: it cannot be written.
        """
        known = self.read()
        kept = [stretch for stretch in known if stretch.first_step <= step]
        if len(kept) != len(known):
            self._write(kept)

    def stretch_of(self, step: int) -> Stretch | None:
        """The stretch of a step; None where none is known."""
        return _stretch_of(self.read(), step)

    def windows(self, steps: Iterable[int]) -> Iterator[tuple[int, list[Window]]]:
        """Each of the steps with its windows.

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
        """Why the windows of a step are not known, and what can be done."""
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
    """The object of a line as a stretch; None where it is not one."""
    if values.keys() != {each.name for each in fields(Stretch)}:
        return None
    stretch = Stretch(**values)
    if any(type(getattr(stretch, each.name)) is not each.type for each in fields(stretch)):
        return None
    counts = (stretch.first_step, stretch.windows_per_step, stretch.block_size, stretch.tokens - stretch.block_size)
    is_one = min(counts) >= 1 and max(counts) <= _MOST and stretch.windows_per_step <= _MOST_PER_STEP
    return stretch if is_one and 0 <= stretch.first_window <= _MOST and 0 <= stretch.seed < 2**63 else None
