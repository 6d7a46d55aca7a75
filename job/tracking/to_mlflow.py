"""MLflow. Server and experiment come from its own environment variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME);
otherwise runs are kept in the folder `mlruns` beside the run directory, in the experiment `alexnet`.

In: records of a run. Out: a run of the tracking server or of the folder.
"""

import json
import os
import re
import time
from typing import Any

from job.tracking.tracker import INSTALL, Tracker, TrackerError, flat, numbers

# For a server that does not answer; MLflow's own limits are minutes.
REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
MOST_PARAMETERS = 100  # per request


class MLflow(Tracker):
    """Args: `known`, the id under which an earlier start of the run was tracked, or ""."""

    name = "mlflow"

    def __init__(self, out: str, known: str = ""):
        self._out, self.id = out, known

    def start(self, config: dict[str, Any], step: int) -> str:
        """Raises TrackerError without the package, and MLflow's errors where the server is away or refuses."""
        for name, value in REQUEST_LIMITS.items():
            os.environ.setdefault(name, value)
        folder = os.path.join(os.path.dirname(os.path.abspath(self._out)), "mlruns")
        uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"file:{folder}")
        if uri.startswith("file:") or "://" not in uri:
            # Folders are in maintenance mode since MLflow 3, and refused unless wanted. They need no further package.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise TrackerError(f"--track mlflow needs the package mlflow-skinny ({error}): {INSTALL}") from None
        if uri.startswith(("sqlite:", "postgresql", "mysql", "mssql")) and not _has_databases():
            raise TrackerError(
                f"MLFLOW_TRACKING_URI={uri} needs all of MLflow: pip install mlflow, or give a folder or http(s) server"
            )
        self._client = MlflowClient()
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "alexnet"
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            name = os.environ.get("MLFLOW_RUN_NAME") or os.path.basename(os.path.abspath(self._out))
            self.id = self._client.create_run(number, run_name=name).info.run_id
        self._settings(config, step)
        return f"{uri}, run {self.id}"

    def _settings(self, config: dict[str, Any], step: int) -> None:
        """MLflow's parameters cannot change: those that do when a run resumes become tags."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.id).data.params
        values = {name: str(value) for name, value in config.items() if str(value)}
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for first in range(0, len(new), MOST_PARAMETERS):
            self._client.log_batch(self.id, params=new[first : first + MOST_PARAMETERS])
        other = [(name, value) for name, value in values.items() if known.get(name, value) != value]
        self._client.log_batch(self.id, tags=[RunTag(f"from step {step}/{name}", value) for name, value in other])

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Metrics `train/loss` and so on."""
        self._metrics({f"{kind}/{name}": value for name, value in values.items()}, step)

    def _metrics(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def event(self, step: int, values: dict[str, Any]) -> None:
        """A tag, whose name holds the step and the time, as events may come again at a step."""
        name = f"event/{step:08d}/{int(time.time() * 1000)}"
        self._client.set_tag(self.id, name, json.dumps(values))

    def summary(self, values: dict[str, Any]) -> None:
        """Numbers become metrics, all else tags."""
        all = flat(values)
        found = numbers(all)
        self._metrics({f"summary/{name}": value for name, value in found.items()}, values["steps"])
        for name in all.keys() - found.keys():
            if all[name] is not None:
                self._client.set_tag(self.id, _allowed(f"summary/{name}"), str(all[name]))

    def close(self, status: str) -> None:
        """Note how the run ended."""
        self._client.set_terminated(self.id, STATUS[status])


def _allowed(name: str) -> str:
    """A name as MLflow accepts it: no comma, say."""
    return re.sub(r"[^\w\-. /:]", "", name)


def _has_databases() -> bool:
    try:
        import sqlalchemy  # noqa: F401
    except ImportError:
        return False
    return True
