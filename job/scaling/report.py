"""What a scaling study says: speeds, bottlenecks, predictions of the model, costs.

In: a `Study`, prices, and what to assume of machines that were not measured. Out: `build` gives the content of
report.json as plain values; job.scaling.page makes the other files of a report from them.
"""

import csv
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from job.scaling import cost
from job.scaling import model as scalingmodel
from job.scaling.model import Model, Scenario, Setup
from job.scaling.sizes import Curve, Size, curves_of, sizes_of, slow_ranks
from job.scaling.study import (
    COMPUTE,
    EXPOSED,
    REST,
    SECTIONS,
    STRAGGLERS,
    SYNTHETIC,
    TO_DEVICE,
    UPDATE,
    WAIT,
    Measured,
    Study,
)
from job.usage.words import NOT_MEASURED

# Ranks that a prediction is drawn and tabulated for.
PREDICTED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10000)
BATCHES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "batch_accuracy.csv")
COST_GPUS = 1024  # the largest number of GPUs whose cost is computed

PART = {  # what limits a step when this section is long
    WAIT: "storage or decode",
    TO_DEVICE: "PCIe (copy to the device)",
    COMPUTE: "compute",
    EXPOSED: "communication",
    STRAGGLERS: STRAGGLERS,
    UPDATE: "compute (update)",
    REST: "host",
}
ADVICE = {
    WAIT: "more reader processes (--workers), shards on the nodes' own disks (STAGE=1), or --encoding planes or raw",
    TO_DEVICE: "pinned memory and images kept as uint8 until they are on the device; else a faster bus",
    COMPUTE: "a faster device or bf16",
    EXPOSED: "more images per rank, gradients in fp16, a faster network, or fewer and larger nodes",
    STRAGGLERS: "ranks on equal and unshared machines, each bound to its own cores; the slowest rank is named below",
    UPDATE: "a fused optimizer",
    REST: "fewer lines of metrics (--log-every), larger batches",
}


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What a report assumes besides the study. None: as measured, or the model's priors."""

    ranks_per_node: int | None = None
    network_bandwidth: float | None = None  # byte/s
    network_latency: float | None = None  # s
    local_bandwidth: float | None = None  # byte/s
    images: int | None = None  # training images of the recipe's data set
    epochs: int | None = None


def setup_of(study: Study) -> Setup:
    """How the ranks of a study worked together."""
    first = study.done[0].timings
    hierarchical = first["environment"]["tuning"].get("HOROVOD_HIERARCHICAL_ALLREDUCE", "0") != "0"
    return Setup(
        parallel=first.get("parallel", "gradients"),
        algorithm="hierarchical" if hierarchical else "auto",
        over=first["environment"]["horovod_over"],
        loader=study.limits.get("loader", {}).get("images_per_second"),
    )


def model_of(study: Study, sizes: Sequence[Size]) -> Model | None:
    """The model fitted to all sizes of a study; None where no size was measured, or no run recorded its gradients."""
    if not sizes or not study.gradients:
        return None
    return scalingmodel.fit([s.measured for s in sizes], study.gradients, setup_of(study))


def scenario(study: Study, assumed: Assumed, ranks: int, batch: int, synthetic: bool = False) -> Scenario:
    """The study's way of training with other ranks and another batch, on the machine that is assumed."""
    setup = setup_of(study)
    if assumed.ranks_per_node:
        per_node = assumed.ranks_per_node
    elif study.plan.get("slurm"):
        per_node = int(study.plan["ranks_per_node"])
    else:
        per_node = max(math.ceil(p.ranks / p.nodes) for p in study.done)
    return Scenario(
        ranks=ranks,
        global_batch=batch,
        ranks_per_node=per_node,
        network_bandwidth=assumed.network_bandwidth,
        network_latency=assumed.network_latency,
        local_bandwidth=assumed.local_bandwidth,
        algorithm=setup.algorithm,
        parallel=setup.parallel,
        synthetic=synthetic,
    )


def epochs_of(study: Study, assumed: Assumed) -> int:
    """Epochs of a whole training."""
    return assumed.epochs or study.done[0].timings["epochs"]


def images_of(study: Study, assumed: Assumed) -> int:
    """Images of a whole training, over all epochs."""
    return epochs_of(study, assumed) * (assumed.images or study.done[0].timings["nsamples"])


def hours_to_end(study: Study, assumed: Assumed, images_per_second: float) -> float:
    """Hours that a whole training takes."""
    return images_of(study, assumed) / images_per_second / 3600


def build(study: Study, prices: cost.Prices, assumed: Assumed) -> dict[str, Any]:
    """The content of report.json.

    `curves` and `predictions` have one entry per mode and kind of data, {"mode", "data", "sizes"}; each of the sizes
    has at least ranks, global_batch, images_per_second with low and high, efficiency, sections (seconds) and
    hours_to_end. `predictions`, `model` and `cost` are missing where the study does not allow a model.
    """
    sizes = sizes_of(study)
    curves = curves_of(study, sizes)
    model = model_of(study, sizes)
    result: dict[str, Any] = {"study": study.path, "problems": list(study.problems)}
    if len({s.ranks for s in sizes}) < 2:
        result["problems"].append("fewer than two sizes were measured: there is no scaling to show yet")
    if sizes and not model:
        result["problems"].append("no run recorded the gradients of the network: nothing is predicted")
    result["curves"] = [
        {"mode": c.mode, "data": c.data, "sizes": [_measured_row(study, assumed, model, c, s) for s in c.sizes]}
        for c in curves
    ]
    if model:
        result["model"] = _model_facts(study, sizes, model)
        if assumed.network_bandwidth:
            given = f"{8 * assumed.network_bandwidth / 1e9:,.3g} Gbit/s, as --network says"
            result["model"]["assumed_network"] = given
        result["predictions"] = [
            {"mode": c.mode, "data": c.data, "sizes": predictions(study, assumed, model, c)} for c in curves
        ]
        result["cost"] = costs(study, assumed, prices, curves, result["predictions"])
    result["limits"] = study.limits
    result["slow_ranks"] = slow_ranks(study)
    result["environment"] = study.done[0].timings["environment"] if study.done else {}
    return result


def _measured_row(study: Study, assumed: Assumed, model: Model | None, curve: Curve, size: Size) -> dict[str, Any]:
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
        "joules_per_image": size.joules,
        "energy_of": size.energy_of,
    }
    if model:
        row["bottleneck"], row["advice"] = bottleneck(size, study.limits)
        row["part_limits"] = part_limits(model, size.measured)
    return row


def bottleneck(size: Size, limits: dict[str, Any]) -> tuple[str, str]:
    """The part that takes the longest, and a sentence that says what would help most."""
    sections, step = size.measured.sections, size.measured.step
    longest = max(sections, key=lambda name: sections[name])
    part = PART[longest]
    decode = limits.get("loader", {}).get("images_per_second")  # of one node
    if longest == WAIT and decode:
        part = "decode" if size.images_per_second / size.measured.nodes > 0.8 * decode else "storage"

    def halved(name: str) -> str:
        return f"gives {step / max(step - sections[name] / 2, 1e-12) - 1:.0%} more images/s: {ADVICE[name]}."

    text = f"{part[0].upper()}{part[1:]} takes {sections[longest] / step:.0%} of a step. "
    if longest not in (COMPUTE, UPDATE):
        return part, f"{text}Halving it {halved(longest)}"
    lost = max((n for n in SECTIONS if n not in (COMPUTE, UPDATE)), key=lambda name: sections[name])
    if sections[lost] > 0.05 * step:
        other = f"{PART[lost][0].upper()}{PART[lost][1:]}"
        return part, f"{text}{other} takes {sections[lost] / step:.0%}; halving that {halved(lost)}"
    return part, f"{text}Nothing else takes more than 5 %: {ADVICE[longest]} helps, and so do more ranks."


def part_limits(model: Model, m: Measured) -> dict[str, float]:
    """Images/s, all ranks, that each part alone would allow at a measured size; parts that never limit are left out."""
    rates = {
        "compute": m.global_batch / max(m.sections[COMPUTE] + m.sections[UPDATE], 1e-12),
        "copy to the device": m.global_batch / max(m.sections[TO_DEVICE], 1e-12),
        "loader": model.loader * m.nodes,
        "file system": model.storage,
    }
    if m.ranks > 1:
        links = model.best.links
        nbytes = sum(g.bytes for g in model.gradients)
        alone = scalingmodel.allreduce_seconds(nbytes, m.ranks, m.ranks_per_node, links)
        rates["allreduce"] = m.global_batch / (alone + links["overhead"])
    return {name: rate for name, rate in rates.items() if rate < 1e9}


def predictions(study: Study, assumed: Assumed, model: Model, curve: Curve) -> list[dict[str, Any]]:
    """The curve at PREDICTED ranks, measured or not."""
    first = curve.sizes[0]
    rows = []
    for ranks in PREDICTED:
        batch = first.measured.global_batch
        if curve.mode == "weak":
            batch = round(batch / first.ranks * ranks)
        if ranks < first.ranks or ranks > batch:
            continue
        found = model.predict(scenario(study, assumed, ranks, batch, first.measured.synthetic))
        rows.append(
            {
                "ranks": ranks,
                "global_batch": batch,
                **dataclasses.asdict(found),
                "efficiency": curve.efficiency(found.images_per_second, ranks),
                "hours_to_end": hours_to_end(study, assumed, found.images_per_second),
            }
        )
    return rows


def _model_facts(study: Study, sizes: Sequence[Size], model: Model) -> dict[str, Any]:
    setup = setup_of(study)
    checks = scalingmodel.leave_largest_out([s.measured for s in sizes], study.gradients, setup)
    return {
        "parameters": model.best.links,
        "times": model.best.times,
        "straggling": model.best.straggling,
        "loader_images_per_second_a_node": model.loader if math.isfinite(model.loader) else None,
        "storage_images_per_second": model.storage if math.isfinite(model.storage) else None,
        "measured_links": sorted(model.measured_links),
        "assumed_network": scalingmodel.assumed_network(setup.over),
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
    predicted: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Cost tables for the recipe: by strong scaling where it was measured, since that does not change the accuracy.

    `predicted`: the predictions of each curve. At sizes that were measured, the measurement counts.
    """
    chosen = min(range(len(curves)), key=lambda i: (curves[i].data == SYNTHETIC, curves[i].mode != "strong"))
    curve = curves[chosen]
    hours = {row["ranks"]: row["hours_to_end"] for row in predicted[chosen]["sizes"] if row["ranks"] <= COST_GPUS}
    hours |= {s.ranks: hours_to_end(study, assumed, s.images_per_second) for s in curve.sizes}
    kwh, energy = energy_to_end(study, assumed, curve, hours)
    found = cost.choices(prices, hours, kwh)
    epochs = epochs_of(study, assumed)
    return {
        "example": prices.example,
        "currency": prices.currency,
        "date": prices.date,
        "source": prices.source,
        "mode": curve.mode,
        "epochs": epochs,
        "energy": energy,
        "grams_co2_per_kwh": prices.grams_co2_per_kwh,
        "offers": [dataclasses.asdict(c) | {"per_epoch": c.cost / epochs} for c in cost.cheapest_by_offer(found)],
        "deadlines": [
            {"hours": limit, "choice": dataclasses.asdict(c) if c else None}
            for limit, c in cost.by_deadline(found, prices.deadlines_hours)
        ],
        "experiment_a_day": [dataclasses.asdict(row) for row in cost.experiment_a_day(prices, found)],
        "break_even": [dataclasses.asdict(row) for row in cost.break_even(prices)],
    }


def energy_to_end(
    study: Study, assumed: Assumed, curve: Curve, hours: dict[int, float]
) -> tuple[dict[int, float], str]:
    """Energy of a whole training in kWh by number of ranks, and where it comes from; empty where none was measured.

    At sizes that were not measured, each rank draws the power that it drew at the largest measured size.
    """
    known = [size for size in curve.sizes if math.isfinite(size.joules)]
    if not known:
        return {}, NOT_MEASURED
    last = known[-1]
    watts = last.joules * last.images_per_second / last.ranks
    kwh = {ranks: watts * ranks * time / 1000 for ranks, time in hours.items()}
    kwh |= {size.ranks: size.joules * images_of(study, assumed) / 3.6e6 for size in known}
    return kwh, f"{last.energy_of}, {watts:,.0f} W per rank at {last.ranks} ranks"


def accuracy_at(batch: int) -> str:
    """What the literature says of AlexNet's accuracy at a global batch: the smallest reported one that is as large."""
    with open(BATCHES, encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    row = next((row for row in rows if int(row["global_batch"]) >= batch), None)
    if row is None:
        return f"nothing beyond {int(rows[-1]['global_batch']):,}"
    top1 = f", top-1 {float(row['top1']):.1%}" if row["top1"] else ""
    method = f"{row['network']} with {row['method']} at {int(row['global_batch']):,}"
    return f"{method}{top1}: {row['finding']} ({row['source']})"
