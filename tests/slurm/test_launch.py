"""What slurm/lib/launch.sh makes of an allocation, from the variables that Slurm sets; no Slurm is needed."""

import os
import subprocess
import sys

import pytest

from tests.launch import ROOT

NODE = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1"}
NODE |= {"SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}
TWO = NODE | {"SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.fixture
def launch(tmp_path):
    """launch("echo $ranks", SLURM_NTASKS="2"): run lines after launch.sh; programs={"srun": "exit 1"} are faked."""

    def launch(lines: str, programs: dict[str, str] | None = None, **env: str) -> subprocess.CompletedProcess:
        for name, script in {"scontrol": "echo n1", **(programs or {})}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.path.dirname(sys.executable)}:/usr/sbin:/usr/bin:/bin"
        script = f"set -uo pipefail\nrepository={ROOT}\nsource $repository/slurm/lib/launch.sh\nPATH={path}\n{lines}"
        env = {"PATH": path, "HOME": str(tmp_path), **NODE, **env}
        return subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return launch


@pytest.mark.parametrize(
    ("env", "ranks", "per_node", "cpus"),
    [
        (TWO, 2, 1, 8),
        (TWO | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, 8, 4, 2),
        (TWO | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, 8, 4, 2),  # sbatch --ntasks=8
        (NODE | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8"}, 8, 8, 1),
        (TWO | {"SLURM_GPUS_ON_NODE": "4"}, 8, 4, 2),
        (TWO | {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS": "a100:8"}, 8, 4, 2),
        (TWO | {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_GPU": "2", "SLURM_TASKS_PER_NODE": "2,1"}, 8, 4, 2),
        (NODE | {"SLURM_GPUS_ON_NODE": "4", "RANKS_PER_NODE": "2"}, 2, 2, 4),
        (NODE | {"SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1", "RANKS_PER_NODE": "2"}, 2, 2, 4),
        (NODE | {"SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "4"}, 4, 4, 2),  # the task's CPUs, for four ranks
        (NODE | {"SLURM_CPUS_PER_TASK": "2"}, 1, 1, 2),
        (TWO | {"SLURM_JOB_CPUS_PER_NODE": "16,4(x1)", "SLURM_CPUS_ON_NODE": "16"}, 2, 1, 4),  # the smaller node counts
        (NODE | {"SLURM_CPUS_ON_NODE": "1", "SLURM_GPUS_ON_NODE": "2"}, 2, 2, 1),
    ],
)
def test_ranks_and_cores_follow_the_allocation(launch, env, ranks, per_node, cpus):
    done = launch("echo $ranks $per_node $cpus", **env)
    assert done.stdout.split() == [str(ranks), str(per_node), str(cpus)], done.stderr


@pytest.mark.parametrize(
    ("env", "error"),
    [
        (TWO | {"SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"}, "--nodes=2 --ntasks-per-node=N"),
        (TWO | {"SLURM_GPUS": "3", "SLURM_GPUS_ON_NODE": "2"}, "--nodes=2 --gpus-per-node=N"),
        ({"RANKS_PER_NODE": "four"}, "RANKS_PER_NODE=four is not a number above 0"),
        ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE=0 is not a number above 0"),
        ({"LAUNCHER": "mpiexec"}, "LAUNCHER=mpiexec is not one of mpirun, srun, horovodrun"),
        ({"NETWORK_INTERFACE": "lo,ib7"}, "NETWORK_INTERFACE=lo,ib7: no ib7 on "),
    ],
)
def test_what_cannot_be_launched_is_one_line_that_says_what_to_ask_for(launch, env, error):
    done = launch("echo went on", **env)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and error in done.stderr


def test_steps_do_not_inherit_what_srun_refuses_beside_cpus_per_task(launch):
    asked = ["SLURM_CPUS_PER_GPU", "SLURM_NTASKS_PER_GPU", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"]
    done = launch('set_launch srun; srun() { env; }; "${launch[@]}"', {"srun": "env"}, **dict.fromkeys(asked, "1"))
    assert "SLURM_JOB_ID=7" in done.stdout and not [name for name in asked if name in done.stdout]


def test_one_line_tells_what_was_made_of_the_allocation(launch):
    env = TWO | {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1"}
    done = launch("find_launcher srun", {"srun": "exit 0"}, **env)
    assert "2 ranks on 2 nodes by srun, 1 per node, each with 8 CPUs and 4 GPUs" in done.stdout
    assert "warning: a rank uses one GPU; for all 4 of a node, set RANKS_PER_NODE=4" in done.stdout


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("mpirun (Open MPI) 4.1.4", "mpirun -np 2 --map-by ppr:1:node --bind-to none"),
        ("HYDRA build details:", "mpirun -np 2 -ppn 1"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18", "mpiexec.hydra -np 2 -ppn 1"),  # mpirun: a script
    ],
)
def test_each_mpi_gets_its_own_program_and_options(launch, version, command):
    done = launch('set_launch mpirun; echo "${launch[@]}"', {"mpirun": f"echo '{version}'", "nproc": "echo 1"}, **TWO)
    assert done.stdout.strip().endswith(command), done.stdout + done.stderr


def test_horovodrun_is_tried_with_what_training_does(launch):
    """A login shell such as csh lets `ssh HOST true` pass and fails at what horovodrun sends."""
    done = launch(
        "find_launcher horovodrun", {"ssh": "exit 0", "horovodrun": "echo Ambiguous output redirect.; exit 1"}
    )
    assert done.returncode == 2 and "horovodrun: Ambiguous output redirect." in done.stderr
    assert "error: no launcher works on n1" in done.stderr


def test_a_job_that_slurm_does_not_requeue_says_so(launch):
    done = launch("requeue_job stopped", {"scontrol": "echo disabled >&2; exit 1"})
    assert "Slurm does not requeue this job (sbatch --no-requeue" in done.stdout
    done = launch("requeue_job stopped", {"scontrol": "echo $@"}, MAX_REQUEUES="2", SLURM_RESTART_COUNT="1")
    assert "stopped; requeueing\nrequeue 7\n" in done.stdout
    done = launch("requeue_job stopped", {"scontrol": "echo $@"}, MAX_REQUEUES="2", SLURM_RESTART_COUNT="2")
    assert "not requeued, for MAX_REQUEUES=2" in done.stdout and "requeue 7" not in done.stdout


@pytest.mark.parametrize(
    ("srun", "code", "data"), [("exit 0", "0", "staged"), ("exit 3", "0", "own"), ("exit 2", "2", "own")]
)
def test_training_reads_the_shared_file_system_when_a_disk_is_too_small(launch, tmp_path, srun, code, data):
    lines = f'options=(--data {tmp_path}); stage_data; echo "$code $(option data)"'
    done = launch(lines, {"srun": srun}, SCRATCH="/scratch")
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == code and last[1].startswith("/scratch/shards-" if data == "staged" else str(tmp_path)), (
        done.stderr
    )
    assert ("warning: no copies" in done.stdout) == (srun == "exit 3")
