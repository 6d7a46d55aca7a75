"""Photograph-like images for measurements: noise with the spectrum of photographs.

In: a seed and a size. Out: pixels, or a class folder of JPEG files that can be packed.
"""

import io
import os

import numpy as np


def photograph(seed: int, height: int, width: int, spectrum: float = 1.4) -> np.ndarray:
    """An image with the spectrum of a photograph and little colour, uint8 (height, width, 3).

    Amplitude falls as 1 / frequency ** spectrum. That of natural images falls as 1 / frequency; 1.4 makes up for their
    smooth parts, so that the JPEGs are as large as those of photographs (256x256, quality 90: 27 KB).
    """
    random = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** -spectrum
    planes = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * random.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phases, (height, width))
        planes.append(plane / plane.std())
    grey = 128 + 50 * planes[0]
    return np.clip(np.stack([grey + 12 * planes[1], grey, grey + 12 * planes[2]], -1), 0, 255).astype(np.uint8)


def write_photographs(
    folder: str, photos: int, copies: int, size: tuple[int, int], quality: int, spectrum: float = 1.4
) -> list[str]:
    """Fill `folder` with copies of different photographs as JPEG files; their paths. `size`: height, width."""
    from PIL import Image

    os.makedirs(folder)
    paths = []
    for number in range(photos):
        file = io.BytesIO()
        Image.fromarray(photograph(number, *size, spectrum)).save(file, "JPEG", quality=quality)
        for copy in range(copies):
            paths.append(os.path.join(folder, f"{copy:05}-{number:05}.jpg"))
            with open(paths[-1], "wb") as target:
                target.write(file.getvalue())
    return sorted(paths)
