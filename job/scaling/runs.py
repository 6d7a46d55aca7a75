"""Makes the runs of a scaling study: one after the other under horovodrun on this machine, or as jobs of Slurm.

In: a `Plan`, options of job.train. Out: the files of the points (job.scaling.study), and what job.bench measures of
the parts of a step. An interrupted study goes on where it was.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from job import config
from job.scaling import study
from job.scaling.study import SYNTHETIC, Plan, Point
from shards import ROOT
from shards.errors import InputError, printable, see
from shards.machine.cores import cores_given
from shards.machine.progress import Line, duration

LOG_SECONDS = 1.0  # between two looks at a run's log
QUEUE_SECONDS = 5  # between two looks at Slurm's queue
BENCH_SECONDS = 300  # for one subject of job.bench
SET_BY_STUDY = ("out", "max-steps", "eval-every", "resume", "checkpoint-every", "log-every")  # options of job.train


@dataclasses.dataclass(frozen=True)
class How:
    """How the runs of a study are made."""

    retry: bool = False  # make failed runs again
    mixed: bool = False  # accept points of unlike environments
    time_limit: float = 3600  # seconds per run on this machine
    wait: bool = True  # Slurm: until all jobs have ended
    sbatch: tuple[str, ...] = ()  # further options of sbatch


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def train_options(words: Sequence[str]) -> tuple[str, ...]:
    """Options meant for job.train, checked as job.train would. Raises InputError for those that a study sets itself."""
    given = vars(config.parser("python -m job.scaling run", "").parse_args(list(words)))
    for name, value in given.items():
        config.convert(name, value, "command line")
        if name in SET_BY_STUDY:
            raise InputError(f"a study sets --{name} itself; leave it out")
    return tuple(words)


def run(path: str, plan: Plan, how: How) -> None:
    """Make the runs of `plan` that the study in `path` lacks.

    Raises:
        InputError: the folder holds another study, or a point ran in another environment than those before.
    """
    plan = study.continued(path, plan)
    points = study.points_of(plan)
    study.create(path, plan)
    known = {p.name: p for p in study.load(path).points}
    todo = []
    for point in points:
        before = known.get(point.name)
        if before and before.status == "submitted":
            todo.append(before)
        elif not before or (before.status == "failed" and how.retry):
            todo.append(point)
    say(f"{path}: {len(points)} points, {len(points) - len(todo)} of them there already")
    if plan.slurm:
        submit(path, plan, todo, how)
        collect(path, todo, how)
    else:
        run_all_local(path, plan, todo, how)


def run_all_local(path: str, plan: Plan, todo: Sequence[Point], how: How) -> None:
    """Run the points on this machine, with a line before and after each."""
    began = time.monotonic()
    for number, point in enumerate(todo, 1):
        left = (time.monotonic() - began) / (number - 1) * (len(todo) - number + 1) if number > 1 else 0
        eta = f", ETA {duration(left)}" if left else ""
        what = f"{number}/{len(todo)}"
        say(f"{time.strftime('%H:%M:%S')} {what} {point.name}: log {path}/runs/{point.name}/log.txt{eta}")
        run_local(path, plan, point, how.time_limit)
        finish(path, point, how.mixed)
        say(f"{time.strftime('%H:%M:%S')} {what} {point.outcome()} ({duration(point.seconds)})")


def run_local(path: str, plan: Plan, point: Point, time_limit: float) -> None:
    """Run a point under horovodrun on this machine; sets the point's command, time and error."""
    folder = run_directory(path, point)
    # Ranks have the same number of cores at every size: two ranks must not be slower for having half a machine each.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores_given().count // max(plan.ranks)))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH")))),
        "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", ""))),
        "OMP_NUM_THREADS": threads,
    }
    options = _train_command_line(plan, point, folder)
    command = ["horovodrun", "-np", str(point.ranks), sys.executable, "-m", "job.train", *options]
    point.command = f"OMP_NUM_THREADS={threads} {shlex.join(command)}"
    point.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    began = time.monotonic()
    log = os.path.join(folder, "log.txt")
    try:
        code = call(command, log, time_limit, environment)
        point.error = f"exit code {code}" if code else ""
    except OSError as error:
        raise InputError(
            f"cannot start horovodrun ({error.strerror}); bash slurm/install.sh sets it up {see('horovodrun')}"
        ) from None
    except subprocess.TimeoutExpired:
        point.error = f"not done in {duration(time_limit)}"
    point.seconds = round(time.monotonic() - began, 3)
    if point.error:
        point.error += reason(log)


def run_directory(path: str, point: Point) -> str:
    """An empty run directory for a point; what an interrupted attempt left is removed."""
    folder = os.path.join(os.path.abspath(path), "runs", point.name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.makedirs(folder)
    except OSError as error:
        raise InputError(
            f"cannot empty {folder}: {error.strerror}; end what still writes there, or choose another --study"
        ) from None
    return folder


def _train_command_line(plan: Plan, point: Point, folder: str) -> list[str]:
    data = point.data if point.synthetic or "://" in point.data else os.path.abspath(point.data)
    fixed = {"data": data, "out": folder, "global-batch": point.global_batch, "max-steps": plan.steps}
    # The only checkpoint is the one at the end, however short an epoch of the data is.
    fixed |= {"eval-every": 0, "checkpoint-every": plan.steps, "log-every": max(1, plan.steps // 5)}
    return [*plan.train, *(word for name, value in fixed.items() for word in (f"--{name}", str(value)))]


def call(command: Sequence[str], log: str, limit: float, environment: dict[str, str] | None = None) -> int:
    """Run a command with its output in the file `log`, and show that file's last line; return the exit code.

    Nothing that the command started outlives this call. Raises OSError, or TimeoutExpired after `limit` seconds.
    """
    line, began = Line(sys.stderr), time.monotonic()
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        while True:
            passed = time.monotonic() - began
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(LOG_SECONDS, max(0.0, limit - passed)))
            if passed >= limit:
                raise subprocess.TimeoutExpired(command, limit)
            if line.due():
                line.show(f"  {duration(passed)} {(_lines(log) or ['starting'])[-1]}")
    finally:
        line.clear()
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """End a launcher and its ranks, which are in process groups of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for each in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def _lines(log: str) -> list[str]:
    """The lines of a log that are not empty, printable."""
    with open(log, encoding="utf-8", errors="replace") as file:
        return [printable(line.strip()) for line in file.read().split("\n") if line.strip()]


def reason(log: str) -> str:
    """`: ` and the first `error:` line of a log, else its last line."""
    lines = _lines(log)
    errors = [m[1] for line in lines if (m := re.search(r"(error: .*)", line))]
    line = (errors or lines[-1:] or [""])[0]
    return f": {line[:300]}" if line else ""


def finish(path: str, point: Point, mixed: bool) -> None:
    """Read what a run left, and write the point's file. Raises InputError where the environment is another one."""
    folder = os.path.join(path, "runs", point.name)
    shutil.rmtree(os.path.join(folder, "checkpoints"), ignore_errors=True)  # half a gigabyte each
    point.status = "failed" if point.error else "done"
    if not point.error:
        try:
            with open(os.path.join(folder, "timings.json"), encoding="utf-8") as file:
                point.timings = json.load(file)
            point.measured()
        except (OSError, ValueError, KeyError, TypeError) as error:
            point.status, point.error = "failed", f"timings.json: {type(error).__name__} {error}"
    difference = ""
    if point.status == "done" and not mixed:
        others = [p for p in study.load(path).done if p.name != point.name]
        difference = study.difference(others[0], point) if others else ""
        if difference:
            point.status, point.error = "failed", f"another environment: {difference}"
    study.save_point(path, point)
    if difference:
        raise InputError(f"{difference}; use another --study, or --allow-mixed and compare what cannot be compared")


# ---- Slurm.


def submit(path: str, plan: Plan, todo: Sequence[Point], how: How) -> None:
    """Submit the points that are not in Slurm's queue yet."""
    name = f"scaling-{os.path.basename(os.path.abspath(path))}"
    environment = {**os.environ, "RANKS_PER_NODE": str(plan.ranks_per_node), "MAX_REQUEUES": "0"}
    for point in todo:
        if point.status == "submitted":
            continue
        folder = run_directory(path, point)
        # singleton: one job of this name at a time, so that points do not disturb one another.
        command = ["sbatch", "--parsable", f"--nodes={point.nodes}", f"--job-name={name}", "--dependency=singleton"]
        command += ["--no-requeue", f"--output={folder}/log.txt", *how.sbatch]
        command += ["slurm/train.sh", *_train_command_line(plan, point, folder)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        except OSError as error:
            raise InputError(f"cannot start sbatch ({error.strerror}); without Slurm, use --np") from None
        if done.returncode:
            raise InputError(f"sbatch refused {point.name}: {done.stderr.strip()[:300]}")
        point.job = done.stdout.strip().split(";")[0]
        point.status, point.started = "submitted", time.strftime("%Y-%m-%dT%H:%M:%S%z")
        point.command = f"RANKS_PER_NODE={plan.ranks_per_node} {shlex.join(command)}"
        study.save_point(path, point)
    say(f"{sum(p.status == 'submitted' for p in todo)} jobs in the queue, named {name}")


def collect(path: str, todo: Sequence[Point], how: How) -> None:
    """Read the results of the jobs that have ended; with `how.wait`, until all have."""
    left = list(todo)
    line = Line(sys.stderr)
    while left:
        queued = queued_jobs()
        for point in [p for p in left if p.job not in queued]:
            left.remove(point)
            folder = os.path.join(path, "runs", point.name)
            if not os.path.exists(os.path.join(folder, "timings.json")):
                log = os.path.join(folder, "log.txt")
                point.error = f"Slurm job {point.job} left no result" + (reason(log) if os.path.exists(log) else "")
            line.clear()
            finish(path, point, how.mixed)
            say(point.outcome())
        if left and not how.wait:
            say(f"{len(left)} still to come; the same command takes them in, or --wait")
            return
        if left:
            if line.due():
                line.show(f"waiting for {len(left)} jobs in the queue; the next of them: {left[0].job} {left[0].name}")
            time.sleep(QUEUE_SECONDS)


def queued_jobs() -> set[str]:
    """Ids of this user's jobs that wait or run."""
    done = subprocess.run(["squeue", "--noheader", "--format=%A", "--me"], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"squeue does not answer: {done.stderr.strip()[:200]}; run the same command again later")
    return set(done.stdout.split())


# ---- The parts of a step alone.


def measure_parts(path: str, plan: Plan, settings: config.Config) -> None:
    """Measure the parts of a step alone with job.bench, as far as this machine can, and keep that in study.json."""
    limits = dict(study.load(path).limits)
    for part, command in _bench_commands(plan, settings).items():
        if "error" not in limits.get(part, {"error": ""}):
            continue
        say(f"{time.strftime('%H:%M:%S')} {part} alone: {shlex.join(command)}")
        limits[part] = _bench(command, os.path.join(path, f"bench-{part}.txt"))
        say(f"{part} alone: {_figure(limits[part])}")
    study.save_limits(path, limits)


def _bench_commands(plan: Plan, settings: config.Config) -> dict[str, list[str]]:
    module = [sys.executable, "-m", "job.bench"]
    same = ["--recipe", settings.recipe, "--image-size", str(settings.image_size), "--device", settings.device]
    same += ["--precision", settings.precision, "--parallel", settings.parallel, "--steps", "10", "--rounds", "3"]
    batch = str(max(1, plan.global_batch // plan.weak_from))
    commands = {"compute": [*module, "compute", *same, "--batch", batch, "--json"]}
    if real := [data for data in plan.data if data != SYNTHETIC]:
        commands["loader"] = [*module, "loader", "--data", real[0], "--crop", str(settings.image_size), "--json"]
    if max(plan.ranks) > 1:
        launcher = shutil.which("horovodrun", path=os.path.dirname(sys.executable)) or "horovodrun"
        ranks = str(max(plan.ranks))
        commands["allreduce"] = [launcher, "-np", ranks, *module, "allreduce", "--device", settings.device, "--json"]
    return commands


def _bench(command: list[str], log: str) -> dict[str, Any]:
    """The JSON object that job.bench prints, or {"error": why}."""
    try:
        if code := call(command, log, BENCH_SECONDS):
            return {"error": f"exit code {code}{reason(log)}"}
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read()
        return json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)[:300]}


def _figure(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    if "images_per_second" in found:
        return f"{found['images_per_second']:,.0f} images/s"
    return f"up to {max(row['bus_bandwidth'] for row in found['bus_bandwidth']) / 1e9:.3g} GB/s of bus bandwidth"
