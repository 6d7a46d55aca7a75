"""The recipe large-batch, AlexNet-BN with LARS: it learns, on all ranks the same, and can be resumed and exported."""

import json

import numpy as np
import pytest
import torch

from job.config import from_flat
from job.network.alexnet import build
from job.run import checkpoint
from tests.launch import error_lines, horovodrun, metrics, python

# 2 is the rate of You et al. for batches of 512; a net this narrow, on this few images, bears and needs more.
SMALL = "--recipe large-batch --image-size 67 --model.width 0.125 --model.dropout 0 --optim.lr 8 --epochs 12".split()
SMALL += "--global-batch 256 --optim.warmup-epochs 1 --log-every 1 --workers 1".split()


def train(ranks, data, out, *options, expect=0):
    done = horovodrun(ranks, "job.train", *SMALL, "--data", str(data), "--out", str(out), *options)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def newest(run):
    return checkpoint.load_named(str(run))[1]


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("large") / "run"
    train(2, demo_data, out, "--max-steps", "40", "--checkpoint-every", "20")
    return out


@pytest.mark.long
def test_it_learns_and_every_rank_validates_with_the_statistics_that_are_saved(demo_data, trained):
    assert metrics(trained, "train")[-1]["loss"] < 1.5 < 2.2 < metrics(trained, "train")[0]["loss"]
    done = horovodrun(2, "job.evaluate", str(trained), "--data", str(demo_data), "--json")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    summary = json.loads((trained / "summary.json").read_text())
    assert all(found[name] == summary[name] for name in ("top1", "top5", "loss"))
    assert found["top1"] > 0.3
    model = newest(trained).model
    # They have moved away from the 0 and 1 that they begin with.
    assert not torch.equal(model["norm6.running_mean"], torch.zeros_like(model["norm6.running_mean"]))


@pytest.mark.long
def test_a_resumed_run_has_the_same_bits(demo_data, trained, tmp_path):
    for steps in ("20", "40"):
        train(2, demo_data, tmp_path / "run", "--checkpoint-every", "20", "--max-steps", steps)
    whole, parts = newest(trained), newest(tmp_path / "run")
    for one, other in ((whole.model, parts.model), (whole.velocity, parts.velocity)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--parallel", "weights", "--optim.kind", "sgd", "--optim.lr", "0.01")])
def test_saved_statistics_are_the_average_of_what_the_ranks_saw(demo_data, tmp_path, options):
    # After one step the running mean is a tenth of the mean over a rank's half: the average is that of all images.
    for ranks in (1, 2):
        train(ranks, demo_data, tmp_path / f"{ranks}", *options, "--max-steps", "1", "--eval-every", "0")
    one, two = newest(tmp_path / "1").model, newest(tmp_path / "2").model
    torch.testing.assert_close(two["norm1.running_mean"], one["norm1.running_mean"], rtol=1e-2, atol=1e-4)
    assert not torch.equal(one["norm1.running_mean"], torch.zeros_like(one["norm1.running_mean"]))


def test_an_exported_network_normalises_with_the_saved_statistics(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    done = python("job.export", str(trained), "--format", "onnx", "--out", str(tmp_path / "net.onnx"))
    assert done.returncode == 0, done.stderr
    state = newest(trained)
    model = build(from_flat(state.config)).eval()
    model.load_state_dict(state.model)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 67, 67)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels) - state.mean).numpy()
    np.testing.assert_allclose(session.run(["scores"], {"pixels": pixels})[0], expected, rtol=1e-3, atol=1e-4)


def test_one_image_a_rank_is_too_few_to_normalise(demo_data, tmp_path):
    done = train(2, demo_data, tmp_path / "run", "--global-batch", "2", "--max-steps", "1", expect=2)
    assert len(error_lines(done)) == 1 and "one image per rank" in error_lines(done)[0]
