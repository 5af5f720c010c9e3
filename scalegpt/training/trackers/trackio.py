"""Trackio: a local database in ``TRACKIO_DIR``, or else in trackio's own folder. ``trackio show`` shows it.

Each entry has an id, so that an entry that is sent twice is stored once. A run that goes back to an earlier step is
deleted and written again from its first step.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from scalegpt.errors import InputError
from scalegpt.training.trackers.base import PROJECT, Entry, Past, Position, Tracker

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio(Tracker):
    """A run of trackio."""

    NAME: ClassVar[str] = "trackio"
    MODULE: ClassVar[str] = "trackio"

    @classmethod
    def check(cls, _folder: Path) -> None:
        """See the base class. Refuses a remote record, since it could not be corrected later."""
        for name in _REMOTE:
            if os.environ.get(name):
                raise InputError(
                    f"log_to trackio writes a local record; unset {name}, and publish it with `trackio sync`"
                )
        try:
            _storage().init_db(_project())
        except Exception as error:  # a broken installation, a folder that cannot be written
            raise InputError(f"log_to trackio cannot be used ({error}); set TRACKIO_DIR to a folder") from None

    @property
    def place(self) -> str:
        """See the base class."""
        return f"project {_project()} in {_storage().get_project_db_path(_project()).parent}; trackio show shows it"

    def open(self, position: Position, _past: Past) -> tuple[str, int]:
        """See the base class."""
        self._id = position.run or f"{self.run.name}-{os.urandom(8).hex()}"
        self._tells_settings = True
        known = {record["id"] for record in _storage().get_run_records(_project())}
        if self._id in known and position.is_clean:
            return self._id, position.acked
        if self._id in known and not _storage().delete_run(_project(), self.run.name, run_id=self._id):
            raise RuntimeError(f"run {self._id} cannot be deleted from project {_project()}")
        return self._id, 0

    def send(self, entries: Sequence[Entry]) -> None:
        """See the base class."""
        from datetime import UTC, datetime

        settings = {**self.run.settings, **{f"plan.{key}": value for key, value in self.run.plan.items()}}
        _storage().bulk_log(
            _project(),
            self.run.name,
            [_values(entry) for entry in entries],
            steps=[entry.step for entry in entries],
            timestamps=[datetime.fromtimestamp(entry.time, UTC).isoformat() for entry in entries],
            log_ids=[f"{self._id}-{entry.step}-{_kind(entry)}" for entry in entries],
            config=settings if self._tells_settings else None,
            run_id=self._id,
        )
        self._tells_settings = False

    def close(self, _state: str | None) -> None:
        """See the base class. Everything is in the database already."""


def _project() -> str:
    return os.environ.get("TRACKIO_PROJECT") or PROJECT


def _storage() -> Any:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage


def _values(entry: Entry) -> dict[str, Any]:
    if entry.text is None:
        return dict(entry.values)
    from trackio import Markdown

    indented = "".join(f"    {line}\n" for line in entry.text.split("\n"))
    return {"sample": Markdown(indented)._to_dict()}


def _kind(entry: Entry) -> str:
    return "sample" if entry.text is not None else "evaluation" if "val_tokens" in entry.values else "step"
