"""SGD with momentum as AlexNet's authors define it, LARS for large batches, and the learning rate of every step.

In: parameters with gradients, the step's learning rate. Out: updated parameters, in place.
"""

import math

import torch
from torch import nn

from job.config import Optim


class MomentumSGD(torch.optim.Optimizer):
    """v <- momentum * v - lr * lr_factor * (g + weight_decay * w);  w <- w + v.

    Krizhevsky et al., section 5. The velocity v is what PyTorch calls the momentum buffer, but it contains the rate:
    after the rate drops, v still carries the updates made at the old one.
    """

    def __init__(
        self, params, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 0.0, lr_factor: float = 1.0
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, lr_factor=lr_factor))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            velocities = [self.velocity(p) for p in params]
            rate = group["lr"] * group["lr_factor"]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, [p.grad for p in params], alpha=-rate)
            if group["weight_decay"]:
                torch._foreach_add_(velocities, params, alpha=-rate * group["weight_decay"])
            torch._foreach_add_(params, velocities)

    def refresh(self) -> None:
        """Call it after parameters were changed by anything but `step`."""

    def velocity(self, param: torch.Tensor) -> torch.Tensor:
        """The velocity of a parameter, zero before its first update."""
        state = self.state[param]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return state["velocity"]


class LARS(MomentumSGD):
    """`MomentumSGD` with layer-wise adaptive rate scaling: every weight tensor w has a learning rate of its own.

    v <- momentum * v - lr * trust * |w| / (|g| + weight_decay * |w|) * (g + weight_decay * w);  w <- w + v.

    You, Gitman, Ginsburg 2017 (arXiv:1708.03888), algorithm 1: a step changes each tensor by the share
    lr * trust of its own norm, however large its gradient is. Groups with `trust` 0 are updated as by `MomentumSGD`.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, decay = [p.grad for p in params], group["weight_decay"]
            updates = torch._foreach_add(grads, params, alpha=decay)
            if group["trust"]:
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True)
                torch._foreach_mul_(updates, [lars_rate(w, g, group["trust"], decay) for w, g in norms])
            velocities = [self.velocity(p) for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates, alpha=-group["lr"] * group["lr_factor"])
            torch._foreach_add_(params, velocities)


def lars_rate(w: torch.Tensor, g: torch.Tensor, trust: float, decay: float) -> torch.Tensor:
    """Local rates of LARS from the norms of weights and gradients; all stay on the device.

    An all-zero tensor uses the global rate; otherwise it could never change.
    """
    return torch.where(w > 0, trust * w / (g + decay * w).clamp(min=1e-30), 1.0)


def aligned(count: int) -> int:
    """Elements of a flat float32 tensor that `count` numbers take, so that the next begin at a multiple of 16 bytes."""
    return -(-count // 4) * 4


class FusedSGD(MomentumSGD):
    """`MomentumSGD` and `LARS` as one Triton kernel over all parameters, which also writes `copies` of them.

    Parameters, gradients and velocities must be float32, contiguous, aligned to 16 bytes (see `aligned`), on one GPU,
    and keep their addresses.

    Attributes:
        copies: parameter -> tensor of the same shape in another type, as of `job.fast.network.Network`.
    """

    BLOCK = 4096  # elements of one Triton program

    def __init__(self, params, lr: float, momentum: float):
        super().__init__(params, lr, momentum)
        self.copies: dict[nn.Parameter, torch.Tensor] = {}
        self._table = None

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, copy in self.copies.items():
            copy.copy_(parameter)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        import triton.language as tl

        from job.fast.kernels import momentum_sgd

        if self._table is None:
            self._make_table()
        table, scales, rates, dtype = self._table
        rates.fill_(self.param_groups[0]["lr"])  # the same for all groups, but for their lr_factor
        first = 0
        for group in self.param_groups:
            params = group["params"]
            if group.get("trust"):
                w = torch.stack(torch._foreach_norm(params))
                g = torch.stack(torch._foreach_norm([p.grad for p in params]))
                rates[first : first + len(params)] *= lars_rate(w, g, group["trust"], group["weight_decay"])
            first += len(params)
        momentum_sgd[(len(table),)](
            table,
            scales,
            rates,
            MOMENTUM=self.param_groups[0]["momentum"],
            COPY=tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            BLOCK=self.BLOCK,
            num_warps=8,
        )

    def _make_table(self) -> None:
        rows, scales, tensors_before = [], [], 0
        for group in self.param_groups:
            for p in group["params"]:
                copy = self.copies.get(p)
                tensors = (p, self.velocity(p), p.grad, *([] if copy is None else [copy]))
                assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
                addresses = [t.data_ptr() for t in (p, self.velocity(p), p.grad)]
                addresses.append(0 if copy is None else copy.data_ptr())
                for first in range(0, p.numel(), self.BLOCK):
                    rows.append([*addresses, first, p.numel(), tensors_before])
                    scales.append([group["lr_factor"], group["weight_decay"]])
                tensors_before += 1
        device = self.param_groups[0]["params"][0].device
        dtype = next((c.dtype for c in self.copies.values()), torch.float32)
        self._table = (
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(scales, dtype=torch.float32, device=device),
            torch.zeros(tensors_before, device=device),
            dtype,
        )


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Two groups: weights with decay; biases without, at `bias_lr` times the rate (the authors' lr_mult 2).

    The scales and shifts of batch normalisation are in the group of the biases (Jia et al. 2018: no decay on either).
    With `new_lr` other than 1, two more with the parameters of fc8, at that many times the rate. Frozen parameters,
    which need no gradient, are in none.
    """
    trust = optim.lars_trust if optim.kind == "lars" else 0.0
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    new = {name for name, _ in named if name.startswith("fc8.")} if optim.new_lr != 1 else set()
    groups = []
    for names, factor in (({name for name, _ in named} - new, 1.0), (new, optim.new_lr)):
        chosen = [p for name, p in named if name in names]
        weights, biases = [p for p in chosen if p.ndim > 1], [p for p in chosen if p.ndim == 1]
        if chosen:
            groups += [
                {"params": weights, "weight_decay": optim.weight_decay, "lr_factor": factor, "trust": trust},
                {"params": biases, "weight_decay": 0.0, "lr_factor": factor * optim.bias_lr, "trust": 0.0},
            ]
    return groups


def learning_rate(optim: Optim, step: int, global_batch: int, nsamples: int, total_steps: int) -> float:
    """Learning rate of weights in `step` (0-based) of a run of `total_steps`; an epoch is `nsamples` images."""
    epoch = step * global_batch / nsamples
    if epoch < optim.warmup_epochs:  # Goyal et al. 2017, section 2.2: linear from near 0
        return optim.lr * (epoch + global_batch / nsamples) / (optim.warmup_epochs + global_batch / nsamples)
    if optim.schedule == "step":
        # In whole numbers: a drop falls on the first step that starts in its epoch.
        drops = step * global_batch // nsamples // optim.step_epochs
        return optim.lr * optim.step_factor**drops
    warmup_steps = optim.warmup_epochs * nsamples / global_batch
    done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * done))
    if optim.schedule == "poly":
        return optim.lr * (1 - done) ** optim.poly_power
    return optim.lr
