"""The order of the data: every sample once an epoch, the same on any number of ranks, found at once anywhere."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.read.order import Order, batch_positions, crop_corner, draws, mirrored

SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63)
WINDOWS = st.sampled_from([1, 2, 7, 64, 1024])
STREAMS = st.sampled_from([1, 3, 8, 64])
EPOCHS = st.integers(0, 200)
examples = settings(deadline=None, max_examples=60)


@examples
@given(SIZES, SEEDS, WINDOWS, STREAMS, EPOCHS)
def test_every_sample_exactly_once_an_epoch(sizes, seed, window, streams, epoch):
    order = Order(sizes, seed, window, streams)
    n = sum(sizes)
    epochs, samples = order.samples(np.arange(epoch * n, (epoch + 1) * n))
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(samples), np.arange(n))


@examples
@given(SIZES, SEEDS, WINDOWS, STREAMS, st.integers(0, 1000), st.sampled_from([8, 16, 24, 256, 4096]))
def test_global_batch_is_the_same_for_every_world_size(sizes, seed, window, streams, step, global_batch):
    order = Order(sizes, seed, window, streams)
    alone = order.samples(batch_positions(step, 0, 1, global_batch))
    assert len(alone[0]) == global_batch
    for world_size in (2, 4, 8):
        # A new Order each: what an earlier step left in its tables must not matter.
        parts = [
            Order(sizes, seed, window, streams).samples(batch_positions(step, rank, world_size, global_batch))
            for rank in range(world_size)
        ]
        assert all(len(part[0]) == global_batch // world_size for part in parts)  # full, on every rank
        for both in (0, 1):
            assert np.array_equal(np.stack([part[both] for part in parts], axis=1).ravel(), alone[both])


@examples
@given(SIZES, SEEDS, st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 64, 512]), st.integers(1, 4))
def test_steps_of_all_ranks_cover_epochs_exactly_once(sizes, seed, world_size, global_batch, epochs):
    order = Order(sizes, seed)
    n = sum(sizes)
    steps = -(-epochs * n // global_batch)
    positions = [batch_positions(k, r, world_size, global_batch) for k in range(steps) for r in range(world_size)]
    of_epoch, samples = order.samples(np.concatenate(positions))
    for epoch in range(epochs):
        assert np.array_equal(np.sort(samples[of_epoch == epoch]), np.arange(n))
    # The tail rule: what is left of the last batch is the beginning of the next epoch.
    assert (of_epoch == epochs).sum() == min(steps * global_batch - epochs * n, n)


@examples
@given(SIZES, SEEDS, WINDOWS, STREAMS, st.data())
def test_any_position_is_found_without_those_before(sizes, seed, window, streams, data):
    n = sum(sizes)
    whole = Order(sizes, seed, window, streams).samples(np.arange(2 * n))
    at = np.array(data.draw(st.lists(st.integers(0, 2 * n - 1), min_size=1, max_size=50)))
    alone = Order(sizes, seed, window, streams).samples(at)
    assert np.array_equal(alone[0], whole[0][at]) and np.array_equal(alone[1], whole[1][at])


@examples
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12).filter(lambda s: sum(s) >= 500), SEEDS, EPOCHS)
def test_epochs_differ_and_do_not_correlate(sizes, seed, epoch):
    order = Order(sizes, seed)
    n = sum(sizes)
    first = np.argsort(order.epoch_samples(epoch, np.arange(n)))  # when each sample comes
    second = np.argsort(order.epoch_samples(epoch + 1, np.arange(n)))
    assert not np.array_equal(first, second)
    # Uncorrelated orders of n independent samples have a standard deviation of 1 / sqrt(n - 1). Ours are permuted in
    # blocks of up to n / 512 and shuffled again, so 512 takes n's place: six standard deviations.
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(512)


def test_orders_of_two_seeds_differ():
    everything = np.arange(3000)
    assert not np.array_equal(
        Order([3000], 1).epoch_samples(0, everything), Order([3000], 2).epoch_samples(0, everything)
    )


def test_classes_that_lie_together_are_mixed():
    """Shards of one class each, as a careless packer makes them: a batch still holds many classes."""
    order = Order([1300] * 1000, seed=3)
    for step in (0, 1, 2500):
        _, samples = order.samples(batch_positions(step, 0, 1, 256))
        assert len(set(samples // 1300)) > 60


def test_a_rank_reads_few_places_at_a_time():
    """What is sequential on disk is read so: in a shuffle window a stream touches a handful of places."""
    order = Order([1281] * 1000, seed=0)
    own = np.arange(5, 64 * 1024, 64)  # stream 5's first window
    samples = np.sort(order.epoch_samples(0, own))
    assert np.count_nonzero(np.diff(samples) != 1) <= 8


def test_resume_at_the_end_of_an_imagenet_epoch_is_immediate():
    began = time.process_time()
    order = Order([1281] * 1000, seed=7)
    order.samples(batch_positions(5003, 3, 8, 256))
    assert time.process_time() - began < 0.5


def test_order_stays_as_it_is():
    """A checkpoint of today must go on with tomorrow's version: these numbers may not change."""
    order = Order([100, 50, 250], seed=11, window=16, streams=4)
    assert order.samples(np.arange(398, 404))[1].tolist() == GOLDEN
    assert draws(11, np.array([0, 1]), np.array([5, 5])).tolist() == GOLDEN_DRAWS


GOLDEN = [237, 306, 41, 245, 162, 207]
GOLDEN_DRAWS = [12822303306702952479, 5744285804777894717]


@examples
@given(SEEDS, st.integers(1, 300), st.integers(0, 40), st.integers(0, 40))
def test_crops_lie_inside_the_image(seed, crop, more_rows, more_columns):
    words = draws(seed, np.zeros(500, np.int64), np.arange(500))
    top, left = crop_corner(words, crop + more_rows, crop + more_columns, crop)
    assert top.min() >= 0 and top.max() <= more_rows
    assert left.min() >= 0 and left.max() <= more_columns


def test_crop_and_mirror_depend_on_sample_and_epoch_and_are_even():
    words = draws(0, np.zeros(30000, np.int64), np.arange(30000))
    assert np.array_equal(words[:10], draws(0, np.zeros(10, np.int64), np.arange(10)))
    assert not np.array_equal(words[:10], draws(0, np.ones(10, np.int64), np.arange(10)))
    assert abs(mirrored(words).mean() - 0.5) < 0.02
    top, left = crop_corner(words, 256, 256, 227)
    for corner in (top, left):
        counts = np.bincount(corner.astype(int), minlength=30)
        assert len(counts) == 30 and counts.min() > 800 and counts.max() < 1200  # 1,000 each
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.03
    assert abs(np.corrcoef(top, mirrored(words))[0, 1]) < 0.03


def test_senseless_arguments_are_refused():
    for arguments in (([0], 0), ([5], 0, 0), ([5], 0, 16, 0)):
        with pytest.raises(ValueError):
            Order(*arguments)
