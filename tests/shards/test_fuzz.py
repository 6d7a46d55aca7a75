"""Random damage to a shard, its index or its labels: verify finds it, training never gives a wrong label or hangs."""

import contextlib
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest

import tars
from shards import index, verify
from shards.errors import InputError
from shards.format.split import load_split, parse_npy
from shards.format.tar import BLOCK, open_tar, samples

SIZE = 48  # pixels of an image
SHARDS = (5, 5)
CLASSES = 5
LIMIT_SECONDS = 30  # of one case; sound or damaged, each takes a fraction of a second


@contextlib.contextmanager
def in_time():
    """Raise when a case hangs."""

    def late(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two sound sets: packed, with checksums, and foreign, with none."""
    packed, foreign = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("foreign")
    tars.make_split(packed, SHARDS, CLASSES)
    for name in os.listdir(packed):
        if name.endswith(".tar"):
            shutil.copy(packed / name, foreign / name)
    index.main([str(foreign), "--workers", "1"])
    return {"packed": packed, "foreign": foreign}


def damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The data with something wrong with it, and what."""
    place = rng.randrange(len(data))
    kind = rng.choice(
        ["bit", "bit", "bit", "byte", "burst", "zeros", "cut", "cut-at-a-block", "lost", "twice", "grown"]
    )
    length = min(rng.choice([1, 16, 512, 4096]), len(data) - place)
    if kind == "bit":
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed), f"bit at {place}"
    if kind == "byte":
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :], f"byte at {place}"
    if kind == "burst":
        return data[:place] + rng.randbytes(length) + data[place + length :], f"{length} bytes at {place}"
    if kind == "zeros":
        return data[:place] + bytes(length) + data[place + length :], f"{length} zeros at {place}"
    if kind == "cut":
        return data[:place], f"cut at {place}"
    if kind == "cut-at-a-block":
        return data[: place // BLOCK * BLOCK], f"cut at {place // BLOCK * BLOCK}"
    if kind == "lost":
        return data[:place] + data[place + length :], f"{length} bytes lost at {place}"
    if kind == "twice":
        return data[: place + length] + data[place:], f"{length} bytes twice at {place}"
    return data + rng.randbytes(length), f"{length} bytes more"


def cases(folder, original, names, count, seed):
    """`count` times a fresh copy of a set with one of the named files damaged."""
    rng = random.Random(seed)
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        path = folder / rng.choice(names)
        before = path.read_bytes()
        after, what = damage(before, rng)
        if after != before:
            path.write_bytes(after)
            yield f"{path.name}: {what}"


def verified(folder, *options) -> int:
    """Exit code of verify; bad input is its code 2."""
    try:
        return verify.main([str(folder), "--workers", "1", *options])
    except InputError as error:
        assert "\n" not in str(error)
        return 2


TARS = ["train-000000.tar", "train-000001.tar"]


def test_verify_finds_all_damage_where_checksums_are_recorded(originals, tmp_path, capsys):
    for case in cases(tmp_path / "set", originals["packed"], TARS, 300, seed=1):
        with in_time():
            assert verified(tmp_path / "set") == 2, case


@pytest.mark.parametrize("options", [(), ("--skip-bad",)])
def test_index_loses_no_sample_without_a_word(originals, tmp_path, capsys, options):
    """Each shard that has fewer samples than before is named, in a line; without --skip-bad it is an error."""
    folder = tmp_path / "set"
    refused = told = 0
    for case in cases(folder, originals["foreign"], TARS, 200, seed=8):
        for name in ("train.json", "train.labels.npy", "train-000000.idx", "train-000001.idx"):
            os.unlink(folder / name)
        capsys.readouterr()
        with in_time():
            try:
                assert index.main([str(folder), "--workers", "1", *options]) == 0
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 500 and case[:16] in str(error), case
                refused += 1
                continue
            said = capsys.readouterr().out
            found = [shard.nsamples for shard in load_split(str(folder), "train").shards]
            if found != list(SHARDS):
                assert options and f"\n  {case[:16]}: " in said, case
                told += 1
    assert told > 60 if options else refused > 100


def places(folder) -> dict[str, list]:
    """Where all members lie, and what their labels say, in each tar as it is now."""
    found = {}
    for name in TARS:
        with open_tar(str(folder / name)) as (read, size):
            labels = [
                (m.name, m.offset, m.size, read(m.offset, m.size) if m.ext == "cls" else b"")
                for s in samples(read, size, damage=[])
                for m in s
            ]
        found[name] = labels
    return found


def test_verify_finds_without_checksums_whatever_can_be_seen(originals, tmp_path, capsys):
    """What goes unseen is within the data of an image that still decodes, in padding, or has no meaning."""
    folder, unseen, total = tmp_path / "set", 0, 0
    sound = places(originals["foreign"])
    for case in cases(folder, originals["foreign"], TARS, 300, seed=2):
        with in_time():
            total += 1
            if verified(folder) == 0:
                unseen += 1
                assert places(folder) == sound, case
    assert unseen < total / 3


def test_repair_always_ends_in_a_set_that_verifies_and_has_right_labels(originals, tmp_path, capsys):
    folder = tmp_path / "set"
    true = {tars.image(number): number % CLASSES for number in range(sum(SHARDS))}
    everything = [*TARS, *TARS, "train-000000.idx", "train.labels.npy", "train.crc32.npy"]
    lost = []
    for case in cases(folder, originals["packed"], everything, 120, seed=3):
        with in_time():
            before = {name: (folder / name).read_bytes() for name in TARS}
            assert verified(folder, "--repair") == 0, case
            assert verified(folder) == 0, case
            assert {name: (folder / name).read_bytes() for name in TARS} == before, case
            split = load_split(str(folder), "train")
            lost.append(sum(SHARDS) - split.nsamples)
            for image, label in read_all(split):
                assert true[image] == label, case  # bit for bit one of the packed images, with its label
    assert np.mean(lost) < 2  # a damaged place costs the samples that it touches, not the shard


def read_all(split):
    """(image bytes, label) of all samples, by the index."""
    from shards.format.split import image_member, load_labels, read_idx

    labels = iter(load_labels(split).tolist())
    for shard in split.shards:
        with open(split.path(shard.url), "rb") as file:
            for sample in read_idx(split, shard):
                member = image_member(sample, split.encoding)
                yield os.pread(file.fileno(), member.size, member.offset), next(labels)


def epoch(folder, bad_allowed: float = 1):
    """All batches of a set as training reads them."""
    from job.batches.loader import Loader

    split = load_split(str(folder), "train")
    options = {"rank": 0, "world_size": 1, "global_batch": 4, "crop": 40, "max_bad_fraction": bad_allowed}
    with Loader(split, train=False, workers=0, **options) as loader:
        for batch in loader:
            yield batch.images.numpy().astype(np.int16), batch.labels.tolist(), batch.bad


@pytest.mark.parametrize("kind", ["packed", "foreign"])
def test_training_never_gives_a_wrong_label(originals, tmp_path, kind):
    """Damage of any file of the set ends in one line, or in batches in which every image has its own label."""
    pytest.importorskip("torch")
    pixels = np.concatenate([images for images, _, _ in epoch(originals[kind])])
    folder = tmp_path / "set"
    files = [*TARS, *TARS, "train-000000.idx", "train-000001.idx", "train.labels.npy"]
    refused = replaced = seen = 0
    for case in cases(folder, originals[kind], files, 150, seed=4):
        with in_time():
            try:
                for images, labels, bad in epoch(folder):
                    replaced += bad
                    for image, label in zip(images, labels, strict=True):
                        distance = np.abs(pixels - image).mean((1, 2, 3))
                        nearest = int(distance.argmin())
                        if distance[nearest] < 4:  # one of the packed images, perhaps with a few damaged blocks
                            seen += 1
                            assert nearest % CLASSES == label, case
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused and replaced and seen > 300


@pytest.mark.parametrize("loss", ["samples", "a whole shard's"])
def test_a_repaired_set_trains(originals, tmp_path, capsys, loss):
    pytest.importorskip("torch")
    from job.batches.loader import Loader

    folder = tmp_path / "set"
    shutil.copytree(originals["packed"], folder)
    if loss == "samples":
        tars.flip(folder / TARS[0], 1024 + 5)
        tars.flip(folder / TARS[1], 1536 + 300)
    else:
        (folder / TARS[0]).write_bytes(bytes(5000))
    assert verified(folder, "--repair") == 0
    split = load_split(str(folder), "train")
    assert split.nsamples == (8 if loss == "samples" else 5)
    assert sum(len(labels) for _, labels, bad in epoch(folder, bad_allowed=0) if not bad) == split.nsamples
    with Loader(split, rank=0, world_size=1, global_batch=4, crop=40, workers=0, max_bad_fraction=0) as loader:
        for _, batch in zip(range(2 * split.nsamples), loader, strict=False):
            assert len(batch.labels) == 4 and batch.bad == 0


def test_worker_processes_do_not_hang_on_damage(originals, tmp_path):
    pytest.importorskip("torch")
    from job.batches.loader import Loader

    folder = tmp_path / "set"
    for case in cases(folder, originals["packed"], TARS, 3, seed=5):
        with in_time():
            try:
                split = load_split(str(folder), "train")
                with Loader(
                    split, rank=0, world_size=1, global_batch=4, crop=32, workers=1, max_bad_fraction=1
                ) as loader:
                    for _, batch in zip(range(6), loader, strict=False):
                        assert len(batch.labels) == 4, case
            except InputError as error:
                assert "\n" not in str(error)


def test_a_damaged_index_file_is_one_line_or_a_report(originals, tmp_path, capsys):
    """Whatever stands in <split>.json: no traceback, no hang."""
    folder = tmp_path / "set"
    for _ in cases(folder, originals["packed"], ["train.json"], 150, seed=6):
        with in_time():
            verified(folder, "--no-decode")
            with contextlib.suppress(InputError):
                load_split(str(folder), "train")
    hostile = [
        {"shardlist": None},
        {"shardlist": [{"url": "train-000000.tar", "nsamples": 10**12}]},
        {"shardlist": [{"url": 5, "nsamples": "x"}]},
        {"shardlist": [{"url": "train-000000.tar", "nsamples": 5, "bad": [-1, 10**30]}]},
        {"classes": 7},
        {"class_counts": "many"},
        {"labels": "/dev/zero"},
        {"labels": "."},
        {"labels": "fifo"},
        {"shardlist": [{"url": "fifo", "nsamples": 5}]},
        {"mean": "train-000000.tar"},
        {"image": {"encoding": "raw", "height": 10**9, "width": 10**9}},
        {"label": {"member": 5, "key": []}},
        {"wids_version": 2},
    ]
    for changes in hostile:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals["packed"], folder)
        tars.edit_json(folder / "train.json", **changes)
        os.mkfifo(folder / "fifo")
        with in_time():
            assert verified(folder) == 2, changes
    (folder / "train.json").write_text("[" * 100_000)
    assert verified(folder) == 2
    (folder / "train.json").write_text(json.dumps([1, 2]))
    assert verified(folder) == 2


def test_a_damaged_array_file_is_one_error(originals):
    data = (originals["packed"] / "train.labels.npy").read_bytes()
    assert parse_npy(data).tolist() == [i % CLASSES for i in range(sum(SHARDS))]
    rng = random.Random(7)
    for _ in range(500):
        with in_time(), contextlib.suppress(ValueError):
            parse_npy(damage(data, rng)[0])
    huge = data.replace(b"(10,)", b"(9999999999999,)".ljust(5)).replace(b" " * 11, b"", 1)
    for wrong in (b"", b"PK\x03\x04", huge, data.replace(b"<i4", b"|O "), data + b"x"):
        with pytest.raises(ValueError):
            parse_npy(wrong)
