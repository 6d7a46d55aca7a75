"""A rank's training step: the network, its optimizer, the strategy among the ranks, and the forward and backward pass.

In: a batch on the device. Out: its loss, and updated weights. `Step` makes its parts in the one order that works: the
model, its optimizer, the strategy (which may wrap the optimizer or move the weights), the pass (whose CUDA graphs keep
addresses). Passes compute in plain PyTorch, or at the speed of the GPU (job.fast), with the same result up to rounding.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor

from job.batches.device import prepare
from job.config import Config, to_flat
from job.fast import network as fast
from job.fast import support
from job.network.alexnet import AlexNet, build
from job.network.precision import set_precision
from job.network.sgd import LARS, FusedSGD, MomentumSGD, parameter_groups
from job.ranks.average import Gradients, Strategy, Weights
from job.ranks.hybrid import GatherColumns, GatherRows, Hybrid, part
from job.run.log import COMPUTE, EXPOSED, UPDATE
from job.usage.ranges import Range, make_range


class Step:
    """One training step after another, on this rank's images of every batch.

    Args:
        config: settings, with the number of classes known.
        kernels: "fast" or "plain".
        images: images per step of this rank.
        mean: mean image of the stored images, or None; see `job.batches.device.load_mean`.
        together: the ranks act together as --parallel says; otherwise each trains for itself.

    Attributes:
        every: the ranks are equal after every multiple of this number of steps.
        right: float32 scalar on the device, after `run`: the share of images whose label has the largest score. With
            --parallel hybrid of the global batch, otherwise of this rank's images. The next `run` may overwrite it.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        kernels: str,
        images: int,
        mean: Tensor | None = None,
        together: bool = True,
    ):
        set_determinism(config.deterministic)
        set_precision(config.precision)
        self._seed = config.seed
        # Dropout draws from (seed, step, rank) alone: a resumed run draws what the undisturbed one would have drawn.
        # Hybrid ranks compute parts of one network, so they draw the same numbers.
        self._drawing = 0 if config.parallel == "hybrid" else hvd.rank()
        self._named = make_range(config.profile_nvtx, device)
        self.model = build(config).to(device).train()
        if config.freeze == "conv":
            self.model.freeze_features()
        optimizer = _make_optimizer(config, self.model, kernels)
        self._strategy = _make_strategy(config, self.model, optimizer, kernels) if together else Strategy(optimizer)
        self._optimizer = self._strategy.optimizer
        self.every = self._strategy.every
        if isinstance(self._strategy, Hybrid):
            self._pass = HybridPass(config, self.model, self._strategy, mean)
        elif kernels == "fast":
            self._pass = FastPass(config, self.model, self._strategy, mean, images)
        else:
            self._pass = PlainPass(config, self.model, self._strategy, mean)
        self._pass.named = self._named

    def prepare(self, images: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
        """uint8 crops (N, S, S, 3) as input of the network; the next call may write over it.

        Args:
            offsets: int32 (N, 2), top and left of each crop in the stored image.
            mirror: bool (N,), which to mirror.
        """
        return self._pass.prepare(images, offsets, mirror)

    def run(self, images: Tensor, labels: Tensor, number: int, mark: Callable[[str], Any] = lambda _: None) -> Tensor:
        """Make step `number`, counted from 0 over the whole run. Returns the loss; the next may overwrite it.

        Args:
            images: what `prepare` returned last.
            labels: int64 (N,).
            mark: called at the end of each section of the step with its name, as of job.run.log.
        """
        loss = self._pass.run(images, labels, random_seed(self._seed, number, self._drawing))
        self.right = self._pass.right
        mark(COMPUTE)
        with self._named("allreduce"):
            self._strategy.communicate()
        mark(EXPOSED)
        with self._named("update"):
            self._strategy.update()
        mark(UPDATE)
        with self._named("allreduce"):
            self._strategy.after_update(number)
        mark(EXPOSED)
        return loss

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the weights for the next steps."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def make_equal(self) -> None:
        """Make the state of all ranks equal and whole, before it is saved or validated. All ranks call it together."""
        self._strategy.make_equal()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors themselves, no copies: `model`, weights by name, and `velocity`, the optimizer's by parameter.

        A frozen parameter has no velocity.
        """
        return {"model": self.model.state_dict(), "velocity": dict(self._velocities())}

    @torch.no_grad()
    def load(self, model: dict[str, Tensor], velocity: dict[str, Tensor]) -> None:
        """Copy a state into this rank's tensors. `share` gives it to the other ranks.

        Args:
            velocity: empty at the start of a run, where all are zero.
        """
        self.model.load_state_dict(model)
        for name, own in self._velocities() if velocity else ():
            own.copy_(velocity[name])

    def share(self) -> None:
        """Give the state of rank 0 to all ranks, which call it together."""
        hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        hvd.broadcast_parameters(self._velocities(), root_rank=0)
        self._optimizer.refresh()

    def _velocities(self) -> list[tuple[str, Tensor]]:
        return [(name, self._optimizer.velocity(p)) for name, p in self.model.named_parameters() if p.requires_grad]


def _make_optimizer(config: Config, model: AlexNet, kernels: str) -> MomentumSGD:
    kind = FusedSGD if kernels == "fast" else {"sgd": MomentumSGD, "lars": LARS}[config.optim.kind]
    return kind(parameter_groups(model, config.optim), config.optim.lr, config.optim.momentum)


def _make_strategy(config: Config, model: AlexNet, optimizer: MomentumSGD, kernels: str) -> Strategy:
    if config.parallel == "hybrid":
        return Hybrid(model, optimizer)
    if config.parallel == "gradients":
        return Gradients(model, optimizer, config.wire, autograd=kernels == "plain")
    return Weights(model, optimizer, config.average_every)


def random_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random numbers in one step."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def set_determinism(wanted: bool) -> None:
    """Let CUDA's libraries try which algorithm is fastest, or use only those that give the same bits every time."""
    torch.backends.cudnn.benchmark = not wanted
    torch.backends.cudnn.deterministic = wanted
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it is written before it is read


def top1(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of rows of (N, classes) scores whose largest is that of the label, a float32 scalar on their device."""
    return (scores.detach().argmax(1) == labels).float().mean()


class PlainPass:
    """Forward and backward pass with autograd; each gradient is sent as soon as it is ready.

    Attributes:
        named: makes ranges of a profile; see job.usage.ranges.
        right: top-1 of the last batch; see `Step`.
    """

    named: Range
    right: Tensor

    def __init__(self, config: Config, model: AlexNet, strategy: Strategy, mean: Tensor | None):
        self._config, self._model, self._strategy, self._mean = config, model, strategy, mean
        self._device = next(model.parameters()).device

    def prepare(self, images: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
        """uint8 crops (N, S, S, 3) as the network's input, float32 (N, 3, S, S)."""
        return prepare(images, offsets, mirror, self._mean)

    def run(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Loss of a batch; the strategy has this rank's gradients then. `seed` sets what dropout draws."""
        torch.manual_seed(seed)
        bf16 = self._config.precision == "bf16"
        with self.named("forward"), torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            scores = self._model(images)
            loss = F.cross_entropy(scores, labels)
            self.right = top1(scores, labels)
        with self.named("backward"):
            self._strategy.backward(loss)
        return loss


class HybridPass(PlainPass):
    """`PlainPass` with fc6 to fc8 split over the ranks; see job.ranks.hybrid."""

    def run(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Loss of the global batch. `seed` must be the same on all ranks."""
        random = torch.Generator(self._device).manual_seed(seed)
        rows, drop, bf16 = self._strategy.rows, self._model.dropout, self._config.precision == "bf16"
        with self.named("forward"), torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            x = GatherRows.apply(self._model.features(images), "features")  # (B, 9216): rank 0's images, rank 1's, ...
            if "features" in self._model.dropped:
                x = x * self._kept(random, *x.shape, drop)
            for name in ("fc6", "fc7"):
                x = F.relu(F.linear(x, rows[f"{name}.weight"], rows[f"{name}.bias"]))  # (B, 4096 / ranks)
                if name in self._model.dropped:
                    units = getattr(self._model, name).out_features
                    x = x * self._part(self._kept(random, len(x), units, drop))
                x = GatherColumns.apply(x, name, False)
            scores = F.linear(x, rows["fc8.weight"], rows["fc8.bias"])
            scores = GatherColumns.apply(scores, "fc8", True)  # (B, classes)
            labels = hvd.allgather(labels, name="hybrid.labels")
            loss = F.cross_entropy(scores, labels)
            self.right = top1(scores, labels)
        with self.named("backward"):
            self._strategy.backward(loss)
        return loss

    def _kept(self, random: torch.Generator, images: int, units: int, drop: float) -> Tensor | float:
        """Dropout's factors, (B, units), drawn in the order of the global batch: the same on any number of ranks."""
        if not drop:
            return 1.0
        ranks = hvd.size()
        kept = torch.rand(images // ranks, ranks, units, generator=random, device=self._device) >= drop
        # Image i of rank r is number i * ranks + r of the global batch; here rank 0's come first.
        return kept.transpose(0, 1).reshape(images, units) / (1 - drop)

    def _part(self, kept: Tensor | float) -> Tensor | float:
        """Those of this rank's units, (B, units / ranks)."""
        return kept if isinstance(kept, float) else kept[:, part(kept.shape[1], hvd.rank(), hvd.size())]


class FastPass:
    """`PlainPass` with the kernels of job.fast, for `images` images per step."""

    named: Range
    right: Tensor

    def __init__(self, config: Config, model: AlexNet, strategy: Strategy, mean: Tensor | None, images: int):
        assert not support.lacks(to_flat(config)), "job.ranks.agree chooses the plain kernels for these settings"
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._network = fast.Network(model, images, dtype)
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
        with self.named("forward, and backward to fc6"):  # a graph each
            network.head()
        self.right = network.right
        if network.frozen:
            with self.named("allreduce"):
                self._strategy.reduce(network.head_gradients)
            return network.loss
        self._head_done.record()
        with self.named("backward"):
            network.tail()
        with self.named("allreduce"):
            self._strategy.reduce(network.head_gradients, self._head_done)
            self._strategy.reduce(network.tail_gradients)
        return network.loss
