"""The reader processes of a rank: how many, started, given tasks, listened to, and replaced when they die.

In: tasks, (slot, first row, rows), whose images are to be read into the slots of the shared memory. Out: the answers of
the processes (job.batches.reader), errors of theirs as exceptions.
"""

import collections
import logging
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

from job.batches.reader import DONE, FAILED, WRONG_INPUT, pack_message, unpack_message
from shards import ROOT
from shards.errors import InputError, see
from shards.machine.cores import cores_given

# Tasks that a worker may have at once: few enough to fit into a socket's buffer for certain, so sending never blocks.
_MOST_TASKS = 64
_MESSAGE_BYTES = 1 << 15
# A worker that died is replaced, but not more often than this within so many seconds: then new ones will not help.
_RESTARTS, _RESTART_SECONDS = 5, 600.0

# Environment that would make MPI take a worker for a rank, or make it start too many threads.
_MPI_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_", "HOROVOD_")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

log = logging.getLogger(__name__)

# More readers than this never helped: at 3,000 images/s each they feed several GPUs, and each costs 60 MB.
_MOST_WORKERS = 32

Task = tuple[int, int, int]  # slot, first row, rows


class _Worker:
    """A reader process, the socket to it, and the tasks that it has not answered yet.

    Args:
        memory: descriptor of the shared memory.
        sizes: of the memory in bytes, and of the reader's settings at its end.
    """

    def __init__(self, memory: int, sizes: tuple[int, int]):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_MPI_VARIABLES)}
        environment.update({name: "1" for name in _ONE_THREAD})
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        # A process of its own program, neither forked from this one nor running its main module again: MPI's and
        # CUDA's threads and locks stay here. -P: no module of the working directory is imported by accident.
        command = [sys.executable, "-P", "-m", "job.batches.reader", *map(str, (theirs.fileno(), memory, *sizes))]
        with theirs:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), memory)
            )
        self.socket = ours
        self.tasks: collections.deque[Task] = collections.deque()

    @property
    def rows(self) -> int:
        """Images that it has still to read."""
        return sum(count for _, _, count in self.tasks)


class Workers:
    """The reader processes of a rank.

    Args:
        count: how many; 0: none, and `todo` is left to the caller.
        memory, sizes: as of `_Worker`.
        rank: of this process, for messages.
        name: how to call the image of a slot's row in a message.

    Attributes:
        todo: tasks that no worker has yet, in the order in which they are needed.
    """

    def __init__(self, count: int, memory: int, sizes: tuple[int, int], rank: int, name: Callable[[int, int], str]):
        self._memory, self._sizes, self._rank, self._name = memory, sizes, rank, name
        self.todo: collections.deque[Task] = collections.deque()
        self._restarts: collections.deque[float] = collections.deque(maxlen=_RESTARTS)
        self._workers: list[_Worker] = []
        self._poll = select.poll()
        self._by_descriptor: dict[int, _Worker] = {}
        self.close = weakref.finalize(self, _end, self._workers)  # also when this object is forgotten
        for _ in range(count):
            self._start()

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [worker.process.pid for worker in self._workers]

    @property
    def busy(self) -> bool:
        """Whether a worker has a task that it has not answered."""
        return any(worker.tasks for worker in self._workers)

    def give_tasks(self) -> None:
        """Hand tasks to the workers, the least busy first."""
        while self.todo and self._workers:
            worker = min(self._workers, key=lambda w: w.rows)
            if len(worker.tasks) >= _MOST_TASKS:
                break
            worker.tasks.append(self.todo.popleft())
            try:
                worker.socket.sendall(pack_message(DONE, *worker.tasks[-1]))
            except OSError:
                pass  # it has died: `answers` finds its socket closed, and gives its tasks to another

    def answers(self, seconds: float) -> list[tuple[int, int, int, int, str]]:
        """The answers that have come, as of reader.unpack_message: BAD or DONE. Waits for one up to `seconds`.

        Raises:
            InputError: a shard that cannot be read.
            RuntimeError: an error in a worker, or workers that keep dying.
        """
        found = []
        for descriptor, _ in self._poll.poll(seconds * 1000):
            worker = self._by_descriptor[descriptor]
            try:
                message = worker.socket.recv(_MESSAGE_BYTES)
            except ConnectionResetError:
                continue  # it died with tasks unread; its last answers can still be read
            if not message:
                self._replace(worker)
                continue
            what, slot, first, count, text = answer = unpack_message(message)
            if what == WRONG_INPUT:
                raise InputError(text, everywhere=False)
            if what == FAILED:
                raise RuntimeError(f"a reader process of rank {self._rank} failed:\n{text}")
            if what == DONE:
                worker.tasks.remove((slot, first, count))
            found.append(answer)
        return found

    def at_work(self) -> str:
        """Which images the workers are reading, for a message."""
        busy = [f"a reader is at {self._first_of(w.tasks)}" for w in self._workers if w.tasks]
        return "; ".join(busy[:3]) + (f"; and {len(busy) - 3} other readers" if len(busy) > 3 else "")

    def _first_of(self, tasks: collections.deque[Task]) -> str:
        return self._name(*tasks[0][:2]) if tasks else "no task"

    def _start(self) -> None:
        worker = _Worker(self._memory, self._sizes)
        self._workers.append(worker)
        self._by_descriptor[worker.socket.fileno()] = worker
        self._poll.register(worker.socket, select.POLLIN)

    def _replace(self, worker: _Worker) -> None:
        """Start a worker in place of one that died, and put its unanswered tasks first.

        Whoever gets them writes the same pixels to the same rows again, so nothing is lost and nothing comes twice.
        """
        _end([worker])
        self._poll.unregister(worker.socket)
        del self._by_descriptor[worker.socket.fileno()]
        worker.socket.close()
        self._workers.remove(worker)
        code = worker.process.returncode
        ended = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        now = time.monotonic()
        if len(self._restarts) == _RESTARTS and now - self._restarts[0] < _RESTART_SECONDS:
            raise RuntimeError(
                f"reader processes of rank {self._rank} keep ending ({ended}), {_RESTARTS + 1} in "
                f"{now - self._restarts[0]:.0f} s, the last at {self._first_of(worker.tasks)}; signal 9 "
                f"mostly means that memory ran out: use fewer --workers or ask Slurm for more --mem "
                f"{see('memory')}"
            )
        self._restarts.append(now)
        log.warning("rank %d: a reader process ended (%s); a new one does its work again", self._rank, ended)
        self.todo.extendleft(reversed(worker.tasks))
        self._start()
        self.give_tasks()


def _end(workers: list[_Worker]) -> None:
    """Kill workers: they have nothing to lose, and a kill also ends one that waits for a slow file system."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        try:
            worker.process.wait(5)
        except subprocess.TimeoutExpired:
            log.warning("reader process %d hangs in the file system and cannot be ended yet", worker.process.pid)


def default_workers() -> int:
    """Reader processes of a rank: one per core, keeping one core for the training thread; at least one."""
    return max(1, min(cores_given().count - 1, _MOST_WORKERS))


def worker_cores(workers: int) -> tuple[int, ...]:
    """Cores on which the readers should run, so that the training thread has one for itself; empty: anywhere.

    Only where the rank has a core of its own for each of them: otherwise pinning costs more than it gains.
    """
    mask = cores_given().mask
    return mask[1:] if workers and len(mask) > max(workers, 2) else ()
