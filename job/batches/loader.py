"""Batches of a rank, read and decoded by worker processes ahead of training, in parallel with it.

In: a split, this rank's place among the ranks, a step to start from. Out: batches of uint8 crops and labels, as torch
views of a shared (on CUDA: pinned) memory. The batches depend on seed, step and world size alone, never on the workers.
"""

import collections
import dataclasses
import logging
import mmap
import os
import time
import weakref
from collections.abc import Callable

import numpy as np
import torch

from job.batches.reader import BAD, Decoder, ReaderConfig, Slots
from job.batches.workers import Workers, default_workers, worker_cores
from shards.errors import InputError, see
from shards.format.split import BARE, Split, load_labels
from shards.format.tar import BLOCK, refuse_foreign
from shards.machine.files import check_regular, is_remote
from shards.read import order
from shards.read.images import slow_decoder

# Batches that are read ahead of the one that is asked for; and batches that the caller may still be using: the current
# one, and the one before it, whose copy to the GPU may not be complete.
_AHEAD = 3
_HELD = 2
_MOST_AHEAD = 32  # where batches are so small that three of them do not keep the workers busy

# Rows per task: few enough that all workers share a batch, enough that messages cost nothing.
_LEAST_ROWS, _MOST_ROWS = 8, 64

# Log a warning, then fail, after this many seconds without an image. A shard that hangs must end the job within 60 s,
# and before the heartbeat does at 70 s, which cannot name it. A slow file system gives an image now and then: a reader
# that once took t seconds gets 4 t.
_STALL_WARNING, _STALL_ERROR = 20.0, 50.0
_SLOW_FACTOR = 4
# Where shards are fetched from another machine: whole ones, which takes longer than that on a slow line.
_STALL_ERROR_REMOTE = 600.0

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Batch:
    """A rank's part of a step. The tensors are views of a slot: valid until the next batch is asked for.

    (A copy to a GPU may still run while the next batch is fetched: the memory is written again only when the batch
    after that is asked for.)
    """

    images: torch.Tensor  # uint8 (n, crop, crop, 3), or planes (n, crop_bytes), see shards.read.planes
    labels: torch.Tensor  # int64 (n,)
    offsets: torch.Tensor  # int32 (n, 2): top, left of the crop in the stored image
    mirror: torch.Tensor  # bool (n,): to be mirrored
    step: int  # number of the step in training, of the batch in validation
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


class _SharedSlots:
    """Batch slots in a memory without a name, of which nothing is left however this process ends.

    Args:
        pin: register it with CUDA, so that copies to the GPU overlap with everything else.

    Attributes:
        descriptor: of the memory; readers inherit it.
        sizes: of the memory in bytes, and of the reader's settings at its end.
        nbytes: of the slots alone.
    """

    def __init__(self, config: ReaderConfig, pin: bool):
        about = config.to_json()
        self.nbytes = Slots.nbytes(config)
        self.sizes = self.nbytes + len(about), len(about)
        self.descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.sizes[0])
        memory = mmap.mmap(self.descriptor, self.sizes[0])
        memory[self.nbytes :] = about
        self.slots = Slots(memory, config)
        address = self.slots.images.__array_interface__["data"][0]
        pinned = pin and _pin(address, self.nbytes)
        # Also when this object is forgotten. Batches stay readable.
        self.close = weakref.finalize(self, _release, self.descriptor, address if pinned else 0)
        self.close.atexit = False


def _pin(address: int, size: int) -> bool:
    error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
    if int(error) != 0:
        log.warning("the batch slots cannot be pinned (CUDA error %s): copies to the GPU will not overlap", error)
    return int(error) == 0


def _release(descriptor: int, pinned: int) -> None:
    """Close a memory, and undo `_pin` of the address `pinned`, if it is not 0."""
    if pinned:
        torch.cuda.synchronize()  # no copy from the slots may be under way
        torch.cuda.cudart().cudaHostUnregister(pinned)
    os.close(descriptor)


class Loader:
    """This rank's batches. Iterate over it; close it, or use it as a context manager.

    Training (`train`): batches from `start_step` on, without end. With B = `global_batch`, step k takes positions
    kB .. kB+B-1 of the run, and position kB+j belongs to rank j % world_size. Epochs follow each other without a gap:
    the batch at the end of one is filled from the next, so that all batches are full and no sample is left out.
    Validation: every sample once, in the order of the shards; position p belongs to rank p % world_size. A rank's last
    batch may be short, and ranks may differ in the number of batches. Iterating again starts over.

    Memory: slots x rows x crop^2 x 3 bytes (planes: half), with 5 slots (more only for batches of few images) whatever
    the number of workers: 0.4 GB at 512 images of 227x227 per rank; and about 60 MB per worker.

    Args:
        workers: reader processes; None: by the cores that this rank has; 0: decode in this process.
        pin: register the slots with CUDA as pinned memory.
        max_bad_fraction: share of the split's samples that may be invalid and replaced, here on this rank alone;
            job.run.progress and job.run.validation count all ranks together.

    Raises:
        InputError: here or while iterating, for example a crop larger than the images, a missing or damaged shard.
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
        _check_arguments(split, global_batch, world_size, crop, train)
        _check_present(split, rank, world_size)
        self.split, self._rank, self._world_size, self._train = split, rank, world_size, train
        self._global_batch, self._crop, self._seed = global_batch, crop, seed
        self._mirror, self._random_crop = train and mirror, train and random_crop
        self._bad_limit = max_bad_fraction * split.nsamples
        self.max_bad_fraction = max_bad_fraction
        self.bad_samples: dict[int, str] = {}  # number in the split -> name and reason, of those that were replaced
        self._stall_error = _STALL_ERROR_REMOTE if is_remote(split.root) else _STALL_ERROR
        self._longest_wait = 0.0  # seconds until an image came after all
        self._label_of = load_labels(split)
        self._order = order.Order([s.nsamples for s in split.shards], seed, window, streams) if train else None

        workers = default_workers() if workers is None else workers
        rows = max(1, global_batch // world_size)
        self._task_rows, slots = _sizes(rows, workers)
        self._config = ReaderConfig(split, crop, rows, slots, self._random_crop, worker_cores(workers))
        self._memory = _SharedSlots(self._config, pin)
        self._slots = self._memory.slots
        self._start = start_step if train else 0
        self._next_plan = self._next_batch = self._start
        self._free = list(range(self._config.slots))
        self._pending: collections.deque[_Pending] = collections.deque()
        self._by_slot: dict[int, _Pending] = {}
        self._held: collections.deque[int] = collections.deque()
        self._rows_done = 0  # of batches handed out
        self._closed = False
        self._decoder = Decoder(self._config, self._slots)  # of this process: for workers=0 and for names of samples
        # Asked for by the rank first: the decoder may have to be compiled, and then the workers find it.
        slow = slow_decoder() if split.encoding not in BARE else ""
        if slow and rank == 0 and train:
            log.warning("%s %s", slow, see("decoder"))
        self._workers = Workers(workers, self._memory.descriptor, self._memory.sizes, rank, self._decoder.name_at)
        if workers:
            self._feed()

    @property
    def nbytes(self) -> int:
        """Bytes of the batch slots."""
        return self._memory.nbytes

    @property
    def rows_read(self) -> int:
        """Images read so far: it grows while the readers make progress. Another thread may ask for it."""
        here = [self._slots.used[batch.slot, : batch.rows] for batch in tuple(self._pending)]
        return self._rows_done + sum(int(np.count_nonzero(used >= 0)) for used in here)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return self._workers.pids

    def __len__(self) -> int:
        """Batches of this rank in validation."""
        if self._train:
            raise TypeError("training has no last batch")
        own = len(range(self._rank, self.split.nsamples, self._world_size))
        return -(-own // self._config.rows)

    def validation_samples(self, number: int) -> np.ndarray:
        """Numbers in the split of the samples in this rank's batch `number` of a validation: int64 (n,)."""
        first = number * self._config.rows * self._world_size + self._rank
        return np.arange(first, self.split.nsamples, self._world_size, dtype=np.int64)[: self._config.rows]

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
        self._workers.close()
        self._decoder.close()
        self._memory.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # What to read.

    def _feed(self) -> None:
        """Plan batches into all free slots, and hand their tasks to the workers."""
        while self._free and self._plan():
            pass
        self._workers.give_tasks()

    def _plan(self) -> bool:
        """Write the samples of the next batch into a free slot. Returns False when there is no further batch."""
        number = self._next_plan
        split, slots = self.split, self._slots
        if self._train:
            positions = order.batch_positions(number, self._rank, self._world_size, self._global_batch)
            epochs, samples = self._order.samples(positions)
        else:
            samples = self.validation_samples(number)
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
            self._workers.todo.append((slot, begin, min(self._task_rows, n - begin)))
        self._next_plan += 1
        return True

    def _rewind(self) -> None:
        """Start a validation over: wait for what is being read, and forget it."""
        self._workers.todo.clear()
        self._wait(lambda: not self._workers.busy)
        self._free = list(range(self._config.slots))
        self._held.clear()
        self._pending.clear()
        self._by_slot.clear()
        self._next_plan = self._next_batch = self._start

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Take in answers until `ready`. Raises InputError when no image comes for too long."""
        came, read, warned = time.monotonic(), self.rows_read, False
        while not ready():
            if not self._listen(1.0) and self.rows_read == read:
                stalled = time.monotonic() - came
                if stalled > max(self._stall_error, min(_SLOW_FACTOR * self._longest_wait, _STALL_ERROR_REMOTE)):
                    raise InputError(
                        f"no image came for {stalled:.0f} s: {self._workers.at_work()}; its file system hangs "
                        f"{see('data')}",
                        everywhere=False,
                    )
                if stalled > _STALL_WARNING and not warned:
                    log.warning("rank %d: no image for %.0f s: %s", self._rank, stalled, self._workers.at_work())
                    warned = True
                continue
            self._longest_wait = max(self._longest_wait, time.monotonic() - came)
            came, read, warned = time.monotonic(), self.rows_read, False

    def _listen(self, seconds: float) -> bool:
        """Take in the workers' answers; wait up to `seconds` for one. Returns whether there was one."""
        answers = self._workers.answers(seconds)
        for what, slot, _, count, text in answers:
            if what == BAD:
                self._found_bad(slot, count, text)
            else:
                self._by_slot[slot].left -= count
        if answers:
            self._feed()
        return bool(answers)

    def _read_here(self, batch: _Pending) -> None:
        """Read a batch in this process."""
        todo = self._workers.todo
        while todo and todo[0][0] == batch.slot:
            slot, first, count = todo.popleft()
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


def too_many_bad(count: int, split: Split, fraction: float) -> str:
    """The message for a split of which more than the share `fraction` of the samples is invalid."""
    return (
        f"{count} of the {split.nsamples} samples of {split.name} cannot be used, more than the allowed fraction of "
        f"{fraction:g} (--data.max-bad-fraction); the log names them, python -m shards.verify {split.root} lists all"
    )


def _sizes(rows: int, workers: int) -> tuple[int, int]:
    """Rows per task, and the number of slots, for batches of `rows` images."""
    task_rows = min(max(-(-rows // (2 * max(workers, 1))), _LEAST_ROWS), _MOST_ROWS)
    ahead = min(max(_AHEAD, -(-2 * workers * task_rows // rows)), _MOST_AHEAD) if workers else 1
    return task_rows, ahead + _HELD


def _check_arguments(split: Split, global_batch: int, world_size: int, crop: int, train: bool) -> None:
    """Raise InputError for a batch that the ranks do not divide, or a crop larger than the images."""
    if global_batch < 1 or (train and global_batch % world_size):
        raise InputError(f"a batch of {global_batch} images cannot be divided among {world_size} ranks")
    if split.height and split.width and crop > min(split.height, split.width):
        raise InputError(
            f"the images of {split.root} are {split.width}x{split.height}, too small for crops of {crop}x{crop}; "
            f"use an image size of at most {min(split.height, split.width)}, or pack larger ones"
        )


def _check_present(split: Split, rank: int, world_size: int) -> None:
    """Raise InputError when a shard is missing or has another size. Each rank checks its part of them."""
    for shard in split.shards[rank::world_size]:
        path = split.path(shard.url)
        if is_remote(path) or not shard.nsamples:
            continue
        try:
            check_regular(path)
            size = os.path.getsize(path)
            # An index made by others may not have the size: a sample takes at least a header.
            expected = shard.filesize or BLOCK * shard.nsamples
            if size < expected:
                refuse_foreign(path)
        except OSError as error:
            raise InputError(
                f"cannot open the shard {path}: {error.strerror}; restore it, or make the index again with "
                f"python -m shards.index {split.root}",
                everywhere=False,
            ) from None
        if size < expected:
            of = f"{'' if shard.filesize else 'at least '}{expected}"
            raise InputError(
                f"{path} ends early: it has {size} bytes of {of}; copy or pack that shard again",
                everywhere=False,
            )
