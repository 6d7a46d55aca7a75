"""What all commands share: argument parser, output, exit code.

In: argv and a main function. Out: an exit code; for an error one line on stderr, from one rank of a job.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from shards.errors import EXIT_INTERRUPTED, NOT_INSTALLED, InputError, nearest
from shards.machine.launcher import launched_rank

_RANK0_SPEAKS_SECONDS = 15.0  # a silent rank waits so long for rank 0 to find the same error and end the job


class Parser(argparse.ArgumentParser):
    """argparse that raises InputError, and suggests the nearest option for an unknown one."""

    def __init__(self, *args, **kwargs):
        # The meaning of an abbreviation would change with a new option.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message} ({self.prog} --help lists the options)")

    def parse_args(self, args=None, namespace=None):
        """As in argparse, with the nearest option in the message for an unknown one."""
        commands = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *itertools.chain.from_iterable(commands)]
        options = [s for p in parsers for a in p._actions for s in a.option_strings if s.startswith("--")]
        # First of all: argparse would complain that SOURCE is missing, not that there is no such option.
        words = itertools.takewhile(lambda word: word != "--", sys.argv[1:] if args is None else args)
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
        if not unknown:
            parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0]
            what = "option" if word.startswith("-") else "argument"
            self.error(f"unknown {what} {word}{nearest(word.partition('=')[0], options)}")
        return parsed


def say_commands(package: str, commands: dict[str, str]) -> None:
    """Print the commands of a package, name -> what it does. Raises InputError for words on the command line."""
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    if words:
        if words[0] in commands:
            raise InputError(f"commands are written with a dot: python -m {package}.{words[0]}")
        raise InputError(f"no command {words[0]}{nearest(words[0], list(commands))}; python -m {package} lists them")
    print(f"usage: python -m {package}.COMMAND ...\n")
    width = max(map(len, commands)) + len(f"python -m {package}.")
    for name, what in commands.items():
        print(f"{f'python -m {package}.{name}':<{width}}  {what}")
    print("\nEach explains its options with --help.")


def drop_output() -> None:
    """Discard what is printed from now on: the reader of our output (head, less) has ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _missing_packages_are_errors(main: Callable[[], int | None]) -> int:
    """Run `main`. A package that this Python lacks is an InputError: mostly, no environment is active."""
    try:
        return main() or 0
    except ModuleNotFoundError as error:
        if (error.name or "job").partition(".")[0] in ("job", "shards"):
            raise
        raise InputError(NOT_INSTALLED.format(error.name, sys.executable)) from None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a command and exit with its code. InputError: one line from one rank, exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for names that the locale cannot show
    try:
        code = _missing_packages_are_errors(main)
        sys.stdout.flush()
    except InputError as error:
        if not error.everywhere or launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif "PMI_FD" not in os.environ or {"mpi4py.MPI", "horovod.torch"} & sys.modules.keys():
            # The launcher ends all ranks as soon as one has failed, so rank 0 must have printed the error before. (That
            # of MPICH and Intel MPI waits for ranks that have not called MPI_Init.)
            time.sleep(_RANK0_SPEAKS_SECONDS)
        code = error.exit_code
    except BrokenPipeError:  # the reader of our output has ended
        drop_output()
        code = 1
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    sys.exit(code)
