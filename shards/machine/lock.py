"""One writer per folder: a lock that holds on all hosts of a shared file system, and ends with its process.

In: the path of a lock file. Out: that file, locked as long as it is open, or an InputError that names the holder.
"""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import time
from typing import TextIO

from shards.errors import EXIT_STOPPED, InputError

WAIT_SECONDS = 60.0  # for the lock of a job that has ended; less than ranks wait for rank 0


class StillLocked(InputError):
    """A job that has ended still holds the lock. Exit code 75: the job scripts requeue."""

    exit_code = EXIT_STOPPED


def hold(path: str, folder: str, instead: str) -> TextIO:
    """Lock `path`, which protects `folder`; closing the returned file ends the lock.

    If the file system has no locks (Lustre without flock: ENOSYS, NFS: ENOLCK), print a warning and go on.

    Raises:
        InputError: another process uses the folder; `instead` is the option that names another folder.
        StillLocked: the lock is that of a job that has ended (its node was lost), and was not freed in time.
        OSError: the file cannot be written.
    """
    file = open(path, "a+", encoding="utf-8")
    end = 0.0
    while not _try(file, folder):
        file.seek(0)
        owner = file.read().strip() or "another process"
        if not end:
            if not has_ended(owner):
                raise InputError(f"{folder} is in use by {owner}; wait for it, or choose another {instead}")
            end = time.monotonic() + WAIT_SECONDS
            print(
                f"warning: {folder} is still locked by {owner}, which has ended; waiting up to {WAIT_SECONDS:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() > end:
            raise StillLocked(
                f"{folder} is still locked by {owner}, which has ended: the file server has not noticed; "
                f"run the same command again later, or delete {path}"
            )
        time.sleep(min(1.0, WAIT_SECONDS / 10))
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", 0)
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}, restart {restart}' if job else ''}\n"
    )
    file.flush()
    return file


def _try(file: TextIO, folder: str) -> bool:
    """Whether the lock is ours now, or the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # any other error means that there are no locks here
            return False
        print(
            f"warning: no file locks in {folder} ({error.strerror}): do not run two jobs in it at once", file=sys.stderr
        )
    return True


def has_ended(owner: str) -> bool:
    """Whether `owner` (text of a lock file) is an earlier attempt of this Slurm job, or a job that has ended."""
    found, mine = re.search(r", Slurm job (\d+), restart (\d+)$", owner), os.environ.get("SLURM_JOB_ID")
    if not found or not mine:
        return False
    if found[1] == mine:
        # In elastic training the other ranks go on, in the same attempt, when the node of rank 0 is lost.
        elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        return elastic or int(found[2]) < int(os.environ.get("SLURM_RESTART_COUNT", 0))
    try:
        # Ask for both jobs: if the answer has ours but not the other, the other has ended.
        command = ["squeue", "--noheader", f"--jobs={found[1]},{mine}", "--format=%A %t"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return False
    states = dict(line.split() for line in lines)
    return mine in states and states.get(found[1], "PD") in ("PD", "CG")  # pending, completing
