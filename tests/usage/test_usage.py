"""FLOPs by hand, peaks by name, memory of a process and its children, and all of it in the files of a real run."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from job import config
from job.network.alexnet import AlexNet, build
from job.usage import memory, words
from job.usage.flops import Flops, peak, training_flops
from tests.launch import ROOT, error_lines, horovodrun, metrics, python, run
from tests.run.test_train import SMALL  # a network small enough for many runs on two cores


def test_flops_of_the_published_network_by_hand():
    # Outputs x inputs of each, groups of two in layers 2, 4 and 5; a multiplication and an addition are two.
    convolutions = [(55, 96, 3 * 11**2), (27, 256, 48 * 25), (13, 384, 256 * 9), (13, 384, 192 * 9), (13, 256, 192 * 9)]
    products = sum(side**2 * outputs * inputs for side, outputs, inputs in convolutions)
    products += 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert training_flops(AlexNet()) == 3 * 2 * products == pytest.approx(4.3e9, rel=0.02)


def test_counting_flops_changes_nothing_of_the_network():
    settings = config.parse(["--recipe", "large-batch", "--data", "d", "--model.classes", "10"], "job.train", "")
    settings.model.width, settings.image_size = 0.1, 67
    model = build(settings).train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert training_flops(model) > 0 and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "tf32", 378),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-PCIE-32GB", "fp32", 14.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # it has no such unit
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L4", "tf32", 60),
        ("NVIDIA GH200 480GB", "bf16", 990),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("Some new GPU", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_and_unknown_ones_are_unknown(name, precision, tflops):
    assert peak(name, precision) == (tflops and tflops * 1e12)


def test_the_share_of_the_peak_is_of_all_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    one = Flops(AlexNet(), torch.device("cuda", 0), "bf16")
    found = one.rate(20_000, ranks=4)
    assert found["flops_per_second"] == 20_000 * training_flops(AlexNet())
    assert found["peak_fraction"] == pytest.approx(found["flops_per_second"] / (4 * 312e12))
    assert words.flops(found).endswith("7.0% of the peak (1,248 TFLOP/s)")
    unknown = Flops(AlexNet(), torch.device("cpu"), "bf16").rate(20.0, 1)
    assert unknown["peak_fraction"] is None and words.flops(unknown) == "86.9 GFLOP/s"
    assert one.rate(None, 1) == {"flops_per_second": None, "peak_fraction": None}


def test_the_peak_memory_of_children_counts_and_of_what_they_freed():
    code = "x = b'1' * (200 << 20); del x; print('', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        own, readers = memory.host_peak()
        child.communicate("\n")
    assert readers > 200 << 20 and own > 100 << 20
    peaks = [memory.Peak(0.0, 0.0, 5.0, 1.0), memory.Peak(0.0, 0.0, 3.0, 2.0)]
    found = memory.largest(peaks)
    assert found == {"gpu_allocated_bytes": None, "gpu_reserved_bytes": None, "host_bytes": 5, "readers_bytes": 2}


# job.train with counters of its own: argv[1] is a folder in place of /sys/class/powercap.
WITH_COUNTERS = """
import sys
from job.usage import energy
energy.Energy.__init__.__defaults__ = (sys.argv.pop(1),)
from job import train
from shards.command import run
run(train.main)
"""


@pytest.fixture
def counters(tmp_path):
    """A folder with the counter of one package that draws 1000 W."""
    domain = tmp_path / "powercap" / "intel-rapl:0"
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0\n")
    (domain / "max_energy_range_uj").write_text("1000000000\n")
    began, ready, end = time.monotonic(), threading.Event(), threading.Event()

    def draw():
        while not end.is_set():
            (tmp_path / "new").write_text(f"{int(1e9 * (time.monotonic() - began)) % 10**9}\n")
            (tmp_path / "new").rename(domain / "energy_uj")
            ready.set()
            end.wait(0.001)

    thread = threading.Thread(target=draw)
    thread.start()
    assert ready.wait(10)
    yield tmp_path / "powercap"
    end.set()
    thread.join()


@pytest.mark.long
def test_two_ranks_count_their_host_once_over_all_starts(demo_data, tmp_path, counters):
    prices = tmp_path / "prices.yaml"
    prices.write_text("grams_co2_per_kwh: 100\n")
    script = tmp_path / "with_counters.py"
    script.write_text(WITH_COUNTERS)
    out, totals = tmp_path / "run", []
    for steps in ("20", "30"):
        options = ["--data", str(demo_data), "--out", str(out), "--max-steps", steps, "--metrics.prices", str(prices)]
        launcher = f"{sys.prefix}/bin/horovodrun"
        began = time.monotonic()
        done = run(
            *(launcher, "-np", "2", sys.executable, str(script), str(counters), *SMALL, *options),
            env={"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " J per image, " in done.stdout and "(CPU)" in done.stdout
        totals.append(json.loads((out / "summary.json").read_text()))
        assert 0 < totals[-1]["energy"]["cpu_joules"] < 1000 * (time.monotonic() - began) * len(totals)
    first, second = (summary["energy"] for summary in totals)
    assert first["of"] == second["of"] == "CPU" and second["gpu_joules"] is None
    assert second["cpu_joules"] > first["cpu_joules"] + 1000 * 0.2  # ten steps and a validation take longer
    assert second["kwh"] == second["cpu_joules"] / 3.6e6 and second["co2_grams"] == 100 * second["kwh"]
    lines = metrics(out, "train")
    joules = [line["cpu_joules"] for line in lines]
    assert joules == sorted(joules) and len(set(joules)) > 20  # on a busy machine the counter above stands now and then
    for before, line in zip(lines[1:19], lines[2:20], strict=True):
        assert line["joules_per_image"] == pytest.approx((line["cpu_joules"] - before["cpu_joules"]) / 32)
    # Both ranks together drew 1000 W, not 2000: what the clock says, with the steps' own times.
    watts = (lines[19]["cpu_joules"] - lines[1]["cpu_joules"]) / (lines[19]["time"] - lines[1]["time"])
    assert watts == pytest.approx(1000, rel=0.25)
    assert json.loads((out / "timings.json").read_text())["energy"] == second
    watched = json.loads(python("job.watch", str(out), "--json").stdout)
    assert (watched["kwh"], watched["co2_grams"]) == (second["kwh"], second["co2_grams"])
    assert watched["train_top1"] == lines[-1]["top1"] and 0 <= lines[-1]["top1"] <= 1


@pytest.mark.long
def test_a_run_without_counters_says_so_and_measures_the_rest(demo_data, tmp_path):
    options = ["--data", str(demo_data), "--out", str(tmp_path / "run"), "--max-steps", "12"]
    done = horovodrun(2, "job.train", *SMALL, *options, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    line = metrics(tmp_path / "run", "train")[-1]
    if summary["energy"]["of"] == "not measured":  # as on most machines, where only root may read the counters
        assert re.search(r"^energy +not measured$", done.stdout, re.M)
        assert line["kwh"] is line["joules_per_image"] is summary["energy"]["kwh"] is None
    assert summary["memory"]["host_bytes"] > 100 << 20 and summary["memory"]["gpu_allocated_bytes"] is None
    assert summary["flops_per_second"] == pytest.approx(
        summary["images_per_second"] * line["flops_per_second"] / line["images_per_second"]
    )
    assert summary["peak_fraction"] is None


@pytest.mark.parametrize("text", ["grams_co2_per_kwh: much\n", "[", None])
def test_a_file_of_prices_with_a_mistake_is_one_line_before_training(demo_data, tmp_path, text):
    if text:
        (tmp_path / "prices.yaml").write_text(text)
    options = ["--data", str(demo_data), "--out", str(tmp_path / "run"), "--metrics.prices", f"{tmp_path}/prices.yaml"]
    done = python("job.train", *SMALL, *options)
    assert done.returncode == 2 and len(error_lines(done)) == 1 and "prices.yaml" in error_lines(done)[0]
