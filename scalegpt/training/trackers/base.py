"""What all trackers share: their interface, the entries that they receive, and the position that each has reached."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from scalegpt.errors import InputError
from scalegpt.storage import write_atomic
from scalegpt.structured import read_object
from scalegpt.training.runs.metrics_file import metric_lines
from scalegpt.training.runs.records import RunRecords

PROJECT = "scalegpt"
"""The project or experiment of all runs, where the user names none in the program's own environment variable."""


class Entry(NamedTuple):
    """A line of ``metrics.jsonl``, or a sample.

    Attributes:
        step: number of steps taken.
        values: the line's finite numbers by their names in ``metrics.jsonl``, without ``step``; empty for a sample.
        text: the sample; None for a line.
        time: when the entry was logged, in seconds since 1970. For entries that are read back from the files it is
            estimated from the steps' durations, since the files have no times.
    """

    step: int
    values: Mapping[str, float]
    text: str | None
    time: float


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of ``metrics.jsonl``, without its step; true and false become 1 and 0.

    The numbers of an object in it, such as the losses of the sources, are named with a slash: ``val_loss_by_source/wiki``.
    """
    objects = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    inside = {f"{key}/{name}": number for key, value in objects.items() for name, number in value.items()}
    everything = {**values, **inside}
    kept = {key: value for key, value in everything.items() if isinstance(value, int | float) and key != "step"}
    return {key: float(value) for key, value in kept.items() if isfinite(value)}


def read_entries(records: RunRecords, begun: float = 0.0) -> Iterator[Entry]:
    """Yield the entries of a run's files in the order in which they were logged. A step's sample follows its lines.

    Args:
        records: the run's files.
        begun: the time of the run's start; each step's duration is added to it.
    """
    samples = iter(records.read_samples())
    sample, now = next(samples, None), begun
    for _, values in metric_lines(records.metrics):
        while sample is not None and sample[0] < values["step"]:
            yield Entry(sample[0], {}, sample[1], now)
            sample = next(samples, None)
        now += values.get("step_seconds") or 0.0
        yield Entry(values["step"], numbers(values), None, now)
    while sample is not None:
        yield Entry(sample[0], {}, sample[1], now)
        sample = next(samples, None)


@dataclass(frozen=True)
class Position:
    """How much of a run a tracker's record holds, counted in entries from the run's first.

    Attributes:
        run: the run's id in the tracker; None: there is no record yet.
        acked: number of leading entries that the record certainly holds.
        sent: number of leading entries that the record may hold. It differs from ``acked`` if a process ended while it
            sent, or if the run went back to an earlier step.
    """

    run: str | None = None
    acked: int = 0
    sent: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether the content of the record is known exactly."""
        return self.run is not None and self.acked == self.sent

    @classmethod
    def read(cls, path: Path) -> "Position":
        """Read a position. If the file is missing or damaged, the position is that of a tracker without a record."""
        try:
            values = read_object(path)
            position = cls(**{key: values[key] for key in cls.__dataclass_fields__})
        except (OSError, InputError, KeyError):
            return cls()
        is_valid = isinstance(position.run, str) and {type(position.acked), type(position.sent)} == {int}
        return position if is_valid else cls()

    def write(self, path: Path) -> None:
        """Replace the file of the position.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(asdict(self)))

    def limited(self, count: int) -> "Position":
        """The position after the run's files were cut to ``count`` entries."""
        return replace(self, acked=min(self.acked, count))


@dataclass(frozen=True)
class Past:
    """The entries of a run up to the moment at which a record is opened.

    Attributes:
        records: the run's files.
        count: number of entries.
        last_step: the last entry's step; 0 without entries.
        begun: the time of the run's start, as :func:`read_entries` takes it.
    """

    records: RunRecords
    count: int
    last_step: int
    begun: float

    def entries(self, start: int) -> Iterator[Entry]:
        """The entries from index ``start`` on."""
        return islice(read_entries(self.records, self.begun), start, self.count)

    def resend_from(self, acked: int) -> tuple[int, int]:
        """Where to continue in a record that certainly holds ``acked`` entries, and in which steps can be undone.

        Returns:
            The index of the first entry to send, and its step. The caller must first remove this step and all later
            steps from the record.
        """
        if acked >= self.count:
            return self.count, self.last_step + 1 if self.count else 0
        first, step = 0, -1
        for index, entry in enumerate(islice(read_entries(self.records), acked + 1)):
            if entry.step != step:
                first, step = index, entry.step
        return first, step


@dataclass(frozen=True)
class TrackedRun:
    """The information on a run that a tracker receives besides the run's entries.

    Attributes:
        records: the run's files.
        settings: the resolved settings, by names with dots: ``train.learning_rate`` → value.
        plan: the plan, by names with dots: ``memory.peak_bytes`` → value.
    """

    records: RunRecords
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.records.path.name


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The values of nested objects, by names with dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


class Tracker(ABC):
    """A run's record in one program. One thread opens it, sends to it, and closes it.

    Any method may raise any exception: the program's, the network's or the disk's.
    """

    NAME: ClassVar[str]
    """The name of the program in ``log_to``, which is also the name of its package."""

    MODULE: ClassVar[str]
    """The module that a run imports to log to the program."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    @classmethod
    @abstractmethod
    def check(cls, folder: Path) -> None:
        """Refuse settings with which no record can be made, before anything is written.

        Args:
            folder: the folder of all runs.

        Raises:
            InputError: the program's settings cannot work.
        """

    @property
    @abstractmethod
    def place(self) -> str:
        """Say in words where the record is and how to look at it."""

    @abstractmethod
    def open(self, position: Position, past: Past) -> tuple[str, int]:
        """Continue the record, or make one. Afterwards it holds the first entries of ``past`` and nothing else.

        Returns:
            The run's id in the program, and the number of entries that the record holds.
        """

    @abstractmethod
    def send(self, entries: Sequence[Entry]) -> None:
        """Add entries to the record. When this returns, the record or the program's own process has them."""

    def settle(self) -> None:  # noqa: B027 - few programs have anything to do
        """Clean up after all entries of the steps before this start were sent."""

    @abstractmethod
    def close(self, state: str | None) -> None:
        """Close the record. ``state`` is the run's state in ``run_status.json``."""
