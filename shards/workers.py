"""Runs a function over many tasks in processes that never outlive, and never keep waiting, the one that began them.

In: a function of a module, its tasks, a number of processes. Out: (number of the task, result) as they are done.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from shards.cli import InputError

_PR_SET_PDEATHSIG = 1  # prctl(2): the signal to get when the parent ends


def available_cores() -> int:
    """Cores that this process may use: what Slurm or a container's CPU set left to it."""
    return len(os.sched_getaffinity(0))


def run_tasks(function: Callable, tasks: Sequence, workers: int) -> Iterator[tuple[int, object]]:
    """Yield (task number, function(task)) in the order in which they end; with one worker, in this process.

    Raises:
        InputError: a process was killed. What `function` raises is raised here.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(os.getpid(),))
    try:
        numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers.pop(future), future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps for its memory; run again with fewer --workers"
        ) from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # those of the pool: their shards could take minutes
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    # A worker would otherwise wait for ever for its next task once its parent was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all at once, with no traceback from each
    if os.getppid() != parent:
        os._exit(1)
