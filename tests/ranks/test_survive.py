"""What a run survives: signals, kills, ranks that hang, full disks, a second job, and files made to do harm."""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from job.ranks import heartbeat
from tests.launch import ROOT, error_lines, horovodrun, metrics, python, run

SMALL = ["--recipe", "demo", "--model.width", "0.0625", "--eval-every", "0", "--log-every", "1", "--workers", "0"]
LONG = ["--epochs", "1000"]  # longer than any test


class Job:
    """A running `horovodrun -np 2 python -m job.train`, in a process group of its own like a terminal's foreground."""

    def __init__(self, data, out, *options, gloo=False, **environment):
        launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
        command = [launcher, "-np", "2", *(["--gloo"] if gloo else []), sys.executable, "-m", "job.train"]
        command += [*SMALL, "--data", str(data), "--out", str(out), *options]
        self.out = out
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | environment,
        )  # fmt: skip
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.text += line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in [*self.below(), psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(20)
        self._reader.join(20)

    def below(self):
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def ranks(self):
        """The ranks' processes by rank."""
        found = {}
        for process in self.below():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                rank = variables.get("OMPI_COMM_WORLD_RANK", variables.get("HOROVOD_RANK"))
                if rank is not None and "job.train" in process.cmdline() and "python" in process.name():
                    found[int(rank)] = process
        return found

    def steps(self):
        try:
            return sum(b'"train"' in line for line in (self.out / "metrics.jsonl").read_bytes().splitlines())
        except OSError:
            return 0

    def until(self, condition, what, seconds=120, pause=0.01):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.poll()} before {what}\n{self.text}"
            assert time.monotonic() < end, f"{what} did not happen in {seconds} s\n{self.text}"
            time.sleep(pause)

    def ended(self, seconds):
        """Exit code, when all is over."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {seconds} s\n{self.text}") from None
        self._reader.join(20)
        return code


def newest_step(out):
    return max((int(p.stem[5:]) for p in (out / "checkpoints").glob("step-*.pt")), default=0)


def final_weights(out):
    return torch.load(out / "checkpoints" / f"step-{newest_step(out):08d}.pt", weights_only=True)


@pytest.mark.long
@pytest.mark.parametrize("gloo", [False, True], ids=["mpi", "gloo"])
@pytest.mark.parametrize("how", ["ctrl-c", "usr1-one-rank"])
def test_a_request_to_stop_ends_with_a_checkpoint_and_exit_code_75(demo_data, tmp_path, gloo, how):
    every = 5 if gloo else 1  # a stop waits for the next average of the ranks
    averages = ["--parallel", "weights", "--average-every", "5"] if gloo else []
    with Job(demo_data, tmp_path / "run", *LONG, *averages, gloo=gloo) as job:
        job.until(lambda: job.steps() > 3, "training")
        asked = time.monotonic()
        if how == "ctrl-c":  # a terminal sends it to all of its foreground group
            os.killpg(job.process.pid, signal.SIGINT)
        else:
            job.ranks()[1].send_signal(signal.SIGUSR1)
        assert job.ended(30) == 75, job.text
        assert time.monotonic() - asked < 15
    assert "Traceback" not in job.text and not [line for line in job.text.splitlines() if line.startswith("error")]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["steps"] == newest_step(tmp_path / "run") > 3
    assert summary["steps"] % every == 0
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_a_stop_at_the_end_of_an_epoch_loses_no_validation(demo_data, tmp_path):
    out, options = tmp_path / "run", ["--global-batch", "3000", "--epochs", "3", "--eval-every", "1"]  # a step an epoch
    command = [sys.executable, "-m", "job.train", *SMALL, "--data", str(demo_data), "--out", str(out), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "validation:" in line)
        process.send_signal(signal.SIGUSR1)
        process.stdout.read()
    assert process.returncode == 75 and newest_step(out) == 2
    assert [line["step"] for line in metrics(out, "val")] == [1]
    again = python(*command[2:])
    assert again.returncode == 0, again.stderr
    assert [(line["step"], line["epoch"]) for line in metrics(out, "val")] == [(1, 0), (2, 1), (3, 2)]


@pytest.mark.long
def test_a_stop_ends_a_running_validation_which_is_made_up_for(demo_data, tmp_path):
    out, options = tmp_path / "run", ["--global-batch", "3000", "--epochs", "2", "--eval-every", "1"]  # a step an epoch
    arguments = [*SMALL, "--data", str(demo_data), "--out", str(out), *options]
    code = """
import os, signal, time
from job import train
from job.run import loop
from shards.command import run
whole = loop.validate
def validate(*arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
    while not arguments[-1]():
        time.sleep(0.01)  # the thread that takes signals in tells nobody
    return whole(*arguments)
loop.validate = validate
run(train.main)
"""
    stopped = run(sys.executable, "-c", code, *arguments)
    assert stopped.returncode == 75 and newest_step(out) == 1, stopped.stdout + stopped.stderr
    assert not metrics(out, "val") and final_weights(out)["owed"]
    again = run(sys.executable, "-c", code, *arguments)  # stopped in the validation that it owes
    assert again.returncode == 75 and not metrics(out, "val") and final_weights(out)["owed"], again.stderr
    done = python("job.train", *arguments)
    assert done.returncode == 0, done.stderr
    assert [(line["step"], line["epoch"]) for line in metrics(out, "val")] == [(1, 0), (2, 1)]


def test_a_second_request_ends_at_once_even_when_the_first_cannot_be_met(demo_data, tmp_path):
    with Job(demo_data, tmp_path / "run", *LONG) as job:
        job.until(lambda: job.steps() > 3, "training")
        job.ranks()[1].suspend()
        job.process.send_signal(signal.SIGTERM)
        time.sleep(2.5)  # signals that come closer together are taken for one request
        assert job.process.poll() is None
        job.process.send_signal(signal.SIGTERM)
        assert job.ended(15) not in (0, 75)


@pytest.mark.long
def test_kills_at_random_moments_change_no_bit_of_the_result(demo_data, tmp_path):
    """Twenty times a rank gets SIGKILL: while starting, while training, while a checkpoint is written."""
    options = ["--max-steps", "160", "--global-batch", "16", "--checkpoint-every", "1", "--model.dropout", "0.5"]
    done = horovodrun(2, "job.train", *SMALL, "--data", str(demo_data), "--out", str(tmp_path / "whole"), *options)
    assert done.returncode == 0, done.stderr
    out, draw = tmp_path / "killed", random.Random(6)
    moments = ["start"] * 3 + ["write"] * 5 + ["step"] * 12
    draw.shuffle(moments)
    in_writes = 0
    for moment in moments:
        with Job(demo_data, out, *options) as job:
            victim = 0 if moment == "write" else draw.randrange(2)
            if moment == "start":
                job.until(lambda: len(job.ranks()) == 2, "the start of the ranks")
                time.sleep(draw.uniform(0, 3))
                ranks = job.ranks()
            else:
                before, more = newest_step(out), draw.randint(1, 8)
                job.until(lambda b=before, m=more: newest_step(out) >= b + m, "training")
                ranks = job.ranks()
                if moment == "write":
                    job.until(lambda: any((out / "checkpoints").glob("*.tmp")), "a write", pause=0)
                else:
                    time.sleep(draw.uniform(0, 0.1))
            ranks[victim].kill()
            assert job.ended(60) != 0
            in_writes += any((out / "checkpoints").glob("*.tmp"))
    assert in_writes >= 1
    with Job(demo_data, out, *options) as job:
        assert job.ended(120) == 0, job.text
    whole, killed = final_weights(tmp_path / "whole"), final_weights(out)
    assert whole["step"] == killed["step"] == 160
    for part in ("model", "velocity"):
        assert all(torch.equal(whole[part][name], killed[part][name]) for name in whole[part])
    losses = {line["step"]: line["loss"] for line in metrics(out, "train")}
    assert losses == {line["step"]: line["loss"] for line in metrics(tmp_path / "whole", "train")}
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_job_and_is_named(demo_data, tmp_path):
    """Stopped: rank 1 under MPI, rank 0 under Gloo; and a reader process of rank 1, its rank being well."""
    cases = {"mpi": (False, 1, "0"), "gloo": (True, 0, "0"), "reader": (False, 1, "1")}
    with contextlib.ExitStack() as stack:
        jobs = {
            name: stack.enter_context(Job(demo_data, tmp_path / name, *LONG, "--workers", workers, gloo=gloo))
            for name, (gloo, _, workers) in cases.items()
        }
        for job in jobs.values():
            job.until(lambda job=job: job.steps() > 3, "training")
        stopped = time.monotonic()
        for name, job in jobs.items():
            rank = job.ranks()[cases[name][1]]
            target = (
                next(p for p in rank.children() if "job.batches.reader" in p.cmdline()) if name == "reader" else rank
            )
            target.suspend()
        for name, job in jobs.items():
            code = job.ended(90 - (time.monotonic() - stopped))
            host = os.uname().nodename
            (line,) = [line for line in job.text.splitlines() if line.startswith("error: ")]
            assert f"rank {cases[name][1]} on {host}" in line, job.text
            if name == "reader":  # the loader tells of it, before the others lose patience
                assert code == 2 and "no image came for 50 s" in line and ".tar" in line, job.text
                continue
            assert code == 1 and "no sign of life" in line, job.text
            assert metrics(tmp_path / name, "event")[-1]["event"] == "hang"


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_noted_too_when_gloo_gives_up_before_the_heartbeat(demo_data, tmp_path):
    """Slurm's script starts a job again that has noted a hang."""
    soon = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "5", "HOROVOD_STOP_SECONDS": "5"}  # 30, 40
    with Job(demo_data, tmp_path / "run", *LONG, gloo=True, **soon) as job:
        job.until(lambda: job.steps() > 1, "training")
        job.ranks()[1].suspend()
        assert job.ended(60) == 1, job.text
    (line,) = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert f"rank 1 on {os.uname().nodename} has given no sign of life" in line, job.text
    assert metrics(tmp_path / "run", "event")[-1]["event"] == "hang"


@pytest.mark.long
@pytest.mark.parametrize("gloo", [False, True], ids=["mpi", "gloo"])
def test_ranks_do_not_outlive_a_launcher_that_was_killed(demo_data, tmp_path, gloo):
    with Job(demo_data, tmp_path / "run", *LONG, gloo=gloo) as job:
        job.until(lambda: job.steps() > 1, "training")
        ranks = list(job.ranks().values())
        assert len(ranks) == 2
        job.process.kill()
        assert not psutil.wait_procs(ranks, 20)[1]


def test_slow_is_not_hanging(monkeypatch):
    clock, value, place = [1000.0], [0], ["train.py:1, train"]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(heartbeat, "_main_thread", lambda: (place[0] or "train.py:9", None if place[0] else 1))
    heartbeat.watch(lambda: value[0], lambda reason: None)
    own = heartbeat._Own()

    def passes(seconds):
        clock[0] += seconds
        return own.hangs()

    assert not passes(500)  # start-up, the first batch
    value[0] += 1
    assert not passes(50)
    for _ in range(3):  # steps of half a minute, then one of two minutes
        value[0] += 1
        assert not passes(30)
    assert not passes(60)
    value[0] += 1
    assert not passes(1)
    place[0] = ""  # waiting for other ranks
    assert not passes(10_000)
    place[0] = "checkpoint.py:1, wait"  # a slow disk
    assert not passes(300)
    value[0] += 1
    assert not passes(1)
    place[0] = "loader.py:1, _wait"
    assert passes(601)
    monkeypatch.setattr(heartbeat, "_progress", None)


def may_mount():
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def in_private_mounts(script, *arguments):
    return subprocess.run(
        ["unshare", "-m", "bash", "-euc", script, "bash", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.skipif(not may_mount(), reason="no right to mount a small file system")
def test_a_full_disk_does_not_end_training_but_is_told_and_ends_with_an_error(demo_data, tmp_path):
    script = """
    mkdir "$1/full" && mount -t tmpfs -o size=1900k tmpfs "$1/full"; shift
    "${@:2}" && code=0 || code=$?
    cp -r "$1/full/run" "$1/kept"; exit $code
    """
    command = [sys.executable, "-m", "job.train", *SMALL, "--data", demo_data, "--out", tmp_path / "full" / "run"]
    command += ["--max-steps", "30", "--checkpoint-every", "5"]
    done = in_private_mounts(script, tmp_path, tmp_path, *command)
    assert done.returncode == 1 and "step 30/30" in done.stdout, done.stdout + done.stderr
    assert len([line for line in done.stderr.splitlines() if "checkpoint of step" in line]) >= 4
    assert len(error_lines(done)) == 1 and "could not be written" in error_lines(done)[0]
    assert "Traceback" not in done.stderr
    kept = tmp_path / "kept" / "checkpoints"
    assert {p.name for p in kept.glob("step-*.pt")} == {"step-00000005.pt", "step-00000010.pt"}
    for path in kept.glob("step-*.pt"):
        torch.load(path, weights_only=True)
    for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.skipif(not may_mount(), reason="no right to mount a folder read-only")
def test_a_folder_that_becomes_read_only_does_not_end_training(demo_data, tmp_path):
    script = """
    folder=$1; shift
    "$@" & pid=$!
    while [ ! -e "$folder"/step-00000005.pt ]; do sleep 0.01; done
    mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder"
    wait $pid
    """
    out = tmp_path / "run"
    command = [sys.executable, "-m", "job.train", *SMALL, "--data", demo_data, "--out", out]
    done = in_private_mounts(script, out / "checkpoints", *command, "--max-steps", "200", "--checkpoint-every", "5")
    assert done.returncode == 1 and "step 200/200" in done.stdout, done.stdout + done.stderr
    assert "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    assert len(error_lines(done)) == 1 and "could not be written" in error_lines(done)[0]
    torch.load(next((out / "checkpoints").glob("step-*.pt")), weights_only=True)


@pytest.mark.long
def test_two_jobs_do_not_share_a_run_directory_and_a_crash_leaves_no_lock(demo_data, tmp_path):
    out = tmp_path / "run"
    with Job(demo_data, out, *LONG, "--checkpoint-every", "5") as job:
        job.until(lambda: newest_step(out) >= 5, "a checkpoint")
        second = python("job.train", *SMALL, "--data", str(demo_data), "--out", str(out), *LONG)
        first = job.ranks()[0].pid
        assert second.returncode == 2 and f"process {first} on {os.uname().nodename}" in second.stderr
        assert len(error_lines(second)) == 1
        for process in job.ranks().values():
            process.kill()
        assert job.ended(60) != 0
    step = newest_step(out)
    third = python(
        "job.train", *SMALL, "--data", str(demo_data), "--out", str(out), *LONG, "--max-steps", f"{step + 2}"
    )
    assert third.returncode == 0 and f"from step {step + 1} to" in third.stdout, third.stdout + third.stderr


@pytest.mark.long
def test_a_slow_rank_is_named(demo_data, tmp_path):
    with Job(demo_data, tmp_path / "run", *LONG, "--log-every", "40") as job:
        job.until(lambda: job.steps() > 1, "training")
        rank = job.ranks()[1]
        end = time.monotonic() + 90
        while "slower than the median" not in job.text and time.monotonic() < end:
            rank.suspend()
            time.sleep(0.08)
            rank.resume()
            time.sleep(0.02)
        assert f"rank 1 on {os.uname().nodename} is" in job.text, job.text
    (event,) = [line for line in metrics(tmp_path / "run", "event") if line["event"] == "slow rank"][:1]
    assert event["rank"] == 1 and event["slower"] > 0.2


def test_traces_and_the_text_file_for_prometheus(demo_data, tmp_path):
    out, prom = tmp_path / "run", tmp_path / "train.prom"
    options = ["--max-steps", "12", "--timeline", "--profile", "3", "--metrics.textfile", str(prom)]
    done = python("job.train", *SMALL, "--data", str(demo_data), "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    events = json.loads((out / "profile.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)
    assert "ALLREDUCE" in (out / "timeline.json").read_text()
    samples = dict(line.rsplit(" ", 1) for line in prom.read_text().splitlines() if not line.startswith("#"))
    assert samples[f'alexnet_train_step{{run="{out}"}}'] == "12"
    assert all(line.startswith("# TYPE alexnet_train_") for line in prom.read_text().splitlines() if line[0] == "#")


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_made_to_do_harm_is_refused(demo_data, tmp_path):
    evil, harm = tmp_path / "evil.pt", tmp_path / "harm"
    for write in (lambda: torch.save({"format": 1, "model": Harm(str(harm))}, evil),
                  lambda: evil.write_bytes(pickle.dumps(Harm(str(harm))))):  # fmt: skip
        write()
        for command in (["job.train", *SMALL, "--resume", str(evil), "--out", str(tmp_path / "run")],
                        ["job.evaluate", str(evil)]):  # fmt: skip
            done = python(*command, "--data", str(demo_data))
            assert done.returncode == 2 and len(error_lines(done)) == 1, done.stdout + done.stderr
            assert "Traceback" not in done.stderr and not harm.exists()


@pytest.mark.parametrize("gloo", [False, True], ids=["mpi", "gloo"])
def test_odd_names_the_users_umask_and_no_secret(demo_data, tmp_path, gloo):
    data = tmp_path / "d a't\"a $(touch x); é"
    shutil.copytree(demo_data, data)
    out = tmp_path / 'r u\'n "$HOME" ; é'
    options = ["--recipe", "demo", "--model.width", "0.0625", "--max-steps", "3", "--eval-every", "0", "--workers", "1"]
    before = os.umask(0o027)
    try:
        launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
        command = [launcher, "-np", "2", "--verbose", *(["--gloo"] if gloo else []), sys.executable, "-m", "job.train"]
        done = subprocess.run(
            [*command, *options, "--data", str(data), "--out", str(out), "--metrics.textfile", str(out / "train.prom")],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "x").exists()
    files = [out, *out.rglob("*")]
    assert len(files) > 8
    for path in files:
        assert path.stat().st_mode & 0o027 == 0, path
    assert "SECRET_KEY=" not in done.stdout + done.stderr


def test_ranks_listen_on_this_hosts_own_interface_only(demo_data, tmp_path):
    with Job(demo_data, tmp_path / "run", *LONG, gloo=True) as job:  # Open MPI listens everywhere, and is not ours
        job.until(lambda: job.steps() > 1, "training")
        listening = {
            c.laddr[:2]
            for rank in job.ranks().values()
            for c in rank.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        }
        assert {address for address, _ in listening} == {"127.0.0.1"}
        # A stranger gets no answer, and disturbs nobody.
        for address in listening:
            with socket.create_connection(address) as stranger:
                stranger.sendall(b"!" * 100)
        step = job.steps()
        job.until(lambda: job.steps() > step + 5, "more training")
