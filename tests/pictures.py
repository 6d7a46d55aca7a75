"""Images that tests decode, crop and compare: from noise to flat colours, the same for the same seed."""

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int, kind: str = "smooth") -> np.ndarray:
    """uint8 (height, width, 3): noise, black and white noise, flat tiles, or something smooth with strong colours."""
    random = np.random.default_rng(seed)
    if kind == "noise":
        return random.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "extremes":
        return random.integers(0, 2, (height, width, 3), np.uint8) * 255
    coarse = random.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), np.uint8)
    filter = Image.Resampling.NEAREST if kind == "tiles" else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(coarse).resize((width, height), filter))
