"""A scaling study on disk: which points it has, how each is run, and what came of it.

In: a `Plan`. Out: a folder with study.json, a JSON file a point (`points/`) and its run directory (`runs/`); and
`load`, which reads such a folder back, whatever state it is in.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from job.run.log import lock
from job.scaling.model import EXPOSED, SECTIONS, STRAGGLERS, Gradient, Measured
from shards import ROOT
from shards.command import Parser
from shards.errors import InputError, printable
from shards.machine.cores import cores_given
from shards.machine.files import write_whole
from shards.machine.progress import Line, duration

SYNTHETIC = "synthetic"
MODES = ("strong", "weak")
# Facts of the environment in which all points of a study must agree; the others (ranks a node, cores) follow the size.
ALIKE = ("device", "versions", "horovod_over", "network", "tuning", "file_system", "commit", "parallel")
LOOK_SECONDS = 1.0  # between two looks at a run's log
POLL_SECONDS = 5  # between two looks at Slurm's queue

# Two-sided 95 % quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study measures. `sizes` are ranks, or nodes of `ranks_per_node` ranks each under Slurm."""

    sizes: tuple[int, ...]
    modes: tuple[str, ...]
    data: tuple[str, ...]  # folders of shards, or "synthetic"
    global_batch: int  # strong: at every size; weak: at the smallest, and growing with the ranks
    repeats: int
    steps: int
    seed: int
    train: tuple[str, ...]  # further options of job.train
    ranks_per_node: int = 1
    slurm: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(size * (self.ranks_per_node if self.slurm else 1) for size in self.sizes)


@dataclasses.dataclass
class Point:
    """One run of a study. status: planned, submitted, done or failed."""

    name: str
    ranks: int
    nodes: int
    global_batch: int
    data: str
    repeat: int
    status: str = "planned"
    error: str = ""
    command: str = ""
    started: str = ""
    seconds: float = 0.0  # of the whole run, start-up included
    job: str = ""  # Slurm's number
    timings: dict[str, Any] = dataclasses.field(default_factory=dict)  # timings.json of the run

    @property
    def synthetic(self) -> bool:
        return self.data == SYNTHETIC

    @property
    def environment(self) -> dict[str, Any]:
        found = {key: self.timings["environment"].get(key) for key in ALIKE[:-1]}
        return found | {"parallel": self.timings.get("parallel")}

    def measured(self) -> Measured:
        """Sections of a step, averaged over the ranks. Raises ValueError, KeyError, TypeError where there are none."""
        ranks = self.timings["ranks"]
        if not ranks:
            raise ValueError("no ranks")
        sections = {name: sum(r["mean"][name] for r in ranks) / len(ranks) for name in SECTIONS if name != STRAGGLERS}
        # Who comes last to an allreduce waits for the network alone; the others also for that rank.
        network = min(self.timings["fastest"][EXPOSED], sections[EXPOSED]) if self.ranks > 1 else sections[EXPOSED]
        sections[STRAGGLERS] = sections[EXPOSED] - network
        sections[EXPOSED] = network
        sections = {name: sections[name] for name in SECTIONS}
        step = sum(sections.values())
        if not all(math.isfinite(v) and v >= 0 for v in sections.values()) or step <= 0:
            raise ValueError("a time that is not a number, or negative")
        spread, steps = self.timings["step_seconds"]["std"], self.timings["steps"]
        error = spread / math.sqrt(max(1, steps))
        return Measured(self.ranks, self.nodes, self.global_batch, sections, step, error, self.synthetic)


@dataclasses.dataclass(frozen=True)
class Size:
    """The repeats of one size. `low` and `high`: 95 % interval of the mean images/s."""

    measured: Measured  # averaged over the repeats
    data: str
    points: tuple[Point, ...]
    images_per_second: float
    low: float
    high: float

    @property
    def ranks(self) -> int:
        return self.measured.ranks


@dataclasses.dataclass
class Study:
    """A study as read: `points` in the order of their names, and `problems`, a line for each that cannot be used."""

    path: str
    plan: dict[str, Any]
    points: list[Point]
    limits: dict[str, Any]
    problems: list[str]

    @property
    def done(self) -> list[Point]:
        return [p for p in self.points if p.status == "done"]

    @property
    def gradients(self) -> list[Gradient]:
        found = max((p.timings.get("gradients") or [] for p in self.done), key=len, default=[])
        return [Gradient(g["bytes"], g["ready"], g["name"], tuple(g["shape"])) for g in found]

    def sizes(self) -> list[Size]:
        """Repeats put together, by data, ranks and batch."""
        groups: dict[tuple, list[Point]] = {}
        for point in self.done:
            groups.setdefault((point.data, point.ranks, point.nodes, point.global_batch), []).append(point)
        return [_size(points) for _, points in sorted(groups.items())]

    def unlike(self) -> str:
        """How the environments of the points differ, in words; empty where they agree."""
        first = self.done[0] if self.done else None
        for point in self.done:
            if difference := _difference(first, point):
                return difference
        return ""


def _size(points: list[Point]) -> Size:
    runs = [point.measured() for point in points]
    sections = {name: sum(m.sections[name] for m in runs) / len(runs) for name in SECTIONS}
    step = sum(sections.values())
    rates = [m.images_per_second for m in runs]
    mean = sum(rates) / len(rates)
    if len(rates) > 1:
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rates) / (len(rates) - 1))
        half = STUDENT_T[min(len(rates) - 2, len(STUDENT_T) - 1)] * deviation / math.sqrt(len(rates))
        error = step * deviation / mean / math.sqrt(len(rates))
    else:  # by the spread of the steps of the one run
        error = runs[0].error
        half = 1.96 * mean * error / step
    measured = dataclasses.replace(runs[0], sections=sections, step=step, error=error)
    return Size(measured, points[0].data, tuple(points), mean, max(0.0, mean - half), mean + half)


def _difference(first: Point, second: Point) -> str:
    for key, value in first.environment.items():
        other = second.environment[key]
        if other != value:
            return f"{key} is {_short(other)} at {second.name}, {_short(value)} at {first.name}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 160 else text[:157] + "..."


def points_of(plan: Plan) -> list[Point]:
    """All runs of a plan, in the order in which they are made: repeat by repeat, each in an order of its own.

    Strong and weak scaling share their smallest size; it is run once. Raises InputError for a batch that cannot be
    divided.
    """
    smallest = min(plan.ranks)
    points = []
    for repeat in range(1, plan.repeats + 1):
        round_: dict[str, Point] = {}
        for size, ranks in zip(plan.sizes, plan.ranks, strict=True):
            for mode in plan.modes:
                batch = plan.global_batch if mode == "strong" else plan.global_batch // smallest * ranks
                if batch % ranks:
                    down = math.lcm(*plan.ranks)
                    fitting = max(down, plan.global_batch // down * down)
                    raise InputError(
                        f"a batch of {batch} images cannot be divided among {ranks} ranks; "
                        f"use --global-batch {fitting} or another multiple of {down}"
                    )
                for data in plan.data:
                    kind = SYNTHETIC if data == SYNTHETIC else "real"
                    if data != SYNTHETIC and sum(d != SYNTHETIC for d in plan.data) > 1:
                        kind = f"real{plan.data.index(data)}"
                    name = f"{kind}-ranks{ranks:05d}-batch{batch:06d}-repeat{repeat:02d}"
                    nodes = size if plan.slurm else 1
                    round_[name] = Point(name, ranks, nodes, batch, data, repeat)
        order = list(round_.values())
        random.Random(f"{plan.seed} {repeat}").shuffle(order)
        points += order
    return points


def train_options(words: Sequence[str]) -> list[str]:
    """Check options meant for job.train as that would. Raises InputError for those that a study sets itself."""
    from job import config

    parser: Parser = config.parser("python -m job.scaling run", "")
    given = vars(parser.parse_args(list(words)))
    for name, value in given.items():
        config.convert(name, value, "command line")
        if name in ("out", "max-steps", "eval-every", "resume", "checkpoint-every", "log-every"):
            raise InputError(f"a study sets --{name} itself; leave it out")
    return list(words)


def run(path: str, plan: Plan, say: Callable[[str], None], retry: bool = False, mixed: bool = False,
        wait: bool = True, limit: float = 3600, sbatch: Sequence[str] = ()) -> None:  # fmt: skip
    """Make the runs of `plan` that study `path` lacks. Points that are done stay; failed ones too, unless `retry`.

    Raises:
        InputError: the folder holds another study, or a point ran in another environment than those before.
    """
    points = points_of(plan)
    _begin(path, plan)
    known = {p.name: p for p in load(path).points}
    todo = []
    for point in points:
        before = known.get(point.name)
        if before and before.status == "submitted":
            todo.append(before)
        elif not before or (before.status == "failed" and retry):
            todo.append(point)
    say(f"{path}: {len(points)} points, {len(points) - len(todo)} of them there already")
    if plan.slurm:
        _run_slurm(path, plan, todo, say, wait, mixed, sbatch)
        return
    began = time.monotonic()
    for number, point in enumerate(todo, 1):
        left = (time.monotonic() - began) / (number - 1) * (len(todo) - number + 1) if number > 1 else 0
        eta = f", ETA {duration(left)}" if left else ""
        say(f"{time.strftime('%H:%M:%S')} {number}/{len(todo)} {point.name}: log {path}/runs/{point.name}/log.txt{eta}")
        _run_here(path, plan, point, limit)
        _finish(path, point, mixed)
        say(f"{time.strftime('%H:%M:%S')} {number}/{len(todo)} {outcome(point)} ({duration(point.seconds)})")


def outcome(point: Point) -> str:
    """A line that says how a point went."""
    if point.status != "done":
        return f"{point.name}: {point.status}{': ' if point.error else ''}{point.error}"
    measured = point.measured()
    return f"{point.name}: {measured.images_per_second:,.1f} images/s, {1000 * measured.step:,.1f} ms a step"


def _begin(path: str, plan: Plan) -> None:
    """Write study.json, or check that the one which is there is of the same study."""
    fields = json.loads(json.dumps(dataclasses.asdict(plan)))
    known = _read_json(os.path.join(path, "study.json")) if os.path.exists(os.path.join(path, "study.json")) else None
    if known is not None:
        # More sizes, modes or repeats make the same study larger.
        for name in ("data", "global_batch", "steps", "train", "ranks_per_node", "slurm"):
            if known.get("plan", {}).get(name) != fields[name]:
                raise InputError(
                    f"{path} is a study with {name} {known.get('plan', {}).get(name)}, not {fields[name]}; "
                    "give the same, or another --study"
                )
    try:
        os.makedirs(os.path.join(path, "points"), exist_ok=True)
        os.makedirs(os.path.join(path, "runs"), exist_ok=True)
        lock(path, "--study")
    except OSError as error:
        raise InputError(f"cannot write the study {path}: {error.strerror}; choose another --study") from None
    _write_json(os.path.join(path, "study.json"), {"plan": fields, "limits": (known or {}).get("limits", {})})


def _run_directory(path: str, point: Point) -> str:
    """An empty run directory for a point: what an interrupted attempt left is removed."""
    folder = os.path.join(os.path.abspath(path), "runs", point.name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.makedirs(folder)
    except OSError as error:
        raise InputError(
            f"cannot make {folder} anew: {error.strerror}; end what still writes there, or choose another --study"
        ) from None
    return folder


def _options(plan: Plan, point: Point, folder: str) -> list[str]:
    data = point.data if point.synthetic or "://" in point.data else os.path.abspath(point.data)
    fixed = {"data": data, "out": folder, "global-batch": point.global_batch, "max-steps": plan.steps}
    # No checkpoint but the one at the end, however short an epoch of the data is.
    fixed |= {"eval-every": 0, "checkpoint-every": plan.steps, "log-every": max(1, plan.steps // 5)}
    return [*plan.train, *(word for name, value in fixed.items() for word in (f"--{name}", str(value)))]


def _run_here(path: str, plan: Plan, point: Point, limit: float) -> None:
    """Run a point under horovodrun on this machine."""
    folder = _run_directory(path, point)
    binaries = os.path.dirname(sys.executable)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH")))),
    }
    environment["PATH"] = os.pathsep.join((binaries, environment.get("PATH", "")))
    # A rank has as many cores at every size: two ranks are not to be slower for having half a machine each.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores_given().count // max(plan.ranks))))
    command = ["horovodrun", "-np", str(point.ranks), sys.executable, "-m", "job.train", *_options(plan, point, folder)]
    point.command = f"OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} {shlex.join(command)}"
    point.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    began = time.monotonic()
    log = os.path.join(folder, "log.txt")
    try:
        code = call(command, log, limit, environment)
        point.error = f"exit code {code}" if code else ""
    except OSError as error:
        raise InputError(f"cannot start horovodrun ({error.strerror}); bash slurm/install.sh sets it up") from None
    except subprocess.TimeoutExpired:
        point.error = f"not done in {duration(limit)}"
    point.seconds = round(time.monotonic() - began, 3)
    if point.error:
        point.error += reason(log)


def call(command: Sequence[str], log: str, limit: float, environment: dict[str, str] | None = None) -> int:
    """Run a command, its output in the file `log`, and show that file's last line meanwhile; return its exit code.

    Whatever ends this, nothing that the command started stays. Raises OSError, or TimeoutExpired after `limit` seconds.
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
                return process.wait(min(LOOK_SECONDS, max(0.0, limit - passed)))
            if passed >= limit:
                raise subprocess.TimeoutExpired(command, limit)
            if line.due():
                line.show(f"  {duration(passed)} {_last_line(log)}")
    finally:
        line.clear()
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a launcher and its ranks, which are in process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for each in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def _last_line(log: str) -> str:
    """The last line of a log, printable."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), "starting"))


def reason(log: str) -> str:
    """The first `error:` line of a log, else its last line, behind a colon."""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    told = [m[1] for line in lines if (m := re.search(r"(error: .*)", line))]
    line = (told or lines[-1:] or [""])[0]
    return f": {line[:300]}" if line else ""


def _finish(path: str, point: Point, mixed: bool) -> None:
    """Read what a run left, and write the point's file. Raises InputError where the environment is another one."""
    folder = os.path.join(path, "runs", point.name)
    shutil.rmtree(os.path.join(folder, "checkpoints"), ignore_errors=True)  # half a gigabyte each
    point.status = "failed" if point.error else "done"
    if not point.error:
        try:
            point.timings = _read_json(os.path.join(folder, "timings.json"))
            point.measured()
        except (OSError, ValueError, KeyError, TypeError) as error:
            point.status, point.error = "failed", f"timings.json: {type(error).__name__} {error}"
    difference = ""
    if point.status == "done" and not mixed:
        others = [p for p in load(path).done if p.name != point.name]
        difference = _difference(others[0], point) if others else ""
        if difference:
            point.status, point.error = "failed", f"another environment: {difference}"
    save_point(path, point)
    if difference:
        raise InputError(f"{difference}; use another --study, or --allow-mixed and compare what cannot be compared")


def _run_slurm(path: str, plan: Plan, todo: list[Point], say, wait: bool, mixed: bool, sbatch: Sequence[str]) -> None:
    """Submit the points, one after the other by Slurm's own order, and take in those that have ended."""
    name = f"scaling-{os.path.basename(os.path.abspath(path))}"
    for point in todo:
        if point.status == "submitted":
            continue
        folder = _run_directory(path, point)
        # singleton: one job of this name at a time, so that points do not disturb one another.
        command = ["sbatch", "--parsable", f"--nodes={point.nodes}", f"--job-name={name}", "--dependency=singleton"]
        command += [
            "--no-requeue",
            f"--output={folder}/log.txt",
            *sbatch,
            "slurm/train.sh",
            *_options(plan, point, folder),
        ]
        environment = {**os.environ, "RANKS_PER_NODE": str(plan.ranks_per_node), "MAX_REQUEUES": "0"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        except OSError as error:
            raise InputError(f"cannot start sbatch ({error.strerror}); without Slurm, use --np") from None
        if done.returncode:
            raise InputError(f"sbatch refused {point.name}: {done.stderr.strip()[:300]}")
        point.job = done.stdout.strip().split(";")[0]
        point.status, point.started = "submitted", time.strftime("%Y-%m-%dT%H:%M:%S%z")
        point.command = f"RANKS_PER_NODE={plan.ranks_per_node} {shlex.join(command)}"
        save_point(path, point)
    say(f"{sum(p.status == 'submitted' for p in todo)} jobs in the queue, named {name}")
    left = [p for p in todo if p.status == "submitted"]
    line = Line(sys.stderr)
    while left:
        queued = _queued([p.job for p in left])
        for point in [p for p in left if p.job not in queued]:
            left.remove(point)
            folder = os.path.join(path, "runs", point.name)
            if not os.path.exists(os.path.join(folder, "timings.json")):
                log = os.path.join(folder, "log.txt")
                point.error = f"Slurm job {point.job} left no result" + (reason(log) if os.path.exists(log) else "")
            line.clear()
            _finish(path, point, mixed)
            say(outcome(point))
        if left and not wait:
            say(f"{len(left)} still to come; the same command takes them in, or --wait")
            return
        if left:
            if line.due():
                line.show(f"waiting for {len(left)} jobs in the queue; the next of them: {left[0].job} {left[0].name}")
            time.sleep(POLL_SECONDS)


def _queued(jobs: list[str]) -> set[str]:
    """Those of the jobs that wait or run."""
    done = subprocess.run(["squeue", "--noheader", "--format=%A", "--me"], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"squeue does not answer: {done.stderr.strip()[:200]}; run the same command again later")
    return set(done.stdout.split()) & set(jobs)


def save_point(path: str, point: Point) -> None:
    _write_json(os.path.join(path, "points", f"{point.name}.json"), dataclasses.asdict(point))


def save_limits(path: str, limits: dict[str, Any]) -> None:
    """Add what job.bench measured to study.json."""
    file = os.path.join(path, "study.json")
    _write_json(file, _read_json(file) | {"limits": limits})


def load(path: str) -> Study:
    """Read a study; what is damaged or missing becomes a line of `problems`, and the rest stays usable.

    Raises:
        InputError: no such folder, or nothing of a study in it.
    """
    if not os.path.isdir(path):
        raise InputError(f"no study {path}; python -m job.scaling run makes one")
    problems, plan, limits = [], {}, {}
    try:
        fields = _read_json(os.path.join(path, "study.json"))
        plan, limits = dict(fields.get("plan", {})), dict(fields.get("limits", {}))
    except FileNotFoundError:
        problems.append("study.json is missing: the plan of this study is not known")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problems.append(f"study.json cannot be read: {error}")
    files = sorted(glob.glob(os.path.join(glob.escape(path), "points", "*.json")))
    if problems and not files:
        raise InputError(f"{path} holds no study: no study.json and no points; give the folder of --study")
    points = []
    names = {field.name for field in dataclasses.fields(Point)}
    for file in files:
        try:
            point = Point(**{k: v for k, v in _read_json(file).items() if k in names})
            if point.status == "done":
                point.measured()
                point.environment  # noqa: B018  it must be there
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{os.path.basename(file)} cannot be used: {type(error).__name__} {error}")
            continue
        if point.status == "failed":
            problems.append(f"{point.name} failed: {point.error}")
        points.append(point)
    return Study(path, plan, points, limits, problems)


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write_json(path: str, values: Any) -> None:
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())
