"""What a page shows: plain values, which the template turns into HTML.

In: the findings of job.look.of_run and job.look.of_data. Out: `Content`.
"""

import dataclasses
from collections.abc import Sequence

from job.look.pictures import Picture
from shards.errors import printable, short

MOST_BARS = 40  # classes that get a bar each
MOST_CELLS = 20  # classes of a matrix of confusions
NAME_LENGTH = 48  # characters of a class name in a caption


def caption(name: str) -> str:
    """A name, shortened, with escapes for what cannot be printed."""
    return short(printable(name), NAME_LENGTH)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture in a gallery, with its lines of text; the first is the main one."""

    picture: Picture
    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    tiles: Sequence[Tile]
    title: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text. `bars`: columns whose cells are (text, fraction) and are drawn as a bar."""

    columns: Sequence[str]
    rows: Sequence[Sequence]
    bars: Sequence[int] = ()
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Confusions of few classes: a row for each true class, counts of each predicted one."""

    names: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: text, then figures side by side, then tables, matrix and galleries."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[Picture, str]] = ()  # with captions
    wide: Picture | None = None
    tables: Sequence[Table] = ()
    matrix: Matrix | None = None
    galleries: Sequence[Gallery] = ()
    pairs: bool = False  # galleries are few pictures each: two beside each other


@dataclasses.dataclass
class Content:
    """A whole page."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: list[Section]
    notes: list[str]  # what is missing on the page, and why
    summary: str = ""  # for the terminal
