"""Triton kernels of the fast path: what lies between AlexNet's convolutions and matrix products, fused, one way each.

In and out: see network.py, which launches them. Activations lie as rows of channels (channels-last). A tensor marked
"split" may come as two, each with half of the channels: the inputs of a grouped convolution, which then needs no copy.
All arithmetic is in float32. No kernel uses atomic additions: the same input gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _load(a, b, row, column, mask, C: tl.constexpr, SPLIT: tl.constexpr):
    """Elements (row, column) of a tensor of C columns, or of two of C / 2."""
    if SPLIT:
        H: tl.constexpr = C // 2
        first = tl.load(a + row * H + column, mask=mask & (column < H), other=0)
        second = tl.load(b + row * H + (column - H), mask=mask & (column >= H), other=0)
        return tl.where(column < H, first, second)
    else:
        return tl.load(a + row * C + column, mask=mask, other=0)


@triton.jit
def _store(a, b, row, column, value, mask, C: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:
        H: tl.constexpr = C // 2
        tl.store(a + row * H + column, value, mask=mask & (column < H))
        tl.store(b + row * H + (column - H), value, mask=mask & (column >= H))
    else:
        tl.store(a + row * C + column, value, mask=mask)


@triton.jit
def _window_sum(x, R: tl.constexpr, CB: tl.constexpr):
    """Sum over the five channels around each. x: (R, CB), zero beyond the last channel."""
    channel = tl.broadcast_to(tl.arange(0, CB)[None, :], (R, CB))
    total = x
    for shift in tl.static_range(1, 3):
        above = tl.gather(x, tl.minimum(channel + shift, CB - 1), axis=1)
        below = tl.gather(x, tl.maximum(channel - shift, 0), axis=1)
        total += tl.where(channel + shift < CB, above, 0.0) + tl.where(channel >= shift, below, 0.0)
    return total


@triton.jit
def _activation(z, factor, shift, mask, AFFINE: tl.constexpr):
    """ReLU(z + shift), or ReLU(z * factor + shift), zero outside of the mask."""
    a = z * factor + shift if AFFINE else z + shift
    return tl.where(mask & ((a > 0) | (a != a)), a, 0.0)  # not a number stays not a number


@triton.jit
def pool_forward(
    z_a,  # (N, H, W, C), split where SPLIT_IN: outputs of a convolution without its bias, or normalised activations
    z_b,
    scale,  # (C,) float32; where AFFINE
    bias,  # (C,) float32; where RELU
    kept,  # (N, PH, PW, C), where AFFINE: the elements of z that were the maxima; else, where LRN: what LRN reads
    index,  # uint8 (N, PH, PW, C): place 0..8 of the maximum in its window
    out_a,  # split where SPLIT_OUT; (N, C, PH, PW) where PLANES
    out_b,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    RELU: tl.constexpr,  # bias and ReLU. Both are monotonic: behind the maximum they cost a quarter
    AFFINE: tl.constexpr,  # batch normalisation: scale and bias, which may turn the order round, before the maximum
    LRN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT_IN: tl.constexpr,
    SPLIT_OUT: tl.constexpr,
    LRN_K: tl.constexpr,
    LRN_ALPHA: tl.constexpr,
    LRN_BETA: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """3x3/2 max-pool, then bias, ReLU and LRN as asked. Program (i, n) makes R pixels of image n."""
    PH: tl.constexpr = (H - 3) // 2 + 1
    PW: tl.constexpr = (W - 3) // 2 + 1
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    channel = tl.arange(0, CB)[None, :]
    mask = (pixel < PH * PW) & (channel < C)
    y = pixel // PW
    x = pixel % PW
    IN: tl.constexpr = H * W * C // 2 if SPLIT_IN else H * W * C
    OUT: tl.constexpr = PH * PW * C // 2 if SPLIT_OUT else PH * PW * C
    z_a += image * IN
    z_b += image * IN
    best = tl.full((R, CB), float("-inf"), tl.float32)
    place = tl.zeros((R, CB), tl.int32)
    source = tl.zeros((R, CB), tl.float32)
    if RELU:
        shift = tl.load(bias + channel, mask=channel < C, other=0.0)
    if AFFINE:
        factor = tl.load(scale + channel, mask=channel < C, other=0.0)
    for tap in tl.static_range(9):
        row = (2 * y + tap // 3) * W + 2 * x + tap % 3
        z = _load(z_a, z_b, row, channel, mask, C, SPLIT_IN).to(tl.float32)
        value = z * factor + shift if AFFINE else z
        take = (value > best) | (value != value)
        best = tl.where(take, value, best)
        place = tl.where(take, tap, place)
        if AFFINE:
            source = tl.where(take, z, source)
    if AFFINE:
        at = image * (PH * PW * C) + pixel * C + channel
        tl.store(kept + at, source.to(kept.dtype.element_ty), mask=mask)
    tl.store(index + image * (PH * PW * C) + pixel * C + channel, place.to(tl.uint8), mask=mask)
    if RELU:
        if not AFFINE:
            best += shift
        best = tl.where(best < 0, 0.0, best)
    best = best.to(out_a.dtype.element_ty)
    if LRN:
        if not AFFINE:
            tl.store(kept + image * (PH * PW * C) + pixel * C + channel, best, mask=mask)
        p = tl.where(mask, best.to(tl.float32), 0.0)
        s = LRN_K + LRN_ALPHA * _window_sum(p * p, R, CB)
        best = (p * tl.exp2(-LRN_BETA * tl.log2(s))).to(out_a.dtype.element_ty)
    if PLANES:
        tl.store(out_a + image * OUT + channel * (PH * PW) + pixel, best, mask=mask)
    else:
        _store(out_a + image * OUT, out_b + image * OUT, pixel, channel, best, mask, C, SPLIT_OUT)


@triton.jit
def lrn_forward(
    z_a,  # (rows, C), split where SPLIT_IN
    z_b,
    scale,  # (C,) float32; where AFFINE
    bias,  # (C,) float32
    out,  # (rows, C)
    rows,
    C: tl.constexpr,
    AFFINE: tl.constexpr,  # batch normalisation: scale as well as bias
    SPLIT_IN: tl.constexpr,
    LRN_K: tl.constexpr,
    LRN_ALPHA: tl.constexpr,
    LRN_BETA: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Bias, ReLU, LRN."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    channel = tl.arange(0, CB)[None, :]
    mask = (row < rows) & (channel < C)
    z = _load(z_a, z_b, row, channel, mask, C, SPLIT_IN).to(tl.float32)
    factor = tl.load(scale + channel, mask=channel < C, other=0.0)
    a = _activation(z, factor, tl.load(bias + channel, mask=channel < C, other=0.0), mask, AFFINE)
    s = LRN_K + LRN_ALPHA * _window_sum(a * a, R, CB)
    tl.store(out + row * C + channel, (a * tl.exp2(-LRN_BETA * tl.log2(s))).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lrn_gradient(dn, a, R: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """Gradient of LRN's input `a` from that of its output; and through the ReLU that made `a`."""
    s = K + ALPHA * _window_sum(a * a, R, CB)
    power = tl.exp2(-BETA * tl.log2(s))
    t = _window_sum(dn * a * power / s, R, CB)
    return tl.where(a > 0, dn * power - 2 * ALPHA * BETA * a * t, 0.0)


@triton.jit
def pooled_backward(
    d_a,  # gradient of the pool's output after LRN: (N, P, C), split where SPLIT; (N, C, P) where PLANES
    d_b,
    kept,  # of pool_forward; without LRN or batch normalisation, its output
    scale,  # (C,) float32; where AFFINE
    bias,  # (C,) float32; where AFFINE
    out,  # (N, P, C): gradient at the maxima, before ReLU
    partial,  # float32 (2, N * T, C): sums of `out`, for the bias; where AFFINE also of `out` times z
    P: tl.constexpr,  # pixels of a pooled image
    C: tl.constexpr,
    LRN: tl.constexpr,
    AFFINE: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    LRN_K: tl.constexpr,
    LRN_ALPHA: tl.constexpr,
    LRN_BETA: tl.constexpr,
    T: tl.constexpr,  # programs an image
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Backward of LRN (if any) and ReLU on pooled pixels. Program (i, n) makes every T-th R pixels of image n."""
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CB)[None, :]
    IN: tl.constexpr = P * C // 2 if SPLIT else P * C
    d_a += image * IN
    d_b += image * IN
    kept += image * (P * C)
    out += image * (P * C)
    total = tl.zeros((R, CB), tl.float32)
    weighted = tl.zeros((R, CB), tl.float32)
    if AFFINE:
        factor = tl.load(scale + channel, mask=channel < C, other=0.0)
        shift = tl.load(bias + channel, mask=channel < C, other=0.0)
    for step in range(((P + R - 1) // R + T - 1) // T):
        pixel = (step * T + tl.program_id(0)) * R + tl.arange(0, R)[:, None]
        mask = (pixel < P) & (channel < C)
        place = pixel * C + channel
        if PLANES:
            d = tl.load(d_a + channel * P + pixel, mask=mask, other=0).to(tl.float32)
        else:
            d = _load(d_a, d_b, pixel, channel, mask, C, SPLIT).to(tl.float32)
        if PLANES and not AFFINE:
            a = tl.load(kept + channel * P + pixel, mask=mask, other=0).to(tl.float32)
        else:
            a = tl.load(kept + place, mask=mask, other=0).to(tl.float32)
        z = a
        if AFFINE:
            a = _activation(z, factor, shift, mask, True)
        if LRN:
            d = _lrn_gradient(d, a, R, CB, LRN_K, LRN_ALPHA, LRN_BETA)
        else:
            d = tl.where(a > 0, d, 0.0)
        total += d
        if AFFINE:
            weighted += d * z
        tl.store(out + place, d.to(out.dtype.element_ty), mask=mask)
    column = tl.arange(0, CB)
    partial += (image * T + tl.program_id(0)) * C
    tl.store(partial + column, tl.sum(total, 0), mask=column < C)
    if AFFINE:
        rows = tl.num_programs(1).to(tl.int64) * T
        tl.store(partial + rows * C + column, tl.sum(weighted, 0), mask=column < C)


@triton.jit
def _window(
    d_a, d_b, index, y, x, channel, mask, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr
):
    """Gradient of one window a row, and the place of its maximum (255 where there is no such window)."""
    there = mask & (y >= 0) & (y < PH) & (x >= 0) & (x < PW)
    at = y * PW + x
    place = tl.load(index + at * C + channel, mask=there, other=255).to(tl.int32)
    return _load(d_a, d_b, at, channel, there, C, SPLIT).to(tl.float32), place


@triton.jit
def _unpool(
    d_a, d_b, index, y, x, channel, mask, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr
):
    """Gradients of the four input pixels (2y, 2x), (2y, 2x + 1), (2y + 1, 2x), (2y + 1, 2x + 1) of a 3x3/2 max-pool."""
    d, place = _window(d_a, d_b, index, y, x, channel, mask, PH, PW, C, SPLIT)
    up, up_place = _window(d_a, d_b, index, y - 1, x, channel, mask, PH, PW, C, SPLIT)
    left, left_place = _window(d_a, d_b, index, y, x - 1, channel, mask, PH, PW, C, SPLIT)
    far, far_place = _window(d_a, d_b, index, y - 1, x - 1, channel, mask, PH, PW, C, SPLIT)
    d00 = tl.where(place == 0, d, 0.0) + tl.where(up_place == 6, up, 0.0)
    d00 += tl.where(left_place == 2, left, 0.0) + tl.where(far_place == 8, far, 0.0)
    d01 = tl.where(place == 1, d, 0.0) + tl.where(up_place == 7, up, 0.0)
    d10 = tl.where(place == 3, d, 0.0) + tl.where(left_place == 5, left, 0.0)
    return d00, d01, d10, tl.where(place == 4, d, 0.0)


@triton.jit
def unpool(
    d,  # (N, PH, PW, C): gradient at the maxima
    index,  # uint8 (N, PH, PW, C)
    z_a,  # (N, H, W, C): what was normalised, split where SPLIT; where AFFINE
    z_b,
    slopes,  # float32 (3, C), where AFFINE: of batch_norm_backward
    out_a,  # (N, H, W, C), split where SPLIT
    out_b,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    AFFINE: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Backward of a max-pool, reading: each square of four input pixels asks its windows. Program (i, n): R squares.

    Where AFFINE, through the batch normalisation before it, too.
    """
    PH: tl.constexpr = (H - 3) // 2 + 1
    PW: tl.constexpr = (W - 3) // 2 + 1
    OUT: tl.constexpr = H * W * C // 2 if SPLIT else H * W * C
    image = tl.program_id(1).to(tl.int64)
    square = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    channel = tl.arange(0, CB)[None, :]
    y = square // ((W + 1) // 2)
    x = square % ((W + 1) // 2)
    mask = (y < (H + 1) // 2) & (channel < C)
    d += image * (PH * PW * C)
    index += image * (PH * PW * C)
    out_a += image * OUT
    out_b += image * OUT
    four = _unpool(d, d, index, y, x, channel, mask, PH, PW, C, False)
    if AFFINE:
        of_d = tl.load(slopes + channel, mask=channel < C, other=0.0)
        constant = tl.load(slopes + C + channel, mask=channel < C, other=0.0)
        of_z = tl.load(slopes + 2 * C + channel, mask=channel < C, other=0.0)
        z_a += image * OUT
        z_b += image * OUT
    for i in tl.static_range(4):
        inside = mask & (2 * y + i // 2 < H) & (2 * x + i % 2 < W)
        at = (2 * y + i // 2) * W + 2 * x + i % 2
        value = four[i]
        if AFFINE:
            value = of_d * value + constant + of_z * _load(z_a, z_b, at, channel, inside, C, SPLIT).to(tl.float32)
        _store(out_a, out_b, at, channel, value.to(out_a.dtype.element_ty), inside, C, SPLIT)


@triton.jit
def unpool_lrn(
    d_a,  # (N, PH, PW, C): gradient of the pool's output, split where SPLIT_D
    d_b,
    index,  # uint8 (N, PH, PW, C)
    z_a,  # (N, H, W, C): what came out of the convolution, split where SPLIT
    z_b,
    scale,  # (C,) float32; where AFFINE
    bias,  # (C,) float32
    out_a,  # (N, H, W, C), split where SPLIT: gradient before ReLU
    out_b,
    partial,  # float32 (2, N * T, C): sums of `out`, for the bias; where AFFINE also of `out` times z
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    AFFINE: tl.constexpr,  # batch normalisation: scale as well as bias
    SPLIT_D: tl.constexpr,
    SPLIT: tl.constexpr,
    LRN_K: tl.constexpr,
    LRN_ALPHA: tl.constexpr,
    LRN_BETA: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """Backward of bias, ReLU, LRN, max-pool in this order. Program (i, n): every T-th R squares of four pixels."""
    PH: tl.constexpr = (H - 3) // 2 + 1
    PW: tl.constexpr = (W - 3) // 2 + 1
    IN: tl.constexpr = PH * PW * C // 2 if SPLIT_D else PH * PW * C
    OUT: tl.constexpr = H * W * C // 2 if SPLIT else H * W * C
    SQUARES: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CB)[None, :]
    d_a += image * IN
    d_b += image * IN
    index += image * (PH * PW * C)
    z_a += image * OUT
    z_b += image * OUT
    out_a += image * OUT
    out_b += image * OUT
    total = tl.zeros((R, CB), tl.float32)
    weighted = tl.zeros((R, CB), tl.float32)
    factor = tl.load(scale + channel, mask=channel < C, other=0.0)
    shift = tl.load(bias + channel, mask=channel < C, other=0.0)
    for step in range(((SQUARES + R - 1) // R + T - 1) // T):
        square = (step * T + tl.program_id(0)) * R + tl.arange(0, R)[:, None]
        y = square // ((W + 1) // 2)
        x = square % ((W + 1) // 2)
        mask = (square < SQUARES) & (channel < C)
        four = _unpool(d_a, d_b, index, y, x, channel, mask, PH, PW, C, SPLIT_D)
        for i in tl.static_range(4):
            inside = mask & (2 * y + i // 2 < H) & (2 * x + i % 2 < W)
            at = (2 * y + i // 2) * W + 2 * x + i % 2
            z = _load(z_a, z_b, at, channel, inside, C, SPLIT).to(tl.float32)
            a = _activation(z, factor, shift, inside, AFFINE)
            dz = _lrn_gradient(four[i], a, R, CB, LRN_K, LRN_ALPHA, LRN_BETA)
            total += dz
            if AFFINE:
                weighted += dz * z
            _store(out_a, out_b, at, channel, dz.to(out_a.dtype.element_ty), inside, C, SPLIT)
    column = tl.arange(0, CB)
    partial += (image * T + tl.program_id(0)) * C
    tl.store(partial + column, tl.sum(total, 0), mask=column < C)
    if AFFINE:
        rows = tl.num_programs(1).to(tl.int64) * T
        tl.store(partial + rows * C + column, tl.sum(weighted, 0), mask=column < C)


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
    """Bias, ReLU and dropout. The mask follows from seed and place; the backward pass reads it off the output."""
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
    _store(out_a, out_b, row, channel, a.to(out_a.dtype.element_ty), mask, C, SPLIT)


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
    STEPS: tl.constexpr,  # blocks of R rows a program
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
        d = _load(d_a, d_b, row, channel, mask, C, SPLIT).to(tl.float32)
        y = _load(y_a, y_b, row, channel, mask, C, SPLIT).to(tl.float32)
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
    STEPS: tl.constexpr,  # blocks of R rows a program
    R: tl.constexpr,
    CB: tl.constexpr,
):
    """What batch normalisation must know of a batch."""
    channel = tl.program_id(1) * CB + tl.arange(0, CB)[None, :]
    total = tl.zeros((R, CB), tl.float32)
    squares = tl.zeros((R, CB), tl.float32)
    first = tl.program_id(0).to(tl.int64) * (R * STEPS)
    for step in range(STEPS):
        row = first + step * R + tl.arange(0, R)[:, None]
        z = _load(z_a, z_b, row, channel, (row < rows) & (channel < C), C, SPLIT).to(tl.float32)
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
    running_mean,  # (C,) float32, renewed
    running_variance,
    factors,  # float32 (4, C): scale and bias with which z is normalised, mean, one over the standard deviation
    count,  # numbers in a sum
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
    if first + BLOCK <= count:  # without a mask, 16 bytes a thread are read at once
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
