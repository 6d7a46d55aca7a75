"""Batch normalisation in training, on the fast path's layouts."""

import torch
from torch import Tensor

from job.fast.operations import power_of_two, reduction, tile


class BatchNorm:
    """Batch normalisation, in training, of a convolution's output or of a part of its channels.

    Attributes:
        slopes: float32 (3, C), after `backward`: the input's gradient is slopes[0] d + slopes[1] + slopes[2] z.
    """

    def __init__(self, norm: torch.nn.BatchNorm2d, part: slice):
        self._norm, self._first = norm, not part.start
        self._weight, self._bias = norm.weight.detach()[part], norm.bias.detach()[part]
        self._weight_gradient, self._bias_gradient = norm.weight.grad[part], norm.bias.grad[part]
        self._running = norm.running_mean[part], norm.running_var[part]
        channels, device = len(self._weight), self._weight.device
        self._factors = torch.zeros(4, channels, device=device)
        self.slopes = torch.zeros(3, channels, device=device)
        self._count = 0

    def measure(self, zs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Statistics of a batch, (N, C, H, W) in one or two tensors. Returns scale and bias that normalise it, (C,)."""
        from job.fast.kernels import batch_norm_forward, column_sums

        n, _, height, width = zs[0].shape
        channels = len(self._weight)
        self._count = n * height * width
        rows, block = tile(channels)
        steps, programs = reduction(self._count, rows)
        partial = torch.empty(2, programs, channels, device=self._weight.device)
        column_sums[(programs, 1)](
            zs[0], zs[-1], partial, self._count, C=channels, SPLIT=len(zs) == 2, STEPS=steps, R=rows, CB=block
        )
        batch_norm_forward[(1,)](
            partial.sum(1, dtype=torch.float64), self._weight, self._bias, *self._running, self._factors, self._count,
            EPS=self._norm.eps, MOMENTUM=self._norm.momentum, C=channels, CB=block,
        )  # fmt: skip
        if self._first:
            self._norm.num_batches_tracked += 1
        return self._factors[0], self._factors[1]

    def backward(self, partial: Tensor) -> None:
        """Gradients of weight and bias, and `slopes`, from partial sums of d and of d times z, (2, programs, C)."""
        from job.fast.kernels import batch_norm_backward

        channels = len(self._weight)
        batch_norm_backward[(1,)](
            partial.sum(1, dtype=torch.float64), self._factors, self._weight_gradient, self._bias_gradient,
            self.slopes, self._count, C=channels, CB=power_of_two(channels),
        )  # fmt: skip


def apply_slopes(d: Tensor, z: Tensor, slopes: Tensor) -> None:
    """Turn the gradient `d` of a batch normalisation's output, (..., C), into that of its input `z`, in place."""
    from job.fast.kernels import scale_gradient

    channels = d.shape[-1]
    total = d.numel() // channels
    rows, block = tile(channels, most=512)
    scale_gradient[(-(-total // rows), -(-channels // block))](d, z, slopes, total, C=channels, R=rows, CB=block)
