"""Hybrid parallelism: the same losses and weights as with gradients alone, on any number of ranks."""

import pytest
import torch

from job.ranks.hybrid import part
from tests.launch import error_lines, horovodrun, metrics, python

SMALL = ["--recipe", "demo", "--model.width", "0.11", "--workers", "0", "--log-every", "1", "--eval-every", "0"]
STEPS = ["--max-steps", "12", "--global-batch", "24"]


def train(ranks, data, out, *options, gloo=False, expect=0):
    arguments = ["job.train", *SMALL, *STEPS, "--data", str(data), "--out", str(out), *options]
    done = horovodrun(ranks, *arguments, gloo=gloo) if ranks else python(*arguments)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def losses(run):
    return [line["loss"] for line in metrics(run, "train")]


def right(run):
    """Training images that were right, by step."""
    return [round(24 * line["top1"]) for line in metrics(run, "train")]


def state(run):
    return torch.load(sorted((run / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)


def same_network(one, two):
    for kind in ("model", "velocity"):
        for name, tensor in one[kind].items():
            scale = tensor.abs().max()
            torch.testing.assert_close(two[kind][name] / scale, tensor / scale, rtol=0, atol=1e-4)


def test_parts_are_even_and_whole():
    for size in (1, 7, 450, 4096):
        for ranks in (1, 2, 3, 8):
            parts = [part(size, rank, ranks) for rank in range(ranks)]
            assert [i for p in parts for i in range(size)[p]] == list(range(size))
            lengths = [p.stop - p.start for p in parts]
            assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "gloo"), [(2, False), (4, False), (2, True)])
def test_losses_and_weights_are_those_of_gradients(demo_data, tmp_path, ranks, gloo):
    """450 units and 10 classes do not divide by four: parts are uneven."""
    train(0, demo_data, tmp_path / "gradients")
    train(ranks, demo_data, tmp_path / "hybrid", "--parallel", "hybrid", gloo=gloo)
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(tmp_path / "gradients"), rel=2e-5)
    assert right(tmp_path / "hybrid") == pytest.approx(right(tmp_path / "gradients"), abs=1)  # two scores may be equal
    same_network(state(tmp_path / "gradients"), state(tmp_path / "hybrid"))


@pytest.mark.long
@pytest.mark.parametrize(
    "network", [(), ("--model.layout", "torchvision", "--model.lrn", "none", "--optim.new-lr", "3")]
)
def test_dropout_is_the_same_on_any_number_of_ranks_and_a_run_goes_on_with_others(demo_data, tmp_path, network):
    options = ["--parallel", "hybrid", "--model.dropout", "0.5", *network]
    train(0, demo_data, tmp_path / "one", *options)
    train(3, demo_data, tmp_path / "three", *options)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    train(2, demo_data, tmp_path / "parts", *options, "--max-steps", "5")
    train(4, demo_data, tmp_path / "parts", *options)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    same_network(state(tmp_path / "one"), state(tmp_path / "parts"))


def test_lars_needs_whole_layers(demo_data, tmp_path):
    done = train(0, demo_data, tmp_path / "run", "--parallel", "hybrid", "--optim.kind", "lars", expect=2)
    assert len(error_lines(done)) == 1
