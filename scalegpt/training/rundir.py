"""The directory of a run, ``runs/MODEL_NAME/``: who owns it, and the files that it ends up with.

``config.yaml`` everything resolved · ``plan.json`` batch and memory · ``metrics.jsonl`` a line a step ·
``data_ledger.jsonl`` which data a step consumed · ``bad_steps.jsonl`` the samples of the steps that ended the run ·
``run_status.json`` state and cause · ``checkpoints/`` · ``samples.txt`` · ``report.html``.
"""

import fcntl
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file
from scalegpt.data.ledger import Ledger
from scalegpt.data.writer import disk_errors
from scalegpt.errors import InputError, RunError

FREE_TO_CHANGE = frozenset({
    "name", "preset", "backend", "zero_stage", "offload", "ds_config", "micro_batch", "max_iters", "max_tokens",
    "max_minutes", "fused", "recompute", "loss", "loss_chunk", "attention", "compile", "eval_every", "eval_tokens",
    "sample_every", "sample_tokens", "sample_prompt", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
    "keep_best", "async_checkpoint", "log_every", "input_file", "max_skipped_in_a_row", "on_spike", "spike_window",
    "spike_factor", "max_rollbacks", "first_step_timeout", "step_timeout", "on_oom",
})  # fmt: skip
"""Settings that a resumed run may have otherwise: they do not change what is computed, or only how long.

The file of the text may have moved; that its tokens are the same is checked by themselves."""

MUONS = frozenset({"muon_lr", "muon_momentum"})
"""Settings of Muon alone."""

SHAPES_THE_WEIGHTS = frozenset({"n_layer", "n_embd", "block_size", "vocab_size", "bias", "tie_head"})
"""Settings that no word of the user can change in a run: its weights would not fit."""

LOCK = ".lock"
"""A file that the process which trains the run holds locked; it stays, since to delete a lock is to lose it."""

RUN_ID = ".run_id"
"""A file with a random number that the run is given at its start, and that its checkpoints carry."""

_SAMPLE_MARK = "--- step "


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
        self._lock: TextIO | None = None

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
        try:
            if not directory.path.exists() or all(path.name in {LOCK, RUN_ID} for path in directory.path.iterdir()):
                return directory
        except OSError as error:
            raise InputError(
                f"{directory.path} cannot hold a run: {error.strerror}; choose another --model_name"
            ) from None
        if fresh:
            number = 2
            while (root / f"{run.name}-{number}").exists():
                number += 1
            return cls(root / f"{run.name}-{number}")
        directory.check_same_run(run, allowed)
        return directory

    def lock(self) -> None:
        """Keep other processes out of this run until this process ends, however it ends.

        Raises:
            InputError: another process is training this run.
            RunError: the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("a+", encoding="ascii")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}; choose another --runs_dir") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "of another user"
            file.close()
            raise InputError(
                f"{self.path} is being trained by process {owner}; wait for it, or choose another --model_name or --fresh"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file  # the system releases it with the process, if nobody does before

    def unlock(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def changes(self, run: RunConfig) -> dict[str, str]:
        """The settings that the run that is here has otherwise, each as ``old → new``, without those that are free.

        Raises:
            InputError: ``config.yaml`` cannot be read.
        """
        theirs = self.read_config()
        return {} if theirs is None else differences(theirs, as_file(run))

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
            raise InputError(f"{self.path} exists but holds no run; choose another --model_name")
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
            raise InputError(f"{self.path} holds another run: {listed}; {_ways_out(changes)}")

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run that is here, in the form of a configuration file; None if there is none.

        Raises:
            InputError: ``config.yaml`` cannot be read.
        """
        if not self.config.is_file():
            return None
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.config} cannot be read ({reason}); choose another --model_name, or --fresh"
            ) from None
        if not isinstance(values, dict) or not isinstance(values.get("train"), dict):
            raise InputError(f"{self.config} holds no configuration; choose another --model_name, or --fresh")
        return values

    def settle(self, run: RunConfig) -> RunConfig:
        """The run with ``precision auto`` and an open ``tokens_per_step`` as the run that is here settled them.

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
        return replace(run, train=run.train.changed(**settled))

    def read_plan(self) -> dict[str, Any] | None:
        """How the run that is here was laid out; None where that is not known: then it is laid out anew."""
        try:
            values = json.loads(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) else None

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
        """The run's id; None before there is one."""
        try:
            return (self.path / RUN_ID).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        found = find_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def create(self, run: RunConfig, plan: dict[str, Any]) -> None:
        """Make the directory with its configuration and plan.

        Raises:
            InputError: it cannot be written.
        """
        with disk_errors(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.read_id() is None:
                write_whole(self.path / RUN_ID, secrets.token_hex(16))
            write_whole(self.config, yaml.safe_dump(as_file(run), sort_keys=False, allow_unicode=True))
            write_whole(self.plan, json.dumps(plan, indent=1))

    def write_status(self, **values: Any) -> None:
        """Replace ``run_status.json``; readers never see half of it.

        Raises:
            RunError: it cannot be written.
        """
        with writing(self.status):
            write_whole(self.status, json.dumps({key: finite(value) for key, value in values.items()}, indent=1))

    def amend_status(self, **values: Any) -> None:
        """Change entries of ``run_status.json`` and leave the others; any rank may.

        Raises:
            RunError: it cannot be written.
        """
        try:
            known = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.write_status(**{**(known if isinstance(known, dict) else {}), **values})

    def read_state(self) -> str | None:
        """The state in ``run_status.json``; None where there is no such file, or a broken one."""
        try:
            return str(json.loads(self.status.read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def read_newest_step(self) -> int | None:
        """The step of the newest checkpoint that ``run_status.json`` knows of; None where it knows of none."""
        try:
            step = json.loads(self.status.read_text(encoding="utf-8"))["checkpoint_step"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return step if isinstance(step, int) else None

    def forget_after(self, step: int) -> None:
        """Drop the metrics, samples and ledger of steps that a resumed run will take again.

        Raises:
            InputError: they cannot be written.
        """
        with disk_errors(self.path):
            self.ledger.forget_after(step)
            if self.metrics.is_file():
                lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
                if len(kept) != len(lines):
                    write_whole(self.metrics, "".join(kept))
            samples = self.read_samples()
            if any(after > step for after, _ in samples):
                write_whole(self.samples, "".join(_sample_text(*each) for each in samples if each[0] <= step))

    def read_steps(self) -> Iterator[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that are of steps, in their order; none where there is no such file."""
        if not self.metrics.is_file():
            return
        with self.metrics.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if _step_of(line) < math.inf and "loss" in (values := json.loads(line)):
                    yield values

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
        whole = self.samples.read_text(encoding="utf-8", errors="replace")
        parts = re.split(rf"^{_SAMPLE_MARK}(\d+)\n", whole, flags=re.MULTILINE)
        return [(int(step), text.removesuffix("\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """The settings that two configurations have otherwise and must not, each as ``old → new``."""
    old, new = _flat(theirs), _flat(ours)
    free = FREE_TO_CHANGE
    if {old.get("optimizer"), new.get("optimizer")} != {"muon"}:
        free |= MUONS  # without Muon they say nothing; where it comes or goes, that says all
    keys = [key for key in {**old, **new} if key not in free]
    return {key: f"{old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def _ways_out(changes: Iterable[str]) -> str:
    """What to do about differences."""
    beside = "choose another --model_name, or --fresh to start anew beside it"
    keys = list(changes)
    if SHAPES_THE_WEIGHTS.isdisjoint(keys):
        return f"--allow_change {','.join(keys)} goes on with {'them' if len(keys) > 1 else 'it'}; or {beside}"
    return beside


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for what is no such line, as a crash may leave."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _sample_text(step: int, text: str) -> str:
    return f"{_SAMPLE_MARK}{step}\n{text}\n"


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file of the run could not be written.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room, or the folder writable, and run the same command again"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash finds the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
