"""Samples by number and batches in the order of training, as notebooks read them."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from job.batches.loader import Loader
from shards import open_split, stream
from shards.errors import InputError
from shards.read.images import BadImage
from tests.launch import ROOT
from tests.shardmaker import damage, image_offset, raw_image, write_split


def test_every_sample_can_be_had_by_its_number(tmp_path):
    write_split(tmp_path, [3, 2], classes=[f"class {n}" for n in range(5)])
    samples = open_split(tmp_path, "train")
    assert len(samples) == 5 and samples.classes[4] == "class 4"
    for number, sample in enumerate(samples):
        assert np.array_equal(sample.image, raw_image(number, 8))
        assert (sample.label, sample.name, sample.key) == (number, f"class {number}", f"{number:08d}")
    assert samples[-1].label == 4 and [s.label for s in samples[1:4:2]] == [1, 3]
    with pytest.raises(IndexError):
        samples[5]
    with pytest.raises(InputError, match="no shards of split 'val'"):
        open_split(tmp_path, "val")


def test_worker_processes_open_the_shards_themselves(tmp_path):
    write_split(tmp_path, [3, 2])
    samples = open_split(tmp_path)
    assert samples[3].label == 3
    assert pickle.loads(pickle.dumps(samples))[4].name == "4"  # no class names: the label


def test_a_damaged_sample_is_named(tmp_path):
    split = write_split(tmp_path, [3, 2])
    damage(split, 0, image_offset(split, 0, 1) - 512, bytes(512))
    with pytest.raises(BadImage, match=r"sample 1 of .*train-000000.tar: its tar header"):
        open_split(tmp_path)[1]


@pytest.mark.parametrize("start", [0, 2])
def test_the_stream_is_that_of_training(demo_data, start):
    options = dict(seed=7, window=64, streams=16)
    found = stream(demo_data, "train", 32, start_step=start, **options)
    split = open_split(demo_data).split
    with Loader(
        split, rank=0, world_size=1, global_batch=32, crop=70, train=True, workers=0, start_step=start,
        random_crop=False, mirror=False, **options,
    ) as loader:  # fmt: skip
        for _ in range(3):
            mine, theirs = next(found), next(loader)
            assert mine.epoch == theirs.epoch and mine.labels.tolist() == theirs.labels.tolist()
            assert np.array_equal(mine.images, theirs.images.numpy())


def test_the_stream_replaces_damaged_samples_as_training_does(tmp_path):
    split = write_split(tmp_path, [4, 4])
    damage(split, 0, image_offset(split, 0, 2) - 512, bytes(512))
    batches = list(stream(tmp_path, batch=3, epochs=2))
    assert [len(batch.labels) for batch in batches] == [3, 3, 3, 3, 3, 1]
    labels = np.concatenate([batch.labels for batch in batches])
    assert np.bincount(labels, minlength=8).tolist() == [2, 2, 0, 4, 2, 2, 2, 2]  # sample 3 in the place of 2
    images = np.concatenate([batch.images for batch in batches])
    assert images[:, 0, 0, 2].tolist() == labels.tolist()


def test_images_of_several_sizes_come_as_a_list(tmp_path):
    def member(number):
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (8 + number, 9)).save(file, "PNG")
        return "png", file.getvalue()

    write_split(tmp_path, [4], member=member, fixed=False)
    (batch,) = stream(tmp_path, batch=4)
    assert sorted(image.shape for image in batch.images) == [(9, 8 + n, 3) for n in range(4)]


def test_wrong_numbers_are_refused(tmp_path):
    write_split(tmp_path, [4])
    with pytest.raises(InputError, match="1 or more"):
        stream(tmp_path, batch=0)


def test_importing_the_packages_is_quick():
    code = "import sys, job, shards; print([m for m in ('numpy', 'torch', 'yaml') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"
