"""One image: bytes of a file -> pixels -> the size that is stored -> JPEG or raw bytes.

In: the bytes of an image file. Out: uint8 arrays (H, W, 3), or (H, W) for grey, and the bytes that a shard stores.
A file that cannot be decoded, or has too many pixels, raises BadImage.
"""

import io
import re
import warnings

import numpy as np

from shards.read import fastjpeg

# Larger images are refused by their header. The largest photograph of ILSVRC2012 has 5980 x 6430 (NVIDIA DALI, ImageNet
# example); decoding an image of the limit keeps a process under 1 GiB.
MAX_PIXELS = 1 << 26

# Formats that Pillow may open; not all, because its EPS plug-in starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")

# Warnings of libjpeg for a JPEG that lacks pixels (which it then makes up) or has extra bytes (as after a wrong bit).
_DAMAGE = re.compile(r"Premature end|Corrupt JPEG data: (?!bad ICC)|Inconsistent progression")

try:
    import simplejpeg
except ImportError:  # Pillow decodes instead, at half the speed
    simplejpeg = None


class BadImage(ValueError):
    """An image that cannot be used. The message says why, without its name, which the caller knows."""


def check_size(height: int, width: int) -> None:
    """Raise BadImage for an image of more than MAX_PIXELS, or none."""
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS:,}")
    if height < 1 or width < 1:
        raise BadImage(f"{width}x{height} pixels")


def slow_decoder() -> str:
    """Why the fastest JPEG decoder is not used here, what that costs, and how to fix it; empty: it is used."""
    reason = fastjpeg.missing()
    if not reason:
        return ""
    other = "simplejpeg decodes, at 0.75"
    if simplejpeg is None:
        other = "simplejpeg is not installed either, and Pillow decodes, at 0.45"
    return (
        f"shards/read/jpeg.c is not in use: {reason}; {other} of its speed where measured (3,700 and 2,200 instead of "
        "4,900 images/s per core, 256 x 256); bash slurm/install.sh compiles it where there is a C compiler"
    )


def decode(data: bytes, at_least: int = 0, square: bool = False) -> np.ndarray:
    """Pixels of an image file: uint8 (H, W, 3) RGB, or (H, W) for a grey JPEG or grey PNG.

    EXIF orientation is ignored, as is usual for ImageNet: labels and published results belong to the pixels as stored.
    Transparency is dropped; of an animation the first frame is taken.

    Args:
        at_least: pixels that the shorter side must keep; a larger JPEG is decoded at 1/2, 1/4 or 1/8 (by averaging in
            libjpeg's inverse DCT, which is exact and faster than decoding in full). 0: full size.
        square: only the centre square is needed; the whole image may be returned all the same.

    Raises:
        BadImage: the image cannot be decoded in full.
    """
    header = jpeg_header(data)
    if header:
        height, width, components = header
        check_size(height, width)
        factor = _scale(min(height, width), at_least)
        if components == 3 and factor == 1:
            image = _decode_fast(data, height, width, square)
            if image is not None:
                return image
        # Pillow converts CMYK (Adobe's is inverted); here it is only decoded small, to see whether it is whole.
        least = (1, 1, 8) if components == 4 else (-(-height // factor), -(-width // factor), factor)
        image = _decode_simplejpeg(data, {1: "GRAY", 4: "CMYK"}.get(components, "RGB"), *least)
        if image is not None and components != 4:
            return image[:, :, 0] if components == 1 else image
    elif data[:3] == b"\xff\xd8\xff":  # damaged before the first pixel
        _decode_simplejpeg(data, "RGB", 1, 1, 8)
    return _decode_pillow(data, at_least)


def _decode_simplejpeg(data: bytes, colours: str, height: int, width: int, factor: int) -> np.ndarray | None:
    """A JPEG by libjpeg-turbo, at most `factor` times smaller and at least `height` x `width`; None: it cannot.

    Raises:
        BadImage: it is damaged. (Pillow would fill in what is missing, without a warning.)
    """
    if simplejpeg is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width, min_factor=factor)
    except ValueError as error:
        complaint = " ".join(str(error).split())
        if _DAMAGE.match(complaint):
            raise BadImage(f"cannot be decoded in full: {complaint}") from None
        return None  # only unusual


def _decode_fast(data: bytes, height: int, width: int, square: bool) -> np.ndarray | None:
    """A colour JPEG, or its centre square, by shards/read/jpeg.c; None: it cannot."""
    decoder = fastjpeg.decoder()
    if decoder is None:
        return None
    part, corner = (height, width), (0, 0)
    if square:
        part, corner = centre_square(height, width)
    image = np.empty((*part, 3), np.uint8)
    return image if decoder.crop(data, (height, width), corner, part, image.ctypes.data) else None


def centre_square(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and top left corner of the largest square in the middle."""
    side = min(height, width)
    return (side, side), ((height - side) // 2, (width - side) // 2)


def jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and number of components of a JPEG; None: it is another file, or the header is damaged.

    Source: ITU-T T.81, B.1.1.3 and B.2.2. Walking over the markers takes 5 us, the start of libjpeg alone 50 us.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8], data[at + 9]
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _scale(short_side: int, at_least: int) -> int:
    """Largest of libjpeg's fast factors 8, 4, 2, 1 that leaves the shorter side `at_least` pixels."""
    if at_least:
        for factor in (8, 4, 2):
            if short_side >= factor * at_least:
                return factor
    return 1


def _decode_pillow(data: bytes, at_least: int) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF, palette transparency: they do not affect the pixels
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(image.height, image.width)
            if image.format == "JPEG" and at_least:
                factor = _scale(min(image.size), at_least)
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            image = _eight_bits(image)
            factor = _scale(min(image.size), at_least)
            # Average as the DCT does for JPEG: else a large PNG would take 1 GiB in numpy.
            return np.array(image.reduce(factor) if factor > 1 else image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly every kind of exception for damaged files
        raise BadImage(_why(error)) from None


def _eight_bits(image):
    """A Pillow image of any mode as L or RGB.

    Raises:
        BadImage: the file does not say which numbers are black and white.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits, white = 16, 1
        if image.format == "TIFF":  # tags BitsPerSample and PhotometricInterpretation (0: white is zero)
            bits, white = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(262, 1)
        values = np.minimum(np.asarray(image) >> (bits - 8), 255).astype(np.uint8)
        return Image.fromarray(values if white else 255 - values)
    if image.mode in ("I", "F"):
        kind = "real numbers" if image.mode == "F" else "32 bits or signed numbers"
        raise BadImage(f"its pixels are {kind}, whose range the file does not say; convert it to 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode)  # convert() would copy it in any case


def _why(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than the limit of {MAX_PIXELS:,}"
    if isinstance(error, UnidentifiedImageError):  # its message names a BytesIO and its address
        return "cannot be decoded: no image file, or damaged at its beginning"
    return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"


def fit_image(image: np.ndarray, size: int, fit: str) -> np.ndarray:
    """The image in the size that is stored. `size`: pixels; 0 keeps it as it is.

    `fit` is crop: the centre square, `size` x `size`; squash: all of it, `size` x `size`; none: the shorter side has
    `size`. Raises BadImage if the result would be too large.
    """
    if not size:
        return image
    height, width = image.shape[:2]
    if fit == "crop":
        (side, _), (top, left) = centre_square(height, width)
        return resize(image[top : top + side, left : left + side], size, size)
    if fit == "squash":
        return resize(image, size, size)
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    check_size(height, width)  # a strip of 1 x 100,000 would become enormous
    return resize(image, height, width)


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of the image, `height` x `width`, scaled to cover that size. Raises BadImage if too large."""
    if image.shape[:2] == (height, width):
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    image = fit_image(image, max(min(height, width), round(min(image.shape[:2]) * scale)), "none")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize by bicubic interpolation with antialiasing, Pillow's default filter.

    Torch's uint8 kernel takes 0.3 ms where Pillow takes 1.7 to 2.2 ms (375x375 -> 256x256, one core). Its result equals
    Pillow's within two grey levels where no overshoot is clipped.
    """
    if image.shape[:2] == (height, width):
        return image
    import torch

    # (1, C, H, W) in channels-last memory order: the kernel then neither unpacks nor packs pixels.
    pixels = torch.from_numpy(np.require(image, requirements="CW")).reshape(1, *image.shape[:2], -1).permute(0, 3, 1, 2)
    done = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    done = done.permute(0, 2, 3, 1)[0].contiguous().numpy()  # (H, W, C)
    return done if image.ndim == 3 else done[:, :, 0]


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) from grey or RGB."""
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """An image as a JPEG file. Colour is stored as 4:2:0, as by Pillow and most cameras.

    Grey is stored in one channel: smaller, faster to decode, and every reader can return it as RGB.
    """
    if simplejpeg is not None:
        if image.ndim == 2:
            return simplejpeg.encode_jpeg(np.ascontiguousarray(image[:, :, None]), quality, "GRAY", "Gray")
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width from the header of an image; nothing is decoded. Raises BadImage, as for too many pixels."""
    header = jpeg_header(data)
    if header:
        check_size(*header[:2])
        return header[:2]
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(image.height, image.width)
                return image.height, image.width
    except BadImage:
        raise
    except Exception as error:  # as in _decode_pillow
        raise BadImage(_why(error)) from None


def file_kind(data: bytes) -> str:
    """Extension for an image file, by its first bytes, not its name (ImageNet has a PNG named .JPEG)."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadImage("neither JPEG nor PNG nor WebP")
