"""Energy: what counters say, once per GPU and host, over all starts; where one is missing, it is not measured."""

import json
import math
import sys
import time
import types

import horovod.torch as hvd
import pytest
import torch

from job.run.log import RunLog, append_line
from job.usage import energy, gpu, words
from job.usage.energy import CpuCounter, Energy, GpuCounter

NAN = math.nan
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def powercap(tmp_path):
    """Two packages with a core domain inside one of them, the platform, and a second interface to the first package."""
    folder = tmp_path / "powercap"
    for domain, name, value in (
        ("intel-rapl:0", "package-0", 1_000_000),
        ("intel-rapl:0:0", "core", 1_000_000),
        ("intel-rapl:1", "package-1", 250_000_000),
        ("intel-rapl:2", "psys", 1_000_000),
        ("intel-rapl-mmio:0", "package-0", 1_000_000),
    ):
        (folder / domain).mkdir(parents=True)
        (folder / domain / "name").write_text(f"{name}\n")
        (folder / domain / "energy_uj").write_text(f"{value}\n")
        (folder / domain / "max_energy_range_uj").write_text("262143328850\n")
    return folder


def set_counter(folder, domain, value):
    """In one piece, as the kernel does."""
    (folder / "new").write_text(f"{value}\n")
    (folder / "new").rename(folder / domain / "energy_uj")


def test_packages_are_counted_and_nothing_inside_or_around_them(powercap):
    counter = CpuCounter(str(powercap))
    assert counter.read() == 0
    for domain in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        set_counter(powercap, domain, 6_000_000)
    set_counter(powercap, "intel-rapl:1", 257_000_000)
    assert counter.read() == pytest.approx(5 + 7)
    counter.close()


def test_a_counter_that_starts_again_at_0_loses_nothing(powercap):
    set_counter(powercap, "intel-rapl:0", 262_143_000_000)
    counter = CpuCounter(str(powercap))
    set_counter(powercap, "intel-rapl:0", 671_150)
    assert counter.read() == pytest.approx(1.0)
    set_counter(powercap, "intel-rapl:0", 1_671_150)
    assert counter.read() == pytest.approx(2.0)
    counter.close()


def test_counters_are_looked_at_often_enough_whatever_the_log_does(powercap, monkeypatch):
    monkeypatch.setattr(energy, "LOOK_SECONDS", 0.01)
    counter = CpuCounter(str(powercap))
    for value in (200_000_000_000, 100_000_000_000, 50_000_000_000):  # it has wrapped twice
        set_counter(powercap, "intel-rapl:0", value)
        end = time.monotonic() + 10
        while counter._packages[str(powercap / "intel-rapl:0")] != value:  # the counter's thread sees it
            assert time.monotonic() < end
            time.sleep(0.01)
    assert counter.read() == pytest.approx((199_999 + 162_143.328850 + 212_143.328850), abs=0.01)
    counter.close()


@pytest.mark.parametrize("missing", ["folder", "package", "permission", "half", "later"])
def test_what_cannot_be_read_is_not_a_number_and_never_0(powercap, monkeypatch, missing):
    opened = energy._text

    def refuse(folder, name):
        if name == "energy_uj" and (missing == "permission" or missing != "folder" and folder.endswith("rapl:1")):
            raise PermissionError(13, "Permission denied")
        return opened(folder, name)

    if missing == "package":
        for domain in ("intel-rapl:0", "intel-rapl:1"):
            (powercap / domain / "name").write_text("dram\n")
    elif missing in ("permission", "half"):
        monkeypatch.setattr(energy, "_text", refuse)
    counter = CpuCounter(str(powercap / "none") if missing == "folder" else str(powercap))
    if missing == "later":
        assert counter.read() == 0
        monkeypatch.setattr(energy, "_text", refuse)
        assert math.isnan(counter.read())
        monkeypatch.setattr(energy, "_text", opened)  # what was drawn meanwhile stays unknown
    assert math.isnan(counter.read())
    counter.close()


class Nvml(types.ModuleType):
    """A stand-in for nvidia-ml-py: one GPU, known by its UUID alone."""

    class NVMLError(Exception):
        pass

    def __init__(self, mig=0, energy=True):
        super().__init__("pynvml")
        self.millijoules, self.mig, self.energy = 5_000_000, mig, energy

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-7":
            raise self.NVMLError("not found")
        return "handle"

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise self.NVMLError("not supported")
        return self.mig, self.mig

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.energy:
            raise self.NVMLError("not supported")
        return self.millijoules

    def nvmlDeviceGetUtilizationRates(self, handle):
        return types.SimpleNamespace(gpu=93)


def with_gpu(monkeypatch, nvml, uuid="7"):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1024)
    gpu._handle.cache_clear()


@pytest.fixture(autouse=True)
def no_gpu_is_remembered():
    yield
    gpu._handle.cache_clear()


@pytest.mark.parametrize("mig", [0, None])
def test_a_gpu_is_counted_in_joules_since_the_start(monkeypatch, mig):
    nvml = Nvml(mig)
    with_gpu(monkeypatch, nvml)
    counter = GpuCounter(CUDA)
    nvml.millijoules += 1500
    assert counter.read() == 1.5 and gpu.gpu_use(CUDA) == (1024, 0.93)
    nvml.millijoules = 3  # the driver was loaded anew
    assert math.isnan(counter.read())


@pytest.mark.parametrize(("nvml", "uuid"), [(Nvml(mig=1), "7"), (Nvml(energy=False), "7"), (Nvml(), "8"), (None, "7")])
def test_a_slice_an_old_gpu_or_no_nvml_is_not_measured(monkeypatch, nvml, uuid):
    with_gpu(monkeypatch, nvml, uuid)  # None: the import fails
    assert math.isnan(GpuCounter(CUDA).read())
    assert gpu.gpu_use(CUDA) == ((1024, 0.93) if nvml and uuid == "7" else (1024, -1.0))


def ranks_of(monkeypatch, *who):
    """Let `Energy` see ranks with these (host, UUID); returns a function that makes rank r's."""

    def make(rank, device=CUDA, before=None, grams=NAN, folder="/nowhere"):
        monkeypatch.setattr(hvd, "rank", lambda: rank)
        monkeypatch.setattr(hvd, "allgather_object", lambda own, name: [list(w) for w in who])
        monkeypatch.setattr(energy, "host_name", lambda: who[rank][0])
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=who[rank][1])
        )
        before = {"gpu_joules": 0.0, "cpu_joules": 0.0} if before is None else before
        return Energy(device, before, grams, str(folder))

    return make


def test_each_host_and_each_gpu_is_counted_once(monkeypatch, powercap):
    monkeypatch.setattr(gpu, "joules", lambda device: 10.0)
    make = ranks_of(monkeypatch, ("n1", "7"), ("n1", "7"), ("n1", "8"), ("n2", "9"))
    counted = [make(rank, folder=powercap) for rank in range(4)]
    assert [one._cpu is not None for one in counted] == [True, False, False, True]
    assert [one._gpu is not None for one in counted] == [True, False, True, True]
    assert counted[1].read() == [0.0, 0.0]
    # Without GPUs all ranks have none, and say so.
    make = ranks_of(monkeypatch, ("n1", ""), ("n1", ""))
    monkeypatch.setattr(gpu, "joules", lambda device: NAN)
    assert [math.isnan(make(rank, CPU).read()[0]) for rank in (0, 1)] == [True, True]


def test_lines_and_summary_by_hand(monkeypatch):
    make = ranks_of(monkeypatch, ("n1", "7"))
    one = make(0, before={"gpu_joules": 3_600_000.0, "cpu_joules": None}, grams=500.0)
    first = one.line([[100.0, 7.0], [50.0, 0.0]], step=101, batch=10)
    assert first["joules_per_image"] is None and first["gpu_joules"] == 3_600_150 and first["cpu_joules"] is None
    second = one.line([[300.0, NAN], [150.0, 0.0]], step=111, batch=10)
    assert second["joules_per_image"] == pytest.approx(300 / 100)
    third = one.line([[500.0, NAN], [250.0, 0.0]], step=131, batch=10)
    assert third["joules_per_image"] == pytest.approx(300 / 200)
    assert third["kwh"] == pytest.approx(1 + 750 / 3.6e6) and third["co2_grams"] == pytest.approx(500 * third["kwh"])
    whole = one.summary([[1000.0, NAN], [2600.0, 0.0]], batch=10)
    assert whole["of"] == "GPU" and whole["kwh"] == pytest.approx(1.001) and whole["grams_co2_per_kwh"] == 500
    assert whole["joules_per_image"] == pytest.approx(600 / 300)
    assert words.energy(whole) == "2 J per image, 1 kWh, 500 g of CO2 (GPU)"


def test_what_is_measured_is_said(monkeypatch):
    make = ranks_of(monkeypatch, ("n1", "7"))
    for ranks, of in (([[1.0, 2.0]], "GPU + CPU"), ([[NAN, 2.0]], "CPU"), ([[1.0, NAN], [1.0, 2.0]], "GPU")):
        whole = make(0).summary(ranks, 1)
        assert whole["of"] == of and whole["kwh"] > 0 and whole["co2_grams"] is None
    nothing = make(0).summary([[NAN, NAN]], 1)
    assert nothing["of"] == words.energy(nothing) == "not measured"
    assert [nothing[name] for name in ("kwh", "gpu_joules", "cpu_joules", "co2_grams", "joules_per_image")] == 5 * [
        None
    ]
    json.dumps(nothing, allow_nan=False)


@pytest.mark.parametrize("measured", [True, False])
def test_energy_of_earlier_starts_counts_also_that_of_steps_that_are_made_again(tmp_path, measured):
    log = RunLog(str(tmp_path), active=True)
    log.open(0)
    assert log.joules == {"gpu_joules": 0.0, "cpu_joules": 0.0}
    path = str(tmp_path / "metrics.jsonl")
    joules = {"gpu_joules": 5.0, "cpu_joules": None} if measured else {}  # an earlier version has none
    append_line(path, "train", 10, 0, loss=1.0, **({"gpu_joules": 3.0, "cpu_joules": None} if measured else {}))
    append_line(path, "train", 20, 0, loss=1.0, **joules)
    with open(path, "a") as file:
        file.write('{"kind": "tr')
    log.open(10)
    assert log.joules == {"gpu_joules": 5.0 if measured else None, "cpu_joules": None}
    assert [json.loads(line)["step"] for line in open(path)] == [10]
