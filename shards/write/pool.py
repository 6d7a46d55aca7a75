"""Hands out shards to packing processes as they become free: processes of this machine, or the ranks of an MPI job.

In: packings and the shards still to be packed. Out: their records, as they are finished. An error in one process stops
all of them within a second, and they remove what they had begun. (concurrent.futures and mpi4py.futures can neither
stop a task that runs nor say how far it is.)
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from shards.errors import InputError, see
from shards.machine.launcher import lone_process
from shards.write.shard import Packer, Packing, ShardId, ShardRecord

_REPORT_SECONDS = 0.5  # between two reports of a worker
_STOP_SECONDS = 30.0  # within which a worker that was told to stop must have done so
_POLL_SECONDS = 0.01  # between two looks at MPI, which can only wait by spinning
_STOP = "stop"  # sent to a worker in place of a shard
_TO_ROOT, _TO_WORKER = 1, 2  # MPI tags
# Set by mpirun, mpiexec, srun --mpi.
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE", "PMI_RANK")


class WorkerError(Exception):
    """A packing process failed, and not because of its input. The text is its traceback, or how it ended."""


class _Stopped(Exception):
    """This worker was told to stop."""


def pack_all(
    packings: list[Packing],
    shards: list[ShardId],
    workers: int,
    comm,
    on_progress: Callable[[int], None],
    on_record: Callable[[ShardId, ShardRecord], None],
) -> None:
    """Pack all shards with `workers` processes or, where `comm` is given, with all its ranks (this is rank 0).

    `on_progress(images)` and `on_record(shard, record)` are called in this process and may raise.

    Raises:
        InputError, WorkerError: that of the first process that failed, after all have been told to stop.
    """
    workers = min(workers, len(shards))
    if comm is None and workers == 1:
        with contextlib.closing(Packer(packings)) as packer:
            for shard in shards:
                on_record(shard, packer.pack(*shard, on_progress))
        return
    queue = list(reversed(shards))
    with _Workers(packings, workers if comm is None else 1, comm) as pool:
        while pool.busy or queue:
            worker, (kind, *content) = pool.receive()
            if kind == "progress":
                on_progress(content[0])
            elif kind == "failed":
                code, text = content
                pool.busy.discard(worker)
                raise InputError(text) if code == 2 else WorkerError(text)
            else:  # "free", with what it has done
                if content:
                    on_record(*content)
                pool.send(worker, queue.pop() if queue else None)


class _Workers:
    """The workers, seen from the coordinator: local ones are numbered from 0, MPI ranks by -rank. A context manager.

    A worker sends ("free",) at its start, ("free", shard, record), ("progress", images), ("failed", exit code, text)
    and, when it was told to stop, ("ended",). It is sent shards, None when there are no more, and _STOP.
    """

    def __init__(self, packings: list[Packing], count: int, comm):
        self._packings, self._count, self._comm = packings, count, comm
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []  # to the local workers, by their numbers
        self._open: dict[Connection, int] = {}  # those of workers that have not ended, and their numbers
        self.busy: set[int] = set()

    def __enter__(self) -> "_Workers":
        if self._comm:
            self._comm.bcast(self._packings)
            self.busy.update(-rank for rank in range(1, self._comm.size))
        try:
            self._start()
        except BaseException:  # the ranks already wait for shards
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
            process = context.Process(target=_local_worker, args=(theirs, self._packings, os.getpid()))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._open[ours] = number
            self.busy.add(number)

    def receive(self) -> tuple[int, tuple]:
        """The next message of any worker, and its number."""
        while True:
            if self._comm and self._comm.iprobe(tag=_TO_ROOT):
                from mpi4py import MPI

                status = MPI.Status()
                message = self._comm.recv(tag=_TO_ROOT, status=status)
                return -status.source, message
            ready = multiprocessing.connection.wait(self._open, _POLL_SECONDS if self._comm else None)
            if ready:
                number = self._open[ready[0]]
                try:
                    return number, ready[0].recv()
                except (EOFError, ConnectionError):
                    self._processes[number].join(10)
                    raise WorkerError(_how_it_ended(self._processes[number])) from None

    def send(self, worker: int, shard: ShardId | None) -> None:
        """Send the next shard to a worker; None: there are no more, it ends."""
        if worker < 0:
            self._comm.send(shard, dest=-worker, tag=_TO_WORKER)
        else:
            try:
                self._pipes[worker].send(shard)
            except OSError:
                raise WorkerError(_how_it_ended(self._processes[worker])) from None
            if shard is None:
                del self._open[self._pipes[worker]]
        if shard is None:
            self.busy.discard(worker)

    def __exit__(self, kind, error, trace) -> None:
        """After an error: stop all workers, and wait until they have removed what they had begun."""
        for worker in self.busy:
            try:
                if worker < 0:
                    self._comm.send(_STOP, dest=-worker, tag=_TO_WORKER)
                else:
                    self._pipes[worker].send(_STOP)
            except OSError:
                pass  # it has ended already
        self._drain_ranks()
        for worker, process in enumerate(self._processes):
            self._drain(worker)
            process.join(_STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            self._pipes[worker].close()

    def _drain_ranks(self) -> None:
        """Receive what stopped ranks still send: MPI_Finalize would wait for ever for one that cannot send it."""
        ranks = {worker for worker in self.busy if worker < 0}
        deadline = time.monotonic() + _STOP_SECONDS
        while ranks:
            if self._comm.iprobe(tag=_TO_ROOT):
                worker, (kind, *_) = self.receive()
                if kind in ("ended", "failed"):
                    ranks.discard(worker)
            elif time.monotonic() > deadline:  # it hangs in a file system
                print(f"error: {len(ranks)} ranks do not stop; ending the job", file=sys.stderr, flush=True)
                self._comm.Abort(1)
            else:
                time.sleep(_POLL_SECONDS)

    def _drain(self, worker: int) -> None:
        """Receive what a stopped local worker still sends, so that it does not wait for us."""
        deadline = time.monotonic() + _STOP_SECONDS
        with contextlib.suppress(EOFError, OSError):  # it has ended
            while worker in self.busy and time.monotonic() < deadline:
                if self._pipes[worker].poll(1):
                    self._pipes[worker].recv()


def _how_it_ended(process: multiprocessing.Process) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        hint = f"; out of memory? {see('memory')}" if -code == signal.SIGKILL else ""
        return f"a packing process was ended by {signal.Signals(-code).name}{hint}"
    return f"a packing process ended with code {code}"


def _local_worker(pipe: Connection, packings: list[Packing], parent: int) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the coordinator, which stops us
    # Where the coordinator is gone, there is nobody to report to.
    with contextlib.closing(pipe), contextlib.suppress(EOFError, OSError):
        _serve(packings, pipe.send, pipe.recv, lambda: not _alive(parent) or pipe.poll())


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def serve_rank(comm, packings: list[Packing]) -> None:
    """Main loop of an MPI rank other than 0."""
    place = f"rank {comm.rank} on {os.uname().nodename}"

    def send(message: tuple) -> None:
        if message[0] == "failed":
            message = (*message[:2], f"{place}: {message[2]}")
        comm.send(message, dest=0, tag=_TO_ROOT)

    _serve(packings, send, lambda: comm.recv(source=0, tag=_TO_WORKER), lambda: comm.iprobe(source=0, tag=_TO_WORKER))


def _serve(packings: list[Packing], send: Callable, receive: Callable, waits: Callable[[], bool]) -> None:
    """Pack what the coordinator hands out. `waits`: whether a message waits, which can only be _STOP during a shard."""
    done, reported = 0, time.monotonic()

    def tick(count: int) -> None:
        nonlocal done, reported
        done += count
        now = time.monotonic()
        if now - reported >= _REPORT_SECONDS:
            if waits():
                raise _Stopped
            send(("progress", done))
            done, reported = 0, now

    try:
        with contextlib.closing(Packer(packings)) as packer:
            send(("free",))
            while (shard := receive()) is not None:
                if shard == _STOP:
                    raise _Stopped
                record = packer.pack(*shard, tick)
                send(("progress", done))
                done = 0
                send(("free", shard, record))
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
            f"with --workers N {see('mpi4py')}"
        ) from None
    if MPI.COMM_WORLD.size == 1:
        if several:
            raise InputError(several)
        return None
    if workers_given:
        raise InputError("--workers is for one process; under mpirun the number of ranks says how many pack (-np N)")
    return MPI.COMM_WORLD
