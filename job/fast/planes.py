"""The first kernel of a step where the images come as planes (shards.read.planes): chroma enlarged, colours, mean,
mirror, cast, and the blocks of pixels that conv1 reads, in one pass.

In and out: see network.py, which launches it. Its plain twin: job.batches.planes.crops_as_rgb, then prepare_blocks.
"""

import triton
import triton.language as tl


@triton.jit
def _chroma(plane, row, further_row, column, further_column, round, mask, SIDE: tl.constexpr):
    """Samples of chroma for pixels, less 128: the near sample counts 3 times the further one, in both directions."""
    near = 3 * tl.load(plane + row * SIDE + column, mask=mask, other=0).to(tl.int32)
    near += tl.load(plane + further_row * SIDE + column, mask=mask, other=0).to(tl.int32)
    further = 3 * tl.load(plane + row * SIDE + further_column, mask=mask, other=0).to(tl.int32)
    further += tl.load(plane + further_row * SIDE + further_column, mask=mask, other=0).to(tl.int32)
    return ((3 * near + further + round) >> 4) - 128


@triton.jit
def _store(value, mean, place, out, pixel, there, inside, colour: tl.constexpr, MEAN: tl.constexpr):
    """Clamp, subtract the mean and write one colour of the pixels; zero beyond the crop."""
    result = tl.minimum(tl.maximum(value, 0), 255).to(tl.float32)
    if MEAN == 1:
        result -= tl.load(mean + colour)
    if MEAN == 2:
        result -= tl.load(mean + place + colour, mask=pixel & there, other=float("nan"))
    tl.store(out + colour, tl.where(pixel, result, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def prepare_planes(
    images,  # uint8 (N, CROP^2 + 2 (CROP // 2 + 3)^2)
    offsets,  # int32 (N, 2)
    mirror,  # uint8 (N,)
    mean,  # float32 (mean_height, mean_width, 3), or (3,)
    out,  # (N, BLOCKS, BLOCKS, 48)
    mean_height,
    mean_width,
    CROP: tl.constexpr,
    BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,  # 0: none, 1: one colour, 2: an image
    SIZE: tl.constexpr,  # at least BLOCKS * 4, the pixels of a row
):
    """`prepare_blocks` (kernels.py) from planes; a program makes four rows of pixels of an image, too."""
    SIDE: tl.constexpr = CROP // 2 + 3
    image = tl.program_id(1).to(tl.int64)
    images += image * (CROP * CROP + 2 * SIDE * SIDE)
    inner = tl.arange(0, 4)[:, None]  # row of pixels in the row of blocks
    x = tl.arange(0, SIZE)[None, :]
    y = tl.program_id(0) * 4 + inner
    pixel = (y < CROP) & (x < CROP)
    source = tl.where(tl.load(mirror + image) != 0, CROP - 1 - x, x)
    top = tl.load(offsets + image * 2)
    left = tl.load(offsets + image * 2 + 1)
    # Chroma begins one sample before that of the crop's corner. At an odd pixel the further sample is the next one.
    odd_y = (top + y) % 2
    odd_x = (left + source) % 2
    row = (top % 2 + y) // 2 + 1
    column = (left % 2 + source) // 2 + 1
    further_row = row + 2 * odd_y - 1
    further_column = column + 2 * odd_x - 1
    luma = tl.load(images + y * CROP + source, mask=pixel, other=0).to(tl.int32)
    plane = images + CROP * CROP
    cb = _chroma(plane, row, further_row, column, further_column, 8 - odd_x, pixel, SIDE)
    cr = _chroma(plane + SIDE * SIDE, row, further_row, column, further_column, 8 - odd_x, pixel, SIDE)
    there = (top + y >= 0) & (top + y < mean_height) & (left + source >= 0) & (left + source < mean_width)
    place = ((top + y) * mean_width + left + source) * 3
    out += image * (BLOCKS * BLOCKS * 48) + tl.program_id(0) * (BLOCKS * 48) + x // 4 * 48 + inner * 12 + x % 4 * 3
    inside = (x < BLOCKS * 4) & (inner < 4)
    red = luma + ((91881 * cr + 32768) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = luma + ((116130 * cb + 32768) >> 16)
    _store(red, mean, place, out, pixel, there, inside, 0, MEAN)
    _store(green, mean, place, out, pixel, there, inside, 1, MEAN)
    _store(blue, mean, place, out, pixel, there, inside, 2, MEAN)
