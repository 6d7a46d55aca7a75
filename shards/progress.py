"""How far a long command is: one line that is rewritten on a terminal, else a line every ten seconds, on stderr.

In: how many units there are, and how many more are done. Several processes: one of them adds up for all.
"""

import sys
import time

LINE_SECONDS = 10.0  # between two lines in a batch log or a pipe
BAR_SECONDS = 0.2  # between two states of the line on a terminal


class Progress:
    """`HH:MM:SS what 12,345/1,281,167 images 562 images/s ETA 0:38:00`.

    Args:
        total: units there are, those of `done` included; 0: not known.
        unit: what is counted, in the plural.
        what: the command and its subject, for instance "packing train".
        done: units that an earlier run did. They count as progress and not for the rate.
    """

    def __init__(self, total: int, unit: str = "images", what: str = "", done: int = 0):
        self.total, self.unit, self.what, self.done = total, unit, what, done
        self._begin, self._start = done, 0.0
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """`count` more units are done."""
        now = time.monotonic()
        self.done += count
        if not self._start:  # the rate counts from the first units on: starting the processes is left out
            self._begin, self._start = self.done, now
        if now - self._shown >= (BAR_SECONDS if self._terminal else LINE_SECONDS):
            self._shown = now
            start, end = ("\r", "\033[K") if self._terminal else ("", "\n")
            print(start + self.line(), end=end, file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state now."""
        rate = (self.done - self._begin) / max(time.monotonic() - self._start, 1e-3)
        of = f"/{self.total:,}" if self.total else ""
        what = f"{self.what} " if self.what else ""
        text = f"{time.strftime('%H:%M:%S')} {what}{self.done:,}{of} {self.unit}"
        if rate:
            text += f" {rate:,.0f}" if rate >= 10 else f" {rate:,.1f}"
            text += f" {self.unit}/s"
            if self.total:
                text += f" ETA {_clock(max(self.total - self.done, 0) / rate)}"
        return text

    def close(self) -> None:
        """Clear the line on a terminal; what the command has done is its own to say."""
        if self._terminal and self._start:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
