"""One step of a rank: its whole state can be saved and loaded, whatever strategy and pass it is made of."""

import contextlib
from unittest.mock import Mock

import horovod.torch as hvd
import pytest
import torch

from job import config
from job.run.step import Step
from job.usage.ranges import each, make_range
from shards.errors import InputError

SMALL = "--recipe demo --model.width 0.0625 --model.classes 5 --data d --global-batch 4".split()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """One rank without MPI, which would leave its traces in the environment of other tests' processes."""
    for name, value in {"rank": 0, "size": 1}.items():
        monkeypatch.setattr(hvd, name, lambda value=value: value)
    monkeypatch.setattr(hvd, "broadcast_parameters", lambda parameters, root_rank: None)
    monkeypatch.setattr(torch.cuda, "Event", object)


def make(parallel, kernels="plain", seed=1, more=()):
    options = ["--parallel", parallel, "--precision", "bf16", "--model.dropout", "0.5", "--seed", str(seed), *more]
    return Step(config.parse([*SMALL, *options], "job.train", ""), torch.device("cpu"), kernels, images=4)


def train(step, numbers):
    losses = []
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, (4, 67, 67, 3), dtype=torch.uint8, generator=draw)
        labels = torch.randint(5, (4,), generator=draw)
        prepared = step.prepare(images, torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.bool))
        losses.append(step.run(prepared, labels, number).item())
    return losses


def copied(state):
    return {kind: {name: tensor.clone() for name, tensor in tensors.items()} for kind, tensors in state.items()}


def same(one, other):
    return all(torch.equal(tensor, other[kind][name]) for kind in one for name, tensor in one[kind].items())


def test_top1_is_that_of_the_scores_that_the_step_computed(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", keep_arguments(torch.nn.functional.cross_entropy, kept))
    step = make("weights")
    for number in range(6):
        train(step, [number])
        scores, labels = kept.pop()
        assert step.right.item() == sum(row.argmax() == label for row, label in zip(scores, labels, strict=True)) / len(
            labels
        )
        assert not step.right.requires_grad


@pytest.mark.parametrize(
    ("parallel", "kernels", "ranges"),
    [
        ("weights", "plain", ["forward", "backward", "allreduce", "update", "allreduce"]),
        (
            "weights",
            "fast",
            ["forward, and backward to fc6", "backward", "allreduce", "allreduce", "update", "allreduce"],
        ),
    ],
)
def test_ranges_of_a_profile_follow_the_step(parallel, kernels, ranges, monkeypatch):
    seen, inside = [], []

    @contextlib.contextmanager
    def named(name):
        assert not inside  # one after the other
        inside.append(name)
        seen.append(name)
        yield
        inside.pop()

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr("job.run.step.make_range", lambda wanted, device: named)
    train(make(parallel, kernels), [0])
    assert seen == ranges


def test_ranges_need_a_gpu_and_cost_nothing_unless_wanted(monkeypatch):
    with pytest.raises(InputError, match="--profile-nvtx"):
        make_range(True, torch.device("cpu"))
    assert make_range(True, torch.device("cuda")) is torch.cuda.nvtx.range
    nothing = make_range(False, torch.device("cuda"))
    assert nothing("forward") is nothing("backward")
    seen = []
    assert list(each(iter("ab"), lambda name: (seen.append(name), nothing(name))[1], "data")) == ["a", "b"]
    assert seen == ["data"] * 3


def keep_arguments(function, kept):
    def call(*arguments):
        kept.append([argument.detach() for argument in arguments])
        return function(*arguments)

    return call


def test_a_loaded_state_continues_with_the_same_bits():
    step = make("weights")
    train(step, range(3))
    kept = copied(step.state())
    losses, after = train(step, range(3, 6)), copied(step.state())
    again = make("weights")
    again.load(**kept)
    again.share()
    assert same(kept, again.state())
    assert train(again, range(3, 6)) == losses and same(after, again.state())


@pytest.mark.parametrize(
    ("parallel", "kernels"), [("weights", "plain"), ("weights", "fast"), ("gradients", "fast"), ("hybrid", "plain")]
)
def test_a_state_fits_every_strategy_and_pass(parallel, kernels):
    """Also the copies of weights that the fast kernels read, and the rows that a rank of hybrid updates."""
    source = make("weights", seed=2)
    train(source, range(2))
    step = make(parallel, kernels)
    assert not same(source.state(), step.state())
    step.load(**source.state())
    step.share()
    assert same(source.state(), step.state())
    if kernels == "fast":
        copies = step._optimizer.copies
        assert len(copies) == 3 and all(torch.equal(copy, weight.bfloat16()) for weight, copy in copies.items())
    if parallel == "hybrid":
        rows = step._strategy.rows
        assert len(rows) == 6 and all(torch.equal(own, source.state()["model"][name]) for name, own in rows.items())


NORMALISED = ("--model.lrn", "none", "--model.batch-norm", "true")
COLUMN = ("--model.layout", "torchvision", "--model.lrn", "none")


@pytest.mark.parametrize("network", [(), NORMALISED, COLUMN])
def test_frozen_convolutions_have_no_gradient_no_velocity_and_keep_every_bit(network):
    step = make("weights", more=("--freeze", "conv", "--optim.weight-decay", "0.1", *network))
    before = copied(step.state())
    train(step, range(3))
    step.make_equal()
    after = step.state()
    for name, tensor in after["model"].items():
        assert torch.equal(tensor, before["model"][name]) == (not name.startswith("fc")), name
    assert all(name.startswith("fc") for name in after["velocity"]) and len(after["velocity"]) == 6
    assert all(p.grad is None for name, p in step.model.named_parameters() if not name.startswith("fc"))


def test_sections_of_a_step_are_marked_in_their_order():
    marks = []
    step = make("weights")
    images = step.prepare(
        torch.zeros(4, 67, 67, 3, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4).bool()
    )
    step.run(images, torch.zeros(4, dtype=torch.int64), 0, marks.append)
    assert marks == ["forward and backward", "allreduce, not hidden", "update", "allreduce, not hidden"]
