"""How many readers a rank gets: by the cores that affinity, Slurm and the control group really give it."""

import os

import pytest

from job import cores


@pytest.fixture
def machine(monkeypatch):
    """A machine of 32 cores, all in the affinity mask, without limits; `set` changes it."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "HOROVOD_", "MPI_")):
            monkeypatch.delenv(name)

    def set(affinity=range(32), total=32, quota=None, **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set_of(affinity))
        monkeypatch.setattr(os, "cpu_count", lambda: total)
        monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    def set_of(affinity):
        return frozenset(affinity)

    set()
    return set


def test_one_rank_has_them_all(machine):
    assert cores.cores_given() == cores.Cores(32, tuple(range(32)))
    assert cores.default_workers() == 31
    assert cores.worker_cores(31) == tuple(range(1, 32))


def test_ranks_that_share_a_mask_divide_it(machine):
    machine(HOROVOD_LOCAL_SIZE=4, HOROVOD_LOCAL_RANK=1)
    assert cores.cores_given() == cores.Cores(8, tuple(range(8, 16)))
    assert cores.default_workers() == 7
    assert cores.worker_cores(7) == tuple(range(9, 16))


def test_bound_ranks_keep_their_own(machine):
    machine(affinity=range(8, 16), OMPI_COMM_WORLD_LOCAL_SIZE=4, OMPI_COMM_WORLD_LOCAL_RANK=1)
    assert cores.cores_given() == cores.Cores(8, tuple(range(8, 16)))


def test_part_of_a_node_given_by_slurm(machine):
    """16 of 64 cores for the job, shared by four ranks: the node's other cores are not ours to count."""
    machine(
        affinity=range(16),
        total=64,
        SLURM_CPUS_ON_NODE=16,
        OMPI_COMM_WORLD_LOCAL_SIZE=4,
        OMPI_COMM_WORLD_LOCAL_RANK=3,
    )
    assert cores.cores_given() == cores.Cores(4, (12, 13, 14, 15))


def test_cpus_per_task(machine):
    machine(SLURM_CPUS_PER_TASK=6, SLURM_NTASKS_PER_NODE=2)
    assert cores.cores_given().count == 6


def test_quota_of_the_control_group(machine):
    machine(quota=4.0)
    assert cores.cores_given() == cores.Cores(4, ())
    machine(quota=4.0, OMPI_COMM_WORLD_LOCAL_SIZE=2)
    assert cores.default_workers() == 1


def test_two_ranks_on_two_cores_get_a_reader_each_and_no_pinning(machine):
    machine(affinity=range(2), total=2, OMPI_COMM_WORLD_LOCAL_SIZE=2, OMPI_COMM_WORLD_LOCAL_RANK=0)
    assert cores.default_workers() == 1
    assert cores.worker_cores(1) == ()


def test_no_pinning_where_the_training_thread_would_have_no_core(machine):
    machine(affinity=range(4), total=4)
    assert cores.worker_cores(4) == ()
    assert cores.worker_cores(3) == (1, 2, 3)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_quota_is_read_from_both_versions_of_control_groups(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    write(two / "job" / "step", cpu__max="max 100000")
    write(two / "job", cpu__max="250000 100000")
    write(tmp_path, proc2="0::/job/step")
    assert cores.cgroup_quota(str(tmp_path / "proc2"), str(two)) == 2.5
    write(one / "cpu" / "job", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(tmp_path, proc1="3:memory:/job\n2:cpu,cpuacct:/job")
    assert cores.cgroup_quota(str(tmp_path / "proc1"), str(one)) == 3.0
    write(one / "cpu" / "job", cpu__cfs_quota_us="-1")
    assert cores.cgroup_quota(str(tmp_path / "proc1"), str(one)) is None
    assert cores.cgroup_quota(str(tmp_path / "nothing"), str(one)) is None
