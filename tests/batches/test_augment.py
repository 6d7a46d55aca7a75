"""Mean subtraction, mirror, cast and layout: as published, and the same by the plain way and by the kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.batches import device as augment
from job.batches.device import load_mean, prepare, prepare_plain, prepare_triton, to_device
from job.batches.loader import Loader
from shards.errors import InputError
from shards.format.split import load_split
from tests.shardmaker import write_split

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def case(n, crop, height, width, mean, seed=0):
    """A batch, and what `prepare` should make of it, image by image in numpy."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (n, crop, crop, 3), dtype=np.uint8)
    offsets = np.stack(
        [random.integers(0, height - crop + 1, n), random.integers(0, width - crop + 1, n)], axis=1
    ).astype(np.int32)
    mirror = random.random(n) < 0.5
    shape = {"image": (height, width, 3), "channel": (1, 1, 3), None: None}[mean]
    mean = None if shape is None else (255 * random.random(shape)).astype(np.float32)
    expected = np.empty((n, 3, crop, crop), np.float32)
    for i, (top, left) in enumerate(offsets):
        image = images[i].astype(np.float32)
        if mean is not None:
            part = mean if mean.shape[:2] == (1, 1) else mean[top : top + crop, left : left + crop]
            image = image - part  # the mean is subtracted where the crop was taken, and only then all is mirrored
        if mirror[i]:
            image = image[:, ::-1]
        expected[i] = image.transpose(2, 0, 1)
    arrays = [torch.from_numpy(a) for a in (images, offsets, mirror)]
    return arrays + [None if mean is None else torch.from_numpy(mean)], torch.from_numpy(expected)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 5),
    crop=st.integers(1, 9),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    mean=st.sampled_from(["image", "channel", None]),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_plain_way_is_the_definition(n, crop, more, mean, channels_last, seed):
    arguments, expected = case(n, crop, crop + more[0], crop + more[1], mean, seed)
    for dtype in (torch.float32, torch.bfloat16):
        out = prepare_plain(*arguments, dtype, channels_last)
        assert out.dtype == dtype and torch.equal(out, expected.to(dtype))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert out.is_contiguous(memory_format=layout)


def kernel_agrees(device, bf16_tolerance=0.0):
    for mean in ("image", "channel", None):
        for n, crop, height, width in ((3, 7, 7, 7), (2, 21, 30, 25), (1, 67, 70, 70)):
            arguments, expected = case(n, crop, height, width, mean)
            arguments = [a if a is None else a.to(device) for a in arguments]
            for dtype in (torch.float32, torch.bfloat16):
                for channels_last in (False, True):
                    kernel = prepare_triton(*arguments, dtype, channels_last)
                    plain = prepare_plain(*arguments, dtype, channels_last)
                    tolerance = bf16_tolerance if dtype == torch.bfloat16 else 0.0
                    torch.testing.assert_close(kernel, plain, rtol=tolerance, atol=0)
                    torch.testing.assert_close(kernel.cpu(), expected.to(dtype), rtol=tolerance, atol=0)
                    assert kernel.stride() == plain.stride() or n == 1


@gpu
def test_without_a_compiler_the_device_pass_is_plain(monkeypatch):
    monkeypatch.setattr(augment, "triton_lacks", lambda: "Triton needs a C compiler")
    augment._kernel.cache_clear()
    try:
        assert augment._kernel() is None
    finally:
        augment._kernel.cache_clear()


@pytest.mark.gpu
def test_kernel_agrees_with_plain_way():
    kernel_agrees("cuda")
    nothing_beyond_the_mean_image_is_read("cuda")


def test_kernel_agrees_in_the_interpreter(monkeypatch):
    """The kernel's arithmetic on a machine without a GPU: Triton can interpret it, where it is installed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to run it on")
    kernel_agrees("cpu", bf16_tolerance=2**-7)  # the interpreter cuts off where a GPU rounds
    nothing_beyond_the_mean_image_is_read("cpu")


def nothing_beyond_the_mean_image_is_read(device):
    """A mean image of smaller images: the loss must show it."""
    arguments, _ = case(3, 7, 9, 12, "image")
    images, _, mirror, mean = (a.to(device) for a in arguments)
    offsets = torch.tensor([[2, 5], [3, 0], [0, 6]], dtype=torch.int32, device=device)
    found = prepare_triton(images, offsets, mirror, mean)
    assert found.isnan().any(dim=(1, 2, 3)).tolist() == [False, True, True]
    assert found.isnan().sum(dim=(1, 2, 3)).tolist() == [0, 7 * 3, 7 * 3]  # the last row, the last column


def without_mean(images, offsets, mirror):
    return prepare(images, offsets, mirror, None)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_reach_the_gpu_whole(tmp_path, workers):
    """Copies beside compute: what arrives is what was read, though slots and buffers are used again and again."""
    split = write_split(tmp_path, [3000], 32)
    arguments = dict(rank=0, world_size=1, global_batch=256, crop=24, seed=1)
    with (
        Loader(split, **arguments, workers=0) as plain,
        Loader(split, **arguments, workers=workers, pin=True) as pinned,
    ):
        batches = to_device(pinned, "cuda", without_mean)
        kept = []
        for _ in range(40):
            expected = next(plain)
            _, images, labels = next(batches)
            torch.mm(torch.ones(2048, 2048, device="cuda"), torch.ones(2048, 2048, device="cuda"))
            plainly = prepare(expected.images, expected.offsets, expected.mirror, None)
            kept.append((images, labels, plainly, expected.labels.clone()))
        for images, labels, expected_images, expected_labels in kept:
            assert torch.equal(images.cpu(), expected_images) and torch.equal(labels.cpu(), expected_labels)
        batches.close()


def test_batches_to_the_cpu(tmp_path):
    split = write_split(tmp_path, [40], 12)
    np.save(tmp_path / "mean.npy", np.full((12, 12, 3), 10, np.float32))
    arguments = dict(rank=0, world_size=1, global_batch=8, crop=9, workers=0)
    with Loader(split, **arguments) as loader, Loader(split, **arguments) as again:
        for batch, (item, images, labels), _ in zip(
            loader, to_device(again, "cpu", without_mean), range(5), strict=False
        ):
            assert item.step == batch.step and torch.equal(labels, batch.labels)
            assert images.shape == (8, 3, 9, 9)
            for image, crop, mirrored in zip(images, batch.images, batch.mirror, strict=True):
                crop = crop.flip(1) if mirrored else crop
                assert torch.equal(image, crop.permute(2, 0, 1).float())


def with_mean(folder, mean, **image):
    split = write_split(folder, [2], 12, **image)
    np.save(folder / "mean.npy", mean)
    return type(split)(**{**vars(split), "mean": "mean.npy"})


def test_mean_image_of_a_split(tmp_path):
    mean = np.random.default_rng(0).random((12, 12, 3)).astype(np.float32)
    assert torch.equal(load_mean(with_mean(tmp_path, mean)), torch.from_numpy(mean))
    assert load_mean(load_split(str(tmp_path), "train")) is None
    # Images of no fixed size: one colour.
    colour = load_mean(with_mean(tmp_path, mean, fixed=False))
    assert colour.shape == (1, 1, 3) and torch.allclose(colour[0, 0], torch.from_numpy(mean.mean((0, 1))))


@pytest.mark.parametrize(
    "mean,message",
    [
        (np.zeros((10, 12, 3), np.float32), "is 12x10, the images are 12x12"),
        (np.zeros((12, 12), np.float32), "is not a mean image"),
        (np.full((12, 12, 3), np.nan, np.float32), "is not a mean image"),
        (np.zeros((12, 12, 3), "U1"), "is not a mean image"),
    ],
)
def test_wrong_mean_image_is_refused(tmp_path, mean, message):
    with pytest.raises(InputError, match=message):
        load_mean(with_mean(tmp_path, mean))


def test_missing_mean_image_is_named(tmp_path):
    split = with_mean(tmp_path, np.zeros((12, 12, 3), np.float32))
    (tmp_path / "mean.npy").unlink()
    with pytest.raises(InputError, match="mean.npy"):
        load_mean(split)
