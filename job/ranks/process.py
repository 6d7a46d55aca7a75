"""This process among the ranks: small numbers that they share, how it is stopped, and how it ends.

In: a main function for every rank. Out: averages over the ranks that nobody waits for, and the job's exit code.
"""

import contextlib
import functools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from shards.command import drop_output
from shards.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_STOPPED, NOT_INSTALLED, InputError, see
from shards.machine.launcher import launched_rank, lone_process
from shards.machine.progress import on_terminal

try:
    import horovod.torch as hvd
    import torch
    from horovod.common.exceptions import HorovodInternalError

    from job.ranks import heartbeat
except ModuleNotFoundError as error:
    raise InputError(NOT_INSTALLED.format(error.name, sys.executable)) from None
except ImportError as error:
    reason = str(error).splitlines()[0]
    raise InputError(
        f"cannot load Horovod and torch ({reason}); bash slurm/install.sh sets them up {see('horovod')}"
    ) from None

# Seconds that a rank which lost the others waits for its launcher to end it, before it reports an error itself.
LAUNCHER_GRACE = 15
# It is silent for the first of these: mostly the launcher acts at once.
QUIET_SECONDS = 2


class Stopped(Exception):
    """Training was asked to stop; the checkpoint is written."""


class Failed(Exception):
    """The run cannot continue, or could not write all of its files. All ranks raise it; rank 0 prints the message."""


class StepReports:
    """A few numbers of every step, averaged over the ranks one step late, so that no rank waits for them.

    All ranks see the same averages, so they take the same decision (to stop, to give up).
    """

    def __init__(self) -> None:
        self._handle: int | None = None
        self._tag: Any = None

    def exchange(self, tag: Any, values: list[float]) -> tuple[Any, list[float]] | None:
        """Send this step's `values` without waiting. Returns (tag, averages) of the step before; None at the first."""
        before = self.collect()
        self._tag = tag
        report = torch.tensor(values, dtype=torch.float64)
        self._handle = hvd.allreduce_async_(report, name="step_report", op=hvd.Average)
        return before

    def collect(self) -> tuple[Any, list[float]] | None:
        """Wait for the report that is still on its way. Returns (tag, averages), or None where there is none."""
        if self._handle is None:
            return None
        average = hvd.synchronize(self._handle).tolist()
        self._handle = None
        return self._tag, average


class StopSignals:
    """SIGUSR1, SIGTERM and SIGINT end this process at once; while it trains, they ask for a checkpoint and an orderly
    end, and a second request ends it at once. Rank 0 answers on stderr.

    A thread of its own receives them: the main thread may be in a call that waits for other ranks.

    Attributes:
        orderly: the first request only sets `requested`, and training reads that.
        requested: name of the signal that asked first, or "".
    """

    # One scancel reaches a rank as several signals, from Slurm, the launcher and the batch script.
    SAME_REQUEST_SECONDS = 2.0

    def __init__(self) -> None:
        self.requested, self.orderly = "", False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    def _listen(self, reading: int) -> None:
        since = 0.0
        while True:
            number = os.read(reading, 1)[0]
            if number not in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                continue
            name = signal.Signals(number).name
            if self.orderly and not self.requested:
                self.requested, since = name, time.monotonic()
                self._answer(
                    number, f"{name}: stopping after this step, with a checkpoint; a second request ends at once"
                )
            elif time.monotonic() - since > self.SAME_REQUEST_SECONDS:
                self._answer(number, f"{name}: ending at once")
                # horovodrun hands on Ctrl-C as SIGUSR1.
                leave(EXIT_INTERRUPTED if number != signal.SIGTERM else 128 + number)

    @staticmethod
    def _answer(number: int, text: str) -> None:
        # A launcher also sends SIGTERM when another rank has failed: then that rank's error must be seen, not this.
        if launched_rank() == 0 and not (heartbeat.LAUNCHED and number == signal.SIGTERM):
            start = "\r\033[K" if on_terminal(sys.stdout) else ""  # over the line of progress, and the ^C
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), f"{start}{text}\n".encode())


@functools.cache
def stop_signals() -> StopSignals:
    """The one instance of this process."""
    return StopSignals()


def run_ranks(main: Callable[[], None]) -> NoReturn:
    """Initialise Horovod, run `main` on every rank and leave with the job's exit code; no rank outlives a failed one.

    An error is reported once: by rank 0 when all ranks meet it, else by the rank that met it, with its rank and host.
    """
    stop_signals()
    if not heartbeat.ELASTIC:  # elastic training must learn from the device that a message has failed
        # The GPU's stream waits for messages, not the host. Otherwise work that follows an allreduce is launched only
        # when that is over, and the next batch is copied later still (job/fast/README.md).
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
    hvd.init()
    if not heartbeat.ELASTIC and (problem := lone_process(hvd.size(), "Horovod")):
        raise InputError(problem)
    where = f"rank {hvd.rank()} on {socket.gethostname()}"
    logging.basicConfig(
        format=f"%(levelname)s: {where}: %(message)s" if hvd.size() > 1 else "%(levelname)s: %(message)s"
    )
    logging.addLevelName(logging.WARNING, "warning")
    try:
        heartbeat.start()
        main()
        code = 0
    except Stopped:
        code = EXIT_STOPPED
    except InputError as error:
        if error.everywhere and hvd.rank() > 0:
            _await_end()  # rank 0 says it
            if heartbeat.first_ended.is_set():  # it has, under a launcher that lets the others go on
                leave(EXIT_BAD_INPUT)
        alone = hvd.size() == 1 or error.everywhere and hvd.rank() == 0
        print(f"error: {error}" if alone else f"error: {where}: {error}", file=sys.stderr)
        leave(error.exit_code)
    except Failed as error:
        if hvd.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        code = 1
    except HorovodInternalError as error:
        _await_end(where)  # another rank has failed and speaks for itself
        reason = heartbeat.lost(f"{where} lost the other ranks: {str(error).splitlines()[0][:200]}")
        print(f"error: {reason}; run the same command again {_row_of(str(error))}", file=sys.stderr)
        leave(1)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        drop_output()
        leave(1)
    except BaseException:
        text = traceback.format_exc()
        print(f"error: {where} failed:\n{text}" if hvd.size() > 1 else text, file=sys.stderr)
        leave(1)
    # All ranks get here together; the launcher would take one that left early for a failure.
    hvd.shutdown()
    sys.stdout.flush()
    sys.exit(code)


def _row_of(error: str) -> str:
    """The reference to the doctor's row that explains an error of Horovod."""
    if re.search("/dev/shm|shared memory", error):
        return see("shm")
    return see("nccl") if re.search("nccl", error, re.IGNORECASE) else see("allreduce")


def _await_end(where: str = "") -> None:
    """Give another rank time to say why the job ends, and the launcher time to end this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(QUIET_SECONDS)
    if where:
        left = LAUNCHER_GRACE - QUIET_SECONDS
        print(
            f"{where} lost the other ranks; waiting up to {left} s for one that knows why", file=sys.stderr, flush=True
        )
    time.sleep(LAUNCHER_GRACE - QUIET_SECONDS)


def leave(code: int) -> NoReturn:
    """End this process at once, without waiting for the other ranks; the launcher then ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
