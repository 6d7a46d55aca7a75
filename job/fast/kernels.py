"""Triton kernels between AlexNet's convolutions and matrix products, but for pooling: bias, ReLU, dropout, batch
normalisation, loss, update, and the blocks of pixels that conv1 reads.

In and out: see network.py, which launches them; layouts, "split" and arithmetic: see pooling.py.
"""

import triton
import triton.language as tl

from job.fast.rows import rows_load, rows_store


@triton.jit
def bias_relu(
    z,  # (rows, C)
    scale,  # (C,) float32; where AFFINE
    bias,  # (C,) float32
    out_a,  # (rows, C), split where SPLIT; may be z
    out_b,
    seed,  # int64 (1,), where DROP
    rows,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    DROP: tl.constexpr,  # probability of zeroing an output
    AFFINE: tl.constexpr,  # batch normalisation: scale as well as bias
    LAYER: tl.constexpr,  # added to the seed
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Bias, ReLU and dropout. The mask depends on seed and position; the backward pass reads it off the output."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    channel = tl.program_id(1) * CB + tl.arange(0, CB)[None, :]
    mask = (row < rows) & (channel < C)
    a = tl.load(z + row * C + channel, mask=mask, other=0).to(tl.float32)
    if AFFINE:
        a *= tl.load(scale + channel, mask=channel < C, other=0.0)
    a += tl.load(bias + channel, mask=channel < C, other=0.0)
    a = tl.where(a < 0, 0.0, a)
    if DROP > 0:
        place = (row * C + channel).to(tl.int32)  # below 2^31: 524,288 rows of 4,096
        a = tl.where(tl.rand(tl.load(seed) + LAYER, place) >= DROP, a / (1.0 - DROP), 0.0)
    rows_store(out_a, out_b, row, channel, a.to(out_a.dtype.element_ty), mask, C, SPLIT)


@triton.jit
def relu_backward(
    d_a,  # (rows, C), split where SPLIT: gradient of the output
    d_b,
    y_a,  # the output, likewise
    y_b,
    z,  # (rows, C): what was normalised; where AFFINE
    out,  # (rows, C); may be d_a
    partial,  # float32 (2, programs of axis 0, C): sums of `out`, for the bias; where AFFINE also of `out` times z
    rows,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    AFFINE: tl.constexpr,
    SCALE: tl.constexpr,  # 1 / (1 - dropout)
    STEPS: tl.constexpr,  # blocks of R rows per program
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Backward of ReLU and dropout, and partial sums for the bias."""
    channel = tl.program_id(1) * CB + tl.arange(0, CB)[None, :]
    total = tl.zeros((R, CB), tl.float32)
    weighted = tl.zeros((R, CB), tl.float32)
    first = tl.program_id(0).to(tl.int64) * (R * STEPS)
    for step in range(STEPS):
        row = first + step * R + tl.arange(0, R)[:, None]
        mask = (row < rows) & (channel < C)
        d = rows_load(d_a, d_b, row, channel, mask, C, SPLIT).to(tl.float32)
        y = rows_load(y_a, y_b, row, channel, mask, C, SPLIT).to(tl.float32)
        d = tl.where(y > 0, d * SCALE, 0.0)
        total += d
        if AFFINE:
            weighted += d * tl.load(z + row * C + channel, mask=mask, other=0).to(tl.float32)
        tl.store(out + row * C + channel, d.to(out.dtype.element_ty), mask=mask)
    column = tl.program_id(1) * CB + tl.arange(0, CB)
    partial += tl.program_id(0).to(tl.int64) * C
    tl.store(partial + column, tl.sum(total, 0), mask=column < C)
    if AFFINE:
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C + column, tl.sum(weighted, 0), mask=column < C)


@triton.jit
def column_sums(
    z_a,  # (rows, C), split where SPLIT
    z_b,
    partial,  # float32 (2, programs of axis 0, C): sums of z and of its squares
    rows,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,  # blocks of R rows per program
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums over a batch from which batch normalisation computes mean and variance."""
    channel = tl.program_id(1) * CB + tl.arange(0, CB)[None, :]
    total = tl.zeros((R, CB), tl.float32)
    squares = tl.zeros((R, CB), tl.float32)
    first = tl.program_id(0).to(tl.int64) * (R * STEPS)
    for step in range(STEPS):
        row = first + step * R + tl.arange(0, R)[:, None]
        z = rows_load(z_a, z_b, row, channel, (row < rows) & (channel < C), C, SPLIT).to(tl.float32)
        total += z
        squares += z * z
    column = tl.program_id(1) * CB + tl.arange(0, CB)
    partial += tl.program_id(0).to(tl.int64) * C
    tl.store(partial + column, tl.sum(total, 0), mask=column < C)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * C + column, tl.sum(squares, 0), mask=column < C)


@triton.jit
def batch_norm_forward(
    sums,  # float64 (2, C): sums of z and of its squares
    weight,  # (C,) float32
    bias,
    running_mean,  # (C,) float32, updated in place
    running_variance,
    factors,  # float32 (4, C): scale and bias with which z is normalised, mean, one over the standard deviation
    count,  # numbers in each sum
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    C: tl.constexpr,
    CB: tl.constexpr,
):
    channel = tl.arange(0, CB)
    mask = channel < C
    mean = tl.load(sums + channel, mask=mask, other=0.0) / count
    variance = tl.maximum(tl.load(sums + C + channel, mask=mask, other=1.0) / count - mean * mean, 0.0)
    unbiased = (variance * count / tl.maximum(count - 1, 1)).to(tl.float32)
    mean = mean.to(tl.float32)
    inverse = 1.0 / tl.sqrt(variance.to(tl.float32) + EPS)
    scale = tl.load(weight + channel, mask=mask, other=0.0) * inverse
    tl.store(factors + channel, scale, mask=mask)
    tl.store(factors + C + channel, tl.load(bias + channel, mask=mask, other=0.0) - mean * scale, mask=mask)
    tl.store(factors + 2 * C + channel, mean, mask=mask)
    tl.store(factors + 3 * C + channel, inverse, mask=mask)
    old = tl.load(running_mean + channel, mask=mask, other=0.0)
    tl.store(running_mean + channel, old + MOMENTUM * (mean - old), mask=mask)
    old = tl.load(running_variance + channel, mask=mask, other=0.0)
    tl.store(running_variance + channel, old + MOMENTUM * (unbiased - old), mask=mask)


@triton.jit
def batch_norm_backward(
    sums,  # float64 (2, C): sums of the gradient d of the output, and of d times z
    factors,  # of batch_norm_forward
    weight_gradient,  # (C,) float32
    bias_gradient,
    slopes,  # float32 (3, C): the gradient of z is slopes[0] d + slopes[1] + slopes[2] z
    count,
    C: tl.constexpr,
    CB: tl.constexpr,
):
    channel = tl.arange(0, CB)
    mask = channel < C
    scale = tl.load(factors + channel, mask=mask, other=0.0)
    mean = tl.load(factors + 2 * C + channel, mask=mask, other=0.0)
    inverse = tl.load(factors + 3 * C + channel, mask=mask, other=0.0)
    total = tl.load(sums + channel, mask=mask, other=0.0)
    of_weight = ((tl.load(sums + C + channel, mask=mask, other=0.0) - mean * total) * inverse).to(tl.float32)
    of_bias = total.to(tl.float32)
    tl.store(weight_gradient + channel, of_weight, mask=mask)
    tl.store(bias_gradient + channel, of_bias, mask=mask)
    of_z = -scale * inverse * of_weight / count
    tl.store(slopes + channel, scale, mask=mask)
    tl.store(slopes + C + channel, -scale * of_bias / count - of_z * mean, mask=mask)
    tl.store(slopes + 2 * C + channel, of_z, mask=mask)


@triton.jit
def scale_gradient(
    d,  # (rows, C): gradient of the output of a batch normalisation, becomes that of its input
    z,  # (rows, C): the input
    slopes,  # float32 (3, C), of batch_norm_backward
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    channel = tl.program_id(1) * CB + tl.arange(0, CB)[None, :]
    mask = (row < rows) & (channel < C)
    value = tl.load(slopes + channel, mask=channel < C, other=0.0) * tl.load(d + row * C + channel, mask=mask, other=0)
    value += tl.load(slopes + C + channel, mask=channel < C, other=0.0)
    value += tl.load(slopes + 2 * C + channel, mask=channel < C, other=0.0) * tl.load(
        z + row * C + channel, mask=mask, other=0
    )
    tl.store(d + row * C + channel, value.to(d.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy(
    logits,  # (N, C), without the bias
    bias,  # (C,) float32
    labels,  # int64 (N,)
    losses,  # float32 (N,)
    right,  # float32 (N,): 1 where the label has the largest score, of equal ones the first, as torch.argmax has it
    gradient,  # (N, C): of the mean loss; may be logits
    N,
    C: tl.constexpr,
    CB: tl.constexpr,
):
    """Softmax cross entropy of one image and its gradient."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CB)
    mask = column < C
    x = tl.load(logits + image * C + column, mask=mask, other=0).to(tl.float32)
    x += tl.load(bias + column, mask=mask, other=0.0)
    x = tl.where(mask, x, float("-inf"))
    label = tl.load(labels + image)
    x -= tl.max(x, 0)
    power = tl.exp(x)
    total = tl.sum(power, 0)
    hit = column == label
    tl.store(right + image, tl.where(tl.min(tl.where(x == 0, column, C), 0) == label, 1.0, 0.0))
    tl.store(losses + image, tl.log(total) - tl.sum(tl.where(hit, x, 0.0), 0))
    d = (power / total - tl.where(hit, 1.0, 0.0)) / N
    tl.store(gradient + image * C + column, d.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def momentum_sgd(
    table,  # int64 (blocks, 7): addresses of weight, velocity, gradient, copy; first element, elements, tensor
    scales,  # float32 (blocks, 2): factor of the rate, weight decay
    rates,  # float32 (tensors,)
    MOMENTUM: tl.constexpr,
    COPY: tl.constexpr,  # type of the copies
    BLOCK: tl.constexpr,
):
    """v <- momentum v - rate (g + decay w); w <- w + v; and a copy of w in the type that the network computes in."""
    entry = table + tl.program_id(0) * 7
    weight = tl.load(entry).to(tl.pointer_type(tl.float32))
    velocity = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    gradient = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    copy = tl.load(entry + 3)
    has_copy = copy != 0
    first = tl.load(entry + 4)
    count = tl.load(entry + 5)
    step = tl.load(rates + tl.load(entry + 6)) * tl.load(scales + tl.program_id(0) * 2)
    decay = tl.load(scales + tl.program_id(0) * 2 + 1)
    # Tensors of torch begin at multiples of 16 bytes, and so do blocks within them.
    place = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
    weight = tl.multiple_of(weight, 16) + place
    velocity = tl.multiple_of(velocity, 16) + place
    gradient = tl.multiple_of(gradient, 16) + place
    copy = tl.multiple_of(copy.to(tl.pointer_type(COPY)), 16) + place
    if first + BLOCK <= count:  # without a mask, each thread reads 16 bytes at once
        w = tl.load(weight)
        v = MOMENTUM * tl.load(velocity) - step * (tl.load(gradient) + decay * w)
        w += v
        tl.store(velocity, v)
        tl.store(weight, w)
        if has_copy:
            tl.store(copy, w.to(COPY))
    else:
        mask = place < count
        w = tl.load(weight, mask=mask)
        v = MOMENTUM * tl.load(velocity, mask=mask) - step * (tl.load(gradient, mask=mask) + decay * w)
        w += v
        tl.store(velocity, v, mask=mask)
        tl.store(weight, w, mask=mask)
        if has_copy:
            tl.store(copy, w.to(COPY), mask=mask)


@triton.jit
def prepare_blocks(
    images,  # uint8 (N, CROP, CROP, 3)
    offsets,  # int32 (N, 2)
    mirror,  # uint8 (N,)
    mean,  # float32 (mean_height, mean_width, 3), or (3,)
    out,  # (N, BLOCKS, BLOCKS, 48)
    mean_height,
    mean_width,
    CROP: tl.constexpr,
    BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,  # 0: none, 1: one colour, 2: an image
    SIZE: tl.constexpr,  # at least BLOCKS * 12, the values of a row of pixels
):
    """Mean, mirror, cast, and blocks of 4 x 4 pixels as 48 channels in the order (y, x, colour); zero beyond the crop.

    A crop that reaches beyond the mean image, which is that of other images then, is not a number there.

    Program (i, n) makes the i-th row of blocks of image n: four rows of pixels.
    """
    image = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, 4)[:, None]  # row of pixels in the row of blocks
    value = tl.arange(0, SIZE)[None, :]  # value in the row of pixels
    y = tl.program_id(0) * 4 + inner
    x = value // 3
    colour = value % 3
    pixel = (y < CROP) & (x < CROP)
    source = tl.where(tl.load(mirror + image) != 0, (CROP - 1 - x) * 3 + colour, value)
    result = tl.load(images + image * (CROP * CROP * 3) + y * (CROP * 3) + source, mask=pixel, other=0)
    result = result.to(tl.float32)
    if MEAN == 1:
        result -= tl.load(mean + colour, mask=x < CROP, other=0.0)
    if MEAN == 2:
        top = tl.load(offsets + image * 2)
        left = tl.load(offsets + image * 2 + 1)
        top_y, left_x = top + y, left + source // 3
        there = (top_y >= 0) & (top_y < mean_height) & (left_x >= 0) & (left_x < mean_width)
        place = (top_y * mean_width + left) * 3 + source
        result -= tl.load(mean + place, mask=pixel & there, other=float("nan"))
    result = tl.where(pixel, result, 0.0)
    out += image * (BLOCKS * BLOCKS * 48) + tl.program_id(0) * (BLOCKS * 48)
    place = value // 12 * 48 + inner * 12 + value % 12
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(value < BLOCKS * 12) & (inner < 4))
