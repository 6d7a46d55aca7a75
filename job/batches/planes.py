"""Planes of chroma and luma (shards.read.planes) to RGB, for a whole batch, on any device, in plain PyTorch.

In: the parts of images that the readers copied, and where these lie. Out: uint8 crops, bit for bit those that
libjpeg-turbo makes of the same JPEG. job.fast.planes does it in one kernel with the mean image.
"""

import torch
from torch import Tensor

from shards.read.planes import chroma_side, crop_side


def side_of(images: Tensor) -> int:
    """Pixels along a side of a batch's crops, RGB (N, S, S, 3) or planes (N, crop_bytes(S))."""
    return images.shape[1] if images.ndim == 4 else crop_side(images.shape[1])


def crops_as_rgb(images: Tensor, offsets: Tensor) -> Tensor:
    """The crops as RGB, uint8 (N, S, S, 3).

    Args:
        images: uint8, these crops themselves, or their planes (N, crop_bytes(S)).
        offsets: int32 (N, 2), top and left of each crop in its image: chroma lies differently at odd ones.
    """
    if images.ndim == 4:
        return images
    n, side = len(images), side_of(images)
    there = chroma_side(side)
    luma = images[:, : side * side].view(n, side, side).to(torch.int32)
    around = images[:, side * side :].reshape(n, 2, there, there).to(torch.int16)
    # 4 times, then 16 times the samples: at most 4088.
    sums = _enlarge(_enlarge(around, 2, 0, 0), 3, 8, 7) >> 4  # (N, 2, E, E), E = 2 (there - 2) > S
    index = torch.arange(side, device=images.device)
    rows, columns = ((offsets[:, i : i + 1] % 2 + index) for i in (0, 1))  # (N, S)
    image = torch.arange(n, device=images.device)[:, None, None]
    at = image, rows[:, :, None], columns[:, None, :]
    cb, cr = (sums[:, i][at].to(torch.int32) - 128 for i in (0, 1))  # (N, S, S)
    out = images.new_empty(n, side, side, 3)
    out[..., 0] = (luma + (91881 * cr + 32768 >> 16)).clamp_(0, 255)
    out[..., 1] = (luma + (-22554 * cb - 46802 * cr + 32768 >> 16)).clamp_(0, 255)
    out[..., 2] = (luma + (116130 * cb + 32768 >> 16)).clamp_(0, 255)
    return out


def _enlarge(x: Tensor, axis: int, even: int, odd: int) -> Tensor:
    """n + 2 samples along an axis -> 2 n: 3 times the near sample, plus the far one, plus what rounds."""
    count = x.shape[axis] - 2
    near = 3 * x.narrow(axis, 1, count)
    pairs = [near + x.narrow(axis, 0, count) + even, near + x.narrow(axis, 2, count) + odd]
    return torch.stack(pairs, axis + 1).flatten(axis, axis + 1)
