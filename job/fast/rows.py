"""What the Triton kernels share: rows of channels, which lie in one tensor or in two with half of the channels each."""

import triton
import triton.language as tl


@triton.jit
def rows_load(a, b, row, column, mask, C: tl.constexpr, SPLIT: tl.constexpr):
    """Elements (row, column) of a tensor of C columns, or of two of C / 2."""
    if SPLIT:
        H: tl.constexpr = C // 2
        first = tl.load(a + row * H + column, mask=mask & (column < H), other=0)
        second = tl.load(b + row * H + (column - H), mask=mask & (column >= H), other=0)
        return tl.where(column < H, first, second)
    else:
        return tl.load(a + row * C + column, mask=mask, other=0)


@triton.jit
def rows_store(a, b, row, column, value, mask, C: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:
        H: tl.constexpr = C // 2
        tl.store(a + row * H + column, value, mask=mask & (column < H))
        tl.store(b + row * H + (column - H), value, mask=mask & (column >= H))
    else:
        tl.store(a + row * C + column, value, mask=mask)


@triton.jit
def activation(z, factor, shift, mask, AFFINE: tl.constexpr):
    """ReLU(z + shift), or ReLU(z * factor + shift), zero outside of the mask."""
    a = z * factor + shift if AFFINE else z + shift
    return tl.where(mask & ((a > 0) | (a != a)), a, 0.0)  # not a number stays not a number
