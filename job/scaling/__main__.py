"""Scaling studies: `python -m job.scaling run`, then `report`, then `predict` for sizes that were not measured.

In: numbers of ranks or nodes, options of job.train. Out: a folder with the study; a report; predictions. On Slurm
clusters, slurm/scaling.sh calls `run --nodes`. `report` and `predict` need the extra `plots`; `run` does not.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

from job import config
from job.scaling import runs, study
from shards.command import Parser, run
from shards.errors import InputError

if TYPE_CHECKING:
    from job.scaling.model import Scenario
    from job.scaling.report import Assumed


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m job.scaling", description="Measure how training scales, report it, predict the rest.")
    commands = p.add_subparsers(dest="command", metavar="run|report|predict", required=True, parser_class=Parser)
    r = commands.add_parser(
        "run",
        help="make the runs of a study; call it again to carry on",
        description="Make the runs of a study; call it again to carry on. Further options go to job.train.",
    )
    _run_options(r)
    o = commands.add_parser("report", help="write report.html, figures, CSV and JSON", description="Report a study.")
    o.add_argument("study", metavar="STUDY")
    o.add_argument("--out", metavar="DIR", help="[STUDY/report]")
    o.add_argument("--prices", metavar="FILE", help="[job/scaling/prices.yaml, an example]")
    o.add_argument("--allow-mixed", action="store_true", help="report points of unlike machines or versions")
    _machine_options(o)
    q = commands.add_parser(
        "predict", help="images/s at sizes that were not measured", description="Predict sizes that were not measured."
    )
    _predict_options(q)
    _machine_options(q)
    return p


def _run_options(p: Parser) -> None:
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--np", type=numbers, metavar="1,2,4", help="ranks, on this machine, under horovodrun")
    where.add_argument("--nodes", type=numbers, metavar="1,2,4,8", help="nodes, through sbatch slurm/train.sh")
    p.add_argument("--study", default="runs/scaling", metavar="DIR", help="folder of the study [runs/scaling]")
    p.add_argument("--data", required=True, metavar="DIR,synthetic", help="folder of shards, synthetic, or both")
    p.add_argument("--mode", default="strong,weak", help="strong: one global batch; weak: one batch per rank [both]")
    p.add_argument("--global-batch", type=positive, metavar="N", help="at the smallest size [that of the recipe]")
    p.add_argument("--repeats", type=positive, default=3, metavar="N", help="of each size, in random order [3]")
    p.add_argument("--steps", type=positive, default=100, metavar="N", help="per run, the first 10 are warm-up [100]")
    p.add_argument("--seed", type=int, default=1, metavar="N", help="of the order of runs [1]")
    p.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="--nodes: GPUs as slurm/site.sh has them")
    p.add_argument("--sbatch", default="", metavar="OPTIONS", help='--nodes: as --sbatch="--exclusive --time=20"')
    p.add_argument("--wait", action="store_true", help="--nodes: until all jobs have ended")
    p.add_argument("--time-limit", type=float, default=3600, metavar="S", help="--np: of one run, seconds [3600]")
    p.add_argument("--retry", action="store_true", help="make failed runs again")
    p.add_argument("--allow-mixed", action="store_true", help="put runs of unlike machines or versions together")
    p.add_argument("--no-bench", action="store_true", help="--np: do not measure parts alone with job.bench")


def _predict_options(p: Parser) -> None:
    p.add_argument("study", metavar="STUDY")
    p.add_argument("--gpus", type=numbers, required=True, metavar="N,N", help="ranks, up to 10,000 and beyond")
    batch = p.add_mutually_exclusive_group()
    batch.add_argument("--global-batch", type=int, metavar="N", help="images per step over all ranks")
    batch.add_argument("--batch-per-rank", type=int, metavar="N", help="[that of the smallest measured size]")
    p.add_argument("--algorithm", choices=("ring", "hierarchical", "tree"), help="of allreduce [ring or tree]")
    p.add_argument("--compression", default="none", choices=("none", "fp16"), help="of gradients on the wire")
    p.add_argument("--parallel", choices=("gradients", "weights", "hybrid"), help="[as measured]")
    p.add_argument("--loader", type=float, metavar="X", help="images/s that a node can read and decode")
    p.add_argument("--storage", type=float, metavar="X", help="images/s that the file system can give to all nodes")
    p.add_argument("--synthetic", action="store_true", help="leave reading out")
    p.add_argument("--allow-mixed", action="store_true", help="fit to points of unlike machines or versions")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _machine_options(p: Parser) -> None:
    p.add_argument("--ranks-per-node", type=positive, metavar="N", help="of the machine predicted for [as measured]")
    p.add_argument(
        "--network", type=bandwidth, metavar="200Gb/s", help="link of a node to the others, nominal [as fitted]"
    )
    p.add_argument("--latency", type=seconds, metavar="5us", help="of that link [as fitted]")
    p.add_argument("--local-network", type=bandwidth, metavar="300GB/s", help="between the ranks of a node [as fitted]")
    p.add_argument(
        "--images", type=positive, metavar="N", help="training images of the whole data set [of the study's]"
    )
    p.add_argument("--epochs", type=positive, metavar="N", help="of a whole training [of the study's recipe]")


def _quantity(text: str, unit: str, what: str) -> tuple[float, str]:
    """The number and the unit of a text such as `200 Gb/s`; `unit` is a pattern with one group."""
    match = re.fullmatch(rf"(\d+\.?\d*|\.\d+)\s*{unit}", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
    return float(match[1]), match[2]


def bandwidth(text: str) -> float:
    """Byte/s of `200Gb/s`, `200 Gbit/s`, `25GB/s`. Raises ArgumentTypeError."""
    value, unit = _quantity(
        text, r"([kMGT]?(?:b|bit|B|byte))(?:/s|ps)", "bandwidth; write 200Gb/s (bits) or 25GB/s (bytes)"
    )
    if not value > 0:
        raise argparse.ArgumentTypeError(f"bandwidth must be above 0, got {text}")
    bits = unit.endswith(("b", "bit"))
    return value * {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(unit[0], 1) / (8 if bits else 1)


def seconds(text: str) -> float:
    """Seconds of `5us`, `0.1ms`. Raises ArgumentTypeError."""
    value, unit = _quantity(text, r"(ns|us|µs|ms|s)", "time; write 5us or 0.1ms")
    return value * {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]


def numbers(text: str) -> tuple[int, ...]:
    """`1,2,4`, sorted. Raises ArgumentTypeError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text}: write whole numbers above 0 with commas between them, such as 1,2,4")
    return tuple(sorted({int(word) for word in words}))


def positive(text: str) -> int:
    """A whole number of 1 or more. Raises ArgumentTypeError."""
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be a whole number of 1 or more")
    return int(text)


# ---- run


def run_study(options: argparse.Namespace, further: list[str]) -> None:
    """Plan a study from the command line and make its runs."""
    modes = tuple(dict.fromkeys(options.mode.split(",")))
    for mode in modes:
        if mode not in study.MODES:
            raise InputError(f"--mode {mode}: it must be one of {', '.join(study.MODES)}")
    train = runs.train_options(further)
    data = tuple(dict.fromkeys(word.rstrip("/") for word in options.data.split(",") if word))
    settings = config.parse([*train, "--data", data[0] if data else ""], "python -m job.scaling run", "")
    for folder in data:
        if folder != study.SYNTHETIC and "://" not in folder and not os.path.isdir(folder):
            raise InputError(f"no data folder {folder}; give one that shards.pack wrote, or synthetic")
    per_node = options.ranks_per_node or int(os.environ.get("RANKS_PER_NODE") or _gpus_asked_for() or 1)
    plan = study.Plan(
        sizes=options.nodes or options.np,
        modes=modes,
        data=data,
        global_batch=options.global_batch or settings.global_batch,
        repeats=options.repeats,
        steps=options.steps,
        seed=options.seed,
        train=train,
        ranks_per_node=per_node if options.nodes else 1,
        slurm=bool(options.nodes),
    )
    how = runs.How(
        retry=options.retry,
        mixed=options.allow_mixed,
        time_limit=options.time_limit,
        wait=options.wait,
        sbatch=tuple(options.sbatch.split()),
    )
    runs.run(options.study, plan, how)
    if not options.no_bench and not options.nodes:
        runs.measure_parts(options.study, plan, settings)
    print(f"python -m job.scaling report {options.study}   writes the report")


def _gpus_asked_for() -> str:
    """The number at the end of SBATCH_GPUS_PER_NODE, which may also name a kind: `a100:4`."""
    return os.environ.get("SBATCH_GPUS_PER_NODE", "").rpartition(":")[2]


# ---- report and predict


def _load(options: argparse.Namespace) -> study.Study:
    """The study; its problems are printed on stderr. Raises InputError where it mixes unlike environments."""
    found = study.load(options.study)
    for problem in found.problems:
        print(f"warning: {problem}", file=sys.stderr)
    if (difference := found.mixed()) and not options.allow_mixed:
        raise InputError(
            f"{options.study} mixes what cannot be compared: {difference}; --allow-mixed reports it all the same"
        )
    if difference:
        found.problems.append(f"points of unlike environments are put together: {difference}")
    return found


def _assumed(options: argparse.Namespace) -> "Assumed":
    from job.scaling.report import Assumed

    return Assumed(
        ranks_per_node=options.ranks_per_node,
        network_bandwidth=options.network,
        network_latency=options.latency,
        local_bandwidth=options.local_network,
        images=options.images,
        epochs=options.epochs,
    )


def write_report(options: argparse.Namespace) -> None:
    """Write the report of a study. Raises InputError where no point is done, after writing what there is."""
    from job.scaling import cost, page, report

    prices = cost.load_prices(options.prices or cost.EXAMPLE)
    found = _load(options)
    out = options.out or os.path.join(options.study, "report")
    names = page.write(report.build(found, prices, _assumed(options)), found, out)
    print(f"{out}: {', '.join(names)}")
    if not found.done:
        raise InputError(f"{options.study} has no point that is done; the report shows what went wrong")


def predict(options: argparse.Namespace) -> None:
    """Print the prediction for each number of GPUs."""
    from job.scaling import model as scalingmodel
    from job.scaling import report
    from job.scaling.sizes import sizes_of

    assumed, found = _assumed(options), _load(options)
    sizes = sizes_of(found)
    model = report.model_of(found, sizes)
    if not model:
        raise InputError(
            f"{options.study} has no point that is done and records its gradients; nothing can be predicted"
        )
    first = min(sizes, key=lambda size: size.ranks).measured
    rows = []
    for ranks in options.gpus:
        each = options.batch_per_rank or first.global_batch / first.ranks
        batch = options.global_batch or round(each * ranks)
        if batch < ranks:
            raise InputError(f"a batch of {batch} images leaves some of {ranks} GPUs without; use a larger one")
        wanted = _wanted(options, report.scenario(found, assumed, ranks, batch, options.synthetic))
        made = model.predict(wanted)
        alone = model.predict(dataclasses.replace(wanted, ranks=1, global_batch=max(1, round(batch / ranks))))
        rows.append(
            {
                "gpus": ranks,
                "global_batch": batch,
                **dataclasses.asdict(made),
                "efficiency": made.images_per_second / alone.images_per_second / ranks,
                "hours_to_end": report.hours_to_end(found, assumed, made.images_per_second),
                "most_to_gain": max(made.sections, key=lambda name: made.sections[name]),
                "accuracy": report.accuracy_at(batch),
            }
        )
    assumptions = list(scalingmodel.ASSUMPTIONS)
    if "network" not in model.measured_links and not assumed.network_bandwidth:
        network = scalingmodel.assumed_network(report.setup_of(found).over)
        assumptions.append(f"No size of several nodes was measured: between them, {network} is assumed.")
    if options.json:
        print(json.dumps({"predictions": rows, "assumptions": assumptions}, indent=1))
    else:
        _print_predictions(rows, assumptions)


def _wanted(options: argparse.Namespace, scenario: "Scenario") -> "Scenario":
    """The scenario with what the command line names."""
    return dataclasses.replace(
        scenario,
        loader=options.loader,
        storage=options.storage,
        algorithm=options.algorithm or scenario.algorithm,
        compression=0.5 if options.compression == "fp16" else 1.0,
        parallel=options.parallel or scenario.parallel,
    )


def _print_predictions(rows: list[dict], assumptions: list[str]) -> None:
    from job.scaling.page import hours_text

    print("   GPUs     batch    images/s  95 % interval           effic.   training  longest section")
    for row in rows:
        longest = row["most_to_gain"]
        between = f"{row['low']:,.0f} to {row['high']:,.0f}"
        share = row["sections"][longest] / sum(row["sections"].values())
        print(
            f"{row['gpus']:>7,} {row['global_batch']:>9,} {row['images_per_second']:>11,.0f}  {between:<23} "
            f"{row['efficiency']:>6.0%}  {hours_text(row['hours_to_end']):>9}  {longest} {share:.0%}"
        )
        print(f"{'':>18}batch {row['global_batch']:,} in the literature: {row['accuracy']}")
    print("assumes:", *assumptions, sep="\n- ")


def main() -> None:
    """The command."""
    options, further = parser().parse_known_args()
    if options.command != "run" and further:
        parser().parse_args()  # raises for the unknown option
    if options.command == "run":
        # SIGTERM becomes an exception like Ctrl-C, so that what a study has started ends with it.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        run_study(options, further)
    elif options.command == "report":
        write_report(options)
    else:
        predict(options)


if __name__ == "__main__":
    run(main)
