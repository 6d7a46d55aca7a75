"""What a long command shows of its progress, on a terminal and in a batch log."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from shards.machine import progress
from tests.launch import ROOT, run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets; `stderr` is where Progress writes."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def shown(clock, monkeypatch, stream, steps, **more) -> str:
    """What Progress writes when `steps` of (seconds since the start, units) are added."""
    monkeypatch.setattr("sys.stderr", stream)
    bar = progress.Progress(**more)
    for seconds, count in steps:
        clock.now = 100.0 + seconds
        bar.add(count)
    bar.close()
    return stream.getvalue()


def test_a_batch_log_gets_a_line_per_ten_seconds_with_time_rate_and_eta(clock, monkeypatch):
    # One second passes before the first image, then 100 images per second.
    steps = [(1 + n / 10, 10) for n in range(251)]
    text = shown(clock, monkeypatch, io.StringIO(), steps, total=10_000, what="packing train")
    lines = text.splitlines()
    assert len(lines) == 2 and "\r" not in text
    assert re.fullmatch(r"\d\d:\d\d:\d\d packing train 910/10,000 images 100 images/s ETA 0:01:31", lines[0])
    assert lines[1].endswith("1,910/10,000 images 100 images/s ETA 0:01:21")


def test_a_terminal_gets_one_line_that_is_rewritten_and_cleared(clock, monkeypatch):
    text = shown(clock, monkeypatch, Terminal(), [(n, 1) for n in range(1, 4)], total=4, unit="shards", what="x")
    assert "\n" not in text and text.count("\r") == 4 and text.endswith("\r\033[K")
    assert "3/4 shards 1.0 shards/s ETA 0:00:01" in text


def test_what_an_earlier_run_did_counts_as_done_and_not_for_the_rate(clock, monkeypatch):
    text = shown(clock, monkeypatch, io.StringIO(), [(1, 0), (11, 50)], total=1000, done=500)
    assert "550/1,000 images 5.0 images/s ETA 0:01:30" in text


def test_an_unknown_total_has_no_eta(clock, monkeypatch):
    text = shown(clock, monkeypatch, io.StringIO(), [(1, 10), (11, 100)], total=0, unit="samples", what="indexing val")
    assert text.endswith("indexing val 110 samples 10 samples/s\n")


def test_a_short_command_says_nothing(clock, monkeypatch):
    assert shown(clock, monkeypatch, io.StringIO(), [(1, 5), (9, 5)], total=10) == ""


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, True),
        ({"OMPI_COMM_WORLD_RANK": "0"}, False),  # mpirun gives a pseudo-terminal whatever it writes to
        ({"OMPI_COMM_WORLD_RANK": "0", "HOROVOD_TERMINAL": "1"}, True),
        ({"HOROVOD_RANK": "0", "HOROVOD_TERMINAL": "0"}, False),
    ],
)
def test_a_rank_shows_a_line_that_is_rewritten_only_where_horovodrun_has_a_terminal(monkeypatch, environment, seen):
    for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "HOROVOD_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stdout = Terminal()
    monkeypatch.setattr("sys.stdout", stdout)
    assert progress.on_terminal(stdout) is seen
    assert progress.on_terminal(Terminal()) is (not environment)  # a rank's stderr is held back until a line ends


def test_a_line_is_not_longer_than_the_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    progress.Line(stream).show("x" * 50)
    assert stream.getvalue() == "\r" + "x" * 19 + "\033[K"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (185, "0:03:05"), (86399, "23:59:59"), (90000, "1 day 1:00:00"), (352985, "4 days 2:03:05")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_a_reader_that_ends_early_leaves_no_traceback():
    code = "from shards.command import run\nrun(lambda: print('x' * 100000))"
    done = run("bash", "-c", f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}')
    assert (done.returncode, done.stdout, done.stderr) == (1, "x", "")


def test_ctrl_c_is_one_line_and_exit_code_130():
    code = "import time; from shards.command import run; run(lambda: (print('on', flush=True), time.sleep(60)))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "stopped by Ctrl-C\n"
    assert process.returncode == 130


def test_training_goes_on_when_nobody_reads_its_output(tmp_path, monkeypatch):
    from job.run.log import RunLog

    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        log = RunLog(str(tmp_path / "run"), active=True)
        log.say("a")
        log.progress("b")
        log.close()


def test_requests_to_stop_are_answered_at_once_and_a_second_one_ends(monkeypatch, capfd):
    from job.ranks import heartbeat
    from job.ranks import process as ranks

    left, ended = [], threading.Event()

    class Signals(ranks.StopSignals):
        SAME_REQUEST_SECONDS = -1.0

    def leave(code):
        left.append(code)
        ended.set()

    monkeypatch.setattr(ranks, "leave", leave)
    monkeypatch.setattr(ranks, "launched_rank", lambda: 0)
    monkeypatch.setattr(heartbeat, "LAUNCHED", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        stop = Signals()
        stop.orderly = True
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(20) and left == [130] and stop.requested == "SIGUSR1"
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "SIGUSR1: stopping after this step, with a checkpoint; a second request ends at once",
        "SIGINT: ending at once",
    ]
