"""What a run writes down while it trains, and what can be read of it later: its status, its metrics, its samples."""

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
from scalegpt.training.metrics import metric_lines
from scalegpt.training.runs.files import finite, write_whole, writing
from scalegpt.training.runs.history import History

SAMPLES_LIMIT = 1 << 28
"""Bytes of ``samples.txt`` that are read at most."""

_SAMPLE_MARK = "--- step "

FROM_A_COPY = "if you have a copy, stop the run, put its lines before those that are there, and start the run again"


@dataclass(frozen=True)
class Past:
    """What a run's files say of it, its checkpoints aside.

    Attributes:
        newest: the step of the newest checkpoint that ``run_status.json`` knows of; None where it knows of none.
        is_told: whether ``run_status.json`` says so at all; it may be missing, or broken.
        steps: the last step in ``metrics.jsonl``.
        was_begun: whether there is a run at all.
        skipped_from: the first of the last steps, as far as they were all skipped; None: the last was not.
    """

    newest: int | None
    is_told: bool
    steps: int
    was_begun: bool
    skipped_from: int | None = None


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
        """Replace ``run_status.json``; readers never see half of it. The newest checkpoint is added to what is given.

        Raises:
            RunError: it cannot be written.
        """
        saved = self.newest_checkpoint()
        values = {"checkpoint_step": None if saved is None else step_of(saved), **values}
        with writing(self.status):
            write_whole(self.status, json.dumps({key: finite(value) for key, value in values.items()}, indent=1))

    def amend_status(self, **values: Any) -> None:
        """Change entries of ``run_status.json`` and leave the others; any rank may.

        That there was a newer checkpoint than there is now is not forgotten: the next start must miss it.

        Raises:
            RunError: it cannot be written.
        """
        known, saved = self._read_status(), self.newest_checkpoint()
        steps = [_step_or_none(known), None if saved is None else step_of(saved)]
        newest = max((step for step in steps if step is not None), default=None)
        self.write_status(**{**known, "checkpoint_step": newest, **values})

    def read_state(self) -> str | None:
        """The state in ``run_status.json``; None where there is no such file, or a broken one."""
        state = self._read_status().get("state")
        return None if state is None else str(state)

    def read_past(self) -> Past:
        """What the files say of the run's past."""
        status = self._read_status()
        steps, skipped_from = 0, None
        for entry in self.read_steps():
            steps = max(steps, entry["step"])
            skipped_from = (skipped_from or entry["step"]) if entry.get("skipped") else None
        return Past(_step_or_none(status), "checkpoint_step" in status, steps, self.config.is_file(), skipped_from)

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
            notes.append(f"{self.metrics} lacks {which}, and so will the report; {FROM_A_COPY}")
        first = min((stretch.first_step for stretch in self.ledger.read()), default=step + 1)
        if first > 1 and step:
            which = f"steps 1 to {min(first - 1, step)}"
            notes.append(f"{self.ledger.path} says nothing of {which}, and their windows are lost; {FROM_A_COPY}")
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


def _step_or_none(status: dict[str, Any]) -> int | None:
    """The step of the newest checkpoint by a status."""
    step = status.get("checkpoint_step")
    return step if type(step) is int and 0 <= step <= MOST_STEPS else None


def sample_text(step: int, text: str) -> str:
    """A sample as ``samples.txt`` has it."""
    return f"{_SAMPLE_MARK}{step}\n{text}\n"
