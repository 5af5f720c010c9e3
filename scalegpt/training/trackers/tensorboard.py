"""TensorBoard: event files in the run's folder.

When a run goes back to an earlier step, or was killed while it wrote, all its steps are written into a new event file,
and the old files are deleted. A mark in a new file, as PyTorch's ``purge_step`` writes it, would be less work, but some
readers ignore it, TensorBoard's own among them. ``SummaryWriter`` is not used, because its thread reports a full disk
only later.
"""

import os
import socket
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from scalegpt.training.trackers.base import Entry, Past, Position, Tracker

FOLDER = "tensorboard"
"""The folder in a run's folder that holds its event files."""

_PATTERN = "events.out.tfevents.*"


class TensorBoard(Tracker):
    """Event files of TensorBoard."""

    NAME: ClassVar[str] = "tensorboard"
    MODULE: ClassVar[str] = "torch.utils.tensorboard"

    @classmethod
    def check(cls, _folder: Path) -> None:
        """Do nothing: event files need no settings."""

    @property
    def folder(self) -> Path:
        """The folder of the event files."""
        return self.run.records.path / FOLDER

    @property
    def place(self) -> str:
        """See the base class."""
        return f"{self.folder}; tensorboard --logdir {self.run.records.path.parent} shows it"

    def open(self, position: Position, past: Past) -> tuple[str, int]:
        """See the base class. Begins an event file. Keeps the old files if their content is as expected."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        summaries: Any = import_module("torch.utils.tensorboard.summary")  # has no types
        self.folder.mkdir(exist_ok=True)
        old = sorted(self.folder.glob(_PATTERN))
        start = position.acked if old and position.is_clean else 0
        self._old = [] if start else old
        # TensorBoard reads files in the order of their names, and takes the time in them for whole seconds.
        number = max([int(time.time()), *(_second(path) + 1 for path in old)])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((self.folder / name).open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        for key, values in (("settings", self.run.settings), ("plan", self.run.plan)):
            rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in values.items())
            self._summary(summaries.text(key, f"| name | value |\n|---|---|\n{rows}"), past.last_step, time.time())
        plain = {key: value for key, value in self.run.settings.items() if isinstance(value, bool | int | float | str)}
        for summary in summaries.hparams(plain, {"loss": 0.0, "val_loss": 0.0}):
            self._summary(summary, 0, time.time())
        self._writer.flush()
        return str(self.folder.name), start

    def send(self, entries: Sequence[Entry]) -> None:
        """See the base class."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summaries: Any = import_module("torch.utils.tensorboard.summary")

        for entry in entries:
            if entry.text is None:
                values = [Summary.Value(tag=key, simple_value=value) for key, value in entry.values.items()]
                summary = Summary(value=values)
            else:  # Markdown: four spaces keep text as it is
                summary = summaries.text("sample", "".join(f"    {line}\n" for line in entry.text.split("\n")))
            self._summary(summary, entry.step, entry.time)
        self._writer.flush()

    def settle(self) -> None:
        """Delete the older files, since this one holds all of their entries."""
        for path in self._old:
            path.unlink(missing_ok=True)
        self._old = []

    def close(self, _state: str | None) -> None:
        """See the base class."""
        self._writer.close()

    def _summary(self, summary: Any, step: int, when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(wall_time=when, step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def _second(path: Path) -> int:
    """The time in an event file's name, in seconds; 0 where it has none."""
    part = path.name.split(".")[3]
    return int(part) if part.isdigit() else 0


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
