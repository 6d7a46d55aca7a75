"""A performance model of data-parallel training: fitted to measured sizes, it predicts the seconds of a step at others.

In: `Measured` sizes (sections of a step, ranks, batch) and the network's gradients. Out: a `Model`, whose `predict`
gives each section of a step and images/s with 95 % intervals, and `leave_largest_out`, which says how far that is to
be trusted. ASSUMPTIONS lists what it takes for granted.

Allreduce costs: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH" (2005):
latency alpha a message, bandwidth B of a link, m bytes, n ranks: ring 2 (n-1) alpha + 2 (n-1)/n m/B.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

# Sections of a step, as job.run.timing names them (not imported from there: torch would come with it).
WAIT, TO_DEVICE = "waiting for data", "host to device"
COMPUTE, EXPOSED, UPDATE, REST = "forward and backward", "allreduce, not hidden", "update", "rest"
STRAGGLERS = "waiting for stragglers"  # the part of EXPOSED in which a rank waits for others, not for the network
SHARED_NODE, SHARED_DEVICE = "image, a further rank", "allreduce beside it"  # features of a time: see _features
SECTIONS = (WAIT, TO_DEVICE, COMPUTE, EXPOSED, STRAGGLERS, UPDATE, REST)

ASSUMPTIONS = (
    "Forward and backward, copy to the device and update take a time that is linear in the images a rank has. On CPUs "
    "it grows linearly with the ranks of a node (shared memory and power); on GPUs, forward and backward grow with the "
    "bytes that an allreduce carries meanwhile, for NCCL takes a part of the GPU.",
    "The backward pass is two thirds of forward and backward; gradients become ready in proportion to the arithmetic "
    "of the layers behind them, and Horovod sends at once all that are ready, up to its fusion threshold.",
    "An allreduce costs what the cheaper of ring and tree costs by latency and bandwidth of the links (hierarchical, "
    "where HOROVOD_HIERARCHICAL_ALLREDUCE is set or that is asked for); the links do not slow down when more nodes use "
    "them (a full-bisection network).",
    "Ranks differ by chance: the wait for the slowest of n grows with sqrt(2 ln n).",
    "A node's loader and the file system deliver up to a fixed number of images/s; what is below it costs nothing.",
    "No rank fails, and nobody else uses the machine.",
)
BACKWARD_SHARE = 2 / 3
FUSION_BYTES = 128 << 20  # HOROVOD_FUSION_THRESHOLD of Horovod 0.28.1
DATA_BOUND = 0.05  # share of a step spent waiting for data from which on the loader counts as the limit
NOISE = 0.02  # of a step: no timing is believed to be better than this
# Beyond the measured sizes the network is another one (a second switch, a second socket): one standard deviation of the
# factor on its time. In the four published tables of Theano-MPI, 8 GPUs communicate twice as long as 1 to 4 foretell.
EXTRAPOLATION = 1.5
SAMPLES = 200  # of the parameters, for intervals
THINNING = 4  # steps of the chain from one sample to the next

# What is believed before anything is measured: (value, factor of one standard deviation).
PRIORS = {
    "overhead": (1e-3, 3.0),  # s an allreduce: Horovod's cycle of 1 ms
    "local latency": (5e-6, 3.0),  # s
    "local bandwidth": (10e9, 10.0),  # byte/s: shared memory, PCIe; NVLink has ten times that
    "network latency": (20e-6, 3.0),
    "network bandwidth": (1.25e9, 10.0),  # 10 Gbit/s
}
# The same where NCCL carries the messages: 15 GB/s over PCIe to 250 GB/s over NVLink; 25 to 400 Gbit/s between nodes.
PRIORS_NCCL = PRIORS | {"local bandwidth": (60e9, 4.0), "network bandwidth": (12.5e9, 4.0)}
# A link whose nominal speed is given: what TCP, RDMA and the copies leave of it.
LINK_EFFICIENCY, LINK_SPREAD = 0.85, 1.15


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Gradient of one parameter. `ready`: share of the backward pass after which it is there."""

    bytes: int
    ready: float
    name: str = ""
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measured:
    """One size of a study, repeats averaged. Seconds a step; `sections` by SECTIONS, means over the ranks."""

    ranks: int
    nodes: int
    global_batch: int
    sections: dict[str, float]
    step: float  # s
    error: float = 0.0  # standard error of `step`
    synthetic: bool = False

    @property
    def images_per_second(self) -> float:
        return self.global_batch / self.step


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What a prediction is made for. None: as measured."""

    ranks: int
    global_batch: int
    ranks_per_node: int
    network_bandwidth: float | None = None  # byte/s of a node's link, nominal
    network_latency: float | None = None  # s
    local_bandwidth: float | None = None  # byte/s between the ranks of a node, nominal
    loader: float | None = None  # images/s a node
    storage: float | None = None  # images/s of the file system, all nodes together
    algorithm: str = "auto"  # auto (the cheaper of ring and tree), ring, hierarchical or tree
    compression: float = 1.0  # factor on the bytes of gradients: 0.5 for fp16
    parallel: str = "gradients"  # gradients, weights, or hybrid: FC layers split over the ranks
    synthetic: bool = False


def allreduce_seconds(
    nbytes: float, ranks: int, per_node: int, links: dict[str, float], algorithm: str = "auto"
) -> float:
    """Seconds of one allreduce of `nbytes` over `ranks`, `per_node` of them on each node.

    `links` has "local latency", "local bandwidth", "network latency" and "network bandwidth" in s and byte/s; a node's
    network link is shared by its ranks.
    """
    if ranks == 1:
        return 0.0
    g = min(per_node, ranks)
    nodes = math.ceil(ranks / g)
    la, lb = links["local latency"], links["local bandwidth"]
    na, nb = links["network latency"], links["network bandwidth"]
    if nodes == 1:
        na, nb = la, lb
    alpha, bandwidth = (max(la, na), min(lb, nb)) if g > 1 else (na, nb)
    ring = 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * nbytes / bandwidth
    tree = 2 * math.log2(ranks) * alpha + 2 * nbytes / bandwidth
    # Reduce-scatter within nodes, ring allreduce of each part across nodes, allgather within nodes.
    within = 2 * (g - 1) * la + 2 * (g - 1) / g * nbytes / lb
    across = 2 * (nodes - 1) * na + 2 * (nodes - 1) / nodes * nbytes / nb
    hierarchical = within + (across if nodes > 1 else 0.0)
    return {"ring": ring, "tree": tree, "hierarchical": hierarchical, "auto": min(ring, tree)}[algorithm]


def exposed_seconds(gradients: Sequence[Gradient], backward: float, cost) -> float:
    """Seconds by which the allreduces outlast the backward pass.

    Horovod as a queue: whenever the network is free, all gradients that are ready go out as one message of at most
    FUSION_BYTES, which takes `cost(bytes)`.
    """
    now, sent = 0.0, 0
    while sent < len(gradients):
        now = max(now, gradients[sent].ready * backward)
        size = 0.0
        while sent < len(gradients) and gradients[sent].ready * backward <= now:
            if size and size + gradients[sent].bytes > FUSION_BYTES:
                break
            size += gradients[sent].bytes
            sent += 1
        now += cost(size)
    return max(0.0, now - backward)


def communication_seconds(
    gradients: Sequence[Gradient], compute: float, parameters: dict[str, float], scenario: Scenario
) -> float:
    """Seconds of a step in which a rank waits for the network, `compute` being those of forward and backward."""
    if scenario.ranks == 1:
        return 0.0

    def cost(nbytes: float) -> float:
        wire = nbytes * scenario.compression
        seconds = allreduce_seconds(wire, scenario.ranks, scenario.ranks_per_node, parameters, scenario.algorithm)
        return parameters["overhead"] + seconds

    if scenario.parallel == "weights":  # weights and velocities, after the update
        return cost(2 * sum(g.bytes for g in gradients))
    if scenario.parallel == "hybrid":
        return _hybrid_seconds(gradients, parameters, scenario, cost)
    return exposed_seconds(gradients, BACKWARD_SHARE * compute, cost)


def _hybrid_seconds(gradients, parameters: dict[str, float], scenario: Scenario, cost) -> float:
    """FC layers split over all ranks (job.ranks.hybrid): activations of the global batch travel, and gradients of the
    convolutions; the next layer waits for each.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), scheme (a).
    """
    split = [x for x in gradients if len(x.shape) == 2]  # weights of FC layers, (out, in), the last layer first
    # All ranks gather what a layer reads, and sum and scatter its gradient: together, these cost an allreduce.
    sizes = [4.0 * scenario.global_batch * x.shape[1] for x in split]
    sizes.append(4.0 * scenario.global_batch * split[0].shape[0] / 2 if split else 0.0)  # scores are gathered alone
    per_node, algorithm = scenario.ranks_per_node, scenario.algorithm
    activations = sum(allreduce_seconds(size, scenario.ranks, per_node, parameters, algorithm) for size in sizes)
    activations += (2 * len(split) + 1) * parameters["overhead"]
    return activations + cost(sum(x.bytes for x in gradients if len(x.shape) != 2))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A time that is linear in features of a size, with the covariance of its coefficients."""

    features: tuple[str, ...]
    coefficients: np.ndarray
    covariance: np.ndarray

    def __call__(self, images: float, per_node: int, ranks: int, draw: np.ndarray | None = None) -> float:
        values = _features(images, per_node, ranks)
        coefficients = self.coefficients
        if draw is not None:
            coefficients = np.maximum(0.0, coefficients + draw[: len(coefficients)] @ _root(self.covariance))
        return float(sum(c * values[name] for name, c in zip(self.features, coefficients, strict=True)))


def _features(images: float, per_node: int, ranks: int) -> dict[str, float]:
    """What times may depend on: images a rank and step, ranks that share its node, messages that pass meanwhile."""
    beside = 2 * (ranks - 1) / ranks  # bytes on the wire over bytes of gradients
    return {"image": images, "step": 1.0, SHARED_NODE: images * (per_node - 1), SHARED_DEVICE: beside}


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))).T


def fit_linear(sizes: Sequence[tuple[float, int, int]], seconds: Sequence[float], wanted: Sequence[str]) -> Linear:
    """Non-negative least squares of relative errors over `sizes` (images a rank, ranks per node, ranks).

    Of the `wanted` features, in this order, those are used that the sizes can tell apart.
    """
    y = np.maximum(np.array(seconds, float), 1e-12)
    all_rows = [_features(*size) for size in sizes]
    used: list[str] = []
    for name in wanted:
        matrix = np.array([[row[k] for k in [*used, name]] for row in all_rows]) / y[:, None]
        scaled = matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
        if np.linalg.matrix_rank(scaled, tol=0.02) == len(used) + 1:
            used.append(name)
    best = None
    for count in range(1, len(used) + 1):
        for chosen in itertools.combinations(used, count):
            matrix = np.array([[row[k] for k in chosen] for row in all_rows]) / y[:, None]
            found = np.linalg.lstsq(matrix, np.ones(len(y)), rcond=None)[0]
            if (found < 0).any():
                continue
            error = float(np.sum((matrix @ found - 1) ** 2))
            if best is None or error < best[0] - 1e-12:
                best = (error, chosen, found, matrix)
    if best is None:
        return Linear(("step",), np.zeros(1), np.zeros((1, 1)))
    error, chosen, found, matrix = best
    freedom = max(1, len(y) - len(chosen))
    variance = max(NOISE**2, error / freedom)
    return Linear(chosen, found, variance * np.linalg.pinv(matrix.T @ matrix))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step and what follows from it. `low` and `high`: 95 % interval of images/s."""

    scenario: Scenario
    sections: dict[str, float]
    step: float
    low: float
    high: float

    @property
    def images_per_second(self) -> float:
        return self.scenario.global_batch / self.step


@dataclasses.dataclass(frozen=True)
class Model:
    """Fitted to a study; see `fit`."""

    gradients: tuple[Gradient, ...]
    times: dict[str, Linear]
    parameters: dict[str, float]  # by PRIORS
    samples: np.ndarray  # of their logarithms, (SAMPLES, len(PRIORS))
    measured_links: frozenset[str]  # of "local", "network": those that the fitted sizes used
    straggling: float  # wait for stragglers = straggling x busy seconds x sqrt(2 ln ranks)
    data_jitter: float  # share of a step spent waiting for data where the loader is fast enough
    loader: float  # images/s a node; inf: never seen to be the limit
    storage: float  # images/s in all
    largest: int  # ranks of the largest size it was fitted to

    def sections(self, scenario: Scenario, draw: np.random.Generator | None = None) -> dict[str, float]:
        """Seconds of each section of a step. `draw`: take the parameters at random from what the fit leaves open."""
        images = scenario.global_batch / scenario.ranks
        per_node = min(scenario.ranks_per_node, scenario.ranks)
        result = dict.fromkeys(SECTIONS, 0.0)
        for name, line in self.times.items():
            result[name] = line(images, per_node, scenario.ranks, None if draw is None else draw.standard_normal(3))
        parameters = self._parameters(scenario, draw)
        result[EXPOSED] = communication_seconds(self.gradients, result[COMPUTE], parameters, scenario)
        if draw is not None and scenario.ranks > self.largest:
            result[EXPOSED] *= EXTRAPOLATION ** draw.standard_normal()
        straggling = self.straggling * (1.0 if draw is None else math.exp(0.5 * draw.standard_normal()))
        busy = result[TO_DEVICE] + result[COMPUTE] + result[UPDATE]
        result[STRAGGLERS] = straggling * busy * math.sqrt(2 * math.log(scenario.ranks))
        work = sum(result.values())
        if not scenario.synthetic:
            noise = 1.0 if draw is None else math.exp(NOISE * draw.standard_normal())
            loader = (scenario.loader or self.loader) * noise
            storage = (scenario.storage or self.storage) * noise
            reading = max(images * per_node / loader, scenario.global_batch / storage)
            result[WAIT] = max(self.data_jitter * work, reading - work)
        return result

    def _parameters(self, scenario: Scenario, draw: np.random.Generator | None) -> dict[str, float]:
        found = dict(self.parameters)
        if draw is not None:
            found = dict(zip(found, np.exp(draw.choice(self.samples)).tolist(), strict=True))
        efficiency = LINK_EFFICIENCY * (1.0 if draw is None else LINK_SPREAD ** draw.standard_normal())
        if scenario.network_bandwidth:
            found["network bandwidth"] = scenario.network_bandwidth * efficiency
        if scenario.network_latency:
            found["network latency"] = scenario.network_latency
        if scenario.local_bandwidth:
            found["local bandwidth"] = scenario.local_bandwidth * efficiency
        return found

    def predict(self, scenario: Scenario, seed: int = 0) -> Prediction:
        """Step time and throughput of a scenario, with a 95 % interval from SAMPLES draws of the parameters."""
        sections = self.sections(scenario)
        random = np.random.default_rng(seed)
        steps = [sum(self.sections(scenario, random).values()) for _ in range(SAMPLES)]
        high, low = scenario.global_batch / np.quantile(steps, [0.025, 0.975])
        step = sum(sections.values())
        middle = scenario.global_batch / step
        return Prediction(scenario, sections, step, float(min(low, middle)), float(max(high, middle)))

    def gains(self, scenario: Scenario) -> dict[str, float]:
        """Factor on images/s if a section of the step took no time at all, the largest first."""
        sections = self.sections(scenario)
        step = sum(sections.values())
        found = {name: step / max(step - value, 1e-12) for name, value in sections.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def priors_of(over: str) -> dict[str, tuple[float, float]]:
    """What is believed of the links before anything is measured; `over`: MPI, Gloo or NCCL."""
    return PRIORS_NCCL if over == "NCCL" else PRIORS


def assumed_network(over: str) -> str:
    """The network between nodes that is assumed where none was measured or named, in words."""
    value, factor = priors_of(over)["network bandwidth"]
    return f"{8 * value / 1e9:,.3g} Gbit/s within a factor of {factor:.3g} (--network names another)"


def fit(
    measured: Sequence[Measured],
    gradients: Sequence[Gradient],
    parallel: str = "gradients",
    algorithm: str = "auto",
    loader: float | None = None,
    links: dict[str, float] | None = None,
    over: str = "",
) -> Model:
    """Fit the model to `measured` sizes; one is enough, and leaves the network to PRIORS.

    Args:
        loader: images/s of a node's loader where that was measured by itself (`job.bench loader`).
        links: known values of PRIORS' parameters, say a measured bandwidth; they are not fitted.
        over: what carries the messages (MPI, Gloo, NCCL): it decides what is believed of links, and what slows compute.

    Raises:
        ValueError: nothing to fit.
    """
    if not measured:
        raise ValueError("no measured sizes")
    per_node = [math.ceil(m.ranks / m.nodes) for m in measured]
    images = [m.global_batch / m.ranks for m in measured]
    sizes = [(i, g, m.ranks) for i, g, m in zip(images, per_node, measured, strict=True)]

    def times(section: str, *wanted: str) -> Linear:
        return fit_linear(sizes, [m.sections[section] for m in measured], wanted)

    # GPUs are a rank's own, but an allreduce takes a part of them while it runs; cores and their memory are shared.
    shared = SHARED_DEVICE if over == "NCCL" else SHARED_NODE
    lines = {
        TO_DEVICE: times(TO_DEVICE, "image", SHARED_NODE),
        COMPUTE: times(COMPUTE, "image", "step", shared),
        UPDATE: times(UPDATE, "step"),
        REST: times(REST, "step"),
    }
    priors = priors_of(over)
    parameters, samples = _fit_links(measured, per_node, tuple(gradients), (parallel, algorithm), links or {}, priors)
    waits = []
    for m in measured:
        busy = m.sections[TO_DEVICE] + m.sections[COMPUTE] + m.sections[UPDATE]
        if m.ranks > 1 and busy > 0:
            waits.append(m.sections[STRAGGLERS] / busy / math.sqrt(2 * math.log(m.ranks)))
    real = [m for m in measured if not m.synthetic]
    limit, storage, jitter = _reading_limits(real, loader)
    used = {"local" for m, g in zip(measured, per_node, strict=True) if g > 1}
    used |= {"network" for m in measured if m.nodes > 1}
    return Model(
        tuple(gradients),
        lines,
        parameters,
        samples,
        frozenset(used),
        float(np.mean(waits)) if waits else 0.0,
        jitter,
        limit,
        storage,
        max(m.ranks for m in measured),
    )


def _reading_limits(real: Sequence[Measured], loader: float | None) -> tuple[float, float, float]:
    """Images/s of a node's loader, images/s of the file system, and the share of a step lost to jitter."""
    bound = [m for m in real if m.sections[WAIT] > DATA_BOUND * m.step]
    free = [m.sections[WAIT] / (m.step - m.sections[WAIT]) for m in real if m not in bound]
    jitter = float(np.mean(free)) if free else 0.0
    if not bound:
        return loader or math.inf, math.inf, jitter
    per_node = {m.nodes: m.images_per_second / m.nodes for m in bound}
    limit = max(per_node.values())
    # The same loaders bring less each on more nodes: then it is what they share.
    most = max(per_node)
    storage = per_node[most] * most if per_node[most] < 0.8 * limit else math.inf
    return limit, storage, jitter


def _fit_links(
    measured, per_node, gradients, how: tuple[str, str], known: dict[str, float], priors: dict[str, tuple]
) -> tuple[dict[str, float], np.ndarray]:
    """Overhead, latencies and bandwidths that explain the measured EXPOSED sections, as far as `priors` allow.

    Maximum a posteriori in the logarithms by Gauss-Newton with damping; returns them, and samples of the logarithms
    from what measurements and priors leave open.
    """
    names = list(priors)
    centre = np.log([known.get(name, priors[name][0]) for name in names])
    spread = np.array([0.01 if name in known else math.log(priors[name][1]) for name in names])
    sizes = [(m, g) for m, g in zip(measured, per_node, strict=True) if m.ranks > 1]
    scale = [max(m.error, NOISE * m.step) for m, _ in sizes]

    def residuals(x: np.ndarray) -> np.ndarray:
        found = dict(zip(names, np.exp(x), strict=True))
        errors = [
            (
                communication_seconds(gradients, m.sections[COMPUTE], found, _as_measured(m, g, *how))
                - m.sections[EXPOSED]
            )
            / s
            for (m, g), s in zip(sizes, scale, strict=True)
        ]
        return np.array([*errors, *((x - centre) / spread)])

    def jacobian(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        steps = np.eye(len(x)) * 1e-4
        return np.array([(residuals(x + step) - at) / 1e-4 for step in steps]).T

    best, best_cost = centre, math.inf
    # A network so fast that all is hidden has no slope to follow: begin with slower ones as well.
    for factor in (1.0, 0.1, 0.01) if sizes else (1.0,):
        x = centre.copy()
        for i, name in enumerate(names):
            if name.endswith("bandwidth") and name not in known:
                x[i] += math.log(factor)
        at = residuals(x)
        damping = 1e-2
        for _ in range(60):
            slope = jacobian(x, at)
            normal = slope.T @ slope
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ at)
            trial = residuals(x + step)
            if trial @ trial < at @ at:
                gain = at @ at - trial @ trial
                x, at, damping = x + step, trial, damping / 3
                if gain < 1e-9:
                    break
            else:
                damping *= 4
                if damping > 1e9:
                    break
        if at @ at < best_cost:
            best, best_cost = x, at @ at
    # Where the model does not fit the points within their errors, the interval grows by as much.
    heat = max(1.0, best_cost / len(sizes)) if sizes else 1.0
    slope = jacobian(best, residuals(best))
    samples = _metropolis(residuals, best, np.linalg.inv(slope.T @ slope) * heat, heat)
    return dict(zip(names, np.exp(best).tolist(), strict=True)), samples


def _metropolis(residuals, start: np.ndarray, covariance: np.ndarray, heat: float) -> np.ndarray:
    """SAMPLES points of the posterior. A covariance alone would not do: a link that is fast enough to be hidden is
    known to be fast, and not how fast."""
    random = np.random.default_rng(0)
    root = _root(covariance) * 0.8
    x, cost = start, residuals(start) @ residuals(start)
    kept = []
    for step in range(SAMPLES * THINNING):
        trial = x + random.standard_normal(len(x)) @ root
        trial_cost = residuals(trial) @ residuals(trial)
        if random.random() < math.exp(min(0.0, (cost - trial_cost) / 2 / heat)):
            x, cost = trial, trial_cost
        if step % THINNING == THINNING - 1:
            kept.append(x)
    return np.array(kept)


def _as_measured(m: Measured, per_node: int, parallel: str, algorithm: str) -> Scenario:
    return Scenario(m.ranks, m.global_batch, per_node, parallel=parallel, algorithm=algorithm, synthetic=m.synthetic)


def scenario_of(m: Measured, parallel: str = "gradients", algorithm: str = "auto") -> Scenario:
    """The scenario in which a size was measured."""
    return _as_measured(m, math.ceil(m.ranks / m.nodes), parallel, algorithm)


@dataclasses.dataclass(frozen=True)
class Check:
    """A measured size that the model was not fitted to, and what it predicts for it."""

    measured: Measured
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative error of the predicted images/s."""
        return self.predicted.images_per_second / self.measured.images_per_second - 1


def leave_largest_out(measured: Sequence[Measured], gradients: Sequence[Gradient], **options) -> list[Check]:
    """Fit without the largest number of ranks and predict it; empty where fewer than two sizes are left to compare."""
    largest = max((m.ranks for m in measured), default=0)
    rest = [m for m in measured if m.ranks < largest]
    if not rest:
        return []
    model = fit(rest, gradients, **options)
    how = options.get("parallel", "gradients"), options.get("algorithm", "auto")
    return [Check(m, model.predict(scenario_of(m, *how))) for m in measured if m.ranks == largest]
