"""A scaling study on disk: its plan, its points, and what each of them measured.

In: a `Plan`, or the folder of a study. Out: study.json and one JSON file per point in points/; `load` reads them back,
and lists what is missing or damaged instead of failing.
"""

import dataclasses
import glob
import json
import math
import os
import random
from typing import Any

from job.run.log import COMPUTE, EXPOSED, REST, TO_DEVICE, UPDATE, WAIT, lock
from shards.errors import InputError, short
from shards.machine.files import write_whole

# Sections of a step, with the allreduce in two parts.
STRAGGLERS = "waiting for stragglers"  # the part of EXPOSED in which a rank waits for other ranks, not for the network
SECTIONS = (WAIT, TO_DEVICE, COMPUTE, EXPOSED, STRAGGLERS, UPDATE, REST)

SYNTHETIC = "synthetic"
MODES = ("strong", "weak")
# What must be the same at all points of a study. (Ranks per node and cores may follow the size.)
ALIKE = ("device", "versions", "horovod_over", "network", "tuning", "file_system", "commit")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study measures. `sizes` are ranks, or under Slurm nodes of `ranks_per_node` ranks each."""

    sizes: tuple[int, ...]
    modes: tuple[str, ...]
    data: tuple[str, ...]  # folders of shards, or "synthetic"
    global_batch: int  # images per step. strong: at every size; weak: with `weak_from` ranks, growing with the ranks
    repeats: int
    steps: int
    seed: int
    train: tuple[str, ...] = ()  # further options of job.train
    ranks_per_node: int = 1
    slurm: bool = False
    weak_from: int = 0  # ranks; 0: those of the smallest size

    def __post_init__(self) -> None:
        if not self.weak_from:
            object.__setattr__(self, "weak_from", min(self.ranks))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of each size."""
        return tuple(size * (self.ranks_per_node if self.slurm else 1) for size in self.sizes)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Gradient of one parameter. `ready`: share of the backward pass after which it is computed."""

    bytes: int
    ready: float
    name: str = ""
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step as it was measured: seconds of each of SECTIONS, averaged over the ranks."""

    ranks: int
    nodes: int
    global_batch: int
    sections: dict[str, float]
    step: float  # seconds
    error: float = 0.0  # standard error of `step`, seconds
    synthetic: bool = False

    @property
    def images_per_second(self) -> float:
        """Of all ranks together."""
        return self.global_batch / self.step

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a full node."""
        return math.ceil(self.ranks / self.nodes)


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
    job: str = ""  # Slurm's job id
    timings: dict[str, Any] = dataclasses.field(default_factory=dict)  # timings.json of the run

    @property
    def synthetic(self) -> bool:
        """Whether the run read no data."""
        return self.data == SYNTHETIC

    @property
    def environment(self) -> dict[str, Any]:
        """What must be the same at all points. Raises KeyError where the run recorded no environment."""
        found = self.timings["environment"]
        return {key: found.get(key) for key in ALIKE} | {"parallel": self.timings.get("parallel")}

    def measured(self) -> Measured:
        """The step, averaged over the ranks. Raises ValueError, KeyError or TypeError where timings are invalid."""
        ranks = self.timings["ranks"]
        if not ranks:
            raise ValueError("no ranks")
        found = {name: sum(r["mean"][name] for r in ranks) / len(ranks) for name in SECTIONS if name != STRAGGLERS}
        # The last rank to reach an allreduce waits for the network alone; the others also wait for that rank.
        network = min(self.timings["fastest"][EXPOSED], found[EXPOSED]) if self.ranks > 1 else found[EXPOSED]
        found |= {EXPOSED: network, STRAGGLERS: found[EXPOSED] - network}
        sections = {name: found[name] for name in SECTIONS}
        step = sum(sections.values())
        if not all(math.isfinite(v) and v >= 0 for v in sections.values()) or step <= 0:
            raise ValueError("a time that is not a number, or negative")
        error = self.timings["step_seconds"]["std"] / math.sqrt(max(1, self.timings["steps"]))
        return Measured(
            self.ranks, self.nodes, self.global_batch, sections, step=step, error=error, synthetic=self.synthetic
        )

    def outcome(self) -> str:
        """One line: the speed, or what went wrong."""
        if self.status != "done":
            return f"{self.name}: {self.status}{': ' if self.error else ''}{self.error}"
        step = self.measured()
        return f"{self.name}: {step.images_per_second:,.1f} images/s, {1000 * step.step:,.1f} ms per step"


@dataclasses.dataclass
class Study:
    """A study that was read: `points` sorted by name; `problems` has one line for everything that is missing."""

    path: str
    plan: dict[str, Any]  # fields of Plan; empty where study.json is missing
    points: list[Point]
    limits: dict[str, Any]  # what job.bench measured: {"compute": its JSON object, "loader": ..., "allreduce": ...}
    problems: list[str]

    @property
    def done(self) -> list[Point]:
        """The points that have been measured."""
        return [p for p in self.points if p.status == "done"]

    @property
    def gradients(self) -> list[Gradient]:
        """Gradients of the network in the order in which they become ready; empty where no run recorded them."""
        found = max((p.timings.get("gradients") or [] for p in self.done), key=len, default=[])
        return [Gradient(g["bytes"], g["ready"], g["name"], tuple(g["shape"])) for g in found]

    def mixed(self) -> str:
        """How the environments of the points differ, in words; empty where they agree."""
        return next((text for point in self.done if (text := difference(self.done[0], point))), "")


def difference(first: Point, second: Point) -> str:
    """In what the environments of two points differ, in words; empty where they agree."""
    for key, value in first.environment.items():
        other = second.environment[key]
        if other != value:
            here, there = (short(json.dumps(v), 160) for v in (other, value))
            return f"{key} is {here} at {second.name}, {there} at {first.name}"
    return ""


def points_of(plan: Plan) -> list[Point]:
    """All runs of a plan: one repeat after the other, each in a random order of its own.

    Strong and weak scaling share their smallest size, which is run once. Raises InputError for a batch that cannot be
    divided among the ranks.
    """
    points = []
    for repeat in range(1, plan.repeats + 1):
        found: dict[str, Point] = {}
        for size, ranks in zip(plan.sizes, plan.ranks, strict=True):
            for mode in plan.modes:
                batch = _batch_of(plan, mode, ranks)
                for data in plan.data:
                    name = f"{_kind_of(plan, data)}-ranks{ranks:05d}-batch{batch:06d}-repeat{repeat:02d}"
                    nodes = size if plan.slurm else 1
                    found[name] = Point(name, ranks, nodes, global_batch=batch, data=data, repeat=repeat)
        order = list(found.values())
        random.Random(f"{plan.seed} {repeat}").shuffle(order)
        points += order
    return points


def _batch_of(plan: Plan, mode: str, ranks: int) -> int:
    batch = plan.global_batch if mode == "strong" else plan.global_batch // plan.weak_from * ranks
    if batch % ranks:
        divisor = math.lcm(*plan.ranks)
        fitting = max(divisor, plan.global_batch // divisor * divisor)
        raise InputError(
            f"a batch of {batch} images cannot be divided among {ranks} ranks; "
            f"use --global-batch {fitting} or another multiple of {divisor}"
        )
    return batch


def _kind_of(plan: Plan, data: str) -> str:
    """First part of a point's name: synthetic, real, or where there are several folders real0, real1, ..."""
    if data == SYNTHETIC:
        return SYNTHETIC
    return f"real{plan.data.index(data)}" if sum(d != SYNTHETIC for d in plan.data) > 1 else "real"


def continued(path: str, plan: Plan) -> Plan:
    """`plan`, with the batch per rank that weak scaling has in the study at `path`, if there is one.

    Otherwise the points of a smaller size would be on another curve than those before it.
    """
    known = _plan_of(path)
    if not known:
        return plan
    ranks = known["sizes"] if not known["slurm"] else [size * known["ranks_per_node"] for size in known["sizes"]]
    return dataclasses.replace(plan, weak_from=known.get("weak_from") or min(ranks))


def create(path: str, plan: Plan) -> None:
    """Create the folder of a study, or continue the one there, and lock it until this process ends.

    More sizes, modes or repeats enlarge a study; other settings need another one.

    Raises:
        InputError: the folder holds another study, is in use, or cannot be written.
    """
    file = os.path.join(path, "study.json")
    fields, known = json.loads(json.dumps(dataclasses.asdict(plan))), _plan_of(path)
    for name in ("data", "global_batch", "steps", "train", "ranks_per_node", "slurm") if known else ():
        if known.get(name) != fields[name]:
            raise InputError(
                f"{path} is a study with {name} {known.get(name)}, not {fields[name]}; give the same, or another "
                "--study"
            )
    if known:  # the report shows what was measured before, too
        fields["sizes"] = sorted({*known["sizes"], *fields["sizes"]})
        fields["modes"] = [mode for mode in MODES if mode in (*known["modes"], *fields["modes"])]
        fields["repeats"] = max(known["repeats"], fields["repeats"])
    limits = _read_json(file).get("limits", {}) if known else {}
    try:
        for folder in ("points", "runs"):
            os.makedirs(os.path.join(path, folder), exist_ok=True)
        lock(path, "--study")
        _write_json(file, {"plan": fields, "limits": limits})
    except OSError as error:
        raise InputError(f"cannot write the study {path}: {error.strerror}; choose another --study") from None


def _plan_of(path: str) -> dict[str, Any]:
    """The plan in the folder of a study; empty where there is none."""
    file = os.path.join(path, "study.json")
    return _read_json(file).get("plan", {}) if os.path.exists(file) else {}


def save_point(path: str, point: Point) -> None:
    """Write the file of a point."""
    _write_json(os.path.join(path, "points", f"{point.name}.json"), dataclasses.asdict(point))


def save_limits(path: str, limits: dict[str, Any]) -> None:
    """Write what job.bench measured to study.json."""
    file = os.path.join(path, "study.json")
    _write_json(file, _read_json(file) | {"limits": limits})


def load(path: str) -> Study:
    """Read a study: a folder, or one file {"plan", "limits", "points"} as in tests/data.

    What is damaged or missing becomes a line of `problems`; the rest stays usable. Raises InputError where there is
    nothing of a study.
    """
    if not os.path.exists(path):
        raise InputError(f"no study {path}; python -m job.scaling run makes one")
    problems, fields = [], {}
    try:
        fields = dict(_read_json(os.path.join(path, "study.json") if os.path.isdir(path) else path))
    except FileNotFoundError:
        problems.append("study.json is missing: the plan of this study is not known")
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"study.json cannot be read: {error}")
    sources = fields.get("points") or sorted(glob.glob(os.path.join(glob.escape(path), "points", "*.json")))
    if problems and not sources:
        raise InputError(f"{path} holds no study: no study.json and no points; give the folder of --study")
    points = []
    for number, source in enumerate(sources, 1):
        try:
            point = _point_of(source if isinstance(source, dict) else _read_json(source))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            name = os.path.basename(source) if isinstance(source, str) else f"point {number}"
            problems.append(f"{name} cannot be used: {type(error).__name__} {error}")
            continue
        if point.status == "failed":
            problems.append(f"{point.name} failed: {point.error}")
        points.append(point)
    plan, limits = (fields.get(name) if isinstance(fields.get(name), dict) else {} for name in ("plan", "limits"))
    return Study(path, plan, points, limits, problems)


def _point_of(fields: dict[str, Any]) -> Point:
    """A point whose timings, where it is done, are complete."""
    names = {field.name for field in dataclasses.fields(Point)}
    point = Point(**{key: value for key, value in fields.items() if key in names})
    if point.status == "done":
        point.measured()
        point.environment  # noqa: B018  raises where it is missing
    return point


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write_json(path: str, values: Any) -> None:
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())
