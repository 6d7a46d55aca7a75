"""How ranks act together on a step: average gradients before the update, or weights and momenta after it.

In: a model and its optimizer, equal on all ranks. Out: a strategy whose `backward`, `communicate`, `update` and
`after_update`, in this order, make one step. Both go through Horovod's ring allreduce over MPI, NCCL or Gloo.
"""

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from job.optim import MomentumSGD


class Gradients:
    """Allreduce of gradients, overlapped with the backward pass; then every rank makes the same update."""

    def __init__(self, model: nn.Module, optimizer: MomentumSGD):
        self.optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's loss; each is on the wire as soon as it is ready."""
        self.optimizer.zero_grad()
        loss.backward()

    def communicate(self) -> None:
        """Wait for what of the allreduce the backward pass did not hide."""
        self.optimizer.synchronize()

    def update(self) -> None:
        with self.optimizer.skip_synchronize():
            self.optimizer.step()

    def after_update(self, step: int) -> None:
        pass

    def equalise(self) -> None:
        pass


class Weights:
    """The report's method: each rank updates with its own gradients, then weights and momenta are averaged.

    Ding et al. 2014, section 2.3. Parameters and velocities become views of one flat buffer, so that the average is one
    allreduce in place. For momentum SGD an average after every step equals `Gradients` up to rounding: the update is
    linear in the gradient, and the ranks start equal.
    """

    def __init__(self, model: nn.Module, optimizer: MomentumSGD, every: int = 1):
        self.optimizer = optimizer
        self.every = every
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.flat = torch.zeros(2 * sum(p.numel() for p in params), device=params[0].device, dtype=params[0].dtype)
        offset = 0
        with torch.no_grad():
            for param in params:
                for tensor, place in ((param.data, "weight"), (optimizer.velocity(param), "velocity")):
                    view = self.flat[offset : offset + tensor.numel()].view(tensor.shape)
                    view.copy_(tensor)
                    offset += tensor.numel()
                    if place == "weight":
                        param.data = view
                    else:
                        optimizer.state[param]["velocity"] = view

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def communicate(self) -> None:
        pass

    def update(self) -> None:
        self.optimizer.step()

    def after_update(self, step: int) -> None:
        if (step + 1) % self.every == 0:
            self.equalise()

    def equalise(self) -> None:
        """Average weights and velocities of all ranks. Also called before a validation or a checkpoint."""
        if hvd.size() > 1:
            hvd.allreduce_(self.flat, name="weights_and_momenta", op=hvd.Average)


def make_strategy(name: str, model: nn.Module, optimizer: MomentumSGD, average_every: int) -> Gradients | Weights:
    """The strategy of setting `parallel`."""
    return Gradients(model, optimizer) if name == "gradients" else Weights(model, optimizer, average_every)
