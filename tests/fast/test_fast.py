"""The fast path against its plain twin: losses, all gradients, updates. On a GPU, or in Triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F

from job.batches.device import prepare_plain
from job.config import Optim
from job.network.alexnet import AlexNet, pool
from job.network.alexnet import lrn as normalise
from job.network.sgd import LARS, FusedSGD, MomentumSGD, parameter_groups

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


def network(norm="after-pool", image_size=67, classes=7, width=0.25, dropout=0.0) -> AlexNet:
    """A network whose biases are not all alike, so that an exchange of two would show.

    norm: the place of LRN; "batch" (AlexNet-BN) is batch normalisation without LRN, "batch after-pool" has both.
    """
    batch = norm.startswith("batch")
    place = norm.removeprefix("batch").strip() or "none"
    model = AlexNet(classes, image_size, place, dropout, width, batch).to(DEVICE).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        if batch:
            model.norm2.weight[1] *= -1  # turns the order round that the pool sees
    return model


def batch_for(model: AlexNet, n: int):
    """Crops, offsets, mirror, mean image, labels."""
    size = model.image_size
    images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, device=DEVICE)
    offsets = torch.randint(0, 9, (n, 2), dtype=torch.int32, device=DEVICE)
    mirror = torch.arange(n, device=DEVICE) % 2 == 1
    mean = 255 * torch.rand(size + 8, size + 8, 3, device=DEVICE)
    labels = torch.randint(model.fc8.out_features, (n,), device=DEVICE)
    return images, offsets, mirror, mean, labels


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of the second."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def run_fast(model, batch, dtype, graphs=CUDA, seed=0):
    from job.fast.network import Network

    images, offsets, mirror, mean, labels = batch
    fast = Network(model, len(images), dtype, graphs=graphs)
    fast.prepare(images, offsets, mirror, mean)
    fast.labels.copy_(labels)
    fast.seed.fill_(seed)
    fast.head()
    fast.tail()
    return fast


def fast_scores(model, x):
    """Scores of the plain network in training, whose running statistics stay as they are."""
    with torch.no_grad():
        return copy.deepcopy(model)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top1_counts_the_first_of_equal_scores_as_argmax_does(dtype):
    from job.fast.network import Network

    model = network(classes=5)
    fast = Network(model, 6, dtype, graphs=False)
    scores = [[1, 3, 2, 0, 0], [1, 3, 3, 0, 0], [1, 3, 3, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [-9, -8, -7, -6, -5]]
    scores = torch.tensor(scores, device=DEVICE).to(dtype)
    fast.labels.copy_(torch.tensor([1, 1, 2, 0, 4, 4]))
    right = (scores.argmax(1) == fast.labels).float().mean()
    loss, found = fast._cross_entropy(scores.clone(), torch.zeros(5, device=DEVICE))
    assert found.item() == right.item() == pytest.approx(4 / 6)
    assert loss.item() == pytest.approx(F.cross_entropy(scores.float(), fast.labels).item(), rel=1e-6)


CASES = [
    ("after-pool", 67, 3, 0.25, 7),
    ("before-pool", 67, 2, 0.25, 7),
    ("none", 75, 1, 0.3, 10),
    ("after-pool", 83, 2, 0.5, 12),
    ("before-pool", 70, 5, 0.1, 3),
    ("batch", 67, 8, 0.3, 7),
    ("batch", 83, 9, 0.25, 5),
    ("batch after-pool", 67, 5, 0.2, 7),
    ("batch before-pool", 75, 4, 0.2, 7),
]
if CUDA:
    CASES += [("after-pool", 227, 5, 1.0, 1000), ("before-pool", 227, 33, 1.0, 1000), ("none", 131, 7, 1.0, 10)]
    CASES += [(norm, 227, 16, 1.0, 1000) for norm in ("batch", "batch after-pool", "batch before-pool")]


@pytest.mark.parametrize(("norm", "size", "n", "width", "classes"), CASES)
def test_gradients_are_those_of_autograd(norm, size, n, width, classes):
    """Float32, all parameters, against the plain network in float64; no further from it than 1e-5, or than four times
    what autograd in float32 is (cuDNN has float32 convolutions with errors of 2e-4)."""
    model = network(norm, size, classes, width)
    batch = batch_for(model, n)
    images, offsets, mirror, mean, labels = batch
    x = prepare_plain(images, offsets, mirror, mean)
    exact = copy.deepcopy(model).double()
    loss = F.cross_entropy(exact(x.double()), labels)
    loss.backward()
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), labels).backward()
    fast = run_fast(model, batch, torch.float32)
    assert abs(fast.loss.item() - loss.item()) < 1e-5 * max(1, loss.item())
    scores = fast_scores(model, x)
    assert fast.right.item() == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    for (name, p), q, t in zip(model.named_parameters(), exact.parameters(), twin.parameters(), strict=True):
        assert p.grad.is_contiguous() and p.grad.dtype == torch.float32
        assert distance(p.grad, q.grad) < max(1e-5, 4 * distance(t.grad, q.grad)), name
    for (name, b), q in zip(model.named_buffers(), exact.named_buffers(), strict=True):
        assert distance(b, q[1]) < 1e-5, name


def test_the_input_as_blocks_holds_every_pixel_once():
    """Mean, mirror and the order of the 48 channels, against the plain pass."""
    model = network(image_size=70)
    images, offsets, mirror, mean, labels = batch = batch_for(model, 3)
    fast = run_fast(model, batch, torch.float32, graphs=False)
    side = fast.images.shape[1]
    expected = torch.zeros(3, 3, 4 * side, 4 * side, device=DEVICE)
    plain = prepare_plain(images, offsets, mirror, mean)[:, :, : 4 * side, : 4 * side]
    expected[:, :, : plain.shape[2], : plain.shape[3]] = plain
    blocks = expected.view(3, 3, side, 4, side, 4).permute(0, 2, 4, 3, 5, 1).reshape(fast.images.shape)
    assert torch.equal(fast.images, blocks)


def test_a_crop_beyond_the_mean_image_is_not_a_number():
    """The mean image of smaller images: nothing outside of it is read, and the loss shows it."""
    model = network()
    images, offsets, mirror, mean, labels = batch_for(model, 3)
    offsets[:] = torch.tensor([[0, 0], [8, 3], [3, 8]])
    smaller = mean[:70, :70].contiguous()
    fast = run_fast(model, (images, offsets, mirror, smaller, labels), torch.float32, graphs=False)
    assert fast.images.isnan().any(dim=(1, 2, 3)).tolist() == [False, True, True] and fast.loss.isnan()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as a tensor of `dtype` holds it; Triton's interpreter cuts off where a GPU rounds."""
    if dtype == torch.float32 or CUDA:
        return x.to(dtype).float()
    cut = (x.detach().view(torch.int32) & -65536).view(torch.float32)
    return x + (cut - x).detach()


def lrn_pool_parts(lrn: str, dtype: torch.dtype, n: int, channels: int, side: int):
    """Outputs and gradients of one convolution's bias, ReLU, pool and LRN, fast and plain (float32 on same inputs)."""
    from job.fast.network import Network

    model = network(lrn)
    fast = Network(model, n, dtype, graphs=False)
    z = (20 * torch.randn(n, channels, side, side, device=DEVICE)).to(dtype).to(memory_format=torch.channels_last)
    bias = torch.nn.Parameter(torch.randn(channels, device=DEVICE))
    bias.grad = torch.zeros_like(bias)
    model.conv1.bias = bias
    outs, kept = fast._pool_and_normalise([z], "1", split=True)
    d = torch.randn_like(torch.cat(outs, 1))
    (dz,) = fast._pool_and_normalise_backward(list(d.chunk(2, 1)), kept, "1", split=False)
    source = z.float().requires_grad_()
    plain_bias = bias.detach().clone().requires_grad_()
    activations = F.relu(source + plain_bias[:, None, None])
    if lrn == "before-pool":  # which of two neighbours is the larger is decided behind the rounding
        out = pool(rounded(normalise(activations), dtype))
    else:
        out = model.pool_and_normalise(activations)
    out.backward(d.float())
    return [(torch.cat(outs, 1), out), (dz, source.grad), (bias.grad, plain_bias.grad)]


@pytest.mark.parametrize("lrn", ["after-pool", "before-pool", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_pool_and_lrn_agree_at_either_precision(lrn, dtype, tolerance):
    for n, channels, side in ((1, 24, 15), (3, 10, 8), *([(5, 96, 55), (33, 256, 27)] if CUDA else [])):
        for fast, plain in lrn_pool_parts(lrn, dtype, n, channels, side):
            assert distance(fast, plain) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_its_gradient_agree_at_either_precision(dtype, tolerance):
    from job.fast.network import Network

    for n, classes in ((3, 7), (5, 129), *([(129, 1000)] if CUDA else [])):
        fast = Network(network(classes=classes), n, dtype, graphs=False)
        fast.labels.copy_(torch.randint(classes, (n,)))
        logits = torch.randn(n, classes, device=DEVICE).to(dtype)
        bias = torch.randn(classes, device=DEVICE)
        source = logits.float().requires_grad_()
        loss = F.cross_entropy(source + bias, fast.labels)
        loss.backward()
        right = ((source + bias).argmax(1) == fast.labels).float().mean()
        found, top1 = fast._cross_entropy(logits, bias)
        assert top1.item() == pytest.approx(right.item())
        assert distance(found, loss) < tolerance and distance(logits, source.grad) < tolerance


def test_dropout_drops_its_share_by_the_seed_and_scales_the_rest():
    from job.fast.network import Network

    fast = Network(network(dropout=0.4), 2, torch.float32, graphs=False)
    bias = torch.ones(300, device=DEVICE)

    def dropped(seed: int, layer: int) -> torch.Tensor:
        fast.seed.fill_(seed)
        z = torch.ones(40, 300, device=DEVICE)
        fast._bias_relu_drop(z, bias, layer)
        return z

    one = dropped(2**62 + 5, 0)
    assert one.unique().tolist() == [0.0, pytest.approx(2 / 0.6)]
    share = float((one == 0).float().mean())
    assert abs(share - 0.4) < 4 * (0.4 * 0.6 / one.numel()) ** 0.5
    assert torch.equal(one, dropped(2**62 + 5, 0))
    for other in (dropped(2**62 + 6, 0), dropped(2**62 + 5, 1)):
        same = float(((one == 0) == (other == 0)).float().mean())
        assert abs(same - (0.4**2 + 0.6**2)) < 0.03  # independent
    # Backward: what was dropped has no gradient, the rest the same factor.
    d = torch.ones_like(one)
    bias_gradient = torch.zeros_like(bias)
    fast._relu_backward([d], [one], d, bias_gradient, dropped=True)
    assert torch.allclose(d, (one > 0) / 0.6) and torch.allclose(bias_gradient, d.sum(0))


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_the_fused_update_is_the_plain_one_and_writes_copies(kind):
    plain, fused = network(), network()
    fused.load_state_dict(plain.state_dict())
    optim = Optim(kind=kind, weight_decay=0.01)
    one = (LARS if kind == "lars" else MomentumSGD)(parameter_groups(plain, optim), 0.01, 0.9)
    two = FusedSGD(parameter_groups(fused, optim), 0.01, 0.9)
    two.copies[fused.fc6.weight] = torch.empty_like(fused.fc6.weight, dtype=torch.bfloat16)
    for rate in (0.01, 0.005, 0.1):
        for group in (*one.param_groups, *two.param_groups):
            group["lr"] = rate
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
        one.step()
        two.step()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two.velocity(q), one.velocity(p), rtol=1e-5, atol=1e-6)
    copied = two.copies[fused.fc6.weight].float()
    torch.testing.assert_close(copied, fused.fc6.weight.detach(), rtol=2**-7, atol=0)
    with torch.no_grad():
        fused.fc6.weight.zero_()
    two.refresh()
    assert not two.copies[fused.fc6.weight].any()


def test_what_is_not_a_number_shows_in_the_loss():
    model = network("before-pool")
    with torch.no_grad():
        model.conv1.weight[3, 0, 5, 5] = float("nan")
    fast = run_fast(model, batch_for(model, 2), torch.float32)
    assert fast.loss.isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
def test_graphs_compute_what_the_kernels_do_and_the_same_seed_gives_the_same_bits():
    model = network("after-pool", 227, 1000, 1.0, dropout=0.5)
    batch = batch_for(model, 64)
    torch.backends.cudnn.deterministic = True
    try:
        found = []
        for graphs in (False, True, True):
            fast = run_fast(model, batch, torch.bfloat16, graphs, seed=3)
            found.append([fast.loss.clone(), *(p.grad.clone() for p in model.parameters())])
    finally:
        torch.backends.cudnn.deterministic = False
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_frozen_convolutions_cost_no_backward_pass_and_the_rest_learns_as_before():
    model = network(dropout=0.3)
    batch = batch_for(model, 3)
    expected = run_fast(copy.deepcopy(model), batch, torch.float32)
    wanted = {name: p.grad.clone() for name, p in expected.model.named_parameters() if name.startswith("fc")}
    model.freeze_features()
    fast = run_fast(model, batch, torch.float32)
    near = 1e-3 if CUDA else 1e-6  # cuDNN may choose other algorithms
    assert distance(fast.loss, expected.loss) < near
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and all(distance(found[name], wanted[name]) < near for name in wanted)
    assert not fast.tail_gradients.numel() and fast.frozen
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = FusedSGD(parameter_groups(model, Optim(new_lr=10.0)), 0.01, 0.9)
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert all(moved[name].any() == name.startswith("fc") for name in moved)
    rate = 0.01 * torch.tensor([1.0, 10.0])  # of fc7 and fc8
    for name, own in zip(("fc7.weight", "fc8.weight"), rate.tolist(), strict=True):
        torch.testing.assert_close(moved[name], -own * (found[name] + 5e-4 * before[name]), rtol=1e-3, atol=1e-6)
