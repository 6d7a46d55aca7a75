"""What ranks decide together: devices, kernels, differences, each from the reports of all ranks; and lone processes."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from job.batches.data import split_facts
from job.config import Config, to_flat
from job.fast import support as fast
from job.ranks import agree, heartbeat
from job.run import progress
from job.run import step as passes
from shards.errors import InputError
from shards.format.split import Shard, Split
from shards.machine import caches
from shards.machine.launcher import lone_process
from shards.write import pool
from tests.launch import error_lines, run

A, B, C = ({"uuid": f"GPU-{letter}", "name": "NVIDIA H100", "plain": ""} for letter in "abc")


def report(gpus=(), host="n1", problem="", decoder="shards/read/jpeg.c", **same):
    return {
        "host": host,
        "problem": problem,
        "gpus": list(gpus),
        "decoder": decoder,
        "same": {"torch": "2.13.0", "--epochs": 5, "split train": "9 samples in 1 shards (a1b2)", **same},
    }


@pytest.mark.parametrize(
    ("seen", "taken"),
    [
        ([[A, B], [A, B]], [0, 1]),  # all ranks of a node see its GPUs
        ([[A], [B]], [0, 0]),  # --gpus-per-task, CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK
        ([[A, B], [B, A]], [0, 0]),
        ([[A, B], [A]], [1, 0]),  # the one without a choice comes first
        ([[A, B, C], [A, B, C], [C]], [0, 1, 0]),
        ([[], []], [None, None]),  # no GPU anywhere: the CPU
    ],
)
def test_each_rank_takes_a_gpu_that_it_sees_and_no_other_rank_has(seen, taken):
    assert agree.assign_gpus([report(gpus) for gpus in seen], "auto") == taken


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("seen", "named"),
    [
        ([[A], [A]], "rank 1 on n1 .* sees 1, and 2 ranks run"),  # two ranks, one GPU
        ([[A, B], [A, B], [A, B]], "rank 2 on n1 .* sees 2, and 3 ranks"),
        ([[A], []], "rank 1 on n1 .* sees 0"),
        ([[], [A], []], r"rank 0 on n1 \(and 1 other rank\) .* sees 0"),
    ],
)
def test_a_rank_without_a_gpu_beside_ranks_with_one_is_an_error_that_names_it(seen, named, wanted):
    with pytest.raises(InputError, match=named):
        agree.assign_gpus([report(gpus) for gpus in seen], wanted)


def test_a_gpu_lost_on_one_node_names_the_node():
    lost = [report([A, B]), report([A, B]), report([C], "n2"), report([C], "n2")]
    with pytest.raises(InputError, match=r"rank 3 on n2 .* sees 1, and 2 ranks run there; .*--exclude=n2"):
        agree.assign_gpus(lost, "auto")


def test_slices_of_one_gpu_are_told_apart_by_their_names(monkeypatch):
    properties = type("Properties", (), {"uuid": "one-gpu", "name": "NVIDIA H100 MIG 1g.10gb"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    reports = []
    for name in ("MIG-1", "MIG-2", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        reports.append(report(agree.visible_gpus(fast_wanted=False)))
    assert [r["gpus"][0]["uuid"] for r in reports] == ["MIG-1", "MIG-2", "one-gpu"]
    assert agree.assign_gpus(reports[:2], "auto") == [0, 0]


@pytest.mark.parametrize("name", ["torch", "--epochs", "split train"])
def test_a_difference_names_both_ranks_and_what_each_has(name):
    reports = [report(), report(), report(host="n2", **{name: "other"}), report(host="n2", **{name: "other"})]
    with pytest.raises(InputError) as caught:
        agree.check(reports, "auto")
    ours = reports[0]["same"][name]
    assert f"differ in {name}: {ours} on rank 0 on n1, other on rank 2 on n2 (and 1 other rank)" in str(caught.value)
    assert caught.value.everywhere


def test_copies_of_the_data_are_equal_and_other_contents_are_not(tmp_path):
    def facts(folder, sha256="1" * 64, mean=0.5, link=False):
        (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / folder / "mean.npy", np.full((8, 8, 3), mean, np.float32))
        url = f"/elsewhere/{folder}/a.tar" if link else "a.tar"
        split = Split("train", str(tmp_path / folder), (Shard(url, 9, 100, sha256),), mean="mean.npy")
        return split_facts(split, None)

    assert facts("n1")["split train"].startswith("9 samples in 1 shards, contents ")
    assert facts("n1") == facts("n2") == facts("n3", link=True)
    assert facts("n1") != facts("n2", sha256="2" * 64) and facts("n1") != facts("n2", mean=0.25)


def test_a_fact_that_one_rank_lacks_is_a_difference():
    with pytest.raises(InputError, match="differ in split val: None on rank 0 on n1, 7 on rank 1 on n1"):
        agree.check([report(), report(**{"split val": 7})], "auto")


def test_what_one_rank_cannot_open_is_said_with_its_name_and_what_none_can_without():
    with pytest.raises(InputError, match="^rank 1 on n2: no such folder$"):
        agree.check([report(), report(host="n2", problem="no such folder")], "auto")
    with pytest.raises(InputError, match="^no such folder$"):
        agree.check([report(problem="no such folder"), report(host="n2", problem="no such folder")], "auto")


def test_every_rank_uses_the_plain_kernels_when_one_must():
    plain = {**B, "plain": "Triton cannot be imported"}
    reports, gpus = [report([A]), report([plain], "n2")], [0, 0]
    both, auto = [report([A]), report([B])], {"kernels": "auto", "parallel": "gradients"}
    assert agree.choose_kernels(both, gpus, auto) == "fast"
    assert agree.choose_kernels(reports, gpus, auto) == "plain"
    assert agree.choose_kernels(both, gpus, {"kernels": "plain"}) == "plain"
    assert agree.choose_kernels([report(), report()], [None, None], auto) == "plain"
    with pytest.raises(InputError, match="--kernels fast: rank 1 on n2: Triton cannot .*; use --kernels plain"):
        agree.choose_kernels(reports, gpus, {"kernels": "fast"})
    (warning,) = agree.warnings(reports, gpus, {"kernels": "auto", "parallel": "gradients"})
    assert "all ranks use the plain kernels" in warning and "rank 1 on n2: Triton cannot be imported" in warning
    assert not list(agree.warnings([report(), report()], [None, None], {"kernels": "auto"}))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"parallel": "hybrid"}, "--parallel hybrid has none"),
        ({"model.layout": "torchvision"}, "--model.layout torchvision has none"),
        ({"freeze": "conv", "model.batch-norm": True}, "--freeze conv has none with batch normalisation"),
        ({"freeze": "conv", "model.batch-norm": False, "model.layout": "alexnet"}, ""),
    ],
)
def test_settings_that_the_fast_kernels_lack_are_named(settings, reason):
    reports, gpus = [report([A]), report([B])], [0, 0]
    chosen = agree.choose_kernels(reports, gpus, {"kernels": "auto", **settings})
    assert chosen == ("plain" if reason else "fast")
    warnings = list(agree.warnings(reports, gpus, {"kernels": "auto", **settings}))
    assert len(warnings) == bool(reason) and all(reason in warning for warning in warnings)
    if reason:
        with pytest.raises(InputError, match=f"--kernels fast: {reason}; use --kernels plain"):
            agree.choose_kernels(reports, gpus, {"kernels": "fast", **settings})


def test_other_gpus_and_other_decoders_are_a_warning():
    reports = [report([A]), report([{**B, "name": "NVIDIA A100"}], "n2", decoder="Pillow")]
    agree.check(reports, "auto")
    gpus, decoders = agree.warnings(reports, [0, 0], {"kernels": "plain"})
    assert "NVIDIA H100 on rank 0 on n1, NVIDIA A100 on rank 1 on n2" in gpus
    assert "shards/read/jpeg.c on rank 0 on n1, Pillow on rank 1 on n2" in decoders


def test_a_rank_reports_what_it_finds_and_settings_that_may_differ_are_left_out(monkeypatch):
    monkeypatch.setattr(agree.fast, "unsupported", lambda device: "no compiler")
    found, own = agree._report(to_flat(Config(data="x")), lambda: ("data", {"split train": "9 samples"}))
    assert found == "data" and own["problem"] == "" and own["host"] == socket.gethostname()
    assert own["same"]["split train"] == "9 samples" and own["same"]["torch"] == torch.__version__
    assert own["same"]["--epochs"] == 65 and "--data" not in own["same"] and "--out" not in own["same"]
    assert re.fullmatch("[0-9a-f]{12}", own["same"]["this project's code"]) and "Pillow" in own["decoder"]
    json.dumps(own)  # plain types: another version of the code must be able to read it

    def missing():
        raise InputError("no such folder", everywhere=False)

    assert agree._report({"device": "cpu"}, missing)[1]["problem"] == "no such folder"


def test_a_rank_that_sees_one_gpu_uses_it_as_number_0(monkeypatch, caplog):
    properties = type("Properties", (), {"uuid": "GPU-of-rank-1", "name": "NVIDIA H100"})
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(agree.fast, "unsupported", lambda device: "Triton needs a C compiler")
    monkeypatch.setattr(agree.hvd, "rank", lambda: 1)
    settings = {"device": "auto", "kernels": "auto", "parallel": "gradients"}

    def gather(own, name):
        return [{**own, "host": "n0", "gpus": [{**A}]}, own]

    monkeypatch.setattr(agree.hvd, "allgather_object", gather)
    found = agree.agree(settings)
    assert found.device == torch.device("cuda", 0) and found.kernels == "plain" and used == [0]
    assert not caplog.records  # rank 0 warns
    monkeypatch.setattr(agree.hvd, "allgather_object", lambda own, name: [{**own, "gpus": []}, own])
    with pytest.raises(InputError, match="rank 0 on .* has no GPU for itself"):
        agree.agree(settings)


# Two real ranks that differ, and two that send different messages.


def two_ranks(code: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """`code` under horovodrun -np 2, as job.ranks.process runs the commands."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    program = "import horovod.torch as hvd, torch\nfrom job.ranks import agree, process as ranks\n"
    program += f"from shards.command import run\n{code}"
    return run(launcher, "-np", "2", sys.executable, "-c", program, timeout=timeout, env=env)


def test_two_ranks_that_differ_end_at_once_with_one_line():
    code = """
def main():
    agree.agree({"device": "cpu", "epochs": 5 + hvd.rank()})
run(lambda: ranks.run_ranks(main))
"""
    done = two_ranks(code)
    host = os.uname().nodename
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = error_lines(done)
    assert f"differ in --epochs: 5 on rank 0 on {host}, 6 on rank 1 on {host}; give all ranks the same command" in line


@pytest.mark.long  # it waits
def test_ranks_that_send_different_messages_end_the_job_and_say_where():
    """Both would wait for ever. The heartbeat's times are a fifth here: 14 s."""
    code = """
def main():
    hvd.allreduce(torch.ones(1), name=f"only_rank_{hvd.rank()}")
run(lambda: ranks.run_ranks(main))
"""
    done = two_ranks(code, HEARTBEAT_PATIENCE="0.2")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = error_lines(done)
    assert "all ranks have waited for each other for 14 s" in line and f"rank 1 on {os.uname().nodename} at" in line


# The heartbeat's part of it, without waiting.


@pytest.fixture
def watched(monkeypatch):
    """(clock, place and call of the main thread, progress), each a list of one that a test sets."""
    clock, main, value = [1000.0], [("train.py:1, train", None)], [0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(heartbeat, "_main_thread", lambda: main[0])
    monkeypatch.setattr(heartbeat, "_progress", lambda: value[0])
    return clock, main, value


def test_a_rank_says_that_it_waits_only_after_long_in_one_call(watched):
    clock, main, _ = watched
    own = heartbeat._Own()
    for call in range(50):  # messages that take 2 s each, from one line
        clock[0] += 2
        main[0] = ("parallel.py:7, communicate", (1, 2, call))
        assert not own.hangs() and not heartbeat._waits_at(own.sign())
    clock[0] += heartbeat.STILL + 1
    assert not own.hangs() and heartbeat._waits_at(own.sign()) == "parallel.py:7, communicate"
    assert heartbeat._waits_at(b"\x01\x02\x02" + own.sign()) and not heartbeat._waits_at(own.sign() + b"\x02")
    main[0] = ("checkpoint.py:7, save", None)  # a slow disk, however long
    clock[0] += 2
    own.hangs()
    assert not heartbeat._waits_at(own.sign())


def test_only_when_every_rank_waits_there_is_nobody_to_wait_for():
    hosts = ["n1", "n1", "n2"]
    assert not heartbeat._all_wait(["train.py:1", "", "train.py:1"], hosts)  # rank 1 validates
    text = heartbeat._all_wait(["train.py:1", "train.py:1", "fast.py:2"], hosts)
    assert "rank 0 on n1 at train.py:1; rank 2 on n2 at fast.py:2" in text


def test_ranks_that_cannot_reach_each_other_still_watch_themselves(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(heartbeat.hvd, "size", lambda: 2)
    monkeypatch.setattr(heartbeat.hvd, "rank", lambda: 0)
    monkeypatch.setattr(heartbeat.hvd, "broadcast_object", lambda value, name: value)
    answers = {"heartbeat_hosts": ["n1", "n1"], "heartbeat_problem": ["", "rank 1 on n1 cannot reach n1:9 (timed out)"]}
    monkeypatch.setattr(heartbeat.hvd, "allgather_object", lambda value, name: answers[name])
    monkeypatch.setattr(heartbeat.threading.Thread, "start", lambda thread: started.append(thread._target))
    heartbeat.start()
    assert started == [heartbeat._beat_alone] and "rank 1 on n1 cannot reach n1:9" in capsys.readouterr().err


def test_a_rank_notices_that_rank_0_has_ended(monkeypatch):
    """Then rank 0 has said what is wrong, and the others need not."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(heartbeat, "PERIOD", 0.01)
    monkeypatch.setattr(heartbeat, "first_ended", threading.Event())
    monkeypatch.setattr(heartbeat.hvd, "rank", lambda: 1)
    over = threading.Event()
    monkeypatch.setattr(heartbeat._Own, "hangs", lambda own: "over" if over.is_set() else "")
    monkeypatch.setattr(heartbeat, "_end", lambda *reason: sys.exit())  # of the thread

    def beat_until_over():
        with contextlib.suppress(SystemExit):
            heartbeat._beat_other(ours, ["n1", "n1"])

    beat = threading.Thread(target=beat_until_over)
    beat.start()
    theirs.recv(1)
    assert not heartbeat.first_ended.is_set()
    theirs.sendall(b"\x02")
    theirs.shutdown(socket.SHUT_WR)
    ended = heartbeat.first_ended.wait(10)
    over.set()
    beat.join(10)
    assert ended and not beat.is_alive()


def test_rank_0_hears_ranks_of_its_own_job_only(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    listener, token = socket.create_server(("127.0.0.1", 0)), b"t" * 16
    peers = heartbeat._Peers(listener, token, ["n1", "n2", "n3"])

    def connected(*parts):
        peer = socket.create_connection(listener.getsockname())
        for part in parts:
            peer.sendall(part)
            for _ in range(3):  # the connection, what it sends, and nothing more
                peers.listen(0.1)
        return peer

    hello = heartbeat._HELLO.pack(token, 2)
    strangers = [
        connected(b""),  # says nothing
        connected(heartbeat._HELLO.pack(b"x" * 16, 1)),
        connected(heartbeat._HELLO.pack(token, 9)),  # no such rank
    ]
    assert not peers.ranks
    clock[0] += 100
    rank = connected(hello[:5], hello[5:] + b"\x02")  # in two parts, with a sign of life
    assert list(peers.ranks.values()) == [2] and not peers.silent(clock[0] - 50)
    assert "rank 1 on n2 has given no sign of life for 100 s" in peers.silent(clock[0])
    assert peers.longest_silent() == (100, 1, "n2")
    rank.sendall(b"\x02\x04loader.py:7, _wait")
    peers.listen(1)
    assert peers.waiting == {1: "", 2: "loader.py:7, _wait"} and not peers.ending
    rank.sendall(b"\x03")
    peers.listen(1)
    assert peers.ending
    rank.close()
    peers.listen(1)
    assert not peers.ranks
    for stranger in (*strangers, listener):
        stranger.close()


# Launchers.

SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


@pytest.fixture
def bare(monkeypatch):
    """No launcher in the environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI", "OMPI_", "MPI_", "HOROVOD_", "MV2_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (SRUN, "srun started 4 processes, and Horovod sees one.*--mpi=pmix"),
        ({**SRUN, "PMI_SIZE": "4", "PMI_RANK": "2"}, "srun started 4.*--mpi=pmix"),  # srun --mpi=pmi2
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "mpirun of MPICH or Intel MPI started 2.*--rebuild"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun of Open MPI started 2.*built with"),
        ({"HOROVOD_SIZE": "3"}, "horovodrun started 3"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ""),  # batch script
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "1"}, ""),  # horovodrun -np 1 within a step
        ({}, ""),
    ],
)
def test_processes_that_each_believe_to_be_alone_are_told(bare, variables, words):
    for name, value in variables.items():
        bare.setenv(name, value)
    text = lone_process(1, "Horovod")
    assert re.search(words, text) if words else not text
    assert not lone_process(4, "Horovod")


@pytest.mark.parametrize("variables", [SRUN, {"PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_packing_alone_under_a_launcher_of_several_is_refused(bare, variables):
    for name, value in variables.items():
        bare.setenv(name, value)
    alone = type("MPI", (), {"COMM_WORLD": type("World", (), {"size": 1})})
    bare.setitem(sys.modules, "mpi4py", type("mpi4py", (), {"MPI": alone}))
    with pytest.raises(InputError, match="and mpi4py sees one"):
        pool.mpi_world(workers_given=False)
    for name in variables:
        bare.delenv(name)
    assert pool.mpi_world(workers_given=True) is None


# Ranks that are slow.


@pytest.mark.parametrize(
    ("seconds", "slow", "factor"),
    [
        ([10.0, 12.1], [1], 1.21),  # two ranks: each is the other's measure
        ([10.0, 11.9], [], 1.19),
        ([13.0, 10.0, 10.0, 9.0], [0], 1.3),
        ([10.0, 10.0, 20.0, 20.0], [2, 3], 2.0),
        ([0.1, 0.2], [], 2.0),  # too short to tell
        ([10.0], [], 1.0),
    ],
)
def test_a_rank_a_fifth_slower_than_the_others_is_named(seconds, slow, factor):
    said, events = [], []
    made = object.__new__(progress.Progress)
    made.log = type("Log", (), {"warn": said.append, "write": lambda *_, **fields: events.append(fields)})
    made._recent = type("Sums", (), {"steps": progress.SLOW_STEPS})
    made._hosts, made._slow = [f"n{rank}" for rank in range(len(seconds))], set()
    for _ in range(2):  # named once
        found = made._compare(9, 0, [[own, 0.0, 0.0, -1.0] for own in seconds])
        assert found["slowest_factor"] == pytest.approx(factor, abs=1e-3)
        assert found["slowest_rank"] == seconds.index(max(seconds))
    assert [event["rank"] for event in events] == slow and len(said) == len(slow)
    assert all(f"rank {rank} on n{rank} is" in text for rank, text in zip(slow, said, strict=True))


# Precision, and what Triton needs.


@pytest.mark.parametrize(("precision", "matmul", "tf32"), [("fp32", "highest", False), ("tf32", "high", True)])
def test_precision_is_what_its_name_says(monkeypatch, precision, matmul, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    before = torch.get_float32_matmul_precision()
    try:
        passes.set_precision(precision)
        assert torch.get_float32_matmul_precision() == matmul and torch.backends.cudnn.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def triton(monkeypatch, tmp_path):
    """Nothing about Triton is known or set."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "CC"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    caches.triton_cache.cache_clear()
    caches.triton_lacks.cache_clear()
    yield monkeypatch
    caches.triton_cache.cache_clear()
    caches.triton_lacks.cache_clear()


def test_tritons_cache_lies_where_it_can_be_written(triton, tmp_path):
    on_node = str(tmp_path / "node" / f"alexnet-horovod-{os.getuid()}-triton")
    triton.setenv("HOME", str(tmp_path))
    assert caches.triton_cache() == str(tmp_path / ".triton" / "cache") == os.environ["TRITON_CACHE_DIR"]
    for home, kind in (("/proc", "proc"), (str(tmp_path), "nfs4")):
        caches.triton_cache.cache_clear()
        triton.setenv("TRITON_CACHE_DIR", "")
        triton.setenv("HOME", home)
        triton.setattr(caches, "file_system", lambda path, kind=kind: kind)
        assert caches.triton_cache() == on_node == os.environ["TRITON_CACHE_DIR"]
        assert caches.triton_lacks() == ""
    caches.triton_cache.cache_clear()
    triton.setenv("TRITON_CACHE_DIR", "/proc/kernels")  # the user's wish
    caches.triton_lacks.cache_clear()
    assert "/proc/kernels cannot be written" in caches.triton_lacks()


def test_a_node_without_a_compiler_or_headers_is_found_before_a_launch(triton, tmp_path):
    triton.setenv("HOME", str(tmp_path))
    triton.setenv("PATH", str(tmp_path))
    assert "needs a C compiler (gcc, clang, or CC=PATH)" in caches.triton_lacks()
    fake = tmp_path / "gcc"
    fake.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2; exit 1\n")
    fake.chmod(0o700)
    caches.triton_lacks.cache_clear()
    assert "Python's headers" in caches.triton_lacks() and "Python.h: No such file" in caches.triton_lacks()
    caches.triton_lacks.cache_clear()
    triton.setenv("CC", str(tmp_path / "nothing"))
    assert "does not run" in caches.triton_lacks()


def test_a_folder_of_somebody_else_or_open_to_all_keeps_no_libraries(tmp_path):
    assert caches.problem_with(str(tmp_path / "mine")) == ""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "other users" in caches.problem_with(str(tmp_path / "open"))


def test_the_fast_kernels_are_refused_where_triton_lacks_something(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fast, "triton_lacks", lambda: "no compiler")
    assert fast.unsupported(torch.device("cuda", 0)) == "no compiler"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in fast.unsupported(torch.device("cuda", 0))
