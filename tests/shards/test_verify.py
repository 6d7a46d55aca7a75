"""verify finds every kind of damage and names shard and sample; --repair makes an index that trains."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tars
from shards import index, verify
from shards.check.images import check_jpeg
from shards.errors import InputError
from shards.format.split import load_labels, load_split, read_idx
from tests.launch import ROOT


def report(folder, capsys, *options, code=None) -> dict:
    """The JSON report of a run."""
    got = verify.main([str(folder), "--json", "--workers", "1", *options])
    found = json.loads(capsys.readouterr().out)
    assert got == (0 if found["ok"] else 2)
    if code is not None:
        assert got == code, found["problems"]
    return found


def places(found: dict) -> set:
    return {(p["kind"], p["shard"], p["sample"]) for p in found["problems"]}


def test_sound_shards_are_ok(tmp_path, capsys):
    tars.make_split(tmp_path)
    tars.make_split(tmp_path, (4,), name="val")
    found = report(tmp_path, capsys, code=0)
    assert found["problems"] == [] and found["notes"] == []
    assert found["splits"]["train"]["samples"] == 12 and found["splits"]["val"]["samples"] == 4
    assert found["bytes"] == sum(e.stat().st_size for e in os.scandir(tmp_path) if e.name.endswith(".tar"))
    assert found["mb_per_second"] > 0


def test_processes_give_the_same_report(tmp_path, capsys):
    tars.make_split(tmp_path, (4, 4, 4))
    tars.flip(tmp_path / "train-000001.tar", 2000)
    one = report(tmp_path, capsys, code=2)
    assert verify.main([str(tmp_path), "--json", "--workers", "3"]) == 2
    many = json.loads(capsys.readouterr().out)
    assert many["problems"] == one["problems"] and many["splits"] == one["splits"]


def test_a_changed_pixel_names_shard_and_sample(tmp_path, capsys):
    split = tars.make_split(tmp_path)
    image = read_idx(split, split.shards[1])[3][1]
    tars.flip(tmp_path / "train-000001.tar", image.offset + image.size // 2)
    found = report(tmp_path, capsys, code=2)
    (problem,) = [p for p in found["problems"] if p["sample"] >= 0]
    assert (problem["kind"], problem["shard"], problem["sample"], problem["key"]) == (
        "checksum",
        "train-000001.tar",
        3,
        "00000009",
    )


def test_changed_padding_is_found_and_harms_no_sample(tmp_path, capsys):
    split = tars.make_split(tmp_path)
    label = read_idx(split, split.shards[0])[2][0]
    tars.flip(tmp_path / "train-000000.tar", label.offset + 100)
    found = report(tmp_path, capsys, code=2)
    assert places(found) == {("checksum", "train-000000.tar", -1)}


def test_damage_without_checksums_is_found_where_it_shows(tmp_path, capsys):
    """Foreign shards: nothing recorded. Structure, labels and decoding must show it."""
    tars.make_split(tmp_path, checksums=False)
    split = load_split(str(tmp_path), "train")
    label, image = read_idx(split, split.shards[0])[2]
    path = tmp_path / "train-000000.tar"
    sound = path.read_bytes()
    assert report(tmp_path, capsys, code=0)["notes"]

    tars.flip(path, label.offset, 2)  # "2" -> "6", outside the classes; and then "2" -> "3"
    assert places(report(tmp_path, capsys, code=2)) == {("label", "train-000000.tar", 2)}
    path.write_bytes(sound)
    tars.flip(path, label.offset, 0)
    assert places(report(tmp_path, capsys, code=2)) == {("label", "train-000000.tar", 2)}
    path.write_bytes(sound)
    tars.flip(path, image.offset + 1)
    assert places(report(tmp_path, capsys, code=2)) == {("image", "train-000000.tar", 2)}
    path.write_bytes(sound[: image.offset + 10])
    found = report(tmp_path, capsys, code=2)
    assert ("tar", "train-000000.tar", -1) in places(found) and ("tar", "train-000000.tar", 5) in places(found)


@pytest.mark.parametrize("what", ["tar", "idx", "labels", "crc32", "json"])
def test_a_missing_file_is_found(tmp_path, capsys, what):
    tars.make_split(tmp_path)
    name = {"labels": "train.labels.npy", "crc32": "train.crc32.npy", "json": "train.json"}.get(
        what, f"train-000001.{what}"
    )
    os.unlink(tmp_path / name)
    if what == "json":
        with pytest.raises(InputError, match="shards.index"):
            verify.main([str(tmp_path)])
        return
    found = report(tmp_path, capsys, code=2)
    assert any(name in p["message"] or "missing" in p["message"] for p in found["problems"])


def shard_lines(found: dict, shard: str) -> list[str]:
    """What is said of a whole shard."""
    return [p["message"] for p in found["problems"] if p["shard"] == shard and p["sample"] < 0]


@pytest.mark.parametrize(
    "change, message, left",
    [
        (lambda data, end: b"", r"it is empty \(0 bytes\)", 0),
        (lambda data, end: bytes(10240), "it holds no samples", 0),
        (lambda data, end: data[:end], "without an end-of-archive mark", 4),
        (lambda data, end: b"<html><body>502 Bad Gateway</body></html>", "not a tar: it is a web page", 0),
        (lambda data, end: data + b"garbage" * 99, "data after the end-of-archive mark", 6),
    ],
)
@pytest.mark.parametrize("checksums", [True, False])
def test_a_shard_that_is_not_whole_is_found(tmp_path, capsys, checksums, change, message, left):
    """Also where the index knows neither size nor checksum of it, and where it was made of what is there now."""
    split = tars.make_split(tmp_path, checksums=checksums)
    path = tmp_path / "train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(change(data, read_idx(split, split.shards[1])[4][0].offset - 512))
    found = report(tmp_path, capsys, code=2)
    assert re.search(message, shard_lines(found, "train-000001.tar")[0])
    assert len(found["problems"]) <= 5 and not [p for p in found["problems"] if p["shard"] == "train-000000.tar"]
    assert verify.main([str(tmp_path), "--workers", "1"]) == 2
    assert re.search(f"train-000001.tar: .*{message}", capsys.readouterr().out.splitlines()[1])
    found = report(tmp_path, capsys, "--repair", code=0)
    assert found["splits"]["train"]["samples_left"] == 6 + left
    found = report(tmp_path, capsys, code=0)
    assert any(re.search(f"train-000001.tar: known damage: .*{message}", note) for note in found["notes"])
    path.write_bytes(data)  # fetched again after all: the index lacks its samples, and that is found
    assert shard_lines(report(tmp_path, capsys, code=2), "train-000001.tar")


def test_an_empty_shard_that_the_index_counts_as_such_is_found(tmp_path, capsys):
    """As indexes of before this was checked may have it."""
    tars.make_split(tmp_path, (4, 0, 4))
    assert shard_lines(report(tmp_path, capsys, code=2), "train-000001.tar") == ["it holds no samples"]
    index.main([str(tmp_path), "--skip-bad", "--workers", "1"])
    capsys.readouterr()
    report(tmp_path, capsys, code=0)


def test_messages_do_not_grow_with_the_sample(tmp_path, capsys):
    tars.make_split(tmp_path, (2,), checksums=False)
    members = tars.sample(0, 0) + [(f"00000000.{i}.txt", b"") for i in range(3000)] + tars.sample(1, 1)
    tars.write_tar(tmp_path / "train-000000.tar", members)
    found = report(tmp_path, capsys, code=2)
    assert found["problems"] and max(len(p["message"]) for p in found["problems"]) < 300


def test_an_orphan_is_found_and_a_shard_listed_twice(tmp_path, capsys):
    tars.make_split(tmp_path)
    shutil.copy(tmp_path / "train-000001.tar", tmp_path / "train-000002.tar")
    (tmp_path / "train-000009.idx").write_bytes(b"v1.2 0\n")
    assert places(report(tmp_path, capsys, code=2)) == {
        ("shard", "train-000002.tar", -1),
        ("shard", "train-000009.idx", -1),
    }
    os.unlink(tmp_path / "train-000002.tar")
    os.unlink(tmp_path / "train-000009.idx")
    fields = json.loads((tmp_path / "train.json").read_text())
    fields["shardlist"][1] = fields["shardlist"][0]
    (tmp_path / "train.json").write_text(json.dumps(fields))
    assert any("twice" in p["message"] for p in report(tmp_path, capsys, code=2)["problems"])


def test_a_sample_packed_twice_is_found_and_equal_keys_alone_are_a_note(tmp_path, capsys):
    samples = [tars.sample(i, i) for i in range(3)]
    tars.write_tar(f"{tmp_path}/train-0.tar", [m for s in samples for m in s])
    again = [(name, data) for (name, _), (_, data) in zip(tars.sample(0, 0), tars.sample(4, 1), strict=True)]
    tars.write_tar(f"{tmp_path}/train-1.tar", again)
    index.main([str(tmp_path), "--workers", "1"])
    capsys.readouterr()
    assert any("1 keys name several samples" in note for note in report(tmp_path, capsys, code=0)["notes"])
    tars.write_tar(f"{tmp_path}/train-1.tar", again + samples[2])
    index.main([str(tmp_path), "--workers", "1"])
    capsys.readouterr()
    found = report(tmp_path, capsys, code=2)
    assert [(p["kind"], p["shard"], p["sample"], p["key"]) for p in found["problems"]] == [
        ("key", "train-1.tar", 1, "00000002")
    ]
    report(tmp_path, capsys, "--repair", code=0)
    assert report(tmp_path, capsys, code=0)["splits"]["train"]["samples"] == 4


def test_wrong_counts_and_sizes_are_found(tmp_path, capsys):
    tars.make_split(tmp_path)
    tars.edit_json(tmp_path / "train.json", class_counts=[3, 3, 2, 2, 2], image={"height": 64, "width": 48})
    found = report(tmp_path, capsys, code=2)
    assert ("count", "", -1) not in places(found)
    assert len([p for p in found["problems"] if "48x48" in p["message"]]) == 12
    tars.edit_json(tmp_path / "train.json", class_counts=[3, 3, 3, 2, 1], image={})
    assert places(report(tmp_path, capsys, code=2)) == {("count", "", -1)}
    np.save(tmp_path / "mean.npy", np.zeros((48, 48, 3)))
    tars.edit_json(tmp_path / "train.json", class_counts=[3, 3, 2, 2, 2], mean="mean.npy")
    assert places(report(tmp_path, capsys, code=2)) == {("index", "", -1)}


def test_a_decompression_bomb_is_refused_by_its_size(tmp_path, capsys):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    tars.write_tar(f"{tmp_path}/train-0.tar", [("0.png", bomb), ("0.cls", b"0"), *tars.sample(1, 0)])
    index.main([str(tmp_path)])
    capsys.readouterr()
    (problem,) = report(tmp_path, capsys, code=2)["problems"]
    assert problem["sample"] == 0 and "image" in problem["message"] and "limit" in problem["message"]


def test_repair_leaves_out_what_is_damaged_and_nothing_else(tmp_path, capsys):
    split = tars.make_split(tmp_path, (6, 6, 6))
    lines = [read_idx(split, shard) for shard in split.shards]
    tars.flip(tmp_path / "train-000000.tar", lines[0][1][0].offset - 512 + 3)  # header of .cls of sample 1
    tars.flip(tmp_path / "train-000000.tar", lines[0][4][1].offset + 300)  # pixels of sample 4
    with open(tmp_path / "train-000002.tar", "r+b") as file:
        file.truncate(lines[2][3][1].offset + 5)  # samples 3, 4, 5
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path) if name.endswith(".tar")}
    found = report(tmp_path, capsys, code=2)
    assert {(p["shard"], p["sample"]) for p in found["problems"] if p["sample"] >= 0} >= {
        ("train-000000.tar", 1),
        ("train-000000.tar", 4),
        ("train-000002.tar", 3),
        ("train-000002.tar", 4),
        ("train-000002.tar", 5),
    }
    found = report(tmp_path, capsys, "--repair", code=0)
    assert found["problems"] and found["splits"]["train"]["samples_left"] == 13
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    split = load_split(str(tmp_path), "train")
    left = [i for i in range(18) if i not in (1, 4, 15, 16, 17)]
    assert load_labels(split).tolist() == [i % 5 for i in left]
    assert [read_idx(split, shard)[i][1].name for shard in split.shards for i in range(shard.nsamples)] == [
        f"{i:08d}.jpg" for i in left
    ]
    assert json.loads((tmp_path / "train.json").read_text())["seed"] == 7  # what others wrote there is kept
    again = report(tmp_path, capsys, code=0)
    assert again["problems"] == [] and any("left out" in note for note in again["notes"])
    # The index alone, made anew, still leaves them out; damage that comes later is found as ever.
    index.main([str(tmp_path), "--skip-bad"])
    capsys.readouterr()
    assert load_labels(load_split(str(tmp_path), "train")).tolist() == [i % 5 for i in left]
    tars.flip(tmp_path / "train-000000.tar", lines[0][5][1].offset + 300)
    assert ("checksum", "train-000000.tar", -1) in places(report(tmp_path, capsys, code=2))


def test_repair_writes_a_lost_index_anew(tmp_path, capsys):
    split = tars.make_split(tmp_path)
    lines = read_idx(split, split.shards[1])
    sound = (tmp_path / "train-000001.idx").read_bytes()
    os.unlink(tmp_path / "train-000000.idx")
    damaged = sound.replace(str(lines[2][1].offset).encode(), str(lines[3][1].offset).encode())
    (tmp_path / "train-000001.idx").write_bytes(damaged)
    assert ("index", "train-000001.tar", 2) in places(report(tmp_path, capsys, code=2))
    report(tmp_path, capsys, "--repair", code=0)
    assert (tmp_path / "train-000001.idx").read_bytes() == sound
    assert load_split(str(tmp_path), "train").nsamples == 12
    assert report(tmp_path, capsys, code=0)["notes"] == []


def test_repair_drops_a_missing_shard_and_rewrites_labels(tmp_path, capsys):
    tars.make_split(tmp_path, (4, 4, 4))
    os.unlink(tmp_path / "train-000001.tar")
    os.unlink(tmp_path / "train-000001.idx")
    tars.flip(tmp_path / "train.labels.npy", 140)
    report(tmp_path, capsys, "--repair", code=0)
    split = load_split(str(tmp_path), "train")
    assert load_labels(split).tolist() == [i % 5 for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    report(tmp_path, capsys, code=0)


def test_repair_takes_no_label_that_nothing_vouches_for(tmp_path, capsys):
    """The tar has changed, and neither labels nor checksums of its samples are there any more."""
    split = tars.make_split(tmp_path)
    label = read_idx(split, split.shards[0])[1][0]
    tars.flip(tmp_path / "train-000000.tar", label.offset, 1)  # "1" -> "3"
    os.unlink(tmp_path / "train.labels.npy")
    os.unlink(tmp_path / "train.crc32.npy")
    report(tmp_path, capsys, "--repair", code=0)
    split = load_split(str(tmp_path), "train")
    assert [shard.nsamples for shard in split.shards] == [0, 6]
    assert load_labels(split).tolist() == [i % 5 for i in range(6, 12)]


def test_repair_records_missing_checksums(tmp_path, capsys):
    tars.write_tar(f"{tmp_path}/train-0.tar", tars.sample(0, 0) + tars.sample(1, 1))
    index.main([str(tmp_path)])
    capsys.readouterr()
    assert "--repair records" in report(tmp_path, capsys, code=0)["notes"][0]
    report(tmp_path, capsys, "--repair", code=0)
    assert report(tmp_path, capsys, code=0)["notes"] == []
    split = load_split(str(tmp_path), "train")
    image = read_idx(split, split.shards[0])[1][1]
    tars.flip(tmp_path / "train-0.tar", image.offset + image.size - 40)
    assert ("checksum", "train-0.tar", 1) in places(report(tmp_path, capsys, code=2))


def test_repair_writes_nowhere_else(tmp_path):
    """An index may name a tar outside its folder; no file is written beside that one."""
    tars.make_split(tmp_path / "other")
    tars.make_split(tmp_path / "mine")
    os.unlink(tmp_path / "mine/train.crc32.npy")
    fields = json.loads((tmp_path / "mine/train.json").read_text())
    fields["shardlist"][1]["url"] = "../other/train-000001.tar"
    (tmp_path / "mine/train.json").write_text(json.dumps(fields))
    before = {name: (tmp_path / "other" / name).read_bytes() for name in os.listdir(tmp_path / "other")}
    with pytest.raises(InputError, match="outside"):
        verify.main([str(tmp_path / "mine"), "--repair", "--workers", "1"])
    assert {name: (tmp_path / "other" / name).read_bytes() for name in before} == before


def test_a_truncated_image_is_found_when_it_decodes_in_part(tmp_path, capsys):
    data = tars.image(0, 256)
    entries = [("0.jpg", data[: len(data) * 2 // 3]), ("0.cls", b"0"), *tars.sample(1, 0)]
    tars.write_tar(f"{tmp_path}/train-0.tar", entries)
    index.main([str(tmp_path)])
    capsys.readouterr()
    assert places(report(tmp_path, capsys, code=2)) == {("image", "train-0.tar", 0)}
    assert places(report(tmp_path, capsys, "--no-decode", code=0)) == set()


def test_the_fast_check_of_a_jpeg_agrees_with_decoding_it_in_full():
    simplejpeg = pytest.importorskip("simplejpeg")

    def sound(check, data) -> bool:
        try:
            check(data)
            return True
        except ValueError:
            return False

    rng = random.Random(0)
    found = 0
    for number in range(1000):
        data = bytearray(tars.image(number % 20, 128))
        if number % 7:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        full = sound(lambda d: simplejpeg.decode_jpeg(d, strict=True), bytes(data))
        assert sound(check_jpeg, bytes(data)) == full, number
        found += not full
    assert found > 300


def test_the_command_ends_with_code_2_and_one_line_for_bad_input(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(*args):
        run = [sys.executable, "-m", "shards.verify", *map(str, args)]
        return subprocess.run(run, capture_output=True, text=True, timeout=60, env=environment)

    none = command(tmp_path / "none")
    assert none.returncode == 2 and re.fullmatch(r"error: no folder .*\n", none.stderr) and not none.stdout
    tars.make_split(tmp_path)
    assert command(tmp_path).returncode == 0
    tars.flip(tmp_path / "train-000000.tar", 1700)
    bad = command(tmp_path)
    assert bad.returncode == 2 and "train-000000.tar: sample 0 (key '00000000')" in bad.stdout and not bad.stderr
