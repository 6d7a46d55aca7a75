"""How the ranks act together in a step: they average gradients before the update, or weights and velocities after it.

In: a model and its optimizer, equal on all ranks. Out: a strategy whose `backward` (or `reduce`), `communicate`,
`update` and `after_update`, called in this order, make one step. Messages go through Horovod's ring allreduce over MPI,
NCCL or Gloo. The strategy `hybrid` is in job.ranks.hybrid.
"""

import contextlib

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from job.network.sgd import MomentumSGD, aligned


def average_statistics(model: nn.Module) -> None:
    """Average the running statistics of batch normalisation over the ranks, in place.

    A training step normalises with the mean and variance of the rank's own images; the running statistics follow those
    and are used in validation only. They are linear in what they follow, so it does not matter how often they are
    averaged. Those of frozen layers do not change, and an average of equal numbers may round them.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) and layer.training]
    statistics = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
    if statistics and hvd.size() > 1:
        hvd.grouped_allreduce_(statistics, name="statistics", op=hvd.Average)


class Strategy:
    """The calls of every strategy, here without communication: each rank trains for itself, as measurements need it.

    Attributes:
        optimizer: the optimizer to use from now on; Horovod wraps the one that was given.
        every: the ranks are equal after every multiple of this number of steps, and the state can be saved then.
    """

    every = 1

    def __init__(self, optimizer: MomentumSGD):
        self.optimizer = optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of this rank's loss with autograd."""
        self.optimizer.zero_grad()
        loss.backward()

    def reduce(self, gradients: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """For a pass without autograd: take `gradients`, one flat tensor, complete once `ready` has been reached."""

    def communicate(self) -> None:
        """Wait for the part of the allreduce that the backward pass did not hide."""

    def update(self) -> None:
        """Update the weights."""
        self.optimizer.step()

    def after_update(self, step: int) -> None:
        """Communicate what is due after the update of `step`, counted from 0."""

    def make_equal(self) -> None:
        """Make the state of all ranks equal, before a validation or a checkpoint. All ranks call it together."""


class Gradients(Strategy):
    """Allreduce of gradients, overlapped with the backward pass; then every rank makes the same update.

    Args:
        wire: "fp32", or "fp16": gradients travel as half-precision numbers, half the bytes.
        autograd: gradients come from `backward`; otherwise `reduce` takes them.
    """

    def __init__(self, model: nn.Module, optimizer: MomentumSGD, wire: str = "fp32", autograd: bool = True):
        super().__init__(optimizer)
        self._compression = hvd.Compression.fp16 if wire == "fp16" else hvd.Compression.none
        self._autograd = autograd
        self._model = model
        self._under_way: list[tuple] = []
        self._side: torch.cuda.Stream | None = None
        if autograd:
            self.optimizer = hvd.DistributedOptimizer(
                optimizer, named_parameters=model.named_parameters(), compression=self._compression
            )

    def reduce(self, gradients: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Begin to average `gradients`, in place, as one message. Do not write to them until `communicate`.

        With `ready` the message waits for that event instead of for all work that the device has been given so far, so
        it can be handed in after later work was launched. That order matters: when Horovod completes without the host,
        the caller's stream waits for the message from its start on, and work launched after that would not overlap.
        """
        if hvd.size() == 1:
            return
        with contextlib.ExitStack() as stack:
            if ready is not None:
                self._side = self._side or torch.cuda.Stream(gradients.device)
                self._side.wait_event(ready)
                stack.enter_context(torch.cuda.stream(self._side))
            tensor, context = self._compression.compress(gradients)
            handle = hvd.allreduce_async_(tensor, op=hvd.Average, name=f"gradients_{len(self._under_way)}")
        self._under_way.append((handle, gradients, tensor, context))

    def communicate(self) -> None:
        if self._autograd:
            self.optimizer.synchronize()
            return
        for handle, gradients, tensor, context in self._under_way:
            hvd.synchronize(handle)
            if tensor is not gradients:
                gradients.copy_(self._compression.decompress(tensor, context))
        self._under_way.clear()

    def update(self) -> None:
        if not self._autograd:
            self.optimizer.step()
            return
        with self.optimizer.skip_synchronize():
            self.optimizer.step()

    def make_equal(self) -> None:
        """Average the running statistics of batch normalisation; weights are equal already."""
        average_statistics(self._model)


class Weights(Strategy):
    """Each rank updates with its own gradients, then weights and velocities are averaged.

    Ding et al. 2014 (arXiv:1412.2302), section 2.3. Parameters and velocities become views of one flat tensor, so that
    the average is one allreduce in place. For momentum SGD an average after every step equals `Gradients` up to
    rounding: the update is linear in the gradient, and the ranks start equal.

    Args:
        every: steps between two averages.
    """

    def __init__(self, model: nn.Module, optimizer: MomentumSGD, every: int = 1):
        super().__init__(optimizer)
        self.every = every
        self._equal = True
        self._model = model
        params = [p for group in optimizer.param_groups for p in group["params"]]
        size = sum(2 * aligned(p.numel()) for p in params)
        self._flat = torch.zeros(size, device=params[0].device, dtype=params[0].dtype)
        self._free = 0  # the first element of the flat tensor that is not used yet
        with torch.no_grad():
            for param in params:
                param.data = self._moved(param.data)
                optimizer.state[param]["velocity"] = self._moved(optimizer.velocity(param))

    def _moved(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in the flat tensor."""
        view = self._flat[self._free : self._free + tensor.numel()].view(tensor.shape)
        self._free += aligned(tensor.numel())
        return view.copy_(tensor)

    def after_update(self, step: int) -> None:
        self._equal = (step + 1) % self.every == 0
        if self._equal:
            self._average()

    def make_equal(self) -> None:
        """Average weights, velocities and running statistics of all ranks."""
        if not self._equal:  # averaging equal numbers again could change their last bit
            self._average()
            self._equal = True
        average_statistics(self._model)

    def _average(self) -> None:
        if hvd.size() > 1:
            hvd.allreduce_(self._flat, name="weights_and_velocities", op=hvd.Average)
            self.optimizer.refresh()
