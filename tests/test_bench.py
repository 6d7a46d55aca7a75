"""job.bench: one JSON object with the promised fields; other subjects and senseless options are refused in one line."""

import json

import pytest

from tests.launch import error_lines, horovodrun, python
from tests.shardmaker import write_split
from tests.test_loader import jpeg


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


def test_a_step_is_measured_on_one_rank_and_on_two():
    result = printed(python("job.bench", "compute", *STEP))
    assert result["images_per_second"] > 0 and len(result["rounds"]) == 3 and result["ranks"] == 1
    assert result["device"] and result["versions"]["torch"]
    assert -1 < result["timer_cost"] < 1
    result = printed(horovodrun(2, "job.bench", "train", *STEP))
    assert result["ranks"] == 2 and result["efficiency"] == pytest.approx(
        result["images_per_second"] / result["images_per_second_without_allreduce"]
    )


def test_an_allreduce_is_measured_by_size():
    result = printed(horovodrun(2, "job.bench", "allreduce", "--largest", "1", "--json", gloo=True))
    assert [row["bytes"] for row in result["bus_bandwidth"]] == [1024 * 4**i for i in range(6)]
    for row in result["bus_bandwidth"]:
        assert row["bus_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])  # 2 (n - 1) / n is 1 for two ranks


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
