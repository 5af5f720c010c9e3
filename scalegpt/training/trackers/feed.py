"""Sends a run's metrics and samples to a tracker from a thread, so that neither network nor disk can delay or end the run.

If sending fails, the run prints one line and tries again after 15 s, then after twice as long each time, up to 10
minutes. Meanwhile entries wait in memory. If too many wait, sending stops until the next start of the run. At the end
of the run, the waiting entries are sent once more. Entries that are still missing are added from the run's files at its
next start.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from scalegpt.text import brief, one_line
from scalegpt.training.trackers.base import Entry, Past, Position, TrackedRun, Tracker, numbers, read_entries

FOLDER = ".trackers"
"""The folder in a run's folder that holds a file with the position of each tracker."""

MOST_WAITING = 100_000
"""The most entries that wait in memory while sending fails."""

_BATCH = 500
_SECONDS_BETWEEN = 2.0
"""Seconds between two batches while the run trains."""

_FIRST_PAUSE, _LONGEST_PAUSE = 15.0, 600.0
_PATIENCE = 30.0
"""Seconds without progress after which the end of the run no longer waits for a tracker."""


def position_file(run_folder: Path, name: str) -> Path:
    """The file that records how many of the run's entries a tracker has received."""
    return run_folder / FOLDER / f"{name}.json"


class Feed:
    """A :class:`~scalegpt.training.metrics.MetricSink` that passes everything on to a tracker.

    Args:
        make: makes the tracker.
        run: the run.
        past: the entries in its files.
        say: prints a line.
    """

    def __init__(
        self, make: Callable[[TrackedRun], Tracker], run: TrackedRun, past: Past, say: Callable[[str], None]
    ) -> None:
        self._make, self._run, self._past, self._say = make, run, past, say
        made = make(run)
        self.name, self.place = made.NAME, made.place
        self._file = position_file(run.records.path, self.name)
        self._position = Position.read(self._file)
        self._tracker: Tracker | None = None
        self._stream: Iterator[Entry] = iter(())
        self._next = 0  # index of the entry to send next
        self._head = past.count  # index of the first waiting entry; the ones before it are in the files alone
        self._waiting: deque[Entry] = deque()
        self._lock = threading.Lock()
        self._has_failed = self._gave_up = False
        self._woken, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"log_to {self.name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any]) -> None:
        """Pass a line of ``metrics.jsonl`` on."""
        self._add(Entry(values["step"], numbers(values), None, time.time()))

    def log_sample(self, step: int, text: str) -> None:
        """Pass a sample on."""
        self._add(Entry(step, {}, text, time.time()))

    def _add(self, entry: Entry) -> None:
        if self._gave_up:
            return
        if len(self._waiting) >= MOST_WAITING:
            self._gave_up = True
            self._warn(f"{MOST_WAITING:,} lines are waiting, so sending stops until the next start of the run")
            return
        with self._lock:
            self._waiting.append(entry)
        self._woken.set()

    def close(self) -> None:
        """Send the waiting entries, and close the record. Waits while sending makes progress."""
        self._closing.set()
        self._woken.set()
        seen, since = self._next, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < _PATIENCE:
            self._thread.join(0.2)
            if self._next != seen:
                seen, since = self._next, time.monotonic()
        missing = self._total() - self._next
        if missing > 0 or self._thread.is_alive():
            self._warn(f"the record may lack its last {max(1, missing):,} lines; the same command adds them")

    # --- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            self._woken.clear()
            is_last = self._closing.is_set()
            try:
                self._send_all()
            except Exception as error:  # whatever a program or a network raises must not end the run
                self._fail(error)
                if not is_last:
                    self._closing.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = _FIRST_PAUSE
                if not is_last:
                    self._woken.wait()
                    self._closing.wait(_SECONDS_BETWEEN)
            if is_last:
                break
        self._close_tracker()

    def _send_all(self) -> None:
        if self._tracker is None:
            self._open()
        tracker = self._tracker
        assert tracker is not None
        while batch := self._batch():
            self._note(sent=self._next + len(batch))
            tracker.send(batch)
            self._next += len(batch)
            with self._lock:
                for _ in batch:
                    self._waiting.popleft()
            self._head = self._next
            self._note(acked=self._next)
        if self._has_failed:
            self._has_failed = False
            self._say(f"{self.name}: sent again; nothing is missing")

    def _open(self) -> None:
        tracker = self._make(self._run)
        # The waiting entries are in the files too, but only those before them are known to be there whole.
        past = replace(self._past, count=self._head, last_step=self._last_step())
        run, start = tracker.open(self._position, past)
        self._tracker, self._next = tracker, start
        self._stream = past.entries(start)
        self._position = Position(run, start, start)
        self._note()
        while batch := list(islice(self._stream, _BATCH)):
            self._note(sent=self._next + len(batch))
            tracker.send(batch)
            self._next += len(batch)
            self._note(acked=self._next)
        tracker.settle()

    def _last_step(self) -> int:
        last = self._past.last_step
        if self._head > self._past.count:
            last = max(last, *(entry.step for entry in islice(read_entries(self._run.records), self._head)))
        return last

    def _batch(self) -> list[Entry]:
        with self._lock:
            return list(islice(self._waiting, _BATCH))

    def _note(self, *, acked: int | None = None, sent: int | None = None) -> None:
        now = self._position
        self._position = Position(now.run, now.acked if acked is None else acked, now.sent if sent is None else sent)
        self._position.write(self._file)

    def _total(self) -> int:
        return self._head + len(self._waiting)

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            said = one_line(brief(f"{type(error).__name__}: {error}", 200))
            self._warn(f"{said}; training continues, and sending is tried again until the run ends")
        self._close_tracker()

    def _close_tracker(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(Exception):  # all entries were sent, or a warning has said that sending fails
                tracker.close(self._run.records.read_state())

    def _warn(self, text: str) -> None:
        self._say(f"warning: log_to {self.name}: {text}")
