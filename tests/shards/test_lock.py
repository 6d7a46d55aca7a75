"""One writer per folder: who is refused at once, who waits for a lost node's lock, and file systems without locks."""

import errno
import fcntl
import multiprocessing
import os

import pytest

from job.run import log as runlog
from shards import command
from shards.errors import InputError
from shards.machine import lock

SQUEUE = "#!/bin/sh\nprintf '%s' \"$SQUEUE_SAYS\"\n"


def _hold_until(path: str, owner: str, ready, release) -> None:
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(owner)
        file.flush()
        ready.set()
        release.wait(60)


@pytest.fixture
def held(tmp_path):
    """held(owner): another process locks tmp_path/lock in the name of `owner`; the event returned frees it."""
    context, started = multiprocessing.get_context("fork"), []

    def hold(owner: str):
        ready, release = context.Event(), context.Event()
        process = context.Process(target=_hold_until, args=(str(tmp_path / "lock"), owner, ready, release))
        process.start()
        started.append((process, release))
        assert ready.wait(20)
        return release

    yield hold
    for process, release in started:
        release.set()
        process.join(20)


@pytest.fixture
def as_job(monkeypatch, tmp_path):
    """as_job(7, restart=1, squeue="7 R"): this process is of that Slurm job, and squeue answers so."""

    def become(job: int, restart: int = 0, squeue: str | None = None, elastic: bool = False) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setenv("HOROVOD_ELASTIC", "1" if elastic else "0")
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        if squeue is not None:
            (programs / "squeue").write_text(SQUEUE)
            (programs / "squeue").chmod(0o755)
        monkeypatch.setenv("SQUEUE_SAYS", squeue or "")
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin" if squeue is not None else str(programs))

    return become


FIRST = "process 5 on n1, Slurm job 7, restart 0"


@pytest.mark.parametrize(
    ("owner", "job", "restart", "squeue", "elastic", "ended"),
    [
        (FIRST, 7, 1, None, False, True),  # requeued after its node was lost
        (FIRST, 7, 0, None, False, False),  # two runs in one allocation
        (FIRST, 7, 0, None, True, True),  # elastic: rank 0 was lost, the job goes on
        (FIRST, 8, 0, "8 R\n", False, True),  # Slurm knows the other no longer
        (FIRST, 8, 0, "7 CG\n8 R\n", False, True),
        (FIRST, 8, 0, "7 PD\n8 R\n", False, True),  # requeued itself, not yet running
        (FIRST, 8, 0, "7 R\n8 R\n", False, False),
        (FIRST, 8, 0, "7 S\n8 R\n", False, False),
        (FIRST, 8, 0, "", False, False),  # Slurm does not answer
        (FIRST, 8, 0, None, False, False),  # no squeue
        ("process 5 on n1", 8, 3, "8 R\n", False, False),
        ("", 8, 3, "8 R\n", False, False),
    ],
)
def test_who_holds_a_lock_after_its_end(as_job, owner, job, restart, squeue, elastic, ended):
    as_job(job, restart, squeue, elastic)
    assert lock.has_ended(owner) is ended


def test_a_live_run_is_refused_at_once(held, as_job, tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("it waits"))
    as_job(7)
    held(FIRST)
    with pytest.raises(InputError, match=f"is in use by {FIRST}; wait for it, or choose another --out") as raised:
        lock.hold(str(tmp_path / "lock"), str(tmp_path), "--out")
    assert raised.value.exit_code == 2


def test_a_requeued_job_waits_for_the_lock_of_its_lost_node(held, as_job, tmp_path, monkeypatch, capsys):
    release = held(FIRST)
    as_job(7, restart=1)
    monkeypatch.setattr(lock.time, "sleep", lambda _: release.set())
    with lock.hold(str(tmp_path / "lock"), str(tmp_path), "--out"):
        assert (
            tmp_path / "lock"
        ).read_text() == f"process {os.getpid()} on {os.uname().nodename}, Slurm job 7, restart 1\n"
    assert capsys.readouterr().err.count(f"warning: {tmp_path} is still locked by {FIRST}") == 1


def test_a_lock_that_is_never_freed_ends_with_the_code_that_is_requeued(held, as_job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)
    held(FIRST)
    as_job(7, restart=1)
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: lock.hold(str(tmp_path / "lock"), str(tmp_path), "--out"))
    assert ended.value.code == 75
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"delete {tmp_path}/lock" in errors[0]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_gives_one_warning(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(runlog, "_locks", {})
    runlog.lock(str(tmp_path), "--out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"no file locks in {tmp_path} ({os.strerror(code)})" in lines[0]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_both_codes_of_a_lock_in_use_are_known(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(InputError, match="in use"):
        lock.hold(str(tmp_path / "lock"), str(tmp_path), "--out")
