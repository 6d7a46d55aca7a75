"""Writes a scaling report: one HTML page with its figures inside, the figures as PNG, the numbers as CSV and JSON.

In: the values of `job.scaling.report.build`. Out: the files in a folder. The figures can be printed in grey: each line
has its own marker and style, each bar its own hatch.
"""

import base64
import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from job.run.log import COMPUTE, EXPOSED, REST, TO_DEVICE, UPDATE, WAIT
from job.scaling.study import SECTIONS, STRAGGLERS, SYNTHETIC, Study
from job.usage.words import NOT_MEASURED
from shards.errors import InputError
from shards.machine.files import write_whole

Report = dict[str, Any]  # what report.build returns
HERE = os.path.dirname(os.path.abspath(__file__))
LOOK = {"font.size": 10, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True}
LINES = (("o", "-", "0.0"), ("s", "--", "0.35"), ("^", "-.", "0.15"), ("D", ":", "0.45")) * 9  # marker, style, grey
BARS = {  # hatch, grey
    WAIT: ("//", "0.95"),
    TO_DEVICE: ("..", "0.85"),
    COMPUTE: ("", "0.45"),
    EXPOSED: ("xx", "1.0"),
    STRAGGLERS: ("\\\\", "0.9"),
    UPDATE: ("--", "0.7"),
    REST: ("++", "1.0"),
}


def write(result: Report, study: Study, out: str) -> list[str]:
    """Write report.html, report.json, sizes.csv, points.csv and the figures into folder `out`; returns their names."""
    result = finite(result)
    pictures = figures(result)
    files = {f"{name}.png": png for name, (png, _) in pictures.items()}
    files["report.json"] = (json.dumps(result, indent=1) + "\n").encode()
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


def finite(value: Any) -> Any:
    """The same values with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- The page and the tables.


def hours_text(hours: float) -> str:
    """3.5 days, 4.2 h, 12.0 min, 40 s."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def money(value: float) -> str:
    """Two significant digits, or whole units from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def gpus_text(gpus: int) -> str:
    """1 GPU, 1,024 GPUs."""
    return f"{gpus:,} GPU" if gpus == 1 else f"{gpus:,} GPUs"


def label(curve: dict[str, Any]) -> str:
    """A curve in words."""
    return f"{curve['mode']} scaling, {'synthetic' if curve['data'] == SYNTHETIC else 'real'} data"


def page(result: Report, study: Study, pictures: dict[str, tuple[bytes, str]]) -> str:
    """The HTML page (page.html.j2), which loads nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "label": label,
        "hours": hours_text,
        "money": money,
        "gpus": gpus_text,
        "format": lambda value, how: format(value, how),
        "known": lambda value, how: NOT_MEASURED if value is None else format(value, how),
    }
    figures = {name: (base64.b64encode(png).decode(), caption) for name, (png, caption) in pictures.items()}
    name = os.path.basename(os.path.abspath(study.path))
    template = environment.get_template("page.html.j2")
    return template.render(result, name=name, figures=figures, points=study.points)


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _sizes_csv(result: Report) -> bytes:
    columns = ["ranks", "nodes", "global_batch", "repeats", "images_per_second", "low", "high", "efficiency"]
    columns += ["step_seconds", "hours_to_end", "joules_per_image", "energy_of"]
    rows = [["kind", "mode", "data", *columns, *(f"{name} (s)" for name in SECTIONS)]]
    for kind, curves in (("measured", result["curves"]), ("predicted", result.get("predictions", []))):
        for curve in curves:
            for row in curve["sizes"]:
                values = [row.get(column, "") for column in columns]
                rows.append([kind, curve["mode"], curve["data"], *values, *(row["sections"][n] for n in SECTIONS)])
    return _csv(rows)


def _points_csv(study: Study) -> bytes:
    columns = ["name", "status", "ranks", "nodes", "global_batch", "data", "repeat", "images_per_second", "started"]
    columns += ["seconds", "error", "command"]
    rows = [columns]
    for point in study.points:
        rate = point.measured().images_per_second if point.status == "done" else ""
        rows.append([rate if name == "images_per_second" else getattr(point, name) for name in columns])
    return _csv(rows)


# ---- Figures.


def figures(result: Report) -> dict[str, tuple[bytes, str]]:
    """Name -> (PNG, caption)."""
    made = {}
    if result["curves"]:
        made["throughput"] = _draw(_throughput, result, 2)
        made["breakdown"] = _draw(_breakdown, result, 1)
    if _with_energy(result):
        made["energy"] = _draw(_energy, result, 1)
    if result.get("predictions"):
        made["prediction"] = _draw(_prediction, result, 2)
    if result.get("cost", {}).get("offers"):
        made["cost"] = _draw(_cost, result, 1)
    return made


def _draw(paint: Callable[[Any, Report], str], result: Report, panels: int) -> tuple[bytes, str]:
    """`paint` draws into one axis, or into an array of them, and returns the caption."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9.5, 4.2 if panels == 2 else 4.6), layout="constrained")
        caption = paint(figure.subplots(1, panels), result)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=180, metadata={"Software": None})
    return png.getvalue(), caption


def _set_ranks(axis, ranks: Sequence[int]) -> None:
    """A logarithmic axis of ranks with at most nine ticks, which are sizes of the study."""
    axis.set_xscale("log", base=2)
    shown = sorted(set(ranks))
    axis.set_xticks(shown[:: -max(1, math.ceil(len(shown) / 8))])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("ranks (GPUs or processes)")


def _bounds(rows: Sequence[dict[str, Any]], key: str, factor: float) -> tuple[list[float], list[float]]:
    """The 95 % interval of images/s in units of `key`."""
    scale = [factor * row[key] / row["images_per_second"] for row in rows]
    return tuple([row[side] * s for row, s in zip(rows, scale, strict=True)] for side in ("low", "high"))


def _throughput(axes, result: Report) -> str:
    ranks = sorted({row["ranks"] for curve in result["curves"] for row in curve["sizes"]})
    for curve, (marker, style, shade) in zip(result["curves"], LINES, strict=False):
        rows = curve["sizes"]
        look = dict(marker=marker, linestyle=style, color=shade, capsize=4, label=label(curve), markersize=5)
        for axis, key, factor in ((axes[0], "images_per_second", 1), (axes[1], "efficiency", 100)):
            y = [factor * row[key] for row in rows]
            low, high = _bounds(rows, key, factor)
            errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axis.errorbar([row["ranks"] for row in rows], y, yerr=errors, **look)
    first = result["curves"][0]["sizes"][0]
    ideal = [first["images_per_second"] * r / first["ranks"] for r in ranks]
    axes[0].plot(ranks, ideal, color="0.6", linewidth=1, label="ideal: as many times faster as ranks")
    axes[1].axhline(100, color="0.6", linewidth=1, label="ideal")
    if len(ranks) > 1:
        axes[0].set_yscale("log")
        low, high = axes[0].get_ylim()
        if high / low <= 10:  # too few powers of ten to read by
            axes[0].yaxis.set_major_locator(FixedLocator([t for t in MaxNLocator(6).tick_values(low, high) if t > 0]))
            axes[0].yaxis.set_minor_locator(NullLocator())
            axes[0].set_ylim(low, high)
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes[0].set_ylabel("images/s, all ranks")
    axes[1].set_ylabel("efficiency, % (images/s per rank)")
    axes[1].set_ylim(0, max(115, axes[1].get_ylim()[1]))
    for axis in axes:
        _set_ranks(axis, ranks)
        axis.legend(fontsize=8)
    return "Measured throughput and efficiency. Bars are 95 % intervals over the repeats (one repeat: over its steps)."


def _breakdown(axis, result: Report) -> str:
    bars = [(curve, row) for curve in result["curves"] for row in curve["sizes"]]
    labels = [
        (
            f"{row['ranks']} rank{'' if row['ranks'] == 1 else 's'}",
            f"{row['global_batch']:,} images",
            curve["mode"],
            "synth." if curve["data"] == SYNTHETIC else "real",
        )
        for curve, row in bars
    ]
    places, bottom = range(len(bars)), [0.0] * len(bars)
    for name in SECTIONS:
        values = [1000 * row["sections"][name] for _, row in bars]
        hatch, shade = BARS[name]
        look = dict(color=shade, hatch=hatch, edgecolor="0.1", linewidth=0.6, width=0.7)
        axis.bar(places, values, bottom=bottom, label=name, **look)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    for place, total in enumerate(bottom):
        axis.text(place, total, f"{total:,.3g}", ha="center", va="bottom", fontsize=8)
    if len(bars) <= 8:
        axis.set_xticks(places, ["\n".join(words) for words in labels], fontsize=7)
    else:
        axis.set_xticks(places, [", ".join(words) for words in labels], fontsize=7, rotation=60, ha="right")
    axis.set_ylabel("milliseconds per step, mean of ranks")
    axis.grid(axis="x", visible=False)
    axis.set_ylim(0, max(bottom) * 1.08)
    axis.legend(fontsize=8, reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return "Where the time of a step goes at each measured size."


def _with_energy(result: Report) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The curves, each with those of its sizes whose energy was measured; without those that have none."""
    pairs = [(c, [row for row in c["sizes"] if row["joules_per_image"] is not None]) for c in result["curves"]]
    return [(curve, rows) for curve, rows in pairs if rows]


def _energy(axis, result: Report) -> str:
    found = _with_energy(result)
    for (curve, rows), (marker, style, shade) in zip(found, LINES, strict=False):
        y = [row["joules_per_image"] for row in rows]
        axis.plot([r["ranks"] for r in rows], y, marker=marker, linestyle=style, color=shade, label=label(curve))
    _set_ranks(axis, [row["ranks"] for _, rows in found for row in rows])
    axis.set_ylim(0, None)
    axis.set_ylabel("joules per image")
    axis.legend(fontsize=8)
    of = ", ".join(sorted({row["energy_of"] for _, rows in found for row in rows}))
    return f"Energy per trained image ({of}): chips alone, without the rest of the nodes and cooling."


def _prediction(axes, result: Report) -> str:
    ranks = []
    curves = zip(result["predictions"], result["curves"], LINES, strict=False)
    for predicted, measured, (marker, style, shade) in curves:
        rows, points = predicted["sizes"], measured["sizes"]
        x = [row["ranks"] for row in rows]
        ranks += x
        for axis, key, factor in ((axes[0], "images_per_second", 1), (axes[1], "efficiency", 100)):
            axis.plot(x, [factor * row[key] for row in rows], linestyle=style, color=shade, label=label(predicted))
            axis.fill_between(x, *_bounds(rows, key, factor), color=shade, alpha=0.12, linewidth=0)
            y = [factor * point[key] for point in points]
            axis.plot([point["ranks"] for point in points], y, marker, color=shade, label="measured")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("images/s, all ranks")
    axes[1].set_ylabel("efficiency, %")
    axes[1].set_ylim(0, None)
    for axis in axes:
        _set_ranks(axis, ranks)
        axis.legend(fontsize=7)
    caption = "The model's prediction (lines) with 95 % intervals (shaded), and what was measured (markers)."
    if "network" not in result["model"]["measured_links"]:
        caption += f" Beyond a node the network is assumed: {result['model']['assumed_network']}."
    return caption


def _cost(axis, result: Report) -> str:
    table = result["cost"]
    offers = table["offers"][::-1]
    costs = [offer["cost"] for offer in offers]
    axis.barh(range(len(offers)), costs, color="0.6", edgecolor="0.1", hatch="//", height=0.6)
    for place, offer in enumerate(offers):
        text = f" {money(offer['cost'])}: {gpus_text(offer['gpus'])}, {hours_text(offer['hours'])}"
        axis.text(offer["cost"], place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(offers)), [offer["offer"] for offer in offers], fontsize=8)
    axis.set_xlabel(f"{table['currency']} per trained network ({table['epochs']} epochs)")
    axis.set_xlim(0, max(costs) * 1.35)
    axis.grid(axis="y", visible=False)
    note = " Example prices, not offers." if table["example"] else ""
    return f"The cheapest way to train one network with each offer.{note}"
