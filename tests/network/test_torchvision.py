"""The layout `torchvision` is torchvision's AlexNet: outputs, gradients and dropout, on the same pixels and weights."""

import pytest
import torch

from job import config
from job.network.alexnet import AlexNet
from job.network.torchvision import MEAN, STD, from_torchvision, mean_colour, to_torchvision
from tests.launch import import_torchvision


@pytest.fixture(scope="module")
def pair():
    """Torchvision's network with random weights of 10 classes, ours with the same, and images of pixel values."""
    torch.manual_seed(5)
    theirs = import_torchvision().models.alexnet(num_classes=10)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.5)  # scores that differ by more than rounding, and biases that count
    ours = AlexNet(10, 224, "none", layout="torchvision")
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return theirs, ours, torch.randint(0, 256, (4, 3, 224, 224)).float()


def scores(pair, images):
    """Of both networks, each on its own kind of input. Both draw the same numbers for dropout."""
    theirs, ours, _ = pair
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.manual_seed(7)
    expected = theirs((images / 255 - mean) / std)
    torch.manual_seed(7)
    return expected, ours(images - mean_colour().view(3, 1, 1))


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("size", [224, 96, 67])
def test_scores_are_those_of_torchvision(pair, size):
    theirs, ours, images = pair
    theirs.eval(), ours.eval()
    with torch.no_grad():
        expected, got = scores(pair, images[..., :size, :size])
        assert expected.std(0).min() > 1e-3  # the images do not all have the same scores
        assert distance(got, expected) < 1e-5


def test_gradients_and_dropout_are_those_of_torchvision(pair):
    """So the same learning rate does the same."""
    theirs, ours, images = pair
    theirs.train(), ours.train()
    expected, got = scores(pair, images)
    assert distance(got, expected) < 1e-5
    for of_one in (expected, got):
        torch.nn.functional.cross_entropy(of_one, torch.arange(4)).backward()
    expected = from_torchvision({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert distance(parameter.grad, expected[name]) < 1e-4, name


def test_names_are_translated_there_and_back(pair):
    state = pair[0].state_dict()
    back = to_torchvision(from_torchvision(state))
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert set(pair[1].state_dict()) == set(from_torchvision(state))  # nothing else is saved
    with pytest.raises(KeyError):
        from_torchvision({"features.1.weight": 0})


def test_initial_weights_are_those_that_pytorch_draws():
    torch.manual_seed(3)
    conv1, fc7 = (getattr(AlexNet(10, 224, "none", layout="torchvision"), name) for name in ("conv1", "fc7"))
    for layer, inputs in ((conv1, 363), (fc7, 4096)):
        assert 0.95 * inputs**-0.5 < layer.weight.abs().max() <= inputs**-0.5


def test_the_recipe_is_torchvisions_training():
    found = config.parse(["--recipe", "torchvision", "--data", "d"], "job.train", "")
    assert (found.image_size, found.global_batch, found.epochs, found.model.dropout) == (224, 8 * 32, 90, 0.5)
    optim = found.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.bias_lr) == (0.01, 0.9, 1e-4, 1)
    assert (optim.schedule, optim.step_epochs, optim.step_factor) == ("step", 30, 0.1)
    counts = sum(p.numel() for p in AlexNet(1000, 224, "none", layout="torchvision").parameters())
    assert counts == 61_100_840  # as torchvision's documentation says
