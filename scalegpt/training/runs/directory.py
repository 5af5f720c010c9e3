"""The directory of a run, ``runs/MODEL_NAME/``: who owns it, and the files that it ends up with.

``config.yaml`` everything resolved · ``plan.json`` batch and memory · ``metrics.jsonl`` a line a step ·
``data_ledger.jsonl`` which data a step consumed · ``bad_steps.jsonl`` the samples of the steps that ended the run ·
``run_status.json`` state and cause · ``checkpoints/`` · ``samples.txt`` · ``report.html``.
"""

import itertools
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from scalegpt.checkpoint.manifest import UnreadableError
from scalegpt.checkpoint.reader import read_manifest, unreadable
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file, from_run
from scalegpt.config.train import MOST_STEPS
from scalegpt.data.ledger import Ledger
from scalegpt.data.writer import disk_errors
from scalegpt.errors import InputError
from scalegpt.storage import is_temporary, read_text, sync_folder
from scalegpt.structured import CONFIG_LIMIT, parse_yaml, read_object
from scalegpt.training.metrics import metric_lines
from scalegpt.training.runs.changes import SHAPES_THE_WEIGHTS, differences, free_differences, length_beside, ways_out
from scalegpt.training.runs.files import finite, write_whole, writing
from scalegpt.training.runs.lock import LOCK, RunLock, is_locked

RUN_ID = ".run_id"
"""A file with a random number that the run is given at its start, and that its checkpoints carry."""

STARTED_BY = ".started_by"
"""A file that says which launcher's start began the run (:mod:`scalegpt.training.runs.launch_marks`)."""

SAMPLES_LIMIT = 1 << 28
"""Bytes of ``samples.txt`` that are read at most."""

_BEGINNINGS = (LOCK, RUN_ID, STARTED_BY, "plan.json", "checkpoints")
"""What a start makes before ``config.yaml``. A folder with nothing else is new: the start was killed, or the disk full."""

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


class RunDirectory:
    """The files of one run.

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
        self._lock = RunLock(path)

    @classmethod
    def choose(
        cls, root: Path, run: RunConfig, *, fresh: bool, allowed: frozenset[str] = frozenset()
    ) -> "RunDirectory":
        """The directory for a run: its own if it is to be resumed, a new one otherwise.

        Args:
            root: the folder of all runs.
            run: the resolved run.
            fresh: start anew beside an earlier run of this name, in ``NAME-2``, ``NAME-3`` …
            allowed: settings that may differ from the run that is there.

        Raises:
            InputError: the directory holds another run, or things that are no run.
        """
        directory = cls(root / run.name)
        if directory.is_new() and not (fresh and directory.is_taken()):
            return directory
        if fresh:
            numbered = (cls(root / f"{run.name}-{number}") for number in count(2))
            return next(each for each in numbered if not each.is_taken())
        directory.check_same_run(run, allowed)
        files = (
            directory.config,
            directory.plan,
            directory.metrics,
            directory.status,
            directory.samples,
            directory.report,
        )
        for path in (*files, directory.ledger.path, directory.bad_steps):
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is not a plain file, and the run could not write it; move it away")
        return directory

    def is_new(self) -> bool:
        """Whether no run was begun here: there is no folder, or only what an interrupted start leaves (:meth:`create`).

        Raises:
            InputError: the folder cannot be listed, or is none.
        """
        try:
            found = list(self.path.iterdir()) if self.path.exists() else []
            saved = any(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else False
        except OSError as error:
            raise InputError(f"{self.path} cannot hold a run: {error.strerror}; choose another --model_name") from None
        return not saved and all(path.name in _BEGINNINGS or is_temporary(path) for path in found)

    def is_taken(self) -> bool:
        """Whether something is here that is not new, or another process is at its start."""
        if self.path.exists() and not (self.path.is_dir() and self.is_new()):
            return True
        return is_locked(self.path)

    def lock(self) -> list[str]:
        """Keep other processes out of this run until this process ends, however it ends.

        Returns:
            What the folder's file system does not guarantee, a line each.

        Raises:
            InputError: another process is training this run.
            RunError: the directory cannot be written.
        """
        weaknesses = [weakness] if (weakness := self._lock.take()) else []
        with writing(self.path):
            reason = sync_folder(self.path)
        if reason is not None:
            weaknesses.append(
                f"the file system cannot sync folders (fsync: {reason}): after a power cut the newest checkpoints may be gone"
            )
        return [f"{self.path}: {weakness}" for weakness in weaknesses]

    def unlock(self) -> None:
        """Let other processes in."""
        self._lock.release()

    def changes(self, run: RunConfig, *, ranks: int) -> dict[str, str]:
        """All that the run that is here has otherwise, each as ``old → new``; what decides the result comes first.

        Raises:
            InputError: its configuration cannot be read.
        """
        theirs, before = self.read_config(), (self.read_plan() or {}).get("ranks", ranks)
        if theirs is None:
            return {}
        moved = {"ranks": f"{before} → {ranks}"} if before != ranks else {}
        return {**differences(theirs, as_file(run)), **moved, **free_differences(theirs, as_file(run))}

    def check_same_run(self, run: RunConfig, allowed: frozenset[str] = frozenset()) -> None:
        """Refuse to go on in a directory whose run was configured otherwise.

        Args:
            run: as it is to go on.
            allowed: settings that may differ.

        Raises:
            InputError: there is no run here, or its settings differ; the message lists the differences.
        """
        theirs = self.read_config()
        if theirs is None:
            raise InputError(f"{self.path} exists but holds no run; choose another --model_name, or --fresh")
        changes = {key: text for key, text in differences(theirs, as_file(run)).items() if key not in allowed}
        shapes = sorted(SHAPES_THE_WEIGHTS & allowed & differences(theirs, as_file(run)).keys())
        if shapes:
            raise InputError(
                f"{self.path}: {shapes[0]} cannot be changed, its weights have that shape; choose another --model_name, or "
                "--fresh to start anew beside it"
            )
        if changes:
            told = [f"{key}: {text}" for key, text in changes.items()]
            listed = ", ".join(told[:6]) + (f" and {len(told) - 6} more" if len(told) > 6 else "")
            raise InputError(f"{self.path} holds another run: {listed}; {ways_out(changes, allowed)}")

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run that is here, in the form of a configuration file; None if there is none.

        Where ``config.yaml`` is missing it is that of the newest checkpoint that can be read: each carries it.

        Raises:
            InputError: ``config.yaml`` cannot be read.
        """
        if not self.config.is_file():
            return self._config_of_newest()
        way_out = "delete it, so that the newest checkpoint's is taken, or choose another --model_name, or --fresh"
        try:
            return from_run(parse_yaml(read_text(self.config, CONFIG_LIMIT), str(self.config)), str(self.config))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise InputError(f"{self.config} cannot be read ({reason}); {way_out}") from None
        except InputError as error:
            raise InputError(f"{error}; {way_out}") from None

    def _config_of_newest(self) -> dict[str, Any] | None:
        for path in reversed(find_checkpoints(self.checkpoints)):
            try:
                return from_run(read_manifest(path).header.config, str(path))
            except UnreadableError:
                raise
            except InputError:
                continue  # which of them is damaged, and how, is told where one is chosen
        return None

    def settle(self, run: RunConfig, given: frozenset[str] = frozenset()) -> RunConfig:
        """The run with ``precision auto``, an open ``tokens_per_step`` and an open length as the run in this folder has them.

        Args:
            run: as it is asked for.
            given: the settings that the user or a preset names.

        Raises:
            InputError: ``config.yaml`` cannot be read.
        """
        theirs = self.read_config()
        if theirs is None:
            return run
        settled = {}
        if run.train.precision == "auto":
            settled["precision"] = theirs["train"].get("precision", "auto")
        if run.train.tokens_per_step is None:
            settled["tokens_per_step"] = theirs["train"].get("tokens_per_step")
        settled |= length_beside(run.train, theirs["train"], given)
        return replace(run, train=run.train.changed(**settled))

    def read_plan(self) -> dict[str, Any] | None:
        """How the run that is here was laid out; None where that is not known: then it is laid out anew."""
        try:
            return read_object(self.plan)
        except (OSError, InputError):
            return None

    def settled_layout(self, open_: frozenset[str], *, ranks: int, device: str) -> dict[str, Any]:
        """What an earlier process on as many ranks of the same device chose of the settings that are open.

        Raises:
            InputError: ``config.yaml`` or ``plan.json`` cannot be read.
        """
        theirs, plan = self.read_config(), self.read_plan()
        if theirs is None or plan is None or (plan.get("ranks"), plan.get("device")) != (ranks, device):
            return {}
        values = {**theirs, **theirs["train"]}
        return {key: values[key] for key in open_ if key in values}

    def read_id(self) -> str | None:
        """The run's id; None before there is one.

        Raises:
            InputError: it cannot be read now.
        """
        path = self.path / RUN_ID
        try:
            return read_text(path, CONFIG_LIMIT).strip()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        except OSError as error:
            raise unreadable(path, error) from error

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        found = find_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def create(self, run: RunConfig, plan: dict[str, Any], started_by: Mapping[str, str] | None = None) -> None:
        """Make the directory with its plan, what began it, and its configuration.

        The configuration comes last: a folder without it is new, so that a start that is killed here, or meets a full disk,
        can be repeated. What began it comes first: a launcher's restart finds the folder by that.

        Raises:
            InputError: it cannot be written.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            is_new = self.is_new()
            try:
                self._create(run, plan, started_by if is_new else None)
            except OSError:
                if is_new:
                    self._remove_beginnings()
                raise

    def _create(self, run: RunConfig, plan: dict[str, Any], started_by: Mapping[str, str] | None) -> None:
        if started_by:
            write_whole(self.path / STARTED_BY, json.dumps(dict(started_by)))
        elif self.is_new():  # what another launcher began here never took a step
            (self.path / STARTED_BY).unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        if self.read_id() is None:
            write_whole(self.path / RUN_ID, secrets.token_hex(16))
        write_whole(self.plan, json.dumps(plan, indent=1))
        write_whole(self.config, yaml.safe_dump(as_file(run), sort_keys=False, allow_unicode=True))

    def _remove_beginnings(self) -> None:
        """Remove what a start has made of a new folder, its lock aside."""
        for path in (self.config, self.plan, self.path / RUN_ID, self.path / STARTED_BY):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it was there already, and holds something
            self.checkpoints.rmdir()

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

    def gaps(self, step: int) -> list[str]:
        """What the files should tell of the steps up to one, and do not: a line each."""
        notes = []
        told = {entry["step"] for entry in self.read_steps() if 1 <= entry["step"] <= step}
        if len(told) < step:  # counted, not listed: the step is a checkpoint's word
            first = next(each for each in itertools.count(1) if each not in told)
            which = f"{step - len(told):,} of the {step:,} steps, from step {first:,} on"
            notes.append(f"{self.metrics} lacks {which}, and so will the report; {FROM_A_COPY}")
        first = min((stretch.first_step for stretch in self.ledger.read()), default=step + 1)
        if first > 1 and step:
            which = f"steps 1 to {min(first - 1, step)}"
            notes.append(f"{self.ledger.path} says nothing of {which}, and their windows are lost; {FROM_A_COPY}")
        return notes

    def forget_after(self, step: int) -> None:
        """Drop the metrics, samples and ledger of steps that a resumed run will take again.

        Raises:
            InputError: they cannot be written.
        """
        with disk_errors(self.path):
            self.ledger.forget_after(step)
            if self.metrics.is_file():
                kept = "".join(line for line, _ in metric_lines(self.metrics, until=step))
                if len(kept.encode()) != self.metrics.stat().st_size:
                    write_whole(self.metrics, kept)
            samples = self.read_samples()
            if any(after > step for after, _ in samples):
                write_whole(self.samples, "".join(_sample_text(*each) for each in samples if each[0] <= step))

    def read_steps(self) -> Iterator[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that are of steps, in their order; none where there is no such file."""
        return (values for values in self.read_metrics() if "loss" in values)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, of steps and of evaluations, in their order; none where there is no such file."""
        return (values for _, values in metric_lines(self.metrics))

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample to ``samples.txt``.

        Raises:
            RunError: it cannot be written.
        """
        with writing(self.samples), self.samples.open("a", encoding="utf-8") as file:
            file.write(_sample_text(step, text))

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


def _sample_text(step: int, text: str) -> str:
    return f"{_SAMPLE_MARK}{step}\n{text}\n"
