"""Runs a function over many tasks in processes that never outlive, and never keep waiting, the one that began them.

In: a function of a module, its tasks, a number of processes. Out: (number of the task, result) as they are done.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from shards.errors import InputError


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
    # Not the start method of this Python or of the caller: fork starts all workers at once, before the pool watches
    # them, and none has to import its modules again.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_begin)
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


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all at once, with no traceback from each
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    # A worker would otherwise wait for ever for its next task once its caller was killed.
    multiprocessing.parent_process().join()
    os._exit(1)
