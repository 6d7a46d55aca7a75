"""Energy that a run draws: NVML's counter of each GPU, RAPL's of each processor, summed over the ranks.

In: counters, read by the rank that counts a GPU or a host for all. Out: joules per image, kWh and grams of CO2.
GPUs and processors are what has counters: mainboards, memory outside of them, network, disks and cooling are not in it.
"""

import contextlib
import dataclasses
import glob
import math
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
import torch

from job.usage import JOULES, gpu, words

POWERCAP = "/sys/class/powercap"
# Seconds between two looks at RAPL. Its counters start again at 0 after 65 to 262 kJ: 2 minutes or more at 500 W.
LOOK_SECONDS = 30.0
JOULES_PER_KWH = 3.6e6


class GpuCounter:
    """Joules of a GPU since this was made."""

    def __init__(self, device: torch.device):
        self._device, self._first = device, gpu.joules(device)

    def read(self) -> float:
        """NaN where they are not known, also after the driver was loaded anew."""
        used = gpu.joules(self._device) - self._first
        return used if used >= 0 else math.nan


class CpuCounter:
    """Joules of all processors of this host since this was made, by the kernel's RAPL counters (Intel and AMD).

    Packages only: their other domains (cores, memory) lie inside them. A thread looks at the counters now and then, for
    they start again at 0. Mostly only root may read them.
    """

    def __init__(self, folder: str = POWERCAP):
        self._lock = threading.Lock()
        self._joules = 0.0
        # Folder of the counter -> its value at the last look, in microjoules.
        self._packages: dict[str, int | None] = {}
        for domain in sorted(glob.glob(os.path.join(folder, "intel-rapl:*"))):
            with contextlib.suppress(OSError):
                if _text(domain, "name").startswith("package"):
                    self._packages[domain] = None
        self._look()
        self._end = threading.Event()
        if not math.isnan(self._joules):
            threading.Thread(target=self._look_often, name="rapl", daemon=True).start()

    def read(self) -> float:
        """NaN where they are not known: no counters, or no permission to read one of them."""
        with self._lock:
            self._look()
            return self._joules

    def close(self) -> None:
        """End the thread."""
        self._end.set()

    def _look_often(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            self.read()

    def _look(self) -> None:
        if not self._packages:
            self._joules = math.nan
        for domain, before in self._packages.items():
            try:
                now, largest = int(_text(domain, "energy_uj")), int(_text(domain, "max_energy_range_uj"))
            except (OSError, ValueError):
                self._joules = math.nan  # and stays it: what is drawn meanwhile is not known
                return
            if before is not None:
                self._joules += (now - before if now >= before else now - before + largest) / 1e6
            self._packages[domain] = now


def _text(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding="ascii") as file:
        return file.read().strip()


def host_name() -> str:
    """A name of the machine that runs this kernel: the same in all containers on it."""
    try:
        return _text("/proc/sys/kernel/random", "boot_id")
    except OSError:
        return socket.gethostname()


@dataclasses.dataclass(frozen=True)
class Joules:
    """Energy of GPUs and of processors; NaN: not measured."""

    gpu: float = math.nan
    cpu: float = math.nan

    def like(self, other: "Joules") -> float:
        """The sum of what was measured in `other`; NaN where that is nothing, or is not measured here."""
        pairs = ((self.gpu, other.gpu), (self.cpu, other.cpu))
        counted = [own for own, wanted in pairs if math.isfinite(wanted)]
        return sum(counted) if counted else math.nan

    def plus(self, other: "Joules") -> "Joules":
        """The sum; what is not measured in one of both is not measured in it."""
        return Joules(self.gpu + other.gpu, self.cpu + other.cpu)


class Energy:
    """The energy of a run. All ranks create it together, call `read`, and exchange what that returned.

    Args:
        before: of earlier starts of the run, `gpu_joules` and `cpu_joules`, None: not measured; see RunLog.open.
        grams: of CO2 per kWh; NaN: not known.
    """

    def __init__(self, device: torch.device, before: dict[str, float | None], grams: float, folder: str = POWERCAP):
        # Ranks of one host see the same processors, and may share a GPU: the first of them counts it.
        uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        own = [host_name(), uuid]
        ranks = hvd.allgather_object(own, name="energy_who")
        self._cpu = CpuCounter(folder) if _first(ranks, own, 0) else None
        self._gpu = GpuCounter(device) if not uuid or _first(ranks, own, 1) else None
        self._before = Joules(*(math.nan if before.get(kind) is None else before[kind] for kind in JOULES))
        self._grams = grams
        self._lines: list[tuple[Joules, int]] = []  # joules of this start and steps made: at its first and last line

    def read(self) -> list[float]:
        """Joules of GPUs and of processors that this rank counts, since this was created; 0 where another does."""
        return [0.0 if counter is None else counter.read() for counter in (self._gpu, self._cpu)]

    def close(self) -> None:
        """Stop counting."""
        if self._cpu:
            self._cpu.close()

    def line(self, ranks: Sequence[Sequence[float]], step: int, batch: int) -> dict[str, float | None]:
        """Fields of a line of metrics. `joules_per_image` is of what came since the line before, with validations and
        checkpoints among it; None at the first line of a start, which the start-up comes before.

        Args:
            ranks: what `read` returned on each rank.
            step: steps made.
            batch: images per step.
        """
        now = _sum(ranks)
        whole = self._before.plus(now)
        since = self._lines[-1] if self._lines else None
        self._lines = [*self._lines[:1], (now, step)]
        return {"joules_per_image": _per_image(since, self._lines[-1], batch, whole), **self._whole(whole)}

    def summary(self, ranks: Sequence[Sequence[float]], batch: int) -> dict[str, Any]:
        """Of the whole run. `joules_per_image` is that of this start between its first and its last line of metrics."""
        whole = self._before.plus(_sum(ranks))
        each = _per_image(self._lines[0], self._lines[-1], batch, whole) if self._lines else None
        known = self._grams if math.isfinite(self._grams) else None
        values = self._whole(whole)
        of = words.measured(values["gpu_joules"], values["cpu_joules"])
        return {"of": of, "joules_per_image": each, **values, "grams_co2_per_kwh": known}

    def _whole(self, joules: Joules) -> dict[str, float | None]:
        kwh = joules.like(joules) / JOULES_PER_KWH
        values = {
            **dict(zip(JOULES, (joules.gpu, joules.cpu), strict=True)),
            "kwh": kwh,
            "co2_grams": kwh * self._grams,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _first(ranks: Sequence[Sequence[str]], own: Sequence[str], place: int) -> bool:
    """Whether this rank is the first that has what it has at `place`."""
    return [rank[place] for rank in ranks].index(own[place]) == hvd.rank()


def _sum(ranks: Sequence[Sequence[float]]) -> Joules:
    """Over the ranks: NaN of one, which cannot read its counter, is NaN of all."""
    return Joules(*(sum(values) for values in zip(*ranks, strict=True)))


def _per_image(first: tuple[Joules, int] | None, last: tuple[Joules, int], batch: int, whole: Joules) -> float | None:
    """Joules per image between two lines, of what is measured in `whole`; None where that is nothing."""
    if first is None or last[1] <= first[1]:
        return None
    used = (last[0].like(whole) - first[0].like(whole)) / (batch * (last[1] - first[1]))
    return used if math.isfinite(used) else None
