"""AlexNet is the published network: shapes, parameter counts, initial weights, normalisation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.network.alexnet import AlexNet, feature_size, lrn


def layers(model):
    """Names and layers that have weights."""
    return [(name, layer) for name, layer in model.named_children() if list(layer.parameters())]


@pytest.mark.parametrize("place", ["after-pool", "before-pool"])
def test_the_published_network_has_60965224_parameters(place):
    # conv 34,944 + 307,456 + 885,120 + 663,936 + 442,624; fc 37,752,832 + 16,781,312 + 4,097,000
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers(AlexNet(lrn_place=place))}
    assert counts == {
        "conv1": 34_944,
        "conv2": 307_456,
        "conv3": 885_120,
        "conv4": 663_936,
        "conv5": 442_624,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    }
    assert sum(counts.values()) == 60_965_224


def test_layers_have_the_published_geometry():
    model = AlexNet(classes=7, width=0.1)
    shapes = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, out, name=name: shapes.__setitem__(name, tuple(out.shape[2:])))
    model(torch.zeros(2, 3, 227, 227))
    assert [shapes[f"conv{i}"] for i in range(1, 6)] == [(55, 55), (27, 27), (13, 13), (13, 13), (13, 13)]
    published = {"conv1": (11, 4, 0, 1), "conv2": (5, 1, 2, 2), "conv3": (3, 1, 1, 1), "conv4": (3, 1, 1, 2)}
    for name, (kernel, stride, padding, groups) in {**published, "conv5": (3, 1, 1, 2)}.items():
        conv = getattr(model, name)
        assert (conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups) == (kernel, stride, padding, groups)


@pytest.mark.parametrize("size", [67, 68, 75, 99, 128, 224, 227, 256])
def test_any_image_size_from_67_pixels_fits(size):
    model = AlexNet(classes=5, image_size=size, width=0.05)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)
    assert feature_size(67) == 1 and feature_size(227) == 6


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(3)
    model = AlexNet(classes=100, image_size=99)
    for name, layer in layers(model):
        spread = 0.005 if name in ("fc6", "fc7") else 0.01
        n = layer.weight.numel()
        assert abs(layer.weight.std().item() / spread - 1) < 5 / math.sqrt(2 * n)  # 5 standard errors
        assert abs(layer.weight.mean().item()) < 5 * spread / math.sqrt(n)
        wanted = 0.1 if name in ("conv2", "conv4", "fc6", "fc7") else 0.0
        assert (layer.bias == wanted).all()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 3), c=st.integers(1, 12), h=st.integers(1, 6), w=st.integers(1, 6), seed=st.integers(0, 99))
def test_normalisation_follows_its_formula_in_float64(n, c, h, w, seed):
    x = np.random.default_rng(seed).normal(0, 30, (n, c, h, w))
    expected = np.empty_like(x)
    for i in range(c):
        window = x[:, max(0, i - 2) : i + 3]
        expected[:, i] = x[:, i] / (2 + 1e-4 * (window**2).sum(axis=1)) ** 0.75
    got = lrn(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_place_of_normalisation_decides_between_the_two_recipes():
    x = 100 * torch.rand(2, 16, 15, 15)
    pooled = torch.nn.functional.max_pool2d
    after = AlexNet(classes=4, image_size=67, lrn_place="after-pool", width=0.2).pool_and_normalise(x)
    before = AlexNet(classes=4, image_size=67, lrn_place="before-pool", width=0.2).pool_and_normalise(x)
    torch.testing.assert_close(after, lrn(pooled(x, 3, 2)))
    torch.testing.assert_close(before, pooled(lrn(x), 3, 2))
    assert not torch.allclose(after, before, rtol=0.01)


def test_dropout_is_at_work_in_training_only():
    model = AlexNet(classes=4, image_size=67, width=0.2)
    x = torch.randn(8, 3, 67, 67)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_batch_normalisation_takes_out_what_a_convolution_scales_and_shifts():
    torch.manual_seed(1)
    model = AlexNet(classes=4, image_size=67, lrn_place="none", dropout=0, width=0.2, batch_norm=True)
    x = torch.randn(16, 3, 67, 67)
    features = model.features(x)
    torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), atol=1e-5, rtol=0)
    assert all(conv.bias is None for conv in (model.conv1, model.conv2, model.conv3, model.conv4, model.conv5))
    before = model(x)
    with torch.no_grad():
        for conv in (model.conv1, model.conv3, model.conv5):
            conv.weight.mul_(7)
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=1e-3)
    # In use, the running statistics count: the scores of an image do not depend on its neighbours.
    model.eval()
    torch.testing.assert_close(model(x)[:2], model(x[:2]))
