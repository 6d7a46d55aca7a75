"""The errors of this project: one line that says what is wrong with an option or a file, and how to fix it.

`shards.command.run` prints an `InputError` once for all ranks of a job and exits with its code.
"""

import difflib
import os
from collections.abc import Iterable

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT

_LONGEST_MESSAGE = 1000  # characters of an error; a longer one is shortened in its middle


NOT_INSTALLED = (
    "{} is not installed for {}; in the repository, bash slurm/install.sh sets up all packages and . slurm/activate.sh "
    "activates them"
)


class InputError(Exception):
    """Bad usage or bad input. The message is one line: what is wrong, where, and how to fix it.

    `everywhere`: all ranks of the job find the same error (a wrong option, a missing folder), so only rank 0 prints it.
    An error that only one rank may find (a damaged shard) is raised with everywhere=False.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(short(printable(" ".join(message.split())), _LONGEST_MESSAGE))
        self.everywhere = everywhere


def see(row: str) -> str:
    """The end of a message about the machine: the row of the doctor's report that says more."""
    return f"(python -m job.doctor, row `{row}`)"


def printable(text: str) -> str:
    """Text with escapes for what cannot be printed: names in an archive may hold control codes of a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short(text: str, most: int = 60) -> str:
    """`text` shortened to `most` characters: names and values in the data can have any length."""
    end = most // 3
    return text if len(text) <= most else f"{text[: most - end - 3]}...{text[len(text) - end :]}"


def few(words: Iterable[str], most: int = 6, separator: str = " ") -> str:
    """The first `most` words of a list, each shortened, and the number of the others."""
    words = list(words)
    more = f"{separator}and {len(words) - most:,} more" if len(words) > most else ""
    return separator.join(short(word, 40) for word in words[:most]) + more


def positive_number(variable: str, default: float) -> float:
    """Value of an environment variable. Raises InputError if it is not a number above 0."""
    text = os.environ.get(variable) or str(default)
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise InputError(f"{variable} is {text!r} in the environment; it must be a number above 0, or unset")


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """`; did you mean X?` for the known word most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
