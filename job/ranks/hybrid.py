"""Hybrid parallelism: convolutions data-parallel, fc6 to fc8 model-parallel.

In: as of job.ranks.average and job.run.step. Out: losses and updates that equal those of `gradients` up to rounding;
with dropout too they do not depend on the number of ranks.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), scheme (a). Each rank
computes the convolutions of its own images. Then all ranks gather the features of the global batch, and each computes
its part of the outputs of fc6, fc7 and fc8 for all images. 96 % of the parameters are in these three layers, and their
gradients need no allreduce.

Bytes that a rank sends per step with n ranks, B images in all, float32 and a ring: 2 (n-1)/n times 9 MB of gradients of
the convolutions, and 4 (n-1)/n B (2 (9216 + 4096 + 4096) + 1000). `gradients` sends 2 (n-1)/n times 244 MB. Both are
equal at a global batch of about 3,300; below it, hybrid sends less.
"""

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from job.network.alexnet import AlexNet
from job.network.sgd import MomentumSGD
from job.ranks.average import Strategy, average_statistics


def part(size: int, rank: int, ranks: int) -> slice:
    """The rows of `size` that belong to a rank: as even as possible, the first ranks have one more."""
    each, more = divmod(size, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def gather(x: Tensor, name: str) -> Tensor:
    """All ranks' rows (axis 0), in the order of the ranks."""
    # Horovod has no bfloat16.
    return hvd.allgather(x.detach().float().contiguous(), name=f"hybrid.{name}").to(x.dtype)


def sum_and_scatter(x: Tensor, name: str) -> Tensor:
    """Sum over the ranks; each rank gets its `part` of the rows."""
    return hvd.reducescatter(x.float().contiguous(), op=hvd.Sum, name=f"hybrid.{name}.gradient").to(x.dtype)


class GatherRows(torch.autograd.Function):
    """Rows of all ranks. Each rank computes something else from them, so their gradients of a row add up."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gather(x, name)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return sum_and_scatter(d, ctx.name), None


class GatherColumns(torch.autograd.Function):
    """Columns of all ranks. `shared`: all ranks compute the same from them, so each has the whole gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, shared: bool) -> Tensor:
        ctx.name, ctx.shared = name, shared
        return gather(x.t(), name).t()

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None, None]:
        if ctx.shared:
            return d[:, part(d.shape[1], hvd.rank(), hvd.size())], None, None
        return sum_and_scatter(d.t(), ctx.name).t(), None, None


class Hybrid(Strategy):
    """Strategy: gradients of convolutions are summed over the ranks; each rank updates its own rows of fc6 to fc8.

    The optimizer's parameters fc6 to fc8, and their velocities, become views of this rank's rows. The other rows of the
    model are stale until `make_equal`; then a checkpoint holds the whole network, and any strategy can resume from it.

    Attributes:
        rows: name of a parameter of fc6 to fc8 -> this rank's rows of it.
    """

    def __init__(self, model: AlexNet, optimizer: MomentumSGD):
        super().__init__(optimizer)
        self._model = model
        self.rows: dict[str, nn.Parameter] = {}
        whole = {p: name for name, p in model.named_parameters() if name.startswith("fc")}
        for group in optimizer.param_groups:
            group["params"] = [self._own(p, whole[p]) if p in whole else p for p in group["params"]]
        self._convolutions = [p for p in model.parameters() if p not in whole and p.requires_grad]  # none: frozen
        self._whole = list(whole)
        self._handles: list[int] = []

    def _own(self, parameter: nn.Parameter, name: str) -> nn.Parameter:
        """This rank's rows of a parameter, and of its velocity."""
        rows = part(len(parameter), hvd.rank(), hvd.size())
        own = nn.Parameter(parameter.data[rows])
        self.optimizer.state[own]["velocity"] = self.optimizer.velocity(parameter)[rows]
        self.rows[name] = own
        return own

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients, and begin to sum those of the convolutions."""
        super().backward(loss)
        # Each rank has the gradient of the loss of all images by way of its own images: the sum is the whole gradient.
        gradients = [p.grad for p in self._convolutions]
        if gradients:
            self._handles.append(hvd.grouped_allreduce_async_(gradients, op=hvd.Sum, name="convolutions"))

    def communicate(self) -> None:
        """Wait for the gradients of the convolutions."""
        while self._handles:
            hvd.synchronize(self._handles.pop())

    @torch.no_grad()
    def make_equal(self) -> None:
        """Give all ranks all rows of fc6 to fc8 and their velocities; average running statistics."""
        average_statistics(self._model)
        for number, parameter in enumerate(self._whole):
            for kind, tensor in (("weight", parameter.data), ("velocity", self.optimizer.velocity(parameter))):
                tensor.copy_(gather(tensor[part(len(tensor), hvd.rank(), hvd.size())], f"{kind}.{number}"))
