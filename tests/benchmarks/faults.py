"""Faults tried on running jobs: what was lost, seconds from the fault to the end, and from a restart to the next step.

In: nothing; Slurm for the second half. Out: a table. A run of two ranks on CPUs is struck again and again, and started
anew each time (under Slurm, it requeues itself); at the end its losses and weights must be those of a run that was left
alone, bit for bit: `lost` counts steps that are missing, told twice, or different.

    python tests/benchmarks/faults.py [--repeats 3] [--slurm-repeats 1]
"""

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil  # noqa: E402
import torch  # noqa: E402

from tests.cluster import Cluster, ClusterError, missing, namespaces_refused  # noqa: E402
from tests.launch import horovodrun, metrics, python  # noqa: E402
from tests.ranks.test_survive import SMALL, Job, final_weights, newest_step  # noqa: E402
from tests.slurm.test_slurm import LOST_AFTER, ranks_of  # noqa: E402
from tests.slurm.test_slurm import SMALL as SMALL_SLURM  # noqa: E402

STEPS_BETWEEN = 12  # from a restart to the next fault
TRAIN = ["--global-batch", "16", "--checkpoint-every", "5", "--model.dropout", "0.5", "--epochs", "1000"]


def in_a_write(job: Job) -> None:
    job.until(lambda: any((job.out / "checkpoints").glob("*.tmp")), "a write", pause=0)
    job.ranks()[0].kill()


def damage_newest(job: Job) -> None:
    """Flip a byte of the newest checkpoint, as a bad disk would, and end the job."""
    for process in job.ranks().values():
        process.kill()
    job.ended(60)
    path = job.out / "checkpoints" / f"step-{newest_step(job.out):08d}.pt"
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def reader_of(job: Job):
    return next(p for p in job.ranks()[1].children() if "job.batches.reader" in p.cmdline())


# Name -> (what is done to a job under `horovodrun -np 2`, over Gloo).
HERE: dict[str, tuple[Callable[[Job], None], bool]] = {
    "SIGKILL of rank 0": (lambda job: job.ranks()[0].kill(), False),
    "SIGKILL of rank 1": (lambda job: job.ranks()[1].kill(), False),
    "SIGKILL of rank 1, Gloo": (lambda job: job.ranks()[1].kill(), True),
    "SIGKILL of rank 0 while it writes a checkpoint": (in_a_write, False),
    "SIGKILL of a reader process": (lambda job: reader_of(job).kill(), False),
    "SIGKILL of horovodrun": (lambda job: job.process.kill(), False),
    "damaged newest checkpoint": (damage_newest, False),
    "Ctrl-C": (lambda job: os.killpg(job.process.pid, signal.SIGINT), False),
    "SIGTERM of horovodrun": (lambda job: job.process.send_signal(signal.SIGTERM), False),
    "SIGUSR1 of one rank": (lambda job: job.ranks()[1].send_signal(signal.SIGUSR1), False),
    "SIGSTOP of rank 1": (lambda job: job.ranks()[1].suspend(), False),
    "SIGSTOP of rank 0, Gloo": (lambda job: job.ranks()[0].suspend(), True),
}
GOES_ON = ("SIGKILL of a reader process",)  # the run does not end: seconds to its next steps


def strike_here(data: Path, folder: Path, name: str, repeats: int) -> tuple[list[float], list[float], int]:
    """Strike a run `repeats` times. Seconds to its ends, seconds to its next steps, steps lost."""
    strike, gloo = HERE[name]
    out, ends, nexts = folder / name.replace(" ", "-").replace(",", ""), [], []
    workers = ["--workers", "1"] if "reader" in name else []
    for number in range(repeats + 1):
        before, starts, began = newest_step(out), count_starts(out), time.monotonic()
        with Job(data, out, *TRAIN, *workers, gloo=gloo) as job:
            job.until(lambda s=starts, job=job: count_starts(job.out) > s, "the start")
            job.until(lambda before=before, job=job: last_step(job.out) > before, "a step")
            if number:
                nexts.append(time.monotonic() - began)
            job.until(
                lambda before=before, job=job: newest_step(job.out) >= before + STEPS_BETWEEN // 2, "a checkpoint"
            )
            job.until(lambda before=before, job=job: last_step(job.out) >= before + STEPS_BETWEEN, "steps")
            if number == repeats:
                os.killpg(job.process.pid, signal.SIGINT)
                assert job.ended(60) == 75, job.text
                break
            began, ranks = time.monotonic(), list(job.ranks().values())
            strike(job)
            if name in GOES_ON:
                now = last_step(out)
                job.until(lambda now=now: last_step(out) > now + 1, "a step after the fault")
                ends.append(time.monotonic() - began)
                os.killpg(job.process.pid, signal.SIGINT)
                job.ended(60)
                continue
            job.ended(100)
            assert not psutil.wait_procs(ranks, 100)[1], job.text
            ends.append(time.monotonic() - began)
    return ends, nexts, steps_lost(data, folder, out, workers)


def last_step(out: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max((line["step"] for line in metrics(out, "train")), default=0)
    return 0


def starts_of(out: Path) -> list[dict]:
    with contextlib.suppress(OSError, ValueError):
        return [line for line in metrics(out, "event") if line["event"] == "start"]
    return []


def count_starts(out: Path) -> int:
    return len(starts_of(out))


def first_step(out: Path) -> int:
    """Step behind which the run was started last."""
    return starts_of(out)[-1]["step"]


def steps_lost(data: Path, folder: Path, out: Path, workers: list[str]) -> int:
    """Steps of run `out` that are not those of a run left alone; all of them when a weight differs."""
    steps = newest_step(out)
    alone = folder / f"{out.name}-alone"
    arguments = [*SMALL, *TRAIN, *workers, "--data", str(data), "--out", str(alone), "--max-steps", str(steps)]
    done = horovodrun(2, "job.train", *arguments)
    assert done.returncode == 0, done.stderr
    mine, theirs = ([(m["step"], m["loss"]) for m in metrics(run, "train")] for run in (out, alone))
    weights, expected = final_weights(out), final_weights(alone)
    for part in ("model", "velocity"):
        if not all(torch.equal(weights[part][name], expected[part][name]) for name in expected[part]):
            return steps
    return sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))


# Name -> launchers, and what is done to a job of two nodes: cluster, job's number, run directory, its second node.
SLURM = {
    "time limit (SIGUSR1)": (
        ("mpirun", "srun", "horovodrun"),
        lambda cluster, job, out, node: cluster.run("scancel", "--batch", "--signal=USR1", str(job)),
    ),
    "preemption": (
        ("mpirun", "srun"),
        lambda cluster, job, out, node: cluster.sbatch(
            "--partition=urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
        ),
    ),
    "SIGKILL of a node's rank, then requeue by hand": (
        ("mpirun", "srun", "horovodrun"),
        lambda cluster, job, out, node: ranks_of(out)[node].kill(),
    ),
    "SIGSTOP of a node's rank": (
        ("mpirun", "srun", "horovodrun"),
        lambda cluster, job, out, node: ranks_of(out)[node].suspend(),
    ),
    "a node vanishes": (
        ("mpirun", "srun", "horovodrun"),
        lambda cluster, job, out, node: cluster.power_off(node),
    ),
}


def strike_slurm(cluster: Cluster, data: Path, folder: Path, name: str, launcher: str) -> tuple[float, float, int]:
    """One fault of a Slurm job; as of `strike_here`."""
    out, log = folder / f"{name[:12]}-{launcher}".replace(" ", "-"), folder / "log"
    log.unlink(missing_ok=True)
    options = [*SMALL_SLURM, "--data", str(data), "--out", str(out), "--epochs", "1000", "--max-steps", "100000"]
    env = {"LAUNCHER": launcher, "NETWORK_INTERFACE": "eth0"}
    words = ["-N2", "-o", str(log), str(ROOT / "slurm/train.sh"), *options]
    job = cluster.sbatch(*words, cwd=folder, env=env)
    try:
        cluster.wait_for(lambda: last_step(out) >= 6, "steps", 90)
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()
        batch = cluster.job(job)["BatchHost"]
        node = next(n for n in nodes if n != batch)
        began = time.monotonic()
        SLURM[name][1](cluster, job, out, node)
        cluster.wait_for(lambda: cluster.job(job)["JobState"] != "RUNNING", "the job's end", 120)
        end = time.monotonic() - began
        if "by hand" in name:  # a rank that fails for a reason of its own is not requeued by the script
            cluster.wait_state(job, "FAILED", 60)
            job = cluster.sbatch(*words, cwd=folder, env=env)
        try:
            cluster.wait_for(lambda: cluster.job(job)["JobState"] == "RUNNING", "its restart", 120)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{log.read_text()}") from None
        began = time.monotonic()
        starts = count_starts(out)
        cluster.wait_for(lambda: count_starts(out) > starts and last_step(out) > first_step(out), "steps", 90)
        restart = time.monotonic() - began
        steps = [m["step"] for m in metrics(out, "train")]
        lost = sum(a != b for a, b in zip(steps, range(1, len(steps) + 1), strict=True))
        return end, restart, lost
    finally:
        cluster.run("scancel", "--signal=KILL", "--full", str(job), check=False)
        cluster.run("scancel", str(job), check=False)
        for lost_node in [n for n in cluster.names if n not in cluster._inits]:
            cluster.power_on(lost_node)
        cluster.wait_for(cluster.all_idle, "all nodes idle", 150)


def row(name: str, count: int, ends: list[float], nexts: list[float], lost: int) -> None:
    def seconds(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else ""

    print(f"| {name} | {count} | {lost} | {seconds(ends)} | {seconds(nexts)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each fault under horovodrun")
    parser.add_argument("--slurm-repeats", type=int, default=1, help="of each fault and launcher under Slurm; 0: none")
    options = parser.parse_args()
    if min(options.repeats, options.slurm_repeats) < 0:
        parser.error("repeats must be 0 or more")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder, data = Path(temporary), Path(temporary) / "data"
        packed = python("shards.pack", str(ROOT / "shards/demo"), str(data), "--resize", "70")
        assert packed.returncode == 0, packed.stderr
        print("| fault | times | steps lost | fault to end, s: median (most) | restart to next step, s |")
        print("| --- | --- | --- | --- | --- |")
        for name in HERE if options.repeats else ():
            row(name, options.repeats, *strike_here(data, folder, name, options.repeats))
        refused = missing() or namespaces_refused()
        if not options.slurm_repeats or refused:
            print(f"Slurm left out: {refused or 'not asked for'}", file=sys.stderr)
            return
        with Cluster(4, lost_after=LOST_AFTER) as cluster:
            for name, (launchers, _) in SLURM.items():
                for launcher in launchers:
                    found = [
                        strike_slurm(cluster, data, Path(tempfile.mkdtemp(dir=folder)), name, launcher)
                        for _ in range(options.slurm_repeats)
                    ]
                    ends, nexts, lost = zip(*found, strict=True)
                    row(f"Slurm, {launcher}: {name}", len(found), list(ends), list(nexts), sum(lost))


if __name__ == "__main__":
    main()
