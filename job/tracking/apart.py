"""A tracker that lives in a process of its own, for it may be slow, hang, print, or fail.

In: calls of `Tracker`, which return at once. Out: lines to the process `job.tracking.child`. When that fails, does not
keep up, or does not end, it is stopped, and `failure` says why.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any

from job.tracking.tracker import Tracker, TrackerError
from shards import ROOT
from shards.machine.files import write_whole

START_SECONDS = 60.0  # to load a package, reach a server, and say so
CLOSE_SECONDS = 20.0  # to upload what is left; launchers give a stopped job 30 s or more
FAILED_SECONDS = 5.0  # the same where the run has failed: the other ranks wait for rank 0 to end
WAITING = 1000  # records on their way: beyond it the tracker counts as hanging
IDS = "trackers.json"  # in the run directory: the id of the run at each tracker


class Apart(Tracker):
    """Tracker `name` in a process of its own. No method waits for it but `start` and `close`, which have limits.

    Attributes:
        failure: why it is off, or "".
    """

    def __init__(self, name: str, out: str):
        self.name, self._out, self.failure = name, out, ""
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._answers: queue.Queue[dict[str, str]] = queue.Queue()
        self._process: subprocess.Popen | None = None

    def known(self) -> bool:
        """Whether the run has been tracked before."""
        return self.name in read_ids(self._out)

    def start(self, config: dict[str, Any], step: int) -> str:
        """Start the process. Raises TrackerError: it cannot be used, or did not get ready in time."""
        known = read_ids(self._out).get(self.name, "")
        command = [sys.executable, "-m", "job.tracking.child", self.name, self._out, known]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self._process = subprocess.Popen(command, env=environment, **pipes)
        except OSError as error:
            raise TrackerError(f"cannot start a process for {self.name}: {error.strerror}") from None
        self._receiver = threading.Thread(target=self._receive, name=f"{self.name} answers", daemon=True)
        self._receiver.start()
        threading.Thread(target=self._send, name=f"{self.name} records", daemon=True).start()
        self._put("start", config, step)
        try:
            answer = self._answers.get(timeout=START_SECONDS)
        except queue.Empty:
            answer = {"failed": f"no answer within {START_SECONDS:.0f} s"}
        if "ready" not in answer:
            advice = f"see to it, or leave {self.name} out of --track"
            self._stop(answer.get("problem") or f"{self.name} does not start: {answer['failed']}; {advice}")
            raise TrackerError(self.failure)
        ids = {**read_ids(self._out), self.name: answer["id"]}
        with contextlib.suppress(OSError):  # a full disk is reported for files that matter more
            write_whole(os.path.join(self._out, IDS), (json.dumps(ids, indent=1) + "\n").encode())
        return answer["ready"]

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """As of Tracker."""
        self._put("write", kind, step, values)

    def event(self, step: int, values: dict[str, Any]) -> None:
        """As of Tracker."""
        self._put("event", step, values)

    def summary(self, values: dict[str, Any]) -> None:
        """As of Tracker."""
        self._put("summary", values)

    def close(self, status: str) -> None:
        """Wait until all is recorded, or CLOSE_SECONDS, or where the run has failed FAILED_SECONDS."""
        self._put("close", status)
        self._put_line(None)
        if self.failure:
            return
        limit = min(CLOSE_SECONDS, FAILED_SECONDS) if status == "failed" else CLOSE_SECONDS
        try:
            self._process.wait(limit)
            self._receiver.join(1)
            self._look()
        except subprocess.TimeoutExpired:
            self._stop(f"it did not end within {limit:.0f} s")

    def _put(self, method: str, *arguments: Any) -> None:
        self._look()
        self._put_line(json.dumps([method, *arguments]) + "\n")

    def _put_line(self, line: str | None) -> None:
        if self.failure:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._stop(f"it has not taken {WAITING} records that wait for it")

    def _look(self) -> None:
        """Notice that the process has failed."""
        with contextlib.suppress(queue.Empty):
            answer = self._answers.get_nowait()
            if not self.failure:
                self._stop(answer.get("problem") or answer["failed"])

    def _stop(self, why: str) -> None:
        self.failure = why
        self._process.kill()
        self._process.wait()

    # Threads of their own: writing waits when the pipe is full, reading until there is an answer.

    def _send(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._process.stdin as pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line.encode())
                pipe.flush()

    def _receive(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                self._answers.put(json.loads(line))
        if code := self._process.wait():
            self._answers.put({"failed": f"its process ended with code {code}"})


def read_ids(out: str) -> dict[str, str]:
    """The run's id at each tracker that it was ever tracked by."""
    try:
        with open(os.path.join(out, IDS), encoding="utf-8") as file:
            ids = json.load(file)
        return {str(name): str(value) for name, value in ids.items()}
    except (OSError, ValueError, AttributeError):
        return {}
