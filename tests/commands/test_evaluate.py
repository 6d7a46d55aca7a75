"""Accuracy of a network is that of its own mean image, classes and tolerance, whatever else lies beside the shards."""

import collections
import csv
import json
import shutil

import horovod.torch as hvd
import numpy as np
import pytest
import torch

from job import config, evaluate
from job.batches.data import check_data, match_classes
from job.batches.loader import Loader
from job.network.alexnet import build
from job.run.checkpoint import CheckpointWriter, RunState
from job.run.validation import validate
from shards import open_split
from shards.errors import InputError
from shards.format.split import image_member, load_split, read_idx
from tests.launch import horovodrun
from tests.shardmaker import damage, write_split

OPTIONS = (
    "--recipe demo --model.width 0.0625 --model.dropout 0 --data d --data.max-bad-fraction 0.01 --workers 0".split()
)


@pytest.fixture(scope="module")
def network(demo_data, tmp_path_factory):
    """A checkpoint of an untrained network whose scores depend much on the mean image."""
    folder = tmp_path_factory.mktemp("network")
    split = load_split(str(demo_data), "train")
    settings = config.parse([*OPTIONS, "--model.classes", "10"], "job.train", "")
    model = build(settings)
    rest = {"image": [70, 70], "mean": torch.full((3, 67, 67), 60.0), "classes": list(split.classes)}
    state = RunState(step=1, model=model.state_dict(), config=config.to_flat(settings), **rest)
    writer = CheckpointWriter(str(folder), 1, print)
    writer.save(state, best=True)
    writer.wait()
    return str(folder / "best.pt")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """One rank without MPI, which would leave its traces in the environment of other tests' processes."""
    for name, value in {"rank": 0, "size": 1, "local_rank": 0, "local_size": 1}.items():
        monkeypatch.setattr(hvd, name, lambda value=value: value)
    monkeypatch.setattr(hvd, "allreduce", lambda tensor, **_: tensor)
    monkeypatch.setattr(hvd, "allgather_object", lambda value, **_: [value])


def run(network, data, capfd, *options):
    arguments = [network, "--data", str(data), "--json", "--workers", "0", "--device", "cpu", *options]
    evaluate.evaluate(evaluate.parse(arguments))
    captured = capfd.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.fixture
def data(demo_data, tmp_path):
    """A copy of the validation shards alone."""
    for path in demo_data.glob("val*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def change(data, **fields):
    path = data / "val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_mean_image_is_the_networks_own(network, demo_data, data, capfd):
    whole, _ = run(network, demo_data, capfd)
    change(data, mean="")  # as of a validation set that was packed by itself
    alone, _ = run(network, data, capfd)
    assert {**alone, "checkpoint": ""} == {**whole, "checkpoint": ""} and whole["samples"] == 600


def test_classes_are_matched_by_name(network, data, capfd):
    names = json.loads((data / "val.json").read_text())["classes"]
    right, _ = run(network, data, capfd)
    split = load_split(str(data), "val")
    turned = names[1:] + names[:1]
    change(data, classes=turned)  # label 0 now means what the network calls 1
    other, _ = run(network, data, capfd)
    assert other["loss"] != right["loss"]
    assert match_classes(load_split(str(data), "val"), names, 10, "x.pt").tolist() == [*range(1, 10), 0]
    assert match_classes(split, names, 10, "x.pt") is None
    change(data, classes=["airship", *names[1:]])
    with pytest.raises(InputError, match="has the class 'airship', which is not one of the 10 of"):
        run(network, data, capfd)
    change(data, classes=[])
    assert run(network, data, capfd)[0]["loss"] == right["loss"]
    with pytest.raises(InputError, match="has 10 classes, the network of x.pt has 9"):
        match_classes(load_split(str(data), "val"), [], 9, "x.pt")


def test_damaged_images_are_allowed_as_in_training(network, data, capfd):
    split = load_split(str(data), "val")
    for sample in range(3):
        image = image_member(read_idx(split, split.shards[0])[sample], split.encoding)
        damage(split, 0, image.offset, bytes(100))
    assert run(network, data, capfd)[0]["samples"] == 600  # 3 of 600, where 1 % are allowed
    with pytest.raises(InputError, match=r"cannot be used.*--data.max-bad-fraction"):
        run(network, data, capfd, "--data.max-bad-fraction", "0.001")
    with pytest.raises(InputError, match="from 0 to 1"):
        evaluate.parse([network, "--data", "d", "--data.max-bad-fraction", "2"])


def test_images_of_another_size(network, tmp_path, capfd):
    for side in (80, 60):
        write_split(tmp_path / str(side), [4], side=side, labels=[0, 1, 2, 3], name="val")
    found, warning = run(network, tmp_path / "80", capfd)
    assert found["samples"] == 4 and "are 80x80, and those that the network learns from 70x70" in warning
    with pytest.raises(InputError, match="val images of .* are 60x60, too small for crops of 67x67"):
        run(network, tmp_path / "60", capfd)


def test_training_refuses_shards_that_do_not_fit(tmp_path):
    settings = config.parse([*OPTIONS, "--parallel", "hybrid", "--model.classes", "4"], "job.train", "")
    train = write_split(tmp_path, [4], side=70, labels=[0, 1, 2, 3])
    check_data(settings, train, None, 4)
    with pytest.raises(InputError, match="hybrid splits the 4 classes among 8 ranks"):
        check_data(settings, train, None, 8)
    for name, labels, side, words in [
        ("train", [0, 1, 2, 4], 70, "train of .* has the label 4, but there are 4 classes"),
        ("val", [0, 1, 2, 4], 70, "val of .* has the label 4"),
        ("train", [0, 1, 2, 3], 60, "train images of .* are 60x60, too small"),
        ("val", [0, 1, 2, 3], 60, "val images of .* are 60x60, too small"),
    ]:
        other = write_split(tmp_path / name, [4], side=side, labels=labels, name=name)
        with pytest.raises(InputError, match=words):
            check_data(settings, *((other, None) if name == "train" else (train, other)), 4)


def test_validation_images_of_another_size_have_the_mean_of_their_centre(tmp_path):
    """Whatever the place of the crop in the stored image is, and without a read beyond the mean image."""
    split = write_split(tmp_path, [4], side=80, labels=[0, 1, 0, 1], name="val")

    class Sums(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.new_zeros(len(images), 2)

    seen = []
    mean = torch.arange(3 * 67 * 67.0).view(3, 67, 67)
    with Loader(split, rank=0, world_size=1, global_batch=4, crop=67, train=False, workers=0) as loader:
        validate(Sums(), loader, mean, torch.device("cpu"), "fp32")
        (batch,) = loader
        raw = batch.images.permute(0, 3, 1, 2).float().clone()
    assert raw[0, 0, 0, 0] == 6  # row 6 of 80
    assert torch.equal(seen[0], raw - mean)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables_per_class_and_per_sample(network, demo_data, data, tmp_path, capfd):
    tables = ["--per-class", str(tmp_path / "class.csv"), "--per-sample", str(tmp_path / "sample.csv"), "--batch", "70"]
    whole, _ = run(network, data, capfd, *tables)
    samples, classes = read_csv(tmp_path / "sample.csv"), read_csv(tmp_path / "class.csv")
    val = open_split(str(data), "val")
    assert [int(row["sample"]) for row in samples] == list(range(600))
    assert [int(row["label"]) for row in samples] == val.labels.tolist()
    assert samples[100]["shard"] == "val-000001.tar" and samples[100]["key"] == val.key(100)
    assert all(row["class"] == val.classes[int(row["label"])] and row["problem"] == "" for row in samples)
    assert all((row["label"] == row["predicted_label"]) == (row["top1"] == "1") for row in samples)
    assert np.mean([int(row["top1"]) for row in samples]) == pytest.approx(whole["top1"])
    assert np.mean([int(row["top5"]) for row in samples]) == pytest.approx(whole["top5"])
    losses = [-np.log(float(row["label_probability"])) for row in samples]
    assert np.mean(losses) == pytest.approx(whole["loss"], rel=1e-4)
    assert [row["class"] for row in classes] == list(val.classes)
    for row in classes:
        own = [sample for sample in samples if sample["class"] == row["class"]]
        assert int(row["samples"]) == len(own) == 60
        assert float(row["top1"]) == pytest.approx(np.mean([int(sample["top1"]) for sample in own]), abs=1e-6)
        wrong = collections.Counter(sample["predicted"] for sample in own if sample["top1"] == "0")
        assert int(row["confused_samples"]) == wrong[row["confused_with"]] == max(wrong.values(), default=0)


def test_a_damaged_sample_has_a_problem_and_no_prediction(network, data, tmp_path, capfd):
    split = load_split(str(data), "val")
    damage(split, 0, image_member(read_idx(split, split.shards[0])[2], split.encoding).offset, bytes(100))
    run(network, data, capfd, "--per-sample", str(tmp_path / "x.csv"))
    rows = read_csv(tmp_path / "x.csv")
    assert len(rows) == 600 and [row["sample"] for row in rows if row["problem"]] == ["2"]
    assert rows[2]["predicted"] == "" and "sample 2 of" in rows[2]["problem"] and rows[3]["predicted"]


def test_a_table_that_cannot_be_written_is_refused_at_once(network, data, tmp_path, capfd):
    with pytest.raises(InputError, match=r"cannot write .*no/x.csv"):
        run(network, data, capfd, "--per-class", str(tmp_path / "no" / "x.csv"))
    with pytest.raises(InputError, match="both write x.csv"):
        run(network, data, capfd, "--per-class", "x.csv", "--per-sample", "x.csv")


def test_ten_crops_need_images_larger_than_the_crop(network, demo_data, data, tmp_path, capfd):
    found, err = run(network, demo_data, capfd, "--crops", "10")
    one, _ = run(network, demo_data, capfd)
    assert found["samples"] == 600 and found["crops"] == 10 and found["loss"] != one["loss"]
    assert "note: " in err and "does not have the mean image that the network was trained with" in err
    with pytest.raises(InputError, match="--crops 10 makes no sense.* are 67x67, the network takes 67x67"):
        write_split(tmp_path / "67", [4], side=67, labels=[0, 1, 2, 3], name="val")
        run(network, tmp_path / "67", capfd, "--crops", "10")
    with pytest.raises(InputError, match="needs images of one size"):
        change(data, image={"encoding": "jpeg", "height": 0, "width": 0})
        run(network, data, capfd, "--crops", "10")


def test_which_checkpoint(demo_run, demo_data, tmp_path, capfd):
    """best.pt, unless told otherwise or there is none."""
    gone = shutil.copytree(demo_run, tmp_path / "run")
    folder = gone / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-*.pt"))
    for which, name in (("best", "best.pt"), ("newest", names[-1]), (names[0], names[0])):
        found, err = run(str(gone), demo_data, capfd, "--checkpoint", which)
        assert found["checkpoint"] == str(folder / name) and not err, which
    (folder / "best.pt").write_bytes(b"half")
    found, err = run(str(gone), demo_data, capfd)
    assert found["checkpoint"].endswith(names[-1]) and "warning: passed over the checkpoint" in err
    (folder / "best.pt").unlink()
    found, err = run(str(gone), demo_data, capfd)
    assert found["checkpoint"].endswith(names[-1])
    assert err.count("note: ") == 1 and "has no best.pt, since nothing was validated" in err


@pytest.mark.long
def test_any_number_of_ranks_writes_the_same_tables(demo_run, demo_data, tmp_path):
    found = {}
    for ranks in (1, 2, 4):
        files = [tmp_path / f"{ranks}-{name}.csv" for name in ("class", "sample")]
        tables = ["--per-class", str(files[0]), "--per-sample", str(files[1]), "--crops", "10", "--workers", "1"]
        done = horovodrun(ranks, "job.evaluate", str(demo_run), "--data", str(demo_data), *tables, "--device", "cpu")
        assert done.returncode == 0 and "note" not in done.stderr, done.stdout + done.stderr
        found[ranks] = [read_csv(file) for file in files]
    exact = ["sample", "shard", "key", "label", "class", "predicted", "top1", "top5"]
    for ranks in (2, 4):
        assert found[ranks][0] == found[1][0]
        for mine, theirs in zip(found[ranks][1], found[1][1], strict=True):
            assert [mine[name] for name in exact] == [theirs[name] for name in exact]
            assert float(mine["probability"]) == pytest.approx(float(theirs["probability"]), rel=1e-3)
