"""The report of a scaling study: what its points say, the model's continuation, bottlenecks and costs.

In: a `Study` as read, prices, what to assume of machines that were not measured. Out: plain values (`build`), and the
files that hold them (`write`): one HTML page, its figures as PNG, the numbers as CSV and JSON.
"""

import csv
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

from job.scaling import cost
from job.scaling import model as scalingmodel
from job.scaling.model import COMPUTE, EXPOSED, REST, SECTIONS, STRAGGLERS, TO_DEVICE, UPDATE, WAIT, Model, Scenario
from job.scaling.page import figures, page
from job.scaling.study import MODES, Size, Study
from shards.errors import InputError
from shards.machine.files import write_whole

# Sizes that the curves of a prediction are drawn for.
PREDICTED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10000)
BATCHES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "batch_accuracy.csv")
COST_GPUS = 1024  # the largest number of GPUs that costs are worked out for
# A rank this much slower than the median of all is named.
SLOW_RANK = 0.05

PART = {  # what limits a step when this section is long
    WAIT: "storage or decode",
    TO_DEVICE: "PCIe (copy to the device)",
    COMPUTE: "compute",
    EXPOSED: "communication",
    STRAGGLERS: "stragglers",
    UPDATE: "compute (update)",
    REST: "host",
}
ADVICE = {
    WAIT: "more reader processes (--workers), shards staged on the nodes' own disks (STAGE=1), or --encoding raw",
    TO_DEVICE: "pinned memory and images kept as uint8 until they are on the device; else a faster bus",
    COMPUTE: "a faster device or bf16",
    EXPOSED: "more images a rank, gradients in fp16, a faster network, or fewer and larger nodes",
    STRAGGLERS: "ranks on equal and unshared machines, cores bound apart; the slowest rank is named below",
    UPDATE: "a fused optimizer",
    REST: "fewer lines of metrics (--log-every), larger batches",
}


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What a report takes for granted besides the study. None: as measured, or the model's priors."""

    ranks_per_node: int | None = None
    network_bandwidth: float | None = None  # byte/s
    network_latency: float | None = None  # s
    local_bandwidth: float | None = None
    images: int | None = None  # training images of the recipe's data set
    epochs: int | None = None


@dataclasses.dataclass(frozen=True)
class Curve:
    """The sizes of one mode and kind of data, by ranks, and their efficiency against the smallest."""

    mode: str
    data: str
    sizes: tuple[Size, ...]

    def efficiency(self, images_per_second: float, ranks: int) -> float:
        first = self.sizes[0]
        return images_per_second / first.images_per_second * first.ranks / ranks


def curves_of(study: Study, sizes: Sequence[Size]) -> list[Curve]:
    """Strong and weak scaling of each kind of data, as far as sizes for them were measured."""
    found = []
    for data in dict.fromkeys(size.data for size in sizes):
        own = sorted((s for s in sizes if s.data == data), key=lambda s: (s.ranks, s.measured.global_batch))
        first = own[0]
        batch = study.plan.get("global_batch", first.measured.global_batch)
        for mode in study.plan.get("modes", MODES):
            if mode == "strong":
                chosen = [s for s in own if s.measured.global_batch == batch]
            else:
                each = first.measured.global_batch / first.ranks
                chosen = [s for s in own if s.measured.global_batch / s.ranks == each]
            if chosen:
                found.append(Curve(mode, data, tuple(chosen)))
    return found


def model_of(study: Study, sizes: Sequence[Size]) -> Model | None:
    """The model fitted to all sizes of a study; None where it lacks what that needs."""
    if not sizes or not study.gradients:
        return None
    return scalingmodel.fit([s.measured for s in sizes], study.gradients, **fit_options(study))


def fit_options(study: Study) -> dict[str, Any]:
    """What `scalingmodel.fit` needs to know of a study besides its sizes."""
    loader = study.limits.get("loader", {}).get("images_per_second")
    over = study.done[0].timings["environment"]["horovod_over"]
    return how_of(study) | {"loader": loader, "over": over}


def how_of(study: Study) -> dict[str, str]:
    """How the study's ranks were joined: what `parallel` averages, and by which kind of allreduce."""
    first = study.done[0].timings
    hierarchical = first["environment"]["tuning"].get("HOROVOD_HIERARCHICAL_ALLREDUCE", "0") != "0"
    return {"parallel": first.get("parallel", "gradients"), "algorithm": "hierarchical" if hierarchical else "auto"}


def per_node_of(study: Study, assumed: Assumed) -> int:
    """Ranks of a full node: as told, as planned, or the most that ran on one."""
    if assumed.ranks_per_node:
        return assumed.ranks_per_node
    if study.plan.get("slurm"):
        return int(study.plan["ranks_per_node"])
    return max(math.ceil(p.ranks / p.nodes) for p in study.done)


def scenario(study: Study, assumed: Assumed, ranks: int, batch: int, synthetic: bool = False) -> Scenario:
    return Scenario(
        ranks,
        batch,
        per_node_of(study, assumed),
        network_bandwidth=assumed.network_bandwidth,
        network_latency=assumed.network_latency,
        local_bandwidth=assumed.local_bandwidth,
        synthetic=synthetic,
        **how_of(study),
    )


def build(study: Study, prices: cost.Prices, assumed: Assumed) -> dict[str, Any]:
    """All that a report says, as plain values: report.json. `curves` are kept apart, for the figures."""
    sizes = study.sizes()
    curves = curves_of(study, sizes)
    model = model_of(study, sizes)
    result: dict[str, Any] = {"study": study.path, "problems": list(study.problems), "curves": []}
    if len({s.ranks for s in sizes}) < 2:
        result["problems"].append("fewer than two sizes were measured: there is no scaling to show yet")
    if sizes and not model:
        result["problems"].append("no point says which gradients the network has: nothing is predicted")
    for curve in curves:
        rows = []
        for size in curve.sizes:
            row = {
                "ranks": size.ranks,
                "nodes": size.measured.nodes,
                "global_batch": size.measured.global_batch,
                "repeats": len(size.points),
                "images_per_second": size.images_per_second,
                "low": size.low,
                "high": size.high,
                "efficiency": curve.efficiency(size.images_per_second, size.ranks),
                "step_seconds": size.measured.step,
                "sections": size.measured.sections,
                "hours_to_end": hours_to_end(study, assumed, size.images_per_second),
            }
            if model:
                row |= bottleneck(model, size, study.limits)
            rows.append(row)
        result["curves"].append({"mode": curve.mode, "data": curve.data, "sizes": rows})
    if model:
        result["model"] = _model_facts(study, sizes, model)
        if assumed.network_bandwidth:
            given = f"{8 * assumed.network_bandwidth / 1e9:,.3g} Gbit/s, as --network says"
            result["model"]["assumed_network"] = given
        continued = [predictions(study, assumed, model, curve) for curve in curves]
        result["predictions"] = [
            {"mode": c.mode, "data": c.data, "sizes": rows} for c, rows in zip(curves, continued, strict=True)
        ]
        result["cost"] = costs(study, assumed, prices, curves, continued)
    result["limits"] = study.limits
    result["slow_ranks"] = slow_ranks(study)
    result["environment"] = study.done[0].timings["environment"] if study.done else {}
    return result


def hours_to_end(study: Study, assumed: Assumed, images_per_second: float) -> float:
    """Hours that the recipe's epochs over its images take."""
    first = study.done[0].timings
    images = assumed.images or first["nsamples"]
    return (assumed.epochs or first["epochs"]) * images / images_per_second / 3600


def bottleneck(model: Model, size: Size, limits: dict[str, Any]) -> dict[str, Any]:
    """Where the time of a size goes, and what would help most: a section and a sentence."""
    sections, step = size.measured.sections, size.measured.step
    longest = max(sections, key=lambda name: sections[name])
    part = PART[longest]
    if longest == WAIT:
        decode = limits.get("loader", {}).get("images_per_second")
        rate = size.images_per_second / size.measured.nodes
        if decode:
            part = "decode" if rate > 0.8 * decode else "storage"
    share = sections[longest] / step
    lost = max((n for n in SECTIONS if n not in (COMPUTE, UPDATE)), key=lambda name: sections[name])
    gain = step / max(step - sections[lost] / 2, 1e-12) - 1
    text = f"{part[0].upper()}{part[1:]} takes {share:.0%} of a step. "
    if longest != COMPUTE and longest != UPDATE:
        half = step / max(step - sections[longest] / 2, 1e-12) - 1
        text += f"Halving it gives {half:.0%} more images/s: {ADVICE[longest]}."
    elif sections[lost] > 0.05 * step:
        text += (
            f"{PART[lost][0].upper()}{PART[lost][1:]} takes {sections[lost] / step:.0%}; "
            f"halving that gives {gain:.0%} more images/s: {ADVICE[lost]}."
        )
    else:
        text += f"Nothing else takes more than 5 %: {ADVICE[longest]} helps, and so do more ranks."
    return {"bottleneck": part, "advice": text, "part_limits": part_limits(model, size)}


def part_limits(model: Model, size: Size) -> dict[str, float]:
    """Images/s, all ranks, that each part could reach alone at a size; inf is left out."""
    m = size.measured
    rates = {
        "compute": m.global_batch / max(m.sections[COMPUTE] + m.sections[UPDATE], 1e-12),
        "copy to the device": m.global_batch / max(m.sections[TO_DEVICE], 1e-12),
        "loader": model.loader * m.nodes,
        "file system": model.storage,
    }
    if m.ranks > 1:
        per_node = math.ceil(m.ranks / m.nodes)
        nbytes = sum(g.bytes for g in model.gradients)
        alone = scalingmodel.allreduce_seconds(nbytes, m.ranks, per_node, model.parameters)
        rates["allreduce"] = m.global_batch / (alone + model.parameters["overhead"])
    return {name: rate for name, rate in rates.items() if math.isfinite(rate) and rate < 1e9}


def predictions(study: Study, assumed: Assumed, model: Model, curve: Curve) -> list[dict[str, Any]]:
    """The curve continued beyond its measured sizes."""
    first = curve.sizes[0]
    rows = []
    for ranks in PREDICTED:
        batch = first.measured.global_batch
        if curve.mode == "weak":
            batch = round(batch / first.ranks * ranks)
        if ranks < first.ranks or ranks > batch:
            continue
        found = model.predict(scenario(study, assumed, ranks, batch, first.measured.synthetic))
        rate = found.images_per_second
        rows.append(
            {
                "ranks": ranks,
                "global_batch": batch,
                "images_per_second": rate,
                "low": found.low,
                "high": found.high,
                "efficiency": curve.efficiency(rate, ranks),
                "sections": found.sections,
                "hours_to_end": hours_to_end(study, assumed, rate),
            }
        )
    return rows


def _model_facts(study: Study, sizes: Sequence[Size], model: Model) -> dict[str, Any]:
    checks = scalingmodel.leave_largest_out([s.measured for s in sizes], study.gradients, **fit_options(study))
    return {
        "parameters": model.parameters,
        "times": {n: dict(zip(t.features, t.coefficients.tolist(), strict=True)) for n, t in model.times.items()},
        "straggling": model.straggling,
        "loader_images_per_second_a_node": model.loader if math.isfinite(model.loader) else None,
        "storage_images_per_second": model.storage if math.isfinite(model.storage) else None,
        "measured_links": sorted(model.measured_links),
        "assumed_network": scalingmodel.assumed_network(fit_options(study)["over"]),
        "assumptions": list(scalingmodel.ASSUMPTIONS),
        "left_out": [
            {
                "ranks": c.measured.ranks,
                "global_batch": c.measured.global_batch,
                "synthetic": c.measured.synthetic,
                "measured": c.measured.images_per_second,
                "predicted": c.predicted.images_per_second,
                "low": c.predicted.low,
                "high": c.predicted.high,
                "error": c.error,
            }
            for c in checks
        ],
        "checked_with": sorted({s.ranks for s in sizes})[:-1],
    }


def costs(
    study: Study,
    assumed: Assumed,
    prices: cost.Prices,
    curves: Sequence[Curve],
    continued: Sequence[list[dict[str, Any]]],
) -> dict[str, Any]:
    """Cost tables for the recipe: strong scaling where it was measured, since it leaves the accuracy as it is.

    `continued`: the predictions of each curve. Where a size was measured, that counts.
    """
    chosen = min(range(len(curves)), key=lambda i: (curves[i].data == "synthetic", curves[i].mode != "strong"))
    curve, rows = curves[chosen], continued[chosen]
    hours = {row["ranks"]: row["hours_to_end"] for row in rows if row["ranks"] <= COST_GPUS}
    hours |= {s.ranks: hours_to_end(study, assumed, s.images_per_second) for s in curve.sizes}
    found = cost.choices(prices, hours)
    epochs = assumed.epochs or study.done[0].timings["epochs"]
    return {
        "example": prices.example,
        "currency": prices.currency,
        "date": prices.date,
        "source": prices.source,
        "mode": curve.mode,
        "epochs": epochs,
        "offers": [dataclasses.asdict(c) | {"per_epoch": c.cost / epochs} for c in cost.cheapest_by_offer(found)],
        "deadlines": [
            {"hours": limit, "choice": dataclasses.asdict(c) if c else None}
            for limit, c in cost.by_deadline(found, prices.deadlines_hours)
        ],
        "experiment_a_day": [dataclasses.asdict(row) for row in cost.experiment_a_day(prices, found)],
        "break_even": [
            {"own": own.name, "offer": f"{offer.name}, {kind.replace('_', ' ')}", "utilisation": limit}
            for own in prices.own
            for offer in prices.cloud
            for kind in cost.KINDS
            if not math.isnan(price := getattr(offer, kind)) and math.isfinite(limit := own.break_even(price))
        ],
    }


def accuracy_at(batch: int) -> str:
    """What the literature says of AlexNet's accuracy at a global batch: the smallest reported one that is as large."""
    with open(BATCHES, encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    fitting = [row for row in rows if int(row["global_batch"]) >= batch]
    if not fitting:
        return f"nothing beyond {int(rows[-1]['global_batch']):,}"
    row = fitting[0]
    top1 = f", top-1 {float(row['top1']):.1%}" if row["top1"] else ""
    method = f"{row['network']} with {row['method']} at {int(row['global_batch']):,}"
    return f"{method}{top1}: {row['finding']} ({row['source']})"


def slow_ranks(study: Study) -> list[str]:
    """Ranks whose own work takes clearly longer than the others', in words."""
    found = []
    for point in study.done:
        work = {
            r["rank"]: sum(r["mean"][n] for n in (WAIT, TO_DEVICE, COMPUTE, UPDATE)) for r in point.timings["ranks"]
        }
        if len(work) < 2:
            continue
        # Each is compared with the others alone: of two ranks, the slower one would move the median of both.
        medians = {rank: statistics.median(work[r] for r in work if r != rank) for rank in work}
        hosts = {r["rank"]: r["host"] for r in point.timings["ranks"]}
        slow = [rank for rank, seconds in work.items() if seconds > (1 + SLOW_RANK) * medians[rank]]
        found += [
            f"{point.name}: rank {rank} on {hosts[rank]} works {work[rank] / medians[rank] - 1:.0%} longer than the "
            f"median of the others"
            for rank in sorted(slow, key=lambda r: -work[r])[:3]
        ]
    return found


def write(result: dict[str, Any], study: Study, out: str) -> list[str]:
    """Write report.html, report.json, sizes.csv, points.csv and the figures into folder `out`; their names."""
    pictures = figures(result)
    files = {f"{name}.png": png for name, (png, _) in pictures.items()}
    files["report.json"] = (json.dumps(_finite(result), indent=1) + "\n").encode()
    files["sizes.csv"] = _sizes_csv(result)
    files["points.csv"] = _points_csv(study)
    files["report.html"] = page(result, study, pictures).encode()
    try:
        os.makedirs(out, exist_ok=True)
        for name, data in files.items():
            write_whole(os.path.join(out, name), data)
    except OSError as error:
        raise InputError(f"cannot write the report to {out}: {error.strerror}; choose another --out") from None
    return sorted(files)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null instead."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _sizes_csv(result: dict[str, Any]) -> bytes:
    columns = ["ranks", "nodes", "global_batch", "repeats", "images_per_second", "low", "high", "efficiency"]
    columns += ["step_seconds", "hours_to_end"]
    rows = [["kind", "mode", "data", *columns, *(f"{name} (s)" for name in SECTIONS)]]
    for kind, curves in (("measured", result["curves"]), ("predicted", result.get("predictions", []))):
        for curve in curves:
            for row in curve["sizes"]:
                values = [row.get(column, "") for column in columns]
                rows.append([kind, curve["mode"], curve["data"], *values, *(row["sections"][n] for n in SECTIONS)])
    return _csv(rows)


def _points_csv(study: Study) -> bytes:
    rows = [["name", "status", "ranks", "nodes", "global_batch", "data", "repeat", "images_per_second", "started",
             "seconds", "error", "command"]]  # fmt: skip
    for p in study.points:
        rate = p.measured().images_per_second if p.status == "done" else ""
        rows.append(
            [p.name, p.status, p.ranks, p.nodes, p.global_batch, p.data, p.repeat, rate, p.started, p.seconds, p.error]
            + [p.command]
        )
    return _csv(rows)
