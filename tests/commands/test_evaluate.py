"""Accuracy of a network is that of its own mean image, classes and tolerance, whatever else lies beside the shards."""

import json
import shutil

import horovod.torch as hvd
import pytest
import torch

from job import config, evaluate
from job.batches.data import check_data, match_classes
from job.batches.loader import Loader
from job.network.alexnet import build
from job.run.checkpoint import CheckpointWriter, RunState
from job.run.validation import validate
from shards.errors import InputError
from shards.format.split import image_member, load_split, read_idx
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
