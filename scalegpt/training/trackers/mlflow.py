"""MLflow: a run in the database beside the runs, or on the server that ``MLFLOW_TRACKING_URI`` names.

MLflow cannot take back a logged value. A run that goes back to an earlier step, or was killed while it sent, therefore
gets a new MLflow run with all its steps. The old MLflow run is deleted, which MLflow can undo, and its tag
``replaced_by`` names the new one. A run that ended in order continues in the same MLflow run.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from scalegpt.errors import InputError
from scalegpt.text import brief
from scalegpt.training.trackers.base import PROJECT, Entry, Past, Position, Tracker

DATABASE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"
"""Names in the folder of all runs, used if the user names no server: the database, and the folder with the samples."""

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST_VALUE = 1000, 100, 500


class MLflow(Tracker):
    """A run of MLflow."""

    NAME: ClassVar[str] = "mlflow"
    MODULE: ClassVar[str] = "mlflow"

    @classmethod
    def check(cls, folder: Path) -> None:
        """See the base class. Asks the database or the server for the experiment."""
        uri = _uri(folder)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # we try again ourselves
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            _client(uri).get_experiment_by_name(_experiment())
        except Exception as error:  # MLflow raises many kinds
            raise InputError(
                f"log_to mlflow: {uri} cannot be used ({brief(error, 200)}); set MLFLOW_TRACKING_URI to a server or to "
                "sqlite:///FILE, which needs pip install 'scalegpt[mlflow]'"
            ) from None

    @property
    def place(self) -> str:
        """See the base class."""
        uri = _uri(self.run.records.path.parent)
        shows = f"; mlflow server --backend-store-uri {uri} shows it" if uri.startswith("sqlite:") else ""
        return f"experiment {_experiment()} in {uri}{shows}"

    def open(self, position: Position, _past: Past) -> tuple[str, int]:
        """See the base class. Continues the MLflow run if its content is as expected, else replaces it."""
        self._client = _client(_uri(self.run.records.path.parent))
        start = 0
        if position.is_clean and position.run is not None and self._exists(position.run):
            self._id, start = position.run, position.acked
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create()
            if position.run is not None and self._exists(position.run):
                self._client.set_tag(position.run, "replaced_by", self._id)
                self._client.delete_run(position.run)
        self._client.log_dict(self._id, {"settings": dict(self.run.settings), "plan": dict(self.run.plan)}, "run.json")
        return self._id, start

    def send(self, entries: Sequence[Entry]) -> None:
        """See the base class."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, round(1000 * entry.time), entry.step)
            for entry in entries
            for key, value in entry.values.items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])
        for entry in entries:
            if entry.text is not None:
                self._client.log_text(self._id, entry.text, f"samples/step_{entry.step:08d}.txt")

    def close(self, state: str | None) -> None:
        """See the base class."""
        if state in _STATUS:
            self._client.set_terminated(self._id, _STATUS[state])

    def _exists(self, run: str) -> bool:
        """Whether there is an MLflow run with this id that nobody has deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _create(self) -> str:
        """Make an MLflow run with the settings and the plan as its parameters; return its id."""
        from mlflow.entities import Param

        name, uri = _experiment(), _uri(self.run.records.path.parent)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            folder = self.run.records.path.parent.resolve() / ARTIFACTS
            artifacts = folder.as_uri() if uri.startswith("sqlite:") else None
            experiment = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment = found.experiment_id
        run = str(self._client.create_run(experiment, run_name=self.run.name).info.run_id)
        facts = {**self.run.settings, **{f"plan.{key}": value for key, value in self.run.plan.items()}}
        parameters = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in facts.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(run, params=parameters[start : start + _MOST_PARAMETERS])
        return run


def _experiment() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT


def _uri(folder: Path) -> str:
    """The database or server that the user names, else the database in the folder of all runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / DATABASE}"


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they report each table that a new database gets
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
