"""Photograph-like images, for measurements where no data set is at hand.

In: a seed, or an encoding of shards. Out: one image, its JPEG, or a temporary folder of shards.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from shards import ROOT

SIDE, QUALITY = 256, 90
PHOTOGRAPHS = 256  # different ones in the shards
IMAGES = 2048  # images in the shards
# Amplitude of natural images falls as 1/f; 1.4 instead of 1 makes up for their smooth parts, so that the JPEGs are as
# large as those of photographs (about 27 KB).
SPECTRUM = 1.4


def photograph(seed: int, side: int = SIDE) -> np.ndarray:
    """An image with the spectrum of a photograph and little colour, uint8 (side, side, 3)."""
    random = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    amplitude = np.maximum(np.hypot(fy, fx), 1 / side) ** -SPECTRUM
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(amplitude * np.exp(2j * np.pi * random.random(amplitude.shape)), (side, side))
        planes.append(plane / plane.std())
    grey = 128 + 50 * planes[0]
    return np.clip(np.stack([grey + 12 * planes[1], grey, grey + 12 * planes[2]], -1), 0, 255).astype(np.uint8)


def jpeg(seed: int) -> bytes:
    """The JPEG file of a `photograph`."""
    file = io.BytesIO()
    Image.fromarray(photograph(seed)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


@contextlib.contextmanager
def synthetic_shards(encoding: str) -> Iterator[str]:
    """A temporary folder of shards that shards.pack makes of IMAGES photographs. `encoding`: jpeg or raw."""
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        source, dest = os.path.join(folder, "images"), os.path.join(folder, "shards")
        os.makedirs(os.path.join(source, "photograph"))
        for number in range(PHOTOGRAPHS):
            data = jpeg(number)
            for copy in range(IMAGES // PHOTOGRAPHS):
                with open(os.path.join(source, "photograph", f"{number}-{copy}.jpg"), "wb") as file:
                    file.write(data)
        kept = "raw" if encoding == "raw" else "copy"
        command = [sys.executable, "-m", "shards.pack", source, dest, "--split", "train", "--encoding", kept]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        yield dest
