"""An exported network gives the scores of the trained one."""

import json

import numpy as np
import pytest
import torch

from job.config import from_flat
from job.network.alexnet import build
from job.run import checkpoint
from tests.launch import error_lines, python


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


def test_wrong_use_leaves_nothing_behind(trained, tmp_path):
    for arguments, word in [
        ([str(tmp_path / "no.pt"), "--format", "onnx", "--out", str(tmp_path / "x")], "no checkpoint"),
        ([str(trained), "--format", "safetensors", "--out", str(tmp_path / "no" / "x")], "cannot write"),
    ]:
        done = python("job.export", *arguments)
        assert done.returncode == 2 and word in error_lines(done)[0] and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
