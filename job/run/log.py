"""The records of a run: files in the run directory, what trackers get, and rank 0's lines on the terminal.

In: values of steps and validations. Out: metrics.jsonl, config.yaml, summary.json, a line of progress, and calls of the
trackers of `--track` (job.tracking).
"""

import contextlib
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from job.tracking import tracker as tracking
from job.tracking.apart import Apart
from job.tracking.to_tensorboard import TensorBoard
from job.tracking.tracker import Tracker, TrackerError
from job.usage import JOULES
from shards.command import drop_output
from shards.errors import InputError
from shards.machine.files import write_whole
from shards.machine.lock import hold
from shards.machine.progress import Line

# Sections of a training step, as timings.json and summary.json name them. Together they are the whole of a step.
WAIT, TO_DEVICE = "waiting for data", "host to device"
COMPUTE, EXPOSED, UPDATE, REST = "forward and backward", "allreduce, not hidden", "update", "rest"
SECTIONS = (WAIT, TO_DEVICE, COMPUTE, EXPOSED, UPDATE, REST)

# Seconds between two warnings that metrics cannot be written.
WARN_SECONDS = 30.0

_locks: dict[str, TextIO] = {}  # folders that this process holds


def lock(folder: str, instead: str) -> None:
    """Hold a folder until this process ends. Raises InputError and OSError as shards.machine.lock.hold does."""
    path = os.path.abspath(os.path.join(folder, ".lock"))
    if path not in _locks:  # in elastic training a process opens its run again
        _locks[path] = hold(path, folder, instead)


class RunLog:
    """Rank 0's record of a run. On other ranks every method does nothing.

    A full disk does not end training: a file that could not be written is reported on stderr and counted in `failures`.
    Nor does a tracker: one that fails is reported once, and then off.

    Attributes:
        joules: after `open`, `gpu_joules` and `cpu_joules` of earlier starts of the run; None: not measured.
    """

    def __init__(self, out: str, active: bool):
        self.out = out
        self.active = active
        self.line = Line(sys.stdout)
        self.failures = 0
        self._warned = -WARN_SECONDS
        self._trackers: list[Tracker] = []
        self.joules: dict[str, float | None] = dict.fromkeys(JOULES, 0.0)
        if not active:
            return
        try:
            os.makedirs(os.path.join(out, "checkpoints"), exist_ok=True)
            lock(out, "--out")
        except OSError as error:
            raise InputError(f"cannot write the run directory {out}: {error.strerror}; choose another --out") from None

    def path(self, name: str) -> str:
        """Path of a file of the run directory."""
        return os.path.join(self.out, name)

    def open(self, step: int, track: str = tracking.NONE, config: dict[str, Any] | None = None) -> None:
        """Begin to write after `step` steps. Drop the lines past `step` that an earlier attempt wrote.

        Args:
            track: names of trackers, as `--track` has them.
            config: the settings of the run by option name, for the trackers.

        Raises:
            InputError: a tracker that the run has not used so far does not start.
        """
        if not self.active:
            return
        lines = []
        if os.path.exists(self.path("metrics.jsonl")):
            with open(self.path("metrics.jsonl"), encoding="utf-8") as file:
                lines = file.readlines()
        self.joules = _joules(lines)
        for name in tracking.parse(track):
            self._start(TensorBoard(self.out) if name == "tensorboard" else Apart(name, self.out), config or {}, step)
        kept = "".join(line for line in lines if _belongs(line, step))
        self.attempt("metrics.jsonl", lambda: write_whole(self.path("metrics.jsonl"), kept.encode()))

    def _start(self, tracker: Tracker, config: dict[str, Any], step: int) -> None:
        try:
            where = tracker.start(config, step)
        except TrackerError as error:
            if not tracker.known():
                self.close()
                raise InputError(str(error)) from None
            self.warn(f"{error}; training goes on without {tracker.name}")  # a run under way does not end for it
            return
        self._trackers.append(tracker)
        if where:
            self.say(f"{tracker.name}: {where}")

    def write(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """One line of metrics.jsonl. Trackers get the numbers of `train` and `val` lines, and whole events."""
        if not self.active:
            return
        self.attempt("metrics.jsonl", lambda: append_line(self.path("metrics.jsonl"), kind, step, epoch, **values))
        if kind == "event":
            self._track(lambda tracker: tracker.event(step, values))
        else:
            found = tracking.numbers(values)
            self._track(lambda tracker: tracker.write(kind, step, found))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """Call each tracker. One that fails is reported, and off."""
        for tracker in list(self._trackers):
            try:
                # TensorBoard's files are those of the run: what cannot be written there counts, and is tried again.
                self.attempt(tracker.name, functools.partial(call, tracker))
                why = tracker.failure
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            if why:
                self._trackers.remove(tracker)
                self.warn(f"{tracker.name} is off from here on: {why}; training goes on")

    def hang(self, step: int, epoch: int, reason: str) -> None:
        """Record that the ranks made no progress. Any rank may call it: rank 0 may be the one that hangs."""
        with contextlib.suppress(OSError):  # it has been reported on stderr
            append_line(self.path("metrics.jsonl"), "event", step, epoch, event="hang", reason=reason)

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write a file of the run. A failure is reported, at most every WARN_SECONDS, and does not end the run."""
        try:
            write()
        except OSError as error:
            self.failures += 1
            if time.monotonic() - self._warned >= WARN_SECONDS:
                self._warned = time.monotonic()
                self.warn(f"{what} of {self.out} cannot be written: {error}; training goes on")

    def say(self, text: str) -> None:
        """A line on stdout."""
        self._print(lambda: (self.line.clear(), print(text, flush=True)))

    def warn(self, text: str) -> None:
        """A line on stderr."""
        self._print(lambda: (self.line.clear(), print(f"warning: {text}", file=sys.stderr, flush=True)))

    def progress(self, text: str) -> None:
        """Show the progress: on a terminal in a line that is rewritten, else in a new line."""
        self._print(lambda: self.line.show(text))

    def _print(self, write: Callable[[], Any]) -> None:
        if self.active:
            try:
                write()
            except OSError:  # the reader has gone (`| head`), or its disk is full: training goes on silently
                drop_output()

    def close(self, status: str = "failed") -> None:
        """Clear the line on the terminal, and end the trackers: the run is `done`, `stopped` or has `failed`."""
        if self.active:
            self._print(self.line.clear)
            self._track(lambda tracker: tracker.close(status))
            self._trackers = []

    def summary(self, values: dict[str, Any]) -> None:
        """Write summary.json, and give it to the trackers."""
        if self.active:
            text = json.dumps(values, indent=1) + "\n"
            self.attempt("summary.json", lambda: write_whole(self.path("summary.json"), text.encode()))
            self._track(lambda tracker: tracker.summary(values))

    def timings(self, values: dict[str, Any]) -> None:
        """Write timings.json, which scaling studies read: sections of a step on every rank, and the environment."""
        if self.active:
            text = json.dumps(values) + "\n"
            self.attempt("timings.json", lambda: write_whole(self.path("timings.json"), text.encode()))


def append_line(path: str, kind: str, step: int, epoch: int, **values: Any) -> None:
    """Append a line of metrics, completely or not at all. Raises OSError."""
    # JSON has no NaN: a value that is not finite becomes null.
    clean = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in values.items()}
    line = json.dumps({"kind": kind, "step": step, "epoch": epoch, "time": round(time.time(), 3), **clean}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before, data = os.fstat(descriptor).st_size, line.encode()
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError("no space left for a line")
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def write_textfile(path: str, values: dict[str, float], out: str) -> None:
    """Write `values` as gauges for the textfile collector of Prometheus' node_exporter, all of them or none."""
    values = tracking.numbers(values)
    label = re.sub(r'([\\"])', r"\\\1", out).replace("\n", "\\n")
    lines = []
    for name, value in {**values, "time_seconds": time.time()}.items():
        lines += [f"# TYPE alexnet_train_{name} gauge", f'alexnet_train_{name}{{run="{label}"}} {float(value):.17g}']
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(f"{path}.tmp", path)


def _joules(lines: list[str]) -> dict[str, float | None]:
    """Energy of a run so far: of the last line that has it, also if that is of a step which is made again."""
    found, steps = None, False
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):
            fields = json.loads(line)
            found = {name: fields[name] for name in JOULES} if fields.keys() >= set(JOULES) else found
            steps = steps or fields.get("kind") == "train"
    # Earlier versions measured no energy: what the run drew under them is not known.
    return found or dict.fromkeys(JOULES, None if steps else 0.0)


def _belongs(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is complete and an event, or of the first `step` steps."""
    try:
        fields = json.loads(line)
        return fields["kind"] == "event" or fields["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # the last line of a run that was killed while it wrote
