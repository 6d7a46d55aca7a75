"""Where the time of a training step goes, and its loss and top-1, read without waiting for the GPU.

In: marks at the ends of a step's sections. Out: seconds per section, over all steps. On a GPU the marks are CUDA
events, recorded in the stream and read some steps later, when they have long been reached.
"""

import collections
import errno
import os
import time
from collections.abc import Callable

import torch

from job.run.log import REST, SECTIONS, TO_DEVICE, WAIT

# Steps after which a GPU has reached a mark for certain, so that reading it does not stall the stream.
LAG = 2

# Steps whose sections are kept one by one: enough for percentiles, little enough for a run of a million steps.
KEPT_STEPS = 1000


class StepTimer:
    """Seconds in each section of a step: wall time on the CPU, time of the stream on a GPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.totals: dict[str, float] = dict.fromkeys(SECTIONS, 0.0)
        self.rows: collections.deque[list[float]] = collections.deque(maxlen=KEPT_STEPS)  # seconds by SECTIONS
        self._steps: collections.deque[tuple] = collections.deque()
        self._last = None  # mark at the end of the step before; None after a pause

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, wait_seconds: float) -> None:
        """The batch is on the device. Of the time since the last step, `wait_seconds` were spent waiting for it."""
        self._steps.append((self._last, wait_seconds, [("", self._now())]))

    def mark(self, section: str) -> None:
        """The section that began at the last mark ends here."""
        self._steps[-1][2].append((section, self._now()))

    def end(self) -> None:
        """The step ends here, and the next begins."""
        self.mark(REST)
        self._last = self._steps[-1][2][-1][1]
        while len(self._steps) > LAG:
            self._add(*self._steps.popleft())

    def pause(self) -> None:
        """Count what comes before the next step (a validation, a checkpoint) as part of no step."""
        self._last = None

    def finish(self) -> dict[str, float]:
        """Totals of all steps, once training is over."""
        while self._steps:
            self._add(*self._steps.popleft())
        return dict(self.totals)

    def _seconds(self, before, after) -> float:
        if not self.cuda:
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1000

    def _add(self, last, wait: float, marks: list) -> None:
        row = dict.fromkeys(SECTIONS, 0.0)
        # A GPU may still be at work on the step before while the host waits: then the wait costs nothing.
        gap = wait if last is None else self._seconds(last, marks[0][1])
        row[WAIT] = min(wait, gap)
        row[TO_DEVICE] = gap - row[WAIT]
        for (_, before), (section, after) in zip(marks, marks[1:], strict=False):
            row[section] += self._seconds(before, after)
        self.rows.append(list(row.values()))
        for section, value in row.items():
            self.totals[section] += value


class Trace:
    """Trace of `count` steps by torch's profiler, soon after the first step, in the format of chrome://tracing.

    Args:
        attempt: calls the function that writes the file, and reports its OSError; see RunLog.attempt.
    """

    SKIP = 3  # first steps of a process are unlike the others

    def __init__(self, path: str, first_step: int, count: int, attempt: Callable[[str, Callable[[], None]], None]):
        self._path, self._attempt = path, attempt
        self._start = first_step + self.SKIP
        self._stop = self._start + count
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call it before each step."""
        if step == self._start < self._stop:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif step == self._stop:
            self.close()

    def close(self) -> None:
        """Write the trace, if that has not happened yet."""
        if self._profiler is not None:
            self._profiler.stop()
            self._attempt(os.path.basename(self._path), self._write)
            self._profiler = None

    def _write(self) -> None:
        self._profiler.export_chrome_trace(self._path)
        # The profiler does not report a file that it could not write, or only in part.
        with open(self._path, "rb") as file:
            file.seek(-min(64, os.fstat(file.fileno()).st_size), os.SEEK_END)
            if not file.read().rstrip().endswith(b"}"):
                raise OSError(errno.EIO, "written in part")


class LateLoss:
    """Loss and top-1 of each step, read `lag` steps late on a GPU so that the host never waits, at once on the CPU."""

    def __init__(self, device: torch.device):
        self.lag = LAG if device.type == "cuda" else 0
        self._pending: collections.deque = collections.deque()

    def exchange(self, loss: torch.Tensor, right: torch.Tensor) -> list[tuple[float, float]]:
        """Hand in this step's loss and top-1, scalars; get the pairs that are ready now: none, or the one of `lag`
        steps ago."""
        if not self.lag:
            return [(loss.item(), right.item())]
        host = torch.empty(2, pin_memory=True)
        host[0].copy_(loss.detach(), non_blocking=True)
        host[1].copy_(right, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))
        values = []
        while len(self._pending) > self.lag:
            host, event = self._pending.popleft()
            event.synchronize()
            values.append(tuple(host.tolist()))
        return values
