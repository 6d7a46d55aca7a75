"""What `python -m shards.pack` promises: nothing lost, nothing mixed up, the same bytes whoever packs."""

import glob
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from shards import pack
from shards.errors import InputError
from shards.format.split import load_labels, load_split, read_idx
from shards.write import pack as packing
from shards.write.pack import lock
from tests import imagenet40
from tests.launch import ROOT, run

DEMO = os.path.join(ROOT, "shards", "demo")
COMMAND = [sys.executable, "-m", "shards.pack"]


def packed(source, dest, *options: str) -> str:
    """Pack in this process; DEST."""
    assert pack.main([str(source), str(dest), "--workers", "1", *options]) == 0
    return str(dest)


def command(*arguments, **more) -> subprocess.CompletedProcess:
    """Pack as a user does."""
    more.setdefault("timeout", 120)
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **more)


def fails(*arguments, **more) -> str:
    """The one line that a failing command prints."""
    done = command(*arguments, **more)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if " packing " not in line and not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def digests(dest: str) -> dict[str, str]:
    """All files that make up the packed data, by their hashes."""
    paths = (path for path in glob.glob(f"{dest}/*") if os.path.isfile(path))
    return {os.path.basename(path): hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}


def samples(dest: str, split: str) -> list[tuple[int, str, bytes]]:
    """Label, ending and bytes of each image, read by Python's own tarfile."""
    found = []
    for path in sorted(glob.glob(f"{dest}/{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name in [name for name in members if not name.endswith(".cls")]:
            key, ending = name.split(".")
            found.append((int(members[f"{key}.cls"]), ending, members[name]))
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("folders")
    imagenet40.write_folders(str(root))
    return str(root)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("archives")
    imagenet40.write_archives(str(root))
    return str(root)


@pytest.fixture(scope="module")
def reference(archives, tmp_path_factory) -> str:
    """The archives packed by one process."""
    return packed(archives, tmp_path_factory.mktemp("packed") / "reference", "--resize", "32", "--shard-images", "50")


# ---- the data ---------------------------------------------------------------------------------------------------


def test_demo_data_is_balanced_and_packs_into_both_splits(tmp_path):
    dest = packed(DEMO, tmp_path / "demo", "--resize", "76")
    assert sum(os.path.getsize(path) for path in glob.glob(f"{DEMO}/*.gz")) < 2_000_000
    for name, count in (("train", 300), ("val", 60)):
        split = load_split(dest, name)
        fields = json.load(open(f"{dest}/{name}.json"))
        assert fields["class_counts"] == [count] * 10 and split.nsamples == 10 * count
        assert (split.height, split.width, split.encoding) == (76, 76, "jpeg")
        assert split.classes[0] == "T-shirt/top" and split.mean == "mean.npy"
        assert np.bincount(load_labels(split)).tolist() == [count] * 10
        for shard in split.shards:
            data = open(split.path(shard.url), "rb").read()
            assert len(data) == shard.filesize and hashlib.sha256(data).hexdigest() == shard.sha256


def test_idx_pixels_are_kept_exactly_as_raw(tmp_path):
    dest = packed(DEMO, tmp_path / "raw", "--encoding", "raw", "--resize", "0")
    import gzip

    images = gzip.open(f"{DEMO}/t10k-images-idx3-ubyte.gz").read()[16:]
    labels = gzip.open(f"{DEMO}/t10k-labels-idx1-ubyte.gz").read()[8:]
    source = sorted((labels[i], images[i * 784 : (i + 1) * 784]) for i in range(600))
    stored = [(label, np.frombuffer(data, np.uint8).reshape(-1, 3)) for label, _, data in samples(dest, "val")]
    assert all((rgb == rgb[:, :1]).all() for _, rgb in stored)
    assert sorted((label, rgb[:, 0].tobytes()) for label, rgb in stored) == source


def test_index_offsets_are_those_of_the_members(reference):
    split = load_split(reference, "val")
    shard = split.shards[1]
    data = open(split.path(shard.url), "rb").read()
    with tarfile.open(split.path(shard.url)) as tar:
        members = [(m.name, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.offset, m.size) for sample in read_idx(split, shard) for m in sample] == members
    assert all(
        data[m.offset : m.offset + 2] == b"\xff\xd8" for s in read_idx(split, shard) for m in s if m.ext == "jpg"
    )


def test_webdataset_and_verify_read_what_is_packed(reference):
    from webdataset import WebDataset

    labels = [int(sample["cls"]) for sample in WebDataset(f"{reference}/val-000000.tar", shardshuffle=False)]
    assert labels == load_labels(load_split(reference, "val"))[: len(labels)].tolist()
    done = subprocess.run([sys.executable, "-m", "shards.verify", reference], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- ImageNet ---------------------------------------------------------------------------------------------------


def test_archives_and_folders_give_the_same_bytes(archives, folders, reference, tmp_path):
    words = {s["WNID"]: s["words"] for s in imagenet40.synsets()}
    other = packed(folders, tmp_path / "folders", "--resize", "32", "--shard-images", "50")
    same, different = digests(reference), digests(other)
    # The folders know the WordNet ids only, the devkit knows the words too.
    for name in ("train.json", "val.json"):
        del same[name], different[name]
        ours, theirs = (json.load(open(f"{dest}/{name}")) for dest in (reference, other))
        assert ours["wnids"] == theirs["wnids"] == theirs["classes"] == sorted(words)
        assert ours["classes"] == [words[wnid] for wnid in sorted(words)]
        assert ours["shardlist"] == theirs["shardlist"] and ours["class_counts"] == theirs["class_counts"]
    assert same == different
    assert sum(s.nsamples for s in load_split(reference, "train").shards) == 800


def test_every_image_is_there_bit_for_bit_with_its_class(archives, tmp_path):
    dest = packed(archives, tmp_path / "copy", "--encoding", "copy")
    wnids = json.load(open(f"{dest}/train.json"))["wnids"]
    train = [(w, data) for w, files in imagenet40.train_images().items() for data in files.values()]
    val = [(wnid, data) for _, wnid, data in imagenet40.val_images()]
    for split, images in (("train", train), ("val", val)):
        assert sorted((wnids[label], data) for label, _, data in samples(dest, split)) == sorted(images)
    endings = {ending for _, ending, data in samples(dest, "train") if data[1:4] == b"PNG"}
    assert endings == {"png"}, "a PNG named .JPEG is stored as what it is"


@pytest.mark.parametrize("form", ["text", "csv", "numbers", "devkit folder"])
def test_validation_labels_in_every_form(form, archives, reference, tmp_path):
    shutil.copy(f"{archives}/ILSVRC2012_img_val.tar", tmp_path / "val.tar")
    labels = tmp_path / "labels.txt"
    wnids = sorted(s["WNID"] for s in imagenet40.synsets())
    rows = [(name, wnid) for name, wnid, _ in imagenet40.val_images()]
    if form == "text":
        imagenet40.write_val_text(str(labels))
    elif form == "csv":  # Kaggle's LOC_val_solution.csv
        lines = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4\n" for name, wnid in rows]
        labels.write_text("ImageId,PredictionString\n" + "".join(lines))
    elif form == "numbers":  # Caffe's val.txt
        labels.write_text("".join(f"{name} {wnids.index(wnid)}\n" for name, wnid in rows))
    else:
        labels = tmp_path
        with tarfile.open(f"{archives}/ILSVRC2012_devkit_t12.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        labels = tmp_path / "ILSVRC2012_devkit_t12"
    dest = packed(
        tmp_path / "val.tar", tmp_path / "out", "--labels", str(labels), *"--resize 32 --shard-images 50".split()
    )
    assert digests(dest)["val-000000.tar"] == digests(reference)["val-000000.tar"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_oddities_come_out_as_pillow_shows_them(archives, tmp_path):
    dest = packed(archives, tmp_path / "kept", "--resize", "0", "--quality", "100", "--split", "train")
    wnids = json.load(open(f"{dest}/train.json"))["wnids"]
    stored = {}
    for label, _, data in samples(dest, "train"):
        stored.setdefault(wnids[label], []).append(pixels(data))
    for wnid, files in imagenet40.train_images().items():
        for data in files.values():
            image = pixels(data)  # Pillow: EXIF orientation ignored, Adobe's inverted CMYK, grey to RGB
            assert any(s.shape == image.shape and np.abs(s - image).mean() < 6 for s in stored[wnid])


def test_flat_validation_folder_beside_class_folders(folders, reference, tmp_path):
    os.symlink(f"{folders}/train", tmp_path / "train")
    for name, _, data in imagenet40.val_images():
        imagenet40._write(str(tmp_path / "val" / name), data)
    with pytest.raises(InputError, match="--labels"):
        packed(tmp_path, tmp_path / "out")
    imagenet40.write_val_text(str(tmp_path / "labels.txt"))
    dest = packed(
        tmp_path, tmp_path / "out", "--labels", str(tmp_path / "labels.txt"), *"--resize 32 --shard-images 50".split()
    )
    assert digests(dest)["val-000001.tar"] == digests(reference)["val-000001.tar"]


def test_kaggles_copy_of_imagenet(folders, reference, tmp_path):
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    os.makedirs(data)
    os.symlink(f"{folders}/train", data / "train")
    for name, _, content in imagenet40.val_images():
        imagenet40._write(str(data / "val" / name), content)
    lines = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4\n" for name, wnid, _ in imagenet40.val_images()]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    words = "".join(f"{s['WNID']} {s['words']}\n" for s in imagenet40.synsets())
    (tmp_path / "LOC_synset_mapping.txt").write_text(words)
    dest = packed(tmp_path, tmp_path / "out", *"--resize 32 --shard-images 50".split())
    assert digests(dest) == digests(reference)


def test_an_archive_beside_the_folder_of_the_other_split_is_ambiguous(archives, folders, tmp_path):
    os.symlink(f"{folders}/train", tmp_path / "train")
    os.symlink(f"{archives}/ILSVRC2012_img_val.tar", tmp_path / "ILSVRC2012_img_val.tar")
    with pytest.raises(InputError, match="holds both"):
        packed(tmp_path, tmp_path / "out")


def test_class_folders_alone_make_one_split(folders, reference, tmp_path):
    options = "--resize 32 --shard-images 50".split()
    dest = packed(f"{folders}/val", tmp_path / "one", "--split", "val", *options)
    assert digests(dest)["val-000002.tar"] == digests(reference)["val-000002.tar"]
    dest = packed(folders, tmp_path / "other", "--split", "val", *options)
    assert digests(dest)["val-000002.tar"] == digests(reference)["val-000002.tar"]
    assert not os.path.exists(f"{dest}/train.json")


def test_splits_packed_by_two_commands_must_agree_in_their_classes(archives, reference, tmp_path):
    options = "--resize 32 --shard-images 50".split()
    dest = packed(f"{archives}/ILSVRC2012_img_train.tar", tmp_path / "two", *options)
    packed(f"{archives}/ILSVRC2012_img_val.tar", dest, *options)
    assert digests(dest) == digests(reference)
    labels = tmp_path / "few.txt"
    labels.write_text("".join(f"{name} 0\n" for name, _, _ in imagenet40.val_images()))
    packed(f"{archives}/ILSVRC2012_img_train.tar", tmp_path / "other", *options)
    with pytest.raises(InputError, match="40 classes, which are not the 1"):
        packed(f"{archives}/ILSVRC2012_img_val.tar", tmp_path / "other", *options, "--labels", str(labels))


def test_packing_shards_again_keeps_every_sample(reference, tmp_path):
    dest = packed(reference, tmp_path / "again", "--encoding", "copy", "--shard-images", "33", "--seed", "5")
    for split in ("train", "val"):
        assert sorted(samples(dest, split)) == sorted(samples(reference, split))
        old, new = load_split(reference, split), load_split(dest, split)
        assert (new.classes, new.height, new.width) == (old.classes, 32, 32)
    assert samples(dest, "val") != samples(reference, "val"), "another seed, another order"
    assert digests(dest)["mean.npy"] == digests(reference)["mean.npy"]


# ---- output -----------------------------------------------------------------------------------------------------


def test_mean_is_that_of_the_stored_pixels(tmp_path):
    dest = packed(DEMO, tmp_path / "raw", "--encoding", "raw", "--resize", "40")
    stored = np.array([np.frombuffer(data, np.uint8) for _, _, data in samples(dest, "train")], np.float64)
    mean = np.load(f"{dest}/mean.npy")
    assert mean.dtype == np.float32 and mean.shape == (40, 40, 3)
    np.testing.assert_array_equal(mean, stored.mean(axis=0).reshape(40, 40, 3).astype(np.float32))


@pytest.mark.parametrize("fit", ["crop", "squash", "none"])
def test_fits(fit, archives, tmp_path):
    dest = packed(archives, tmp_path / fit, "--resize", "24", "--fit", fit, "--split", "val", "--shard-images", "60")
    split = load_split(dest, "val")
    sizes = {pixels(data).shape[:2] for _, _, data in samples(dest, "val")}
    if fit == "none":
        assert all(min(size) == 24 for size in sizes) and len(sizes) > 1 and split.height == 0
    else:
        assert sizes == {(24, 24)} and (split.height, split.width) == (24, 24)
    assert split.mean == "", "the mean image is that of the training split"


def test_shards_are_even_whatever_the_split_holds(reference):
    for split in ("train", "val"):
        counts = [shard.nsamples for shard in load_split(reference, split).shards]
        assert max(counts) - min(counts) <= 1 and max(counts) <= 50


def test_shard_mb_sets_the_size(archives, tmp_path):
    dest = packed(archives, tmp_path / "mb", "--encoding", "copy", "--shard-mb", "0.5", "--split", "train")
    sizes = [shard.filesize for shard in load_split(dest, "train").shards]
    assert len(sizes) > 2 and all(350_000 < size < 700_000 for size in sizes)


# ---- parallel, stopped, damaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3])
def test_same_bytes_with_any_number_of_processes(processes, archives, reference, tmp_path):
    done = command(archives, tmp_path / "out", *"--resize 32 --shard-images 50".split(), "--workers", processes)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(reference)


MPIRUN = shutil.which("mpirun", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")


def mpirun(count: int, *arguments) -> subprocess.CompletedProcess:
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    line = [MPIRUN, *root, "--oversubscribe", "-np", str(count), *COMMAND, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not MPIRUN, reason="no mpirun")
def test_same_bytes_under_mpirun(archives, reference, tmp_path):
    done = mpirun(2, archives, tmp_path / "out", *"--resize 32 --shard-images 50".split())
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(reference)
    assert done.stdout.count("train: 800 images") == 2, "rank 0 speaks, once before and once after"


@pytest.mark.skipif(not MPIRUN, reason="no mpirun")
@pytest.mark.parametrize("what", ["no source", "unknown option", "source damaged under way"])
def test_an_error_under_mpirun_is_shown_once(what, archives, tmp_path):
    arguments = [archives, tmp_path / "out", "--encoding", "copy", "--shard-images", "5"]
    if what == "no source":
        arguments[0] = tmp_path / "nothing"
    elif what == "unknown option":
        arguments.append("--colour")
    else:  # the images of one shard end before their headers say so: one rank meets it
        packed(archives, tmp_path / "source", "--encoding", "copy", "--split", "train", "--shard-images", "200")
        with open(tmp_path / "source" / "train-000002.tar", "r+b") as file:
            file.truncate(40_000)
        arguments[0] = tmp_path / "source"
    done = mpirun(2, *arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not glob.glob(f"{tmp_path}/out/.pack/*.tmp")


def test_killed_half_way_the_same_command_carries_on(archives, reference, tmp_path):
    out = tmp_path / "out"
    arguments = [*COMMAND, archives, str(out), *"--resize 32 --shard-images 50 --workers 2".split()]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(glob.glob(f"{out}/.pack/train-0*.json")) < 3:
        assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = digests(reference)
    before = {name: digest for name, digest in digests(out).items() if name.endswith(".tar")}
    assert 3 <= len(before) < 19 and before.items() <= whole.items(), "never a half shard under a final name"
    stamps = {name: os.stat(out / name).st_mtime_ns for name in glob.glob("train-00000[01].tar", root_dir=out)}
    done = command(archives, out, *"--resize 32 --shard-images 50 --workers 1".split())
    assert done.returncode == 0 and "carrying on" in done.stdout, done.stderr
    assert digests(out) == whole
    assert stamps == {name: os.stat(out / name).st_mtime_ns for name in stamps}, "finished shards are kept"
    assert not glob.glob(f"{out}/.pack/*.tmp")


def _descendants(process: int) -> list[int]:
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(entry))
        except OSError:
            continue  # it has ended
    found = [process]
    for parent in found:
        found += parents.get(parent, [])
    return found[1:]


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_ends_the_pack_with_one_line(archives, tmp_path):
    out = tmp_path / "out"
    arguments = [*COMMAND, archives, str(out), *"--resize 32 --shard-images 20 --workers 2".split()]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not glob.glob(f"{out}/train-*.tar"):
        assert process.poll() is None
    children = _descendants(process.pid)
    os.kill(children[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "a packing process was ended by SIGKILL" in errors and "Traceback" not in errors
    deadline = time.monotonic() + 20
    while any(map(_runs, children)):
        assert time.monotonic() < deadline, "somebody is left behind"


def test_a_lost_shard_is_made_again_alone(reference, tmp_path, archives, capsys):
    shutil.copytree(reference, tmp_path / "out")
    os.unlink(tmp_path / "out" / "train-000007.tar")
    packed(archives, tmp_path / "out", *"--resize 32 --shard-images 50".split())
    assert "1 shards remain" in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(reference)


def test_a_finished_pack_has_nothing_left_to_do(reference, archives, capsys):
    before = digests(reference)
    packed(archives, reference, *"--resize 32 --shard-images 50".split())
    assert "packed before" in capsys.readouterr().out and digests(reference) == before


def test_other_settings_or_sources_are_refused(reference, archives, folders, tmp_path):
    options = "--resize 32 --shard-images 50".split()
    for more, reason in (
        (["--seed", "1"], "seed 0, now 1"),
        (["--quality", "80"], "quality 90, now 80"),
    ):
        with pytest.raises(InputError, match=reason):
            packed(archives, reference, *options, *more)
    with pytest.raises(InputError, match="other source files"):
        packed(f"{folders}/train", reference, *options)
    (tmp_path / "train-000000.tar").write_bytes(b"")
    with pytest.raises(InputError, match="did not begin"):
        packed(archives, tmp_path, *options)


def test_two_packs_into_one_folder_do_not_mix(archives, tmp_path):
    out = str(tmp_path / "out")
    os.makedirs(out)
    os.makedirs(f"{out}/.pack")
    with lock(out):
        assert f"{out} is in use by process {os.getpid()}" in fails(archives, out)
    assert not glob.glob(f"{out}/*")


def test_full_disk_loses_nothing(archives, reference, tmp_path):
    out = tmp_path / "out"
    options = [archives, out, *"--resize 32 --shard-images 50 --workers 2".split()]
    largest = max(os.path.getsize(path) for path in glob.glob(f"{reference}/train-*.tar"))
    command(f"{archives}/ILSVRC2012_img_val.tar", out, *options[2:])
    for limit in (largest // 2, largest - 512):  # met while writing, and with the last block
        error = fails(*options, preexec_fn=lambda size=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        assert "cannot write" in error and "carries on" in error
        finished = {n: d for n, d in digests(out).items() if n.endswith(".tar")}
        assert finished.items() <= digests(reference).items() and not glob.glob(f"{out}/.pack/*.tmp")
    assert command(*options).returncode == 0
    assert digests(out) == digests(reference)


def _without_override() -> list[str]:
    """A prefix that takes root's power to ignore permissions away."""
    if os.getuid():
        return []
    drop = "-dac_override,-dac_read_search"
    line = ["setpriv", "--bounding-set", drop, "--inh-caps", drop]
    if not shutil.which("setpriv") or subprocess.run([*line, "true"], capture_output=True).returncode:
        pytest.skip("root ignores permissions, and setpriv cannot change that here")
    return line


@pytest.mark.parametrize("what", ["class folder", "image", "archive", "destination"])
def test_permission_denied(what, tmp_path):
    source, dest = tmp_path / "source", tmp_path / "dest"
    for name in ("a", "b"):
        imagenet40._write(str(source / name / "1.jpg"), imagenet40.jpeg(imagenet40.picture(1)))
    os.makedirs(dest)
    locked = {"class folder": source / "b", "image": source / "b" / "1.jpg", "destination": dest}.get(what)
    if what == "archive":
        locked = source / "ILSVRC2012_img_train.tar"
        locked.write_bytes(b"")
    mode = locked.stat().st_mode
    os.chmod(locked, 0o000)
    try:
        line = [*_without_override(), *COMMAND, str(source), str(dest), "--shard-images", "1"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        os.chmod(locked, mode)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "Permission denied" in done.stderr and str(locked) in done.stderr and "Traceback" not in done.stderr


def _png_header(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _huge_jpeg() -> bytes:
    data = bytearray(imagenet40.jpeg(imagenet40.picture(2)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


BAD = {
    "truncated.jpg": lambda: imagenet40.jpeg(imagenet40.picture(1))[:-200],
    "text.jpg": lambda: b"<html>404</html>",
    "empty.jpg": lambda: b"",
    "bomb.png": lambda: _png_header(50_000, 50_000),
    "bomb.jpg": _huge_jpeg,
    "postscript.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("encoding", ["jpeg", "raw", "planes", "copy"])
def test_bad_images_are_named_and_left_out_only_when_allowed(encoding, tmp_path, capsys):
    source = tmp_path / "source"
    for i in range(12):
        imagenet40._write(str(source / "good" / f"{i}.jpg"), imagenet40.jpeg(imagenet40.picture(i)))
    # Copying does not decode: what is cut off behind its header is found by shards.verify.
    names = [name for name in BAD if encoding != "copy" or name != "truncated.jpg"]
    for name in names:
        imagenet40._write(str(source / "odd" / name), BAD[name]())
    (source / "good" / "notes.txt").write_text("not an image")
    options = [] if encoding == "copy" else ["--resize", "32"]
    arguments = [source, tmp_path / "out", "--encoding", encoding, "--shard-images", "4", *options]
    with pytest.raises(InputError, match=f"{len(names)} images cannot be decoded") as error:
        packed(*arguments)
    assert f"--max-bad {len(names)}" in str(error.value) and not os.path.exists(tmp_path / "out" / "train.json")
    report = open(tmp_path / "out" / ".pack" / "bad.txt").read()
    assert all(f"odd/{name}\t" in report for name in names)
    assert "more pixels than the limit" in report and "65000x65000 pixels are more than the limit" in report
    capsys.readouterr()
    dest = packed(*arguments, "--max-bad", str(len(names)))
    assert "(packed before)" in capsys.readouterr().out, "the shards need not be packed again"
    assert json.load(open(f"{dest}/train.json"))["class_counts"] == [12, 0]
    assert [label for label, *_ in samples(dest, "train")] == [0] * 12


def test_a_source_full_of_bad_images_stops_the_pack_early(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "TOO_MANY_BAD", 3)
    for i in range(20):
        imagenet40._write(str(tmp_path / "source" / "a" / f"{i:02}.jpg"), b"<html>404</html>")
    with pytest.raises(InputError, match="is this the source"):
        packed(tmp_path / "source", tmp_path / "out", "--shard-images", "2", "--max-bad", "1")
    assert len(glob.glob(f"{tmp_path}/out/*.tar")) < 5


# ---- bad usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["SOURCE"], "arguments are required: DEST"),
        (["/nowhere", "DEST"], "no such file or folder"),
        (["SOURCE", "DEST", "--resiz", "10"], "did you mean --resize"),
        (["SOURCE", "DEST", "--resize", "-3"], "--resize -3"),
        (["SOURCE", "DEST", "--encoding", "copy"], "no image files to copy"),
        (["SOURCE", "DEST", "--encoding", "copy", "--resize", "64"], "leave --resize out"),
        (["SOURCE", "DEST", "--encoding", "raw", "--fit", "none"], "raw images must have one size"),
        (["SOURCE", "DEST", "--quality", "101"], "--quality 101"),
        (["SOURCE", "DEST", "--workers", "0"], "--workers 0"),
        (["SOURCE", "DEST", "--shard-mb", "1", "--shard-images", "5"], "one of"),
        (["SOURCE", "DEST", "--split", "test"], "no split 'test'"),
        (["SOURCE", "DEST", "--seed", str(2**64)], "--seed"),
        (["SOURCE", "DEST", "--labels", "x.txt"], "labels of its own"),
        (["SOURCE", "SOURCE"], "the same folder"),
        (["CLASSES", "CLASSES/shards"], "lies among the class folders"),
        (["EMPTY", "DEST"], "nothing to pack"),
        (["EMPTY/text", "DEST"], "neither a folder nor a .tar"),
        (["SOURCE", "EMPTY/text"], "cannot make the folder"),
    ],
)
def test_bad_usage(arguments, reason, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "text").write_text("x")
    paths = {"SOURCE": DEMO, "DEST": str(tmp_path / "dest"), "EMPTY": str(empty), "EMPTY/text": str(empty / "text")}
    paths |= {"CLASSES": str(tmp_path / "classes"), "CLASSES/shards": str(tmp_path / "classes" / "shards")}
    imagenet40._write(str(tmp_path / "classes" / "a" / "1.jpg"), imagenet40.jpeg(imagenet40.picture(1)))
    with pytest.raises(InputError) as error:
        pack.main([paths.get(word, word) for word in arguments])
    assert reason in str(error.value)


@pytest.mark.parametrize("what", ["train tar", "inner tar", "val tar", "devkit", "idx", "idx labels"])
def test_cut_off_sources_are_errors(what, archives, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DEMO if "idx" in what else archives, source)
    name = {
        "train tar": "ILSVRC2012_img_train.tar",
        "inner tar": "ILSVRC2012_img_train.tar",
        "val tar": "ILSVRC2012_img_val.tar",
        "devkit": "ILSVRC2012_devkit_t12.tar.gz",
        "idx": "t10k-images-idx3-ubyte.gz",
        "idx labels": "t10k-labels-idx1-ubyte.gz",
    }[what]
    path = source / name
    os.chmod(path, 0o644)
    if what == "inner tar":  # a header within a class tar is overwritten
        with tarfile.open(path) as tar:
            at = tar.getmembers()[3].offset_data
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"\xff" * 512)
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=name):
        packed(source, tmp_path / "out")


def test_labels_that_do_not_fit_the_images(archives, tmp_path):
    val = f"{archives}/ILSVRC2012_img_val.tar"
    labels = tmp_path / "labels.txt"
    for text, reason in (
        ("a.JPEG n00000001\n", "no label for ILSVRC2012_val_00000001.JPEG"),
        ("oneword\n", "the first is 'oneword'"),
        ("", "it is empty"),
    ):
        labels.write_text(text)
        with pytest.raises(InputError, match=reason):
            packed(val, tmp_path / "out", "--labels", str(labels))
    with pytest.raises(InputError, match="no label file"):
        packed(val, tmp_path / "out", "--labels", "/nowhere")
    with pytest.raises(InputError, match="is not a whole archive"):
        labels.rename(tmp_path / "x.tar.gz").write_text("no archive")
        packed(val, tmp_path / "out", "--labels", str(tmp_path / "x.tar.gz"))


def test_help_is_quick_and_needs_no_torch():
    code = """
import sys
import shards.pack
try:
    shards.pack.main(["--help"])
except SystemExit:
    print([m for m in ("torch", "numpy", "webdataset", "mpi4py", "PIL") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "SOURCE" in done.stdout


def test_bench_measures_beside_pillow():
    """In a process of its own, since it reports the memory of its process."""
    small = "packing.PHOTOS = packing.COPIES = packing.SHARD = 8; packing.ROUNDS = 1"
    done = run(sys.executable, "-c", f"from tests.benchmarks import packing; {small}; packing.main(['--json'])")
    report = json.loads(done.stdout)
    assert report["images_per_second"] > 0 and report["pillow_images_per_second"] > 0
    assert report["resident_mebibytes"] < 1024 and report["device"] and report["versions"]["pillow"]
