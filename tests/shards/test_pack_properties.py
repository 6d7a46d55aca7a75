"""Packing for any images, any settings, any division of the work: nothing lost, nothing mixed up, the same bytes."""

import collections
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import pack
from shards.errors import InputError
from shards.format.split import image_member, load_labels, load_split, read_idx
from shards.read import images
from shards.sources import find as sources
from shards.sources.items import SourceReader
from shards.sources.mat import load_mat
from shards.write.finish import finish
from shards.write.plan import prepare, remaining, shuffled
from shards.write.shard import Options, Packer, bounds
from tests import imagenet40

SETTINGS = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def image_file(seed: int, height: int, width: int, kind: str) -> bytes:
    """An image file of any size and kind, different for each seed."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    file = io.BytesIO()
    mode, form = {"rgb": ("RGB", "JPEG"), "grey": ("L", "JPEG"), "cmyk": ("CMYK", "JPEG")}.get(kind, (kind, "PNG"))
    image.convert(mode).save(file, form)
    return file.getvalue()


FILES = st.lists(
    st.tuples(
        st.integers(0, 4),  # class
        st.integers(1, 70),
        st.integers(1, 70),
        st.sampled_from(["rgb", "grey", "cmyk", "RGBA", "P", "1", "I;16", "LA"]),
    ),
    min_size=1,
    max_size=30,
)


def pack_divided(source: str, dest: str, options: Options, owners) -> None:
    """Pack as several processes would: `owners(shards)` gives (process, shard) in the order in which they are done."""
    os.makedirs(f"{dest}/.pack")
    packings = [prepare(items, dest, options) for items in sources.find(source)]
    shards, records = remaining(packings)
    packers: dict[int, Packer] = collections.defaultdict(lambda: Packer(packings))
    for process, shard in owners(shards):
        records[shard] = packers[process].pack(*shard, lambda count: None)
    for packer in packers.values():
        packer.close()
    finish(packings, records, 0, worked=True)


def digests(dest: str) -> dict[str, str]:
    paths = [path for path in glob.glob(f"{dest}/*") if os.path.isfile(path)]
    return {os.path.basename(path): hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}


def stored(dest: str, split: str = "train") -> list[tuple[int, bytes]]:
    """Label and image of all samples, by the index alone."""
    found = load_split(dest, split)
    labels = iter(load_labels(found).tolist())
    samples = []
    for shard in found.shards:
        data = open(found.path(shard.url), "rb").read()
        for sample in read_idx(found, shard):
            label = next(m for m in sample if m.ext == "cls")
            image = image_member(sample, found.encoding)
            samples.append((next(labels), data[image.offset : image.offset + image.size]))
            assert int(data[label.offset : label.offset + label.size]) == samples[-1][0]
    return samples


@SETTINGS
@given(
    files=FILES,
    shard_images=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    options=st.sampled_from(
        [
            Options(encoding="copy", resize=0, fit="none", quality=0),
            Options(resize=24),
            Options(resize=16, fit="squash", quality=75),
            Options(resize=20, fit="none"),
            Options(resize=0),
            Options(resize=24, encoding="raw", quality=0),
            Options(resize=25, encoding="planes"),
        ]
    ),
    data=st.data(),
)
def test_nothing_lost_and_same_bytes_however_the_work_is_divided(files, shard_images, seed, options, data):
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/source/train"
        given_files = []
        for number, (label, height, width, kind) in enumerate(files):
            content = image_file(number, height, width, kind)
            os.makedirs(f"{source}/class{label}", exist_ok=True)
            with open(f"{source}/class{label}/{number}.JPEG", "wb") as file:
                file.write(content)
            given_files.append((f"class{label}", content))

        def any_division(shards):
            order = data.draw(st.permutations(shards))
            return [(data.draw(st.integers(0, 3)), shard) for shard in order]

        options = dataclasses.replace(options, seed=seed, shard_images=shard_images)
        pack_divided(f"{folder}/source", f"{folder}/one", options, lambda shards: [(0, shard) for shard in shards])
        pack_divided(f"{folder}/source", f"{folder}/some", options, any_division)
        assert digests(f"{folder}/one") == digests(f"{folder}/some")

        fields = json.load(open(f"{folder}/one/train.json"))
        samples = stored(f"{folder}/one")
        if options.encoding == "copy":
            assert sorted((fields["classes"][label], content) for label, content in samples) == sorted(given_files)
        counts = collections.Counter(fields["classes"][label] for label, _ in samples)
        assert counts == collections.Counter(name for name, _ in given_files)
        assert fields["class_counts"] == [counts[name] for name in fields["classes"]]
        sizes = [shard["nsamples"] for shard in fields["shardlist"]]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= shard_images
        if options.fit != "none" and options.resize:
            mean = np.load(f"{folder}/one/mean.npy")
            assert mean.shape == (options.resize, options.resize, 3)


@SETTINGS
@given(count=st.integers(1, 10**7), shards=st.integers(1, 5000))
def test_bounds_cover_everything_once_and_evenly(count, shards):
    shards = min(shards, count)
    edges = [bounds(count, shards, shard) for shard in range(shards)]
    assert edges[0][0] == 0 and edges[-1][1] == count
    assert all(before[1] == after[0] for before, after in zip(edges, edges[1:], strict=False))
    sizes = {last - first for first, last in edges}
    assert max(sizes) - min(sizes) <= 1


@SETTINGS
@given(count=st.integers(0, 3000), seed=st.integers(0, 2**63))
def test_shuffle_is_a_permutation_by_seed_and_split(count, seed):
    order = shuffled(count, seed, "train")
    assert sorted(order.tolist()) == list(range(count))
    assert (order == shuffled(count, seed, "train")).all()
    if count > 20:
        assert (order != shuffled(count, seed + 1, "train")).any()
        assert (order != shuffled(count, seed, "val")).any()


def test_shuffle_is_the_same_on_every_machine():
    # Written down once: a resumed pack must find the order of its first run, with whatever numpy.
    assert shuffled(10, 7, "train").tolist() == [8, 5, 1, 7, 9, 2, 6, 3, 0, 4]


def _die_at(operation: int, source: str, dest: str) -> bool:
    """Pack in a process that is killed before it makes its n-th change to a file or folder; whether it was."""
    child = os.fork()
    if not child:
        count = itertools.count()

        def counted(change):
            def wrapper(*arguments, **more):
                if next(count) == operation:
                    os._exit(99)
                return change(*arguments, **more)

            return wrapper

        for name in ("replace", "unlink", "fsync", "makedirs"):
            setattr(os, name, counted(getattr(os, name)))
        sys.stdout = open(os.devnull, "w")
        os._exit(pack.main([source, dest, *KILL_OPTIONS]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99


KILL_OPTIONS = "--encoding raw --resize 0 --shard-images 2 --workers 1".split()


def test_killed_before_any_change_to_a_file_the_same_command_carries_on(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process, not a machine without power
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            path = tmp_path / "source" / split / f"class{number % 2}" / f"{number}.ppm"
            imagenet40._write(str(path), f"P6 4 4 255\n{split}{number}".encode().ljust(60, b"."))
    source = str(tmp_path / "source")
    assert pack.main([source, str(tmp_path / "whole"), *KILL_OPTIONS]) == 0
    whole = digests(str(tmp_path / "whole"))
    for operation in itertools.count():
        dest = str(tmp_path / f"killed{operation}")
        killed = _die_at(operation, source, dest)
        if killed and operation % 2:  # the other split alone, then both
            assert pack.main([source, dest, *KILL_OPTIONS, "--split", "val"]) == 0, operation
        assert pack.main([source, dest, *KILL_OPTIONS]) == 0, operation
        found = digests(dest)
        if killed and operation % 2:  # it was finished before there was a mean image to name
            found["val.json"] = whole["val.json"]
        assert found == whole and not glob.glob(f"{dest}/**/*.tmp", recursive=True), operation
        if not killed:
            break
    assert operation > 50


# ---- images -----------------------------------------------------------------------------------------------------


@SETTINGS
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    grey=st.booleans(),
    seed=st.integers(0, 99),
)
def test_resize_equals_pillow_bicubic(height, width, size, grey, seed):
    random = np.random.default_rng(seed)
    # Not 0 .. 255: the two clip overshoot in different passes.
    image = random.integers(70, 186, (height, width) if grey else (height, width, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    ours = images.resize(image, *size)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("kind", ["rgb", "grey", "cmyk", "RGBA", "P", "1"])
def test_decode_equals_pillow(kind):
    data = image_file(3, 61, 47, kind)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (images.as_rgb(images.decode(data)) == theirs).all()


@pytest.mark.parametrize("kind", ["rgb", "grey", "cmyk"])
def test_large_jpegs_are_decoded_small_and_look_the_same(kind):
    smooth = Image.fromarray(imagenet40.picture(8)).resize((1301, 1007), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.convert({"rgb": "RGB", "grey": "L", "cmyk": "CMYK"}[kind]).save(file, "JPEG", quality=95)
    full, small = images.decode(file.getvalue()), images.decode(file.getvalue(), at_least=200)
    assert min(full.shape[:2]) == 1007 and 200 <= min(small.shape[:2]) < 400
    stored_full, stored_small = (images.fit_image(image, 200, "crop").astype(int) for image in (full, small))
    assert np.abs(stored_full - stored_small).mean() < 1.0


def test_without_simplejpeg_pillow_gives_the_same_pixels(monkeypatch):
    data = imagenet40.jpeg(imagenet40.picture(4))
    with_it, encoded = images.decode(data), images.encode_jpeg(imagenet40.picture(5), 90)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert (images.decode(data) == with_it).all()
    other = images.encode_jpeg(imagenet40.picture(5), 90)
    assert np.abs(images.decode(encoded).astype(int) - images.decode(other)).mean() < 1


@SETTINGS
@given(data=st.data())
def test_damaged_images_are_bad_images_and_nothing_else(data):
    kind = data.draw(st.sampled_from(["rgb", "grey", "cmyk", "P", "RGBA"]))
    content = bytearray(image_file(1, 40, 50, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    for read in (images.decode, images.header_size):
        try:
            read(content)
        except images.BadImage as error:
            assert str(error) and not re.search("0x[0-9a-f]{6}", str(error))  # no address in memory


# ---- meta.mat and labels ----------------------------------------------------------------------------------------


def test_meta_mat_as_scipy_writes_it():
    synsets = imagenet40.synsets()
    assert len(synsets) == 40 and synsets[0]["words"] == "tench, Tinca tinca" and synsets[7]["words"].endswith("é")
    assert [int(s["ILSVRC2012_ID"].item()) for s in synsets] == list(range(1, 41))
    wnids = [s["WNID"] for s in synsets]
    assert wnids != sorted(wnids), "the devkit's numbers are not those of the sorted WordNet ids"


@SETTINGS
@given(data=st.data())
def test_damaged_meta_mat_is_an_input_error(data):
    with open(imagenet40.META, "rb") as file:
        content = bytearray(file.read())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_mat(bytes(content[: data.draw(st.integers(0, len(content)))]), "meta.mat")
    except InputError as error:
        assert "meta.mat" in str(error)


# ---- the item table ---------------------------------------------------------------------------------------------


def test_a_reader_of_many_archives_keeps_few_open(tmp_path, monkeypatch):
    from shards.sources import items as items_module

    monkeypatch.setattr(items_module, "_OPEN_FILES", 3)
    rows, paths = items_module.Rows(), []
    for number in range(20):
        paths.append(str(tmp_path / f"{number}.bin"))
        with open(paths[-1], "wb") as file:
            file.write(bytes([number]) * 10)
        rows.add(f"image {number}", 0, number, 3, 5)
    reader = SourceReader(rows.items("train", paths, ["a"]))
    before = len(os.listdir("/proc/self/fd"))
    for row in [*range(20), *range(19, -1, -1)]:
        assert reader.read(row) == bytes([row]) * 5
        assert len(os.listdir("/proc/self/fd")) <= before + 6
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_million_images_need_little_memory():
    import tracemalloc

    from shards.sources.items import Rows

    tracemalloc.start()
    rows = Rows()
    for number in range(100_000):
        rows.add(f"n01440764/n01440764_{number}.JPEG", number % 1000, 0, number * 1000, 1000)
    items = rows.items("train", ["ILSVRC2012_img_train.tar"], [str(i) for i in range(1000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert items.name(99_999) == "n01440764/n01440764_99999.JPEG"
    assert items.table.nbytes + items.names.nbytes < 70 * 100_000 and peak < 200 * 100_000
