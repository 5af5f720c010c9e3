"""The directory of a run, ``runs/MODEL_NAME/``: choosing, locking, checking and creating it, and rolling it back.

It holds ``config.yaml`` (all settings), ``plan.json`` (layout, memory, speed), ``metrics.jsonl`` (a line for each step and
evaluation), ``data_ledger.jsonl`` (the data that each step consumed), ``bad_steps.jsonl`` (the samples of the skipped steps
that ended the run), ``run_status.json`` (state and cause of the end), ``checkpoints/``, ``samples.txt`` and ``report.html``.
"""

import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from scalegpt.checkpoint.address import Place, place_of
from scalegpt.checkpoint.manifest import UnreadableError
from scalegpt.checkpoint.reader import read_manifest, unreadable
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file, from_run
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors, is_temporary, read_text, sync_folder
from scalegpt.structured import CONFIG_LIMIT, parse_yaml, read_object
from scalegpt.training.runs.changes import (
    differences,
    differences_of_models,
    free_differences,
    other_length,
    reshaping,
    ways_out,
)
from scalegpt.training.runs.files import write_whole, writing
from scalegpt.training.runs.lock import LOCK, RunLock, is_locked
from scalegpt.training.runs.metrics_file import History, metric_lines
from scalegpt.training.runs.records import CHECKPOINTS, RunRecords, sample_text

RUN_ID = ".run_id"
"""Name of the file with the run's id: a random number made when the run begins, which its checkpoints also hold."""

STARTED_BY = ".started_by"
"""Name of the file that identifies the launcher that began the run (:mod:`scalegpt.training.runs.launch_marks`)."""

IMPORTED = "imported"
"""The state of a run whose weights come from another program, and which has not been trained."""

_MADE_FIRST = (LOCK, RUN_ID, STARTED_BY, "plan.json", CHECKPOINTS)
"""Files that a start makes before ``config.yaml``.

A folder with only these is new: its start was killed, or the disk was full.
"""


class RunDirectory(RunRecords):
    """The directory of one run: its records (:class:`RunRecords`), id, settings and lock."""

    def __init__(self, path: Path, checkpoints: Place | None = None) -> None:
        super().__init__(path, checkpoints)
        self._lock = RunLock(path)

    @classmethod
    def of(cls, root: Path, run: RunConfig, name: str | None = None) -> "RunDirectory":
        """The directory of a run, or of another name, with its checkpoints where ``checkpoint_dir`` says."""
        name, given = name or run.name, run.train.checkpoint_dir
        return cls(root / name, root / name / CHECKPOINTS if given is None else place_of(given) / name)

    @classmethod
    def choose(
        cls, root: Path, run: RunConfig, *, fresh: bool, allowed: frozenset[str] = frozenset()
    ) -> "RunDirectory":
        """Choose the directory for a run: NAME, or with ``fresh`` the first of NAME, NAME-2, NAME-3 … that is free.

        Args:
            root: the folder of all runs.
            run: the configuration, which names the run.
            fresh: whether to begin a new run beside an earlier one of the same name.
            allowed: names of the settings that a resumed run may change.

        Raises:
            InputError: the directory holds a run with other settings, or something else than a run.
        """
        directory = cls.of(root, run)
        if directory.is_new() and not (fresh and directory.is_taken()):
            return directory
        if fresh:
            numbered = (cls.of(root, run, f"{run.name}-{number}") for number in count(2))
            return next(each for each in numbered if not each.is_taken())
        directory.check_same_run(run, allowed)
        for path in (
            directory.config, directory.plan, directory.metrics, directory.status, directory.samples, directory.report,
            directory.ledger.path, directory.bad_steps,
        ):  # fmt: skip
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is not a plain file, and the run could not write it; move it away")
        return directory

    def is_new(self) -> bool:
        """Whether no run has begun here: there is no folder, or it has only the files of an interrupted :meth:`create`.

        Raises:
            InputError: the path cannot be listed, or is not a folder.
        """
        try:
            return self.is_blank() and not self._holds_checkpoints()
        except OSError as error:
            raise InputError(f"{self.path} cannot hold a run: {error.strerror}; choose another --model_name") from None

    def is_blank(self) -> bool:
        """Whether the run's folder is missing, or has only the files of an interrupted :meth:`create`."""
        found = list(self.path.iterdir()) if self.path.exists() else []
        return all(path.name in _MADE_FIRST or is_temporary(path) for path in found)

    def _holds_checkpoints(self) -> bool:
        place = self.checkpoints
        if isinstance(place, Path):
            return place.is_dir() and any(place.iterdir())
        return bool(find_checkpoints(place))

    def is_taken(self) -> bool:
        """Whether the directory holds a run or anything else, or another process is starting a run in it."""
        if self.path.exists() and not (self.path.is_dir() and self.is_new()):
            return True
        if not isinstance(self.checkpoints, Path) and self._holds_checkpoints():
            return True
        return is_locked(self.path)

    def lock(self) -> list[str]:
        """Lock the run's directory against other processes until :meth:`unlock`, or until this process ends in any way.

        Returns:
            A list of warnings, where the file system has no locks or cannot sync folders.

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
        """Release the lock."""
        self._lock.release()

    def changes(self, run: RunConfig, *, ranks: int) -> dict[str, str]:
        """All settings, and the number of ranks, that differ from the run so far, each as ``old → new``.

        Differences that change the result of training come first. A new run has none, nor has an imported run that was
        not trained yet.

        Raises:
            InputError: the configuration of the run so far cannot be read.
        """
        earlier, before = self.read_config(), (self.read_plan() or {}).get("ranks", ranks)
        if earlier is None or self.read_state() == IMPORTED:
            return {}
        moved = {"ranks": f"{before} → {ranks}"} if before != ranks else {}
        return {**differences(earlier, as_file(run)), **moved, **free_differences(earlier, as_file(run))}

    def check_same_run(self, run: RunConfig, allowed: frozenset[str] = frozenset()) -> None:
        """Refuse to resume a run whose settings differ from ``run``, except for changes that are allowed.

        Args:
            run: the configuration to resume with.
            allowed: names of the settings that may differ.

        Raises:
            InputError: there is no run here, or settings differ. The message lists the differences.
        """
        earlier = self.read_config()
        if earlier is None:
            raise InputError(f"{self.path} exists but holds no run; choose another --model_name, or --fresh")
        compare = differences_of_models if self.read_state() == IMPORTED else differences
        found = compare(earlier, as_file(run))
        changes = {key: text for key, text in found.items() if key not in allowed}
        reshaped = reshaping(earlier, as_file(run)) if found else frozenset[str]()
        shapes = sorted(reshaped & allowed & found.keys())
        if shapes:
            raise InputError(
                f"{self.path}: {shapes[0]} cannot be changed: it sets the weights' shape; choose another --model_name, "
                "or --fresh to start a new run beside it"
            )
        if changes:
            lines = [f"{key}: {text}" for key, text in changes.items()]
            listed = ", ".join(lines[:6]) + (f" and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise InputError(f"{self.path} holds another run: {listed}; {ways_out(changes, allowed, reshaped)}")

    def read_config(self) -> dict[str, Any] | None:
        """Read the configuration of the run so far, in the form of a configuration file; None if there is none.

        Where ``config.yaml`` is missing, the configuration in the newest readable checkpoint is returned.

        Raises:
            InputError: ``config.yaml`` cannot be read.
        """
        if not self.config.is_file():
            return self._config_of_newest()
        advice = "delete it to use the newest checkpoint's copy, or choose another --model_name, or --fresh"
        try:
            return from_run(parse_yaml(read_text(self.config, CONFIG_LIMIT), str(self.config)), str(self.config))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise InputError(f"{self.config} cannot be read ({reason}); {advice}") from None
        except InputError as error:
            raise InputError(f"{error}; {advice}") from None

    def _config_of_newest(self) -> dict[str, Any] | None:
        for path in reversed(find_checkpoints(self.checkpoints)):
            try:
                return from_run(read_manifest(path).header.config, str(path))
            except UnreadableError:
                raise
            except InputError:
                continue  # damage is reported where a checkpoint is chosen
        return None

    def with_earlier_settings(self, run: RunConfig, given: frozenset[str] = frozenset()) -> RunConfig:
        """Fill in the settings that are still open in ``run`` with those of the run so far.

        These are the precision, ``tokens_per_step``, and a second length limit (:func:`other_length`).

        Args:
            run: the configuration to fill in.
            given: names of the settings that the user gave.

        Raises:
            InputError: ``config.yaml`` cannot be read.
        """
        earlier = self.read_config()
        if earlier is None:
            return run
        settled = {}
        if run.train.precision == "auto":
            settled["precision"] = earlier["train"].get("precision", "auto")
        if run.train.tokens_per_step is None:
            settled["tokens_per_step"] = earlier["train"].get("tokens_per_step")
        settled |= other_length(run.train, earlier["train"], given)
        return replace(run, train=run.train.changed(**settled))

    def read_plan(self) -> dict[str, Any] | None:
        """Read ``plan.json`` of the run so far; None where it cannot be read. The layout is then planned again."""
        try:
            return read_object(self.plan)
        except (OSError, InputError):
            return None

    def read_id(self) -> str | None:
        """Read the run's id; None where the run has none.

        Raises:
            InputError: the id cannot be read now.
        """
        path = self.path / RUN_ID
        try:
            return read_text(path, CONFIG_LIMIT).strip()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        except OSError as error:
            raise unreadable(path, error) from error

    def create(self, run: RunConfig, plan: dict[str, Any] | None, started_by: Mapping[str, str] | None = None) -> None:
        """Write the directory's first files: launcher's marks, run id, plan and configuration, in this order.

        The marks come first, since a restart by the launcher finds the folder by them. The configuration comes last: a
        folder without it counts as new, so a start that is killed or meets a full disk can be repeated.

        Args:
            run: the configuration.
            plan: the content of ``plan.json``; None: the run is not trained yet, and there is no such file.
            started_by: marks that identify the launcher (:func:`~scalegpt.training.runs.launch_marks.launch_marks`). They are
                written only into a new directory.

        Raises:
            InputError: a file cannot be written.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            is_new = self.is_new()
            try:
                self._create(run, plan, started_by if is_new else None)
            except OSError:
                if is_new:
                    self._remove_first_files()
                raise

    def _create(self, run: RunConfig, plan: dict[str, Any] | None, started_by: Mapping[str, str] | None) -> None:
        if started_by:
            write_whole(self.path / STARTED_BY, json.dumps(dict(started_by)))
        elif self.is_new():  # drop the marks of another launcher's start that was interrupted here
            (self.path / STARTED_BY).unlink(missing_ok=True)
        if isinstance(self.checkpoints, Path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.read_id() is None:
            write_whole(self.path / RUN_ID, secrets.token_hex(16))
        if plan is not None:
            write_whole(self.plan, json.dumps(plan, indent=1))
        write_whole(self.config, yaml.safe_dump(as_file(run), sort_keys=False, allow_unicode=True))

    def abandon(self) -> None:
        """Delete all but the lock in the folder of a new run that could not be created.

        Call this only if :meth:`is_taken` was false before the creation.
        """
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)

    def _remove_first_files(self) -> None:
        """Delete the files that a failed start has made in a new folder, except the lock."""
        for path in (self.config, self.plan, self.path / RUN_ID, self.path / STARTED_BY):
            path.unlink(missing_ok=True)
        if isinstance(self.checkpoints, Path):
            with suppress(OSError):  # the folder is not empty, or does not exist
                self.checkpoints.rmdir()

    def forget_after(self, history: History) -> None:
        """Delete the metrics, the samples and the entries of the data ledger for steps after a checkpoint.

        Args:
            history: what ``metrics.jsonl`` says about the steps up to the checkpoint's step.

        Raises:
            InputError: a file cannot be written.
        """
        step = history.step
        with disk_errors(self.path):
            self.ledger.forget_after(step)
            if self.metrics.is_file() and self.metrics.stat().st_size != history.size:
                write_whole(self.metrics, "".join(line for line, _ in metric_lines(self.metrics, until=step)))
            samples = self.read_samples()
            if any(after > step for after, _ in samples):
                write_whole(self.samples, "".join(sample_text(*each) for each in samples if each[0] <= step))
