"""Which cores a process may use, and how many readers a rank gets: as affinity, Slurm and cgroups give them."""

import contextlib
import os
import subprocess
import sys

import psutil
import pytest

from job.batches.workers import default_workers, worker_cores
from shards.machine import cores
from shards.machine.cores import Cores, cores_given
from tests.launch import ROOT

OPEN_MPI = "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"


@pytest.fixture
def machine(monkeypatch):
    """A machine of 32 cores, all in the affinity mask, without limits; `set` changes it."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "HOROVOD_", "MPI_", "MV2_")):
            monkeypatch.delenv(name)

    def set(affinity=range(32), total=32, cpuset=None, quota=None, **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: frozenset(affinity))
        monkeypatch.setattr(os, "cpu_count", lambda: total)
        monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
        monkeypatch.setattr(cores, "_cpuset", lambda: cpuset)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    set()
    return set


def given(count, *mask):
    return Cores(count, tuple(*mask))


def srun(tasks, rank, **more):
    """What srun tells a task."""
    return {"SLURM_STEP_ID": 0, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": rank, "SLURM_PROCID": rank, **more}


def mpirun(size, rank, **more):
    return {**dict(zip(OPEN_MPI, (size, rank), strict=True)), **more}


UNCONFINED = {"affinity": range(64), "total": 64}  # 64 cores in the mask, whatever the job was given
MACHINES = {
    "one process alone": ({}, given(32, range(32))),
    "in a container's set": ({"affinity": range(8, 16), "cpuset": 8}, given(8, range(8, 16))),
    # Ranks of one node.
    "ranks share a mask: horovodrun over Gloo": (
        {"HOROVOD_LOCAL_SIZE": 4, "HOROVOD_LOCAL_RANK": 1},
        given(8, range(8, 16)),
    ),
    "ranks share a mask: Open MPI": (mpirun(4, 3), given(8, range(24, 32))),
    "ranks share a mask: MPICH, Intel MPI": ({"MPI_LOCALNRANKS": 4, "MPI_LOCALRANKID": 0}, given(8, range(8))),
    "ranks share a mask: MVAPICH": (
        {"MV2_COMM_WORLD_LOCAL_SIZE": 4, "MV2_COMM_WORLD_LOCAL_RANK": 0},
        given(8, range(8)),
    ),
    "ranks share a mask: srun": (srun(4, 2), given(8, range(16, 24))),
    "ranks share a container's set": (mpirun(4, 1, affinity=range(8), total=64, cpuset=8), given(2, [2, 3])),
    "more ranks than cores": (mpirun(4, 3, affinity=range(2), total=2), given(1)),
    "ranks are bound": (mpirun(4, 1, affinity=range(8, 16)), given(8, range(8, 16))),
    "a launcher without a local rank": ({"MPI_LOCALNRANKS": 4}, given(8)),
    # Slurm.
    "part of a node, shared by four ranks": (
        mpirun(4, 3, affinity=range(16), total=64, SLURM_CPUS_ON_NODE=16),
        given(4, range(12, 16)),
    ),
    "part of a node, ranks bound": (
        srun(2, 1, affinity=range(8, 16), total=64, SLURM_CPUS_ON_NODE=16, SLURM_CPUS_PER_TASK=8),
        given(8, range(8, 16)),
    ),
    "--cpus-per-task": (srun(2, 0, SLURM_CPUS_PER_TASK=6), given(6)),
    "--cpus-per-task is not for a process that no launcher started": (
        {"SLURM_CPUS_ON_NODE": 32, "SLURM_CPUS_PER_TASK": 1, "SLURM_NTASKS_PER_NODE": 32, "SLURM_LOCALID": 0},
        given(32, range(32)),
    ),
    "a plain python in a batch script of 32 tasks": (
        {"SLURM_CPUS_ON_NODE": 32, "SLURM_NTASKS_PER_NODE": 32, "SLURM_PROCID": 0, "SLURM_TASKS_PER_NODE": 32},
        given(32, range(32)),
    ),
    "in the shell of salloc": (
        srun(1, 0, SLURM_STEP_ID=0xFFFFFFFA, SLURM_CPUS_ON_NODE=32, SLURM_CPUS_PER_TASK=4),
        given(32, range(32)),
    ),
    "uneven tasks: the third node": (
        srun("4(x2),2", 1, SLURM_NODEID=2, affinity=range(16), total=16),
        given(8, range(8, 16)),
    ),
    "mpirun's daemon is a task of srun": (mpirun(4, 0, **srun(1, 0)), given(8, range(8))),
    # Clusters that do not confine tasks: no core is known to be ours.
    "not confined: a job of 8": ({**UNCONFINED, "SLURM_CPUS_ON_NODE": 8}, given(8)),
    "not confined: only the job's list is known": (
        {**UNCONFINED, "SLURM_JOB_CPUS_PER_NODE": "16(x2),8", "SLURM_NODEID": 2},
        given(8),
    ),
    "not confined: two ranks": (mpirun(2, 1, **UNCONFINED, SLURM_CPUS_ON_NODE=16), given(8)),
    "not confined: --cpus-per-gpu": (mpirun(2, 0, **UNCONFINED, SLURM_CPUS_PER_GPU=8), given(8)),
    "not confined: two GPUs a rank": (
        srun(2, 0, **UNCONFINED, SLURM_CPUS_PER_GPU=6, SLURM_GPUS_ON_NODE=4, SLURM_CPUS_ON_NODE=64),
        given(12),
    ),
    "not confined: a process alone with all GPUs": (
        {**UNCONFINED, "SLURM_CPUS_PER_GPU": 8, "SLURM_GPUS_ON_NODE": 4},
        given(32),
    ),
    "not confined: srun without binding or --ntasks-per-node": (
        srun(4, 3, **UNCONFINED, SLURM_CPUS_ON_NODE=32),
        given(8),
    ),
    # Hyperthreads: masks count threads, Slurm may count cores.
    "both threads of each core, ranks bound": (
        mpirun(4, 1, affinity=range(8, 16), total=32, SLURM_CPUS_ON_NODE=16),
        given(4),
    ),
    "both threads of each core, alone": ({"SLURM_CPUS_ON_NODE": 16}, given(16)),
    "--hint=nomultithread": ({"affinity": range(8), "SLURM_CPUS_ON_NODE": 16}, given(8, range(8))),
    # Quotas are those of all ranks together.
    "quota": ({"quota": 4.0}, given(4)),
    "quota of two ranks": (mpirun(2, 0, quota=4.0), given(2)),
    "quota of half a core": ({"quota": 0.5}, given(1)),
    "quota above the mask": ({"quota": 64.0}, given(32, range(32))),
    "what is no number does not count": (
        {"SLURM_CPUS_ON_NODE": "many", "MPI_LOCALNRANKS": ""},
        given(32, range(32)),
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_cores_given(machine, name):
    setting, expected = MACHINES[name]
    machine(**setting)
    assert cores_given() == expected


def test_a_caller_that_knows_the_ranks_of_the_node_is_believed(machine):
    """Horovod knows them where the launcher's variables are unknown."""
    assert cores_given(4) == given(8)
    machine(affinity=range(8, 16))
    assert cores_given(4) == given(8, range(8, 16))  # bound


@pytest.mark.parametrize(
    "setting, workers, pinned",
    [
        ({}, 31, range(1, 32)),
        (mpirun(4, 1), 7, range(9, 16)),
        (mpirun(2, 0, quota=4.0), 1, []),
        (mpirun(2, 0, affinity=range(2), total=2), 1, []),  # no core to spare
        ({**UNCONFINED, "SLURM_CPUS_ON_NODE": 8}, 7, []),  # nobody else's
        ({"affinity": range(128), "total": 128}, 32, range(1, 128)),
        ({"affinity": range(1)}, 1, []),
    ],
)
def test_readers_get_the_cores_that_the_training_thread_leaves(machine, setting, workers, pinned):
    machine(**setting)
    assert default_workers() == workers
    assert worker_cores(workers) == tuple(pinned)


def test_no_pinning_where_the_training_thread_would_have_no_core(machine):
    machine(affinity=range(4), total=4)
    assert worker_cores(4) == ()
    assert worker_cores(3) == (1, 2, 3)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_are_read_from_both_versions_of_control_groups(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    write(two / "job" / "step", cpu__max="max 100000", cpuset__cpus__effective="")
    write(two / "job", cpu__max="250000 100000", cpuset__cpus__effective="0-3,8-11,16")
    write(two, cpuset__cpus__effective="0-63")
    write(tmp_path, proc2="0::/job/step")
    version2 = str(tmp_path / "proc2"), str(two)
    assert cores.cgroup_quota(*version2) == 2.5
    assert cores._cpuset(*version2) == 9
    write(one / "cpu" / "job", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(one / "cpuset" / "job", cpuset__cpus="4-7")
    write(tmp_path, proc1="3:memory:/job\n2:cpu,cpuacct:/job\n1:cpuset:/job/step")
    version1 = str(tmp_path / "proc1"), str(one)
    assert cores.cgroup_quota(*version1) == 3.0
    assert cores._cpuset(*version1) == 4
    write(one / "cpu" / "job", cpu__cfs_quota_us="-1")
    assert cores.cgroup_quota(*version1) is None
    for limit in (cores.cgroup_quota, cores._cpuset):
        assert limit(str(tmp_path / "nothing"), str(one)) is None


# ---- Processes that share the work of one command.

TASKS = """
import multiprocessing, os, sys, time
from shards.check import workers

def pid(task):
    os.write(1, b"%d\\n" % os.getpid())  # one write: lines of two processes do not mix
    time.sleep(task)
    return os.getpid()

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    done = dict(workers.run_tasks(pid, [float(sys.argv[2])] * 4, 2))
    assert sorted(done) == [0, 1, 2, 3] and os.getpid() not in done.values()
"""


@pytest.fixture
def tasks(tmp_path):
    """Starts a program that runs tasks in two processes, by a start method and for so many seconds each."""
    program = tmp_path / "tasks.py"
    program.write_text(TASKS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    @contextlib.contextmanager
    def start(method, seconds):
        command = [sys.executable, str(program), method, str(seconds)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, **pipes, text=True, cwd=tmp_path) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_tasks_run_with_every_start_method_and_end_with_their_caller(tasks, method):
    with tasks(method, 0) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with tasks(method, 600) as process:
        running = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        process.kill()
        _, alive = psutil.wait_procs(running, timeout=30)
        for worker in alive:
            worker.kill()
        assert not alive


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_worker_that_is_killed_is_reported(tasks, method):
    with tasks(method, 600) as process:
        psutil.Process(int(process.stdout.readline())).kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and "a worker process was killed" in errors
