"""A trained network in a notebook: images as they are in, classes out; the record of its run."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from job import load_network, load_run
from job.inference.scores import TenCrops, whole_mean
from job.watch import standing
from shards import open_split
from shards.errors import InputError
from shards.read.images import BadImage
from tests.launch import ROOT


@pytest.fixture(scope="module")
def network(demo_run):
    return load_network(demo_run, device="cpu")


def test_it_predicts_what_validation_counts(network, demo_run, demo_data):
    val = open_split(demo_data, "val")
    assert network.path.endswith("best.pt") and network.classes == list(val.classes)
    guesses = network.predict((sample.image for sample in val), top=3)
    right = np.mean([found[0].label == label for found, label in zip(guesses, val.labels, strict=True)])
    best = max(line["top1"] for line in load_run(demo_run).val)
    assert right == pytest.approx(best) == pytest.approx(network.best_top1) and right > 0.2
    assert all(len(found) == 3 and found[0].name == val.classes[found[0].label] for found in guesses)


def test_one_image_in_every_form(network, demo_data, tmp_path):
    image = open_split(demo_data, "val")[0].image
    Image.fromarray(image).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    forms = [image, tmp_path / "x.png", str(tmp_path / "x.png"), data, Image.fromarray(image), image[:, :, 0]]
    prepared = [network.preprocess(form) for form in forms]
    assert all(torch.equal(one, torch.from_numpy(image[1:68, 1:68].copy())) for one in prepared)
    assert network.predict(str(tmp_path / "x.png"))[0] == network.predict([image])[0]
    assert network(torch.stack(prepared)).shape == (6, 10)


def test_large_images_are_scaled_as_shards_pack_does(network):
    image = np.zeros((140, 210, 3), np.uint8)
    image[:, 35:175] = 200  # the centre square
    assert network.preprocess(image).float().mean() == 200


def test_what_is_no_image_is_refused(network):
    with pytest.raises(BadImage):
        network.preprocess(b"no image")
    with pytest.raises(ValueError, match="need uint8"):
        network.preprocess(np.zeros((70, 70, 3)))
    with pytest.raises(ValueError, match=r"need torch.uint8 \(N, 67, 67, 3\)"):
        network(torch.zeros(1, 3, 67, 67))


def test_no_network_where_there_is_none(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        load_network(tmp_path)
    with pytest.raises(InputError, match="give the --out folder"):
        load_run(tmp_path)


def test_the_record_of_a_run(demo_run):
    run = load_run(demo_run)
    assert run.settings["epochs"] == 2 and run.summary["status"] == "done"
    assert [line["step"] for line in run.val] == sorted(line["step"] for line in run.val) and len(run.val) == 2
    assert run.train[-1]["loss"] > 0 and run.events[0]["event"] == "start"


def test_a_start_undoes_what_came_after_its_step():
    def line(kind, step, **more):
        return {"kind": kind, "step": step, **more}

    lines = [line("event", 0, event="start"), line("train", 10, loss=2), line("train", 20, loss=1.5)]
    lines += [line("event", 20, event="hang"), line("event", 10, event="start"), line("train", 20, loss=1.4)]
    assert [entry.get("loss") for entry in standing(lines) if entry["kind"] == "train"] == [2, 1.4]
    assert len([entry for entry in standing(lines) if entry["kind"] == "event"]) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_ten_crops_average_the_softmax_of_corners_centre_and_mirror_images(whole):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 67 * 67, 5))
    images = torch.randint(0, 256, (3, 80, 80, 3), dtype=torch.uint8)
    mean = torch.rand(80, 80, 3) * 255
    own = mean[6:73, 6:73]
    total = 0
    for top, left in ((0, 0), (0, 13), (13, 0), (13, 13), (6, 6)):
        part = mean[top : top + 67, left : left + 67] if whole else own
        crops = (images[:, top : top + 67, left : left + 67].float() - part).permute(0, 3, 1, 2)
        for view in (crops, crops.flip(3)):
            with torch.no_grad():
                total = total + F.softmax(model(view), dim=1)
    with torch.no_grad():
        found = TenCrops(model, mean if whole else own.contiguous(), 67)(images)
    torch.testing.assert_close(F.softmax(found, dim=1), total / 10)
    assert (total / 10).std(0).max() > 0.01  # the images differ in their scores
    assert torch.equal(whole_mean(mean, own.permute(2, 0, 1)), mean)
    assert whole_mean(mean, own.permute(2, 0, 1) + 1) is None and whole_mean(None, own.permute(2, 0, 1)) is None


def test_the_notebook_example_of_the_readme_runs(demo_run, demo_data, capsys):
    """Its figures are those of another run: only that it runs, and what it prints is there."""
    text = (ROOT / "job/inference/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    code = code.replace("runs/first", str(demo_run)).replace("runs/demo-data", str(demo_data))
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 4
    assert json.loads((demo_run / "summary.json").read_text())["status"] == "done"
