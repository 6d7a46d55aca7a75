"""Show a running or finished run in the terminal: progress, curves, speed, slow ranks, restarts.

In: a run directory, which is only read, on any machine that sees it. Out: a page of text, or one JSON object with
--json; with --follow, a new page every 2 s.
"""

import argparse
import fcntl
import json
import os
import statistics
import struct
import sys
import time
from typing import Any

from job.usage import JOULES, words
from shards.command import Parser, run
from shards.errors import InputError, printable
from shards.machine.progress import duration

REFRESH_SECONDS = 2.0
# A run that writes nothing for this long, and for this many times its usual interval, no longer counts as running.
QUIET_SECONDS, QUIET_FACTOR = 90.0, 5
RECENT = 20  # lines of metrics that the present speed is computed from
STATES = ("start", "done", "stopped", "diverged", "hang")  # events that change the state of a run
ENERGY = (*JOULES, "kwh", "co2_grams")  # of the whole run
PLOT_WIDTH, PLOT_HEIGHT = 72, 10


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m job.watch", description="Progress of a training run, from its run directory.")
    parser.add_argument("run", metavar="RUN", help="run directory (--out of job.train)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--follow", action="store_true", help="show it again every 2 s until the run ends")
    return parser.parse_args()


def read(folder: str) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    """Lines of metrics.jsonl that still hold, summary.json (empty before the end), and the time of the last line.

    Raises:
        InputError: the folder is not a run directory.
    """
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, "rb") as file:
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the --out folder of a job.train run") from None
    lines = []
    for line in text.splitlines():
        try:
            fields = json.loads(line)
            if {"kind", "step", "epoch", "time"} <= fields.keys():
                lines.append(fields)
        except (ValueError, AttributeError):  # half a line
            continue
    summary = {}
    try:
        with open(os.path.join(folder, "summary.json"), "rb") as file:
            summary = json.loads(file.read())
    except (OSError, ValueError):  # not there before the end
        pass
    return standing(lines), summary, changed


def standing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that still hold.

    A run that starts again from an earlier step undoes the steps and validations after it. The file may still have
    them, as when the disk was full at that start.
    """
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "event" and line.get("event") == "start":
            kept = [k for k in kept if k["kind"] == "event" or k["step"] <= line["step"]]
        kept.append(line)
    return kept


def locked(folder: str) -> bool:
    """Whether a job holds the run directory's lock. False on file systems without locks."""
    question = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
    try:
        with open(os.path.join(folder, ".lock"), "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK


def describe(folder: str, now: float) -> dict[str, Any]:
    """The state of a run, as --json prints it. `now`: seconds since 1970. Raises InputError as `read` does."""
    lines, summary, changed = read(folder)
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    events = [line for line in lines if line["kind"] == "event"]
    starts = [line for line in events if line.get("event") == "start"]
    start = starts[-1] if starts else {}
    # Speeds count from the last start on; a summary may be that of an earlier part.
    part = [line for line in train if line["time"] >= start.get("time", 0)][-RECENT:]
    newest = train[-1] if train else {}
    last = start.get("last_step") or summary.get("steps") or newest.get("step", 0)
    # After a rollback, lines of later steps remain: only what follows the last start says where the run is.
    since = lines[lines.index(start) :] if start else lines
    step = max((line["step"] for line in since), default=0)
    speeds = [line["images_per_second"] for line in part[1:] or part if line.get("images_per_second")]
    pace = (part[-1]["time"] - part[0]["time"]) / (part[-1]["step"] - part[0]["step"]) if len(part) > 1 else None

    status = next((e["event"] for e in reversed(events) if e.get("event") in STATES), "start")
    quiet = now - changed
    if status == "start":
        between = [b["time"] - a["time"] for a, b in zip(part, part[1:], strict=False)]
        limit = max(QUIET_SECONDS, QUIET_FACTOR * statistics.median(between or [0.0]))
        status = "running" if quiet < limit or locked(folder) else "silent"
    ranks = start.get("world_size") or 0
    speed = statistics.median(speeds) if speeds else None
    return {
        "run": os.path.abspath(folder),
        "status": status,
        "seconds_since_last_line": round(max(0.0, quiet), 1),
        "step": step,
        "last_step": last,
        "epoch": max((line["epoch"] for line in since), default=0),
        "eta_seconds": (last - step) * pace if pace and status == "running" else None,
        "loss": newest.get("loss"),
        "train_top1": newest.get("top1"),
        "top1": val[-1]["top1"] if val else None,
        "top5": val[-1]["top5"] if val else None,
        "best_top1": max((line["top1"] for line in val), default=None),
        "images_per_second": speed,
        "images_per_second_rank": speed / ranks if speed and ranks else None,
        "data_wait_fraction": newest.get("data_wait_fraction"),
        "ranks": ranks,
        "slowest_rank": newest.get("slowest_rank"),
        "slowest_factor": newest.get("slowest_factor"),
        "gpu_memory_bytes": newest.get("gpu_memory_bytes"),
        "gpu_utilisation": newest.get("gpu_utilisation"),
        **_usage(part, newest, summary if status in ("done", "stopped") else {}),
        "bad_samples": sum(line.get("bad_samples", 0) for line in train),
        "restarts": max(0, len(starts) - 1),
        "stops": sum(e["event"] == "stopped" for e in events),
        "hangs": [e["reason"] for e in events if e["event"] == "hang"],
        "slow_ranks": [f"rank {e['rank']} on {e['host']}" for e in events if e["event"] == "slow rank"],
        "curves": {
            "loss": [[line["step"], line["loss"]] for line in train if line.get("loss") is not None],
            "top1": [[line["step"], line["top1"]] for line in val],
            "train_top1": [[line["step"], line["top1"]] for line in train if line.get("top1") is not None],
        },
    }


def _usage(part: list[dict[str, Any]], newest: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """FLOP rate and energy; None: not known. At the end the summary counts, which has what came after the last line."""
    each = [line["joules_per_image"] for line in part if line.get("joules_per_image") is not None]
    drawn = summary.get("energy") or newest
    return {
        "flops_per_second": newest.get("flops_per_second"),
        "peak_fraction": newest.get("peak_fraction"),
        "joules_per_image": each[-1] if each else None,
        **{name: drawn.get(name) for name in ENERGY},
    }


def plot(points: list[list[float]], title: str, percent: bool = False) -> str:
    """A curve of [step, value] points, drawn in characters; each column shows the mean of its points."""
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    columns: list[list[float]] = [[] for _ in range(PLOT_WIDTH)]
    for step, value in points:
        columns[int((step - first) * (PLOT_WIDTH - 1) / max(1, last - first))].append(value)
    means = [statistics.fmean(column) if column else None for column in columns]
    known = [value for value in means if value is not None]
    low, high = min(known), max(known)
    scale = (PLOT_HEIGHT - 1) / (high - low) if high > low else 0.0
    rows = [[" "] * PLOT_WIDTH for _ in range(PLOT_HEIGHT)]
    for x, value in enumerate(means):
        if value is not None:
            rows[PLOT_HEIGHT - 1 - round((value - low) * scale)][x] = "*"
    text = [title]
    for y, row in enumerate(rows):
        value = high - y / (PLOT_HEIGHT - 1) * (high - low)
        label = f"{value:8.2%}" if percent else f"{value:8.4f}"
        text.append(f"{label if y in (0, PLOT_HEIGHT // 2, PLOT_HEIGHT - 1) else '':>8} |{''.join(row).rstrip()}")
    text.append(f"{'':>8} +{'-' * PLOT_WIDTH}")
    text.append(f"{'':>10}{first:<{PLOT_WIDTH // 2}}{f'step {last}':>{PLOT_WIDTH // 2}}")
    return "\n".join(text)


def page(about: dict[str, Any]) -> str:
    """What `describe` returns, as a page of text."""
    done = about["step"] / about["last_step"] if about["last_step"] else 0.0
    filled = int(40 * min(1.0, done))
    status = about["status"]
    if status == "silent":
        status = f"no new line for {duration(about['seconds_since_last_line'])}: killed, or waiting in the queue"
    rows = [
        ("run", printable(about["run"])),
        ("status", status),
        ("progress", f"[{'#' * filled}{'.' * (40 - filled)}] {done:.1%}  step {about['step']}/{about['last_step']}"),
    ]
    if about["eta_seconds"] is not None:
        ends = time.strftime("%a %H:%M", time.localtime(time.time() + about["eta_seconds"]))
        rows.append(("left", f"{duration(about['eta_seconds'])}, until {ends}"))
    if about["loss"] is not None:
        top1 = f", top-1 {about['train_top1']:.2%}" if about["train_top1"] is not None else ""
        rows.append(("training", f"loss {about['loss']:.4f}{top1}"))
    if about["top1"] is not None:
        accuracy = f"top-1 {about['top1']:.2%}, top-5 {about['top5']:.2%}, best top-1 {about['best_top1']:.2%}"
        rows.append(("validation", accuracy))
    if about["images_per_second"]:
        each = f", {about['images_per_second_rank']:,.0f} per rank" if about["images_per_second_rank"] else ""
        rows.append(("images/s", f"{about['images_per_second']:,.0f} on {about['ranks']} ranks{each}"))
    if about["data_wait_fraction"] is not None:
        rows.append(("waiting for data", f"{about['data_wait_fraction']:.1%}"))
    if about["slowest_rank"] is not None and about["ranks"] > 1:
        rows.append(
            ("slowest rank", f"{about['slowest_rank']}, {about['slowest_factor']:.2f} times the median of others")
        )
    if about["slow_ranks"]:
        rows.append(("was slow", printable(", ".join(about["slow_ranks"][-3:]))))
    if about["gpu_memory_bytes"]:
        use = f", {about['gpu_utilisation']:.0%} busy" if about["gpu_utilisation"] is not None else ""
        rows.append(("GPU", f"{about['gpu_memory_bytes'] / 2**30:.1f} GiB of memory at most{use}"))
    if about["flops_per_second"]:
        rows.append(("FLOP rate", words.flops(about)))
    if about["step"]:
        rows.append(("energy", words.energy(about)))
    if about["bad_samples"]:
        rows.append(("bad samples", f"{about['bad_samples']}, replaced"))
    rows.append(("restarts", f"{about['restarts']}; stopped on request {about['stops']} times"))
    rows += [("hang", printable(reason)) for reason in about["hangs"]]
    text = "\n".join(f"{name:<17}{value}" for name, value in rows)
    curves = [plot(about["curves"]["loss"], "loss"), plot(about["curves"]["top1"], "validation top-1", percent=True)]
    return "\n\n".join([text, *filter(None, curves)])


def main() -> None:
    """The command."""
    options = parse()
    while True:
        about = describe(options.run, time.time())
        if options.json:
            text = json.dumps(about)
        else:
            clear = "\033[H\033[2J" if options.follow and sys.stdout.isatty() else ""
            text = clear + page(about)
        print(text, flush=True)
        if not options.follow or about["status"] in ("done", "diverged"):
            return
        time.sleep(REFRESH_SECONDS)


if __name__ == "__main__":
    run(main)
