"""Planes hold what a JPEG codes, and give the pixels of libjpeg-turbo bit for bit; packing them loses nothing more."""

import io
import os
import shutil

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tars
from shards import index, pack, verify
from shards.errors import InputError
from shards.format.split import image_member, load_labels, load_split, read_idx
from shards.read import images, planes
from shards.read.reader import ShardReader
from tests.pictures import picture
from tests.shardmaker import damage


def jpeg(pixels: np.ndarray, colour: str = "4:2:0", **how) -> bytes:
    file = io.BytesIO()
    if colour == "grey":
        Image.fromarray(pixels).convert("L").save(file, "JPEG", **how)
    else:
        Image.fromarray(pixels).save(file, "JPEG", subsampling=colour, **how)
    return file.getvalue()


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(16, 90), st.integers(16, 90)),
    kind=st.sampled_from(["noise", "extremes", "smooth"]),
    colour=st.sampled_from(["4:2:0", "4:2:0", "grey"]),
    quality=st.integers(1, 100),
    progressive=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_pixels_of_the_planes_are_those_of_the_jpeg(size, kind, colour, quality, progressive, seed):
    data = jpeg(picture(seed, *size, kind), colour, quality=quality, progressive=progressive)
    stored = planes.from_jpeg(data)
    assert len(stored) == planes.nbytes(*size)
    assert (planes.to_rgb(stored, *size) == simplejpeg.decode_jpeg(data, "RGB")).all()


def test_a_jpeg_that_codes_other_planes_is_refused():
    pixels, cmyk, png = picture(1, 40, 30), io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    Image.fromarray(pixels).save(png, "PNG")
    others = [jpeg(pixels, "4:4:4"), jpeg(pixels, "4:2:2"), jpeg(pixels, "4:4:4", keep_rgb=True)]
    for data in (*others, cmyk.getvalue(), png.getvalue()):
        assert planes.from_jpeg(data) is None


# ---- packing ----------------------------------------------------------------------------------------------------


def packed(source, dest, *options) -> str:
    assert pack.main([str(source), str(dest), "--workers", "1", *options]) == 0
    return str(dest)


def stored(dest: str, split: str = "train") -> dict[int, bytes]:
    """Label -> bytes of the image: each image of `folder` is a class of its own."""
    found, labels = load_split(dest, split), iter(load_labels(load_split(dest, split)).tolist())
    with ShardReader(found) as reader:
        return {
            next(labels): bytes(reader.read(k, n))
            for k, shard in enumerate(found.shards)
            for n in range(shard.nsamples)
        }


def pixels(dest: str) -> dict[int, np.ndarray]:
    """Label -> RGB of the image."""
    split = load_split(dest, "train")
    if split.encoding == "planes":
        return {label: planes.to_rgb(data, split.height, split.width) for label, data in stored(dest).items()}
    if split.encoding == "raw":
        size = split.height, split.width, 3
        return {label: np.frombuffer(data, np.uint8).reshape(size) for label, data in stored(dest).items()}
    return {label: images.as_rgb(images.decode(data)) for label, data in stored(dest).items()}


def equal(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((one[label] == other[label]).all() for label in one)


@pytest.fixture
def folder(tmp_path):
    """Images of 45 x 61 in all kinds of files, each a class of its own."""
    source = tmp_path / "source"
    kinds = [("4:2:0", {}), ("grey", {}), ("4:2:0", {"progressive": True}), ("4:4:4", {}), ("4:2:2", {})]
    files = [jpeg(picture(n, 45, 61), colour, quality=95, **how) for n, (colour, how) in enumerate(kinds)]
    for mode in ("RGB", "L", "RGBA"):
        file = io.BytesIO()
        Image.fromarray(picture(len(files), 45, 61)).convert(mode).save(file, "PNG")
        files.append(file.getvalue())
    cmyk = io.BytesIO()
    Image.fromarray(picture(9, 45, 61)).convert("CMYK").save(cmyk, "JPEG")
    for number, data in enumerate([*files, cmyk.getvalue()]):
        os.makedirs(source / "train" / f"{number}")
        (source / "train" / f"{number}" / "image.jpg").write_bytes(data)
    return source


@pytest.mark.parametrize(
    "options", [["--resize", "32"], ["--resize", "33", "--fit", "squash", "--quality", "60"]], ids=["crop", "squash"]
)
def test_resized_images_are_those_of_the_jpeg_encoding(folder, tmp_path, options):
    as_jpeg = packed(folder, tmp_path / "jpeg", *options)
    as_planes = packed(folder, tmp_path / "planes", "--encoding", "planes", *options)
    assert equal(pixels(as_planes), pixels(as_jpeg))
    split, side = load_split(as_planes, "train"), int(options[1])
    assert (split.encoding, split.height, split.width, split.mean) == ("planes", side, side, "mean.npy")
    image = image_member(read_idx(split, split.shards[0])[0], "planes")
    assert image.ext == "yuv" and image.size == side * side + 2 * ((side + 1) // 2) ** 2
    assert all((tmp_path / e / "mean.npy").read_bytes() for e in ("jpeg", "planes"))
    assert (tmp_path / "jpeg/mean.npy").read_bytes() == (tmp_path / "planes/mean.npy").read_bytes()
    assert load_labels(split).tolist() == load_labels(load_split(as_jpeg, "train")).tolist()


def test_what_keeps_its_size_is_taken_over_or_encoded_once(folder, tmp_path):
    found = pixels(packed(folder, tmp_path / "planes", "--encoding", "planes", "--resize", "0"))
    files = pixels(packed(folder, tmp_path / "copy", "--encoding", "copy"))
    again = pixels(packed(folder, tmp_path / "jpeg", "--resize", "0"))
    for label in range(3):  # 4:2:0, grey, progressive
        assert (found[label] == files[label]).all()
    assert not (found[0] == again[0]).all()  # the jpeg encoding loses a little once more
    for label in range(3, 9):  # 4:4:4, 4:2:2, PNG, CMYK
        assert (found[label] == again[label]).all()


def test_shards_of_planes_are_a_source(folder, tmp_path):
    first = packed(folder, tmp_path / "jpeg", "--resize", "32")
    as_planes = packed(first, tmp_path / "planes", "--encoding", "planes", "--resize", "0")  # of JPEG shards
    assert equal(pixels(as_planes), pixels(first))
    again = packed(as_planes, tmp_path / "again", "--encoding", "planes", "--resize", "0", "--seed", "5")
    assert stored(again) == stored(as_planes)
    assert equal(pixels(packed(as_planes, tmp_path / "raw", "--encoding", "raw", "--resize", "0")), pixels(first))
    smaller = packed(as_planes, tmp_path / "smaller", "--encoding", "planes", "--resize", "20")
    assert equal(pixels(smaller), pixels(packed(first, tmp_path / "smaller jpeg", "--resize", "20")))
    with pytest.raises(InputError, match="use --encoding planes --resize 0, or jpeg"):
        packed(as_planes, tmp_path / "copy", "--encoding", "copy")


def test_sizes_that_differ_or_are_too_small_are_errors(folder, tmp_path, capsys):
    (folder / "train" / "2" / "image.jpg").write_bytes(jpeg(picture(2, 45, 60)))
    with pytest.raises(InputError, match="planes images must all have one size, and these differ"):
        packed(folder, tmp_path / "differ", "--encoding", "planes", "--resize", "0")
    with pytest.raises(InputError, match="planes images must have one size"):
        packed(folder, tmp_path / "none", "--encoding", "planes", "--fit", "none")
    with pytest.raises(InputError, match="15x15 pixels; --encoding planes needs 16 x 16 or more"):
        packed(folder, tmp_path / "small", "--encoding", "planes", "--resize", "15")


def test_damage_is_found_and_an_index_made_anew(folder, tmp_path, capsys):
    dest = packed(folder, tmp_path / "planes", "--encoding", "planes", "--resize", "32")
    assert verify.main([dest, "--workers", "1"]) == 0
    before = load_split(dest, "train")
    shutil.rmtree(f"{dest}/.pack")  # as of shards that were copied
    os.unlink(f"{dest}/train.json")
    assert index.main([dest, "--workers", "1"]) == 0  # the size is that of mean.npy
    after = load_split(dest, "train")
    assert (after.encoding, after.height, after.width) == ("planes", 32, 32) and after.nsamples == before.nsamples
    os.unlink(f"{dest}/train.json")
    os.rename(f"{dest}/mean.npy", f"{dest}/mean")
    with pytest.raises(InputError, match="planes images of 1536 bytes and nothing tells their height"):
        index.main([dest, "--workers", "1"])
    os.rename(f"{dest}/mean", f"{dest}/mean.npy")
    assert index.main([dest, "--workers", "1"]) == 0 and verify.main([dest, "--workers", "1", "--repair"]) == 0
    tars.edit_json(f"{dest}/train.json", image={"encoding": "planes", "height": 32, "width": 34})
    capsys.readouterr()
    assert verify.main([dest, "--workers", "1"]) == 2
    assert "planes image of 1536 bytes; one of 34x32 pixels has 1632" in capsys.readouterr().out
    tars.edit_json(f"{dest}/train.json", image={"encoding": "planes", "height": 32, "width": 32})
    image = image_member(read_idx(after, after.shards[0])[3], "planes")
    damage(after, 0, image.offset + 100, b"another")
    assert verify.main([dest, "--workers", "1"]) == 2
    assert "sample 3" in capsys.readouterr().out


def test_raw_and_planes_are_not_mixed(tmp_path):
    members = [("0.raw", bytes(768)), ("0.cls", b"0"), ("1.yuv", bytes(384)), ("1.cls", b"0")]
    tars.write_tar(f"{tmp_path}/train-0.tar", members)
    with pytest.raises(InputError, match="mixes raw images and planes images"):
        index.main([str(tmp_path), "--workers", "1"])
