"""Shards that others made are indexed as they come; what is unclear is an error in one line, and nothing runs."""

import builtins
import gzip
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

import tars
from shards import index, verify
from shards.errors import InputError
from shards.format import names
from shards.format.split import image_member, load_labels, load_split, read_idx
from shards.format.tar import samples
from shards.machine import progress
from tests.launch import ROOT


def run(folder, *options) -> None:
    index.main([str(folder), "--workers", "1", *map(str, options)])


def images(split) -> list[bytes]:
    """Bytes of all images, read as training does: by offset."""
    found = []
    for shard in split.shards:
        with open(split.path(shard.url), "rb") as file:
            for sample in read_idx(split, shard):
                member = image_member(sample, split.encoding)
                found.append(os.pread(file.fileno(), member.size, member.offset))
    return found


def foreign(number: int, label: int) -> list[tuple[str, bytes]]:
    """A sample as others pack it: more members, another image ending, a folder in its key."""
    ending, kind = [("jpeg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP")][number % 4]
    key = f"n{label:08d}/image {number}"
    fields = json.dumps({"label": label, "width": 48, "name": f"c{label}"}).encode()
    return [
        (f"{key}.{ending}", tars.image(number, kind=kind)),
        (f"{key}.cls", f"{label}\n".encode()),
        (f"{key}.json", fields),
        (f"{key}.txt", b"a caption"),
    ]


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
def test_foreign_shards_are_indexed(tmp_path, format, capsys):
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    prefix = "" if format == "ustar" else "long/" * 30 + "ü/"
    for k in range(3):
        members = [(prefix + n, d) for i in range(k * 4, k * 4 + 4) for n, d in foreign(i, i % 3)]
        tars.write_tar(f"{tmp_path}/imagenet-train-{k:04d}.tar", members, formats[format])
    run(tmp_path)
    split = load_split(str(tmp_path), "train")
    assert split.nsamples == 12 and split.classes == ("0", "1", "2") and (split.height, split.width) == (0, 0)
    assert load_labels(split).tolist() == [i % 3 for i in range(12)]
    assert images(split) == [foreign(i, 0)[0][1] for i in range(12)]
    assert json.loads((tmp_path / "train.json").read_text())["class_counts"] == [4, 4, 4]
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0


def test_labels_from_json_and_by_class_name(tmp_path):
    members = [m for i in range(4) for m in foreign(i, i % 3) if not m[0].endswith(".cls")]
    tars.write_tar(f"{tmp_path}/train-0.tar", members)
    with pytest.raises(InputError, match="--label-key"):
        run(tmp_path)
    run(tmp_path, "--label-key", "label")
    assert load_labels(load_split(str(tmp_path), "train")).tolist() == [0, 1, 2, 0]
    os.unlink(tmp_path / "train.json")
    (tmp_path / "classes.txt").write_text("c0\nc1\nc2\nc3\n")
    run(tmp_path, "--label-key", "name", "--classes", tmp_path / "classes.txt")
    split = load_split(str(tmp_path), "train")
    assert load_labels(split).tolist() == [0, 1, 2, 0] and split.classes == ("c0", "c1", "c2", "c3")
    with pytest.raises(InputError, match="has no field 'lable' .it has label, width, name"):
        run(tmp_path, "--label-key", "lable")


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["train-000000.tar", "val-000000.tar"], {"train": 1, "val": 1}),
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], {"train": 1, "val": 1}),
        (["train/0000.tar", "train/0001.tar", "valid/0.tar"], {"train": 2, "val": 1}),
        (["train-0000-of-0002.tar", "train-0001-of-0002.tar"], {"train": 2}),
        (["train-9.tar", "train-10.tar", "train-1.tar"], {"train": 3}),
        (["shard_00.tar", "shard_01.tar"], {"shard": 2}),
        (["train.tar", "test.tar"], {"train": 1, "test": 1}),
        (["birds/part-0.tar", "birds/part-1.tar"], {"birds": 2}),
    ],
)
def test_split_by_name(paths, expected):
    found = names.find_tars(paths)
    assert {name: len(tar) for name, tar in found.items()} == expected
    if "train-9.tar" in paths:
        assert found["train"] == ["train-1.tar", "train-9.tar", "train-10.tar"]


def test_an_unclear_split_must_be_said(tmp_path):
    for name in ("a-train-0.tar", "b-train-0.tar", "0001.tar"):
        tars.write_tar(f"{tmp_path}/{name}", tars.sample(0, 0))
    with pytest.raises(InputError, match="does not tell the split"):
        run(tmp_path)
    os.unlink(tmp_path / "0001.tar")
    with pytest.raises(InputError, match="both a-train-0.tar and b-train-0.tar"):
        run(tmp_path)
    run(tmp_path, "--splits", "train=b-*.tar", "val=a-*.tar")
    assert load_split(str(tmp_path), "train").shards[0].url == "b-train-0.tar"
    run(tmp_path, "--splits", "all={a,b}-train-{0..0}.tar".replace("{a,b}", "a"))
    assert load_split(str(tmp_path), "all").nsamples == 1
    with pytest.raises(InputError, match="no such tars"):
        run(tmp_path, "--splits", "train=c-*.tar")


def test_ranges_of_shards():
    assert names.expand("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert names.expand("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    with pytest.raises(InputError):
        names.expand("a-{5..1}.tar")


@pytest.mark.parametrize(
    "members, message",
    [
        ([("1.jpg", b"x")], r"sample 1 \(key '1'\): it has no label member .cls"),
        ([("1.txt", b"x"), ("1.cls", b"1")], "it has no image member"),
        ([("1.jpg", b""), ("1.cls", b"1")], "its image .jpg is empty"),
        ([("1.jpg", b"x"), ("1.cls", b"-1")], "label '-1' is neither"),
        ([("1.jpg", b"x"), ("1.cls", b"1.0")], "label '1.0' is neither"),
        ([("1.jpg", b"x"), ("1.cls", "²".encode())], "neither"),
        ([("1.jpg", b"x"), ("1.cls", b"")], "label '' is neither"),
        ([("1.jpg", b"x"), ("1.cls", b"99999999")], "outside the"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("1.JPG", b"y")], "two members .jpg"),
    ],
)
def test_a_bad_sample_is_named_and_can_be_skipped(tmp_path, members, message, capsys):
    tars.write_tar(f"{tmp_path}/train-0.tar", tars.sample(0, 0) + members + tars.sample(2, 1))
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path)
    assert "train-0.tar" in str(error.value) and "--skip-bad" in str(error.value)
    assert not (tmp_path / "train.json").exists() and not (tmp_path / "train-0.idx").exists()
    run(tmp_path, "--skip-bad")
    assert "1 samples are left out" in capsys.readouterr().out
    split = load_split(str(tmp_path), "train")
    assert load_labels(split).tolist() == [0, 1] and split.shards[0].bad == (1,)
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0


def test_a_cut_off_tar_is_an_error_and_can_be_skipped(tmp_path):
    path = tmp_path / "train-0.tar"
    tars.write_tar(path, [m for i in range(4) for m in tars.sample(i, i)])
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(InputError, match="train-0.tar: not a whole tar: at byte"):
        run(tmp_path)
    run(tmp_path, "--skip-bad")
    assert load_labels(load_split(str(tmp_path), "train")).tolist() == list(
        range(load_split(str(tmp_path), "train").nsamples)
    )


def three_shards(folder) -> list[bytes]:
    """Shards of four samples each, of which the second is then damaged; their bytes."""
    for k in range(3):
        tars.write_tar(f"{folder}/train-{k}.tar", [m for i in range(4) for m in tars.sample(k * 4 + i, i)])
    return [(folder / f"train-{k}.tar").read_bytes() for k in range(3)]


# What is left of the second shard, the samples in it, and what is said. Its files: 1,024 bytes each .cls, then .jpg.
DAMAGED = {
    "empty": (lambda data: b"", 0, r"it is empty \(0 bytes\)"),
    "no samples": (lambda data: bytes(10240), 0, "it holds no samples"),
    "without an end mark": (lambda data: cut_at(data, 2), 2, "end-of-archive mark"),
    "cut in padding": (lambda data: cut_at(data, 2)[:-3], 2, "within the padding"),
    "followed by garbage": (lambda data: data + b"garbage" * 100, 4, "data after the end-of-archive mark"),
    "followed by a tar": (lambda data: data + data, 8, "data after the end-of-archive mark"),
}


def cut_at(data: bytes, count: int) -> bytes:
    """The tar up to the end of so many samples."""
    whole = list(samples(lambda offset, size: data[offset : offset + size], len(data)))
    return data[: whole[count][0].offset - 512]


@pytest.mark.parametrize("what", DAMAGED)
def test_a_shard_that_is_not_whole_is_refused_unless_allowed(tmp_path, what, capsys):
    change, left, message = DAMAGED[what]
    sound = three_shards(tmp_path)
    (tmp_path / "train-1.tar").write_bytes(change(sound[1]))
    with pytest.raises(InputError, match=f"train-1.tar: .*{message}.*--skip-bad") as error:
        run(tmp_path)
    assert len(str(error.value)) < 300 and not (tmp_path / "train.json").exists()
    run(tmp_path, "--skip-bad")
    out = capsys.readouterr().out
    assert len(re.findall(f"train-1.tar: .*{message}", out)) == 1
    assert ("1 shards give no sample: train-1.tar" in out) == (not left)
    assert load_split(str(tmp_path), "train").nsamples == 8 + left
    if what != "followed by a tar":  # there verify finds the samples twice
        assert verify.main([str(tmp_path), "--workers", "1"]) == 0
        assert "note: train-1.tar: known damage" in capsys.readouterr().out


def test_each_shard_that_is_not_whole_has_one_line(tmp_path, capsys):
    sound = three_shards(tmp_path)
    for k in range(3):
        (tmp_path / f"train-{k}.tar").write_bytes([b"", cut_at(sound[1], 1), b"404: Not Found"][k])
    with pytest.raises(InputError, match="train-2.tar: not a tar: it is plain text.*and 2 more"):
        run(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["  train-0.tar", "  train-1.tar", "  train-2.tar"]
    for k in range(3):
        (tmp_path / f"train-{k}.tar").write_bytes(b"")
    with pytest.raises(InputError, match="has no sample"):
        run(tmp_path, "--skip-bad")


@pytest.mark.parametrize("options", [(), ("--skip-bad",)])
def test_a_file_that_is_no_tar_is_never_left_out(tmp_path, options):
    three_shards(tmp_path)
    path = tmp_path / "train-1.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="train-1.tar: not a tar: it is gzip data; unpack it"):
        run(tmp_path, *options)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="train-1.tar: it is a folder"):
        run(tmp_path, *options)
    path.rmdir()
    path.symlink_to("nowhere")
    with pytest.raises(InputError, match="train-1.tar: No such file"):
        run(tmp_path, *options)
    assert not (tmp_path / "train.json").exists()


@pytest.mark.parametrize(
    "paths, missing",
    [
        (["train-0.tar", "train-1.tar", "train-3.tar", "val-7.tar"], "train-2.tar"),
        (["a/008.tar", "a/009.tar", "a/012.tar"], "a/010.tar, a/011.tar"),
        (["t-0000-of-0004.tar", "t-0001-of-0004.tar"], "t-0002-of-0004.tar, t-0003-of-0004.tar"),
        (["t-1-of-3.tar", "t-3-of-3.tar"], "t-2-of-3.tar"),
        (["x-1.tar", "x-999999999.tar"], "x-2.tar, x-3.tar, x-4.tar, x-5.tar, and 996 more"),
        (["https://host/train-000.tar", "https://host/train-002.tar"], "https://host/train-001.tar"),
        (
            ["train.tar", "train-5.tar", "train-6.tar", "b-1-of-2.tar", "b-2-of-2.tar", "x" * 99 + "12345678901.tar"],
            None,
        ),
    ],
)
def test_a_number_that_is_missing_in_a_series_is_noted(paths, missing):
    notes = names.missing_numbers(paths)
    assert notes == ([f"shards are missing in the series: {missing}"] if missing else [])


def test_a_batch_log_shows_how_far_it_is(tmp_path, capsys, monkeypatch):
    three_shards(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    run(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and re.search(r"indexing train 2/3 shards .* shards/s ETA 0:00:0", lines[1])
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and re.search(r"verifying train 8/12 images .* images/s ETA 0:00:0", lines[1])


def test_missing_shards_and_half_downloads_are_noted(tmp_path, capsys):
    three_shards(tmp_path)
    os.rename(tmp_path / "train-1.tar", tmp_path / "train-1.tar.part")
    run(tmp_path)
    out = capsys.readouterr().out
    assert "note: shards are missing in the series: train-1.tar" in out
    assert "note: not read, for the name does not end in .tar: train-1.tar.part" in out
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0
    assert "note: train: shards are missing in the series: train-1.tar" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--label-member", "cls"), ("--label-key", "label")])
def test_names_with_dots_are_explained_in_one_short_line(tmp_path, options):
    """All of them have the key `img`: one sample of 20,000 members. Checked in linear time."""
    members = [m for i in range(10_000) for m in ((f"a/img.{i:04d}.jpg", b""), (f"a/img.{i:04d}.cls", b"1"))]
    tars.write_tar(f"{tmp_path}/train-0.tar", members)
    began = time.process_time()
    with pytest.raises(
        InputError, match="a key ends at the first dot of a name: call img.0000.jpg img_0000.jpg"
    ) as error:
        run(tmp_path, *options)
    assert time.process_time() - began < 5  # a quadratic check took 13 s
    assert len(str(error.value)) < 400 and "19,996 more" in str(error.value)


def test_no_message_grows_with_the_data(tmp_path):
    long = "x" * 50_000
    fields = json.dumps({f"{long}{i}": 1 for i in range(10)}).encode()
    for members in (
        [(f"{long}.jpg", b"x")],
        [("1.jpg", b"x"), ("1.cls", long.encode())],
        [(f"1.{long}", b"x"), ("1.jpg", b"x"), (f"1.{long.upper()}", b"x")],
        [("1.jpg", b"x"), ("1.json", fields)],
    ):
        tars.write_tar(f"{tmp_path}/train-0.tar", tars.sample(0, 0) + members, tarfile.PAX_FORMAT)
        options = ["--label-key", "label"] if members[-1][0] == "1.json" else []
        with pytest.raises(InputError) as error:
            run(tmp_path, *options)
        assert len(str(error.value)) < 500
    assert len(str(InputError("y" * 10**6))) == 1000


def test_splits_share_their_classes(tmp_path):
    tars.write_tar(f"{tmp_path}/train-0.tar", tars.sample(0, 0) + tars.sample(1, 3))
    tars.write_tar(f"{tmp_path}/val-0.tar", tars.sample(0, 1))
    run(tmp_path)
    assert load_split(str(tmp_path), "val").classes == load_split(str(tmp_path), "train").classes == tuple("0123")


def test_the_index_of_packed_shards_comes_out_the_same(tmp_path, capsys):
    """Index files that were lost are made anew; what only packing knew is kept while <split>.json is there."""
    tars.make_split(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for name in ("train-000000.idx", "train.labels.npy"):
        os.unlink(tmp_path / name)
    run(tmp_path)
    after = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert after == before
    for name in os.listdir(tmp_path):
        if not name.endswith(".tar"):
            os.unlink(tmp_path / name)
    run(tmp_path)
    split = load_split(str(tmp_path), "train")
    assert (tmp_path / "train.labels.npy").read_bytes() == before["train.labels.npy"]
    assert split.shards[0].sha256 == "" and split.classes == tuple("01234")
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0


def test_a_label_that_changed_is_not_indexed_anew(tmp_path):
    split = tars.make_split(tmp_path)
    label = read_idx(split, split.shards[1])[2][0]
    tars.flip(tmp_path / "train-000001.tar", label.offset, 0)  # "3" -> "2"
    os.unlink(tmp_path / "train-000000.idx")
    with pytest.raises(InputError, match=r"train-000001.tar: sample 2 has another label"):
        run(tmp_path)
    assert verify.main([str(tmp_path), "--workers", "1", "--repair"]) == 0
    assert load_labels(load_split(str(tmp_path), "train")).tolist() == [i % 5 for i in range(12) if i != 8]


def test_shards_that_were_added_bring_their_classes(tmp_path):
    tars.write_tar(f"{tmp_path}/train-0.tar", tars.sample(0, 0) + tars.sample(1, 1))
    run(tmp_path)
    tars.write_tar(f"{tmp_path}/train-1.tar", tars.sample(2, 4))
    run(tmp_path)
    assert load_split(str(tmp_path), "train").classes == tuple("01234")


def test_raw_shards_need_their_size(tmp_path):
    pixels = np.zeros((8, 6, 3), np.uint8).tobytes()
    tars.write_tar(f"{tmp_path}/train-0.tar", [("0.raw", pixels), ("0.cls", b"0")])
    with pytest.raises(InputError, match="mean.npy"):
        run(tmp_path)
    np.save(tmp_path / "mean.npy", np.zeros((8, 6, 3), np.float32))
    run(tmp_path)
    split = load_split(str(tmp_path), "train")
    assert (split.encoding, split.height, split.width, split.mean) == ("raw", 8, 6, "mean.npy")


def test_a_read_only_data_set_is_indexed_elsewhere(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "mine"
    tars.make_split(data)
    np.save(data / "mean.npy", np.zeros((48, 48, 3), np.float32))
    tars.edit_json(data / "train.json", mean="mean.npy")
    before = sorted(os.listdir(data))
    run(data, "--out", out)
    assert sorted(os.listdir(data)) == before
    split = load_split(str(out), "train")
    assert images(split) == [tars.image(i) for i in range(12)] and os.path.isfile(split.path(split.mean))
    capsys.readouterr()
    assert verify.main([str(out), "--workers", "1"]) == 0
    tars.flip(data / "train-000001.tar", 2000)
    assert verify.main([str(out), "--workers", "1", "--repair"]) == 0
    assert sorted(os.listdir(data)) == before and load_split(str(out), "train").nsamples == 11


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tars.write_tar(f"{tmp_path}/train-0.tar", tars.sample(0, 0))
    os.chmod(tmp_path, stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(InputError, match="no permission to write.*--out"):
        run(tmp_path)


def test_a_packing_that_was_broken_off_is_not_taken_for_a_whole(tmp_path):
    tars.make_split(tmp_path)
    (tmp_path / ".pack").mkdir()
    (tmp_path / ".pack" / "train-000000.json").write_text("{}")
    run(tmp_path)  # finished: <split>.json is there
    os.unlink(tmp_path / "train.json")
    with pytest.raises(InputError, match="not finished: run the same shards.pack command again"):
        run(tmp_path)


def test_a_folder_without_tars_is_named(tmp_path):
    with pytest.raises(InputError, match="no .tar in"):
        run(tmp_path)
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match="unpack train-0.tar.gz"):
        run(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        run(tmp_path / "none")


HOSTILE = [
    "../../escape/0.jpg",
    "/tmp/absolute/0.jpg",
    "..",
    "../..jpg",
    "a/../../b/0.jpg",
    "new\nline/0.jpg",
    "cut at\0NUL/0.jpg",
    "spaces in   it/0.jpg",
    "'; touch pwned; '/0.jpg",
    '"$(touch pwned)`touch pwned`/0.jpg',
    "pipe:touch pwned/0.jpg",
    "NUL \0 ü/0.jpg",
    "\udcff\udcfe/0.jpg",
    "%s%n/0.jpg",
]


def test_hostile_names_write_nothing_outside(tmp_path, capsys, monkeypatch):
    data = tmp_path / "deep" / "data"
    members = []
    for number, name in enumerate(HOSTILE):
        stem = name.removesuffix(".jpg")
        members += [(f"{stem}{number}.jpg", tars.image(number)), (f"{stem}{number}.cls", b"0")]
    tars.write_tar(data / "train-0.tar", members, tarfile.PAX_FORMAT)
    monkeypatch.chdir(tmp_path)
    run(data, "--skip-bad")
    capsys.readouterr()
    assert verify.main([str(data), "--workers", "1"]) == 0
    assert verify.main([str(data), "--workers", "1", "--repair"]) == 0
    split = load_split(str(data), "train")
    # A member without a base name before its first dot, or without a dot, is no part of a sample.
    wanted = [i for i, name in enumerate(HOSTILE) if name not in ("..", "../..jpg", "cut at\0NUL/0.jpg")]
    assert images(split) == [tars.image(i) for i in wanted]
    everything = sorted(
        os.path.relpath(os.path.join(f, n), tmp_path) for f, _, names in os.walk(tmp_path) for n in names
    )
    expected = ["train-0.idx", "train-0.tar", "train.crc32.npy", "train.json", "train.labels.npy"]
    assert everything == [f"deep/data/{name}" for name in expected]


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_nothing_is_unpickled_or_executed(tmp_path, capsys, monkeypatch):
    """Pickled members lie beside the image, as a pickled .npy in place of labels, and as the image itself."""
    import pickle

    evil = pickle.dumps(_Bomb())
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    members = tars.sample(0, 0) + [("00000000.pyd", evil), ("00000000.pickle", evil), ("00000000.npy", evil)]
    tars.write_tar(data / "train-0.tar", members + tars.sample(1, 1) + [("2.jpg", evil), ("2.cls", b"0")])
    # webdataset, which decodes .pyd and opens pipe: addresses, must not even be loaded.
    loaded = builtins.__import__

    def guard(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("webdataset", "wids", "pickle", "cloudpickle"), name
        return loaded(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guard)
    run(data)
    assert verify.main([str(data), "--workers", "1"]) == 2
    assert "sample 2" in capsys.readouterr().out
    buffer = io.BytesIO()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    np.save(buffer, np.array([_Bomb()], dtype=object), allow_pickle=True)
    (data / "train.labels.npy").write_bytes(buffer.getvalue())
    import hashlib

    tars.edit_json(data / "train.json", labels_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    with pytest.raises(InputError, match="not a .npy file"):
        load_labels(load_split(str(data), "train"))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("url", ["pipe:touch pwned", "pipe:cat train-000000.tar", "file:///etc/passwd", "PIPE:x"])
def test_a_command_as_shard_is_refused_in_one_line(tmp_path, url):
    tars.make_split(tmp_path)
    fields = json.loads((tmp_path / "train.json").read_text())
    fields["shardlist"][0]["url"] = url
    (tmp_path / "train.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="only files and http"):
        load_split(str(tmp_path), "train")
    for module in ("index", "verify"):
        options = ["--splits", f"train={url}"] if module == "index" else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", f"shards.{module}", str(tmp_path), *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=60,
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


def test_postscript_under_a_jpeg_name_is_not_run(tmp_path, capsys, monkeypatch):
    """Pillow hands EPS, which it knows by content, to Ghostscript."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/pwned\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"
    tars.write_tar(f"{tmp_path}/train-0.tar", [("0.jpg", eps), ("0.cls", b"0"), *tars.sample(1, 0)])
    run(tmp_path)
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--workers", "1"]) == 2
    assert "train-0.tar: sample 0" in capsys.readouterr().out
    assert not (tmp_path / "pwned").exists()


def test_processes_write_the_same_index(tmp_path):
    for k in range(4):
        tars.write_tar(f"{tmp_path}/train-{k}.tar", [m for i in range(3) for m in tars.sample(k * 3 + i, i)])
    run(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    index.main([str(tmp_path), "--workers", "3"])
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_names_cannot_command_a_terminal(tmp_path):
    tars.write_tar(f"{tmp_path}/train-0.tar", [*tars.sample(1, 0), ("\x1b[2J\udcff.jpg", b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(InputError) as error:
        run(tmp_path)
    assert str(error.value).isprintable() and "\\x1b[2J" in str(error.value)
