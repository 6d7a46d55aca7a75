"""The doctor on the nodes of a real Slurm cluster, started by srun and mpirun."""

import json
import sys

import pytest

from tests.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as cluster:
        if cluster.form != "hosts":
            pytest.skip(f"needs nodes that are hosts of their own; here: {cluster.refused}")
        yield cluster


@pytest.fixture
def doctor(cluster, tmp_path):
    """doctor("srun", "-N2"): the doctor's JSON object by row, and its exit code."""

    def doctor(*launcher, env=None):
        words = [*launcher, sys.executable, "-m", "job.doctor", "--exchange", str(tmp_path), "--json"]
        done = cluster.run(*words, timeout=150, env={"OMP_NUM_THREADS": "1", **(env or {})}, check=False)
        text = done.stdout
        assert "{" in text, f"exit code {done.returncode}\n{text}{done.stderr}{cluster.logs()}"
        report = json.loads(text[text.index("{") : text.rindex("}") + 1])
        assert not list(tmp_path.glob(".doctor*"))
        return report, {finding["name"]: finding for finding in report["findings"]}, done.returncode

    return doctor


def test_srun_examines_both_nodes_and_measures_between_them(doctor):
    report, rows, code = doctor("srun", "-N2", "-n2", "--mpi=pmix")
    assert code == 0 and list(report["nodes"]) == ["n1", "n2"], rows
    assert rows["allreduce"]["status"] == "ok" and report["allreduce"]["between"] > 0
    assert rows["time"]["status"] == "ok" and "within" not in report["allreduce"]
    assert rows["torch"]["status"] == rows["code"]["status"] == "ok"


def test_mpirun_measures_within_a_node_and_between_nodes(doctor):
    mpirun = "salloc -N2 --ntasks-per-node=2 mpirun -np 4 --map-by ppr:2:node --bind-to none".split()
    report, rows, code = doctor(*mpirun)
    assert code == 0 and {"all", "within", "between"} == set(report["allreduce"]), rows
    assert "4 ranks on 2 nodes: n1, n2" in rows["nodes"]["text"]


def test_ranks_that_no_mpi_connects_are_told_so(doctor):
    report, rows, code = doctor("srun", "-N2", "-n4", "--mpi=none")
    assert code == 2 and len(report["nodes"]) == 2
    assert "srun started 4 processes, and Horovod sees one" in rows["allreduce"]["text"]
