"""Repeats of a study put together: mean speed of each size with its 95 % interval, and the curves that sizes form.

In: a `Study`. Out: `Size`s, `Curve`s (strong and weak scaling per kind of data), and ranks that are slower than others.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy import stats

from job.scaling.study import COMPUTE, MODES, SECTIONS, TO_DEVICE, UPDATE, WAIT, Measured, Point, Study
from job.usage.words import NOT_MEASURED

# A rank this much slower than the median of the others is named.
SLOW_RANK = 0.05


@dataclasses.dataclass(frozen=True)
class Size:
    """The repeats of one size. `low` and `high`: 95 % interval of the mean images/s."""

    measured: Measured  # averaged over the repeats
    data: str
    points: tuple[Point, ...]
    images_per_second: float
    low: float
    high: float
    joules: float = math.nan  # per image; nan: not measured in each of the repeats, or not of the same
    energy_of: str = NOT_MEASURED  # "GPU + CPU", "GPU" or "CPU"

    @property
    def ranks(self) -> int:
        """Ranks of the runs."""
        return self.measured.ranks


@dataclasses.dataclass(frozen=True)
class Curve:
    """The sizes of one mode and kind of data, the smallest first."""

    mode: str
    data: str
    sizes: tuple[Size, ...]

    def efficiency(self, images_per_second: float, ranks: int) -> float:
        """Images/s per rank, divided by those of the smallest size."""
        first = self.sizes[0]
        return images_per_second / first.images_per_second * first.ranks / ranks


def size_of(points: Sequence[Point]) -> Size:
    """The mean of repeats, with an interval by Student's t; of a single run, by the spread of its steps."""
    runs = [point.measured() for point in points]
    sections = {name: statistics.fmean(m.sections[name] for m in runs) for name in SECTIONS}
    step = sum(sections.values())
    rates = [m.images_per_second for m in runs]
    mean = statistics.fmean(rates)
    if len(rates) > 1:
        deviation = float(stats.sem(rates))  # standard error of the mean
        half = float(stats.t.ppf(0.975, len(rates) - 1)) * deviation
        error = step * deviation / mean
    else:
        error = runs[0].error
        half = float(stats.norm.ppf(0.975)) * mean * error / step
    measured = dataclasses.replace(runs[0], sections=sections, step=step, error=error)
    low, high = max(0.0, mean - half), mean + half
    joules, of = energy_of(points)
    return Size(measured, points[0].data, tuple(points), mean, low, high, joules, of)


def energy_of(points: Sequence[Point]) -> tuple[float, str]:
    """Joules per image, the mean of the repeats, and what they are of."""
    found = [point.timings.get("energy") or {} for point in points]
    each, of = [values.get("joules_per_image") for values in found], {values.get("of") for values in found}
    return (statistics.fmean(each), of.pop()) if None not in each and len(of) == 1 else (math.nan, NOT_MEASURED)


def sizes_of(study: Study) -> list[Size]:
    """All sizes of a study, sorted by data, ranks and batch."""
    groups: dict[tuple, list[Point]] = {}
    for point in study.done:
        groups.setdefault((point.data, point.ranks, point.nodes, point.global_batch), []).append(point)
    return [size_of(points) for _, points in sorted(groups.items())]


def curves_of(study: Study, sizes: Sequence[Size]) -> list[Curve]:
    """Strong and weak scaling of each kind of data, as far as sizes for them were measured."""
    found = []
    for data in dict.fromkeys(size.data for size in sizes):
        own = sorted((s for s in sizes if s.data == data), key=lambda s: (s.ranks, s.measured.global_batch))
        first = own[0].measured
        batch = study.plan.get("global_batch", first.global_batch)
        each = batch / (study.plan.get("weak_from") or first.ranks)
        for mode in study.plan.get("modes", MODES):
            if mode == "strong":
                chosen = [s for s in own if s.measured.global_batch == batch]
            else:
                chosen = [s for s in own if s.measured.global_batch / s.ranks == each]
            if chosen:
                found.append(Curve(mode, data, tuple(chosen)))
    return found


def slow_ranks(study: Study) -> list[str]:
    """A sentence for each rank that takes more than SLOW_RANK longer for its own work than the other ranks."""
    found = []
    for point in study.done:
        ranks = point.timings["ranks"]
        if len(ranks) < 2:
            continue
        work = {r["rank"]: sum(r["mean"][name] for name in (WAIT, TO_DEVICE, COMPUTE, UPDATE)) for r in ranks}
        hosts = {r["rank"]: r["host"] for r in ranks}
        # Against the others only: of two ranks, the slow one would shift the median of both.
        more = {rank: work[rank] / statistics.median(work[r] for r in work if r != rank) - 1 for rank in work}
        slow = sorted((rank for rank in work if more[rank] > SLOW_RANK), key=lambda rank: -work[rank])
        found += [
            f"{point.name}: rank {rank} on {hosts[rank]} works {more[rank]:.0%} longer than the median of the others"
            for rank in slow[:3]
        ]
    return found
