"""slurm/lib/stage.py copies to a node's disk what the index names, and nothing is missing there."""

import collections
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

import stage
from shards.format.split import load_split
from shards.machine import progress
from tests.launch import ROOT


def run_stage(data, dest, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "slurm/lib/stage.py", data, dest]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def data(demo_data, tmp_path):
    """The demo's shards: one lies a folder deeper, one is a link, and one is named by its whole path."""
    folder, elsewhere = tmp_path / "my data", tmp_path / "elsewhere"
    shutil.copytree(demo_data, folder)
    (folder / "deeper").mkdir()
    elsewhere.mkdir()
    for end in ("tar", "idx"):
        os.rename(folder / f"train-000000.{end}", folder / "deeper" / f"train-000000.{end}")
        for number in (1, 2):
            os.rename(folder / f"train-00000{number}.{end}", elsewhere / f"train-00000{number}.{end}")
        os.symlink(elsewhere / f"train-000001.{end}", folder / f"train-000001.{end}")
    fields = json.loads((folder / "train.json").read_text())
    fields["shardlist"][0]["url"] = "deeper/train-000000.tar"
    fields["shardlist"][2]["url"] = str(elsewhere / "train-000002.tar")
    (folder / "train.json").write_text(json.dumps(fields))
    return folder


def test_everything_that_the_index_names_is_copied_once(data, tmp_path):
    dest = tmp_path / "dest"
    done = run_stage(data, dest)
    assert done.returncode == 0, done.stderr
    for name in ("train", "val"):
        here, there = load_split(str(data), name), load_split(str(dest), name)
        pairs = [(here.path(here.mean), there.path(there.mean)), (here.path(here.labels), there.path(there.labels))]
        for ours, theirs in zip(here.shards, there.shards, strict=True):
            pairs += [(here.path(ours.url), there.path(theirs.url)), (here.idx_path(ours), there.idx_path(theirs))]
            assert (ours.sha256, ours.nsamples) == (theirs.sha256, theirs.nsamples)
        for source, copy in pairs:
            assert copy.startswith(f"{dest}/") and not os.path.islink(copy)
            assert open(source, "rb").read() == open(copy, "rb").read()
    # Again: only what is not whole.
    inodes = {path: path.stat().st_ino for path in dest.rglob("*") if path.is_file()}
    os.truncate(dest / "train-000003.tar", 100)
    assert run_stage(data, dest).returncode == 0
    changed = [path.name for path, inode in inodes.items() if path.stat().st_ino != inode]
    assert changed == ["train-000003.tar"]
    assert (dest / "train-000003.tar").read_bytes() == (data / "train-000003.tar").read_bytes()


def test_a_missing_shard_is_an_error(data, tmp_path):
    os.unlink(tmp_path / "elsewhere" / "train-000001.tar")
    done = run_stage(data, tmp_path / "dest")
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"error: cannot stage {data}/train-000001.tar: No such file")
        and done.stderr.count("\n") == 1
    )


def test_a_disk_without_room_is_told_before_and_while_copying(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage.py", str(data), str(tmp_path / "dest")])
    usage = collections.namedtuple("usage", "free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage(10))
        assert stage.main() == 3

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "utime", no_space)
        assert stage.main() == 3
    assert capsys.readouterr().err.count("warning: no room in ") == 2
    left = [path for path in (tmp_path / "dest").rglob("*") if path.is_file()]
    assert [path.name for path in left] == [".lock"]  # no half files, and no index of shards that are not there


def test_the_second_job_on_a_node_waits_for_the_first(data, tmp_path):
    dest = tmp_path / "dest"
    dest.mkdir()
    with open(dest / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        command = [sys.executable, "slurm/lib/stage.py", data, dest]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as second:
            assert "another job is copying" in second.stdout.readline()
            assert not (dest / "train.json").exists()
            fcntl.lockf(lock, fcntl.LOCK_UN)
            assert second.wait(60) == 0
    assert (dest / "train.json").exists()


def test_progress_names_bytes_rate_and_what_is_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    counter = stage.Counter(100 << 30)
    for now in (1.0, 6.0, 11.0):  # noqa: B007
        counter.add(5 << 30)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" copying shards 15,360/102,400 MiB 1,024 MiB/s ETA 0:01:25")
