"""The files that a run writes while it trains, and what can be read of them later: status, metrics, samples."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config.train import MOST_STEPS
from scalegpt.data.ledger import Ledger
from scalegpt.errors import InputError
from scalegpt.storage import read_text
from scalegpt.structured import read_object
from scalegpt.training.runs.files import finite, write_whole, writing
from scalegpt.training.runs.metrics_file import History, metric_lines

SAMPLES_LIMIT = 1 << 28
"""Bytes of ``samples.txt`` that are read at most."""

_SAMPLE_MARK = "--- step "

FROM_A_COPY = "if you have a copy of the file, stop the run, put the copy's lines first, and start the run again"


@dataclass(frozen=True)
class Past:
    """What a run's files say of its past, its checkpoints aside.

    Attributes:
        newest: the step of the newest checkpoint, by ``run_status.json``; None: there was none, or that is not known.
        has_status: whether ``run_status.json`` can be read and names the newest checkpoint.
        last_step: the last step in ``metrics.jsonl``.
        was_begun: whether there is a run at all.
        skipped_since: the first of the last steps, as far as all of them were skipped; None: the last was not.
    """

    newest: int | None
    has_status: bool
    last_step: int
    was_begun: bool
    skipped_since: int | None = None


class RunRecords:
    """The files of one run, by name, and those that grow while it trains.

    Args:
        path: ``runs/MODEL_NAME``; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.jsonl"
        self.status = path / "run_status.json"
        self.ledger = Ledger(path / "data_ledger.jsonl")
        self.bad_steps = path / "bad_steps.jsonl"
        self.samples = path / "samples.txt"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        found = find_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def write_status(self, **values: Any) -> None:
        """Replace ``run_status.json``; the newest checkpoint is added to the values.

        Raises:
            RunError: it cannot be written.
        """
        saved = self.newest_checkpoint()
        values = {"checkpoint_step": None if saved is None else step_of(saved), **values}
        with writing(self.status):
            write_whole(self.status, json.dumps({key: finite(value) for key, value in values.items()}, indent=1))

    def amend_status(self, **values: Any) -> None:
        """Change entries of ``run_status.json`` and keep the others; any rank may.

        The newest checkpoint that it names stays, even if that is gone: the next start must report it as missing.

        Raises:
            RunError: it cannot be written.
        """
        known, saved = self._read_status(), self.newest_checkpoint()
        steps = [_checkpoint_step(known), None if saved is None else step_of(saved)]
        newest = max((step for step in steps if step is not None), default=None)
        self.write_status(**{**known, "checkpoint_step": newest, **values})

    def read_state(self) -> str | None:
        """The state in ``run_status.json``; None where there is no such file, or a broken one."""
        state = self._read_status().get("state")
        return None if state is None else str(state)

    def read_past(self) -> Past:
        """What the files say of the run's past."""
        status = self._read_status()
        last_step, skipped_since = 0, None
        for entry in self.read_steps():
            last_step = max(last_step, entry["step"])
            skipped_since = (skipped_since or entry["step"]) if entry.get("skipped") else None
        return Past(
            _checkpoint_step(status), "checkpoint_step" in status, last_step, self.config.is_file(), skipped_since
        )

    def _read_status(self) -> dict[str, Any]:
        try:
            return read_object(self.status)
        except (OSError, InputError):
            return {}

    def gaps(self, history: History) -> list[str]:
        """What the files lack of the steps that a history is of: a line each."""
        notes, step = [], history.step
        if history.first_missing is not None:
            which = f"{step - history.recorded:,} of the {step:,} steps, from step {history.first_missing:,} on"
            notes.append(f"{self.metrics} lacks {which}, and the report will lack them too; {FROM_A_COPY}")
        first = min((stretch.first_step for stretch in self.ledger.read()), default=step + 1)
        if first > 1 and step:
            which = f"steps 1 to {min(first - 1, step)}"
            notes.append(f"{self.ledger.path} lacks {which}, so it is unknown which data they consumed; {FROM_A_COPY}")
        return notes

    def read_steps(self) -> Iterator[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that are of steps, in their order; none where there is no such file."""
        return (values for _, values in metric_lines(self.metrics) if "loss" in values)

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample to ``samples.txt``.

        Raises:
            RunError: it cannot be written.
        """
        with writing(self.samples), self.samples.open("a", encoding="utf-8") as file:
            file.write(sample_text(step, text))

    def read_samples(self) -> list[tuple[int, str]]:
        """The steps of ``samples.txt`` with their texts; none where there is no such file."""
        if not self.samples.is_file():
            return []
        whole = read_text(self.samples, SAMPLES_LIMIT, errors="replace")
        parts = re.split(rf"^{_SAMPLE_MARK}([0-9]{{1,13}})\n", whole, flags=re.MULTILINE)
        return [(int(step), text.removesuffix("\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


def _checkpoint_step(status: dict[str, Any]) -> int | None:
    """The step of the newest checkpoint, by a status."""
    step = status.get("checkpoint_step")
    return step if type(step) is int and 0 <= step <= MOST_STEPS else None


def sample_text(step: int, text: str) -> str:
    """A sample in the form of ``samples.txt``."""
    return f"{_SAMPLE_MARK}{step}\n{text}\n"
