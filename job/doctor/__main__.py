"""What is installed, what is slow, what is wrong, and what to do: `python -m job.doctor [--data DIR] [--json]`.

Alone it examines this machine. Under horovodrun, mpirun or srun it examines every node at the same time, prints one
table, and ends with an allreduce between all ranks. Exit code 0 when nothing is wrong, else 2.
"""

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from job.doctor.findings import Finding, as_json, worst
from shards.command import Parser, run
from shards.errors import InputError
from shards.machine.launcher import launched_size

if TYPE_CHECKING:
    from job.doctor.examine import Facts
    from job.doctor.exchange import Rank

DESCRIPTION = (
    "What is installed, what is slow, what is wrong, what to do. Under horovodrun, mpirun or srun: on every node, with "
    "an allreduce between all ranks."
)
EXCHANGE_SECONDS = 600.0  # for the slowest node, as others wait for it


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m job.doctor", description=DESCRIPTION)
    p.add_argument("--data", metavar="DIR", help="also measure how fast the shards in DIR are read")
    p.add_argument("--recipe", metavar="NAME", help="also predict images/s and the bottleneck of this recipe [paper]")
    p.add_argument("--ranks", type=int, metavar="N", help="predict for so many ranks [those here, or the GPUs here]")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="predict with it [that of the recipe]")
    p.add_argument(
        "--exchange", default=".", metavar="DIR", help="folder that all nodes share, for what the ranks find [here]"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main() -> int:
    """The command. Raises InputError where something is wrong."""
    options = parser().parse_args()
    if options.ranks is not None and options.ranks < 1:
        raise InputError(f"--ranks is {options.ranks}; it must be 1 or more")
    if predicts(options):
        from job import config

        config.recipe_path(options.recipe or "paper")
    return alone(options) if launched_size() == 1 else together(options)


def predicts(options: argparse.Namespace) -> bool:
    """Whether the limits of the stages are wanted."""
    return bool(options.recipe or options.ranks or options.precision)


def show(finding: Finding, options: argparse.Namespace) -> None:
    """Print a row as soon as it is known."""
    from job.doctor.table import lines

    if not options.json:
        print(*lines(finding), sep="\n", flush=True)


def close(findings: list[Finding], options: argparse.Namespace, **more: Any) -> int:
    """Print the JSON object. Raises InputError where something is wrong."""
    if options.json:
        print(json.dumps({"status": worst(findings), "findings": [as_json(f) for f in findings]} | more), flush=True)
    broken = list(dict.fromkeys(finding.name for finding in findings if finding.status == "wrong"))
    if broken:
        raise InputError(f"wrong here: {', '.join(broken)}; each line above says what to do")
    return 0


def alone(options: argparse.Namespace) -> int:
    """Examine this machine."""
    from job.doctor.examine import Facts, examine, open_split

    facts, findings, more = Facts(), [], {}
    if options.data is not None:
        open_split(options.data, facts)
    for finding in examine(options.data, facts):
        findings.append(finding)
        show(finding, options)
    if predicts(options):
        ranks = options.ranks or max(1, facts.gpus)
        read = [facts.read] if facts.read else []
        finding, more["limits"] = predict(options, facts, ranks, min(ranks, max(1, facts.gpus or ranks)), read, {})
        findings.append(finding)
        show(finding, options)
    return close(findings, options, **more)


def predict(options, facts, ranks: int, per_node: int, read: list[float], links: dict[str, float]):
    """The row `limits` and its figures."""
    from job.doctor import limits

    wanted = limits.Wanted(options.recipe or "paper", options.precision or "", ranks, per_node)
    return limits.check_limits(wanted, facts, read, links)


def together(options: argparse.Namespace) -> int:
    """Examine all nodes: one process per node examines it, and all ranks make an allreduce."""
    from job.doctor.examine import Facts
    from job.doctor.exchange import Rank

    rank, facts, found = Rank(options.exchange), Facts(), []
    if rank.rank == 0:  # the folder of the exchange must not stay behind; horovodrun passes Ctrl-C on as SIGUSR1
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
    try:
        return take_part(rank, facts, found, options)
    except KeyboardInterrupt:
        if rank.rank == 0:
            rank.end(0.0)
        raise


def take_part(rank: "Rank", facts: "Facts", found: list[dict], options: argparse.Namespace) -> int:
    """What each rank does; `found`: its findings as dictionaries."""
    import dataclasses

    from job.doctor import together as allreduce
    from job.doctor.examine import examine

    rank.say(started=True)
    if rank.local_rank == 0:
        local = _ranks_on_this_node(rank.size)
        for finding in examine(options.data, facts, local, lambda name: rank.say(at=name)):
            found.append(dataclasses.asdict(finding))
        rank.say(at="", gpus=facts.gpus, read=facts.read)
        if rank.rank:
            rank.say(clock=rank.clock())
    rank.say(findings=found)
    if rank.rank == 0:
        return lead(rank, facts, options)
    if plan := rank.wait("plan", EXCHANGE_SECONDS):
        rank.say(allreduce=allreduce.run_child(plan["library"], plan["nodes"], rank.is_over))
    rank.wait("done", EXCHANGE_SECONDS)
    rank.say(ended=True)
    allreduce.end_children()
    os._exit(0)  # a check that hangs must not keep the job


def _ranks_on_this_node(size: int) -> int:
    from shards.machine.cores import local_ranks

    return local_ranks() or size


def lead(rank: "Rank", facts: "Facts", options: argparse.Namespace) -> int:
    """Rank 0: put together what all nodes found, and print it."""
    from job.doctor import table
    from job.doctor import together as allreduce

    findings: list[Finding] = []

    def add(*new: Finding) -> None:
        for finding in new:
            findings.append(finding)
            show(finding, options)

    try:
        reports = rank.collect("findings")
        silent = [r for r in range(rank.size) if "findings" not in reports.get(r, ())]
        nodes: dict[str, list[Finding]] = {}
        for _, report in sorted(reports.items()):
            if report.get("findings"):
                nodes.setdefault(report["host"], [Finding(**fields) for fields in report["findings"]])
        add(table.check_nodes(reports, rank.size, silent))
        add(*table.merge(nodes))
        add(*table.check_clocks(reports))
        library = "" if silent else _library(nodes)
        if library:
            by_host: dict[str, list[int]] = {}
            for number, report in sorted(reports.items()):
                by_host.setdefault(report["host"], []).append(number)
            try:
                signal.signal(signal.SIGTERM, _launcher_ends)
                rank.tell(plan={"library": library, "nodes": list(by_host.values())})
                rank.say(allreduce=allreduce.run_child(library, list(by_host.values()), rank.failed))
                reports = rank.collect("allreduce")
                lost = [r for r in range(rank.size) if "allreduce" not in reports.get(r, ())]
                add(table.check_allreduce(reports, lost))
            except _Ended:
                add(table.check_ended(rank.heard()))
            finally:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
        more: dict[str, Any] = {
            "ranks": rank.size,
            "nodes": {host: [as_json(finding) for finding in own] for host, own in nodes.items()},
            "allreduce": table.rates(reports),
        }
        if predicts(options):
            most = max(len([r for r in reports.values() if r["host"] == host]) for host in nodes)
            ranks = options.ranks or rank.size
            read = [report["read"] for report in reports.values() if report.get("read")]
            finding, more["limits"] = predict(options, facts, ranks, min(ranks, most), read, more["allreduce"])
            add(finding)
        return close(findings, options, **more)
    finally:
        sys.stdout.flush()
        rank.end(0.0 if isinstance(sys.exception(), KeyboardInterrupt) else 5.0)
        allreduce.end_children()


class _Ended(Exception):
    """The launcher ends the job: SIGTERM."""


def _launcher_ends(number: int, frame: Any) -> NoReturn:
    raise _Ended


def _library(nodes: dict[str, list[Finding]]) -> str:
    """What makes the allreduce: Horovod where it works on all nodes, else mpi4py, else nothing."""
    broken = {finding.name for own in nodes.values() for finding in own if finding.status == "wrong"}
    if not broken & {"torch", "horovod"}:
        return "horovod"
    return "" if "mpi4py" in broken else "mpi4py"


if __name__ == "__main__":
    run(main)
