"""The performance model predicts sizes that it has not seen: published tables, made-up machines, measured studies."""

import csv
import json

import pytest

from job.scaling import model as scalingmodel
from job.scaling import study
from job.scaling.model import Scenario, allreduce_seconds
from job.scaling.sizes import size_of, sizes_of
from job.scaling.study import COMPUTE, EXPOSED, SECTIONS, Gradient, Measured
from tests import scaling_data
from tests.launch import ROOT

DATA = ROOT / "tests/data"
LINKS = {"local latency": 1e-6, "local bandwidth": 100e9, "network latency": 5e-6, "network bandwidth": 10e9}


def table(name: str) -> list[dict[str, str]]:
    with open(DATA / name) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def published(ranks: int, batch: int, compute: float, communication: float) -> Measured:
    """A row of a table in which all ranks are on one node, and communication is not overlapped."""
    sections = dict.fromkeys(SECTIONS, 0.0) | {COMPUTE: compute, EXPOSED: communication}
    return Measured(ranks, 1, batch, sections, compute + communication, synthetic=True)


def not_worse(what: str, error: float, known: float) -> None:
    """Report a relative error of the model; fail where it is larger than the `known` one."""
    print(f"{what}: predicted {error:+.1%} off, known {known:.1%}")
    assert abs(error) < known + 0.005, f"{what} is predicted worse than before: {error:+.1%}, not {known:.1%}"


@pytest.mark.parametrize(
    "network, error, network_error",  # of images/s and of the seconds in the allreduce
    [("AlexNet", 0.12, 0.474), ("GoogLeNet", 0.028, 0.502), ("VGG16", 0.033, 0.468), ("ResNet50", 0.011, 0.498)],
)
def test_theano_mpi_with_8_gpus_is_predicted_from_1_2_and_4(network, error, network_error):
    """The 8 GPUs sit on two sockets and communicate half as fast as 2 and 4 do, which the model cannot know."""
    sizes, parameters = [], 0.0
    for row in table("theano_mpi.csv"):
        if row["model"] == network:
            ranks, batch = int(row["gpus"]), int(row["gpus"]) * int(row["batch_per_gpu"])
            steps = 5120 / batch
            times = float(row["train_seconds"]) / steps, float(row["communication_seconds"]) / steps
            sizes.append(published(ranks, batch, *times))
            parameters = float(row["parameters_million"]) * 1e6
    (check,) = scalingmodel.leave_largest_out(sizes, [Gradient(int(4 * parameters), ready=1.0)])
    assert check.measured.ranks == 8
    not_worse(f"{network} on 8 GPUs", check.error, error)
    exposed = check.predicted.sections[EXPOSED] / check.measured.sections[EXPOSED] - 1
    not_worse(f"the allreduce of {network}", exposed, network_error)


@pytest.mark.parametrize("machine, error", [("Google K80", 0.014), ("Amazon K80", 0.008), ("DGX-1 P100", 0.179)])
def test_tensorflow_alexnet_with_8_gpus_is_predicted_from_1_2_and_4(machine, error):
    rows = [row for row in table("tensorflow_benchmarks.csv") if row["machine"].startswith(machine)]
    steps = {int(r["gpus"]): 512 * int(r["gpus"]) / float(r["images_per_second"]) for r in rows}
    sizes = [published(n, 512 * n, steps[1], max(0.0, step - steps[1])) for n, step in steps.items()]
    (check,) = scalingmodel.leave_largest_out(sizes, [Gradient(4 * 60_965_224, ready=1.0)])
    not_worse(f"8 GPUs of {machine}", check.error, error)


@pytest.mark.parametrize("network", [2e9, 10e9, 50e9])
@pytest.mark.parametrize("loader", [60_000.0, float("inf")])
def test_a_made_up_cluster_of_64_ranks_is_predicted_from_1_to_32_within_15_percent(tmp_path, network, loader):
    path = scaling_data.write_study(tmp_path / "study", modes=("weak",), network=network, loader=loader)
    found = study.load(str(path))
    (check,) = scalingmodel.leave_largest_out([s.measured for s in sizes_of(found)], found.gradients)
    assert check.measured.ranks == 64
    assert abs(check.error) < 0.15
    assert 0.97 * check.predicted.low < check.measured.images_per_second < 1.03 * check.predicted.high


def test_an_allreduce_costs_what_the_textbook_says():
    nbytes = 1e9
    ring = allreduce_seconds(nbytes, 4, 1, LINKS, "ring")
    assert ring == pytest.approx(6 * 5e-6 + 1.5 * nbytes / 10e9)
    hierarchical = allreduce_seconds(nbytes, 8, 4, LINKS, "hierarchical")
    assert hierarchical == pytest.approx(6 * 1e-6 + 1.5 * nbytes / 100e9 + 2 * 5e-6 + nbytes / 10e9)
    assert allreduce_seconds(nbytes, 1, 1, LINKS) == 0
    # A small message over many ranks goes by a tree, whose latency grows with their logarithm.
    assert allreduce_seconds(100, 10_000, 1, LINKS) == pytest.approx(allreduce_seconds(100, 10_000, 1, LINKS, "tree"))


def test_allreduce_hides_behind_what_is_left_of_the_backward_pass():
    early, late = [Gradient(1000, 0.1)], [Gradient(1000, 1.0)]
    assert scalingmodel.exposed_seconds(early, backward=1.0, cost=lambda n: 0.5) == 0
    assert scalingmodel.exposed_seconds(late, backward=1.0, cost=lambda n: 0.5) == pytest.approx(0.5)
    # The second message waits for the first; what became ready meanwhile goes along with it.
    three = [Gradient(1, 0.1), Gradient(2, 0.3), Gradient(4, 0.5)]
    sizes = []
    scalingmodel.exposed_seconds(three, 1.0, lambda n: sizes.append(n) or 0.6)
    assert sizes == [1, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = scaling_data.write_study(tmp_path_factory.mktemp("model") / "study", network=2e9)
    found = study.load(str(path))
    return scalingmodel.fit([s.measured for s in sizes_of(found)], found.gradients)


def test_each_option_of_a_prediction_does_what_it_should(model):
    base = Scenario(256, 256 * 512, 4)

    def rate(**changes):
        return model.predict(Scenario(**{**vars(base), **changes})).images_per_second

    assert rate(network_bandwidth=25e9) > 1.1 * rate()
    assert rate(compression=0.5) > 1.1 * rate()
    assert rate(loader=5_000) == pytest.approx(64 * 5_000, rel=0.01)
    assert rate(storage=100_000) == pytest.approx(100_000, rel=0.01)
    assert rate(parallel="weights") < rate()  # twice the bytes, and nothing hidden
    # Small batches on a slow network: activations are less than gradients. Large ones: they are more.
    slow = {"network_bandwidth": 1e9, "ranks_per_node": 1, "ranks": 8}
    for batch, better in ((1024, True), (16384, False)):
        by_hybrid, by_gradients = (rate(**slow, global_batch=batch, parallel=p) for p in ("hybrid", "gradients"))
        assert (by_hybrid > by_gradients) == better
    assert model.predict(Scenario(10_000, 5_120_000, 4)).high < 10_000 * rate(ranks=1, global_batch=512) * 1.1


def test_intervals_hold_the_prediction_and_grow_beyond_what_was_measured(model):
    inside, outside = (model.predict(Scenario(n, n * 512, 4)) for n in (32, 1024))
    for made in (inside, outside):
        assert made.low <= made.images_per_second <= made.high
    width = [(p.high - p.low) / p.images_per_second for p in (inside, outside)]
    assert width[1] > width[0]


def test_one_size_is_enough_to_predict_and_says_that_little_is_known(tmp_path):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1,), modes=("strong",))
    found = study.load(str(path))
    made = scalingmodel.fit([s.measured for s in sizes_of(found)], found.gradients)
    predicted = made.predict(Scenario(64, 64 * 512, 4))
    assert predicted.high > 2 * predicted.low
    assert scalingmodel.leave_largest_out([s.measured for s in sizes_of(found)], found.gradients) == []


# With 4 hosts of 1 Gbit/s, the four share two cores and compute three times as slowly as one host.
HOSTS_ERROR = {
    ("cluster-100mbit.json", 2): 0.022,
    ("cluster-100mbit.json", 4): 0.041,
    ("cluster-1gbit.json", 2): 0.138,
    ("cluster-1gbit.json", 4): 0.277,
}


@pytest.mark.parametrize("name", sorted(p.name for p in DATA.glob("cluster-*.json")))
def test_hosts_joined_by_slow_links_are_predicted_from_one_rank_and_the_link_speed(name):
    """Four hosts in network namespaces, their links shaped by tc tbf; measured with slurm/scaling.sh."""
    fields = json.loads((DATA / name).read_text())
    gradients = [Gradient(g["bytes"], g["ready"], g["name"], tuple(g["shape"])) for g in fields["gradients"]]
    points = [study.Point(**point) for point in fields["points"]]
    sizes = {n: size_of([p for p in points if p.ranks == n]).measured for n in (1, 2, 4)}
    made = scalingmodel.fit([sizes[1]], gradients, links={"network bandwidth": fields["bandwidth"]})
    for ranks in (2, 4):
        m, predicted = sizes[ranks], made.predict(scalingmodel.scenario_of(sizes[ranks]))
        assert predicted.sections[EXPOSED] == pytest.approx(m.sections[EXPOSED], rel=0.15)
        error = predicted.images_per_second / m.images_per_second - 1
        not_worse(f"{ranks} hosts of {name}", error, HOSTS_ERROR[name, ranks])


@pytest.mark.parametrize(
    "n, expected", [(1, 0.0), (2, 0.5642), (3, 0.8463), (10, 1.5388), (100, 2.5076), (1000, 3.2414)]
)
def test_the_expected_maximum_of_normal_deviates(n, expected):
    """Harter, "Expected values of normal order statistics", Biometrika 48 (1961), table 1."""
    assert scalingmodel.expected_maximum(n) == pytest.approx(expected, abs=1e-4)
