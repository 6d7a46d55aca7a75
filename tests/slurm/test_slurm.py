"""The job scripts on a real Slurm cluster of this machine (tests/cluster.py): they start ranks with every launcher, and
a training run goes on, with nothing lost, through time limits, preemption, requeues and lost nodes."""

import fcntl
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster import Cluster, ClusterError
from tests.launch import ROOT, metrics, python

pytestmark = pytest.mark.slurm

# Seconds after which this Slurm requeues the jobs of a silent node. The ranks and launchers are to notice it before.
LOST_AFTER = 75
# A small network; every step is told; validation has tests of its own.
SMALL = "--recipe demo --model.width 0.3 --global-batch 16 --model.dropout 0 --workers 1".split()
SMALL += "--eval-every 0 --log-every 1".split()
# Steps of a run that is to be interrupted: some seconds on a fast machine.
MANY, ENDLESS = 80, 100_000


@pytest.fixture(scope="module")
def cluster(request):
    with Cluster(4, lost_after=LOST_AFTER) as cluster:
        refused = f" (namespaces are refused: {cluster.refused})" if cluster.refused else ""
        line = f"Slurm cluster of 4 nodes, form {cluster.form}{refused}"
        request.config.pluginmanager.get_plugin("terminalreporter").write_line(line)
        yield cluster


@pytest.fixture(scope="module")
def hosts(cluster):
    """The cluster, where its nodes are hosts with names and addresses of their own."""
    if cluster.form != "hosts":
        pytest.skip(f"needs nodes that are hosts of their own; here: {cluster.refused}")
    return cluster


@dataclass
class Job:
    """A submitted slurm/train.sh, its log and its run directory."""

    cluster: Cluster
    number: int
    log: Path
    out: Path

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def steps(self) -> list[int]:
        """Steps told so far in metrics.jsonl."""
        try:
            return [line["step"] for line in metrics(self.out, "train")]
        except (OSError, ValueError):  # not there yet, or a line that is being written
            return []

    def wait_step(self, step: int, seconds: float = 90) -> None:
        def reached() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}\n{self.text()}"
            return max(self.steps(), default=0) >= step

        self.cluster.wait_for(reached, f"step {step} of job {self.number}", seconds)

    def wait_end(self, state: str, seconds: float = 120) -> dict[str, str]:
        """Wait for the job's end, which must be `state`; what Slurm says of it."""
        job = self.cluster.wait_state(self.number, "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL", seconds)
        assert job["JobState"] == state, f"{job}\n{self.text()}"
        return job

    def assert_complete(self, steps: int) -> None:
        """The run is done, and every step is told exactly once, whatever came between."""
        assert self.steps() == list(range(1, steps + 1)), self.text()
        assert metrics(self.out, "event")[-1]["event"] == "done"


def ranks_of(out: Path) -> dict[str, psutil.Process]:
    """The ranks of the run in folder `out`, one a node, by node."""
    found = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            if process.name().startswith("python") and {"job.train", str(out)} <= set(process.cmdline()):
                if {"HOROVOD_RANK", "PMIX_RANK"} & set(variables):
                    found[variables.get("HOROVOD_HOSTNAME") or variables["SLURMD_NODENAME"]] = process
        except psutil.Error:  # ended meanwhile
            continue
    return found


@pytest.fixture
def submit(cluster, demo_data, tmp_path):
    """Submit slurm/train.sh: submit("-N2", steps=9, more=["--seed", "1"], LAUNCHER="srun")."""
    jobs = []

    def submit(*sbatch: str, steps: int = MANY, more: list[str] = (), name: str = "run", **env: str) -> Job:
        log, out = tmp_path / f"{name}.log", tmp_path / name
        options = [
            *SMALL,
            "--data",
            str(demo_data),
            "--out",
            str(out),
            "--epochs",
            "1000",
            "--max-steps",
            str(steps),
            *more,
        ]
        words = ["-o", str(log), *sbatch, str(ROOT / "slurm/train.sh"), *options]
        # The interface is for horovodrun; the others are to find each other without.
        nic = {"NETWORK_INTERFACE": "eth0"} if env.get("LAUNCHER") == "horovodrun" else {}
        jobs.append(Job(cluster, cluster.sbatch(*words, cwd=tmp_path, env={**nic, **env}), log, out))
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.run("scancel", "--signal=KILL", "--full", str(job.number), check=False)
        cluster.run("scancel", str(job.number), check=False)


# Ranks and nodes.


@pytest.fixture(scope="module")
def losses():
    """Losses of the first job that ran, for the others to compare with."""
    return []


@pytest.mark.parametrize(("nodes", "tasks"), [(1, 2), pytest.param(4, 1, marks=pytest.mark.long)])
def test_training_is_the_same_on_1_and_4_nodes(cluster, submit, losses, nodes, tasks):
    job = submit(f"-N{nodes}", f"--ntasks-per-node={tasks}", steps=6)
    job.wait_end("COMPLETED")
    job.assert_complete(6)
    assert metrics(job.out, "event")[0]["world_size"] == nodes * tasks
    assert f"{nodes * tasks} ranks on {nodes} nodes by mpirun" in job.text()
    losses.append([line["loss"] for line in metrics(job.out, "train")])
    assert losses[-1] == pytest.approx(losses[0], rel=1e-4)


def test_ranks_follow_the_gpus_of_a_node_and_are_bound_to_cores_of_their_own(cluster, submit, tmp_path):
    show, log = tmp_path / "show.sh", tmp_path / "log"
    show.write_text(
        '#!/bin/bash\nrepository=$1; source "$repository/slurm/lib/launch.sh"; find_launcher mpirun\n'
        '"${launch[@]}" grep Cpus_allowed_list /proc/self/status\n'
    )
    words = ["-o", str(log), "-N1", "--exclusive", "--gpus-per-node=2", str(show), str(ROOT)]
    cluster.wait_state(cluster.sbatch(*words, cwd=tmp_path), "COMPLETED", 60)
    assert "2 ranks on 1 nodes" in log.read_text() and "and 1 GPUs" in log.read_text()
    cores = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("Cpus_allowed_list")]
    assert len(cores) == 2 and (cores[0] != cores[1] or os.cpu_count() == 1), log.read_text()


def test_sbatch_accepts_the_scripts(cluster):
    for script in ("train.sh", "pack.sh", "install.sh"):
        done = cluster.run("sbatch", "--test-only", "--cpus-per-task=1", str(ROOT / "slurm" / script), "SOURCE", "DEST")
        assert "to start at" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck_has_nothing_to_say():
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tests/*.sh"), *ROOT.glob("job/*.sh")]
    done = subprocess.run(
        ["shellcheck", "-x", "--exclude=SC1091", *scripts], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_packing_over_two_nodes(cluster, tmp_path):
    log, dest = tmp_path / "log", tmp_path / "my shards"
    words = ["-o", str(log), "-N2", "--ntasks-per-node=1", str(ROOT / "slurm/pack.sh")]
    number = cluster.sbatch(*words, str(ROOT / "shards/demo"), str(dest), "--resize", "76", cwd=tmp_path)
    job = cluster.wait_state(number, "COMPLETED FAILED", 90)
    assert job["JobState"] == "COMPLETED", log.read_text()
    assert "2 ranks on 2 nodes" in log.read_text()
    done = cluster.run(sys.executable, "-m", "shards.verify", str(dest), cwd=ROOT)
    assert "3,000" in done.stdout and "600" in done.stdout


@pytest.mark.long
def test_staged_shards_are_read_from_the_nodes_own_disk(hosts, submit, demo_data, tmp_path):
    data = tmp_path / "shards of 'mine'"
    shutil.copytree(demo_data, data)
    job = submit("-N2", steps=2, more=["--data", str(data)], STAGE="1", LAUNCHER="srun")
    job.wait_end("COMPLETED")
    folder = next(word for word in job.text().split() if word.startswith("/run/tmp/shards-"))
    assert f"data {folder}" in job.text()
    for node in ("n1", "n2"):
        there = set(hosts.run("ls", folder, host=node).stdout.splitlines())
        assert there == {path.name for path in data.iterdir() if path.is_file()}


# Mistakes are told in one line, with exit code 2.


@pytest.mark.parametrize(
    ("env", "more", "error"),
    [
        ({"LAUNCHER": "mpiexec"}, [], "error: LAUNCHER=mpiexec is not one of mpirun, srun, horovodrun"),
        ({"LAUNCHER": "srun", "SRUN_MPI": "none"}, [], "error: no launcher works on n"),
        ({"STAGE": "1"}, ["--data", "/no/such"], "error: STAGE=1: no folder --data /no/such"),
        ({}, ["--sed", "1"], "error: unknown option --sed; did you mean --seed?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(submit, env, more, error):
    job = submit("-N2", more=more, **env)
    assert job.wait_end("FAILED", 60)["ExitCode"] == "2:0", job.text()
    errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(error), job.text()


# Through interruptions to the end.


@pytest.fixture(scope="module")
def interrupted(hosts, demo_data, tmp_path_factory):
    """Jobs that run side by side, for they wait most of the time, each struck as soon as it has made two steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    shared, jobs = ["--partition=shared", "-x", "n4"], {}
    nodes = {"mpirun": "n1,n2", "srun": "n2,n3", "horovodrun": "n1,n3"}

    def submit(
        name: str, *sbatch: str, steps: int = MANY, more: tuple[str, ...] = (), log: str = "", **env: str
    ) -> Job:
        options = [*SMALL, "--workers", "0", "--data", str(demo_data), "--out", str(folder / name), "--epochs", "1000"]
        words = ["-J", name, "-o", str(folder / f"{name}.log"), *shared, *sbatch, str(ROOT / "slurm/train.sh")]
        number = hosts.sbatch(*words, *options, "--max-steps", str(steps), *more, cwd=folder, env=env)
        return Job(hosts, number, folder / f"{name}.log", folder / name)

    for launcher, where in nodes.items():
        env = {"LAUNCHER": launcher, "NETWORK_INTERFACE": "eth0" if launcher == "horovodrun" else ""}
        jobs[launcher] = submit(launcher, "-N2", "-w", where, **env)
    for launcher in ("mpirun", "srun"):
        jobs["scancel", launcher] = submit(
            f"scancel-{launcher}", "-N2", "-w", nodes[launcher], steps=ENDLESS, LAUNCHER=launcher
        )
    array = submit("array-%a", "--array=0-1", more=("--seed", "1%a"), LAUNCHER="srun")
    for i in (0, 1):
        log, out = (Path(str(path).replace("%a", str(i))) for path in (array.log, array.out))
        jobs["array", i] = Job(hosts, f"{array.number}_{i}", log, out)
    once = {"MAX_REQUEUES": "0", "LAUNCHER": "srun"}
    jobs["chain", 1], jobs["chain", 2] = (submit("chain", "--dependency=singleton", **once) for _ in "12")
    to_strike = [key for key in jobs if key not in (("array", 0), ("chain", 2))]

    def struck() -> bool:
        for key in list(to_strike):
            if max(jobs[key].steps(), default=0) >= 2:
                signal_it = [] if key[0] == "scancel" else ["--batch", "--signal=USR1"]
                hosts.run("scancel", *signal_it, str(jobs[key].number))
                to_strike.remove(key)
        return not to_strike

    try:
        hosts.wait_for(struck, "two steps of each job", 180)
    except ClusterError as error:
        raise AssertionError("\n".join([str(error), *(f"{key}\n{jobs[key].text()}" for key in to_strike)])) from None
    yield jobs
    for job in jobs.values():
        hosts.run("scancel", str(job.number), check=False)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["mpirun", "srun", "horovodrun"])
def test_a_signal_requeues_the_job_and_no_step_is_lost(interrupted, losses, launcher):
    job = interrupted[launcher]
    assert job.wait_end("COMPLETED")["Restarts"] == "1", job.text()
    job.assert_complete(MANY)
    assert [line["event"] for line in metrics(job.out, "event")] == ["start", "stopped", "start", "done"]
    assert f"2 ranks on 2 nodes by {launcher}" in job.text()
    losses.append([line["loss"] for line in metrics(job.out, "train")][:6])
    assert losses[-1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.long
def test_one_task_of_an_array_is_requeued_and_the_other_is_not(interrupted):
    for i in (0, 1):
        task = interrupted["array", i]
        assert task.wait_end("COMPLETED")["Restarts"] == str(i)
        task.assert_complete(MANY)
        assert f"seed: 1{i}\n" in (task.out / "config.yaml").read_text()


@pytest.mark.long
def test_parts_in_a_chain_where_requeueing_is_not_wanted(interrupted):
    first, second = interrupted["chain", 1], interrupted["chain", 2]
    assert first.wait_end("FAILED")["ExitCode"] == "75:0"
    assert second.wait_end("COMPLETED")["Restarts"] == "0"
    second.assert_complete(MANY)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_scancel_leaves_a_checkpoint_and_does_not_requeue(interrupted, launcher):
    job = interrupted["scancel", launcher]
    assert job.wait_end("CANCELLED", 40)["Restarts"] == "0"
    job.cluster.wait_for(lambda: metrics(job.out, "event")[-1]["event"] == "stopped", "the end of the run", 20)
    assert (job.out / "checkpoints" / f"step-{job.steps()[-1]:08d}.pt").exists()


@pytest.mark.long
def test_a_signal_while_shards_are_copied_requeues_the_job(cluster, submit, demo_data, tmp_path):
    """The copy is held up by another one to the same folder, until the job has stopped."""
    digest = hashlib.sha256(f"{os.path.realpath(demo_data)}\n".encode()).hexdigest()[:12]
    folder = tmp_path / f"shards-{pwd.getpwuid(os.geteuid()).pw_name}-{digest}"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        job = submit("-N1", steps=2, STAGE="1", SCRATCH=str(tmp_path), LAUNCHER="srun")
        cluster.wait_for(lambda: "another job is copying" in job.text(), "the copy", 60)
        cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
        cluster.wait_for(lambda: "stopped; requeueing" in job.text(), "the requeue", 60)
    assert job.wait_end("COMPLETED")["Restarts"] == "1", job.text()
    job.assert_complete(2)
    assert f"data {folder}" in job.text()


@pytest.mark.long
def test_a_job_that_may_not_be_requeued_says_so(cluster, submit):
    job = submit("-N1", "--no-requeue", steps=ENDLESS, LAUNCHER="srun")
    job.wait_step(1)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.wait_end("FAILED")["ExitCode"] == "75:0"
    assert "Slurm does not requeue this job" in job.text()


@pytest.mark.long
def test_preemption_requeues_the_job(hosts, submit):
    job = submit("-N1", "--exclusive", LAUNCHER="srun")
    job.wait_step(2)
    hosts.sbatch("--partition=urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    assert job.wait_end("COMPLETED")["Restarts"] == "1", job.text()
    job.assert_complete(MANY)


@pytest.fixture(scope="module")
def limited(cluster, demo_data, tmp_path_factory):
    """A job on node n4 that meets its time limit of a minute, which passes while other tests run."""
    folder = tmp_path_factory.mktemp("limited")
    options = [
        *SMALL,
        "--data",
        str(demo_data),
        "--out",
        str(folder / "run"),
        "--epochs",
        "1000",
        "--max-steps",
        str(ENDLESS),
    ]
    words = ["-o", str(folder / "log"), "-w", "n4", "--time=1", "--signal=B:USR1@45", str(ROOT / "slurm/train.sh")]
    job = Job(cluster, cluster.sbatch(*words, *options, cwd=folder), folder / "log", folder / "run")
    yield job
    cluster.run("scancel", str(job.number), check=False)


@pytest.mark.long
def test_a_vanished_node_and_a_stopped_rank_end_the_job_in_time_and_it_goes_on(hosts, limited, submit):
    """A node vanishes under three launchers, a rank on another is stopped under two: all name the rank and its host.

    The ranks' patience is half of the usual: what the launchers take for themselves is as it is for users.
    """
    tiny = ["--model.width", "0.0625", "--workers", "0"]
    common = {"steps": ENDLESS, "more": tiny, "HEARTBEAT_PATIENCE": "0.5"}
    # This one goes on afterwards, on other nodes.
    goes_on = submit("--partition=shared", "-N2", "-x", "n4", name="goes on", LAUNCHER="mpirun", **common)
    nodelist = hosts.wait_state(goes_on.number, "RUNNING", 30)["NodeList"]
    first, lost = hosts.run("scontrol", "show", "hostnames", nodelist).stdout.split()
    third = ({"n1", "n2", "n3"} - {first, lost}).pop()
    jobs = {("vanish", "mpirun"): goes_on}
    for fault, launcher in [("vanish", "srun"), ("vanish", "horovodrun"), ("stop", "srun"), ("stop", "horovodrun")]:
        nodes = f"--nodelist={first},{lost if fault == 'vanish' else third}"
        submitted = submit("--partition=shared", "-N2", nodes, name=f"{fault} {launcher}", LAUNCHER=launcher,
                           MAX_REQUEUES="0", **common)  # fmt: skip
        jobs[fault, launcher] = submitted
    for job in jobs.values():
        job.wait_step(2)
    began = time.monotonic()
    for (fault, _), job in jobs.items():
        if fault == "stop":
            ranks_of(job.out)[third].suspend()
    hosts.power_off(lost)

    def ended(fault: str, job: Job) -> bool:
        return (
            f"lost {lost} (rank 1); " in job.text() if fault == "vanish" else "a rank hung; not requeued" in job.text()
        )

    took = {}
    while len(took) < len(jobs):
        for case, job in jobs.items():
            if case not in took and ended(case[0], job):
                took[case] = time.monotonic() - began
        assert time.monotonic() - began < 90, f"{took}\n" + "\n".join(job.text() for job in jobs.values())
        time.sleep(0.2)
    print("seconds to the end of the job:", {" ".join(case): round(seconds) for case, seconds in took.items()})
    for (fault, launcher), job in jobs.items():
        if (fault, launcher) != ("vanish", "mpirun"):  # mpirun itself notices before the ranks do
            named = lost if fault == "vanish" else third
            assert f"error: rank {int(first < named)} on {named} has given no sign of life" in job.text(), job.text()
    # For elastic training: the nodes that answer.
    nodelist = {"SLURM_JOB_NODELIST": "n[1-4]", "RANKS_PER_NODE": "2"}
    answering = hosts.run(str(ROOT / "slurm/elastic_hosts.sh"), env=nodelist).stdout.split()
    assert answering == [f"{name}:2" for name in hosts.names if name != lost]
    before = goes_on.steps()[-1]
    goes_on.wait_step(before + 2)
    assert goes_on.steps() == list(range(1, len(goes_on.steps()) + 1)) and hosts.job(goes_on.number)["Restarts"] == "1"
    assert lost not in hosts.run("scontrol", "show", "hostnames", hosts.job(goes_on.number)["NodeList"]).stdout
    hosts.power_on(lost)
    hosts.wait_for(lambda: hosts.node_state(lost) == "idle", "the node is back", 60)


@pytest.mark.long
def test_the_time_limit_requeues_the_job(cluster, limited):
    cluster.wait_for(lambda: cluster.job(limited.number)["Restarts"] != "0", "requeue at the time limit", 90)
    assert "stopped; requeueing" in limited.text()
    stopped = metrics(limited.out, "event")[1]
    assert stopped["event"] == "stopped" and stopped["signal"] == "SIGUSR1"
    limited.wait_step(stopped["step"] + 2)
    steps = limited.steps()
    assert steps == list(range(1, len(steps) + 1))


# Elastic training: no restart at all.


class Elastic:
    """A `horovodrun --host-discovery-script` over the nodes n1 to n3, started on n1; a context manager."""

    def __init__(self, cluster: Cluster, out: Path, *options: str):
        self.cluster, self.out, self.log = cluster, out, out.with_suffix(".log")
        command = "horovodrun -np 3 --min-np 2 --network-interface eth0 --blacklist-cooldown-range 2 10".split()
        command += ["--host-discovery-script", str(ROOT / "slurm/elastic_hosts.sh"), sys.executable, "-m", "job.train"]
        env = {"SLURM_JOB_NODELIST": "n[1-3]", "RANKS_PER_NODE": "1", "GLOBAL_BATCH": "24"}
        # Short for a machine, long for Gloo: a healthy rank answers in milliseconds.
        env |= {"HOROVOD_GLOO_TIMEOUT_SECONDS": "6", "HOROVOD_ELASTIC_MISSED_SECONDS": "6"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                cluster.command(*command, *options, "--out", str(out), cwd=ROOT, host="n1"),
                env=cluster.environment(**env), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __enter__(self) -> "Elastic":
        return self

    def __exit__(self, *_) -> None:
        for process in ranks_of(self.out).values():
            process.kill()
        self.process.kill()
        self.process.wait(20)

    def starts(self) -> list[dict]:
        """What was written when training began, and each time that it went on with other ranks."""
        try:
            return [line for line in metrics(self.out, "event") if line["event"] == "start"]
        except OSError:
            return []

    def wait(self, condition, what: str, seconds: float = 120) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, f"ended before {what}\n{self.log.read_text()}"
            return condition()

        try:
            self.cluster.wait_for(reached, what, seconds)
        except ClusterError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def wait_start(self, ranks: list[int]) -> None:
        """Wait until training has begun or gone on, with so many ranks each time, and then for some steps more."""
        self.wait(lambda: [start["world_size"] for start in self.starts()] == ranks, f"starts with {ranks} ranks")
        self.wait(lambda: max(self.steps(), default=0) > self.starts()[-1]["step"] + 7, "steps")

    def steps(self) -> list[int]:
        try:
            return [line["step"] for line in metrics(self.out, "train")]
        except (OSError, ValueError):
            return []


@pytest.mark.long
def test_elastic_training_goes_on_without_a_host_and_takes_it_back(hosts, demo_data, tmp_path):
    """A host vanishes and returns, then a rank of it is stopped: the others go on, with the same batches.

    A low rate, for rounding would grow at a high one: then losses tell batches apart, by about a hundredth.
    """
    options = [*SMALL, "--optim.lr", "0.001", "--workers", "0", "--global-batch", "24", "--data", str(demo_data)]
    options += ["--epochs", "1000"]
    with Elastic(hosts, tmp_path / "run", *options, "--max-steps", str(ENDLESS), "--commit-every", "5") as job:
        job.wait_start([3])
        # Not n1, where horovodrun is; rank 0 where that can be.
        owner = (job.out / ".lock").read_text().split()[3]
        lost = owner if owner != "n1" else "n3"
        before, began = job.steps()[-1], time.monotonic()
        hosts.power_off(lost)
        job.wait_start([3, 2])
        print(f"vanished host: {time.monotonic() - began:.0f} s to the next steps")
        assert before - 5 <= job.starts()[-1]["step"] <= before + 1 and job.starts()[-1]["after"] == "a rank was lost"
        began = time.monotonic()
        hosts.power_on(lost)
        job.wait_start([3, 2, 3])
        print(f"returned host: {time.monotonic() - began:.0f} s to the next steps")
        began = time.monotonic()
        ranks_of(job.out)[lost].suspend()
        job.wait_start([3, 2, 3, 2])
        print(f"stopped rank: {time.monotonic() - began:.0f} s to the next steps")
        assert f"on {lost} has not come back for 6 s" in job.log.read_text()
        ranks_of(job.out)["n1"].send_signal(signal.SIGUSR1)
        assert job.process.wait(40) == 75, job.log.read_text()
        steps, losses = job.steps(), [line["loss"] for line in metrics(job.out, "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert [line["event"] for line in metrics(job.out, "event")][-1] == "stopped"
    # The same batches as one rank alone has.
    alone = python("job.train", *options, "--out", str(tmp_path / "alone"), "--max-steps", str(len(steps)))
    assert alone.returncode == 0, alone.stderr
    expected = [line["loss"] for line in metrics(tmp_path / "alone", "train")]
    assert losses == pytest.approx(expected, rel=1e-4)
    hosts.wait_for(lambda: hosts.node_state(lost) == "idle", "the node is back", 60)


def test_the_discovery_script_prints_no_more_ranks_than_divide_the_batch(hosts):
    def printed(batch: str) -> list[str]:
        env = {"SLURM_JOB_NODELIST": "n[1-3]", "RANKS_PER_NODE": "2", "GLOBAL_BATCH": batch}
        return hosts.run(str(ROOT / "slurm/elastic_hosts.sh"), env=env).stdout.split()

    assert printed("") == printed("24") == ["n1:2", "n2:2", "n3:2"]
    assert printed("256") == ["n1:2", "n2:2"]
    assert printed("15") == ["n1:2", "n2:2", "n3:1"]


# The cluster of the tests itself.


@pytest.mark.long
def test_nodes_without_namespaces_train_too_and_leave_nothing(demo_data, tmp_path):
    with Cluster(2, form="simple") as simple:
        assert sorted(simple.run("srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME").stdout.split()) == ["n1", "n2"]
        options = [*SMALL, "--data", str(demo_data), "--out", str(tmp_path / "run"), "--max-steps", "3"]
        words = ["-o", str(tmp_path / "log"), "-N2", str(ROOT / "slurm/train.sh"), *options]
        job = Job(simple, simple.sbatch(*words, cwd=tmp_path), tmp_path / "log", tmp_path / "run")
        job.wait_end("COMPLETED")
        job.assert_complete(3)
        root = simple.root
    assert not root.exists() and not _processes_of(root)


def test_a_killed_test_run_leaves_no_process(tmp_path):
    code = "import sys, time\nfrom tests.cluster import Cluster\n"
    code += "cluster = Cluster(1, form=sys.argv[1])\nprint(cluster.root, flush=True)\ntime.sleep(600)"
    for form in ("auto", "simple"):
        owner = subprocess.Popen([sys.executable, "-c", code, form], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        root = Path(owner.stdout.readline().strip())
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with Cluster(1, form=form) as cluster:  # cleans up what the other could not
            assert not root.exists()
            cluster.wait_for(lambda root=root: not _processes_of(root), "the end of all its processes", 10)


def _processes_of(root: Path) -> list[str]:
    mark, found = f"SLURM_CONF={root}/".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append((path.parent / "cmdline").read_text())
        except OSError:
            continue
    return found
