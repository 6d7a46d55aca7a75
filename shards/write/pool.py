"""Hands out shards to packing processes as they become free: processes of this machine, or the ranks of an MPI job.

In: jobs and the list of shards still to be packed. Out: their records, as they are finished. An error in one process
stops all of them.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from shards.errors import InputError
from shards.machine.launcher import lone_process
from shards.write.shard import Job, Packer

Task = tuple[int, int]  # number of the job, number of the shard
_REPORT_SECONDS = 0.5  # between two reports of a worker
_STOP_SECONDS = 30.0  # in which a worker that was told to stop must have done so
_POLL_SECONDS = 0.01  # between two looks at MPI, which has no waiting without spinning
# Set by mpirun, mpiexec, srun --mpi.
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE", "PMI_RANK")


class WorkerError(Exception):
    """A packing process failed by no fault of the user; the text is its traceback, or how it ended."""


class _Stopped(Exception):
    """The coordinator asked this worker to end."""


def pack_all(
    jobs: list[Job],
    tasks: list[Task],
    workers: int,
    comm,
    on_progress: Callable[[int], None],
    on_record: Callable[[Task, dict], None],
) -> None:
    """Pack all tasks, with `workers` processes, or with the ranks of `comm` (this is rank 0 of them).

    `on_progress(images)` and `on_record(task, record)` are called in this process and may raise.

    Raises:
        InputError, WorkerError: of the first process that failed, after all have been told to stop.
    """
    workers = min(workers, len(tasks))
    if comm is None and workers == 1:
        packer = Packer(jobs)
        try:
            for task in tasks:
                on_record(task, packer.pack(*task, on_progress))
        finally:
            packer.close()
        return
    queue = list(reversed(tasks))
    with _Hands(jobs, workers if comm is None else 1, comm) as hands:
        while hands.busy or queue:
            hand, (kind, *content) = hands.receive()
            if kind == "progress":
                on_progress(content[0])
            elif kind == "failed":
                code, text = content
                hands.busy.discard(hand)
                raise InputError(text) if code == 2 else WorkerError(text)
            else:  # "free", with what it has done
                if content:
                    on_record(*content)
                hands.send(hand, queue.pop() if queue else None)


class _Hands:
    """The workers, seen from the coordinator: local ones are numbered from 0, MPI ranks by -rank. A context manager."""

    def __init__(self, jobs: list[Job], count: int, comm):
        self._jobs, self._count, self._comm = jobs, count, comm
        self._processes: list = []
        self._pipes: dict = {}  # pipe -> number
        self._numbers: list = []  # number -> pipe
        self.busy: set[int] = set()

    def __enter__(self) -> "_Hands":
        if self._comm:
            self._comm.bcast(self._jobs)
            self.busy.update(-rank for rank in range(1, self._comm.size))
        try:
            self._start()
        except BaseException:  # the ranks wait for orders already
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _start(self) -> None:
        # Not fork: MPI and threads do not survive it. The server imports the libraries once for all workers.
        context = multiprocessing.get_context("spawn" if self._comm else "forkserver")
        if not self._comm:
            context.set_forkserver_preload(["shards.write.pool", "torch", "webdataset", "PIL.Image"])
        for number in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_local_worker, args=(theirs, self._jobs, os.getpid()))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes[ours] = number
            self._numbers.append(ours)
            self.busy.add(number)

    def receive(self) -> tuple[int, tuple]:
        """Next message of any worker."""
        while True:
            if self._comm and self._comm.iprobe(tag=_TO_ROOT):
                from mpi4py import MPI

                status = MPI.Status()
                message = self._comm.recv(tag=_TO_ROOT, status=status)
                return -status.source, message
            ready = multiprocessing.connection.wait(self._pipes, _POLL_SECONDS if self._comm else None)
            if ready:
                pipe = ready[0]
                number = self._pipes[pipe]
                try:
                    return number, pipe.recv()
                except (EOFError, ConnectionError):
                    self._processes[number].join(10)
                    raise WorkerError(_how_it_ended(self._processes[number])) from None

    def send(self, hand: int, task: Task | None) -> None:
        """The next shard for a worker; None: there are no more, it ends."""
        if hand < 0:
            self._comm.send(task, dest=-hand, tag=_TO_WORKER)
        else:
            try:
                self._numbers[hand].send(task)
            except OSError:
                raise WorkerError(_how_it_ended(self._processes[hand])) from None
            if task is None:
                del self._pipes[self._numbers[hand]]
        if task is None:
            self.busy.discard(hand)

    def __exit__(self, kind, error, trace) -> None:
        """After an error: stop everyone, and wait until they have put away what they had begun."""
        for hand in self.busy:
            try:
                if hand < 0:
                    self._comm.send(_STOP, dest=-hand, tag=_TO_WORKER)
                else:
                    self._numbers[hand].send(_STOP)
            except OSError:
                pass  # it has ended already
        self._drain_ranks()
        for hand, pipe in enumerate(self._numbers):
            self._drain(hand, pipe)
            self._processes[hand].join(_STOP_SECONDS)
            if self._processes[hand].is_alive():
                self._processes[hand].kill()
                self._processes[hand].join()
            pipe.close()

    def _drain_ranks(self) -> None:
        """Take what stopped ranks still say: MPI_Finalize would wait for ever for one that cannot send it."""
        ranks = {hand for hand in self.busy if hand < 0}
        deadline = time.monotonic() + _STOP_SECONDS
        while ranks:
            if self._comm.iprobe(tag=_TO_ROOT):
                hand, (kind, *_) = self.receive()
                if kind in ("ended", "failed"):
                    ranks.discard(hand)
            elif time.monotonic() > deadline:  # it hangs in a file system
                print(f"error: {len(ranks)} ranks do not stop; ending the job", file=sys.stderr, flush=True)
                self._comm.Abort(1)
            else:
                time.sleep(_POLL_SECONDS)

    def _drain(self, hand: int, pipe) -> None:
        """Take what a stopped worker still says, so that it does not wait for us."""
        deadline = time.monotonic() + _STOP_SECONDS
        try:
            while hand in self.busy and time.monotonic() < deadline:
                if pipe.poll(1):
                    pipe.recv()
        except (EOFError, OSError):
            pass  # it has ended


_STOP = "stop"
_TO_ROOT, _TO_WORKER = 1, 2  # MPI tags


def _how_it_ended(process) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"a packing process was ended by {signal.Signals(-code).name}{hint}"
    return f"a packing process ended with code {code}"


def _local_worker(pipe, jobs: list[Job], parent: int) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the coordinator, which stops us

    def orders() -> bool:
        if not _alive(parent):
            raise _Stopped
        return pipe.poll()

    try:
        _serve(jobs, pipe.send, pipe.recv, orders)
    except (EOFError, OSError):
        pass  # the coordinator is gone: nobody to report to
    finally:
        pipe.close()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def serve_rank(comm, jobs: list[Job]) -> None:
    """Main loop of an MPI rank other than 0."""
    host = os.uname().nodename

    def send(message: tuple) -> None:
        if message[0] == "failed":
            code, text = message[1:]
            message = ("failed", code, f"rank {comm.rank} on {host}: {text}")
        comm.send(message, dest=0, tag=_TO_ROOT)

    _serve(jobs, send, lambda: comm.recv(source=0, tag=_TO_WORKER), lambda: comm.iprobe(source=0, tag=_TO_WORKER))


def _serve(jobs: list[Job], send: Callable, receive: Callable, orders: Callable[[], bool]) -> None:
    """Pack what the coordinator hands out. `orders` says whether a message waits: while packing, only "stop" can."""
    done, reported = 0, time.monotonic()

    def tick(count: int) -> None:
        nonlocal done, reported
        done += count
        now = time.monotonic()
        if now - reported >= _REPORT_SECONDS:
            if orders():
                raise _Stopped
            send(("progress", done))
            done, reported = 0, now

    try:
        packer = Packer(jobs)
        try:
            send(("free",))
            while (task := receive()) is not None and task != _STOP:
                record = packer.pack(*task, tick)
                send(("progress", done))
                done = 0
                send(("free", task, record))
            if task == _STOP:
                raise _Stopped
        finally:
            packer.close()
    except _Stopped:
        send(("ended",))
    except InputError as error:
        send(("failed", 2, str(error)))
    except Exception:
        send(("failed", 1, traceback.format_exc()))


def mpi_world(workers_given: bool):
    """The communicator of an MPI job of several ranks, or None without one.

    Raises:
        InputError: mpi4py is missing or of another MPI than the launcher, or --workers was given as well.
    """
    several = lone_process(1, "mpi4py")
    if not any(variable in os.environ for variable in _LAUNCHED):
        if several:
            raise InputError(several)
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        if not several:
            return None
        raise InputError(
            f"started as several MPI processes, but mpi4py does not work ({error}); install it, or start one process "
            "with --workers N"
        ) from None
    if MPI.COMM_WORLD.size == 1:
        if several:
            raise InputError(several)
        return None
    if workers_given:
        raise InputError("--workers is for one process; under mpirun the number of ranks says how many pack (-np N)")
    return MPI.COMM_WORLD
