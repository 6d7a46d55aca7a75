"""job.bench: one JSON object with the promised fields; other subjects and senseless options are refused in one line."""

import argparse
import itertools
import json
import resource
import statistics
import sys

import pytest

from job.bench import allreduce as bench_allreduce
from job.bench import step as bench_step
from job.bench.options import add_step_options
from tests.batches.test_loader import jpeg
from tests.launch import ROOT, error_lines, horovodrun, python, run
from tests.shardmaker import write_split


def test_loader_reports_what_it_promises(tmp_path):
    split = write_split(tmp_path, [60, 60], 16, jpeg)
    small = [
        "--data",
        split.root,
        "--seconds",
        "0.3",
        "--rounds",
        "1",
        "--batch",
        "8",
        "--crop",
        "12",
        "--workers",
        "1",
    ]
    done = python("job.bench", "loader", *small, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images_per_second"] > 0 and result["decode_images_per_second"] > 0
    assert result["workers"] == 1 and result["samples"] == 120
    assert result["device"] and result["versions"]["torch"]
    assert result["slot_bytes"] > 0 and result["worker_bytes"] > 0


STEP = ["--recipe", "demo", "--batch", "4", "--steps", "2", "--rounds", "3", "--warmup", "1", "--json"]


def printed(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.long
def test_a_step_is_measured_on_one_rank_and_on_two():
    result = printed(python("job.bench", "compute", *STEP))
    assert result["images_per_second"] > 0 and len(result["rounds"]) == 3 and result["ranks"] == 1
    assert result["device"] and result["versions"]["torch"]
    result = printed(horovodrun(2, "job.bench", "train", *STEP))
    assert result["ranks"] == 2 and result["images_per_second"] > 0 and result["efficiency"] > 0


def test_an_allreduce_is_measured_by_size():
    result = printed(horovodrun(2, "job.bench", "allreduce", "--largest", "1", "--json", gloo=True))
    assert [row["bytes"] for row in result["bus_bandwidth"]] == [1024 * 4**i for i in range(6)]
    assert all(row["seconds"] > 0 and row["repetitions"] > 0 for row in result["bus_bandwidth"])


@pytest.fixture
def four_ranks(monkeypatch):
    """This process as rank 0 of four that need no launcher."""
    import horovod.torch as hvd
    import torch

    from job.ranks import agree

    for name, value in (("size", 4), ("rank", 0), ("barrier", None)):
        monkeypatch.setattr(hvd, name, lambda value=value: value)
    monkeypatch.setattr(hvd, "broadcast_object", lambda value, name: value)
    monkeypatch.setattr(agree, "agree", lambda settings: agree.Agreed(torch.device("cpu"), "plain", None))
    return hvd


def test_the_slowest_rank_and_the_median_round_count(four_ranks, monkeypatch):
    """Images per second, efficiency and the cost of the timers, from steps per second that are known."""
    steps = {"alone": [5.0, 4.0, 6.0], "together": [2.0, 4.0, 3.0], "timed": [1.0, 3.2, 2.0]}
    calls = itertools.count()

    def timed(run, count, device):
        number, name = divmod(next(calls), 3)  # in each round: alone, together, with timers
        return list(steps.values())[name][number]

    def make_step(settings, batch, kernels, together, device):
        def step(timer=None):
            pass

        step.__name__ = "together" if together else "alone"
        return step

    def allgather(rates, name):
        slower = {name: [rate / 2 for rate in row] for name, row in rates.items()}
        return [rates, rates, slower, rates]

    monkeypatch.setattr(bench_step, "timed", timed)
    monkeypatch.setattr(bench_step, "make_step", make_step)
    monkeypatch.setattr(four_ranks, "allgather_object", allgather)
    parser = argparse.ArgumentParser()
    parser.set_defaults(subject="train", json=True)
    add_step_options(parser)
    result = bench_step.measure(parser.parse_args(["--recipe", "demo", "--batch", "10", "--rounds", "3"]))
    # 4 ranks times 10 images, at half of the rate of the other ranks.
    assert result["rounds"] == pytest.approx([40.0, 80.0, 60.0])
    assert result["images_per_second"] == pytest.approx(60.0)
    assert result["images_per_second_without_allreduce"] == pytest.approx(100.0)
    assert result["efficiency"] == pytest.approx(0.6)
    assert result["timer_cost"] == pytest.approx(0.5)  # rounds by round: 1.0, 0.25, 0.5


def test_bus_bandwidth_of_four_ranks_is_one_and_a_half_times_size_over_time(four_ranks, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench_allreduce.time, "perf_counter", lambda: 0.001 * next(clock))  # each allreduce: 1 ms
    monkeypatch.setattr(four_ranks, "allreduce_", lambda values, op, name: values)
    result = bench_allreduce.measure(argparse.Namespace(largest=1, device="cpu"))
    assert [row["seconds"] for row in result["bus_bandwidth"]] == pytest.approx([0.001] * 6)
    assert [row["bus_bandwidth"] for row in result["bus_bandwidth"]] == pytest.approx(
        [1.536e6, 6.144e6, 24.576e6, 98.304e6, 393.216e6, 1572.864e6]
    )


COMMANDS = [
    "job",
    "shards",
    *(
        f"job.{name}"
        for name in ("train", "watch", "evaluate", "predict", "look", "export", "doctor", "scaling", "bench")
    ),
    *(f"shards.{name}" for name in ("pack", "index", "verify")),
    *(f"job.scaling {name}" for name in ("run", "report", "predict")),
    *(f"job.bench {name}" for name in ("loader", "compute", "allreduce", "train")),
]
HEAVY = {
    "torch",
    "horovod",
    "numpy",
    "scipy",
    "mpi4py",
    "webdataset",
    "matplotlib",
    "jinja2",
    "PIL",
}  # modules that take long to load


def test_the_commands_are_all_that_there_are():
    files = [path for package in ("job", "shards") for path in (ROOT / package).rglob("*.py")]
    files = [path for path in files if '__name__ == "__main__"' in path.read_text() or path.stem == "__main__"]
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in files}
    found -= {"job.batches.reader", "job.tracking.child"}  # which Loader and --track start
    assert found == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_a_second(command):
    """Of this processor: on a busy machine the clock would measure the others. The median of three counts."""
    took = []
    while len(took) < 3 and (not took or took[0] > 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(sys.executable, "-X", "importtime", "-m", *command.split(), "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0 and "usage" in done.stdout.lower()
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded and not loaded & HEAVY
    assert statistics.median(took) < 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["loaders"], "loaders"),
        (["loader", "--worker", "1"], "did you mean --workers"),
        (["loader", "--data", "/nowhere"], "no data folder /nowhere"),
        (["compute", "--batch", "0"], "--batch is 0"),
        (["allreduce"], "horovodrun -np 2"),
        ([], "SUBJECT"),
    ],
)
def test_bad_usage_is_one_line(arguments, message):
    done = python("job.bench", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = error_lines(done)
    assert message in line
