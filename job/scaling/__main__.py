"""Scaling studies: `python -m job.scaling run`, then `report`, then `predict` for what was not measured.

In: numbers of ranks or nodes, options of job.train. Out: a study folder; a report of it; predictions. Under Slurm,
slurm/scaling.sh calls `run --nodes`.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from shards.command import Parser, run
from shards.errors import InputError

if TYPE_CHECKING:  # these bring numpy, for which --help must not wait
    from job.scaling.report import Assumed
    from job.scaling.study import Study

BENCH_SECONDS = 300  # for one subject of job.bench


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m job.scaling", description="Measure how training scales, report it, predict the rest.")
    commands = p.add_subparsers(dest="command", metavar="run|report|predict", required=True, parser_class=Parser)

    r = commands.add_parser(
        "run",
        help="make the runs of a study; call it again to carry on",
        description="Make the runs of a study; call it again to carry on. Further options go to job.train.",
    )
    where = r.add_mutually_exclusive_group(required=True)
    where.add_argument("--np", metavar="1,2,4", help="ranks, on this machine, under horovodrun")
    where.add_argument("--nodes", metavar="1,2,4,8", help="nodes, through sbatch slurm/train.sh")
    r.add_argument("--study", default="runs/scaling", metavar="DIR", help="folder of the study [runs/scaling]")
    r.add_argument("--data", required=True, metavar="DIR,synthetic", help="folder of shards, synthetic, or both")
    r.add_argument("--mode", default="strong,weak", help="strong: one global batch; weak: one batch a rank [both]")
    r.add_argument("--global-batch", type=int, metavar="N", help="at the smallest size [that of the recipe]")
    r.add_argument("--repeats", type=int, default=3, metavar="N", help="of each size, in random order [3]")
    r.add_argument("--steps", type=int, default=100, metavar="N", help="of a run, the first 10 are warm-up [100]")
    r.add_argument("--seed", type=int, default=1, metavar="N", help="of the order of runs [1]")
    r.add_argument(
        "--ranks-per-node", type=int, default=0, metavar="N", help="--nodes: GPUs that slurm/site.sh asks for"
    )
    r.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help='--nodes: for sbatch: --sbatch="--exclusive --time=20"'
    )
    r.add_argument("--wait", action="store_true", help="--nodes: until all jobs have ended")
    r.add_argument("--time-limit", type=float, default=3600, metavar="S", help="--np: of one run, seconds [3600]")
    r.add_argument("--retry", action="store_true", help="make failed runs again")
    r.add_argument("--allow-mixed", action="store_true", help="put runs of unlike machines or versions together")
    r.add_argument("--no-bench", action="store_true", help="--np: do not measure parts alone with job.bench")

    o = commands.add_parser("report", help="write report.html, figures, CSV and JSON", description="Report a study.")
    o.add_argument("study", metavar="STUDY")
    o.add_argument("--out", metavar="DIR", help="[STUDY/report]")
    o.add_argument("--prices", metavar="FILE", help="[job/scaling/prices.yaml, an example]")
    o.add_argument("--allow-mixed", action="store_true", help="report points of unlike machines or versions")
    _machine_options(o)

    q = commands.add_parser(
        "predict", help="images/s at sizes that were not measured", description="Predict sizes that were not measured."
    )
    q.add_argument("study", metavar="STUDY")
    q.add_argument("--gpus", required=True, metavar="N,N", help="ranks, up to 10,000 and beyond")
    batch = q.add_mutually_exclusive_group()
    batch.add_argument("--global-batch", type=int, metavar="N", help="images a step over all ranks")
    batch.add_argument("--batch-per-rank", type=int, metavar="N", help="[that of the smallest measured size]")
    q.add_argument("--algorithm", choices=("ring", "hierarchical", "tree"), help="of allreduce [ring or tree]")
    q.add_argument("--compression", default="none", choices=("none", "fp16"), help="of gradients on the wire")
    q.add_argument("--parallel", choices=("gradients", "weights", "hybrid"), help="[as measured]")
    q.add_argument("--loader", type=float, metavar="X", help="images/s that a node can read and decode")
    q.add_argument("--storage", type=float, metavar="X", help="images/s that the file system can give to all nodes")
    q.add_argument("--synthetic", action="store_true", help="leave reading out")
    q.add_argument("--allow-mixed", action="store_true", help="fit to points of unlike machines or versions")
    q.add_argument("--json", action="store_true", help="print one JSON object")
    _machine_options(q)
    return p


def _machine_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ranks-per-node", type=int, metavar="N", help="of the machine predicted for [as measured]")
    p.add_argument("--network", metavar="200Gb/s", help="link of a node to the others, nominal [as fitted]")
    p.add_argument("--latency", metavar="5us", help="of that link [as fitted]")
    p.add_argument("--local-network", metavar="300GB/s", help="between the ranks of a node [as fitted]")
    p.add_argument("--images", type=int, metavar="N", help="training images of the whole data set [of the study's]")
    p.add_argument("--epochs", type=int, metavar="N", help="of a whole training [of the study's recipe]")


def bandwidth(text: str) -> float:
    """Byte/s of `200Gb/s`, `200 Gbit/s`, `25GB/s`. Raises InputError."""
    match = re.fullmatch(r"([\d.]+)\s*([kMGT]?)(b|bit|B|byte)(/s|ps)", text.strip())
    try:
        value = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    except (TypeError, ValueError):
        raise InputError(f"{text!r} is not a bandwidth; write 200Gb/s (bits) or 25GB/s (bytes)") from None
    if not value > 0:
        raise InputError(f"a bandwidth of {text} is none; it must be above 0")
    return value / 8 if match[3] in ("b", "bit") else value


def seconds(text: str) -> float:
    """Seconds of `5us`, `0.1ms`. Raises InputError."""
    match = re.fullmatch(r"([\d.]+)\s*(ns|us|µs|ms|s)", text.strip())
    try:
        return float(match[1]) * {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]
    except (TypeError, ValueError):
        raise InputError(f"{text!r} is not a time; write 5us or 0.1ms") from None


def numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,2,4` in rising order. Raises InputError naming the option."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise InputError(f"{option} {text}: write whole numbers above 0 with commas between them, such as 1,2,4")
    return tuple(sorted({int(word) for word in words}))


def run_study(options: argparse.Namespace, further: list[str]) -> None:
    """Plan a study from the command line and make its runs."""
    from job import config
    from job.scaling import study

    modes = tuple(dict.fromkeys(options.mode.split(",")))
    for mode in modes:
        if mode not in study.MODES:
            raise InputError(f"--mode {mode} is none of {', '.join(study.MODES)}")
    for name in ("repeats", "steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: it must be 1 or more")
    train = study.train_options(further)
    kinds = tuple(dict.fromkeys(word.rstrip("/") for word in options.data.split(",") if word))
    settings = config.parse([*train, "--data", kinds[0] if kinds else ""], "python -m job.scaling run", "")
    for data in kinds:
        if data != study.SYNTHETIC and "://" not in data and not os.path.isdir(data):
            raise InputError(f"no data folder {data}; give one that shards.pack wrote, or synthetic")
    batch = settings.global_batch if options.global_batch is None else options.global_batch
    if batch < 1:
        raise InputError(f"--global-batch {batch}: it must be 1 or more")
    per_node = options.ranks_per_node or int(os.environ.get("RANKS_PER_NODE") or _gpus_asked_for() or 1)
    plan = study.Plan(
        numbers(options.nodes or options.np, "--nodes" if options.nodes else "--np"),
        modes,
        kinds,
        batch,
        options.repeats,
        options.steps,
        options.seed,
        tuple(train),
        per_node if options.nodes else 1,
        bool(options.nodes),
    )
    study.run(
        options.study,
        plan,
        lambda line: print(line, flush=True),
        retry=options.retry,
        mixed=options.allow_mixed,
        wait=options.wait,
        limit=options.time_limit,
        sbatch=options.sbatch.split(),
    )
    if not options.no_bench and not options.nodes:
        bench(options.study, plan, settings)
    print(f"python -m job.scaling report {options.study}   writes the report")


def _gpus_asked_for() -> str:
    """The number at the end of SBATCH_GPUS_PER_NODE, which may also name a kind: `a100:4`."""
    return os.environ.get("SBATCH_GPUS_PER_NODE", "").rpartition(":")[2]


def bench(path: str, plan, settings) -> None:
    """Measure the parts of a step alone, as far as job.bench can here, and keep that in study.json."""
    from job.scaling import study

    limits = dict(study.load(path).limits)
    real = [data for data in plan.data if data != study.SYNTHETIC]
    module = [sys.executable, "-m", "job.bench"]
    same = ["--recipe", settings.recipe, "--image-size", str(settings.image_size), "--device", settings.device]
    same += ["--precision", settings.precision, "--parallel", settings.parallel, "--steps", "10", "--rounds", "3"]
    each = str(max(1, plan.global_batch // min(plan.ranks)))
    commands = {"compute": [*module, "compute", *same, "--batch", each, "--json"]}
    if real:
        commands["loader"] = [*module, "loader", "--data", real[0], "--crop", str(settings.image_size), "--json"]
    if max(plan.ranks) > 1:
        launcher = shutil.which("horovodrun", path=os.path.dirname(sys.executable)) or "horovodrun"
        ranks = str(max(plan.ranks))
        commands["allreduce"] = [launcher, "-np", ranks, *module, "allreduce", "--device", settings.device, "--json"]
    for part, command in commands.items():
        if "error" not in limits.get(part, {"error": ""}):
            continue
        print(f"{time.strftime('%H:%M:%S')} {part} alone: {shlex.join(command)}", flush=True)
        log = os.path.join(path, f"bench-{part}.txt")
        try:
            code = study.call(command, log, BENCH_SECONDS)
            with open(log, encoding="utf-8", errors="replace") as file:
                text = file.read()
            found = {"error": f"exit code {code}{study.reason(log)}"}
            if not code:
                found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            found = {"error": str(error)[:300]}
        limits[part] = found
        if "error" in found:
            figure = found["error"]
        elif "images_per_second" in found:
            figure = f"{found['images_per_second']:,.0f} images/s"
        else:
            best = max(row["bus_bandwidth"] for row in found["bus_bandwidth"])
            figure = f"up to {best / 1e9:.3g} GB/s of bus bandwidth"
        print(f"{part} alone: {figure}", flush=True)
    study.save_limits(path, limits)


def _assumed(options: argparse.Namespace) -> "Assumed":
    from job.scaling.report import Assumed

    for name in ("ranks_per_node", "images", "epochs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be 1 or more")
    return Assumed(
        options.ranks_per_node,
        bandwidth(options.network) if options.network else None,
        seconds(options.latency) if options.latency else None,
        bandwidth(options.local_network) if options.local_network else None,
        options.images,
        options.epochs,
    )


def _load(options: argparse.Namespace) -> "Study":
    """The study, its problems told on stderr. Raises InputError where unlike environments are put together."""
    from job.scaling import study

    found = study.load(options.study)
    for problem in found.problems:
        print(f"warning: {problem}", file=sys.stderr)
    if (difference := found.unlike()) and not options.allow_mixed:
        raise InputError(
            f"{options.study} mixes what cannot be compared: {difference}; --allow-mixed reports it all the same"
        )
    if difference:
        found.problems.append(f"points of unlike environments are put together: {difference}")
    return found


def write_report(options: argparse.Namespace) -> None:
    from job.scaling import cost, report

    prices = cost.load_prices(options.prices or cost.EXAMPLE)
    assumed, found = _assumed(options), _load(options)
    out = options.out or os.path.join(options.study, "report")
    result = report.build(found, prices, assumed)
    names = report.write(result, found, out)
    print(f"{out}: {', '.join(names)}")
    if not found.done:
        raise InputError(f"{options.study} has no point that is done; the report shows what went wrong")


def predict(options: argparse.Namespace) -> None:
    """Print the prediction for each number of GPUs."""
    import dataclasses

    from job.scaling import model as scalingmodel
    from job.scaling import page as reportpage
    from job.scaling import report

    assumed, found = _assumed(options), _load(options)
    sizes = found.sizes()
    model = report.model_of(found, sizes)
    if not model:
        raise InputError(f"{options.study} has no point that is done and says its gradients; nothing can be predicted")
    first = min(sizes, key=lambda size: size.ranks).measured
    rows = []
    for ranks in numbers(options.gpus, "--gpus"):
        each = options.batch_per_rank or first.global_batch / first.ranks
        batch = options.global_batch or round(each * ranks)
        if batch < ranks:
            raise InputError(f"a batch of {batch} images leaves some of {ranks} GPUs without; use a larger one")
        wanted = report.scenario(found, assumed, ranks, batch, options.synthetic)
        wanted = dataclasses.replace(
            wanted,
            loader=options.loader,
            storage=options.storage,
            algorithm=options.algorithm or wanted.algorithm,
            compression=0.5 if options.compression == "fp16" else 1.0,
            parallel=options.parallel or wanted.parallel,
        )
        made = model.predict(wanted)
        alone = model.predict(dataclasses.replace(wanted, ranks=1, global_batch=max(1, round(batch / ranks))))
        gains = model.gains(wanted)
        rows.append(
            {
                "gpus": ranks,
                "global_batch": batch,
                "images_per_second": made.images_per_second,
                "low": made.low,
                "high": made.high,
                "efficiency": made.images_per_second / alone.images_per_second / ranks,
                "sections": made.sections,
                "hours_to_end": report.hours_to_end(found, assumed, made.images_per_second),
                "most_to_gain": next(iter(gains)),
                "accuracy": report.accuracy_at(batch),
            }
        )
    assumptions = list(scalingmodel.ASSUMPTIONS)
    if "network" not in model.measured_links and not assumed.network_bandwidth:
        network = scalingmodel.assumed_network(report.fit_options(found)["over"])
        assumptions.append(f"No size of several nodes was measured: between them, {network} is assumed.")
    if options.json:
        print(json.dumps({"predictions": rows, "assumptions": assumptions}, indent=1))
        return
    print("   GPUs     batch    images/s  95 % interval           effic.   training  longest section")
    for row in rows:
        longest = max(row["sections"], key=lambda name: row["sections"][name])
        between = f"{row['low']:,.0f} to {row['high']:,.0f}"
        share = row["sections"][longest] / math.fsum(row["sections"].values())
        print(
            f"{row['gpus']:>7,} {row['global_batch']:>9,} {row['images_per_second']:>11,.0f}  {between:<23} "
            f"{row['efficiency']:>6.0%}  {reportpage.hours_text(row['hours_to_end']):>9}  {longest} {share:.0%}"
        )
        print(f"{'':>18}batch {row['global_batch']:,} in the literature: {row['accuracy']}")
    print("assumes:", *assumptions, sep="\n- ")


def main() -> None:
    options, further = parser().parse_known_args()
    if options.command != "run" and further:
        parser().parse_args()  # tells which option is unknown
    if options.command == "run":
        # What a study has started ends with it: SIGTERM is an exception like Ctrl-C.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        run_study(options, further)
    elif options.command == "report":
        write_report(options)
    else:
        predict(options)


if __name__ == "__main__":
    run(main)
