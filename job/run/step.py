"""A rank's forward and backward pass: in plain PyTorch, or at the speed of the GPU (job.fast). Both do the same.

In: a batch on the device. Out: its loss, and gradients that the strategy among the ranks has begun to average.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from job.batches.device import prepare
from job.config import Config
from job.fast import network as fast
from job.network.alexnet import AlexNet
from job.network.sgd import LARS, FusedSGD, MomentumSGD, parameter_groups
from job.ranks.average import Gradients, Weights
from job.ranks.hybrid import Hybrid, HybridPass


def set_precision(precision: str) -> None:
    """Let the matrix units round float32 operands to TF32, in convolutions and matrix products, or not."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def set_determinism(wanted: bool) -> None:
    """Let CUDA's libraries choose the fastest way by trying, or only ways that give the same bits every time."""
    torch.backends.cudnn.benchmark = not wanted
    torch.backends.cudnn.deterministic = wanted
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it is written before it is read


def make_optimizer(config: Config, model: AlexNet, kernels: str) -> MomentumSGD:
    """The optimizer that goes with a pass."""
    kind = FusedSGD if kernels == "fast" else {"sgd": MomentumSGD, "lars": LARS}[config.optim.kind]
    return kind(parameter_groups(model, config.optim), config.optim.lr, config.optim.momentum)


class PlainPass:
    """Autograd, with gradients on the wire as soon as each is ready.

    Args:
        mean: mean image of the stored images, or None; see `job.batches.device.load_mean`.
    """

    def __init__(self, config: Config, model: AlexNet, strategy: Gradients | Weights, mean: Tensor | None):
        self._config, self._model, self._strategy, self._mean = config, model, strategy, mean
        self._device = next(model.parameters()).device

    def prepare(self, images: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
        """uint8 crops (N, S, S, 3) as the network's input, float32 (N, 3, S, S)."""
        return prepare(images, offsets, mirror, self._mean)

    def run(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Loss of a batch; afterwards the strategy has this rank's gradients. `seed` sets what dropout draws."""
        torch.manual_seed(seed)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
            loss = F.cross_entropy(self._model(images), labels)
        self._strategy.backward(loss)
        return loss


class FastPass:
    """`PlainPass` by the kernels of job.fast. Create it after model and optimizer: graphs keep their addresses."""

    def __init__(
        self,
        config: Config,
        model: AlexNet,
        strategy: Gradients | Weights,
        mean: Tensor | None,
        batch: int,
    ):
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._network = fast.Network(model, batch, dtype)
        self._strategy, self._mean = strategy, mean
        self._head_done = torch.cuda.Event()
        strategy.optimizer.copies.update(self._network.copies)
        strategy.optimizer.refresh()

    def prepare(self, images: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
        """uint8 crops (N, S, S, 3) as the network's input; the next call writes over it."""
        return self._network.prepare(images, offsets, mirror, self._mean)

    def run(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """As of `PlainPass`; `images` is what `prepare` returned last. The next call writes over the loss."""
        network = self._network
        assert images is network.images
        network.labels.copy_(labels)
        network.seed.fill_(seed)
        network.head()
        self._head_done.record()
        network.tail()
        self._strategy.reduce(network.head_gradients, self._head_done)
        self._strategy.reduce(network.tail_gradients)
        return network.loss


def make_pass(
    config: Config,
    model: AlexNet,
    strategy: Gradients | Weights | Hybrid,
    mean: Tensor | None,
    kernels: str,
    batch: int,
) -> PlainPass | FastPass | HybridPass:
    """The pass for `batch` images a step of this rank."""
    if isinstance(strategy, Hybrid):
        return HybridPass(config, model, strategy, mean)
    if kernels == "fast":
        return FastPass(config, model, strategy, mean, batch)
    return PlainPass(config, model, strategy, mean)
