"""job.watch shows running, finished, killed and hung runs, and reads half-written files without complaint."""

import fcntl
import json
import subprocess
import sys
import time

import pytest

from job import watch
from tests.launch import error_lines, python


def write(folder, lines, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def line(kind, step, at, **values):
    return {"kind": kind, "step": step, "epoch": step // 100, "time": at, **values}


def training(first, last, began, **values):
    """A line every 10 steps, 2 s apart."""
    return [
        line("train", s, began + 2 * i, loss=2.3 - s / 1000, images_per_second=160.0, data_wait_fraction=0.05, **values)
        for i, s in enumerate(range(first, last + 1, 10))
    ]


def start(step, at, **values):
    return line("event", step, at, event="start", world_size=4, last_step=1000, **values)


def test_a_running_run_half_way(tmp_path):
    now = time.time()
    lines = [start(0, now - 200), *training(10, 500, now - 98, slowest_rank=3, slowest_factor=1.31, bad_samples=1)]
    lines.insert(30, line("event", 300, now - 40, event="slow rank", rank=3, host="n2", slower=0.31))
    lines.append(line("val", 500, now, top1=0.4, top5=0.8, loss=2.0))
    run = write(tmp_path / "run", lines, tail='{"kind": "train", "st')  # a line that is just being written
    about = watch.describe(run, now)
    assert about["status"] == "running" and about["step"] == 500 and about["last_step"] == 1000
    assert about["eta_seconds"] == pytest.approx(100) and about["images_per_second_rank"] == 40
    assert about["slowest_rank"] == 3 and about["slow_ranks"] == ["rank 3 on n2"]
    page = watch.page(about)
    for text in ("50.0%", "1:40", "160 on 4 ranks", "40.00%", "rank 3 on n2", "50, replaced", "5.0%"):
        assert text in page, text
    assert len(page.splitlines()) < 40


def test_top1_flop_rate_and_energy_are_shown_and_what_is_not_measured_is_said(tmp_path):
    now = time.time()
    joules = dict(gpu_joules=7.2e6, cpu_joules=None, kwh=2.0, co2_grams=946.0)
    rates = dict(top1=0.4321, flops_per_second=102e12, peak_fraction=0.05)
    lines = [start(0, now - 200), *training(10, 50, now - 98, **rates, **joules, joules_per_image=0.01234)]
    lines.append(line("train", 60, now, loss=2.0, images_per_second=100.0, **rates, **joules, joules_per_image=None))
    about = watch.describe(write(tmp_path / "run", lines), now)
    assert (about["train_top1"], about["joules_per_image"], about["kwh"]) == (0.4321, 0.01234, 2.0)
    page = watch.page(about)
    assert "top-1 43.21%" in page and "102 TFLOP/s, 5.0% of the peak (2,040 TFLOP/s)" in page
    assert "0.0123 J per image, 2 kWh, 946 g of CO2 (GPU)" in page
    # At the end, what came after the last line counts, too.
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": 60, "energy": {**joules, "kwh": 3.0}}))
    assert watch.describe(write(tmp_path / "run", [*lines, line("event", 60, now, event="done")]), now)["kwh"] == 3.0
    for missing in ({}, dict.fromkeys(["top1", "flops_per_second", "peak_fraction", "joules_per_image", *joules])):
        about = watch.describe(write(tmp_path / "older", [start(0, now), *training(10, 50, now, **missing)]), now)
        assert about["kwh"] is None and "energy           not measured" in watch.page(about)


def test_restarts_are_counted_and_the_speed_is_that_of_the_last_part(tmp_path):
    now = time.time()
    lines = [start(0, now - 9000), *training(10, 100, now - 8900)]
    lines += [line("event", 100, now - 8000, event="stopped", signal="SIGUSR1"), start(100, now - 100)]
    lines += training(110, 200, now - 18)
    about = watch.describe(write(tmp_path / "run", lines), now)
    assert (about["status"], about["restarts"], about["stops"]) == ("running", 1, 1)
    assert about["eta_seconds"] == pytest.approx(160)


def test_a_run_that_was_rolled_back_is_shown_where_it_is_now(tmp_path):
    now = time.time()
    undone = [*training(810, 900, now - 8100), line("val", 900, now - 8050, top1=0.9, top5=1.0)]
    lines = [start(0, now - 9000), *undone, line("event", 990, now - 8000, event="stopped"), start(200, now - 60)]
    about = watch.describe(write(tmp_path / "run", [*lines, *training(210, 300, now - 18)]), now)
    assert (about["step"], about["epoch"], about["stops"]) == (300, 3, 1)
    assert about["eta_seconds"] == pytest.approx(140)  # 700 steps of 0.2 s
    # What was undone is in no curve.
    assert about["best_top1"] is None and all(step <= 300 for step, _ in about["curves"]["loss"])
    about = watch.describe(write(tmp_path / "new", lines), now)  # nothing trained yet since it went on
    assert (about["step"], about["epoch"]) == (200, 2)


def test_a_run_that_says_nothing_is_running_only_while_its_lock_is_held(tmp_path):
    now = time.time()
    run = write(tmp_path / "run", [start(0, now), *training(10, 100, now)])
    assert watch.describe(run, now + 60)["status"] == "running"
    assert watch.describe(run, now + 600)["status"] == "silent"
    assert "killed, or waiting" in watch.page(watch.describe(run, now + 600))
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", held + "; input()", str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout.readline() == b"held\n"
        assert watch.describe(run, now + 600)["status"] == "running"
        owner.stdin.close()
    assert watch.describe(run, now + 600)["status"] == "silent"
    with open(run / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # watching holds no lock


def test_the_end_of_a_run_is_shown(tmp_path):
    now = time.time()
    lines = [start(0, now), *training(10, 100, now)]
    hang = line("event", 100, now, event="hang", reason="rank 1 on n2 has given no sign of life for 61 s")
    about = watch.describe(write(tmp_path / "hang", [*lines, hang]), now)
    assert about["status"] == "hang" and "rank 1 on n2" in watch.page(about)
    done = line("event", 1000, now, event="done")
    about = watch.describe(write(tmp_path / "done", [*lines, done]), now + 1e6)
    assert about["status"] == "done" and about["eta_seconds"] is None


def test_a_run_with_nothing_yet(tmp_path):
    about = watch.describe(write(tmp_path / "run", []), time.time())
    assert about["status"] == "running" and about["step"] == 0
    assert "step 0/0" in watch.page(about)


def test_the_command(tmp_path):
    now = time.time()
    run = write(tmp_path / "a run", [start(0, now), *training(10, 1000, now), line("event", 1000, now, event="done")])
    assert json.loads(python("job.watch", str(run), "--json").stdout)["status"] == "done"
    shown = python("job.watch", str(run), "--follow")  # ends with the run
    assert shown.returncode == 0 and "100.0%" in shown.stdout and "*" in shown.stdout
    wrong = python("job.watch", str(tmp_path))
    assert wrong.returncode == 2 and len(error_lines(wrong)) == 1 and "Traceback" not in wrong.stderr


def test_a_plot_stays_within_its_frame():
    for points in ([[1, 5.0], [2, 5.0]], [[i, i % 7] for i in range(1000)], [[0, 1e9], [10**9, -1e9]]):
        lines = watch.plot(points, "title").splitlines()
        assert len(lines) == watch.PLOT_HEIGHT + 3
        assert all(len(text) <= watch.PLOT_WIDTH + 40 for text in lines) and any("*" in text for text in lines)
    assert watch.plot([[1, 1.0]], "title") == ""
