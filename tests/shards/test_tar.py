"""The tar scan finds what tarfile finds, in every format people's tars have, and reports damage with its place."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.format import tar
from shards.format.split import format_idx, parse_idx

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make(entries, format=tarfile.GNU_FORMAT, end_mark=True, pax=None) -> bytes:
    """A tar of (name, data) pairs; data None: a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers=pax) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data or b""))
        used = archive.offset
    return buffer.getvalue() if end_mark else buffer.getvalue()[:used]


def scan(data: bytes, tmp_path) -> list:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with open(path, "rb") as file:
        return tar.scan(file, "a.tar")


def read_of(data: bytes):
    return lambda offset, size: data[offset : offset + size]


def tolerant(data: bytes):
    damage = []
    return list(tar.samples(read_of(data), len(data), damage=damage)), damage


NAMES = st.lists(
    st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=150),
    min_size=1,
    max_size=3,
).map("/".join)


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), min_size=1, max_size=8),
    format=st.sampled_from(["gnu", "pax"]),
)
def test_finds_the_members_that_tarfile_finds(entries, format):
    data = make(entries, FORMATS[format])
    found = list(tar.members(tar.window_read(read_of(data)), len(data)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        # A regular member whose name ends in "/" is a folder for tarfile too.
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [(m.name.rstrip("/"), m.offset, m.size) for m in found] == expected
    assert [data[m.offset : m.offset + m.size] for m in found] == [d for n, d in entries if not n.endswith("/")]


def test_groups_as_webdataset_does(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    names = "a/b.c/1.jpg a/b.c/1.seg.PNG a/b.c/1.cls ./2.jpg ./2.cls 3.x 1.jpg d.e/f 4.JPEG 4.json 10.cls".split()
    data = make([(name, b"5" * i) for i, name in enumerate(names)])
    path = tmp_path / "w.tar"
    path.write_bytes(data)
    raw = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    expected = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in raw]
    found = []
    for sample in scan(data, tmp_path):
        key = tar.split_name(sample[0].name)[0]
        found.append((key, {m.ext.lower(): data[m.offset : m.offset + m.size] for m in sample}))
    assert found == expected


def test_skips_what_is_no_part_of_a_sample(tmp_path):
    entries = [("train", None), ("train/.hidden.jpg", b"x"), ("__MACOSX/1.jpg", b"x"), ("README", b"x"), ("e.", b"x")]
    entries += [("train/1.jpg", b"abc"), ("train/1.cls", b"7"), ("x/__MACOSX/._1.jpg", b"x")]
    samples = scan(make(entries), tmp_path)
    assert [[m.name for m in s] for s in samples] == [["train/1.jpg", "train/1.cls"]]


def test_links_and_devices_are_no_members(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("0.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert [[m.name for m in s] for s in scan(buffer.getvalue(), tmp_path)] == [["1.jpg"]]


def test_names_that_an_idx_cannot_hold_are_escaped(tmp_path):
    names = ["a b/1.jpg", "a b/1.my cls", "new\nline.jpg", "tab\t.jpg", "nbsp\u00a0.jpg", "Ünïcode.jpg", "\"q'.jpg"]
    samples = scan(make([(n, b"1") for n in names]), tmp_path)
    again = parse_idx(format_idx(samples), "a.idx")
    assert [[(m.offset, m.size) for m in s] for s in again] == [[(m.offset, m.size) for m in s] for s in samples]
    assert again[0][0].name == "a%20b/1.jpg" and again[0][1].ext == "my%20cls"


def test_base_256_size_and_pax_size(tmp_path):
    data = bytearray(make([("1.jpg", b"abc")]))
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert scan(bytes(data), tmp_path)[0][0].size == 3
    # A PAX header's size replaces that of the header, here for the second member only.
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("1.jpg")
        info.size, info.pax_headers = 3, {"size": "3", "comment": "line\nbreak = 7"}
        archive.addfile(info, io.BytesIO(b"abc"))
    assert scan(buffer.getvalue(), tmp_path)[0][0].size == 3


def test_a_tar_within_a_file_gives_offsets_of_the_outer_file(tmp_path):
    inner = make([("n01_1.JPEG", b"image")])
    path = tmp_path / "outer.tar"
    path.write_bytes(make([("n00.tar", b"x"), ("n01.tar", inner)]))
    with open(path, "rb") as file:
        size = os.path.getsize(path)
        outer = list(tar.members(tar.file_read(file), size))
        ((member,),) = tar.scan(file, "n01.tar", outer[1].offset, outer[1].size)
        assert os.pread(file.fileno(), member.size, member.offset) == b"image"


@pytest.mark.parametrize("cut", [0, 100, 512, 600, 1500, 2560])  # 2560: between two files
def test_truncation_is_reported_with_its_place(tmp_path, cut):
    # 1.jpg: header 0, data 512..1511; 1.cls: header 1536, data 2048; 2.jpg: header 2560
    data = make([("1.jpg", b"i" * 1000), ("1.cls", b"7"), ("2.jpg", b"j" * 1000)], end_mark=False)
    with pytest.raises(InputError, match=r"a\.tar is not a whole tar: at byte \d+:"):
        scan(data[:cut], tmp_path)


def test_the_end_of_a_tar_must_be_there():
    """Two blocks of zeros by POSIX; the first is enough, for nothing is lost with the second."""
    data = make([("1.jpg", b"i" * 1000), ("1.cls", b"7")], end_mark=False)
    assert len(data) == 5 * 512
    for end, sound in ((0, False), (512, True), (1024, True), (10240, True), (700, True)):
        found, damage = tolerant(data + bytes(end))
        assert len(found) == 1 and (not damage) == sound, end
        if damage:
            assert damage[0].offset == 2560 and "without an end-of-archive mark" in str(damage[0])


def test_a_tail_of_zeros_is_a_download_that_has_not_finished():
    """Download programs give a file its full size first. The samples in the hole would be missing without a word."""
    data = make([("1.jpg", b"i" * 1000), ("1.cls", b"7")])
    found, damage = tolerant(data + bytes(1 << 20))
    assert len(found) == 1 and not damage  # tar -b 2048
    found, damage = tolerant(data + bytes(3 << 20))
    assert len(found) == 1 and "bytes are zeros" in str(damage[0])
    found, damage = tolerant(bytes(3 << 20))
    assert not found and "bytes are zeros" in str(damage[0])


FOREIGN = {
    "gzip": gzip.compress(b"x" * 2000),
    "bzip2": bz2.compress(b"x" * 2000),
    "xz": lzma.compress(b"x" * 2000),
    "zstd": bytes.fromhex("28b52ffd0458610000") + bytes(600),
    "zip": b"PK\3\4" + bytes(600),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
    "HTML": b"\n<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head>" + b" " * 900,
    "AccessDenied": b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
    "JSON": b'{"message": "rate limit"}',
    "plain text": "404: nicht gefunden, für".encode() * 100,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "without one tar header": random.Random(0).randbytes(3000),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_named_for_what_it_is(kind, tmp_path):
    with pytest.raises(InputError, match=f"^a.tar is not a tar: it is .*{kind}") as error:
        scan(FOREIGN[kind], tmp_path)
    assert len(str(error.value)) < 250
    found, damage = tolerant(FOREIGN[kind])
    assert not found and len(damage) == 1 and isinstance(damage[0], tar.NotTar)


@pytest.mark.parametrize("name", ["BZhang.jpg", "PK.jpg", "{.jpg", "<html>.jpg", "version https.jpg"])
def test_a_tar_may_begin_with_any_name(name, tmp_path):
    data = make([(name, b"1"), ("2.jpg", b"2")])
    assert len(scan(data, tmp_path)) == 2
    flipped = bytearray(data)
    flipped[130] ^= 1  # of the first header: damage, and the rest is still read
    found, damage = tolerant(bytes(flipped))
    assert [s[0].name for s in found] == ["2.jpg"] and not isinstance(damage[0], tar.NotTar)


def test_no_byte_of_a_header_can_change_unseen(tmp_path):
    entries = [(f"{i}.{ext}", bytes([i]) * 700) for i in range(3) for ext in ("jpg", "cls")]
    data = make(entries)
    sound, _ = tolerant(data)
    for position in range(1536, 1536 + 512):  # the header of 0.cls
        flipped = bytearray(data)
        flipped[position] ^= 1 << random.Random(position).randrange(8)
        found, damage = tolerant(bytes(flipped))
        # A bit that turns a leading "0" of the checksum field into a space changes no meaning: same samples, no damage.
        assert damage or found == sound, position
        if damage:
            assert damage[0].offset == 1536
            assert found == [sound[0][:1], *sound[1:]]  # all samples but the damaged one are found whole


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_long_name_cut_off_behind_a_slash_is_no_folder(format, tmp_path):
    names = [f"{'long/' * 20}ü/1.{ext}" for ext in ("jpg", "cls")]  # the header holds 100 bytes: "long/long/.../"
    (sample,) = scan(make([(name, b"1") for name in names], FORMATS[format]), tmp_path)
    assert [m.name for m in sample] == names


@pytest.mark.parametrize("format", FORMATS)
def test_a_header_is_told_from_another(format, tmp_path):
    names = ["1.jpg", "a b/2.jpg", "folder/" * 12 + "3.jpg"] + (
        ["x" * 200 + "/4.jpg", "ü.jpg"] if format != "ustar" else []
    )
    data = make([(name, b"abc") for name in names], FORMATS[format])
    members = [m for sample in parse_idx(format_idx(scan(data, tmp_path)), "") for m in sample]
    assert len(members) == len(names)
    for member in members:
        assert tar.is_header_of(data[member.offset - 512 : member.offset], member)
        assert not tar.is_header_of(data[member.offset : member.offset + 512], member)
    assert not tar.is_header_of(data[members[1].offset - 512 : members[1].offset], members[0])
    assert not tar.is_header_of(data[:100], members[0])


def test_a_lost_block_and_joined_archives_are_noticed():
    first, second = make([("1.jpg", b"a"), ("1.cls", b"1")]), make([("2.jpg", b"b"), ("2.cls", b"2")])
    found, damage = tolerant(first + second)
    assert [s[0].name for s in found] == ["1.jpg", "2.jpg"] and "end-of-archive" in str(damage[0])
    zeroed = bytearray(first)
    zeroed[1024:1536] = bytes(512)  # the header of 1.cls
    found, damage = tolerant(bytes(zeroed))
    assert [[m.name for m in s] for s in found] == [["1.jpg"]] and damage


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=4096), st.integers(0, 3000))
def test_any_bytes_end_the_scan(noise, cut):
    data = make([("1.jpg", b"a" * 600), ("1.cls", b"1")])[:cut] + noise
    found, _ = tolerant(data)
    for sample in found:
        for member in sample:
            assert 0 <= member.offset and member.offset + member.size <= len(data)
