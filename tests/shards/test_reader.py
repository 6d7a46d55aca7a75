"""Reading single samples from tars: what is wrong with a shard is named, what may pass is tried again."""

import dataclasses
import errno
import os
import tarfile

import pytest

from shards.errors import InputError
from shards.format.split import Shard, Split, format_idx
from shards.format.tar import scan
from shards.machine.files import write_whole
from shards.read import reader
from shards.read.reader import DamagedSample, ShardReader
from tests.shardmaker import add, damage, image_offset, raw_image, write_split


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path, [5, 3])


def tar_of(split, shard=0):
    return split.path(split.shards[shard].url)


def test_reads_any_sample_in_any_order(split):
    with ShardReader(split) as r:
        for shard, sample, number in ((1, 2, 7), (0, 0, 0), (0, 4, 4), (1, 0, 5)):
            assert bytes(r.read(shard, sample)) == raw_image(number, 8).tobytes()


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    split = write_split(tmp_path, [2] * 6)
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 2)
    with ShardReader(split) as r:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            for shard in range(6):
                assert bytes(r.read(shard, 1)) == raw_image(2 * shard + 1, 8).tobytes()
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_missing_shard_is_named(split):
    os.unlink(tar_of(split, 1))
    with ShardReader(split) as r:
        r.read(0, 0)
        with pytest.raises(InputError, match=r"train-000001.tar is not there"):
            r.read(1, 0)


def test_shard_cut_off_before_it_is_opened(split):
    os.truncate(tar_of(split), 2000)
    with ShardReader(split) as r, pytest.raises(InputError, match=r"train-000000.tar ends early: it has 2000 bytes of"):
        r.read(0, 0)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "ends early: it has 0 bytes of"),
        (b"\x1f\x8b\x08" + bytes(20_000), "is not a tar: it is gzip data"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a tar: it is a Git LFS pointer"),
    ],
)
def test_shard_that_became_something_else_is_named(split, content, message, known):
    """Also where the index does not know its size."""
    with open(tar_of(split), "wb") as file:
        file.write(content)
    shards = tuple(dataclasses.replace(shard, filesize=shard.filesize if known else 0) for shard in split.shards)
    with ShardReader(dataclasses.replace(split, shards=shards)) as r:
        with pytest.raises(InputError, match=f"train-000000.tar {message}") as error:
            r.read(0, 0)
    assert not error.value.everywhere


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named_at_once(split, make):
    os.unlink(tar_of(split))
    make(tar_of(split))
    with ShardReader(split) as r, pytest.raises(InputError, match="train-000000.tar: it is .*not a file"):
        r.read(0, 0)


def test_shard_cut_off_while_it_is_open(split):
    with ShardReader(split) as r:
        r.read(0, 0)
        os.truncate(tar_of(split), 2000)
        with pytest.raises(InputError, match=r"train-000000.tar ends early"):
            r.read(0, 4)


def test_shard_that_vanishes_while_it_is_open(split, monkeypatch):
    monkeypatch.setattr(reader, "_LOOK_AGAIN_SECONDS", 0.0)
    with ShardReader(split) as r:
        r.read(0, 0)
        os.unlink(tar_of(split))
        with pytest.raises(InputError, match=r"train-000000.tar is not there"):
            r.read(0, 1)


def test_damaged_header_is_of_one_sample_only(split):
    damage(split, 0, image_offset(split, 0, 2) - 400, b"\xff" * 100)
    with ShardReader(split) as r:
        r.read(0, 1)
        with pytest.raises(DamagedSample, match="header"):
            r.read(0, 2)
        r.read(0, 3)


def test_index_of_another_tar_is_refused(tmp_path):
    """Same number and sizes of samples, other names and places: nothing but the headers tells."""
    split = write_split(tmp_path / "a", [5])
    other = write_split(tmp_path / "b", [7])
    os.replace(tar_of(other), tar_of(split))
    longer = Split(**{**vars(split), "shards": (Shard("train-000000.tar", 5),)})
    with tarfile.open(tar_of(split), "w") as tar:
        for number in range(100, 110):
            add(tar, f"{number:08d}.raw", raw_image(number, 8).tobytes())
            add(tar, f"{number:08d}.cls", b"0")
    with ShardReader(longer) as r, pytest.raises(InputError, match="does not belong to .*train-000000.tar"):
        r.read(0, 0)


def test_tar_that_was_changed_is_refused(split):
    with open(tar_of(split), "ab") as file:
        file.write(bytes(10240))
    with ShardReader(split) as r, pytest.raises(InputError, match="was changed"):
        r.read(0, 0)


def test_index_without_images_is_refused(tmp_path):
    split = write_split(tmp_path, [3], member=lambda number: ("txt", b"no image"))
    with ShardReader(split) as r:
        with pytest.raises(InputError, match=r"train-000000.tar: sample 0 has no image member \(txt, cls\)") as error:
            r.read(0, 0)
    assert not error.value.everywhere  # one rank alone may read this shard


def test_index_of_another_length_is_refused_by_the_rank_that_reads_it(split):
    for content, message in (
        (b"v1.2 0\n", "lists 0 samples"),
        (b"junk", "is not a shard index"),
        (None, "cannot read"),
    ):
        os.unlink(split.idx_path(split.shards[0]))
        if content is not None:
            write_whole(split.idx_path(split.shards[0]), content)
        with (
            ShardReader(split) as r,
            pytest.raises(InputError, match=f"train-000000.idx.*{message}|{message}.*idx") as error,
        ):
            r.read(0, 0)
        assert not error.value.everywhere


class Failing:
    """os.preadv that fails so many times first."""

    def __init__(self, times, error):
        self.left, self.error, self.real = times, error, os.preadv

    def __call__(self, *arguments):
        if self.left:
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error))
        return self.real(*arguments)


@pytest.fixture
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(reader.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_passing_error_is_tried_three_times_more(split, monkeypatch, no_pauses, error):
    with ShardReader(split) as r:
        r.read(0, 0)
        monkeypatch.setattr(os, "preadv", Failing(4, error))  # the first, and three of four in the slow way
        assert bytes(r.read(0, 1)) == raw_image(1, 8).tobytes()
    assert len(no_pauses) == 3


def test_lasting_error_names_the_shard(split, monkeypatch, no_pauses):
    with ShardReader(split) as r:
        monkeypatch.setattr(os, "preadv", Failing(1000, errno.EIO))
        with pytest.raises(InputError, match=r"cannot read .*train-000000.tar \(4 times\): Input/output error"):
            r.read(0, 1)


def test_unreadable_shard_is_not_tried_again(split, monkeypatch, no_pauses):
    with ShardReader(split) as r:
        monkeypatch.setattr(os, "preadv", Failing(1000, errno.EACCES))
        with pytest.raises(InputError, match="Permission denied"):
            r.read(0, 1)
    assert not no_pauses


def test_foreign_layouts(tmp_path):
    """Members in other orders, several kinds in one shard, upper-case endings, long names, blanks, PAX headers."""
    path = tmp_path / "train-000000.tar"
    samples = [
        [("a.cls", b"0"), ("a.JPEG", b"image 0")],
        [("b.img.png", b"image 1"), ("b.json", b"{}"), ("b.cls", b"0")],
        [("a folder/with blanks.jpg", b"image 2"), ("a folder/with blanks.cls", b"0")],
        [("n" * 150 + ".webp", b"image 3"), ("n" * 150 + ".cls", b"0")],
        [("ü/ä.jpg", b"image 4"), ("ü/ä.cls", b"0")],
    ]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            for name, data in sample:
                add(tar, name, data)
    with open(path, "rb") as file:
        write_whole(str(path.with_suffix(".idx")), format_idx(scan(file, "")))
    split = Split("train", str(tmp_path), (Shard(path.name, 5),))
    with ShardReader(split) as r:
        assert [bytes(r.read(0, i)) for i in range(5)] == [b"image %d" % i for i in range(5)]


def test_both_ways_to_read_an_index_agree(tmp_path, monkeypatch):
    split = write_split(tmp_path, [40], member=lambda number: ("jpg", bytes(number + 1)))
    fast = reader._image_members(split, split.shards[0])
    monkeypatch.setattr(reader, "_regular_index", lambda *_: None)
    slow = reader._image_members(split, split.shards[0])
    assert fast[:2] == slow[:2]
    assert [(m.offset, m.size, m.name) for m in fast[2:]] == [(m.offset, m.size, m.name) for m in slow[2:]]
