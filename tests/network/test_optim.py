"""The update rule and the learning-rate schedule are those of the recipe."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.config import Optim
from job.network.alexnet import AlexNet
from job.network.sgd import LARS, MomentumSGD, learning_rate, parameter_groups


def test_three_steps_match_numpy():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3)), rng.normal(size=4)
    gradients = [(rng.normal(size=(4, 3)), rng.normal(size=4)) for _ in range(3)]
    rates = [0.1, 0.1, 0.01]  # the velocity of the first two steps survives the drop as it is

    layer = torch.nn.Linear(3, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    optimizer = MomentumSGD(parameter_groups(layer, Optim(weight_decay=0.05, bias_lr=2)), momentum=0.9)
    for (g_weight, g_bias), rate in zip(gradients, rates, strict=True):
        layer.weight.grad, layer.bias.grad = torch.from_numpy(g_weight), torch.from_numpy(g_bias)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    v_weight, v_bias = 0.0, 0.0
    for (g_weight, g_bias), rate in zip(gradients, rates, strict=True):
        v_weight = 0.9 * v_weight - rate * 0.05 * weight - rate * g_weight
        v_bias = 0.9 * v_bias - 2 * rate * g_bias
        weight, bias = weight + v_weight, bias + v_bias
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_three_steps_of_lars_match_numpy(decay):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3)), rng.normal(size=4)
    gradients = [(rng.normal(size=(4, 3)), rng.normal(size=4)) for _ in range(3)]

    layer = torch.nn.Linear(3, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    settings = Optim(kind="lars", lars_trust=0.02, weight_decay=decay, bias_lr=0.5)
    optimizer = LARS(parameter_groups(layer, settings), lr=0.1, momentum=0.9)
    for g_weight, g_bias in gradients:
        layer.weight.grad, layer.bias.grad = torch.from_numpy(g_weight), torch.from_numpy(g_bias)
        optimizer.step()

    v_weight, v_bias = 0.0, 0.0
    for g_weight, g_bias in gradients:
        norm = np.linalg.norm(weight)
        local = 0.02 * norm / (np.linalg.norm(g_weight) + decay * norm)
        v_weight = 0.9 * v_weight - 0.1 * local * (g_weight + decay * weight)
        v_bias = 0.9 * v_bias - 0.5 * 0.1 * g_bias  # no local rate, no decay
        weight, bias = weight + v_weight, bias + v_bias
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-12)


def test_lars_bears_weights_or_gradients_that_are_zero():
    for weight, gradient, expected in [(0.0, 2.0, -0.2), (3.0, 0.0, 3.0), (0.0, 0.0, 0.0)]:
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(layer.weight, weight)
        layer.weight.grad = torch.full((1, 1), gradient)
        LARS(parameter_groups(layer, Optim(kind="lars", weight_decay=0)), lr=0.1).step()
        assert layer.weight.item() == pytest.approx(expected)


def test_batch_normalisation_counts_among_the_biases():
    model = AlexNet(classes=3, image_size=67, width=0.1, batch_norm=True)
    weights, biases = parameter_groups(model, Optim(kind="lars", lars_trust=0.02))
    assert len(weights["params"]) == 8 and len(biases["params"]) == 3 + 2 * 6  # fc6 to fc8; six normalisations
    assert (weights["trust"], biases["trust"], biases["weight_decay"]) == (0.02, 0.0, 0.0)


def test_the_rate_of_schedule_poly_falls_with_the_square_of_what_is_left():
    optim = Optim(lr=8.0, schedule="poly", poly_power=2.0, warmup_epochs=2)
    rates = [learning_rate(optim, step, 10, 100, 100) for step in range(100)]  # 10 steps an epoch
    assert rates[19] == pytest.approx(8.0, rel=0.05) and rates[20] == 8.0
    assert rates[60] == pytest.approx(8.0 * 0.5**2) and rates[99] == pytest.approx(8.0 * (1 / 80) ** 2)


def test_biases_have_twice_the_rate_and_no_decay():
    model = AlexNet(classes=3, image_size=67, width=0.1)
    weights, biases = parameter_groups(model, Optim())
    assert weights["weight_decay"] == 5e-4 and weights.get("lr_factor", 1) == 1
    assert biases["weight_decay"] == 0 and biases["lr_factor"] == 2
    assert len(weights["params"]) == len(biases["params"]) == 8
    assert all(p.ndim == 1 for p in biases["params"]) and all(p.ndim > 1 for p in weights["params"])


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_the_new_layer_has_a_rate_of_its_own(kind):
    """fc8 moves new_lr times as far as in its twin, and all else as far; its biases keep their own factor, too."""
    moved = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        model = AlexNet(classes=3, image_size=67, width=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        settings = Optim(kind=kind, new_lr=factor, lars_trust=0.02, weight_decay=0.01)
        optimizer = {"sgd": MomentumSGD, "lars": LARS}[kind](parameter_groups(model, settings), 0.01, 0.9)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for (name, _), one, ten in zip(model.named_parameters(), *moved, strict=True):
        torch.testing.assert_close(ten, one * (10 if name.startswith("fc8") else 1), rtol=1e-3, atol=1e-6)


def test_frozen_parameters_are_in_no_group():
    model = AlexNet(classes=3, image_size=67, width=0.1, lrn_place="none", batch_norm=True)
    model.freeze_features()
    for factor, count in ((1.0, [3, 3]), (2.0, [2, 2, 1, 1])):
        groups = parameter_groups(model, Optim(new_lr=factor))
        assert [len(group["params"]) for group in groups] == count
    assert not model.norm1.training and not model.norm6.training and model.training
    model.eval().train()
    assert not model.norm1.training and model.fc6.training


def test_rate_falls_tenfold_every_20_epochs():
    # 1,281,167 images in batches of 256: epoch 20 begins within step 100,091
    def rate(step):
        return learning_rate(Optim(), step, 256, 1_281_167, 325_297)

    assert rate(0) == rate(100_091) == pytest.approx(0.01)
    assert rate(100_092) == pytest.approx(0.001)
    assert rate(325_296) == pytest.approx(1e-5)


@given(
    schedule=st.sampled_from(["step", "cosine", "poly", "constant"]),
    warmup=st.sampled_from([0.0, 0.5, 3.0]),
    batch=st.integers(1, 300),
    nsamples=st.integers(300, 5000),
)
def test_every_schedule_starts_at_most_at_lr_and_never_rises_after_warmup(schedule, warmup, batch, nsamples):
    optim = Optim(lr=0.4, schedule=schedule, warmup_epochs=warmup, step_epochs=2)
    total = 6 * nsamples // batch
    rates = [learning_rate(optim, step, batch, nsamples, total) for step in range(total)]
    assert all(0 <= r <= 0.4 * (1 + 1e-9) for r in rates)
    top = int(np.argmax(rates))
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if warmup:
        assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[0] < 0.4
    else:
        assert rates[0] == pytest.approx(0.4)
