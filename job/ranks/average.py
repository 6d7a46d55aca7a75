"""How ranks act together on a step: average gradients before the update, or weights and momenta after it.

In: a model and its optimizer, equal on all ranks. Out: a strategy whose `backward`, `communicate`, `update` and
`after_update`, in this order, make one step. Both go through Horovod's ring allreduce over MPI, NCCL or Gloo.
"""

import contextlib

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from job.config import Config
from job.network.sgd import MomentumSGD, aligned


def average_statistics(model: nn.Module) -> None:
    """Average the running statistics of batch normalisation over the ranks, in place.

    Each rank normalises with the mean and variance of its own images, and its running ones follow those; a step uses
    only the former. Running statistics are linear in what they follow, so it does not matter how often this is done.
    """
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if statistics and hvd.size() > 1:
        hvd.grouped_allreduce_(statistics, name="statistics", op=hvd.Average)


class Alone:
    """No averaging: this rank for itself, as measurements need it.

    Attributes:
        every: after a multiple of so many steps the ranks are equal, and the state can be kept.
    """

    every = 1

    def __init__(self, optimizer: MomentumSGD):
        self.optimizer = optimizer

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's loss by autograd."""
        self.optimizer.zero_grad()
        loss.backward()

    def reduce(self, gradients: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Some gradients, the whole of a flat memory, are complete from `ready` on, in a pass without autograd."""

    def communicate(self) -> None:
        """Wait for what of the allreduce the backward pass did not hide."""

    def update(self) -> None:
        self.optimizer.step()

    def after_update(self, step: int) -> None:
        """What is due behind the update of `step`."""

    def equalise(self) -> None:
        """Make the state of all ranks equal. Also called before a validation or a checkpoint."""


class Gradients(Alone):
    """Allreduce of gradients, overlapped with the backward pass; then every rank makes the same update.

    Args:
        wire: "fp32", or "fp16": gradients travel as half-precision numbers, half the bytes.
        autograd: gradients come from `backward`; otherwise they are handed in by `reduce`.
    """

    def __init__(self, model: nn.Module, optimizer: MomentumSGD, wire: str = "fp32", autograd: bool = True):
        self._compression = hvd.Compression.fp16 if wire == "fp16" else hvd.Compression.none
        self._autograd = autograd
        self._model = model
        self._under_way: list[tuple] = []
        self._side: torch.cuda.Stream | None = None
        self.optimizer = optimizer
        if autograd:
            self.optimizer = hvd.DistributedOptimizer(
                optimizer, named_parameters=model.named_parameters(), compression=self._compression
            )

    def reduce(self, gradients: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Begin to average `gradients`, in place, as one message; its memory is not to be written meanwhile.

        With `ready` the message waits for that event instead of for all that the device has been given to do. So it can
        be handed in behind later work: Horovod, when it completes without the host, lets the stream of the caller wait
        for the message as soon as that is under way, and what is launched afterwards would not overlap with it.
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
        """Wait for what of the allreduce the backward pass did not hide."""
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

    def equalise(self) -> None:
        """Weights are equal as it is; average the running statistics of batch normalisation."""
        average_statistics(self._model)


class Weights(Alone):
    """The report's method: each rank updates with its own gradients, then weights and momenta are averaged.

    Ding et al. 2014, section 2.3. Parameters and velocities become views of one flat buffer, so that the average is one
    allreduce in place. For momentum SGD an average after every step equals `Gradients` up to rounding: the update is
    linear in the gradient, and the ranks start equal.
    """

    def __init__(self, model: nn.Module, optimizer: MomentumSGD, every: int = 1):
        self.optimizer = optimizer
        self.every = every
        self._equal = True
        self._model = model
        params = [p for group in optimizer.param_groups for p in group["params"]]
        size = sum(2 * aligned(p.numel()) for p in params)
        self.flat = torch.zeros(size, device=params[0].device, dtype=params[0].dtype)
        offset = 0
        with torch.no_grad():
            for param in params:
                for tensor, place in ((param.data, "weight"), (optimizer.velocity(param), "velocity")):
                    view = self.flat[offset : offset + tensor.numel()].view(tensor.shape)
                    view.copy_(tensor)
                    offset += aligned(tensor.numel())
                    if place == "weight":
                        param.data = view
                    else:
                        optimizer.state[param]["velocity"] = view

    def after_update(self, step: int) -> None:
        self._equal = (step + 1) % self.every == 0
        if self._equal:
            self._average()

    def equalise(self) -> None:
        """Average weights, velocities and running statistics of all ranks."""
        if not self._equal:  # the average of equal numbers may be another one in its last bit
            self._average()
            self._equal = True
        average_statistics(self._model)

    def _average(self) -> None:
        if hvd.size() > 1:
            hvd.allreduce_(self.flat, name="weights_and_momenta", op=hvd.Average)
            self.optimizer.refresh()


def make_strategy(config: Config, model: nn.Module, optimizer: MomentumSGD, autograd: bool = True) -> Alone:
    """The strategy of setting `parallel`, for gradients from autograd or by hand."""
    if config.parallel == "hybrid":
        from job.ranks.hybrid import Hybrid  # which builds on this module

        return Hybrid(model, optimizer)
    if config.parallel == "gradients":
        return Gradients(model, optimizer, config.wire, autograd)
    return Weights(model, optimizer, config.average_every)
