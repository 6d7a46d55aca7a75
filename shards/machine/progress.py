"""Progress of a long command: one line that is rewritten on a terminal, else a new line every ten seconds.

In: how many units there are, and how many more are done. With several processes, one of them counts for all.
"""

import os
import shutil
import sys
import time
from typing import TextIO

LINE_SECONDS = 10.0  # between two lines in a log
BAR_SECONDS = 0.2  # between two updates of the line on a terminal


def on_terminal(stream: TextIO) -> bool:
    """Whether `stream` is shown on a terminal on which a line can be rewritten.

    A rank writes to its launcher. horovodrun says whether that writes to a terminal; mpirun does not (it gives ranks a
    pseudo-terminal even if its own output is a file), and passes on stderr only whole lines.
    """
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK")):
        return stream is sys.stdout and os.environ.get("HOROVOD_TERMINAL") == "1"
    return stream.isatty()


def duration(seconds: float) -> str:
    """0:03:05, 12:03:05, or 4 days 2:03:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{hour}:{minute:02d}:{second:02d}"
    return f"{days} day{'s' * (days > 1)} {text}" if days else text


class Line:
    """A line with the present state: rewritten on a terminal, else printed anew with the time of day.

    Call `show` with the text when `due` says that the last line is old enough.
    """

    def __init__(self, stream: TextIO):
        self.terminal = on_terminal(stream)
        self._stream, self._shown, self._dirty = stream, time.monotonic(), False

    def due(self) -> bool:
        """Whether it is time for the next `show`."""
        return time.monotonic() - self._shown >= (BAR_SECONDS if self.terminal else LINE_SECONDS)

    def show(self, text: str) -> None:
        """Show the line."""
        self._shown = time.monotonic()
        if self.terminal:  # a line that wraps cannot be rewritten
            text, self._dirty = text[: shutil.get_terminal_size().columns - 1], True
            print(f"\r{text}\033[K", end="", file=self._stream, flush=True)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def clear(self) -> None:
        """Make room for other output on a terminal."""
        if self._dirty:
            self._dirty = False
            print("\r\033[K", end="", file=self._stream, flush=True)


class Progress:
    """`HH:MM:SS what 12,345/1,281,167 images 562 images/s ETA 0:38:00` on stderr.

    Args:
        total: number of units, including `done`; 0: not known.
        unit: what is counted, in the plural.
        what: the command and its subject, for instance "packing train".
        done: units that an earlier run did. They count as progress, but not for the rate.
    """

    def __init__(self, total: int, unit: str = "images", what: str = "", done: int = 0):
        self.total, self.unit, self.what, self.done = total, unit, what, done
        self._begin, self._start = done, 0.0
        self._line = Line(sys.stderr)

    def add(self, count: int) -> None:
        """`count` more units are done."""
        self.done += count
        if not self._start:  # the rate counts from here, without the start of the processes
            self._begin, self._start = self.done, time.monotonic()
        if self._line.due():
            self._line.show(self.line())

    def line(self) -> str:
        """The text of the line."""
        rate = (self.done - self._begin) / max(time.monotonic() - self._start, 1e-3)
        of = f"/{self.total:,}" if self.total else ""
        what = f"{self.what} " if self.what else ""
        text = f"{what}{self.done:,}{of} {self.unit}"
        if rate:
            text += f" {rate:,.0f}" if rate >= 10 else f" {rate:,.1f}"
            text += f" {self.unit}/s"
            if self.total:
                text += f" ETA {duration(max(self.total - self.done, 0) / rate)}"
        return text

    def close(self) -> None:
        """Clear the line on a terminal."""
        self._line.clear()
