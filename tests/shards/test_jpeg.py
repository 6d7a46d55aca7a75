"""Crops decoded by jpeg.c are libjpeg-turbo's bit for bit, and what is not plain or not sound is refused."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.read import fastjpeg, images
from tests.launch import ROOT
from tests.pictures import picture

GUARD = 97  # value of a byte that must stay as it is


@pytest.fixture(scope="module", autouse=True)
def decoder():
    """This machine's; a processor that it is not made for is a reason to skip, a compiler's error is not."""
    reason = fastjpeg.missing()
    if "processor" in reason or "x86-64" in reason:
        pytest.skip(reason)
    assert not reason
    return fastjpeg.decoder()


def jpeg(pixels: np.ndarray, colour: str = "4:2:0", **how) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if colour == "grey":
        image.convert("L").save(file, "JPEG", **how)
    else:
        image.save(file, "JPEG", subsampling=colour, **how)
    return file.getvalue()


def cropped(data: bytes, size, corner, part) -> np.ndarray | None:
    """The crop; None: refused. What lies behind it in memory must stay."""
    memory = np.full(part[0] * part[1] * 3 + 64, GUARD, np.uint8)
    done = fastjpeg.decoder().crop(data, size, corner, part, memory.ctypes.data)
    assert (memory[-64:] == GUARD).all()
    return memory[:-64].reshape(*part, 3) if done else None


def whole(data: bytes) -> np.ndarray | None:
    """The image by libjpeg-turbo; None: damaged in any way."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


@st.composite
def files(draw):
    """(file, (height, width), corner, part) of a plain JPEG."""
    height, width = draw(st.integers(16, 130)), draw(st.integers(16, 130))
    kind = draw(st.sampled_from(["noise", "extremes", "tiles", "smooth"]))
    data = jpeg(
        picture(draw(st.integers(0, 1 << 30)), height, width, kind),
        draw(st.sampled_from(["4:2:0", "4:2:0", "4:2:2", "4:4:4", "grey"])),
        quality=draw(st.integers(1, 100)),
        optimize=draw(st.booleans()),
    )
    part = draw(st.integers(1, height)), draw(st.integers(1, width))
    corner = draw(st.integers(0, height - part[0])), draw(st.integers(0, width - part[1]))
    return data, (height, width), corner, part


@settings(max_examples=400, deadline=None)
@given(files())
def test_any_part_of_any_plain_jpeg_is_that_of_the_full_decode(file):
    data, size, (top, left), part = file
    got = cropped(data, size, (top, left), part)
    assert got is not None and (got == whole(data)[top : top + part[0], left : left + part[1]]).all()


@settings(max_examples=300, deadline=None)
@given(files(), st.randoms(use_true_random=False))
def test_a_damaged_jpeg_is_refused_or_decodes_as_libjpeg_does(file, random):
    data, size, (top, left), part = file
    for _ in range(10):
        damaged = bytearray(data)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(damaged))
            match random.randrange(4):
                case 0 | 1:
                    damaged[at] ^= 1 << random.randrange(8)
                case 2:
                    damaged[at:at] = bytes([random.randrange(256)])
                case 3:
                    del damaged[max(at, 2) :]
        got = cropped(bytes(damaged), size, (top, left), part)
        if got is not None:
            expected = whole(bytes(damaged))
            assert expected is not None and (got == expected[top : top + part[0], left : left + part[1]]).all()


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Path:
    """tests/fuzz_jpeg.c, which contains the decoder, with the compiler's checks of memory and arithmetic."""
    program = tmp_path_factory.mktemp("fuzz") / "fuzz"
    flags = ["-O1", "-g", "-mavx2", "-mbmi2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = "int main(void) { return 0; }"
    command = ["cc", *flags, "-x", "c", "-", "-o", program]
    trivial = subprocess.run(command, input=source, text=True, capture_output=True)
    if trivial.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"no sanitizers here: {trivial.stderr}")
    subprocess.run(["cc", *flags, "-o", program, ROOT / "tests" / "fuzz_jpeg.c"], check=True)
    return program


def fuzz(program: Path, folder: Path, seconds: float) -> tuple[int, int]:
    """Mutate files of all kinds for so long. Files tried, and files accepted and found equal to libjpeg-turbo's."""
    colours = ["4:2:0", "4:2:2", "4:4:4", "grey"]
    for number in range(24):
        kind = ["noise", "extremes", "tiles", "smooth"][number % 4]
        pixels = picture(number, 16 + 5 * number, 140 - 5 * number, kind)
        data = jpeg(pixels, colours[number // 4 % 4], quality=(5, 50, 90, 100)[number % 3], optimize=number % 2 == 1)
        (folder / f"{number}.jpg").write_bytes(data)
    out = folder / "accepted"
    done = subprocess.run(
        [program, "1", str(seconds), out, *sorted(folder.glob("*.jpg"))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accepted = 0
    with open(out, "rb") as file:
        while header := file.read(28):
            size, top, left, height, width, _, _ = struct.unpack("7i", header)
            data, pixels = file.read(size), file.read(3 * height * width)
            expected = whole(data)
            assert expected is not None
            part = expected[top : top + height, left : left + width]
            assert part.tobytes() == pixels
            accepted += 1
    return int(done.stdout), accepted


def test_mutated_files_break_no_rule_of_c_and_decode_as_libjpeg_does(fuzzer, tmp_path):
    tried, accepted = fuzz(fuzzer, tmp_path, 1.5)
    assert tried > 50 and accepted > 0


@pytest.mark.long
def test_many_mutated_files_break_no_rule_of_c_and_decode_as_libjpeg_does(fuzzer, tmp_path):
    tried, accepted = fuzz(fuzzer, tmp_path, 20)
    assert tried > 1000 and accepted > 20


@pytest.mark.parametrize("row", [0, 5, 63])
def test_damage_outside_the_crop_counts_too(row):
    data = jpeg(picture(0, 64, 64, "noise"), quality=90)
    for cut in (len(data) - 2, len(data) - 40, len(data) // 2):
        assert cropped(data[:cut], (64, 64), (row, 0), (1, 64)) is None
    assert cropped(data + b"junk behind the end", (64, 64), (row, 0), (1, 64)) is not None


def test_what_is_not_plain_is_refused():
    pixels = picture(1, 48, 64, "smooth")
    file = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(file, "JPEG")
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    for data in (
        jpeg(pixels, progressive=True),
        jpeg(pixels, restart_marker_blocks=2),
        jpeg(pixels, keep_rgb=True, colour="4:4:4"),
        file.getvalue(),
        png.getvalue(),
        b"",
        b"\xff\xd8",
    ):
        assert cropped(data, (48, 64), (0, 0), (48, 64)) is None
    sound = jpeg(pixels)
    assert cropped(sound, (64, 48), (0, 0), (48, 48)) is None  # another size than it has
    assert cropped(sound, (48, 64), (1, 0), (48, 64)) is None  # beyond its edge
    assert cropped(sound, (48, 64), (0, 0), (48, 64)) is not None


def test_read_only_and_writable_memory_give_the_same():
    data = jpeg(picture(2, 40, 40, "smooth"))
    expected = cropped(data, (40, 40), (3, 5), (30, 30))
    for view in (memoryview(data), memoryview(bytearray(data)), memoryview(bytearray(b"x" + data))[1:]):
        assert (cropped(view, (40, 40), (3, 5), (30, 30)) == expected).all()


@settings(max_examples=60, deadline=None)
@given(files())
def test_the_packer_gets_the_same_image_with_and_without_it(file):
    data, *_ = file
    fast = [images.fit_image(images.decode(data, 16, square), 16, "crop") for square in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastjpeg, "decoder", lambda: None)
        expected = images.fit_image(images.decode(data, 16), 16, "crop")
    assert all((image == expected).all() for image in fast)


def missing(tmp_path, **environment) -> str:
    """What `missing` says in a new process with an empty cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    code = "from shards.read import fastjpeg; print(fastjpeg.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_it_is_compiled_once_even_by_processes_that_start_together(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho run >>{tmp_path}/runs\nexec cc "$@"\n')
    compiler.chmod(0o755)
    code = "from shards.read import fastjpeg; assert not fastjpeg.missing(), fastjpeg.missing()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": str(compiler)}
    together = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT) for _ in range(4)]
    assert [process.wait(120) for process in together] == [0] * 4
    assert (tmp_path / "runs").read_text().split() == ["run"]
    left = [name for name in os.listdir(tmp_path / "cache" / "alexnet-horovod") if name.endswith(".so")]
    assert len(left) == 1


def test_without_a_compiler_it_says_so(tmp_path):
    assert "no compiler 'no-such-cc'" in missing(tmp_path, CC="no-such-cc")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.c:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "out of ideas" in missing(tmp_path, CC=str(broken))
    locked = tmp_path / "file"
    locked.write_text("")
    assert not missing(tmp_path, XDG_CACHE_HOME=str(locked), TMPDIR=str(tmp_path))
    assert list(tmp_path.glob("alexnet-horovod-*-jpeg/jpeg-*.so"))  # a cache that cannot be written: on this node
