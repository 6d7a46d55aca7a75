"""Pictures inside a page: images and figures as data URIs.

In: uint8 arrays, weights, numbers. Out: `Picture`s. Figures are SVG in two versions, for a light and a dark page. The
same input gives the same bytes.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

JPEG_QUALITY = 88
POINTS = 500  # of a curve; more are averaged
FILTER_SCALE, FILTER_GAP = 6, 4  # pixels per weight, pixels between filters
INK = {"light": "#1d2530", "dark": "#dfe5ec"}
LINES = {"light": ("#1f5fbf", "#c2410c", "#5b6675"), "dark": ("#7db2ff", "#ff9a62", "#9aa6b5")}


@dataclass(frozen=True)
class Picture:
    """What an <img> needs."""

    source: str  # data URI
    alt: str
    dark: str = ""  # data URI of the version for a dark page, if there is one
    width: int = 0  # pixels
    height: int = 0


def photograph(image: np.ndarray, alt: str) -> Picture:
    """uint8 (H, W, 3) as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return Picture(_uri(file.getvalue(), "jpeg"), alt, width=image.shape[1], height=image.shape[0])


def filters(weight: np.ndarray, columns: int, alt: str) -> Picture:
    """Filters as a grid, row by row; a wider gap between the first half and the second.

    Args:
        weight: float (F, 3, K, K). Each filter is scaled by itself: its largest weight, by size, is black or white, and
            grey is zero.
    """
    count, _, side, _ = weight.shape
    largest = np.maximum(np.abs(weight).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    shades = (127.5 * (1 + weight / largest)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    halves = [shades[: count // 2], shades[count // 2 :]] if count % (2 * columns) == 0 else [shades]
    tile = side * FILTER_SCALE + FILTER_GAP
    rows = [-(-len(half) // columns) for half in halves]
    height = sum(rows) * tile - FILTER_GAP + 3 * FILTER_GAP * (len(halves) - 1)
    sheet = np.zeros((height, columns * tile - FILTER_GAP, 4), np.uint8)  # transparent
    top = 0
    for half, lines in zip(halves, rows, strict=True):
        for number, tiny in enumerate(half):
            y, x = top + number // columns * tile, number % columns * tile
            large = tiny.repeat(FILTER_SCALE, 0).repeat(FILTER_SCALE, 1)
            sheet[y : y + len(large), x : x + len(large), :3] = large
            sheet[y : y + len(large), x : x + len(large), 3] = 255
        top += lines * tile + 3 * FILTER_GAP
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    return Picture(_uri(file.getvalue(), "png"), alt, width=sheet.shape[1], height=sheet.shape[0])


def figure(paint: Callable[[Any, Sequence[str]], None], alt: str, size: tuple[float, float] = (4.4, 2.9)) -> Picture:
    """A figure. `paint(axes, colours)` draws into its axes, once for each version of the page. `size`: inches."""
    versions = {}
    for theme, ink in INK.items():
        look = {
            "font.size": 9, "axes.edgecolor": ink, "axes.labelcolor": ink, "text.color": ink, "xtick.color": ink,
            "ytick.color": ink, "axes.grid": True, "grid.color": ink, "grid.alpha": 0.15, "axes.axisbelow": True,
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
            "svg.hashsalt": "look", "svg.fonttype": "path",
        }  # fmt: skip
        with matplotlib.rc_context(look):
            drawn = Figure(figsize=size, layout="constrained")
            paint(drawn.subplots(), LINES[theme])
            file = io.BytesIO()
            drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        versions[theme] = _uri(file.getvalue(), "svg+xml")
    width, height = (round(96 * inches) for inches in size)
    return Picture(versions["light"], alt, versions["dark"], width, height)


def thin(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """x and y of at most POINTS points: means of groups of neighbours."""
    group = -(-len(points) // POINTS) or 1
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return tuple([float(np.mean([point[axis] for point in part])) for part in parts] for axis in (0, 1))


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
