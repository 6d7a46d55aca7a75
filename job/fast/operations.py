"""Convolutions and matrix products as the fast path calls them, and the sizes of what Triton programs work on."""

import torch
from torch import Tensor

TILE = 2048  # elements that a Triton program holds at once
SQUARE_TILE = 1024  # the same if a row is a square of four pixels
REDUCE_ROWS = 256  # rows per program of relu_backward


def reduction(total: int, rows: int) -> tuple[int, int]:
    """Blocks of `rows` rows per program, and number of programs, for sums over `total` rows."""
    steps = max(1, REDUCE_ROWS // rows)
    return steps, -(-total // (rows * steps))


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def tile(channels: int, most: int = 1 << 20, elements: int = TILE) -> tuple[int, int]:
    """Rows and columns of the tile of one program, for rows of `channels` elements; at most `most` columns."""
    block = min(power_of_two(channels), most)
    return max(1, elements // block), block


def pooled_size(size: int) -> int:
    return (size - 3) // 2 + 1


def blocks_of(image_size: int) -> int:
    """Number of 4 x 4 blocks along each side of conv1's input: 57 for an image of 227 pixels."""
    return (image_size - 11) // 4 + 3


def as_rows(x: Tensor) -> Tensor:
    """(N, C, H, W) with channels last in memory, as the contiguous (N, H, W, C)."""
    return channels_last(x).permute(0, 2, 3, 1)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def convolution(x: Tensor, filters: Tensor, padding: int) -> Tensor:
    """Convolution without bias, stride 1."""
    one = [1, 1]
    z = torch.ops.aten.convolution(x, filters, None, one, [padding] * 2, one, False, [0, 0], 1)
    return channels_last(z)


def convolution_relu(x: Tensor, filters: Tensor, bias: Tensor, padding: int) -> Tensor:
    """ReLU(convolution + bias) in one kernel of cuDNN."""
    if not x.is_cuda:
        return channels_last(torch.relu(torch.conv2d(x, filters, bias, padding=padding)))
    one = [1, 1]
    return channels_last(torch.cudnn_convolution_relu(x, filters, bias, one, [padding] * 2, one, 1))


def convolution_backward(d: Tensor, x: Tensor, filters: Tensor, padding: int, needs_input: bool = True) -> tuple:
    one = [1, 1]
    wanted = [needs_input, True, False]
    return torch.ops.aten.convolution_backward(d, x, filters, None, one, [padding] * 2, one, False, [0, 0], 1, wanted)


def convolutions_backward(
    ds: list[Tensor], xs: list[Tensor], filters: Tensor, padding: int, gradient: Tensor
) -> list[Tensor]:
    """Gradients of each group's input; those of the filters go into `gradient`."""
    inputs = []
    parts = zip(ds, xs, filters.chunk(len(ds)), gradient.chunk(len(ds)), strict=True)
    for d, x, part, part_gradient in parts:
        d_input, d_filters, _ = convolution_backward(d, x, part, padding)
        part_gradient.copy_(d_filters)
        inputs.append(d_input)
    return inputs


def weight_gradient(d: Tensor, x: Tensor, out: Tensor) -> None:
    """d^T x into `out`, float32, with sums in float32 where the GPU does that."""
    if d.dtype == torch.float32:
        torch.mm(d.t(), x, out=out)
    elif d.is_cuda:
        torch.ops.aten.mm.dtype_out(d.t(), x, torch.float32, out=out)
    else:
        out.copy_(torch.mm(d.t(), x))
