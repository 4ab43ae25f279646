"""MLflow: a database beside the run folder unless MLFLOW_TRACKING_URI names a store, one run for all starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from maskwise.engine.loggers.base import COMPLETE, LoggedRun, Logger
from maskwise.engine.run_end import PREEMPTED

# unless the user set them: no usage statistics, no lines about tables, and no minutes of waiting for a lost server
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
PARAMETERS = 100  # of one request
ENDINGS = {COMPLETE: "FINISHED", PREEMPTED: "KILLED"}


class MLflowLogger(Logger):
    """Log to `mlflow/mlflow.db` beside the run folder, or to the store of MLFLOW_TRACKING_URI.

    The experiment is MLFLOW_EXPERIMENT_NAME or `maskwise`; pictures, reports and recipe.yaml are artifacts, the values
    of the recipe at the first start parameters.
    """

    def __init__(self, run: LoggedRun):
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        place = run.folder.resolve().parent / "mlflow"
        store = os.environ.get("MLFLOW_TRACKING_URI")
        uri = store or f"sqlite:///{place / 'mlflow.db'}"
        with contextlib.nullcontext() if store else locked(place):
            self.client = MlflowClient(tracking_uri=uri)
            experiment = self._experiment(None if store else (place / "artifacts").as_uri())
        identity = run.identity("mlflow")
        if identity.get("uri") == uri and self._exists(identity["run"]):
            self.id = identity["run"]
            self.client.set_terminated(self.id, "RUNNING")
        else:
            name = os.environ.get("MLFLOW_RUN_NAME") or run.folder.name
            self.id = self.client.create_run(experiment, run_name=name).info.run_id
            self._parameters(run.recipe)
            run.remember("mlflow", {"uri": uri, "run": self.id})
        self._artifact(run.folder / "recipe.yaml")
        run.print_line(f"mlflow: run {self.id} in {uri}")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Keep a PNG file as an artifact; its name holds the step."""
        self._artifact(path, "pictures")

    def report(self, path: Path, step: int) -> None:
        """Keep the file of a report as an artifact."""
        self._artifact(path, "reports")

    def close(self, status: str) -> None:
        """End this start of the run: FINISHED, KILLED or FAILED."""
        self.client.set_terminated(self.id, ENDINGS.get(status, "FAILED"))

    def _experiment(self, artifacts):
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "maskwise"
        known = self.client.get_experiment_by_name(name)
        return known.experiment_id if known else self.client.create_experiment(name, artifact_location=artifacts)

    def _exists(self, run_id):
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException:  # the store was removed
            return False

    def _parameters(self, recipe):
        from mlflow.entities import Param

        flat = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
        for section, values in recipe.items():
            flat |= {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {}
        parameters = [Param(key, str(value)) for key, value in flat.items()]
        for first in range(0, len(parameters), PARAMETERS):
            self.client.log_batch(self.id, params=parameters[first : first + PARAMETERS])

    def _artifact(self, path, folder=None):
        if path.is_file():
            self.client.log_artifact(self.id, str(path), folder)


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Create a folder and hold it for the block, so that runs that start together make one database."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "wb") as handle:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
