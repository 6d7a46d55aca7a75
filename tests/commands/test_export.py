"""An exported network gives the scores of the trained one."""

import json

import numpy as np
import pytest
import torch

from job import config
from job.config import from_flat
from job.network.alexnet import build
from job.network.torchvision import MEAN, STD, mean_colour
from job.network.weights import begin_with, read_weights
from job.run import checkpoint
from job.run.checkpoint import RunState
from tests.launch import error_lines, import_torchvision, python


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    options = ["--recipe", "demo", "--model.width", "0.125", "--max-steps", "2", "--eval-every", "0"]
    done = python("job.train", *options, "--data", str(demo_data), "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def scores(state, pixels):
    model = build(from_flat(state.config)).eval()
    model.load_state_dict(state.model)
    with torch.no_grad():
        return model(torch.from_numpy(pixels) - state.mean).numpy()


@pytest.mark.parametrize("images", [1, 3, 8])
def test_onnx_takes_pixels_and_gives_the_same_scores(trained, tmp_path, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    done = python("job.export", str(trained), "--format", "onnx", "--out", str(tmp_path / "net.onnx"))
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr
    pixels = np.random.default_rng(images).integers(0, 256, (images, 3, 67, 67)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(["scores"], {"pixels": pixels})
    _, state = checkpoint.load_named(str(trained))
    np.testing.assert_allclose(got, scores(state, pixels), rtol=1e-4, atol=1e-5)


def test_safetensors_holds_weights_mean_settings_and_classes(trained, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    assert python("job.export", str(trained), "--format", "safetensors", "--out", str(tmp_path / "n")).returncode == 0
    _, state = checkpoint.load_named(str(trained))
    with safetensors.safe_open(str(tmp_path / "n"), framework="pt") as file:
        for name, tensor in {**state.model, "mean": state.mean}.items():
            assert torch.equal(file.get_tensor(name), tensor)
        assert len(json.loads(file.metadata()["classes"])) == 10
        assert json.loads(file.metadata()["config"])["image-size"] == 67


@pytest.fixture(scope="module")
def column(demo_data, tmp_path_factory):
    """A network with torchvision's layers in their full width, as a run leaves it. Trained, it would not say more."""
    options = ["--recipe", "torchvision", "--image-size", "67", "--data", str(demo_data), "--model.classes", "10"]
    settings = config.parse(options, "job.train", "")
    path = tmp_path_factory.mktemp("column") / "step-00000001.pt"
    state = RunState(
        step=1, model=build(settings).state_dict(), config=config.to_flat(settings), classes=list("abcdefghij"),
        mean=mean_colour().permute(2, 0, 1).expand(3, 67, 67).clone(),
    )  # fmt: skip
    torch.save({"format": checkpoint.FORMAT, **vars(state)}, path)
    return path


def test_torchvision_takes_the_weights_and_gives_the_same_scores(column, tmp_path):
    torchvision = import_torchvision()
    out = tmp_path / "net.pth"
    done = python("job.export", str(column), "--format", "torchvision", "--out", str(out))
    assert done.returncode == 0, done.stderr
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    theirs.load_state_dict(torch.load(out, weights_only=True))
    state = checkpoint.load(str(column))
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 67, 67)).astype(np.float32)
    normalised = (torch.from_numpy(pixels) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected, got = scores(state, pixels), theirs(normalised).numpy()
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)
    # What was exported can be begun with: every bit is as before.
    found, _ = begin_with(read_weights(str(out)), config.from_flat(state.config), [])
    assert all(torch.equal(found[name], tensor) for name, tensor in state.model.items())


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_torchvisions_layers_export_to_the_other_formats(column, tmp_path, format):
    package = pytest.importorskip({"onnx": "onnxruntime", "safetensors": "safetensors"}[format])
    out = str(tmp_path / "net")
    done = python("job.export", str(column), "--format", format, "--out", out)
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(str(column))
    if format == "safetensors":
        with package.safe_open(out, framework="pt") as file:
            assert set(file.keys()) == {*state.model, "mean"}
        return
    pixels = np.random.default_rng(2).integers(0, 256, (2, 3, 67, 67)).astype(np.float32)
    session = package.InferenceSession(out, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"pixels": pixels})[0], scores(state, pixels), rtol=1e-4, atol=1e-5)


def test_wrong_use_leaves_nothing_behind(trained, tmp_path):
    for arguments, word in [
        ([str(tmp_path / "no.pt"), "--format", "onnx", "--out", str(tmp_path / "x")], "no checkpoint"),
        ([str(trained), "--format", "safetensors", "--out", str(tmp_path / "no" / "x")], "cannot write"),
        (
            [str(trained), "--format", "torchvision", "--out", str(tmp_path / "x")],
            "a network of --model.layout alexnet",
        ),
    ]:
        done = python("job.export", *arguments)
        assert done.returncode == 2 and word in error_lines(done)[0] and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
