"""Writes and reads the files that grow or change while a run trains: status, metrics, samples."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.checkpoint.address import Place, place_of
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config.train import MOST_STEPS
from scalegpt.data.windows.ledger import Ledger
from scalegpt.errors import InputError
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, parse_yaml, read_object
from scalegpt.training.runs.files import finite, write_whole, writing
from scalegpt.training.runs.metrics_file import History, metric_lines

CHECKPOINTS = "checkpoints"
"""The name of the folder of checkpoints in a run's folder."""

SAMPLES_LIMIT = 1 << 28
"""Largest number of bytes that are read from ``samples.txt``."""

_SAMPLE_MARK = "--- step "

FROM_A_COPY = "if you have a copy of the file, stop the run, put the copy's lines first, and start the run again"


@dataclass(frozen=True)
class Past:
    """What the files of a run, apart from its checkpoints, say about its past.

    Attributes:
        newest: step of the newest checkpoint that ``run_status.json`` names; None: it names none, or cannot be read.
        has_status: whether ``run_status.json`` can be read and has an entry for the newest checkpoint.
        last_step: last step in ``metrics.jsonl``; 0: it has none.
        was_begun: whether the run has a ``config.yaml``, which is written when a run begins.
        skipped_since: first step of the unbroken series of skipped steps up to the last step; None: the last step was
            not skipped.
    """

    newest: int | None
    has_status: bool
    last_step: int
    was_begun: bool
    skipped_since: int | None = None


class RunRecords:
    """The paths of a run's files, and access to those that grow or change while the run trains.

    Args:
        path: the run's folder, ``runs/MODEL_NAME``; it need not exist.
        checkpoints: the folder of its checkpoints; None: the one that ``config.yaml`` names by ``checkpoint_dir``, else
            ``checkpoints/`` in the run's folder.
    """

    def __init__(self, path: Path, checkpoints: Place | None = None) -> None:
        self.path, self._checkpoints = path, checkpoints
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.jsonl"
        self.status = path / "run_status.json"
        self.ledger = Ledger(path / "data_ledger.jsonl")
        self.bad_steps = path / "bad_steps.jsonl"
        self.samples = path / "samples.txt"
        self.report = path / "report.html"

    @property
    def checkpoints(self) -> Place:
        """The folder of the run's checkpoints."""
        if self._checkpoints is None:
            self._checkpoints = _named_in(self.config) or self.path / CHECKPOINTS
        return self._checkpoints

    def is_kept_elsewhere(self) -> bool:
        """Whether the run's checkpoints are outside its folder."""
        return self.checkpoints != self.path / CHECKPOINTS

    def kept_elsewhere(self) -> str:
        """Advice if ``config.yaml`` names another place of the checkpoints than this command; else empty."""
        earlier = RunRecords(self.path)
        if earlier.checkpoints.absolute() == self.checkpoints.absolute():
            return ""
        is_elsewhere = earlier.is_kept_elsewhere()
        flag = f"give --checkpoint_dir {earlier.checkpoints.parent}" if is_elsewhere else "omit --checkpoint_dir"
        return f"the run kept its checkpoints in {earlier.checkpoints}: {flag}, or "

    def newest_checkpoint(self) -> Place | None:
        """Return the path of the newest complete checkpoint; None where there is none."""
        found = find_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def write_status(self, **values: Any) -> None:
        """Replace ``run_status.json`` by these values and the step of the newest checkpoint.

        Raises:
            RunError: the file cannot be written.
        """
        saved = self.newest_checkpoint()
        values = {"checkpoint_step": None if saved is None else step_of(saved), **values}
        with writing(self.status):
            write_whole(self.status, json.dumps({key: finite(value) for key, value in values.items()}, indent=1))

    def amend_status(self, **values: Any) -> None:
        """Change entries of ``run_status.json`` and keep all others. Any rank may call this.

        A checkpoint that the file names stays named even if it is gone, unless a newer one exists: the next start must report
        it as missing.

        Raises:
            RunError: the file cannot be written.
        """
        known, saved = self._read_status(), self.newest_checkpoint()
        steps = [_checkpoint_step(known), None if saved is None else step_of(saved)]
        newest = max((step for step in steps if step is not None), default=None)
        self.write_status(**{**known, "checkpoint_step": newest, **values})

    def read_state(self) -> str | None:
        """Return the state in ``run_status.json``; None where the file is missing or broken."""
        state = self._read_status().get("state")
        return None if state is None else str(state)

    def read_past(self) -> Past:
        """Read what status, metrics and configuration say about the run's past."""
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
        """Name the steps that are missing from ``metrics.jsonl`` or the data ledger, in a line for each file."""
        notes, step = [], history.step
        if history.first_missing is not None:
            which = f"{step - history.recorded:,} of the {step:,} steps, from step {history.first_missing:,} on"
            notes.append(f"{self.metrics} lacks {which}, so the report lacks them too; {FROM_A_COPY}")
        first = min((stretch.first_step for stretch in self.ledger.read()), default=step + 1)
        if first > 1 and step:
            which = f"steps 1 to {min(first - 1, step)}"
            notes.append(f"{self.ledger.path} lacks {which}, so it is unknown which data they consumed; {FROM_A_COPY}")
        return notes

    def read_steps(self) -> Iterator[dict[str, Any]]:
        """Yield the values in the step lines of ``metrics.jsonl``, in order; nothing where there is no file."""
        return (values for _, values in metric_lines(self.metrics) if "loss" in values)

    def add_sample(self, step: int, text: str) -> None:
        """Append the sample of a step to ``samples.txt``.

        Raises:
            RunError: the file cannot be written.
        """
        with writing(self.samples), self.samples.open("a", encoding="utf-8") as file:
            file.write(sample_text(step, text))

    def read_samples(self) -> list[tuple[int, str]]:
        """Return (step, text) of each sample in ``samples.txt``; none where there is no file."""
        if not self.samples.is_file():
            return []
        whole = read_text(self.samples, SAMPLES_LIMIT, errors="replace")
        parts = re.split(rf"^{_SAMPLE_MARK}([0-9]{{1,13}})\n", whole, flags=re.MULTILINE)
        return [(int(step), text.removesuffix("\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


def _checkpoint_step(status: dict[str, Any]) -> int | None:
    """The step of the newest checkpoint that ``run_status.json`` names; None where it names none, or no valid step."""
    step = status.get("checkpoint_step")
    return step if type(step) is int and 0 <= step <= MOST_STEPS else None


def _named_in(config: Path) -> Place | None:
    """The folder of checkpoints that a run's ``config.yaml`` names; None: it names none, or cannot be read."""
    try:
        values = parse_yaml(read_text(config, CONFIG_LIMIT), str(config))
        given, name = values["train"].get("checkpoint_dir"), values["name"]
    except (OSError, UnicodeDecodeError, InputError, KeyError, TypeError, AttributeError):
        return None
    return place_of(given) / name if isinstance(given, str) and isinstance(name, str) else None


def sample_text(step: int, text: str) -> str:
    """Format a sample for ``samples.txt``."""
    return f"{_SAMPLE_MARK}{step}\n{text}\n"
