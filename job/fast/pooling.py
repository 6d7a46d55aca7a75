"""Triton kernels of max-pooling and local response normalisation, forward and backward, fused with bias and ReLU.

In and out: see network.py, which launches them. Activations lie as rows of channels (channels-last). A tensor marked
"split" may come as two, each with half of the channels: the inputs of a grouped convolution, which then needs no copy.
All arithmetic is in float32. No kernel uses atomic additions: the same input gives the same bits.
"""

import triton
import triton.language as tl

from job.fast.rows import activation, rows_load, rows_store


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
    RELU: tl.constexpr,  # bias and ReLU. Both are monotonic, so they come after the maximum: a quarter of the work
    AFFINE: tl.constexpr,  # batch normalisation: scale and bias, which may reverse the order, so before the maximum
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
        z = rows_load(z_a, z_b, row, channel, mask, C, SPLIT_IN).to(tl.float32)
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
        rows_store(out_a + image * OUT, out_b + image * OUT, pixel, channel, best, mask, C, SPLIT_OUT)


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
    z = rows_load(z_a, z_b, row, channel, mask, C, SPLIT_IN).to(tl.float32)
    factor = tl.load(scale + channel, mask=channel < C, other=0.0)
    a = activation(z, factor, tl.load(bias + channel, mask=channel < C, other=0.0), mask, AFFINE)
    s = LRN_K + LRN_ALPHA * _window_sum(a * a, R, CB)
    tl.store(out + row * C + channel, (a * tl.exp2(-LRN_BETA * tl.log2(s))).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lrn_gradient(dn, a, R: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """Gradient of LRN's input `a` from that of its output `dn`, and through the ReLU that made `a`."""
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
    T: tl.constexpr,  # programs per image
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
            d = rows_load(d_a, d_b, pixel, channel, mask, C, SPLIT).to(tl.float32)
        if PLANES and not AFFINE:
            a = tl.load(kept + channel * P + pixel, mask=mask, other=0).to(tl.float32)
        else:
            a = tl.load(kept + place, mask=mask, other=0).to(tl.float32)
        z = a
        if AFFINE:
            a = activation(z, factor, shift, mask, True)
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
    """Gradient of one window per row, and the place of its maximum (255 if there is no such window)."""
    there = mask & (y >= 0) & (y < PH) & (x >= 0) & (x < PW)
    at = y * PW + x
    place = tl.load(index + at * C + channel, mask=there, other=255).to(tl.int32)
    return rows_load(d_a, d_b, at, channel, there, C, SPLIT).to(tl.float32), place


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
    """Backward of a max-pool without atomic additions: each square of four input pixels reads its windows.

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
            value = of_d * value + constant + of_z * rows_load(z_a, z_b, at, channel, inside, C, SPLIT).to(tl.float32)
        rows_store(out_a, out_b, at, channel, value.to(out_a.dtype.element_ty), inside, C, SPLIT)


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
            z = rows_load(z_a, z_b, at, channel, inside, C, SPLIT).to(tl.float32)
            a = activation(z, factor, shift, inside, AFFINE)
            dz = _lrn_gradient(four[i], a, R, CB, LRN_K, LRN_ALPHA, LRN_BETA)
            total += dz
            if AFFINE:
                weighted += dz * z
            rows_store(out_a, out_b, at, channel, dz.to(out_a.dtype.element_ty), inside, C, SPLIT)
    column = tl.arange(0, CB)
    partial += (image * T + tl.program_id(0)) * C
    tl.store(partial + column, tl.sum(total, 0), mask=column < C)
    if AFFINE:
        rows = tl.num_programs(1).to(tl.int64) * T
        tl.store(partial + rows * C + column, tl.sum(weighted, 0), mask=column < C)
