"""Runs a function over many tasks in several processes, which end with the process that started them.

In: a function of a module, its tasks, a number of processes. Out: (number of the task, result) as they are done.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from shards.errors import InputError, see


def run_tasks(function: Callable, tasks: Sequence, workers: int) -> Iterator[tuple[int, object]]:
    """Yield (task number, function(task)) in the order in which they end; with one worker, in this process.

    Raises:
        InputError: a process was killed. Errors of `function` are raised here.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    # Always fork: it starts all workers before the pool has threads, and none has to import its modules again.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_begin)
    try:
        numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers.pop(future), future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps for its memory; run again with fewer --workers " + see("memory")
        ) from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # those of the pool: their tasks could take minutes
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    # Otherwise a worker would wait for its next task for ever if its caller was killed.
    multiprocessing.parent_process().join()
    os._exit(1)
