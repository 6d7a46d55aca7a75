"""The doctor: what it finds on a node, its table of several nodes, the allreduce, the stages' limits; nothing hangs."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

from job.doctor import examine, exchange, gpus, libraries, limits, machine, table
from job.doctor.findings import ROWS, ok, slow, wrong
from job.ranks import mpi
from shards.errors import InputError
from shards.format.split import load_split
from shards.machine import caches, cores
from tests.launch import ROOT, error_lines, horovodrun, python

doctor = importlib.import_module("job.doctor.__main__")

HOROVOD = {
    "version": "0.28.1",
    "mpi": True,
    "gloo": True,
    "nccl": False,
    "libraries": ["/env/lib/libmpi.so.40"],
    "mpi_version": "Open MPI v5.0.11, package: ...",
}
MPI4PY = {"version": "4.1.2", "libraries": ["/env/lib/libmpi.so.40"], "mpi_version": "Open MPI v5.0.11, package: ..."}
TORCH = {"version": "2.13.0", "cuda": "13.0", "available": True, "gpus": ["H200"], "nccl": "2.27.3", "said": ""}
GPU = {
    "name": "H100",
    "memory": 80 << 30,
    "used": 100 << 20,
    "clock": 1980,
    "most_clock": 1980,
    "throttled": 0,
    "celsius": 40,
    "nvlinks": 18,
    "nvlinks_down": 0,
    "pcie": [5, 16],
    "pcie_width": 16,
}


def statuses(found):
    return {finding.name: finding.status for finding in found}


@pytest.fixture
def bare_path(tmp_path, monkeypatch):
    """A folder that is all of PATH; tests add the programs that a machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# ---------------------------------------------------------------- alone


def test_it_finds_this_environment_well(demo_data):
    done = python("job.doctor", "--data", str(demo_data), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["status"] in ("ok", "slow"), report
    names = {finding["name"]: finding for finding in report["findings"]}
    wanted = "python code torch horovod mpirun mpi4py webdataset decoder cores memory shm network data"
    assert set(wanted.split()) <= set(names)
    assert "3,000 samples" in names["data"]["text"]


def test_it_says_in_a_line_each_what_is_wrong_and_what_to_do(monkeypatch, capsys):
    found = [ok("torch", "2.13.0"), wrong("mpirun", "not on PATH", "load it")]
    monkeypatch.setattr(examine, "examine", lambda data, facts: found)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(InputError, match="mpirun"):  # exit code 2
        doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["ok", "torch", "2.13.0"],
        ["wrong", "mpirun", "not", "on", "PATH"],
        ["->", "load", "it"],
    ]
    found.pop()
    assert doctor.main() == 0


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = error_lines(done)
    assert all(word in error for word in words), error


def test_it_refuses_what_is_not_there(tmp_path):
    refused(python("job.doctor", "--data", str(tmp_path / "nowhere")), "no data folder", "nowhere")
    refused(python("job.doctor", "--recipe", "papre"), "did you mean paper?")
    refused(python("job.doctor", "--ranks", "0"), "--ranks is 0")
    lone = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    done = python("job.doctor", "--exchange", "/proc/nowhere", env=lone)
    refused(done, "/proc/nowhere", "--exchange names a folder that all nodes share")


def test_it_works_where_nothing_is_installed(tmp_path):
    """-S: the standard library alone, as on a node whose environment is broken."""
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['doctor', '--json']; "
    code += "runpy.run_module('job.doctor', run_name='__main__')"
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 not found')")
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == 2 and report["status"] == "wrong"
    broken = {f["name"]: f["text"] for f in report["findings"] if f["status"] == "wrong"}
    assert "libcudart.so.13 not found" in broken["torch"] and {"horovod", "decoder"} <= set(broken)


def test_mixed_mpis_are_found(bare_path):
    script(bare_path / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    other = MPI4PY | {"libraries": ["/usr/lib/libmpi.so.40"]}
    assert statuses(libraries.check_mpi(HOROVOD, other)) == {"mpirun": "wrong", "mpi4py": "wrong"}
    script(bare_path / "mpirun", "echo 'mpirun (Open MPI) 5.0.11'")
    assert statuses(libraries.check_mpi(HOROVOD, MPI4PY)) == {"mpirun": "ok", "mpi4py": "ok"}
    (bare_path / "mpirun").unlink()
    assert statuses(libraries.check_mpi(HOROVOD, MPI4PY))["mpirun"] == "wrong"
    assert statuses(libraries.check_mpi(HOROVOD | {"mpi": False}, MPI4PY))["mpirun"] == "ok"


def test_the_library_of_an_mpi_is_told_from_those_for_other_languages():
    folder = "/usr/lib/x86_64-linux-gnu/"
    names = ["libmpi.so.40.30.6", "libmpich.so.12.1.13", "libmpi_cray.so.12", "libmpi_gnu_123.so.12"]
    others = ["libmpi_cxx.so.40", "libmpicxx.so.12", "libmpichfort.so.12", "libmpi_mpifh.so.40", "libmpi_java.so.40"]
    found = re.findall(mpi.LIBRARY, "\n".join(folder + name for name in names + others))
    assert found == [folder + name for name in names]


def test_a_horovod_that_does_not_fit_is_found(bare_path):
    script(bare_path / "horovodrun", "")
    broken = libraries.check_horovod({"error": "undefined symbol: _ZN3c10"}, TORCH)
    assert statuses(broken) == {"horovod": "wrong"} and "--rebuild" in broken[0].advice
    assert statuses(libraries.check_horovod(HOROVOD, TORCH)) == {"horovod": "ok", "nccl": "wrong"}
    assert statuses(libraries.check_horovod(HOROVOD, TORCH | {"gpus": []})) == {"horovod": "ok"}


def test_a_driver_that_torch_cannot_use_is_found(bare_path):
    script(bare_path / "nvidia-smi", "echo 535.104.05")
    assert statuses(libraries.check_torch(TORCH)) == {"torch": "ok", "gpu": "ok"}
    too_old = libraries.check_torch(TORCH | {"available": False, "gpus": [], "said": "The NVIDIA driver is too old"})
    assert statuses(too_old)["gpu"] == "wrong" and "driver is too old" in too_old[1].text
    assert statuses(libraries.check_torch(TORCH | {"cuda": "", "gpus": []}))["gpu"] == "wrong"
    assert statuses(libraries.check_torch({"error": "libcudart.so.13 not found"})) == {"torch": "wrong"}


@pytest.mark.parametrize(
    ("second", "row", "words"),
    [
        ({"used": 30 << 30}, "gpu memory", "in use: GPU 1"),
        ({"throttled": 0x40}, "clocks", "GPU 1 is throttled: too hot (hardware)"),
        ({"nvlinks": 12, "nvlinks_down": 6}, "links", "GPU 1 has fewer NVLinks up"),
        ({"pcie": [5, 8]}, "links", "GPU 1 has fewer PCIe lanes"),
    ],
)
def test_a_gpu_that_is_slower_than_it_could_be_is_named(second, row, words):
    assert set(statuses(gpus.check_gpus([GPU, GPU])).values()) == {"ok"}
    found = {finding.name: finding for finding in gpus.check_gpus([GPU, GPU | second])}
    assert found[row].status == "slow" and words in found[row].text
    assert [f.status for f in found.values()].count("slow") == 1


def test_what_nvml_cannot_tell_is_said_not_to_be_measured():
    found = gpus.check_gpus({"error": "ModuleNotFoundError: No module named 'pynvml'"})
    assert set(statuses(found).values()) == {"ok"} and all("not measured" in f.text for f in found)
    assert found[0].advice == "pip install nvidia-ml-py"
    idle = GPU | {"clock": 345, "throttled": 0x1}  # an idle GPU lowers its clock: no fault
    assert statuses(gpus.check_gpus([idle]))["clocks"] == "ok"


def test_what_compute_nodes_lack_is_found(monkeypatch):
    assert statuses(machine.check_caches(gpu=True)) == {"compiler": "ok", "caches": "ok"}
    monkeypatch.setattr(caches, "triton_lacks", lambda: "Triton needs a C compiler")
    monkeypatch.setenv("HOME", "/proc")
    compiler, kept = machine.check_caches(gpu=True)
    assert compiler.status == "slow" and "Triton needs a C compiler" in compiler.text and "gcc" in compiler.advice
    assert kept.status == "slow" and "HOME cannot be written" in kept.text
    assert machine.check_caches(gpu=False)[0].status == "ok"  # training there takes no such kernels


def test_what_is_slow_is_found(demo_data, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    finding, rate = machine.check_decoder()
    assert finding.status == "slow" and "pip install simplejpeg" in finding.advice and rate > 0
    monkeypatch.setattr(machine, "read_rate", lambda paths: 1e5)  # bytes a second
    split = load_split(str(demo_data), "train")
    assert machine.check_data(split, rate).status == "slow"
    gone = dataclasses.replace(split, root=str(tmp_path))
    assert machine.check_data(gone, rate).status == "wrong"
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    assert statuses(machine.check_cores())["threads"] == "slow"


def test_too_little_memory_is_found(monkeypatch, tmp_path):
    assert machine.check_memory().status == "ok"
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")  # MiB
    finding = machine.check_memory()
    assert finding.status == "slow" and "limit 2.0 GiB" in finding.text and "--mem=0" in finding.advice
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    group = tmp_path / "a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc").write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    assert cores.memory_limit(str(tmp_path / "proc"), str(tmp_path)) is None
    (tmp_path / "a/memory.max").write_text(f"{3 << 30}\n")
    assert cores.memory_limit(str(tmp_path / "proc"), str(tmp_path)) == 3 << 30


def test_a_small_dev_shm_is_found(monkeypatch):
    real = os.statvfs("/dev/shm")
    small = os.statvfs_result((*real[:2], (64 << 20) // real.f_frsize, *[(64 << 20) // real.f_frsize] * 2, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    assert machine.check_shm().status == "slow" and "--shm-size" in machine.check_shm().advice


def test_a_check_that_hangs_or_fails_is_one_line():
    hanging = threading.Event()
    began = time.monotonic()
    (found,) = examine.limited("data", 0.2, hanging.wait)
    hanging.set()
    assert found.status == "wrong" and found.text == "no answer in 0 s" and time.monotonic() - began < 5
    (found,) = examine.limited("shm", 5, lambda: 1 / 0)
    assert found.status == "wrong" and "ZeroDivisionError" in found.text
    assert examine.limited("shm", 5, lambda: ok("shm", "fine")) == [ok("shm", "fine")]


# ---------------------------------------------------------------- rows and references


def sources():
    return [*(ROOT / "job").rglob("*.py"), *(ROOT / "shards").rglob("*.py"), *(ROOT / "slurm").rglob("*.sh")]


def test_messages_refer_to_rows_that_the_doctor_has():
    references = {}
    for path in sources():
        text = path.read_text()
        found = re.findall(r"""\bsee\(["']([^"']+)["']\)""", text) + re.findall(
            r"job\.doctor, row \\?`(\w[^`\\]*)", text
        )
        references |= dict.fromkeys(found, path)
    assert set(references) <= set(ROWS), references
    from job.ranks import agree

    assert set(agree._ROWS.values()) <= set(ROWS)
    # What users meet because of their machine.
    met = {"horovod", "horovodrun", "mpirun", "mpi4py", "gpu", "shm", "nccl", "allreduce", "decoder", "data", "memory"}
    met |= {"compiler", "network", "cores"}
    assert met <= set(references)


def test_every_row_is_written_by_some_check():
    made = set()
    for path in (ROOT / "job/doctor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("ok", "slow", "wrong") and node.args:
                if isinstance(node.args[0], ast.Constant):
                    made.add(node.args[0].value)
    assert made == set(ROWS)
    with pytest.raises(ValueError, match="no row shmem"):
        ok("shmem", "")


def test_a_message_ends_with_its_row(tmp_path):
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod/__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    done = python("job.train", "--data", "synthetic", "--model.classes", "10", env={"PYTHONPATH": str(tmp_path)})
    refused(done, "undefined symbol", "(python -m job.doctor, row `horovod`)")
    done = python("job.train", "--data", "synthetic", "--model.classes", "10", env={"SLURM_STEP_NUM_TASKS": "3"})
    refused(done, "started 3 processes", "row `mpirun`")


# ---------------------------------------------------------------- several nodes


def test_the_table_names_both_nodes_where_they_differ():
    one = [ok("torch", "2.13.0", same="2.13.0"), ok("decoder", "7,000 images/s", value=7000.0), ok("shm", "fine")]
    two = [ok("torch", "2.12.1", same="2.12.1"), ok("decoder", "3,000 images/s", value=3000.0), ok("shm", "fine")]
    rows = {finding.name: finding for finding in table.merge({"n1": one, "n2": one, "n3": two})}
    assert rows["torch"].status == "wrong"
    assert "2.13.0 on n1 and 1 other; 2.12.1 on n3" in rows["torch"].text
    assert rows["decoder"].status == "slow" and rows["decoder"].text.startswith("n3 has 43% of what the others have")
    assert rows["shm"] == ok("shm", "fine")


def test_troubles_of_nodes_are_named_and_said_once():
    bad = slow("shm", "0.1 GiB", "--shm-size")
    nodes = {"n1": [ok("shm", "9 GiB")], "n2": [bad], "n3": [bad]}
    (row,) = table.merge(nodes)
    assert (row.status, row.text, row.advice) == ("slow", "n2 and 1 other: 0.1 GiB", "--shm-size")
    (row,) = table.merge({"n2": [bad], "n3": [bad]})
    assert row.text == "all 2 nodes: 0.1 GiB"
    (row,) = table.merge({"n1": [ok("data", "slower", value=90.0)], "n2": [ok("data", "faster", value=100.0)]})
    assert row.status == "ok" and row.text.startswith("slower (on n1; the lowest of 2 nodes; n2 has 1.11 times")


def test_ranks_that_do_not_answer_are_named_with_node_and_check():
    reports = {0: {"host": "n1"}, 2: {"host": "n2", "at": "data"}}
    row = table.check_nodes(reports, 4, [1, 2])
    assert row.status == "wrong" and "no answer from rank 1, rank 2 on n2 (hangs in `data`)" in row.text


def test_clocks_that_differ_and_nodes_that_are_not_reached_are_named():
    reports = {
        0: {"host": "n1"},
        1: {"host": "n2", "clock": {"offset": -3.5, "seconds": 1e-4}},
        2: {"host": "n3", "clock": {"problem": "cannot reach n1 (10.0.0.1: timed out)"}},
    }
    network, clock = table.check_clocks(reports)
    assert network.status == "slow" and "n3 cannot reach n1" in network.text and "NETWORK_INTERFACE" in network.advice
    assert clock.status == "slow" and "3500.0 ms (n2)" in clock.text


def test_the_allreduce_says_who_failed_and_when_the_sum_is_wrong():
    good = {"over": "NCCL", "right": True, "bytes": 256 << 20, "all": 1e10}
    reports = {r: {"host": f"n{r // 2}", "allreduce": good | {f"node {r // 2}": 2e11}} for r in range(4)}
    reports[0]["allreduce"]["between"] = 1.2e10
    row = table.check_allreduce(reports, [])
    assert row.status == "ok" and "within a node 200.00, between nodes 12.00" in row.text
    reports[3]["allreduce"] = good | {"right": False}
    assert "wrong sum on rank 3 on n1" in table.check_allreduce(reports, []).text
    reports[0]["allreduce"] = {"error": "no answer in 90 s"}
    reports[3]["allreduce"] = {"error": "NCCL error: unhandled system error"}
    row = table.check_allreduce(reports, [])
    assert row.status == "wrong" and row.text.startswith("rank 3 on n1 (and 1 other ranks): NCCL error")


@pytest.mark.parametrize("gloo", [False, pytest.param(True, marks=pytest.mark.long)])
def test_under_a_launcher_it_examines_the_node_once_and_adds_up_over_all_ranks(demo_data, tmp_path, gloo):
    env = {"OMP_NUM_THREADS": "1"}
    options = ["--data", str(demo_data), "--exchange", str(tmp_path), "--json"]
    done = horovodrun(2, "job.doctor", *options, gloo=gloo, env=env)
    text = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    report = json.loads(text)
    rows = {finding["name"]: finding for finding in report["findings"]}
    assert done.returncode == 0 and report["ranks"] == 2 and len(report["nodes"]) == 1, done.stderr
    assert "the sum of 2 ranks is right" in rows["allreduce"]["text"] and report["allreduce"]["within"] > 1e6
    assert ("by Gloo" in rows["allreduce"]["text"]) == gloo
    assert rows["data"]["status"] in ("ok", "slow") and "2 ranks on 1 node" in rows["nodes"]["text"]
    assert not list(tmp_path.iterdir()), "the folder of the exchange is left behind"


def as_ranks(size, *options, env=None, skip=()):
    """Processes that look as `srun -n SIZE python -m job.doctor` starts them; no MPI connects them."""
    common = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "2"}
    common |= {"SLURM_STEP_TASKS_PER_NODE": str(size), **(env or {})}
    command = [sys.executable, "-m", "job.doctor", *options]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )  # fmt: skip
        for rank in range(size)
        if rank not in skip
    ]


def test_where_horovod_is_broken_and_no_mpi_connects_the_ranks_the_table_comes_all_the_same(tmp_path):
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod/__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    ranks = as_ranks(2, "--exchange", str(tmp_path), env={"PYTHONPATH": str(tmp_path)})
    first, second = (process.communicate(timeout=120) for process in ranks)
    assert [process.returncode for process in ranks] == [2, 0], (first, second)
    assert re.search(r"wrong horovod +does not import with this torch: .*undefined symbol", first[0])
    assert re.search(r"wrong allreduce +rank 0 on .* srun started 2 processes, and mpi4py sees one", first[0])
    assert first[1].startswith("error: wrong here: horovod, allreduce") and not second[0] and not second[1]


CRASH = """
import os, signal, threading
if b"job.doctor.together" in open("/proc/self/cmdline", "rb").read() and os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
    import horovod.torch as hvd
    init = hvd.init
    def crash():
        init()
        os.kill(os.getpid(), signal.{signal})
    hvd.init = crash
"""


def test_a_rank_that_crashes_in_the_allreduce_costs_that_row_alone(tmp_path):
    """mpirun ends the job at once when a rank crashes; the JSON object comes all the same."""
    (tmp_path / "sitecustomize.py").write_text(CRASH.replace("{signal}", "SIGSEGV"))
    env = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = horovodrun(2, "job.doctor", "--exchange", str(tmp_path), "--json", env=env)
    report = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    rows = {finding["name"]: finding for finding in report["findings"]}
    assert done.returncode != 0 and rows["torch"]["status"] == "ok", done.stderr
    assert rows["allreduce"]["status"] == "wrong" and "error: wrong here: allreduce" in done.stdout + done.stderr


@pytest.mark.long
def test_a_rank_that_never_comes_is_named_within_its_time(tmp_path):
    began = time.monotonic()
    (first,) = as_ranks(2, "--exchange", str(tmp_path), skip=(1,))
    out, err = first.communicate(timeout=150)
    assert first.returncode == 2 and time.monotonic() - began < exchange.JOIN_SECONDS + 30
    assert "no answer from rank 1;" in out and "wrong here: nodes" in err and "allreduce" not in out


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """rank(N): this process as rank N of two."""

    def make(number):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_PROCID", str(number))
        return exchange.Rank(str(tmp_path))

    return make


def test_a_folder_that_an_earlier_doctor_left_behind_is_not_taken_for_a_live_one(rank, tmp_path, monkeypatch):
    folder = tmp_path / ".doctor-slurm-7-"
    folder.mkdir()
    (folder / "leader.json").write_text(json.dumps({"token": "old", "beat": 5, "done": True, "host": "n0"}))
    monkeypatch.setattr(exchange, "JOIN_SECONDS", 0.6)
    with pytest.raises(InputError, match="rank 1 on .* hears nothing of rank 0 in .*--exchange"):
        rank(1)
    monkeypatch.setattr(exchange, "JOIN_SECONDS", 20.0)
    first, joined = rank(0), []
    thread = threading.Thread(target=lambda: joined.append(rank(1)))
    thread.start()
    thread.join(20)
    assert joined[0].told["token"] == first._token != "old"
    joined[0].say(findings=[])
    first.say(findings=[])
    assert set(first.collect("findings")) == {0, 1}
    clock = joined[0].clock()
    assert abs(clock["offset"]) < 0.5 and 0 < clock["seconds"] < 1
    joined[0].told["port"] = 1  # nobody listens there
    assert "cannot reach" in joined[0].clock()["problem"]
    joined[0].say(ended=True)
    first.end()
    assert not folder.exists() and joined[0].wait("done", 5) is None


def test_a_rank_that_falls_silent_is_not_waited_for(rank, monkeypatch):
    first, joined = rank(0), []
    thread = threading.Thread(target=lambda: joined.append(rank(1)))
    thread.start()
    thread.join(20)
    joined[0].say(at="data")
    first.say(findings=[])
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 1.0)
    reports = first.collect("findings")
    assert "findings" not in reports[1] and reports[1]["at"] == "data" and first.silent(1)
    first.end()


# ---------------------------------------------------------------- limits of the stages


@pytest.fixture
def bench(monkeypatch):
    """bench(images_per_second, copy=...): what job.bench measures of one rank."""

    def fake(rate, **more):
        monkeypatch.setattr(
            limits, "_bench_step", lambda wanted, facts: {"batch": 32, "images_per_second": rate, **more}
        )

    return fake


def predicted(ranks=8, per_node=4, gpus=4, decode=2000.0, read=(), links=None):
    facts = examine.Facts(probes={"torch": {"gpus": ["H100"] * gpus}}, decode=decode)
    wanted = limits.Wanted("paper", "bf16", ranks, per_node)
    return limits.check_limits(wanted, facts, list(read), links or {})


def test_the_bottleneck_is_the_stage_that_is_slow(bench, monkeypatch):
    monkeypatch.setattr(limits, "cores_given", lambda: cores.Cores(64, ()))
    fast = {"within": 1e13, "between": 1e13}
    bench(30_000.0, copy=2e10)
    _, figures = predicted(read=[1e6, 1e6], links=fast)
    assert set(figures["stages"]) == {"reading", "decoding", "copy to the GPU", "compute", "allreduce"}
    assert figures["stages"]["decoding"] == 2 * 4 * 15 * 2000  # nodes, ranks, readers, images/s
    assert figures["stages"]["compute"] == pytest.approx(8 * 30_000, rel=0.01) and not figures["assumed"]
    assert figures["low"] <= figures["images_per_second"] <= figures["high"] <= 8 * 30_000
    _, figures = predicted(decode=200.0, read=[1e6, 1e6], links=fast)
    assert figures["bottleneck"] == "decode" and "--workers" in figures["advice"]
    assert figures["images_per_second"] == pytest.approx(figures["stages"]["decoding"], rel=0.05)
    _, figures = predicted(read=[1000.0, 1000.0], links=fast)
    assert (
        figures["bottleneck"] == "storage" and figures["stages"]["reading"] == 2000.0 and "STAGE=1" in figures["advice"]
    )
    bench(100.0, copy=2e10)
    finding, figures = predicted(read=[1e6, 1e6], links=fast)
    assert figures["bottleneck"] == "compute" and finding.advice.startswith("bottleneck: compute")
    bench(30_000.0, copy=2e10)
    _, figures = predicted(read=[1e6, 1e6], links=fast | {"between": 1e8})
    assert figures["bottleneck"] == "communication"
    assert figures["stages"]["allreduce"] < figures["stages"]["compute"]


def test_what_was_not_measured_is_said_to_be_assumed(bench):
    bench(30_000.0)
    finding, figures = predicted()
    assert len(figures["assumed"]) == 3 and "reading is no limit" in finding.text and "between nodes" in finding.text
    _, figures = predicted(ranks=16, read=[100.0], links={"within": 1e11, "between": 1e10})
    assert figures["assumed"] == ["the file system gives each of 4 nodes what it gave each of 1"]
    with pytest.raises(InputError, match="--ranks 1000: a batch of 256 images"):
        limits.settings_of(limits.Wanted("paper", "", 1000, 4), examine.Facts())


@pytest.mark.long
def test_the_limits_of_this_machine_are_measured(demo_data):
    done = python("job.doctor", "--data", str(demo_data), "--recipe", "demo", "--ranks", "2", "--json", timeout=200)
    figures = json.loads(done.stdout)["limits"]
    assert set(figures["stages"]) == {"reading", "decoding", "compute", "allreduce"} and figures["bottleneck"]
    assert figures["low"] <= figures["images_per_second"] <= figures["high"]
    assert figures["images_per_second"] <= 1.01 * min(figures["stages"].values())
    assert figures["assumed"] == ["within a node 10 GB/s"]
