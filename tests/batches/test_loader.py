"""Batches of a rank: the same pixels and labels whatever the ranks, the workers and the faults on the way."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from job.batches import loader as loader_module
from job.batches.loader import Loader
from job.batches.workers import Workers
from shards.errors import InputError
from shards.format.split import load_split, save_column
from shards.read import fastjpeg, reader
from shards.read.order import Order, batch_positions
from tests.launch import ROOT
from tests.shardmaker import damage, image_offset, write_split

SIDE, CROP = 8, 5


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Uneven shards, one of a single sample."""
    return write_split(tmp_path_factory.mktemp("shards"), [150, 1, 70, 300, 40], SIDE)


def make(split, **changes):
    arguments = dict(rank=0, world_size=1, global_batch=16, crop=CROP, seed=3, workers=0)
    return Loader(split, **{**arguments, **changes})


def take(split, steps, **arguments):
    """(images, labels, offsets, mirror) of so many batches, copied."""
    with make(split, **arguments) as loader:
        return [copied(next(loader)) for _ in range(steps)]


def copied(batch):
    return [part.clone() for part in (batch.images, batch.labels, batch.offsets, batch.mirror)]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def global_batches(split, steps, world_size, **arguments):
    """The global batches in canonical order, put together from those of all ranks."""
    ranks = [take(split, steps, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
    joined = []
    for step in zip(*ranks, strict=True):
        joined.append([torch.stack(parts, 1).flatten(0, 1) for parts in zip(*step, strict=True)])
    return joined


# What comes


def test_pixels_labels_and_corners_belong_together(split):
    for images, labels, offsets, mirror in take(split, 20):
        top, left = offsets[:, 0, None, None], offsets[:, 1, None, None]
        assert images.shape == (16, CROP, CROP, 3) and images.dtype == torch.uint8
        assert (images[..., 0] == top + torch.arange(CROP)[:, None]).all()
        assert (images[..., 1] == left + torch.arange(CROP)).all()
        assert (images[..., 2] == (labels % 251)[:, None, None]).all()
        assert mirror.dtype == torch.bool and labels.dtype == torch.int64
    assert mirror.any() and not mirror.all()


def test_batches_follow_the_order(split):
    order = Order([shard.nsamples for shard in split.shards], 3)
    for step, (_, labels, _, _) in enumerate(take(split, 50, rank=1, world_size=2)):
        assert np.array_equal(labels, order.samples(batch_positions(step, 1, 2, 16))[1])


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=6),
    world_size=st.sampled_from([1, 2, 4, 8]),
    workers=st.integers(0, 4),
    rows=st.integers(1, 9),
    seed=st.integers(0, 2**40),
)
def test_any_ranks_and_workers_give_the_same_epoch(tmp_path_factory, sizes, world_size, workers, rows, seed):
    split = write_split(tmp_path_factory.mktemp("shards"), sizes, 4)
    n, batch = sum(sizes), world_size * rows
    steps = -(-n // batch)
    shape = dict(global_batch=batch, crop=3, seed=seed)
    expected = global_batches(split, steps, 1, **shape)
    if steps > 40:  # the workers see parts of it: starting eight ranks' workers takes its time
        expected, steps = expected[:40], 40
    else:
        labels = torch.cat([part[1] for part in expected])
        assert torch.equal(labels[:n].sort().values, torch.arange(n))
    assert same(global_batches(split, steps, world_size, **shape), expected)
    if workers:
        rank = world_size - 1
        there = dict(shape, rank=rank, world_size=world_size)
        assert same(take(split, steps, workers=workers, **there), take(split, steps, **there))


@pytest.mark.parametrize("world_size,workers", [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)])
def test_global_batch_is_the_same_with_any_ranks_and_workers(split, world_size, workers):
    expected = global_batches(split, 40, 1)
    assert same(global_batches(split, 40, world_size, workers=workers), expected)


def test_every_sample_exactly_once_an_epoch(split):
    n = split.nsamples
    labels = torch.cat([batch[1] for batch in take(split, 3 * n // 16 + 1, workers=2)])
    for epoch in range(3):
        assert torch.equal(labels[epoch * n : (epoch + 1) * n].sort().values, torch.arange(n))


def test_epoch_and_step_are_told(split):
    with make(split, start_step=30) as loader:
        batches = [(b.step, b.epoch) for _, b in zip(range(10), loader, strict=False)]
    assert batches == [(k, 16 * k // split.nsamples) for k in range(30, 40)]


@pytest.mark.parametrize("workers,world_sizes", [(0, (1, 2, 3, 8)), (2, (3,))])
def test_validation_covers_every_sample_once(split, workers, world_sizes):
    for world_size in world_sizes:
        labels = []
        for rank in range(world_size):
            with make(split, train=False, rank=rank, world_size=world_size, workers=workers) as loader:
                batches = [copied(b) for b in loader]
                assert len(batches) == len(loader)
                assert all(
                    (offsets == (SIDE - CROP) // 2).all() and not mirror.any() for *_, offsets, mirror in batches
                )
                assert same([copied(b) for b in loader], batches)  # again
                next(iter(loader))
                assert same([copied(b) for b in loader], batches)  # again, after a pass that was left
                labels += [b[1] for b in batches]
        assert torch.equal(torch.cat(labels).sort().values, torch.arange(split.nsamples))


def test_validation_with_more_ranks_than_samples(tmp_path):
    split = write_split(tmp_path, [2, 1], name="val")
    counts = []
    for rank in range(5):
        with make(split, train=False, rank=rank, world_size=5, global_batch=5) as loader:
            counts.append(sum(len(b.labels) for b in loader))
    assert counts == [1, 1, 1, 0, 0]


def test_fewer_samples_than_a_batch(tmp_path):
    split = write_split(tmp_path, [2, 1])
    for workers in (0, 3):
        labels = torch.cat([batch[1] for batch in take(split, 3, workers=workers)])
        assert torch.bincount(labels).tolist() == [16, 16, 16]


def test_without_random_crop_and_mirror(split):
    for _, _, offsets, mirror in take(split, 5, random_crop=False, mirror=False):
        assert (offsets == (SIDE - CROP) // 2).all() and not mirror.any()


# Resume


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_gives_the_same_batches_bit_for_bit(split, workers):
    whole = take(split, 60)
    for step in (1, 17, 34, 35, 36, 59):  # in an epoch, at its end (35.06 steps), behind it
        assert same(take(split, 60 - step, start_step=step, workers=workers), whole[step:])


def seconds_to_first_batch(split, steps, workers):
    """By step that is resumed at: the better of two, taken in turn, so that the machine is as busy for each."""
    took = {step: [] for step in steps}
    for step in [*steps] * 2:
        began = time.perf_counter()
        with make(split, crop=3, global_batch=256, start_step=step, workers=workers) as loader:
            assert next(loader).step == step
            took[step].append(time.perf_counter() - began)
    return [min(times) for times in took.values()]


@pytest.fixture(scope="module")
def small_split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("small"), [1000] * 20, 4)


def test_resume_at_the_end_of_an_epoch_takes_no_longer_than_at_its_start(small_split):
    start, end = seconds_to_first_batch(small_split, [0, 20000 // 256 - 1], 0)
    assert end < 2 * start + 0.2


def test_resume_reads_nothing_before_its_position(small_split, monkeypatch):
    reads = []
    real = reader.ShardReader.read
    monkeypatch.setattr(reader.ShardReader, "read", lambda *a: reads.append(a[1:]) or real(*a))
    with make(small_split, crop=3, global_batch=256, start_step=20000 // 256 - 1) as loader:
        next(loader)
    assert len(reads) == 256


def test_resume_at_the_end_of_an_imagenet_epoch_takes_no_longer_than_at_its_start(tmp_path):
    """1,000 shards of 1,281 samples: one of them under a thousand names."""
    one = write_split(tmp_path, [1281], 4)
    for number in range(1, 1000):
        for ending in ("tar", "idx"):
            os.link(tmp_path / f"train-000000.{ending}", tmp_path / f"train-{number:06d}.{ending}")
    shards = tuple(dataclasses.replace(one.shards[0], url=f"train-{number:06d}.tar") for number in range(1000))
    digest = save_column(str(tmp_path), "train.labels.npy", np.arange(1_281_000, dtype=np.int32))
    split = dataclasses.replace(one, shards=shards, labels_sha256=digest)
    start, end = seconds_to_first_batch(split, [0, 1_281_000 // 256 - 1], 2)
    assert end < 2 * start + 0.2


# Memory


def test_batch_stays_until_the_next_is_asked_for(split):
    with make(split, workers=2) as loader:
        batch = next(loader)
        before = copied(batch)
        for _ in range(10):
            following = next(loader)
            assert same([copied(batch)], [before])
            batch, before = following, copied(following)


def test_batch_can_be_read_after_close(split):
    loader = make(split, workers=1)
    batch = next(loader)
    before = copied(batch)
    loader.close()
    assert same([copied(batch)], [before])
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_memory_is_bounded(tmp_path, monkeypatch):
    split = write_split(tmp_path, [1], 256)
    monkeypatch.setattr(Workers, "_start", lambda self: None)  # their number alone matters here
    for workers, slots in ((0, 3), (8, 5), (32, 5)):
        with make(split, crop=227, global_batch=512, workers=workers) as loader:
            assert loader.nbytes <= slots * 512 * 227 * 227 * 3 * 1.001
    assert loader.nbytes < 1.5 * 2**30


# Processes


def children(pid=None):
    processes = psutil.Process(pid).children(recursive=True)
    return [p for p in processes if p.status() != psutil.STATUS_ZOMBIE and "job.batches.reader" in p.cmdline()]


def gone(processes, seconds=10):
    _, alive = psutil.wait_procs(processes, seconds)
    return not alive


def test_workers_start_fast_and_without_torch_or_mpi(split, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("PMIX_RANK", "0")
    with make(split, workers=1) as loader:
        next(loader)
        (worker,) = children()
        # Of its processor: on a busy machine the clock would measure the others.
        assert sum(worker.cpu_times()[:2]) < 2
        assert not {"OMPI_COMM_WORLD_RANK", "PMIX_RANK"} & set(worker.environ())
        assert worker.environ()["OMP_NUM_THREADS"] == "1"
        assert not [m.path for m in worker.memory_maps() if "torch" in m.path or "libmpi" in m.path]


def test_close_ends_workers_at_once(split):
    loader = make(split, workers=2)
    next(loader)
    processes = children()
    assert len(processes) == 2
    loader.close()
    assert gone(processes, 1)
    loader.close()  # twice does no harm


def test_forgotten_loader_ends_its_workers(split):
    loader = make(split, workers=1)
    processes = children()
    del loader
    assert gone(processes)


RANK = """
import sys, threading
from job.batches.loader import Loader
from shards.format.split import load_split, save_column
loader = Loader(load_split(sys.argv[1], "train"), rank=0, world_size=1, global_batch=16, crop=5, workers=2)
next(loader)
print("reading", flush=True)
threading.Event().wait()
"""


def test_workers_leave_signals_to_their_rank(split):
    """Ctrl-C and Slurm signal all processes of a job."""
    with make(split, workers=1) as loader:
        next(loader)
        (worker,) = children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            worker.send_signal(number)
        for _ in range(10):
            next(loader)
        assert children() == [worker]


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_killed_rank_leaves_no_process_and_no_memory(split, end):
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, split.root],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert rank.stdout.readline() == b"reading\n"
        processes = children(rank.pid)
        assert len(processes) == 2
        # The slots are shared by rank and workers, and have no name that could be left behind.
        for process in (psutil.Process(rank.pid), *processes):
            maps = [m.path for m in process.memory_maps()]
            assert any("memfd:" in path for path in maps) and not any(path.startswith("/dev/shm") for path in maps)
        # As Ctrl-C and Slurm do it, a gentler signal goes to the workers as well.
        os.kill(rank.pid, end) if end == signal.SIGKILL else os.killpg(rank.pid, end)
        rank.wait(10)
        assert gone(processes)
    finally:
        rank.kill()
        rank.stdout.close()


def test_killed_worker_is_replaced_and_nothing_is_lost(split, caplog):
    expected = take(split, 40)
    with make(split, workers=2) as loader:
        got = [copied(next(loader))]
        for step in range(1, 40):
            if step in (5, 6, 20):
                victim = children()[-1]
                victim.kill()
                os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)  # dead, but for the loader to find out
            got.append(copied(next(loader)))
        assert len(children()) == 2
    assert same(got, expected)
    assert "signal 9" in caplog.text


def test_all_workers_killed_at_once(split):
    expected = take(split, 10)
    with make(split, workers=3) as loader:
        got = [copied(next(loader))]
        for process in children():
            process.kill()
        got += [copied(next(loader)) for _ in range(9)]
    assert same(got, expected)


def test_workers_that_keep_dying_end_the_run(split, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"keep ending \(exit code 1\)"), make(split, workers=2) as loader:
        next(loader)


# Faults


def test_slow_reader_shows_as_wait(split):
    with make(split, workers=1) as loader:
        next(loader)
        (worker,) = children()
        worker.suspend()
        threading.Timer(0.7, worker.resume).start()
        began = time.perf_counter()
        waits = [next(loader).wait_seconds for _ in range(20)]
    assert 0.2 < max(waits) <= sum(waits) < time.perf_counter() - began
    assert sorted(waits)[10] < 0.2


@pytest.fixture
def worker_file_system(tmp_path, monkeypatch):
    """Makes os.preadv of workers that start from now on behave otherwise; the argument is the body of its stand-in."""

    def change(body):
        lines = ["import errno, itertools, os, time", "real, calls = os.preadv, itertools.count()"]
        lines += [
            "def preadv(descriptor, buffers, offset):",
            f"    {body}",
            "    return real(descriptor, buffers, offset)",
        ]
        (tmp_path / "sitecustomize.py").write_text("\n".join([*lines, "os.preadv = preadv"]))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return change


def test_throttled_file_system_of_one_rank_is_its_own_wait(split, worker_file_system, monkeypatch):
    expected = global_batches(split, 8, 2)
    worker_file_system("time.sleep(0.02)")
    slow = make(split, rank=0, world_size=2, workers=1)
    monkeypatch.delenv("PYTHONPATH")
    quick = make(split, rank=1, world_size=2, workers=1)
    waits, batches = [], []
    with slow, quick:
        for _ in range(8):
            pair = next(slow), next(quick)
            waits.append([batch.wait_seconds for batch in pair])
            batches.append([torch.stack(p, 1).flatten(0, 1) for p in zip(*map(copied, pair), strict=True)])
    assert same(batches, expected)
    slow_waits, quick_waits = zip(*waits[1:], strict=True)
    # What was read ahead while the other rank waited is there at once.
    assert sum(slow_waits) > 0.5 > 5 * sorted(quick_waits)[3]


def test_passing_errors_of_the_file_system_go_unnoticed(split, worker_file_system):
    expected = take(split, 10)
    worker_file_system("""if next(calls) % 50 == 7: raise OSError(errno.EIO, "Input/output error")""")
    assert same(take(split, 10, workers=2), expected)


def test_lasting_error_of_the_file_system_names_the_shard(split, worker_file_system):
    error = 'raise OSError(errno.EIO, "Input/output error")'
    worker_file_system(f"if next(calls) > 100: time.sleep = lambda _: None; {error}")  # without the pauses
    with pytest.raises(InputError, match=r"cannot read .*train-\d+.tar \(4 times\): Input/output error"):
        take(split, 60, workers=1)


def jpeg(number, side=16):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number % 250, 100, 50)).save(file, "JPEG", quality=95)
    return "jpg", file.getvalue()


@pytest.fixture
def photos(tmp_path):
    return write_split(tmp_path, [60, 60], 16, jpeg)


def test_damaged_samples_are_replaced_alike_everywhere_and_named_once(photos, caplog):
    bad = {3, 4, 59, 70}
    for number in bad:
        damage(photos, number // 60, image_offset(photos, number // 60, number % 60), bytes(200))
    arguments = dict(max_bad_fraction=0.05, global_batch=8, crop=12)
    expected = global_batches(photos, 30, 1, **arguments)
    caplog.clear()
    with make(photos, workers=2, **arguments) as loader:
        batches = [(copied(b), b.bad) for _, b in zip(range(30), loader, strict=False)]
    assert caplog.text.count("train-000000.tar: ") == 3 and caplog.text.count("train-000001.tar: ") == 1
    assert "sample 10 of " in caplog.text
    assert same([b for b, _ in batches], expected)
    assert same(global_batches(photos, 30, 4, **arguments), expected)
    labels = torch.cat([b[1] for b, _ in batches])
    counts = torch.bincount(labels, minlength=120)
    # In two epochs: the next sample that decodes comes in place of a damaged one; a shard's first follows its last.
    assert {n for n in range(120) if counts[n] == 0} == bad
    assert {n: int(counts[n]) for n in range(120) if counts[n] > 2} == {5: 6, 0: 4, 71: 4}
    assert sum(bad for _, bad in batches) == 8
    assert sorted(loader.bad_samples) == sorted(bad)


def test_too_many_damaged_samples_end_the_run(photos):
    for number in (3, 4, 5):
        damage(photos, 0, image_offset(photos, 0, number), bytes(200))
    assert take(photos, 15, global_batch=8, crop=12, max_bad_fraction=3 / 120)  # not above
    with pytest.raises(InputError, match=r"3 of the 120 samples .* more than the allowed fraction of 0.02"):
        take(photos, 15, global_batch=8, crop=12, max_bad_fraction=0.02)


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_without_one_good_image_is_named(photos, workers):
    for number in range(60):
        damage(photos, 1, image_offset(photos, 1, number), bytes(200))
    with pytest.raises(InputError, match="not one image of .*train-000001.tar"):
        take(photos, 10, global_batch=8, crop=12, max_bad_fraction=1, workers=workers)


@pytest.mark.parametrize("workers,fault", [(0, "cut off"), (2, "cut off"), (0, "vanished")])
def test_shard_that_fails_while_training_is_named(tmp_path, monkeypatch, workers, fault):
    split = write_split(tmp_path, [100, 100], 64)
    monkeypatch.setattr(reader, "_LOOK_AGAIN_SECONDS", 0.0)
    path = split.path(split.shards[1].url)
    began = time.perf_counter()
    with make(split, workers=workers) as loader:
        next(loader)
        os.truncate(path, 5000) if fault == "cut off" else os.unlink(path)
        with pytest.raises(InputError, match="train-000001.tar (ends early|is not there)") as caught:
            while time.perf_counter() - began < 60:
                next(loader)
    assert not caught.value.everywhere  # one rank alone may meet it: it must speak for itself


def test_an_error_of_reading_in_the_rank_itself_is_its_own(tmp_path, monkeypatch):
    def fill(*arguments):
        raise InputError("train-000000.tar has a sample without an image")

    with make(write_split(tmp_path, [100], 64), workers=0) as loader:
        monkeypatch.setattr(loader._decoder, "fill", fill)
        with pytest.raises(InputError, match="without an image") as caught:
            next(loader)
    assert not caught.value.everywhere


def test_missing_shard_is_found_before_training(tmp_path):
    split = write_split(tmp_path, [5, 5])
    os.unlink(split.path(split.shards[1].url))
    with pytest.raises(InputError, match="train-000001.tar"):
        make(split)


def test_short_shard_is_found_before_training(tmp_path):
    split = write_split(tmp_path, [5, 5])
    os.truncate(split.path(split.shards[0].url), 1000)
    with pytest.raises(InputError, match="train-000000.tar ends early"):
        make(split)


@pytest.mark.parametrize("known", [True, False])
def test_shard_that_became_empty_is_found_before_training(tmp_path, known):
    """An index of others may not know its size."""
    split = write_split(tmp_path, [5, 5])
    if not known:
        split = dataclasses.replace(split, shards=tuple(dataclasses.replace(s, filesize=0) for s in split.shards))
    path = split.path(split.shards[0].url)
    for content, message in ((b"", "ends early: it has 0 bytes of"), (b"404: Not Found", "is not a tar: it is plain")):
        Path(path).write_bytes(content)
        with pytest.raises(InputError, match=f"train-000000.tar {message}"):
            make(split)
    os.unlink(path)
    os.mkdir(path)
    with pytest.raises(InputError, match="train-000000.tar: it is a folder"):
        make(split)


def test_crop_larger_than_the_images(split):
    with pytest.raises(InputError, match="8x8, too small for crops of 9x9"):
        make(split, crop=9)


def test_batch_that_the_ranks_do_not_divide(split):
    with pytest.raises(InputError, match="16 images cannot be divided among 3 ranks"):
        make(split, world_size=3)


def test_label_outside_the_classes(tmp_path):
    write_split(tmp_path, [5], labels=[0, 1, 2, 3, 1], classes=("a", "b", "c"))
    with pytest.raises(InputError, match="sample 3 has label 3, but there are 3 classes"):
        make(load_split(str(tmp_path), "train"))


def test_stuck_file_system_ends_the_run(split, monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "_STALL_WARNING", 0.2)
    monkeypatch.setattr(loader_module, "_STALL_ERROR", 1.5)
    with make(split, workers=1) as loader:
        next(loader)
        children()[0].suspend()
        with pytest.raises(InputError, match=r"no image came for .* a reader is at sample \d+ of .*train-"):
            for _ in range(20):
                next(loader)
        assert "no image for" in caplog.text


# Images of all kinds


def kinds(number):
    """Foreign images: other sizes, formats and colour spaces; one colour each, by its number."""
    width, height = [(40, 30), (20, 50), (64, 64), (9, 12)][number % 4]
    colour = (number * 5, 255 - number * 5, 128)
    image = Image.new("RGB", (width, height), colour)
    format, ext = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("PNG", "jpg")][number // 4 % 4]
    if number == 17:
        image = image.convert("CMYK")
        format, ext = "JPEG", "jpg"
    if number == 18:
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, format, quality=95)
    return ext, file.getvalue()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_any_kind_and_size(tmp_path, fixed, workers):
    """Also where the index claims one size for all: the odd one is scaled to it."""
    split = write_split(tmp_path, [20], 32, kinds, fixed=fixed)
    seen = set()
    for images, labels, offsets, _ in take(split, 5, crop=28, max_bad_fraction=0, workers=workers):
        for image, label, (top, left) in zip(images, labels.tolist(), offsets.tolist(), strict=True):
            seen.add(label)
            expected = torch.tensor([label * 5, 255 - label * 5, 128])
            if label == 18:
                expected = torch.full((3,), round(0.299 * 90 + 0.587 * 165 + 0.114 * 128))
            assert (image.int() - expected).abs().max() <= 6, label
            assert top >= 0 and left >= 0
    assert seen == set(range(20))


def noisy_jpeg(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return "jpg", file.getvalue()


def without_fast_decoder(patch):
    patch.setattr(fastjpeg, "decoder", lambda: None)
    patch.setattr(fastjpeg, "missing", lambda: "no compiler")


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(crop=st.integers(1, 24), seed=st.integers(0, 99), bad=st.sets(st.integers(0, 119), max_size=4))
def test_every_decoder_of_libjpeg_turbo_gives_the_same_bits(crop, seed, bad):
    """Where a rank's host has no compiler, it still gets the batches of the others, damaged samples included."""
    with tempfile.TemporaryDirectory() as folder:
        noise = write_split(folder, [60, 60], 24, noisy_jpeg)
        for number in bad:
            damage(noise, number // 60, image_offset(noise, number // 60, number % 60) + 700, bytes(9))
        arguments = dict(global_batch=8, crop=crop, seed=seed, max_bad_fraction=1.0)
        expected = take(noise, 15, **arguments)
        with pytest.MonkeyPatch.context() as patch:
            without_fast_decoder(patch)
            assert same(take(noise, 15, **arguments), expected)


def test_pillow_alone_gives_nearly_the_same_and_says_so(photos, monkeypatch, caplog):
    expected = take(photos, 3, global_batch=8, crop=12)
    from job.batches import reader as worker
    from shards.read import images

    without_fast_decoder(monkeypatch)
    for module in (worker, images):
        monkeypatch.setattr(module, "simplejpeg", None)
    got = take(photos, 3, global_batch=8, crop=12)
    assert caplog.text.count("simplejpeg is not installed") == 1 and "images/s" in caplog.text
    for one, other in zip(got, expected, strict=True):
        assert (one[0].int() - other[0].int()).abs().max() <= 2
        assert torch.equal(one[1], other[1])
