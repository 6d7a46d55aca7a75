"""The record of a run: its settings, its metrics, its summary.

In: a run directory, which is only read. Out: `Run`.
"""

import dataclasses
import os
from typing import Any

from job import config
from job.watch import read

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, as its directory tells of it. `pandas.DataFrame(run.train)` is a table of its steps."""

    path: str
    settings: dict[str, Any]  # by option name: settings["optim.lr"]; empty where config.yaml is missing
    metrics: list[Line]  # lines of metrics.jsonl, without those that a later start has undone
    summary: dict[str, Any]  # summary.json; empty before the end

    @property
    def train(self) -> list[Line]:
        """Lines of training steps: step, epoch, time, loss, lr, images_per_second, ..."""
        return self.of("train")

    @property
    def val(self) -> list[Line]:
        """Lines of validations: step, epoch, time, top1, top5, loss."""
        return self.of("val")

    @property
    def events(self) -> list[Line]:
        """Lines of starts, stops, hangs and the end."""
        return self.of("event")

    def of(self, kind: str) -> list[Line]:
        """Lines of one kind."""
        return [line for line in self.metrics if line["kind"] == kind]


def load_run(path: str) -> Run:
    """See `job.load_run`."""
    lines, summary, _ = read(path)
    file = os.path.join(path, "config.yaml")
    settings = config.read_flat(file) if os.path.exists(file) else {}
    return Run(os.path.abspath(path), settings, lines, summary)
