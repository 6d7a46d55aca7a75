"""The findings of all nodes as one table: a row per subject, with the nodes named where they differ.

In: findings by node. Out: findings, one per row, or several where nodes have different troubles; and their lines.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.doctor.findings import ROWS, Finding, ok, slow, wrong
from job.doctor.together import NO_ANSWER
from shards.errors import few, short

# Rows in which ranks that differ do not train together (job.ranks.agree), or hang; in others they wait for the slowest.
MUST_MATCH = frozenset({"python", "code", "torch", "horovod", "mpirun"})
# A node whose figure is below this share of the median of all nodes is named.
SLOW_NODE = 0.7
ALLREDUCE_ADVICE = "rows gpu, nccl, mpirun, network and shm; NCCL_DEBUG=INFO shows what NCCL tries"
FAR_APART = 1.0  # seconds between clocks


def merge(nodes: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """One table of all nodes: host -> its findings, that of rank 0 first."""
    rows = dict.fromkeys(
        finding.name for name in ROWS for found in nodes.values() for finding in found if finding.name == name
    )
    merged: list[Finding] = []
    for name in rows:
        by_host = {host: [f for f in found if f.name == name] for host, found in nodes.items()}
        merged += _row(name, {host: found for host, found in by_host.items() if found}, len(nodes))
    return merged


def _row(name: str, by_host: Mapping[str, Sequence[Finding]], nodes: int) -> list[Finding]:
    """The lines of one row: difference, troubles of nodes, or else one line for all."""
    found: list[Finding] = []
    if difference := _difference(name, by_host):
        found.append(difference)
    troubles: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for host, own in by_host.items():
        for finding in own:
            if finding.status != "ok":
                troubles.setdefault((finding.status, finding.advice), []).append((host, finding))
    for (status, advice), hosts in troubles.items():
        finding = hosts[0][1]
        text = finding.text if len(hosts) == nodes == 1 else f"{_hosts([h for h, _ in hosts], nodes)}: {finding.text}"
        found.append(Finding(status, name, text, advice, value=finding.value))
    if laggard := _laggard(name, by_host):
        found.append(laggard)
    if found:
        return found
    host, finding = _least(by_host)
    if nodes == 1:
        return [finding]
    texts = {own.text for all in by_host.values() for own in all}
    text = finding.text if len(texts) == 1 else f"{finding.text} (on {host}; {_range(by_host)})"
    return [ok(name, text, finding.advice, value=finding.value)]


def _difference(name: str, by_host: Mapping[str, Sequence[Finding]]) -> Finding | None:
    """The row that says how nodes differ; None: they do not."""
    values: dict[str, list[str]] = {}
    for host, own in by_host.items():
        for value in (finding.same for finding in own if finding.same):
            values.setdefault(value, []).append(host)
    if len(values) < 2:
        return None
    each = [f"{short(value, 100)} on {_hosts(hosts)}" for value, hosts in values.items()]
    make, advice = slow, "all wait for the slowest; give the job nodes that are alike"
    if name in MUST_MATCH:
        make, advice = wrong, "install the same on all nodes; training refuses ranks that differ"
    return make(name, f"the nodes differ: {few(each, 4, '; ') if len(each) > 4 else '; '.join(each)}", advice)


def _laggard(name: str, by_host: Mapping[str, Sequence[Finding]]) -> Finding | None:
    """The row that names a node whose figure is far below the others'; None: there is none."""
    values = {host: own[0].value for host, own in by_host.items() if own[0].value is not None}
    if len(values) < 2:
        return None
    host = min(values, key=lambda h: values[h])
    others = statistics.median(value for h, value in values.items() if h != host)
    if values[host] >= SLOW_NODE * others:
        return None
    share = f"{values[host] / others:.0%} of what {'the other has' if len(values) == 2 else 'the others have'}"
    return slow(name, f"{host} has {share}: {by_host[host][0].text}", "all wait for the slowest node; leave it out")


def _least(by_host: Mapping[str, Sequence[Finding]]) -> tuple[str, Finding]:
    """The node with the smallest figure; the first where there are no figures."""
    hosts = list(by_host)
    host = min(hosts, key=lambda h: (by_host[h][0].value is None, by_host[h][0].value or 0.0))
    return host, by_host[host][0]


def _range(by_host: Mapping[str, Sequence[Finding]]) -> str:
    values = {host: own[0].value for host, own in by_host.items() if own[0].value is not None}
    if not values:
        return f"{len(by_host)} nodes alike but for details"
    most, least = max(values, key=lambda h: values[h]), min(values.values())
    if values[most] < 1.05 * least:
        return f"{len(by_host)} nodes alike"
    return f"the lowest of {len(by_host)} nodes; {most} has {values[most] / max(least, 1e-9):.2f} times that"


def _hosts(hosts: Sequence[str], nodes: int = 0) -> str:
    """Names of nodes; "all N nodes" where these are all."""
    if nodes > 1 and len(hosts) == nodes:
        return f"all {nodes} nodes"
    return hosts[0] if len(hosts) == 1 else f"{hosts[0]} and {len(hosts) - 1} other{'s' * (len(hosts) > 2)}"


def check_nodes(reports: Mapping[int, Mapping[str, Any]], size: int, silent: Sequence[int]) -> Finding:
    """The row `nodes`: which ranks answered. `silent`: ranks that did not, or no longer do."""
    hosts = list(dict.fromkeys(report["host"] for _, report in sorted(reports.items())))
    text = f"{size} ranks on {len(hosts)} node{'s' * (len(hosts) > 1)}: {few(hosts, separator=', ')}"
    if not silent:
        return ok("nodes", text)
    names = []
    for rank in silent:
        report = reports.get(rank)
        at = f" (hangs in `{report['at']}`)" if report and report.get("at") else ""
        names.append(f"rank {rank} on {report['host']}{at}" if report else f"rank {rank}")
    advice = (
        "look at that node, or leave it out (sbatch --exclude=NODE); if all but the first node are missing, the "
        "nodes do not share this folder: --exchange DIR"
    )
    return wrong("nodes", f"no answer from {few(names, 8, ', ')}; {text}", advice)


def check_clocks(reports: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """The rows `time` and `network`, from what Rank.clock returned on each node."""
    clocks = {r["host"]: r["clock"] for _, r in sorted(reports.items()) if r.get("clock")}
    found = []
    for host, clock in clocks.items():
        if "problem" in clock:
            advice = "name the nodes' network in NETWORK_INTERFACE of slurm/site.sh; a firewall may be between them"
            found.append(slow("network", f"{host} {clock['problem']}", advice))
    offsets = {host: clock["offset"] for host, clock in clocks.items() if "offset" in clock}
    if not offsets:
        return found
    worst = max(offsets, key=lambda host: abs(offsets[host]))
    text = f"clocks differ by up to {abs(offsets[worst]) * 1e3:.1f} ms ({worst})"
    if abs(offsets[worst]) > FAR_APART:
        advice = "tell the administrators (chronyc tracking); Slurm and file times suffer, and logs mislead"
        return [*found, slow("time", text, advice)]
    return [*found, ok("time", text)]


def check_allreduce(reports: Mapping[int, Mapping[str, Any]], silent: Sequence[int]) -> Finding:
    """The row `allreduce`, from what together.run_child returned on each rank."""
    results = {rank: report.get("allreduce", {"error": NO_ANSWER}) for rank, report in sorted(reports.items())}
    results |= {rank: {"error": NO_ANSWER} for rank in silent}
    failed = {rank: result["error"] for rank, result in results.items() if "error" in result}
    if failed:
        # A rank that only waited for another says that it was lost, or nothing: the others know more.
        rank = min(failed, key=lambda r: (NO_ANSWER in failed[r] or "HorovodInternalError" in failed[r], r))
        host = reports.get(rank, {}).get("host", "an unknown node")
        others = f" (and {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
        return wrong("allreduce", f"rank {rank} on {host}{others}: {failed[rank]}", ALLREDUCE_ADVICE)
    not_right = [rank for rank, result in results.items() if not result["right"]]
    if not_right:
        text = f"wrong sum on rank {not_right[0]} on {reports[not_right[0]]['host']}, by {results[0]['over']}"
        return wrong("allreduce", text, "do not train here: a driver, a GPU or the network damages data")
    parts = rates(reports)
    text = f"the sum of {len(results)} ranks is right, by {results[0]['over']}; "
    text += f"{results[0]['bytes'] >> 20} MiB at {parts['all'] / 1e9:.2f} GB/s"
    if "within" in parts:
        text += f", within a node {parts['within'] / 1e9:.2f}"
    if "between" in parts:
        text += f", between nodes {parts['between'] / 1e9:.2f}"
    return ok("allreduce", f"{text} (bus bandwidth)")


def check_ended(reports: Mapping[int, Mapping[str, Any]]) -> Finding:
    """The row `allreduce` where the launcher has ended the job meanwhile, because a rank crashed."""
    failed = {r: f["allreduce"]["error"] for r, f in sorted(reports.items()) if "error" in f.get("allreduce", ())}
    text = "a rank crashed, and the launcher ended the job"
    if failed:
        rank = min(failed)
        text = f"rank {rank} on {reports[rank]['host']}: {failed[rank]}; the launcher ended the job"
    return wrong("allreduce", text, ALLREDUCE_ADVICE)


def rates(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Bus bandwidths in byte/s: `all`; `within` the slowest node; `between` the nodes. Only what was measured."""
    results = [report["allreduce"] for _, report in sorted(reports.items()) if "all" in report.get("allreduce", ())]
    if not results:
        return {}
    found = {"all": results[0]["all"]}
    within = [rate for result in results for name, rate in result.items() if name.startswith("node ")]
    hosts = {report["host"] for report in reports.values()}
    if within or len(hosts) == 1:
        found["within"] = min(within) if within else found["all"]
    between = next((result["between"] for result in results if "between" in result), None)
    if between or len(hosts) == len(reports) > 1:
        found["between"] = between or found["all"]
    return found


def lines(finding: Finding) -> Iterator[str]:
    """A finding on the terminal."""
    yield f"{finding.status:<6}{finding.name:<12}{finding.text}"
    if finding.advice:
        yield f"{'':18}-> {finding.advice}"
