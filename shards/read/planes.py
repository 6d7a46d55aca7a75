"""Images as planes: luma at full size, both chroma planes at half of it (4:2:0), as a JPEG decoder has them before it
enlarges chroma. Half the bytes of RGB, and nothing that decoding the JPEG gives is lost.

In: the bytes of a JPEG. Out: the bytes that a shard stores, H x W of Y, then ceil(H/2) x ceil(W/2) of Cb and of Cr;
parts of them for a batch; and RGB, bit for bit that of libjpeg-turbo. job.batches.planes does the last on a GPU, too.
"""

import functools
import io

import numpy as np

from shards.errors import InputError
from shards.read.images import jpeg_header

LEAST = 16  # pixels of a side; libjpeg-turbo enlarges the chroma of smaller images in another way
_SAMPLING = [(1, 2, 2), (2, 1, 1), (3, 1, 1)]  # number, horizontal and vertical factor of each component: 4:2:0


def chroma_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the chroma planes of an image."""
    return (height + 1) // 2, (width + 1) // 2


def nbytes(height: int, width: int) -> int:
    """Bytes of an image."""
    rows, columns = chroma_size(height, width)
    return height * width + 2 * rows * columns


def bare_bytes(encoding: str, height: int, width: int) -> int:
    """Bytes of an image of one of the encodings of bare pixels, "raw" or "planes"."""
    return nbytes(height, width) if encoding == "planes" else height * width * 3


def split_planes(data: bytes | memoryview, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of the bytes of an image: luma (H, W) and chroma (2, ceil(H/2), ceil(W/2)), uint8."""
    planes = np.frombuffer(data, np.uint8)
    luma = planes[: height * width].reshape(height, width)
    return luma, planes[height * width :].reshape(2, *chroma_size(height, width))


# From JPEG.


def from_jpeg(data: bytes) -> bytes | None:
    """The planes of a sound JPEG file as it codes them; None: it codes others (4:4:4, 4:2:2, CMYK, RGB).

    Grey is given chroma of 128. Damage is not noticed: decode the file before.

    Raises:
        InputError: Pillow was built with another library than libjpeg-turbo.
    """
    if not jpeg_header(data):
        return None
    _check_library()
    luma = _open(data)
    grey = luma.mode == "L"
    colours = luma.mode == "RGB" and [layer[:3] for layer in luma.layer] == _SAMPLING
    if not grey and not (colours and luma.info.get("adobe_transform", 1) == 1):
        return None
    width, height = luma.size
    luma.draft("L", luma.size)
    if grey:
        return luma.tobytes() + bytes([128]) * (2 * int(np.prod(chroma_size(height, width))))
    # At half the size libjpeg-turbo leaves chroma as it is (jdmaster.c: "we try to scale up the chroma components via
    # IDCT scaling rather than upsampling"); only luma comes from a smaller inverse DCT.
    half = _open(data)
    half.draft("YCbCr", (max(width // 2, 1), max(height // 2, 1)))
    chroma = np.asarray(half)  # (rows, columns, 3)
    assert half.mode == "YCbCr" and chroma.shape[:2] == chroma_size(height, width)
    return luma.tobytes() + chroma[:, :, 1].tobytes() + chroma[:, :, 2].tobytes()


def _open(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=("JPEG",))


@functools.cache
def _check_library() -> None:
    from PIL import features

    if not features.check_feature("libjpeg_turbo"):
        raise InputError("--encoding planes needs a Pillow with libjpeg-turbo, as that of PyPI; or use jpeg")


# Parts for a batch.


def crop_bytes(side: int) -> int:
    """Bytes of a square part: `side` x `side` of luma, then twice `chroma_side` x `chroma_side`."""
    return side * side + 2 * chroma_side(side) ** 2


def chroma_side(side: int) -> int:
    """Samples along the chroma of a part, wherever its corner is: half of it, and a neighbour at each end.

    They begin at sample `top // 2 - 1` of the image, whose edges are repeated beyond it.
    """
    return side // 2 + 3


@functools.cache
def crop_side(size: int) -> int:
    """The side of a part by its bytes. Raises ValueError if no part has so many."""
    side = next(n for n in range(size + 2) if crop_bytes(n) >= size)
    if crop_bytes(side) != size:
        raise ValueError(f"no square part has {size} bytes of planes")
    return side


def crop_views(parts: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of parts (..., crop_bytes(side)): luma (..., side, side), chroma (..., 2, chroma_side, chroma_side)."""
    there = chroma_side(side)
    luma, chroma = parts[..., : side * side], parts[..., side * side :]
    return luma.reshape(*parts.shape[:-1], side, side), chroma.reshape(*parts.shape[:-1], 2, there, there)


def copy_crop(
    data: bytes | memoryview, size: tuple[int, int], corner: tuple[int, int], luma: np.ndarray, chroma: np.ndarray
) -> None:
    """Copy a square part of an image: one row after another, 7 us for 227 x 227.

    Args:
        data: the image, nbytes(*size).
        size: height, width of the image.
        corner: top, left of the part.
        luma, chroma: where to; see `crop_views`.
    """
    (height, width), (top, left) = size, corner
    rows, columns = (height + 1) // 2, (width + 1) // 2
    luma[:] = np.ndarray(luma.shape, np.uint8, data, top * width + left, (width, 1))
    y, x, there = top // 2 - 1, left // 2 - 1, chroma.shape[1]
    first_y, first_x = max(y, 0), max(x, 0)
    last_y, last_x = min(y + there, rows), min(x + there, columns)
    place = height * width + first_y * columns + first_x
    shape = 2, last_y - first_y, last_x - first_x
    inside = np.ndarray(shape, np.uint8, data, place, (rows * columns, columns, 1))
    if shape[1:] == chroma.shape[1:]:
        chroma[:] = inside
        return
    chroma[:, first_y - y : last_y - y, first_x - x : last_x - x] = inside
    if first_y > y:
        chroma[:, 0] = chroma[:, 1]
    if last_y < y + there:
        chroma[:, last_y - y :] = chroma[:, last_y - y - 1 : last_y - y]
    if first_x > x:
        chroma[:, :, 0] = chroma[:, :, 1]
    if last_x < x + there:
        chroma[:, :, last_x - x :] = chroma[:, :, last_x - x - 1 : last_x - x]


# To RGB.


def to_rgb(data: bytes | memoryview, height: int, width: int) -> np.ndarray:
    """Pixels of an image, uint8 (H, W, 3), equal to those that libjpeg-turbo makes of the JPEG.

    Chroma is enlarged with weights 3 : 1 in both directions ("fancy upsampling"); colours by ITU-T T.871, in 16
    fractional bits.
    """
    luma, chroma = split_planes(data, height, width)
    around = np.pad(chroma.astype(np.int16), ((0, 0), (1, 1), (1, 1)), mode="edge")
    sums = _enlarge(around, 0, 0)  # 4 times, then 16 times the samples: at most 4088, so 16 bits are enough
    sums = _enlarge(sums.swapaxes(1, 2), 8, 7).swapaxes(1, 2) >> 4
    cb, cr = sums[:, :height, :width].astype(np.int32) - 128
    y = luma.astype(np.int32)
    red = y + ((91881 * cr + 32768) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = y + ((116130 * cb + 32768) >> 16)
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)


def _enlarge(x: np.ndarray, even: int, odd: int) -> np.ndarray:
    """(2, n + 2, m) -> (2, 2n, m): 3 times the near sample, plus the far one, plus what rounds."""
    near = 3 * x[:, 1:-1]
    pairs = np.stack([near + x[:, :-2] + even, near + x[:, 2:] + odd], 2)  # (2, n, 2, m)
    return pairs.reshape(2, -1, x.shape[2])
