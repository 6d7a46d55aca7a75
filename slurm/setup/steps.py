"""The steps of slurm/install.sh, run by the Python of the environment that it sets up. Standard library only.

In: the options of install.sh, and what is on PATH. Out: an environment in which horovodrun works, or one line that says
what is missing (exit code 2) or what failed (exit code 1). The output of pip and the compiler goes to a log.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import shell
from build_horovod import patch_command
from check_ranks import step_check
from compilers import check_compiler, check_python_headers
from find_mpi import check_mpicxx, likely_mpi
from install_horovod import step_horovod
from packages import SETUP, distribution, step_packages, step_torch
from shell import REPOSITORY, Failed, Missing, say


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options that install.sh passes on. Raises Missing if a value is invalid."""
    parser = argparse.ArgumentParser(prog="install.sh", allow_abbrev=False)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--start", type=float, default=shell.START)
    parser.add_argument("--cuda", default=os.environ.get("INSTALL_CUDA") or "auto")
    parser.add_argument("--mpi", default=os.environ.get("INSTALL_MPI") or "auto")
    parser.add_argument("--extras", default="plots,export")
    parser.add_argument("--rebuild", action="store_true")
    options = parser.parse_args(arguments)
    for name, known in (("cuda", ("auto", "yes", "no")), ("mpi", ("auto", "system", "wheel"))):
        if getattr(options, name) not in known:
            raise Missing(f"--{name} {getattr(options, name)}: it must be one of {', '.join(known)}")
    options.extras = [extra for extra in options.extras.split(",") if extra]
    for extra in options.extras:
        if extra not in SETUP["EXTRAS"]:
            raise Missing(f"--extras {extra}: setup.py has {', '.join(SETUP['EXTRAS'])}")
    return options


def step_tools(choice: str) -> None:
    """Look for what a build of Horovod needs, before the large downloads. `choice` is --mpi. Raises Missing."""
    if distribution("horovod") or shutil.which("horovodrun"):
        return  # it may be kept
    compiler = check_compiler(distribution("torch") or SETUP["TORCH_PIN"].partition("==")[2])
    check_python_headers()
    patch_command()
    mpi = likely_mpi(choice)
    if mpi:
        check_mpicxx(mpi)
    say(f"tools: {compiler}; MPI: {mpi.version if mpi else 'none of this machine'}")


def step_decoder() -> None:
    """Compile the JPEG decoder now if there is a compiler, because compute nodes may have none."""
    code = "from shards.read import fastjpeg; print(fastjpeg.missing())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    reason = " ".join(done.stdout.split()) if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
    say(f"JPEG decoder: shards/read/jpeg.c is {f'not used ({reason})' if reason else 'compiled'}")


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    shell.START = options.start
    shell.LOG = options.cache / "install.log"
    shell.LOG.write_text(f"{time.ctime()} {sys.executable}\n")
    say(f"python: {sys.version.split()[0]}, {sys.executable}; log: {shell.LOG}")
    step_tools(options.mpi)
    torch = step_torch()
    step_packages(options.extras, torch)
    step_decoder()
    step_check(step_horovod(options, torch, options.cache))
    say(f"done. In a new shell first: . {REPOSITORY}/slurm/activate.sh")


def stopped(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)  # shell.wait() then ends the running pip or compiler


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stopped)
    try:
        main(sys.argv[1:])
    except (Missing, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Missing) else 1)
    except KeyboardInterrupt as request:
        print("error: stopped; run it again, completed steps are kept", file=sys.stderr)
        sys.exit(128 + (request.args or [signal.SIGINT])[0])
    except OSError as error:  # for instance a full disk
        print(f"error: {error.strerror}: {error.filename or shell.LOG}", file=sys.stderr)
        sys.exit(1)
