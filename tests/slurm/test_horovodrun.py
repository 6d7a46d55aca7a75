"""What horovodrun does once slurm/setup/patches are applied: exit codes, signals, output, hosts and login shells."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

import check_ranks
import packages
from tests.launch import run

RANKS = """
import os, signal, sys, time
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or os.environ["HOROVOD_RANK"])
requests = {signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, requests)  # they wait until they are asked for
if "PMI_FD" in os.environ:
    from mpi4py import MPI  # MPICH ends the others only where a rank that called MPI_Init is lost
if sys.argv[1] == "wait":
    os.write(1, b"ready\\n")  # at once: MPICH mixes the pieces of lines
    signal.sigwait(requests)
    time.sleep(2)  # a checkpoint
    print("checkpoint of rank", rank, flush=True)
    os._exit(75)
if rank == 1:
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("error: rank 1 has it", file=sys.stderr, flush=True)
    (os._exit if int(sys.argv[1]) else sys.exit)(int(sys.argv[1]))
print("line of rank 0", flush=True)
if sys.argv[1] != "0":
    signal.sigwait(requests)
"""

ours = pytest.mark.skipif(
    "+alexnet." not in packages.distribution("horovod"), reason="this Horovod was not built by slurm/install.sh"
)


@pytest.fixture
def ranks(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = shutil.which("horovodrun", path=os.path.dirname(sys.executable)) or "horovodrun"
    return lambda controller, what: [launcher, controller, "-np", "2", sys.executable, str(tmp_path / "ranks.py"), what]


@ours
@pytest.mark.parametrize("controller", ["--mpi", "--gloo"])
@pytest.mark.parametrize(("what", "code"), [("0", 0), ("2", 2), ("75", 75), ("3", 3), ("kill", 137)])
def test_horovodrun_hands_on_the_exit_code_and_adds_little(ranks, controller, what, code):
    start = time.monotonic()
    done = run(*ranks(controller, what), timeout=60)
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert "Traceback" not in text and "non-zero" not in text
    if what == "0":
        assert done.stdout.splitlines() == ["line of rank 0"]
    if what != "kill":
        assert done.stderr.splitlines()[0] == "error: rank 1 has it"
    # 2 and 75 say it all; of another end the launcher says which rank it was.
    named = re.search(r"\brank (0, )?1\b", text.replace("rank 1 has it", ""))
    assert bool(named) == (what in ("3", "kill")), text
    assert time.monotonic() - start < 60


@ours
@pytest.mark.parametrize("controller", ["--mpi", "--gloo"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_to_stop_reaches_the_ranks_and_they_have_time(ranks, controller, number):
    process = subprocess.Popen(ranks(controller, "wait"), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "ready\n" == process.stdout.readline()
        process.send_signal(number)
        text = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75
    # The first rank that leaves ends the others: only its line is certain.
    assert "checkpoint of rank" in text


@ours
def test_ranks_do_not_outlive_a_killed_launcher(ranks):
    for controller in ("--mpi", "--gloo"):
        process = subprocess.Popen(
            ranks(controller, "2000"), stdout=subprocess.PIPE, text=True, env=os.environ | {"HOROVOD_STOP_SECONDS": "1"}
        )
        process.kill()
        # The pipe is closed when the last of them has gone.
        process.communicate(timeout=60)


@ours
def test_a_batch_job_of_one_task_and_a_home_that_cannot_be_written_do_not_matter():
    # As `salloc -n1` and Jupyter set them.
    host = os.uname().nodename
    env = dict.fromkeys(("SLURM_JOBID", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS"), "1")
    env |= {"SLURM_NODELIST": host, "SLURM_JOB_NODELIST": host, "SLURM_JOB_NUM_NODES": "1", "HOME": "/proc"}
    launcher = shutil.which("horovodrun", path=os.path.dirname(sys.executable)) or "horovodrun"
    done = run(launcher, "-np", "3", "sh", "-c", "echo rank of job $SLURM_JOB_ID", env=env, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines() == ["rank of job 1"] * 3, done.stdout + done.stderr


@ours
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("controller", ["--mpi", "--gloo"])
def test_a_host_that_does_not_know_its_own_name(controller, tmp_path):
    (tmp_path / "sum.py").write_text(check_ranks.ALLREDUCE)
    launcher = shutil.which("horovodrun", path=os.path.dirname(sys.executable)) or "horovodrun"
    command = f"hostname nobody-knows; exec {launcher} {controller} -np 2 {sys.executable} {tmp_path}/sum.py"
    done = run("unshare", "--uts", "sh", "-c", command, timeout=90)
    assert done.returncode == 0 and "ALLREDUCE" in done.stdout, done.stdout + done.stderr


@ours
@pytest.mark.parametrize("shell", ["sh", "bash", "tcsh", "csh"])
def test_a_command_reaches_the_ranks_through_any_login_shell(shell):
    from horovod.runner.util.remote import for_any_shell

    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    for value in ("a b", "it's", "wh!at", "$HOME `ls`", "two\nlines", '"', "back\\slash \\n", "100%s", "\u00e9"):
        command = for_any_shell(f"cd / > /dev/null 2>&1 ; exec env X={shlex.quote(value)} printenv X")
        assert run(shell, "-c", command).stdout == value + "\n"


@ours
def test_hydras_report_becomes_an_exit_code():
    from horovod.runner import mpi_run

    rule = b"=" * 83 + b"\n"
    box = rule + b"=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   EXIT CODE: 9\n" + rule
    tail = b"YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n"
    for status, code in ((b"[vm:0] 9,512", 2), (b"[vm] 0,9", 137), (b"[a:0] 0 [b:1] 768,9", 3)):
        source, target = os.pipe()
        os.write(
            target, b"== a line\n\r 10 %" + b"\n" + box + tail + b"[mpiexec@vm] Exit codes: " + status + b"\n[1] x"
        )
        os.close(target)
        seen, codes = _Bytes(), []
        mpi_run._forward_hydra(source, seen, codes)
        os.close(source)
        assert seen.data == b"== a line\n\r 10 %\n[1] x"
        assert mpi_run._reason(codes) == code


@ours
def test_a_rank_whose_shell_has_not_begun_is_ended_too(monkeypatch):
    import psutil
    from horovod.runner.common.util import safe_shell_exec

    monkeypatch.setattr(psutil.Process, "name", lambda process: "sh")  # as in the moment before the shell becomes it
    process = subprocess.Popen(["sleep", "600"])
    safe_shell_exec.terminate_executor_shell_and_children(process.pid)
    assert process.wait(10) == -signal.SIGTERM


@ours
def test_mpiruns_other_words_pass_unchanged():
    from horovod.runner import mpi_run

    rule = b"-" * 74 + b"\n"
    report = b"prterun detected that one or more processes exited with non-zero status,\nthus ...\n\n"
    report += b"   Process name: [prterun-host-12@1,3]\n   Exit code:    %d\n"
    other = rule + b"There are not enough slots available\n" + rule
    for text, expected in [
        (b"error: x\n" + rule + report % 2 + rule, b"error: x\n"),
        (rule + report % 9 + rule + b"after\n", b"horovodrun: rank 3 ended with exit code 9\nafter\n"),
        (other + b"--- a line that begins like one\nno end", other + b"--- a line that begins like one\nno end"),
        (rule + report % 2, rule + report % 2),
        (b"\r 10 %\r 20 %" + rule, b"\r 10 %\r 20 %" + rule),
    ]:
        for size in (1, 7, len(text)):  # however the bytes arrive
            source, target = os.pipe()
            seen = _Bytes()
            child = os.fork()
            if child == 0:
                os.close(source)
                for start in range(0, len(text), size):
                    os.write(target, text[start : start + size])
                os._exit(0)
            os.close(target)
            mpi_run._forward(source, seen)
            os.close(source)
            os.waitpid(child, 0)
            assert seen.data == expected


class _Bytes:
    data = b""

    def write(self, data):
        self.data += data

    def flush(self):
        pass
