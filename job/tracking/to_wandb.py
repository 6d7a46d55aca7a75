"""Weights & Biases. Project, name, entity, group and mode come from its own environment variables (WANDB_PROJECT,
WANDB_NAME, ...); otherwise the project is `alexnet` and the name that of the run directory.

In: records of a run. Out: a run on its server, or with WANDB_MODE=offline files for `wandb sync`.
"""

import json
import os
from typing import Any

from job.tracking.tracker import INSTALL, Tracker, TrackerError, flat

START_SECONDS = 30.0  # to reach the server
EXIT_CODES = {"done": 0, "stopped": 75, "failed": 1}


class WandB(Tracker):
    """Args: `known`, the id under which an earlier start of the run was tracked, or ""."""

    name = "wandb"

    def __init__(self, out: str, known: str = ""):
        self._out, self.id = out, known

    def start(self, config: dict[str, Any], step: int) -> str:
        """Raises TrackerError without the package or without a key, and wandb's errors where the server is away."""
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(f"--track wandb needs the package wandb ({error}): {INSTALL}") from None
        mode = os.environ.get("WANDB_MODE", "online")
        if mode in ("online", "shared") and not _has_key(wandb):
            raise TrackerError(
                "--track wandb has no credentials: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and "
                "upload later with `wandb sync`"
            )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "alexnet",
            name=os.environ.get("WANDB_NAME") or os.path.basename(os.path.abspath(self._out)),
            id=self.id or os.environ.get("WANDB_RUN_ID"),
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or self._out,
            config=config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=START_SECONDS),
        )
        self.id = self._run.id
        # A run that resumes at an earlier step writes some steps again, which wandb's own step does not allow.
        self._run.define_metric("step", hidden=True)
        for kind in ("train/*", "val/*"):
            self._run.define_metric(kind, step_metric="step")
        if mode == "disabled":
            return "disabled by WANDB_MODE"
        return self._run.url or f"offline, in {os.path.dirname(self._run.dir)}; `wandb sync` uploads it"

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Curves `train/loss` and so on, over `step`."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def event(self, step: int, values: dict[str, Any]) -> None:
        """A text in the history."""
        self._run.log({"step": step, "event": json.dumps(values)})

    def summary(self, values: dict[str, Any]) -> None:
        """Into wandb's summary of the run."""
        self._run.summary.update({f"summary/{n}": value for n, value in flat(values).items() if value is not None})

    def close(self, status: str) -> None:
        """Upload what is left."""
        if status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_CODES[status])


def _has_key(wandb: Any) -> bool:
    """Whether there are credentials, right or wrong: in the environment, ~/.netrc or wandb's settings. Asks nobody."""
    for look in (lambda: wandb.api.api_key, lambda: wandb.login(prompt=False)):  # older versions, newer versions
        try:
            if look():
                return True
        except Exception:
            continue
    return False
