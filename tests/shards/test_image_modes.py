"""A known picture in every mode and depth that Pillow opens comes out as that picture, or is refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shards.read import images

HEIGHT, WIDTH = 48, 64
ROW, COLUMN = np.mgrid[:HEIGHT, :WIDTH]
COLOUR = np.stack([COLUMN * 4, ROW * 5, (ROW + COLUMN) * 2], -1).astype(np.uint8)
GREY = (20 + ROW * 2 + COLUMN * 2).astype(np.uint8)
WIDE = GREY.astype(np.uint16) * 257
ROTATE = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
ALPHA = np.where(COLUMN > 8, 255, 3).astype(np.uint8)


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def colour(mode: str, form: str, **options) -> bytes:
    image = Image.fromarray(COLOUR)
    if "A" in mode:
        image.putalpha(Image.fromarray(ALPHA))
    return saved(image.convert(mode), form, **options)


def grey(mode: str, form: str, **options) -> bytes:
    image = Image.fromarray(GREY)
    if "A" in mode:
        image.putalpha(Image.fromarray(ALPHA))
    return saved(image.convert(mode), form, **options)


def animation(form: str) -> bytes:
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    return saved(first, form, save_all=True, append_images=[second], lossless=True)


def png(colour_type: int, channels: list[np.ndarray]) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write. Source: W3C, PNG, third edition, chapter 11."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.stack(channels, -1).astype(">u2") * np.uint16(257)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(data: bytes, bits: list[int], photometric: int, extra: int | None = None, kind: int = 1) -> bytes:
    """An uncompressed TIFF of one strip. Source: Adobe, TIFF, revision 6.0, section 2 and part 2."""
    tags = [(256, 4, [WIDTH]), (257, 4, [HEIGHT]), (258, 3, bits), (259, 3, [1]), (262, 3, [photometric])]
    tags += [(273, 4, [0]), (277, 3, [len(bits)]), (278, 4, [HEIGHT]), (279, 4, [len(data)])]
    tags += [(338, 3, [extra])] if extra is not None else []
    tags += [(339, 3, [kind] * len(bits))]
    at = 8 + 2 + 12 * len(tags) + 4  # of values that do not fit into an entry, and after them the pixels
    entries, behind = b"", b""
    for tag, width, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if width == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, behind = struct.pack("<I", at + len(behind)), behind + packed
        entries += struct.pack("<HHI", tag, width, len(values)) + packed.ljust(4, b"\0")
    entries = entries.replace(struct.pack("<HHII", 273, 4, 1, 0), struct.pack("<HHII", 273, 4, 1, at + len(behind)))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + behind + data


def big_endian() -> bytes:
    return saved(Image.frombytes("I;16B", (WIDTH, HEIGHT), WIDE.astype(">u2").tobytes()), "TIFF")


def twelve_bits() -> bytes:
    values = (GREY.astype(int) << 4).reshape(-1, 2)
    first, second = values[:, 0], values[:, 1]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def plain(kind: str, most: int) -> bytes:
    """A portable pixmap: P2 and P3 are text, P5 and P6 bytes or, above 255, words."""
    values = (GREY if kind in ("P2", "P5") else COLOUR).astype(int) * most // 255
    head = f"{kind} {WIDTH} {HEIGHT} {most}\n".encode()
    if kind in ("P2", "P3"):
        return head + " ".join(map(str, values.ravel())).encode()
    return head + values.astype(">u2" if most > 255 else np.uint8).tobytes()


READ = {
    "RGB JPEG": (COLOUR, lambda: colour("RGB", "JPEG", quality=95)),
    "CMYK JPEG": (COLOUR, lambda: colour("CMYK", "JPEG", quality=95)),
    "YCbCr TIFF": (COLOUR, lambda: colour("YCbCr", "TIFF")),
    "CMYK TIFF": (COLOUR, lambda: colour("CMYK", "TIFF")),
    "RGBX TIFF": (COLOUR, lambda: colour("RGBX", "TIFF")),
    "PNG with a palette": (COLOUR, lambda: saved(Image.fromarray(COLOUR).quantize(256), "PNG")),
    "PNG with a transparent colour": (COLOUR, lambda: saved(Image.fromarray(COLOUR).quantize(), "PNG", transparency=7)),
    "animated GIF": (COLOUR, lambda: animation("GIF")),
    "animated WebP": (COLOUR, lambda: animation("WEBP")),
    "animated PNG": (COLOUR, lambda: animation("PNG")),
    "TIFF of several frames": (COLOUR, lambda: animation("TIFF")),
    "RGB PNG of 16 bits": (COLOUR, lambda: png(2, list(np.moveaxis(COLOUR, -1, 0)))),
    "RGBA PNG of 16 bits": (COLOUR, lambda: png(6, [*np.moveaxis(COLOUR, -1, 0), ALPHA])),
    "RGB TIFF of 16 bits": (COLOUR, lambda: tiff((COLOUR.astype("<u2") * 257).tobytes(), [16] * 3, 2)),
    "JPEG with EXIF that says rotate": (COLOUR, lambda: colour("RGB", "JPEG", quality=95, exif=ROTATE)),
    "grey JPEG": (GREY, lambda: grey("L", "JPEG", quality=95)),
    "grey PNG of 16 bits": (GREY, lambda: png(0, [GREY])),
    "LA PNG of 16 bits": (GREY, lambda: png(4, [GREY, ALPHA])),
    "grey TIFF of 16 bits": (GREY, lambda: tiff(WIDE.astype("<u2").tobytes(), [16], 1)),
    "grey TIFF of 16 bits, white is zero": (GREY, lambda: tiff((65535 - WIDE).astype("<u2").tobytes(), [16], 0)),
    "grey TIFF of 16 bits, big endian": (GREY, lambda: big_endian()),
    "grey TIFF of 12 bits": (GREY, lambda: tiff(twelve_bits(), [12], 1)),
    "grey TIFF, white is zero": (GREY, lambda: tiff((255 - GREY).tobytes(), [8], 0)),
    "La TIFF": (GREY, lambda: tiff(np.stack([GREY, np.full_like(GREY, 255)], -1).tobytes(), [8, 8], 1, 1)),
}  # fmt: skip
for form in ("PNG", "TIFF", "BMP", "PPM"):
    READ |= {f"{m} {form}": (COLOUR, lambda m=m, f=form: colour(m, f)) for m in ("RGB", "RGBA")}
READ |= {f"{m} WebP": (COLOUR, lambda m=m: colour(m, "WEBP", lossless=True)) for m in ("RGB", "RGBA")}
READ |= {f"{m} {f}": (GREY, lambda m=m, f=f: grey(m, f)) for m in ("L", "LA") for f in ("PNG", "TIFF")}
READ |= {f"L {f}": (GREY, lambda f=f: grey("L", f)) for f in ("GIF", "BMP", "PPM")}
READ |= {f"{k} up to {n}": (GREY, lambda k=k, n=n: plain(k, n)) for k in ("P2", "P5") for n in (100, 255, 1023, 65535)}
READ |= {f"{k} up to {n}": (COLOUR, lambda k=k, n=n: plain(k, n)) for k in ("P3", "P6") for n in (255, 1023, 65535)}


@pytest.mark.parametrize("what", READ)
def test_the_picture_comes_out(what):
    picture, file = READ[what]
    image = images.decode(file())
    assert image.dtype == np.uint8 and image.shape[:2] == (HEIGHT, WIDTH)
    expected = images.as_rgb(picture).astype(int)
    assert np.abs(images.as_rgb(image) - expected).mean() < 5 and np.abs(images.as_rgb(image) - expected).max() < 60


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "BMP", "GIF"])
def test_black_and_white_comes_out(form):
    picture = np.where(ROW > COLUMN, 255, 0).astype(np.uint8)
    image = images.as_rgb(images.decode(saved(Image.fromarray(picture).convert("1"), form)))
    assert (image == picture[:, :, None]).all()


def test_lab_comes_out():
    ImageCms = pytest.importorskip("PIL.ImageCms")
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(Image.fromarray(COLOUR), *profiles, outputMode="LAB")
    assert np.abs(images.decode(saved(lab, "TIFF")).astype(int) - COLOUR).mean() < 3


@pytest.mark.parametrize(
    ("what", "file"),
    [
        ("real numbers", lambda: saved(Image.fromarray(GREY.astype(np.float32)), "TIFF")),
        ("real numbers", lambda: b"Pf %d %d -1.0\n" % (WIDTH, HEIGHT) + (GREY / 255).astype("<f4").tobytes()),
        ("32 bits or signed", lambda: saved(Image.fromarray(GREY.astype(np.int32)), "TIFF")),
        ("32 bits or signed", lambda: tiff(GREY.astype("<i2").tobytes(), [16], 1, kind=2)),
    ],
)
def test_numbers_without_a_range_are_refused_by_name(what, file):
    with pytest.raises(images.BadImage, match=f"{what}.*convert it to 8 or 16 bits"):
        images.decode(file())


# ---- JPEG damage that Pillow fills with grey --------------------------------------------------------------------


def photograph(mode: str, progressive: bool) -> bytes:
    rough = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((320, 240), Image.Resampling.BICUBIC)
    return saved(image.convert(mode), "JPEG", quality=90, progressive=progressive)


def broken(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    if how == "cut off":
        return data[:middle]
    if how == "cut off, with an end mark":
        return data[:middle] + b"\xff\xd9"
    if how == "lacks its last bytes":
        return data[:-12] + b"\xff\xd9"
    if how == "zeros":
        return data[:middle] + bytes(len(data) - middle)
    assert how == "bad codes, and junk before the end"
    return data[:middle] + b"\xff\x00" * 8 + data[middle + 16 : -2] + b"junkjunk\xff\xd9"


@pytest.mark.skipif(images.simplejpeg is None, reason="Pillow alone cannot tell")
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "how",
    ["cut off", "cut off, with an end mark", "lacks its last bytes", "zeros", "bad codes, and junk before the end"],
)
def test_a_jpeg_that_lacks_pixels_is_damaged(mode, progressive, how):
    data = broken(photograph(mode, progressive), how)
    for options in ({}, {"at_least": 64}, {"at_least": 200, "square": True}):
        with pytest.raises(images.BadImage, match="cannot be decoded"):
            images.decode(data, **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_bytes_after_the_end_are_no_damage(mode):
    sound = photograph(mode, False)
    assert (images.decode(sound + b"junk") == images.decode(sound)).all()
