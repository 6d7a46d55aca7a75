"""The interface of a tracker, and which ones `--track` names.

In: rank 0's records. Out: calls of each tracker. `Tracker` itself records nothing: it is what `--track none` means.
"""

import math
from typing import Any

from shards.errors import InputError, nearest

NAMES = ("tensorboard", "wandb", "mlflow")
NONE = "none"
INSTALL = "pip install -e '.[track]', or leave it out of --track"


class Tracker:
    """Keeps what it is given. A method that fails raises; nobody calls the tracker again then."""

    name = NONE
    failure = ""  # why it records nothing any more; one that has a reason is not called again

    def known(self) -> bool:
        """Whether an earlier start of the run was recorded."""
        return False

    def start(self, config: dict[str, Any], step: int) -> str:
        """Begin to record after `step` steps, with the settings by option name. Returns where to look, or ""."""
        return ""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Values of a `train` or `val` line, all of them numbers."""

    def event(self, step: int, values: dict[str, Any]) -> None:
        """An event of the run: its name as `event`, and what is known of it."""

    def summary(self, values: dict[str, Any]) -> None:
        """The contents of summary.json."""

    def close(self, status: str) -> None:
        """End: `done`, `stopped` (the run will go on) or `failed`."""


class TrackerError(Exception):
    """A tracker cannot be used at all: a package is missing, or there are no credentials. One line."""


def parse(text: str) -> tuple[str, ...]:
    """The names in --track, without repeats. Raises InputError."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in (*NAMES, NONE):
            near = nearest(name, list(NAMES))
            raise InputError(f"--track is {text!r}; it lists {', '.join(NAMES)} with commas, or is {NONE}{near}")
    if NONE in names and len(names) > 1:
        raise InputError(f"--track is {text!r}; {NONE} stands alone")
    return tuple(name for name in names if name != NONE)


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those of `values` that are finite numbers. Trackers draw curves of them, and have no word for a missing value."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with names such as `seconds/update`."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}/")
        else:
            found[f"{before}{name}"] = value
    return found
