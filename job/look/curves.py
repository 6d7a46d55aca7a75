"""Learning curves of a run: loss, accuracy, learning rate.

In: `job.inference.record.Run`. Out: figures with captions.
"""

from collections.abc import Sequence
from typing import Any

from job.inference.record import Run
from job.look.pictures import Picture, figure, thin

Points = list[tuple[float, float]]
LOG_RANGE = 20  # a learning rate that falls in steps by more than this is drawn on a logarithmic axis


def curves(run: Run) -> list[tuple[Picture, str]]:
    """Figures with captions; none for a run without steps."""
    starts = [line["step"] for line in run.events if line.get("event") == "start" and line["step"] > 0]
    restarts = f" Dotted lines: the run started again, {len(starts)} time{'s' * (len(starts) > 1)}." if starts else ""
    train, val = (points(run.of(kind), "loss") for kind in ("train", "val"))
    made = []
    if train:
        text = f"Loss of training batches: {train[0][1]:.3g} at step {train[0][0]:,}, {train[-1][1]:.3g} at the end."
        made.append((_draw([("training", train), ("validation", val)], "loss", starts, text), text + restarts))
    one, five, own = points(run.val, "top1"), points(run.val, "top5"), points(run.train, "top1")
    if one:
        best = max(one, key=lambda point: point[1])
        text = f"Accuracy in validation: the best top-1 is {best[1]:.2%}, after step {best[0]:,}."
        parts = [("top-1", one), ("top-5", five), ("top-1 of training batches", own)]
        made.append((_draw(parts, "accuracy", starts, text, percent=True), text))
    rates = points(run.train, "lr")
    if rates:
        text = f"Learning rate: {rates[0][1]:.3g} at the beginning, {rates[-1][1]:.3g} at the end."
        falls = run.settings.get("optim.schedule") == "step" and min(r for _, r in rates) > 0
        log = falls and max(r for _, r in rates) / min(r for _, r in rates) > LOG_RANGE
        made.append((_draw([("learning rate", rates)], "learning rate", starts, text, log=log), text))
    return made


def points(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of the lines that have a value."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def _draw(
    parts: list[tuple[str, Points]], label: str, starts: list[int], alt: str, percent: bool = False, log: bool = False
) -> Picture:
    shown = [(name, points) for name, points in parts if points]

    def paint(axes, colours: Sequence[str]) -> None:
        for (name, points), colour, style in zip(shown, colours, ("-", "--", "-."), strict=False):
            x, y = thin(points)
            few = len(x) <= 30
            axes.plot(x, y, style, color=colour, label=name, linewidth=1.5, marker="o" if few else None, markersize=3)
        for step in starts:
            axes.axvline(step, color=colours[2], linestyle=":", linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if percent:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if log:
            axes.set_yscale("log")
        elif not percent:
            axes.set_ylim(0, None)
        if len(shown) > 1:
            axes.legend(loc="lower right" if percent else "best")

    return figure(paint, alt)


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True)
