"""A performance model of data-parallel training, fitted to measured sizes, that predicts a step at other sizes.

In: `Measured` sizes and the network's gradients. Out: a `Model`, whose `predict` gives seconds of each section of a
step and images/s with a 95 % interval, and `leave_largest_out`, which compares predictions with measurements.
ASSUMPTIONS lists what the model takes for granted.

Sources. Costs of an allreduce: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in
MPICH" (2005). Split FC layers: Krizhevsky, "One weird trick for parallelizing convolutional neural networks"
(arXiv:1404.5997).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import integrate, optimize, special, stats

from job.run.log import COMPUTE, EXPOSED, REST, TO_DEVICE, UPDATE, WAIT
from job.scaling.study import SECTIONS, STRAGGLERS, Gradient, Measured

ASSUMPTIONS = (
    "Forward and backward, copy to the device and update take a time that is linear in the images per rank. On CPUs it "
    "grows linearly with the ranks per node (shared memory and power); on GPUs, forward and backward grow with the "
    "bytes that an allreduce carries meanwhile, because NCCL uses a part of the GPU.",
    "The backward pass is two thirds of forward and backward; gradients become ready in proportion to the arithmetic "
    "of the layers after them, and Horovod sends at once all that are ready, up to its fusion threshold.",
    "An allreduce costs what the cheaper of ring and tree costs by latency and bandwidth of the links (hierarchical, "
    "where HOROVOD_HIERARCHICAL_ALLREDUCE is set or that is asked for); the links do not slow down when more nodes use "
    "them (a full-bisection network).",
    "Ranks differ by chance: the wait for the slowest of n grows as the expected maximum of n normal deviates does.",
    "A node's loader and the file system deliver up to a fixed number of images/s; below that, reading costs nothing.",
    "No rank fails, and nobody else uses the machine.",
)
BACKWARD_SHARE = 2 / 3
FUSION_BYTES = 128 << 20  # HOROVOD_FUSION_THRESHOLD of Horovod 0.28.1
DATA_BOUND = 0.05  # share of a step spent waiting for data above which the loader counts as the limit
NOISE = 0.02  # of a step: no timing is assumed to be more exact than this
# Beyond the measured sizes the network is another one (a second switch, a second socket): one standard deviation of the
# factor on its time. In the four published tables of Theano-MPI, 8 GPUs take twice as long to communicate as 1 to 4
# predict.
EXTRAPOLATION = 1.5
DRAWS = 500  # sets of parameters, for intervals; with 200, the ends of wide intervals were off by a factor of two
CANDIDATES = 2000  # from which those are chosen

# Priors of the links: (value, factor of one standard deviation).
PRIORS = {
    "overhead": (1e-3, 3.0),  # s per allreduce: Horovod's cycle of 1 ms
    "local latency": (5e-6, 3.0),  # s
    "local bandwidth": (10e9, 10.0),  # byte/s: shared memory, PCIe; NVLink has ten times that
    "network latency": (20e-6, 3.0),
    "network bandwidth": (1.25e9, 10.0),  # 10 Gbit/s
}
# The same where NCCL carries the messages: 15 GB/s over PCIe to 250 GB/s over NVLink; 25 to 400 Gbit/s between nodes.
PRIORS_NCCL = PRIORS | {"local bandwidth": (60e9, 4.0), "network bandwidth": (12.5e9, 4.0)}
# Of a link whose nominal speed is given: what TCP, RDMA and the copies leave of it, and the factor of one deviation.
LINK_EFFICIENCY, LINK_SPREAD = 0.85, 1.15

# Features of a time that is linear in them: see _features.
IMAGE, STEP, SHARED_NODE, SHARED_DEVICE = "image", "step", "image, a further rank", "allreduce beside it"


@dataclasses.dataclass(frozen=True)
class Setup:
    """How the measured ranks worked together."""

    parallel: str = "gradients"  # gradients, weights, or hybrid: FC layers split over the ranks
    algorithm: str = "auto"  # auto (the cheaper of ring and tree), ring, hierarchical or tree
    over: str = ""  # what carries the messages: MPI, Gloo or NCCL
    loader: float | None = None  # images/s of a node's loader, where `job.bench loader` measured it


DEFAULT = Setup()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What a prediction is made for. None: as measured."""

    ranks: int
    global_batch: int
    ranks_per_node: int
    network_bandwidth: float | None = None  # byte/s of a node's link, nominal
    network_latency: float | None = None  # s
    local_bandwidth: float | None = None  # byte/s between the ranks of a node, nominal
    loader: float | None = None  # images/s per node
    storage: float | None = None  # images/s of the file system, all nodes together
    algorithm: str = "auto"
    compression: float = 1.0  # factor on the bytes of gradients: 0.5 for fp16
    parallel: str = "gradients"
    synthetic: bool = False


# ---- Communication.


def allreduce_seconds(
    nbytes: float, ranks: int, per_node: int, links: dict[str, float], algorithm: str = "auto"
) -> float:
    """Seconds of one allreduce of `nbytes` over `ranks`, `per_node` of them on each node.

    With latency alpha per message, bandwidth B and n ranks, a ring takes 2 (n-1) alpha + 2 (n-1)/n nbytes/B. `links`
    has the latencies and bandwidths of PRIORS, in s and byte/s; a node's network link is shared by its ranks.
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


def exposed_seconds(gradients: Sequence[Gradient], backward: float, cost: Callable[[float], float]) -> float:
    """Seconds by which the allreduces outlast a backward pass of `backward` seconds.

    Horovod as a queue: whenever the network is free, all gradients that are ready go out as one message of at most
    FUSION_BYTES, which takes `cost(bytes)` seconds.
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
    gradients: Sequence[Gradient], compute: float, links: dict[str, float], scenario: Scenario
) -> float:
    """Seconds of a step in which a rank waits for the network; forward and backward take `compute` seconds."""
    if scenario.ranks == 1:
        return 0.0

    def wire(nbytes: float) -> float:
        return allreduce_seconds(nbytes, scenario.ranks, scenario.ranks_per_node, links, scenario.algorithm)

    def cost(nbytes: float) -> float:
        return links["overhead"] + wire(nbytes * scenario.compression)

    if scenario.parallel == "weights":  # weights and velocities, after the update
        return cost(2 * sum(g.bytes for g in gradients))
    if scenario.parallel == "hybrid":
        # FC layers are split over all ranks (job.ranks.hybrid): activations of the global batch travel, and the next
        # layer waits for each. Ranks gather what a layer reads, and sum and scatter its gradient: together, these cost
        # an allreduce. The last layer's scores are only gathered.
        split = [g for g in gradients if len(g.shape) == 2]  # weights (out, in) of FC layers, the last layer first
        sizes = [4.0 * scenario.global_batch * g.shape[1] for g in split]
        sizes += [4.0 * scenario.global_batch * g.shape[0] / 2 for g in split[:1]]
        activations = sum(map(wire, sizes)) + (2 * len(split) + 1) * links["overhead"]
        return activations + cost(sum(g.bytes for g in gradients if len(g.shape) != 2))
    return exposed_seconds(gradients, BACKWARD_SHARE * compute, cost)


# ---- Waiting for the slowest.


@functools.cache
def expected_maximum(n: int) -> float:
    """Expected largest of `n` standard normal deviates: 0 for 1, 0.564 for 2, 3.25 for 1,024.

    The integral of 1 - F(x)^n - F(-x)^n over x from 0 on, where F is the normal distribution.
    """
    x = np.linspace(0, 12, 4801)
    return float(integrate.trapezoid(-np.expm1(n * stats.norm.logcdf(x)) - np.exp(n * stats.norm.logcdf(-x)), x))


# ---- Times that are linear in features of a size.


def _features(images: float, per_node: int, ranks: int) -> dict[str, float]:
    """What a time may depend on: images per rank, ranks on the same node, and bytes that travel meanwhile."""
    beside = 2 * (ranks - 1) / ranks  # bytes on the wire / bytes of gradients
    return {IMAGE: images, STEP: 1.0, SHARED_NODE: images * (per_node - 1), SHARED_DEVICE: beside}


@dataclasses.dataclass(frozen=True)
class Linear:
    """A time that is linear in `features`: seconds per unit of each, with their covariance."""

    features: tuple[str, ...]
    coefficients: np.ndarray  # (features,)
    covariance: np.ndarray  # (features, features)

    def best(self) -> dict[str, float]:
        """The coefficients by feature."""
        return dict(zip(self.features, self.coefficients.tolist(), strict=True))

    def draw(self, random: np.random.Generator, count: int) -> list[dict[str, float]]:
        """`count` sets of coefficients from what the fit leaves open, none of them negative."""
        drawn = np.maximum(0.0, random.multivariate_normal(self.coefficients, self.covariance, count))
        return [dict(zip(self.features, values, strict=True)) for values in drawn.tolist()]


def fit_linear(sizes: Sequence[tuple[float, int, int]], seconds: Sequence[float], wanted: Sequence[str]) -> Linear:
    """Non-negative least squares of relative errors over `sizes` (images per rank, ranks per node, ranks).

    Of the `wanted` features, in this order, those are used that the sizes can tell apart.
    """
    y = np.maximum(np.array(seconds, float), 1e-12)
    rows = [_features(*size) for size in sizes]
    used: list[str] = []
    for name in wanted:
        matrix = np.array([[row[k] for k in [*used, name]] for row in rows]) / y[:, None]
        if np.linalg.matrix_rank(matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300), tol=0.02) > len(used):
            used.append(name)
    matrix = np.array([[row[k] for k in used] for row in rows]) / y[:, None]  # (sizes, features)
    found, residual = optimize.nnls(matrix, np.ones(len(y)))
    kept = np.flatnonzero(found)
    matrix = matrix[:, kept]
    variance = max(NOISE**2, residual**2 / max(1, len(y) - len(kept)))
    return Linear(tuple(used[i] for i in kept), found[kept], variance * np.linalg.pinv(matrix.T @ matrix))


# ---- The model.


@dataclasses.dataclass(frozen=True)
class Parameters:
    """One set of values for all that was fitted: the best one, or one drawn from what the measurements leave open."""

    times: dict[str, dict[str, float]]  # section -> feature -> seconds
    links: dict[str, float]  # by PRIORS
    straggling: float  # wait for stragglers = straggling x busy seconds x expected_maximum(ranks)
    link_efficiency: float = LINK_EFFICIENCY
    beyond: float = 1.0  # factor on the network's time at more ranks than were measured
    reading: float = 1.0  # factor on the speed of loader and file system


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step, and what follows from it. `low` and `high`: 95 % interval of images/s."""

    sections: dict[str, float]  # seconds
    images_per_second: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Model:
    """Fitted to a study; see `fit`."""

    gradients: tuple[Gradient, ...]
    best: Parameters
    draws: tuple[Parameters, ...]
    measured_links: frozenset[str]  # of "local", "network": those that the fitted sizes used
    data_jitter: float  # share of a step spent waiting for data where the loader is fast enough
    loader: float  # images/s per node; inf: it was never the limit
    storage: float  # images/s of the file system; inf: it was never the limit
    largest: int  # ranks of the largest size it was fitted to

    def sections(self, scenario: Scenario, parameters: Parameters) -> dict[str, float]:
        """Seconds of each section of a step."""
        images = scenario.global_batch / scenario.ranks
        per_node = min(scenario.ranks_per_node, scenario.ranks)
        features = _features(images, per_node, scenario.ranks)
        result = dict.fromkeys(SECTIONS, 0.0)
        for section, coefficients in parameters.times.items():
            result[section] = sum(value * features[name] for name, value in coefficients.items())
        links = _links_of(scenario, parameters)
        result[EXPOSED] = communication_seconds(self.gradients, result[COMPUTE], links, scenario)
        if scenario.ranks > self.largest:
            result[EXPOSED] *= parameters.beyond
        busy = result[TO_DEVICE] + result[COMPUTE] + result[UPDATE]
        result[STRAGGLERS] = parameters.straggling * busy * expected_maximum(scenario.ranks)
        work = sum(result.values())
        if not scenario.synthetic:
            loader = (scenario.loader or self.loader) * parameters.reading
            storage = (scenario.storage or self.storage) * parameters.reading
            reading = max(images * per_node / loader, scenario.global_batch / storage)
            result[WAIT] = max(self.data_jitter * work, reading - work)
        return result

    def predict(self, scenario: Scenario) -> Prediction:
        """The step and throughput of a scenario; the interval is that of `draws`."""
        best = self.sections(scenario, self.best)
        rate = scenario.global_batch / sum(best.values())
        steps = [sum(self.sections(scenario, drawn).values()) for drawn in self.draws]
        high, low = scenario.global_batch / np.quantile(steps, [0.025, 0.975])
        return Prediction(best, rate, low=float(min(low, rate)), high=float(max(high, rate)))


def _links_of(scenario: Scenario, parameters: Parameters) -> dict[str, float]:
    """The fitted links, replaced by those that the scenario names."""
    links = dict(parameters.links)
    if scenario.network_bandwidth:
        links["network bandwidth"] = scenario.network_bandwidth * parameters.link_efficiency
    if scenario.network_latency:
        links["network latency"] = scenario.network_latency
    if scenario.local_bandwidth:
        links["local bandwidth"] = scenario.local_bandwidth * parameters.link_efficiency
    return links


def priors_of(over: str) -> dict[str, tuple[float, float]]:
    """Priors of the links; `over`: MPI, Gloo or NCCL."""
    return PRIORS_NCCL if over == "NCCL" else PRIORS


def assumed_network(over: str) -> str:
    """The network between nodes that is assumed where none was measured or given, in words."""
    value, factor = priors_of(over)["network bandwidth"]
    return f"{8 * value / 1e9:,.3g} Gbit/s within a factor of {factor:.3g} (--network names another)"


def scenario_of(m: Measured, setup: Setup = DEFAULT) -> Scenario:
    """The scenario in which a size was measured."""
    return Scenario(
        m.ranks,
        m.global_batch,
        m.ranks_per_node,
        parallel=setup.parallel,
        algorithm=setup.algorithm,
        synthetic=m.synthetic,
    )


def fit(
    measured: Sequence[Measured],
    gradients: Sequence[Gradient],
    setup: Setup = DEFAULT,
    links: dict[str, float] | None = None,
) -> Model:
    """Fit the model to `measured` sizes. One is enough; it leaves the network to the priors.

    `links`: known values of PRIORS' parameters, say a measured bandwidth; they are not fitted. Raises ValueError where
    there are no sizes.
    """
    if not measured:
        raise ValueError("no measured sizes")
    sizes = [(m.global_batch / m.ranks, m.ranks_per_node, m.ranks) for m in measured]

    def time_of(section: str, *wanted: str) -> Linear:
        return fit_linear(sizes, [m.sections[section] for m in measured], wanted)

    # A rank has its GPU to itself, but an allreduce uses a part of it; cores and memory are shared by a node's ranks.
    shared = SHARED_DEVICE if setup.over == "NCCL" else SHARED_NODE
    times = {
        TO_DEVICE: time_of(TO_DEVICE, IMAGE, SHARED_NODE),
        COMPUTE: time_of(COMPUTE, IMAGE, STEP, shared),
        UPDATE: time_of(UPDATE, STEP),
        REST: time_of(REST, STEP),
    }
    waits = []
    for m in measured:
        busy = m.sections[TO_DEVICE] + m.sections[COMPUTE] + m.sections[UPDATE]
        if m.ranks > 1 and busy > 0:
            waits.append(m.sections[STRAGGLERS] / busy / expected_maximum(m.ranks))
    straggling = float(np.mean(waits)) if waits else 0.0
    best_links, drawn_links = _fit_links(measured, tuple(gradients), setup, links or {})
    limit, storage, jitter = _reading_limits([m for m in measured if not m.synthetic], setup.loader)
    used = {"local" for m in measured if m.ranks_per_node > 1} | {"network" for m in measured if m.nodes > 1}
    return Model(
        gradients=tuple(gradients),
        best=Parameters({section: line.best() for section, line in times.items()}, best_links, straggling),
        draws=_draw(times, drawn_links, straggling),
        measured_links=frozenset(used),
        data_jitter=jitter,
        loader=limit,
        storage=storage,
        largest=max(m.ranks for m in measured),
    )


def _draw(times: dict[str, Linear], links: list[dict[str, float]], straggling: float) -> tuple[Parameters, ...]:
    """One set of parameters for each of the drawn `links`, the others drawn from what the fit leaves open."""
    random = np.random.default_rng(0)
    drawn = {section: line.draw(random, len(links)) for section, line in times.items()}
    normal = random.standard_normal((len(links), 4))
    return tuple(
        Parameters(
            times={section: values[i] for section, values in drawn.items()},
            links=links[i],
            straggling=straggling * math.exp(0.5 * normal[i, 0]),
            link_efficiency=LINK_EFFICIENCY * LINK_SPREAD ** normal[i, 1],
            beyond=EXTRAPOLATION ** normal[i, 2],
            reading=math.exp(NOISE * normal[i, 3]),
        )
        for i in range(len(links))
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
    # Where the same loaders deliver less each on more nodes, the file system that they share is the limit.
    most = max(per_node)
    storage = per_node[most] * most if per_node[most] < 0.8 * limit else math.inf
    return limit, storage, jitter


def _fit_links(
    measured: Sequence[Measured], gradients: tuple[Gradient, ...], setup: Setup, known: dict[str, float]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Overhead, latencies and bandwidths that explain the measured EXPOSED sections: the best, and DRAWS others.

    Maximum a posteriori in the logarithms. The draws are of the posterior itself, by importance resampling: its
    covariance alone would not do, because a link that is fast enough to be hidden is known to be fast, not how fast.
    """
    priors = priors_of(setup.over)
    names = list(priors)
    centre = np.log([known.get(name, priors[name][0]) for name in names])
    spread = np.array([0.01 if name in known else math.log(priors[name][1]) for name in names])
    sizes = [(m, scenario_of(m, setup), max(m.error, NOISE * m.step)) for m in measured if m.ranks > 1]

    def links(x: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(x).tolist(), strict=True))

    def residuals(x: np.ndarray) -> np.ndarray:  # (sizes + parameters,), in standard deviations
        errors = [
            (communication_seconds(gradients, m.sections[COMPUTE], links(x), scenario) - m.sections[EXPOSED]) / error
            for m, scenario, error in sizes
        ]
        return np.array([*errors, *((x - centre) / spread)])

    # A network so fast that all is hidden gives no slope to follow: start from slower ones as well.
    unknown = np.array([name.endswith("bandwidth") and name not in known for name in names])
    starts = [centre + math.log(factor) * unknown for factor in ((1.0, 0.1, 0.01) if sizes else (1.0,))]
    fits = [optimize.least_squares(residuals, start, method="lm", diff_step=1e-5) for start in starts]
    best = min(fits, key=lambda found: found.cost)
    # Where the model does not fit the points within their errors, the interval grows by as much.
    heat = max(1.0, 2 * best.cost / len(sizes)) if sizes else 1.0
    # Student's t with few degrees of freedom proposes points far out, where a normal distribution would have none.
    proposal = stats.multivariate_t(best.x, np.linalg.inv(best.jac.T @ best.jac) * heat, df=5, seed=0)
    candidates = proposal.rvs(CANDIDATES)
    posterior = np.array([-np.sum(residuals(x) ** 2) / 2 / heat for x in candidates])
    weights = special.softmax(posterior - proposal.logpdf(candidates))
    drawn = np.random.default_rng(0).choice(candidates, DRAWS, p=weights)
    return links(best.x), [links(x) for x in drawn]


@dataclasses.dataclass(frozen=True)
class Check:
    """A measured size that the model was not fitted to, and what it predicts for it."""

    measured: Measured
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative error of the predicted images/s."""
        return self.predicted.images_per_second / self.measured.images_per_second - 1


def leave_largest_out(
    measured: Sequence[Measured], gradients: Sequence[Gradient], setup: Setup = DEFAULT
) -> list[Check]:
    """Fit without the largest number of ranks and predict it; empty where fewer than two sizes are left to compare."""
    largest = max((m.ranks for m in measured), default=0)
    rest = [m for m in measured if m.ranks < largest]
    if not rest:
        return []
    model = fit(rest, gradients, setup)
    return [Check(m, model.predict(scenario_of(m, setup))) for m in measured if m.ranks == largest]
