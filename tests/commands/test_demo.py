"""The demo: from the repository's own images to a trained network in minutes."""

import json
import re

import pytest

from tests.launch import ROOT, run


@pytest.mark.long
def test_the_demo_reaches_its_accuracy_and_says_where_the_time_went():
    done = run("bash", "job/demo.sh", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    out = ROOT / re.search(r"run directory: (\S+)", done.stdout)[1]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["top1"] >= 0.78
    for row in ("validation top-1", "images/s, all ranks", "waiting for data", "forward and backward", "allreduce"):
        assert row in done.stdout
