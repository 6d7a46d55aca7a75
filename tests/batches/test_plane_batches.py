"""Batches of planes give the crops of the same JPEG bit for bit: by plain PyTorch, by the kernel, by any readers."""

import dataclasses
import json
import shutil

import horovod.torch as hvd
import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job import config
from job.batches.device import prepare, prepare_plain
from job.batches.loader import Loader
from job.batches.planes import crops_as_rgb, side_of
from job.inference.scores import centre_input
from job.look.augmented import first_crops
from job.network.alexnet import AlexNet
from job.run.validation import validate
from shards.read import planes
from shards.read.samples import Samples
from tests.launch import metrics, python
from tests.shardmaker import damage, image_offset, write_split
from tests.shards.test_planes import jpeg, picture

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def crops(files: list[bytes], size, corners, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parts of images as planes, their corners, and the same parts as libjpeg-turbo decodes them."""
    parts = np.full((len(files), planes.crop_bytes(side)), 77, np.uint8)
    for data, corner, luma, chroma in zip(files, corners, *planes.crop_views(parts, side), strict=True):
        planes.copy_crop(planes.from_jpeg(data), size, corner, luma, chroma)
    whole = [simplejpeg.decode_jpeg(data, "RGB") for data in files]
    expected = [image[top : top + side, left : left + side] for image, (top, left) in zip(whole, corners, strict=True)]
    return torch.from_numpy(parts), torch.tensor(corners, dtype=torch.int32), torch.from_numpy(np.stack(expected))


def corners_of(size, side: int) -> list[tuple[int, int]]:
    """Corners at each edge and inside, at odd and even places."""
    ends = [sorted({0, 1, 2, n - side - 2, n - side - 1, n - side} & set(range(n - side + 1))) for n in size]
    return [(top, left) for top in ends[0] for left in ends[1]]


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(16, 60), st.integers(16, 60)),
    kind=st.sampled_from(["noise", "extremes", "smooth"]),
    colour=st.sampled_from(["4:2:0", "4:2:0", "grey"]),
    seed=st.integers(0, 1 << 30),
    draw=st.data(),
)
def test_any_crop_is_that_of_the_full_decode(size, kind, colour, seed, draw):
    side = draw.draw(st.integers(1, min(size)))
    corner = draw.draw(st.tuples(*(st.integers(0, n - side) for n in size)))
    images, offsets, expected = crops([jpeg(picture(seed, *size, kind), colour)], size, [corner], side)
    assert torch.equal(crops_as_rgb(images, offsets), expected) and side_of(images) == side


@pytest.mark.parametrize("size,side", [((33, 38), 21), ((32, 32), 32), ((35, 31), 31), ((40, 33), 28), ((17, 16), 16)])
def test_every_edge_and_parity(size, side):
    corners = corners_of(size, side)
    files = [jpeg(picture(n, *size, "noise"), "grey" if n % 5 == 4 else "4:2:0") for n in range(len(corners))]
    images, offsets, expected = crops(files, size, corners, side)
    assert torch.equal(crops_as_rgb(images, offsets), expected)
    images, offsets, expected = (t.to(DEVICE) for t in (images, offsets, expected))
    mirror = torch.arange(len(files), device=DEVICE) % 2 == 1
    mean = 255 * torch.rand(*size, 3, device=DEVICE)
    assert torch.equal(prepare(images, offsets, mirror, mean), prepare_plain(expected, offsets, mirror, mean))
    assert crops_as_rgb(expected, offsets) is expected  # RGB passes through


@pytest.mark.parametrize("mean", ["image", "colour", None])
def test_the_kernel_agrees(monkeypatch, mean):
    """On a GPU, or in Triton's interpreter: the fast network's input is that of the same crops in RGB."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from job.fast.network import Network

    size, side = (83, 78), 70
    corners = [(13, 8), (0, 0), (12, 7), (5, 0), (0, 3)][: 5 if mean == "image" else 2]
    files = [jpeg(picture(n, *size, ("noise", "extremes")[n % 2]), "grey" if n == 4 else "4:2:0") for n in range(5)]
    files = files[: len(corners)]
    images, offsets, expected = (t.to(DEVICE) for t in crops(files, size, corners, side))
    mirror = torch.tensor([0, 1, 0, 1, 0], dtype=torch.bool, device=DEVICE)[: len(corners)]
    shape = {"image": (*size, 3), "colour": (1, 1, 3), None: None}[mean]
    mean = None if shape is None else 255 * torch.rand(shape, device=DEVICE)
    model = AlexNet(5, side, "none", 0.0, 0.1, False).to(DEVICE)
    network = Network(model, len(corners), torch.float32, graphs=False)
    by_planes = network.prepare(images, offsets, mirror, mean).clone()
    network.images.fill_(float("nan"))
    by_rgb = network.prepare(expected, offsets, mirror, mean)
    assert torch.equal(by_planes, by_rgb) and not by_rgb.isnan().any()
    if mean is None or mean.shape[:2] == (1, 1):
        return
    smaller = 255 * torch.rand(*(n - 3 for n in size), 3, device=DEVICE)  # conv1 reads 68 pixels: one beyond it
    found = network.prepare(images, offsets, mirror, smaller).isnan().any(dim=(1, 2, 3))
    assert found.tolist() == [top == 13 or left == 8 for top, left in corners]


# ---- from shards ------------------------------------------------------------------------------------------------

SIZE, CROP = (37, 42), 21


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """The same images as JPEG files and as planes."""
    files = [jpeg(picture(n, *SIZE), "grey" if n % 7 == 0 else "4:2:0") for n in range(90)]
    root = tmp_path_factory.mktemp("splits")
    made = {}
    for name, member in (
        ("jpeg", lambda n: ("jpg", files[n])),
        ("planes", lambda n: ("yuv", planes.from_jpeg(files[n]))),
    ):
        split = write_split(root / name, [40, 1, 49], member=member)
        made[name] = dataclasses.replace(split, encoding=name, height=SIZE[0], width=SIZE[1])
    return made


def take(split, steps: int, **changes) -> list[tuple]:
    """RGB crops, labels, offsets and mirror of so many batches."""
    arguments = dict(rank=0, world_size=1, global_batch=16, crop=CROP, seed=3, workers=0)
    with Loader(split, **{**arguments, **changes}) as loader:
        found = []
        for _, batch in zip(range(steps), loader, strict=False):
            parts = crops_as_rgb(batch.images, batch.offsets), batch.labels, batch.offsets, batch.mirror
            found.append([part.clone() for part in parts])
        return found


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_jpeg_files(splits, workers):
    jpegs = take(splits["jpeg"], 20)
    assert same(take(splits["planes"], 20, workers=workers), jpegs)
    assert same(take(splits["planes"], 8, workers=workers, start_step=12), jpegs[12:])  # resumed
    for rank in range(2):
        own = take(splits["planes"], 20, rank=rank, world_size=2)
        assert same(own, [[part[rank::2] for part in batch] for batch in jpegs])
    assert same(take(splits["planes"], 9, train=False), take(splits["jpeg"], 9, train=False))


def test_slots_are_about_half_as_large(splits):
    sizes = {}
    for name, split in splits.items():
        with Loader(split, rank=0, world_size=1, global_batch=256, crop=37, workers=0) as loader:
            sizes[name] = loader.nbytes
    assert sizes["planes"] < 0.6 * sizes["jpeg"]


def test_a_damaged_image_is_replaced_as_that_of_a_jpeg(splits, tmp_path):
    files = [jpeg(picture(n, *SIZE)) for n in range(6)]
    made = [planes.from_jpeg(data) for data in files]
    good = write_split(tmp_path / "good", [6], member=lambda n: ("yuv", made[n]))
    bad = write_split(tmp_path / "bad", [6], member=lambda n: ("yuv", made[n][: 2000 if n == 2 else None]))
    arguments = dict(train=False, global_batch=6, max_bad_fraction=1.0)
    good, bad = (dataclasses.replace(s, encoding="planes", height=SIZE[0], width=SIZE[1]) for s in (good, bad))
    (whole,), (replaced,) = take(good, 1, **arguments), take(bad, 1, **arguments)
    assert replaced[1].tolist() == [0, 1, 3, 3, 4, 5] and torch.equal(replaced[0], whole[0][[0, 1, 3, 3, 4, 5]])
    damage(good, 0, image_offset(good, 0, 4) - 512, bytes(512))
    assert take(good, 1, **arguments)[0][1].tolist() == [0, 1, 2, 3, 5, 5]


def test_validation_subtracts_the_mean_of_the_centre(splits, monkeypatch):
    """The centre crop lies at an odd place: its planes must be read so, though the mean is that of the crop."""
    monkeypatch.setattr(hvd, "rank", lambda: 0)
    monkeypatch.setattr(hvd, "size", lambda: 1)
    monkeypatch.setattr(hvd, "allreduce", lambda tensor, **_: tensor)

    class Seen(torch.nn.Module):
        def forward(self, images):
            seen.append(images.clone())
            return images.new_zeros(len(images), 90)

    found = {}
    for name, split in splits.items():
        seen = []
        mean = torch.arange(3 * 31 * 31.0).view(3, 31, 31)
        with Loader(split, rank=0, world_size=1, global_batch=30, crop=31, train=False, workers=0) as loader:
            assert validate(Seen(), loader, mean, torch.device("cpu"), "fp32")["samples"] == 90
        found[name] = torch.cat(seen)
    assert torch.equal(found["jpeg"], found["planes"]) and (SIZE[0] - 31) // 2 % 2 == 1


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "no mean"])
def test_networks_get_rgb_whatever_is_stored(splits, mean):
    """`centre_input`: also of a model that takes the uint8 images, as for ten crops."""
    seen = {}
    for name, split in splits.items():
        to_input = centre_input(torch.rand(3, 31, 31, generator=torch.manual_seed(0)) if mean else None, "cpu")
        with Loader(split, rank=0, world_size=1, global_batch=90, crop=31, train=False, workers=0) as loader:
            (batch,) = loader
            seen[name] = to_input(batch.images, batch.offsets, batch.mirror).clone()
    assert torch.equal(seen["jpeg"], seen["planes"])


def test_people_see_rgb_too(splits):
    """Samples of a split by number, and crops as training gets them, for a page of pictures."""
    settings = dataclasses.replace(config.parse(["--recipe", "demo", "--data", "d"], "job.train", ""), image_size=31)
    found = {}
    for name, split in splits.items():
        with Samples(split) as samples:
            found[name] = [samples[n].image for n in (0, 41, 89)]
        found[name] += [crop.image for crop in first_crops(split, settings, 6)]
    assert all((a == b).all() for a, b in zip(found["jpeg"], found["planes"], strict=True)) and len(found["jpeg"]) == 9


def test_training_from_planes_is_training_from_jpeg_bit_for_bit(demo_data, tmp_path):
    """Packed with the same options, and with validation on JPEG shards beside them; evaluated on planes."""
    done = python("shards.pack", "shards/demo", str(tmp_path / "planes"), "--resize", "70", "--encoding", "planes")
    assert done.returncode == 0, done.stderr
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "planes", mixed, ignore=shutil.ignore_patterns("val*", ".pack"))
    for path in demo_data.glob("val*"):
        shutil.copy(path, mixed)
    small = "--recipe demo --model.width 0.0625 --global-batch 64 --max-steps 4 --log-every 1 --workers 1".split()
    for data in (demo_data, mixed):
        done = python("job.train", *small, "--data", str(data), "--out", str(tmp_path / f"run-{data.name}"))
        assert done.returncode == 0, done.stdout + done.stderr
    jpeg_run, planes_run = tmp_path / f"run-{demo_data.name}", tmp_path / "run-mixed"
    for kind in ("train", "val"):
        by_jpeg, by_planes = ([m["loss"] for m in metrics(run, kind)] for run in (jpeg_run, planes_run))
        assert by_jpeg == by_planes and by_jpeg
    done = python("job.evaluate", str(planes_run), "--data", str(tmp_path / "planes"), "--workers", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["loss"] == pytest.approx(by_jpeg[-1], rel=1e-6)
