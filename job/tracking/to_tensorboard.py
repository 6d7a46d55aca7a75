"""TensorBoard: event files in the run directory, which `tensorboard --logdir runs` shows.

In: records of a run. Out: files in RUN/tensorboard. It runs within rank 0, as it only writes to local files.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from job.tracking.tracker import Tracker


class TensorBoard(Tracker):
    """Writes through torch.utils.tensorboard. Raises OSError where that cannot write, and may be called again then."""

    name = "tensorboard"

    def __init__(self, out: str):
        self._folder = os.path.join(out, "tensorboard")
        self._open: Callable[[], Any] | None = None
        self._writer = None

    def start(self, config: dict[str, Any], step: int) -> str:
        """The file is opened by the first value."""
        from torch.utils.tensorboard import SummaryWriter

        # Steps are counted from 1 there: the values after `step` steps stay.
        self._open = lambda: SummaryWriter(self._folder, purge_step=step + 1, flush_secs=10)
        self._settings = _table(config)
        return ""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Scalars `train/loss` and so on."""
        self._with_writer(lambda writer: [writer.add_scalar(f"{kind}/{n}", v, step) for n, v in values.items()])

    def event(self, step: int, values: dict[str, Any]) -> None:
        """A text."""
        self._with_writer(lambda writer: writer.add_text("event", json.dumps(values), step))

    def summary(self, values: dict[str, Any]) -> None:
        """A text."""
        self._with_writer(lambda writer: writer.add_text("summary", _table(values), values["steps"]))

    def close(self, status: str) -> None:
        """Close the file."""
        if self._writer is not None:
            self._with_writer(lambda writer: writer.close())
            self._writer = None

    def _with_writer(self, write: Callable[[Any], Any]) -> None:
        writer, self._writer = self._writer, None  # a writer that has failed once always fails
        if writer is None:
            writer = self._open()
            writer.add_text("settings", self._settings)
        write(writer)
        self._writer = writer


def _table(values: dict[str, Any]) -> str:
    """A table in Markdown, which TensorBoard shows as one."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])
