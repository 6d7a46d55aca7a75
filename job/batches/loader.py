"""Batches of a rank, read and decoded by worker processes ahead of training, in parallel with it.

In: a split, this rank's place among the ranks, a step to start from. Out: batches of uint8 crops and labels, as torch
views of a shared (on CUDA: pinned) memory. The batches depend on seed, step and world size alone, never on the workers.
"""

import collections
import dataclasses
import logging
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable

import numpy as np
import torch

from job.batches import order
from job.batches.cores import default_workers, worker_cores
from job.batches.reader import BAD, DONE, FAILED, WRONG_INPUT, Decoder, Job, Slots, pack_message, unpack_message
from shards import ROOT
from shards.errors import InputError
from shards.format.split import Split, load_labels
from shards.format.tar import BLOCK, refuse_foreign
from shards.machine.files import check_regular, is_remote
from shards.read.images import slow_decoder

# Batches read ahead of the one that is asked for, and batches that the caller may still be using: the one in hand, and
# the one before it, whose copy to the GPU may be under way.
_AHEAD = 3
_HELD = 2
_MOST_AHEAD = 32  # where batches are so small that three of them do not keep the workers busy

# Rows a task: few enough that all workers share a batch, enough that messages cost nothing.
_LEAST_ROWS, _MOST_ROWS = 8, 64
# Tasks a worker may have before it: what fits into a socket's buffer for certain, so that sending never blocks.
_MOST_TASKS = 64

_MESSAGE_BYTES = 1 << 15
# A worker that died is replaced so often within so many seconds; then something is wrong that a new one does not mend.
_RESTARTS, _RESTART_SECONDS = 5, 600.0
# Not one image from all readers for so long: a line in the log; and then an error. A shard that hangs must end the job
# within 60 s, and before the heartbeat does, at 70 s, which cannot name it. A file system that is only slow gives an
# image now and then, and whoever once needed t seconds for one is not taken to hang before 4 t.
_STALL_WARNING, _STALL_ERROR = 20.0, 50.0
_SLOW_FACTOR = 4
# Where shards are fetched from another machine: whole ones, which takes longer than that on a slow line.
_STALL_ERROR_REMOTE = 600.0

# Environment by which MPI would take a worker for a rank, or would make it one with too many threads.
_MPI_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_", "HOROVOD_")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Batch:
    """A rank's part of a step. The tensors are views of a slot: valid until the next batch is asked for.

    (Their memory is written again only when the batch after the next is asked for, so a copy of them to a GPU may
    still run while the next is fetched.)
    """

    images: torch.Tensor  # uint8 (n, crop, crop, 3)
    labels: torch.Tensor  # int64 (n,)
    offsets: torch.Tensor  # int32 (n, 2): top, left of the crop in the stored image
    mirror: torch.Tensor  # bool (n,): to be mirrored
    step: int  # training: number of the step; validation: number of the batch
    epoch: int  # of the first sample
    wait_seconds: float  # time for which the caller was blocked
    bad: int  # samples that could not be used and were replaced


@dataclasses.dataclass
class _Pending:
    """A batch that is being read."""

    number: int
    slot: int
    rows: int
    epoch: int
    left: int  # rows still to come
    bad: int = 0


class _Worker:
    """A reader process, the socket to it, and the tasks (slot, first, count) that it has not answered yet."""

    def __init__(self, memory: int, total: int, about: int):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_MPI_VARIABLES)}
        environment.update({name: "1" for name in _ONE_THREAD})
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        # A process of its own program, neither forked from this one nor running its main module again: MPI's and
        # CUDA's threads and locks stay here. -P: no module of the working directory is imported by accident.
        command = [
            sys.executable,
            "-P",
            "-m",
            "job.batches.reader",
            str(theirs.fileno()),
            str(memory),
            str(total),
            str(about),
        ]
        with theirs:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), memory)
            )
        self.socket = ours
        self.tasks: collections.deque[tuple[int, int, int]] = collections.deque()

    @property
    def rows(self) -> int:
        return sum(count for _, _, count in self.tasks)


class Loader:
    """This rank's batches. Iterate over it; close it, or use it as a context manager.

    Training (`train`): batches from `start_step` on, without end. Step k takes positions kB .. kB+B-1 of the run, B
    being `global_batch`; position kB+j belongs to rank j % world_size. Epochs follow each other without a gap: the
    batch at the end of one is filled from the next, so that all batches are full and no sample is left out.
    Validation: every sample once, in the order of the shards; position p belongs to rank p % world_size; a rank's last
    batch may be short, and ranks may differ in the number of batches. Iterating again begins anew.

    Memory: slots x rows x crop^2 x 3 bytes with 5 slots (more only for batches of few images), whatever the workers
    are: 0.4 GB at 512 images of 227x227 a rank; and about 60 MB a worker.

    Args:
        workers: reader processes; None: by the cores that this rank really has; 0: decode in this process.
        pin: register the slots with CUDA as pinned memory.
        max_bad_fraction: of the split's samples, those that may be found unusable and replaced: here by this rank
            alone; job.run.progress and job.evaluate add the ranks up.

    Raises:
        InputError: here or while iterating: a crop larger than the images, missing or damaged shards, and the like.
    """

    def __init__(
        self,
        split: Split,
        *,
        rank: int,
        world_size: int,
        global_batch: int,
        crop: int,
        seed: int = 0,
        train: bool = True,
        workers: int | None = None,
        start_step: int = 0,
        mirror: bool = True,
        random_crop: bool = True,
        window: int = 1024,
        streams: int = 64,
        max_bad_fraction: float = 1e-3,
        pin: bool = False,
    ):
        self._rows_done = 0  # of batches handed out
        self.bad_samples: dict[int, str] = {}  # number in the split -> name and reason, of those that were replaced
        self._workers: list[_Worker] = []
        self._closed = False
        if global_batch < 1 or (train and global_batch % world_size):
            raise InputError(f"a batch of {global_batch} images cannot be divided among {world_size} ranks")
        if split.height and split.width and crop > min(split.height, split.width):
            raise InputError(
                f"the images of {split.root} are {split.width}x{split.height}, too small for crops of {crop}x{crop}; "
                f"use an image size of at most {min(split.height, split.width)}, or pack larger ones"
            )
        _check_present(split, rank, world_size)
        self.split, self._rank, self._world_size, self._train = split, rank, world_size, train
        self._global_batch, self._crop, self._seed = global_batch, crop, seed
        self._mirror, self._random_crop = train and mirror, train and random_crop
        self._bad_limit = max_bad_fraction * split.nsamples
        self.max_bad_fraction = max_bad_fraction
        self._stall_error = _STALL_ERROR_REMOTE if is_remote(split.root) else _STALL_ERROR
        self._label_of = load_labels(split)
        self._order = order.Order([s.nsamples for s in split.shards], seed, window, streams) if train else None

        workers = default_workers() if workers is None else workers
        rows = max(1, global_batch // world_size)
        self._task_rows = min(max(-(-rows // (2 * max(workers, 1))), _LEAST_ROWS), _MOST_ROWS)
        ahead = min(max(_AHEAD, -(-2 * workers * self._task_rows // rows)), _MOST_AHEAD) if workers else 1
        self._job = Job(split, crop, rows, ahead + _HELD, self._random_crop, worker_cores(workers))
        self._memory_size = Slots.nbytes(self._job)
        about = self._job.to_json()
        self._about_size = len(about)
        self._memory_file = _anonymous_file(self._memory_size + len(about))
        memory = mmap.mmap(self._memory_file, self._memory_size + len(about))
        memory[self._memory_size :] = about
        self._slots = Slots(memory, self._job)
        self._unpin = _pin(self._slots, memory, self._memory_size) if pin else None

        self._start = start_step if train else 0
        self._next_plan = self._next_batch = self._start
        self._free = list(range(self._job.slots))
        self._pending: collections.deque[_Pending] = collections.deque()
        self._by_slot: dict[int, _Pending] = {}
        self._held: collections.deque[int] = collections.deque()
        self._todo: collections.deque[tuple[int, int, int]] = collections.deque()
        self._longest_wait = 0.0  # seconds until an image came after all
        self._restarts: collections.deque[float] = collections.deque(maxlen=_RESTARTS)
        self._decoder = Decoder(self._job, self._slots)  # of this process: for workers=0 and for names of samples
        # Asked for by the rank first: the decoder may have to be compiled, and then the workers find it.
        slow = slow_decoder() if split.encoding != "raw" else ""
        if slow and rank == 0 and train:
            log.warning("%s", slow)
        self._poll = select.poll()
        self._by_descriptor: dict[int, _Worker] = {}
        self._finalizer = weakref.finalize(self, _end_workers, self._workers)
        for _ in range(workers):
            self._start_worker()
        if workers:
            self._feed()

    @property
    def nbytes(self) -> int:
        """Bytes of the batch slots."""
        return self._memory_size

    @property
    def rows_read(self) -> int:
        """Images read so far, to see by whether the readers get on. May be asked for by another thread."""
        here = [self._slots.used[batch.slot, : batch.rows] for batch in tuple(self._pending)]
        return self._rows_done + sum(int(np.count_nonzero(used >= 0)) for used in here)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [worker.process.pid for worker in self._workers]

    def __len__(self) -> int:
        """Batches of this rank in validation."""
        if self._train:
            raise TypeError("training has no last batch")
        own = len(range(self._rank, self.split.nsamples, self._world_size))
        return -(-own // self._job.rows)

    def __iter__(self) -> "Loader":
        if not self._train and self._next_batch != self._start:
            self._rewind()
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._closed:
            raise ValueError("the loader is closed")
        while len(self._held) >= _HELD:
            self._free.append(self._held.popleft())
        self._feed()
        if not self._pending:
            raise StopIteration
        batch = self._pending[0]
        if not self._workers:
            self._read_here(batch)
        self._wait(lambda: not batch.left)
        self._pending.popleft()
        del self._by_slot[batch.slot]
        self._held.append(batch.slot)
        self._next_batch += 1
        self._rows_done += batch.rows
        slots, slot, rows = self._slots, batch.slot, slice(0, batch.rows)
        slots.labels[slot, rows] = self._label_of[slots.used[slot, rows]]
        return Batch(
            images=torch.from_numpy(slots.images[slot, rows]),
            labels=torch.from_numpy(slots.labels[slot, rows]),
            offsets=torch.from_numpy(slots.offsets[slot, rows]),
            mirror=torch.from_numpy(slots.mirror[slot, rows]),
            step=batch.number,
            epoch=batch.epoch,
            wait_seconds=time.perf_counter() - began,
            bad=batch.bad,
        )

    def close(self) -> None:
        """End the workers. Batches handed out stay readable."""
        if self._closed:
            return
        self._closed = True
        self._finalizer()
        self._decoder.close()
        if self._unpin is not None:
            self._unpin()
        os.close(self._memory_file)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # What to read.

    def _feed(self) -> None:
        """Plan batches into all free slots, and hand their tasks to the workers, the least busy first."""
        while self._free and self._plan():
            pass
        while self._todo and self._workers:
            worker = min(self._workers, key=lambda w: w.rows)
            if len(worker.tasks) >= _MOST_TASKS:
                break
            worker.tasks.append(self._todo.popleft())
            self._send(worker, worker.tasks[-1])

    def _plan(self) -> bool:
        """Write the next batch's samples into a free slot. False: there is no further batch."""
        number = self._next_plan
        split, slots = self.split, self._slots
        if self._train:
            positions = order.batch_positions(number, self._rank, self._world_size, self._global_batch)
            epochs, samples = self._order.samples(positions)
        else:
            first = number * self._job.rows * self._world_size + self._rank
            samples = np.arange(first, split.nsamples, self._world_size, dtype=np.int64)[: self._job.rows]
            if not samples.size:
                return False
            epochs = np.zeros_like(samples)
        slot, n = self._free.pop(0), samples.size
        words = order.draws(self._seed, epochs, samples)
        slots.samples[slot, :n] = samples
        slots.used[slot, :n] = -1
        slots.words[slot, :n] = words
        slots.mirror[slot, :n] = order.mirrored(words) & self._mirror
        if self._random_crop:
            top, left = order.crop_corner(words, split.height or self._crop, split.width or self._crop, self._crop)
        else:
            top, left = max(split.height - self._crop, 0) // 2, max(split.width - self._crop, 0) // 2
        slots.offsets[slot, :n, 0] = top
        slots.offsets[slot, :n, 1] = left
        pending = _Pending(number, slot, n, int(epochs[0]), n)
        self._pending.append(pending)
        self._by_slot[slot] = pending
        for begin in range(0, n, self._task_rows):
            self._todo.append((slot, begin, min(self._task_rows, n - begin)))
        self._next_plan += 1
        return True

    def _rewind(self) -> None:
        """Begin a validation anew: wait for what is being read, and forget it."""
        self._todo.clear()
        self._wait(lambda: not any(worker.tasks for worker in self._workers))
        self._free = list(range(self._job.slots))
        self._held.clear()
        self._pending.clear()
        self._by_slot.clear()
        self._next_plan = self._next_batch = self._start

    # The workers.

    def _start_worker(self) -> None:
        worker = _Worker(self._memory_file, self._memory_size + self._about_size, self._about_size)
        self._workers.append(worker)
        self._by_descriptor[worker.socket.fileno()] = worker
        self._poll.register(worker.socket, select.POLLIN)

    def _send(self, worker: _Worker, task: tuple[int, int, int]) -> None:
        try:
            worker.socket.sendall(pack_message(DONE, *task))
        except OSError:
            pass  # it has died: _listen finds its socket closed, and gives its tasks to another

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Take in answers until `ready`. Raises InputError when no image comes for too long."""
        came, read, warned = time.monotonic(), self.rows_read, False
        while not ready():
            if not self._listen(1.0) and self.rows_read == read:
                stalled = time.monotonic() - came
                if stalled > max(self._stall_error, min(_SLOW_FACTOR * self._longest_wait, _STALL_ERROR_REMOTE)):
                    raise InputError(
                        f"no image came for {stalled:.0f} s: {self._in_work()}; its file system hangs", everywhere=False
                    )
                if stalled > _STALL_WARNING and not warned:
                    log.warning("rank %d: no image for %.0f s: %s", self._rank, stalled, self._in_work())
                    warned = True
                continue
            self._longest_wait = max(self._longest_wait, time.monotonic() - came)
            came, read, warned = time.monotonic(), self.rows_read, False

    def _listen(self, seconds: float) -> bool:
        """Take in the workers' answers; wait for one at most so long. Whether there was one."""
        answered = False
        for descriptor, _ in self._poll.poll(seconds * 1000):
            worker = self._by_descriptor[descriptor]
            try:
                message = worker.socket.recv(_MESSAGE_BYTES)
            except ConnectionResetError:
                continue  # it died with tasks unread; its last answers can still be read
            if not message:
                self._replace(worker)
                continue
            answered = True
            what, slot, first, count, text = unpack_message(message)
            if what == BAD:
                self._found_bad(slot, count, text)
            elif what == WRONG_INPUT:
                raise InputError(text, everywhere=False)
            elif what == FAILED:
                raise RuntimeError(f"a reader process of rank {self._rank} failed:\n{text}")
            else:
                worker.tasks.remove((slot, first, count))
                self._by_slot[slot].left -= count
        if answered:
            self._feed()
        return answered

    def _replace(self, worker: _Worker) -> None:
        """Start a worker in place of one that died, and give it the tasks that were not answered: they write the same
        pixels to the same rows again, so nothing is lost and nothing comes twice."""
        _end_workers([worker])
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
                f"mostly means that memory ran out: use fewer --workers or ask Slurm for more --mem"
            )
        self._restarts.append(now)
        log.warning("rank %d: a reader process ended (%s); a new one does its work again", self._rank, ended)
        self._todo.extendleft(reversed(worker.tasks))
        self._start_worker()
        self._feed()

    def _read_here(self, batch: _Pending) -> None:
        while self._todo and self._todo[0][0] == batch.slot:
            slot, first, count = self._todo.popleft()
            try:
                replaced = self._decoder.fill(slot, first, count)
            except InputError as error:
                error.everywhere = False  # other ranks read other samples
                raise
            for sample, reason in replaced:
                self._found_bad(slot, sample, reason)
            batch.left -= count

    def _found_bad(self, slot: int, sample: int, reason: str) -> None:
        self._by_slot[slot].bad += 1
        if sample in self.bad_samples:
            return
        self.bad_samples[sample] = text = f"{self._decoder.name(sample)}: {reason}"
        log.warning("rank %d: %s; the next one of its shard is used instead", self._rank, text)
        if len(self.bad_samples) > self._bad_limit:
            raise InputError(too_many_bad(len(self.bad_samples), self.split, self.max_bad_fraction), everywhere=False)

    def _in_work(self) -> str:
        busy = [f"a reader is at {self._first_of(w.tasks)}" for w in self._workers if w.tasks]
        return "; ".join(busy[:3]) + (f"; and {len(busy) - 3} other readers" if len(busy) > 3 else "")

    def _first_of(self, tasks: collections.deque[tuple[int, int, int]]) -> str:
        if not tasks:
            return "no task"
        slot, first, _ = tasks[0]
        return self._decoder.name(int(self._slots.samples[slot, first]))


def too_many_bad(count: int, split: Split, fraction: float) -> str:
    """The error for a split of which more samples than `fraction` are of no use."""
    return (
        f"{count} of the {split.nsamples} samples of {split.name} cannot be used, more than the allowed fraction of "
        f"{fraction:g} (--data.max-bad-fraction); the log names them, python -m shards.verify {split.root} lists all"
    )


def _end_workers(workers: list[_Worker]) -> None:
    """Kill workers: they have nothing to lose, and a kill also ends one that waits for a slow file system."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        try:
            worker.process.wait(5)
        except subprocess.TimeoutExpired:
            log.warning("reader process %d hangs in the file system and cannot be ended yet", worker.process.pid)


def _check_present(split: Split, rank: int, world_size: int) -> None:
    """Raise InputError when a shard is missing or has another size. Each rank looks at its part of them."""
    for shard in split.shards[rank::world_size]:
        path = split.path(shard.url)
        if is_remote(path) or not shard.nsamples:
            continue
        try:
            check_regular(path)
            size = os.path.getsize(path)
            # An index of others may not have the size: a sample takes a header at least.
            expected = shard.filesize or BLOCK * shard.nsamples
            if size < expected:
                refuse_foreign(path)
        except OSError as error:
            raise InputError(
                f"cannot open the shard {path}: {error.strerror}; restore it, or make the index anew with "
                f"python -m shards.index {split.root}",
                everywhere=False,
            ) from None
        if size < expected:
            of = f"{'' if shard.filesize else 'at least '}{expected}"
            raise InputError(
                f"{path} ends early: it has {size} bytes of {of}; copy or pack that shard again",
                everywhere=False,
            )


def _anonymous_file(size: int) -> int:
    """Descriptor of a memory that has no name, so that nothing is left of it whatever ends this process."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
    else:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryFile(dir=folder) as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _pin(slots: Slots, memory: mmap.mmap, size: int):
    """Register the slots with CUDA, so that copies to the GPU run beside everything else. Returns how to undo it."""
    address = slots.images.__array_interface__["data"][0]
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(address, size, 0)
    if int(error) != 0:
        log.warning("the batch slots cannot be pinned (CUDA error %s): copies to the GPU will not overlap", error)
        return None

    def unpin() -> None:
        torch.cuda.synchronize()  # no copy from them may be under way
        runtime.cudaHostUnregister(address)

    return unpin
