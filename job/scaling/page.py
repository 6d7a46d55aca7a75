"""The page of a scaling report and its figures, drawn so that they can be printed in grey.

In: the values of `job.scaling.report.build`. Out: `figures` (PNG) and `page` (HTML with the figures inside).
"""

import base64
import html
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from job.scaling.model import COMPUTE, EXPOSED, REST, SECTIONS, STRAGGLERS, TO_DEVICE, UPDATE, WAIT
from job.scaling.study import Study
from shards.errors import InputError

# Every line has a marker and a style of its own, every bar a hatch: they are told apart in grey.

LINES = (("o", "-", "0.0"), ("s", "--", "0.35"), ("^", "-.", "0.15"), ("D", ":", "0.45"))
HATCHES = {WAIT: "//", TO_DEVICE: "..", COMPUTE: "", EXPOSED: "xx", STRAGGLERS: "\\\\", UPDATE: "--", REST: "++"}
SHADES = {
    WAIT: "0.95",
    TO_DEVICE: "0.85",
    COMPUTE: "0.45",
    EXPOSED: "1.0",
    STRAGGLERS: "0.9",
    UPDATE: "0.7",
    REST: "1.0",
}


def figures(result: dict[str, Any]) -> dict[str, tuple[bytes, str]]:
    """Name -> (PNG, caption). Raises InputError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the report's figures need matplotlib: bash slurm/install.sh --extras plots") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True})
    made = {}
    if result["curves"]:
        made["throughput"] = _draw(_throughput, result, 2)
        made["breakdown"] = _draw(_breakdown, result, 1)
    if result.get("predictions"):
        made["prediction"] = _draw(_prediction, result, 2)
    if result.get("cost", {}).get("offers"):
        made["cost"] = _draw(_cost, result, 1)
    return made


def _draw(paint: Callable, result: dict[str, Any], panels: int) -> tuple[bytes, str]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(9.5, 4.2 if panels == 2 else 4.6), layout="constrained")
    caption = paint(axes, result)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=180, metadata={"Software": None})
    pyplot.close(figure)
    return png.getvalue(), caption


def _ticks(axis, ranks: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    shown = sorted(set(ranks))
    axis.set_xticks(shown[:: -max(1, math.ceil(len(shown) / 8))])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("ranks (GPUs or processes)")


def _label(curve: dict[str, Any]) -> str:
    return f"{curve['mode']} scaling, {'synthetic' if curve['data'] == 'synthetic' else 'real'} data"


def _throughput(axes, result: dict[str, Any]) -> str:
    ranks = [row["ranks"] for curve in result["curves"] for row in curve["sizes"]]
    for curve, (marker, style, shade) in zip(result["curves"], LINES * 9, strict=False):
        rows = curve["sizes"]
        x = [row["ranks"] for row in rows]
        look = dict(marker=marker, linestyle=style, color=shade, capsize=4, label=_label(curve), markersize=5)
        for axis, key, factor in ((axes[0], "images_per_second", 1), (axes[1], "efficiency", 100)):
            y = [row[key] * factor for row in rows]
            scale = [v / row["images_per_second"] for v, row in zip(y, rows, strict=True)]
            low = [(row["images_per_second"] - row["low"]) * s for row, s in zip(rows, scale, strict=True)]
            high = [(row["high"] - row["images_per_second"]) * s for row, s in zip(rows, scale, strict=True)]
            axis.errorbar(x, y, yerr=[low, high], **look)
    first = result["curves"][0]["sizes"][0]
    span = sorted(set(ranks))
    ideal = [first["images_per_second"] * r / first["ranks"] for r in span]
    axes[0].plot(span, ideal, color="0.6", linewidth=1, label="ideal: as many times faster as ranks")
    axes[1].axhline(100, color="0.6", linewidth=1, label="ideal")
    if len(span) > 1:
        axes[0].set_yscale("log")
        from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

        low, high = axes[0].get_ylim()
        if high / low <= 10:  # too few powers of ten to read by
            axes[0].yaxis.set_major_locator(FixedLocator([t for t in MaxNLocator(6).tick_values(low, high) if t > 0]))
            axes[0].yaxis.set_minor_locator(NullLocator())
            axes[0].set_ylim(low, high)
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes[0].set_ylabel("images/s, all ranks")
    axes[1].set_ylabel("efficiency, % of the smallest size's images/s a rank")
    axes[1].set_ylim(0, max(115, axes[1].get_ylim()[1]))
    for axis in axes:
        _ticks(axis, ranks)
        axis.legend(fontsize=8)
    return "Measured throughput and efficiency. Bars are 95 % intervals over the repeats (one repeat: over its steps)."


def _breakdown(axis, result: dict[str, Any]) -> str:
    bars = [(curve, row) for curve in result["curves"] for row in curve["sizes"]]
    labels = []
    for curve, row in bars:
        kind = "synth." if curve["data"] == "synthetic" else "real"
        size = f"{row['ranks']} rank{'s' * (row['ranks'] != 1)}", f"{row['global_batch']:,} images"
        labels.append((*size, f"{curve['mode']}", kind))
    bottom = [0.0] * len(bars)
    for name in SECTIONS:
        values = [1000 * row["sections"][name] for _, row in bars]
        look = dict(color=SHADES[name], hatch=HATCHES[name], edgecolor="0.1", linewidth=0.6, width=0.7)
        axis.bar(range(len(bars)), values, bottom=bottom, label=name, **look)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    for place, total in enumerate(bottom):
        axis.text(place, total, f"{total:,.3g}", ha="center", va="bottom", fontsize=8)
    if len(bars) <= 8:
        axis.set_xticks(range(len(bars)), ["\n".join(label) for label in labels], fontsize=7)
    else:
        axis.set_xticks(range(len(bars)), [", ".join(label) for label in labels], fontsize=7, rotation=60, ha="right")
    axis.set_ylabel("milliseconds a step, mean of ranks")
    axis.grid(axis="x", visible=False)
    axis.set_ylim(0, max(bottom) * 1.08)
    axis.legend(fontsize=8, reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return "Where the time of a step goes at each measured size."


def _prediction(axes, result: dict[str, Any]) -> str:
    ranks = []
    for curve, measured, (marker, style, shade) in zip(
        result["predictions"], result["curves"], LINES * 9, strict=False
    ):
        rows = curve["sizes"]
        if not rows:
            continue
        x = [row["ranks"] for row in rows]
        ranks += x
        for axis, key in ((axes[0], "images_per_second"), (axes[1], "efficiency")):
            factor = 100 if key == "efficiency" else 1
            y = [factor * row[key] for row in rows]
            bounds = [
                [factor * row[key] * row[side] / row["images_per_second"] for row in rows] for side in ("low", "high")
            ]
            axis.plot(x, y, linestyle=style, color=shade, label=f"{_label(curve)}: model")
            axis.fill_between(x, *bounds, color=shade, alpha=0.12, linewidth=0)
            points = measured["sizes"]
            axis.plot(
                [p["ranks"] for p in points], [factor * p[key] for p in points], marker, color=shade, label="measured"
            )
    axes[0].set_yscale("log")
    axes[0].set_ylabel("images/s, all ranks")
    axes[1].set_ylabel("efficiency, %")
    axes[1].set_ylim(0, None)
    for axis in axes:
        _ticks(axis, ranks)
        axis.legend(fontsize=7)
    caption = "The model's prediction (lines) with 95 % intervals (shaded), and what was measured (markers)."
    if "network" not in result["model"]["measured_links"]:
        caption += f" Beyond a node the network is assumed: {result['model']['assumed_network']}."
    return caption


def _cost(axis, result: dict[str, Any]) -> str:
    table = result["cost"]
    offers = table["offers"][::-1]
    axis.barh(range(len(offers)), [o["cost"] for o in offers], color="0.6", edgecolor="0.1", hatch="//", height=0.6)
    for place, o in enumerate(offers):
        axis.text(
            o["cost"],
            place,
            f" {money(o['cost'])}: {gpus_text(o['gpus'])}, {hours_text(o['hours'])}",
            va="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(offers)), [o["offer"] for o in offers], fontsize=8)
    axis.set_xlabel(f"{table['currency']} for one trained network ({table['epochs']} epochs)")
    axis.set_xlim(0, max(o["cost"] for o in offers) * 1.35)
    axis.grid(axis="y", visible=False)
    note = " Example prices, not offers." if table["example"] else ""
    return f"The cheapest way to train one network with each offer.{note}"


# ---- The page.


def money(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def gpus_text(gpus: int) -> str:
    return f"{gpus:,} GPU{'s' * (gpus > 1)}"


def hours_text(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #111; background: #fff }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #999 }
table { border-collapse: collapse; margin: .7em 0; font-size: .88em } td, th { border: 1px solid #bbb }
td, th { padding: .25em .5em } th { background: #eee; text-align: left } td { vertical-align: top }
figure { margin: 1em 0; break-inside: avoid } img { max-width: 100%; height: auto } figcaption { font-size: .9em }
.problem { border: 2px solid #111; padding: .3em 1em } td:last-child { overflow-wrap: anywhere }
@media print { body { margin: 0; max-width: none; font-size: 11px } tr { break-inside: avoid } }
"""


def headline(result: dict[str, Any]) -> list[str]:
    """What a reader must know, a sentence each."""
    lines = []
    for curve in result["curves"]:
        first, last = curve["sizes"][0], curve["sizes"][-1]
        if last["ranks"] > first["ranks"]:
            faster = last["images_per_second"] / first["images_per_second"]
            lines.append(
                f"{_label(curve).capitalize()}: {last['ranks']} ranks train at {last['images_per_second']:,.0f} "
                f"images/s, {faster:.2f} times as fast as {first['ranks']} "
                f"(efficiency {last['efficiency']:.0%}); the recipe ends after {hours_text(last['hours_to_end'])}."
            )
            if "advice" in last:
                lines.append(f"At {last['ranks']} ranks: {last['advice']}")
        else:
            lines.append(
                f"{_label(curve).capitalize()}: {first['ranks']} rank(s), {first['images_per_second']:,.0f} images/s; "
                f"no other size was measured."
            )
    for curve in result.get("predictions", []):
        good = [row for row in curve["sizes"] if row["efficiency"] >= 0.5]
        if good and len(curve["sizes"]) > 1:
            lines.append(
                f"{_label(curve).capitalize()}, by the model: more ranks bring at least half of their speed up to "
                f"{good[-1]['ranks']:,} ({good[-1]['images_per_second']:,.0f} images/s)."
            )
    table = result.get("cost", {})
    if table.get("offers"):
        best = table["offers"][0]
        lines.append(
            f"Cheapest by {'the example prices' if table['example'] else 'the prices given'}: {best['offer']}, "
            f"{gpus_text(best['gpus'])}, {money(best['cost'])} {table['currency']} a trained network in "
            f"{hours_text(best['hours'])}."
        )
    return lines


def page(result: dict[str, Any], study: Study, pictures: dict[str, tuple[bytes, str]]) -> str:
    """The whole HTML page, with its figures inside."""

    def figure(name: str) -> str:
        if name not in pictures:
            return ""
        png, caption = pictures[name]
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'

    parts = [f"<h1>Scaling study {html.escape(os.path.basename(os.path.abspath(study.path)))}</h1>"]
    if result["problems"]:
        parts.append(
            f'<div class="problem"><b>Not all of this study can be shown.</b>{_list(result["problems"])}</div>'
        )
    if result["curves"]:
        parts += ["<h2>In short</h2>", _list(headline(result))]
        parts += ["<h2>Throughput and efficiency</h2>", figure("throughput")]
        for curve in result["curves"]:
            parts += [f"<p>{_label(curve).capitalize()} ({html.escape(curve['data'])}):</p>", _speed_table(curve)]
        parts += ["<h2>Where the time goes</h2>", figure("breakdown"), _bottleneck_table(result)]
        if result["slow_ranks"]:
            parts += ["<p>Slow ranks:</p>", _list(result["slow_ranks"])]
        parts.append(_bench_table(result["limits"]))
    if "model" in result:
        parts += ["<h2>Sizes that were not measured</h2>", figure("prediction"), _model_text(result)]
        parts += ["<h2>Cost</h2>", _cost_text(result["cost"], figure("cost"))]
    parts += ["<h2>Environment</h2>", _environment_table(result["environment"]), "<h2>Every point</h2>"]
    rows = [
        [p.name, p.status, f"{p.measured().images_per_second:,.1f}" if p.status == "done" else p.error, p.command]
        for p in study.points
    ]
    parts.append(_table(["point", "status", "images/s, or what went wrong", "command"], rows))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Scaling study</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _speed_table(curve: dict[str, Any]) -> str:
    head = ["ranks", "nodes", "images a step", "repeats", "images/s", "95 % interval", "speed-up", "efficiency"]
    first = curve["sizes"][0]["images_per_second"]
    return _table(
        [*head, "ms a step", "recipe ends after"],
        [
            [
                row["ranks"],
                row["nodes"],
                row["global_batch"],
                row["repeats"],
                f"{row['images_per_second']:,.1f}",
                f"{row['low']:,.1f} to {row['high']:,.1f}",
                f"{row['images_per_second'] / first:.2f}",
                f"{row['efficiency']:.0%}",
                f"{1000 * row['step_seconds']:,.2f}",
                hours_text(row["hours_to_end"]),
            ]
            for row in curve["sizes"]
        ],
    )


def _bottleneck_table(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{_label(curve)}, {row['ranks']} ranks",
            row["bottleneck"],
            row["advice"],
            "; ".join(f"{name} {rate:,.0f}" for name, rate in row["part_limits"].items()),
        ]
        for curve in result["curves"]
        for row in curve["sizes"]
        if "bottleneck" in row
    ]
    return _table(["size", "bottleneck", "what would help most", "images/s that each part alone would allow"], rows)


def _bench_table(limits: dict[str, Any]) -> str:
    rows = []
    for part, found in limits.items():
        if "error" in found:
            rows.append([part, f"not measured: {found['error']}"])
        elif "images_per_second" in found:
            rows.append([part, f"{found['images_per_second']:,.0f} images/s"])
        elif found.get("bus_bandwidth"):
            sizes = [
                f"{r['bus_bandwidth'] / 1e9:.3g} GB/s at {r['bytes'] / 2**20:.3g} MiB" for r in found["bus_bandwidth"]
            ]
            rows.append([f"{part}, {found.get('ranks', '')} ranks", "bus bandwidth " + ", ".join(sizes[-3:])])
    return "<p>Parts measured by themselves (job.bench):</p>" + _table(["part", "limit"], rows) if rows else ""


def _model_text(result: dict[str, Any]) -> str:
    facts = result["model"]
    parts = []
    if facts["left_out"]:
        with_ = ", ".join(map(str, facts["checked_with"]))
        parts.append(
            f"<p>How far to trust it: fitted to {with_} rank(s) only, it predicts the largest measured size so:</p>"
        )
        rows = [
            [
                f"{c['ranks']} ranks, {c['global_batch']} images a step, {'synthetic' if c['synthetic'] else 'real'}",
                f"{c['measured']:,.1f}",
                f"{c['predicted']:,.1f} ({c['low']:,.1f} to {c['high']:,.1f})",
                f"{c['error']:+.1%}",
            ]
            for c in facts["left_out"]
        ]
        parts.append(_table(["left out", "measured images/s", "predicted (95 % interval)", "error"], rows))
        if len(facts["checked_with"]) == 1:
            parts.append("<p>One size tells nothing of the network: this check rests on the model's prior for it.</p>")
    else:
        parts.append("<p>The model could not be checked: that needs two sizes or more.</p>")
    if "network" not in facts["measured_links"]:
        parts.append(
            f"<p>No size of several nodes was measured: between nodes, the model takes {facts['assumed_network']}.</p>"
        )
    known = facts["parameters"]
    rows = [
        [name, f"{value / 1e9:.3g} GB/s" if name.endswith("bandwidth") else f"{value * 1e6:,.1f} µs"]
        for name, value in known.items()
        if name == "overhead" or name.split()[0] in facts["measured_links"]
    ]
    parts.append(
        "<p>Fitted: latency and bandwidth of an allreduce, overhead of each.</p>" + _table(["parameter", "value"], rows)
    )
    for curve in result["predictions"]:
        rows = [
            [
                f"{row['ranks']:,}",
                f"{row['global_batch']:,}",
                f"{row['images_per_second']:,.0f}",
                f"{row['low']:,.0f} to {row['high']:,.0f}",
                f"{row['efficiency']:.0%}",
                max(row["sections"], key=lambda name: row["sections"][name]),
                hours_text(row["hours_to_end"]),
            ]
            for row in curve["sizes"]
        ]
        head = [
            "ranks",
            "images a step",
            "images/s",
            "95 % interval",
            "efficiency",
            "longest section",
            "recipe ends after",
        ]
        parts += [f"<p>{_label(curve).capitalize()}, predicted:</p>", _table(head, rows)]
    parts.append("<p>The model assumes:</p>" + _list(facts["assumptions"]))
    return "".join(parts)


def _cost_text(table: dict[str, Any], figure: str) -> str:
    money_head = table["currency"]
    warning = "EXAMPLE PRICES: every number is made up; copy job/scaling/prices.yaml and put in your own (--prices). "
    parts = [
        f"<p><b>{warning if table['example'] else ''}</b>Prices of {html.escape(table['date'])}, source: "
        f"{html.escape(table['source'])}. One network is {table['epochs']} epochs; "
        f"GPUs by {table['mode']} scaling.</p>",
        figure,
    ]
    rows = [
        [o["offer"], o["gpus"], hours_text(o["hours"]), f"{o['price']:.3g}", money(o["per_epoch"]), money(o["cost"])]
        for o in table["offers"]
    ]
    head = ["offer, at its cheapest", "GPUs", "time", f"{money_head} a GPU-hour", f"{money_head} an epoch"]
    parts.append(_table([*head, f"{money_head} a trained network"], rows))
    rows = [
        [hours_text(d["hours"]), c["offer"], c["gpus"], hours_text(c["hours"]), money(c["cost"])]
        if (c := d["choice"])
        else [hours_text(d["hours"]), "none of the offers is fast enough", "", "", ""]
        for d in table["deadlines"]
    ]
    parts.append("<p>How the cheapest choice changes with the deadline:</p>")
    parts.append(_table(["deadline", "cheapest", "GPUs", "time", f"{money_head} a trained network"], rows))
    rows = [[r["offer"], money(r["per_experiment"]), r["note"]] for r in table["experiment_a_day"]]
    parts.append("<p>One experiment every day (own machines paid for by these alone):</p>")
    parts.append(_table(["offer", f"{money_head} an experiment", ""], rows))
    rows = [
        [r["own"], r["offer"], f"{r['utilisation']:.0%}" if r["utilisation"] <= 1 else "never: it would be above 100 %"]
        for r in table["break_even"]
    ]
    parts.append(
        "<p>Owning is cheaper than renting when the machines compute for more than this share of the year:</p>"
    )
    parts.append(_table(["own", "rented", "break-even utilisation"], rows))
    return "".join(parts)


def _environment_table(environment: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items() if v != "")
        return ", ".join(value) if isinstance(value, list) else str(value)

    return _table(["what", "value"], [[key.replace("_", " "), text(value)] for key, value in environment.items()])
