"""The update rule and the learning-rate schedule are those of the recipe."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.config import Optim
from job.model import AlexNet
from job.optim import MomentumSGD, learning_rate, parameter_groups


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


def test_biases_have_twice_the_rate_and_no_decay():
    model = AlexNet(classes=3, image_size=67, width=0.1)
    weights, biases = parameter_groups(model, Optim())
    assert weights["weight_decay"] == 5e-4 and weights.get("lr_factor", 1) == 1
    assert biases["weight_decay"] == 0 and biases["lr_factor"] == 2
    assert len(weights["params"]) == len(biases["params"]) == 8
    assert all(p.ndim == 1 for p in biases["params"]) and all(p.ndim > 1 for p in weights["params"])


def test_rate_falls_tenfold_every_20_epochs():
    # 1,281,167 images in batches of 256: epoch 20 begins within step 100,091
    def rate(step):
        return learning_rate(Optim(), step, 256, 1_281_167, 325_297)

    assert rate(0) == rate(100_091) == pytest.approx(0.01)
    assert rate(100_092) == pytest.approx(0.001)
    assert rate(325_296) == pytest.approx(1e-5)


@given(
    schedule=st.sampled_from(["step", "cosine", "constant"]),
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
