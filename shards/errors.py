"""What every command of this project shares: its error, its exit codes, its argument parser.

A user's mistake is an `InputError`; `run` turns it into one line on stderr, once for all ranks of a job, and exit
code 2.
"""

import argparse
import difflib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT

# Where a launcher tells a process its rank, before MPI or Horovod is initialised.
_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")

_LONGEST_MESSAGE = 1000  # characters of an error; what exceeds it is taken out of its middle

_RANK0_SPEAKS_SECONDS = 15.0  # that a silent rank waits for rank 0 to find the same error and end the job


class InputError(Exception):
    """Bad usage or bad input. The message is one line: what is wrong, where, and how to mend it.

    `everywhere` says that all ranks of the job find the same error (a wrong option, a missing folder), so that only
    rank 0 need speak. An error that one rank alone meets (a damaged shard) is raised with everywhere=False.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(short(printable(" ".join(message.split())), _LONGEST_MESSAGE))
        self.everywhere = everywhere


def printable(text: str) -> str:
    """Text with what is not printable written as an escape: names in an archive may hold a terminal's control codes,
    or bytes that are no text."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short(text: str, most: int = 60) -> str:
    """`text` in at most `most` characters: names and values in the data can have any length."""
    end = most // 3
    return text if len(text) <= most else f"{text[: most - end - 3]}...{text[len(text) - end :]}"


def few(words: Iterable[str], most: int = 6, separator: str = " ") -> str:
    """The first words of a list, each shortened, and the number of the others."""
    words = list(words)
    more = f"{separator}and {len(words) - most:,} more" if len(words) > most else ""
    return separator.join(short(word, 40) for word in words[:most]) + more


def positive_number(variable: str, default: float) -> float:
    """Value of an environment variable. Raises InputError when it is no number above 0."""
    text = os.environ.get(variable) or str(default)
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise InputError(f"{variable} is {text!r} in the environment; it must be a number above 0, or not set")


def launched_rank() -> int:
    """Rank of this process as its launcher (horovodrun, mpirun, srun) numbered it; 0 without one."""
    for variable in _RANK_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit():
            return int(value)
    return 0


# How many processes a launcher has started, the innermost launcher first, and what that is called.
_SIZE_VARIABLES = {
    "HOROVOD_SIZE": "horovodrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
    "MV2_COMM_WORLD_SIZE": "the launcher of MVAPICH",
    "PMI_SIZE": "mpirun of MPICH or Intel MPI",
    "SLURM_STEP_NUM_TASKS": "srun",  # set in a step alone, not in a batch script or in salloc's shell
}


def lone_process(size: int, library: str) -> str:
    """What to say when a launcher started several processes and each believes to be alone; empty: all is well.

    Args:
        size: the number of processes that `library` (Horovod, mpi4py) sees.
    """
    set_here = {name: os.environ[name] for name in _SIZE_VARIABLES if os.environ.get(name, "").isdigit()}
    name, count = next(iter(set_here.items()), ("", "1"))
    if size > 1 or count == "1":
        return ""
    if name == "PMI_SIZE" and set_here.get("SLURM_STEP_NUM_TASKS") == count:  # srun --mpi=pmi2
        name = "SLURM_STEP_NUM_TASKS"
    launcher = _SIZE_VARIABLES[name]
    advice = (
        f"use the mpirun of the MPI that {library} was built with, or build it for this MPI: "
        "bash slurm/install.sh --rebuild"
    )
    if launcher == "srun":
        advice = (
            f"use srun --mpi=pmix (srun --mpi=list shows what this cluster has), or mpirun -np {count} in its place; "
            "for one process use srun -n 1"
        )
    return f"{launcher} started {count} processes, and {library} sees one, so each would do all of the work; {advice}"


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """`; did you mean X?` for the known word most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors, and which names the nearest option for an unknown one."""

    def __init__(self, *args, **kwargs):
        # Abbreviated options would change meaning when a new option is added.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the options)")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            commands = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            parsers = [self, *itertools.chain.from_iterable(commands)]
            options = [s for p in parsers for a in p._actions for s in a.option_strings if s.startswith("--")]
            word = unknown[0]
            what = "option" if word.startswith("-") else "argument"
            self.error(f"unknown {what} {word}{nearest(re.split('=', word)[0], options)}")
        return parsed


def drop_output() -> None:
    """Nobody reads our output any more (head and less end early): whatever is printed from now on goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main and leave with its exit code. InputError: one line from one rank, exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # in a locale without the characters of some name
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        if not error.everywhere or launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif "PMI_FD" not in os.environ or {"mpi4py.MPI", "horovod.torch"} & sys.modules.keys():
            # The launcher ends all ranks as soon as one has failed: rank 0 must have spoken before that. (That of MPICH
            # and Intel MPI leaves the others alone as long as they have not called MPI_Init.)
            time.sleep(_RANK0_SPEAKS_SECONDS)
        code = error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        drop_output()
        code = 1
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    sys.exit(code)
