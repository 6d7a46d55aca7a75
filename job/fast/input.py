"""The device pass over a batch as one Triton kernel: mirror, mean, cast and layout in one pass.

In and out: see job.batches.device.prepare_triton, which launches it. A module of its own: it needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def prepare_kernel(
    images,  # uint8 (N, CROP, CROP, 3)
    offsets,  # int32 (N, 2)
    mirror,  # uint8 (N,)
    mean,  # float32 (mean_height, mean_width, 3), or (3,)
    out,  # (N, 3, CROP, CROP), contiguous or channels-last
    mean_height,
    mean_width,
    CROP: tl.constexpr,
    MEAN: tl.constexpr,  # 0: none, 1: one colour, 2: an image
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, j) makes values j * BLOCK .. of image i, in the order (y, x, channel) of the uint8 image.

    A crop that reaches beyond the mean image, which is that of other images then, is not a number there.
    """
    image = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = value < CROP * CROP * 3
    channel = value % 3
    x = value // 3 % CROP
    y = value // (3 * CROP)
    source_x = tl.where(tl.load(mirror + image) != 0, CROP - 1 - x, x)
    first = image * (CROP * CROP * 3)
    result = tl.load(images + first + (y * CROP + source_x) * 3 + channel, mask=inside, other=0).to(tl.float32)
    if MEAN == 1:
        result -= tl.load(mean + channel, mask=inside, other=0.0)
    if MEAN == 2:
        top = tl.load(offsets + image * 2) + y
        left = tl.load(offsets + image * 2 + 1) + source_x
        there = (top >= 0) & (top < mean_height) & (left >= 0) & (left < mean_width)
        result -= tl.load(mean + (top * mean_width + left) * 3 + channel, mask=inside & there, other=float("nan"))
    target = value if CHANNELS_LAST else channel * (CROP * CROP) + y * CROP + x
    tl.store(out + first + target, result.to(out.dtype.element_ty), mask=inside)
