"""A study carries on, shows what failed, refuses what cannot be compared; its report opens in a browser."""

import base64
import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from job.scaling import __main__ as scaling
from job.scaling import cost, runs, sizes, study
from shards import command
from shards.errors import InputError
from tests import scaling_data
from tests.cluster import Cluster, namespaces_refused
from tests.launch import ROOT, error_lines, python, run

DATA = ROOT / "tests/data"


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def report(path, *options: str) -> Done:
    """`python -m job.scaling report`, in this process: matplotlib is slow to load."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["scaling", "report", str(path), *options])
        with pytest.raises(SystemExit) as ended:
            command.run(scaling.main)
    return Done(ended.value.code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A study of 1 to 64 ranks with one slow rank, reported."""
    path = tmp_path_factory.mktemp("scaling") / "study"
    scaling_data.write_study(path, repeats=2, network=5e9, slow=0, loader=60_000)
    done = python("job.scaling", "report", str(path))
    assert done.returncode == 0, done.stderr
    return path


# ---- The report.


def test_report_of_64_ranks_is_one_page_with_figures_tables_and_csv(cluster):
    out = cluster / "report"
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 4
    for name in ("throughput", "breakdown", "prediction", "cost"):
        assert (out / f"{name}.png").read_bytes() in {base64.b64decode(picture) for picture in pictures}
    facts = json.loads((out / "report.json").read_text())
    assert [c["mode"] for c in facts["curves"]] == ["strong", "weak"]
    assert [row["ranks"] for row in facts["curves"][1]["sizes"]] == [1, 2, 4, 8, 16, 32, 64]
    for curve in facts["curves"]:
        for row in curve["sizes"]:
            assert row["low"] <= row["images_per_second"] <= row["high"]
            assert math.fsum(row["sections"].values()) == pytest.approx(row["step_seconds"])
            assert row["advice"].endswith(".")
    assert facts["predictions"][1]["sizes"][-1]["ranks"] == 10_000
    assert len(facts["model"]["left_out"]) == 2
    assert "rank 0 on node0" in page  # the slow one
    assert "EXAMPLE PRICES" in page
    with open(out / "points.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * 13  # strong and weak share the smallest size
    with open(out / "sizes.csv") as file:
        assert {row["kind"] for row in csv.DictReader(file)} == {"measured", "predicted"}


def test_bottlenecks_are_found(tmp_path):
    for wanted, machine in (
        ("compute", {"network": 1e12, "local": 1e12}),
        ("communication", {"network": 1e9}),
        ("storage or decode", {"loader": 20_000, "network": 1e12}),
    ):
        path = scaling_data.write_study(tmp_path / wanted, sizes=(1, 8), repeats=1, modes=("weak",), **machine)
        assert report(path).returncode == 0
        facts = json.loads((path / "report" / "report.json").read_text())
        assert facts["curves"][0]["sizes"][-1]["bottleneck"] == wanted


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_report_opens_in_a_browser(cluster, tmp_path):
    """The page as the browser shows it: all figures have a size, nothing is wider than the page."""
    page = tmp_path / "page.html"
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "images: [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth]),"
        "wide: document.documentElement.scrollWidth, window: innerWidth, rows: document.rows,"
        "tables: document.querySelectorAll('table').length }) })</script></body>"
    )
    page.write_text((cluster / "report" / "report.html").read_text().replace("</body>", probe))
    shot = tmp_path / "page.png"
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser += ["--window-size=1100,3000", "--virtual-time-budget=5000"]
    done = run(*browser, "--dump-dom", f"file://{page}")
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1])
    assert len(seen["images"]) == 4
    assert all(complete and natural > 300 and shown > 300 for complete, natural, shown in seen["images"])
    assert seen["wide"] <= seen["window"]
    assert seen["tables"] >= 8
    run(*browser, f"--screenshot={shot}", f"file://{page}")
    assert shot.stat().st_size > 50_000  # not a blank page


# ---- Bad input.


def test_missing_and_damaged_points_are_reported_and_the_rest_is_shown(tmp_path):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1, 2, 4), repeats=2, modes=("weak",))

    def nan(fields):
        fields["timings"]["ranks"][0]["mean"]["update"] = float("nan")

    scaling_data.edit_point(path, "real-ranks00004-batch002048-repeat01", nan)
    next((path / "points").glob("*ranks00002*repeat02*")).write_text("{")
    scaling_data.edit_point(path, "real-ranks00004-batch002048-repeat02", lambda f: f["timings"].pop("ranks"))
    (path / "study.json").unlink()
    done = report(path)
    assert done.returncode == 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    facts = json.loads((path / "report" / "report.json").read_text())
    assert [(row["ranks"], row["repeats"]) for row in facts["curves"][-1]["sizes"]] == [(1, 2), (2, 1)]
    assert "Not all of this study can be shown" in (path / "report" / "report.html").read_text()


def test_a_study_of_one_point_is_shown_without_scaling(tmp_path):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1,), repeats=1)
    done = report(path)
    assert done.returncode == 0
    page = (path / "report" / "report.html").read_text()
    assert "fewer than two sizes were measured" in page
    assert "that needs two sizes or more" in page


def test_failed_points_are_shown_as_failed(tmp_path):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1, 2), repeats=1, modes=("weak",))

    def fail(fields):
        fields.update(status="failed", error="exit code 1: error: out of memory <b>", timings={})

    scaling_data.edit_point(path, "real-ranks00002", fail)
    assert report(path).returncode == 0
    assert "out of memory &lt;b&gt;" in (path / "report" / "report.html").read_text()
    scaling_data.edit_point(path, "real-ranks00001", fail)
    done = report(path)
    assert done.returncode == 2
    assert len(error_lines(done)) == 1
    assert "out of memory" in (path / "report" / "report.html").read_text()


def test_a_study_without_gradients_is_shown_without_predictions(tmp_path):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1, 2), repeats=1, modes=("weak",))
    for ranks in ("1", "2"):
        scaling_data.edit_point(path, f"real-ranks0000{ranks}", lambda fields: fields["timings"].pop("gradients"))
    assert report(path).returncode == 0
    page = (path / "report" / "report.html").read_text()
    assert "nothing is predicted" in page and "Where the time goes" in page and "Cost" not in page


def test_unlike_environments_are_refused_without_allow_mixed(tmp_path):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1, 2), repeats=1, modes=("weak",))
    scaling_data.edit_point(path, "real-ranks00002", lambda f: f["timings"]["environment"].update(device="Another GPU"))
    done = report(path)
    assert done.returncode == 2
    assert "Another GPU" in error_lines(done)[0] and "--allow-mixed" in error_lines(done)[0]
    assert report(path, "--allow-mixed").returncode == 0
    assert "unlike environments" in (path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report", "nowhere"], "no study nowhere"),
        (["run", "--np", "1,x", "--data", "synthetic"], "whole numbers"),
        (["run", "--np", "1", "--data", "nowhere"], "no data folder nowhere"),
        (["run", "--np", "1,2,3", "--data", "synthetic", "--global-batch", "64"], "--global-batch 60"),
        (["run", "--np", "1", "--data", "synthetic", "--max-steps", "5"], "leave it out"),
        (["run", "--np", "1", "--data", "synthetic", "--recipie", "demo"], "did you mean --recipe?"),
        (["run", "--np", "1", "--data", "synthetic", "--mode", "week"], "strong, weak"),
        (["predict", "STUDY", "--gpus", "8", "--network", "fast"], "not a bandwidth"),
        (["predict", "STUDY", "--gpus", "8", "--latency", "5"], "not a time"),
        (["predict", "STUDY", "--gpus", "64", "--global-batch", "32"], "without"),
    ],
)
def test_bad_usage_is_one_line(cluster, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scaling", *(str(cluster) if a == "STUDY" else a for a in arguments)])
    with pytest.raises(InputError, match=re.escape(message)):
        scaling.main()


@pytest.mark.parametrize("text, value", [("200Gb/s", 25e9), ("25GB/s", 25e9), ("1 Gbit/s", 125e6), ("100Mbps", 12.5e6)])
def test_bandwidths(text, value):
    assert scaling.bandwidth(text) == value


@pytest.mark.parametrize("module", ["scipy", "jinja2", "matplotlib"])
def test_without_the_extra_plots_one_line_names_it(cluster, module):
    """And `run`, which needs none of it, gets as far as its own errors."""
    code = f"import sys; sys.modules[{module!r}] = None; from job.scaling import __main__ as m; m.run(m.main)"
    done = run(sys.executable, "-c", code, "report", str(cluster))
    assert done.returncode == 2
    (line,) = error_lines(done)
    assert f"{module} is not installed" in line and "bash slurm/install.sh" in line
    assert "no data folder nowhere" in run(sys.executable, "-c", code, "run", "--np", "1", "--data", "nowhere").stderr


def test_predict_prints_sizes_with_intervals_and_assumptions(cluster, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["s", "predict", str(cluster), "--gpus", "128,10000", "--network", "200Gb/s", "--json"]
    )
    scaling.main()
    made = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in made["predictions"]] == [128, 10_000]
    for row in made["predictions"]:
        assert 0 < row["low"] <= row["images_per_second"] <= row["high"]
    assert any("full-bisection" in line for line in made["assumptions"])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_a_fifth_slower_is_named_however_few_the_others_are(tmp_path, ranks):
    path = scaling_data.write_study(tmp_path / "study", sizes=(1, ranks), modes=("weak",), repeats=1, slow=1)
    done = report(path)
    assert done.returncode == 0, done.stderr
    found = json.loads((path / "report" / "report.json").read_text())["slow_ranks"]
    assert len(found) == 1 and re.search(r"rank 1 on node0 works 1\d% longer than the median of the others", found[0])


# ---- Running a study.


def test_sections_are_those_that_the_timers_measure():
    from job.run.log import SECTIONS

    assert tuple(name for name in study.SECTIONS if name != study.STRAGGLERS) == SECTIONS


def test_the_timers_of_a_long_run_do_not_fill_the_memory():
    from job.run.log import COMPUTE
    from job.run.timing import StepTimer

    timer = StepTimer(torch.device("cpu"))
    for _ in range(2000):
        timer.start(0.0)
        timer.mark(COMPUTE)
        timer.end()
    assert len(timer.rows) == 1000


def fake_runs(monkeypatch, fail=(), environment=None):
    """Let points 'run' at once; returns the names in the order in which they did."""
    order = []

    def at_once(path, plan, point, time_limit):
        folder = Path(runs.run_directory(path, point))
        order.append(point.name)
        if len(order) in fail:
            point.error = "exit code 1: error: it broke"
            return
        made = scaling_data.timings(point.ranks, point.global_batch, point.repeat)
        if environment and len(order) > 1:
            made["environment"] = made["environment"] | environment
        (folder / "timings.json").write_text(json.dumps(made))

    monkeypatch.setattr(runs, "run_local", at_once)
    return order


PLAN = study.Plan(
    sizes=(1, 2, 4), modes=("strong", "weak"), data=("synthetic",), global_batch=64, repeats=3, steps=20, seed=1
)
HOW = runs.How()


def test_repeats_run_in_random_order_and_an_interrupted_study_carries_on(tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "study")
    order = fake_runs(monkeypatch)
    at_once = runs.run_local

    def interrupted(*arguments):
        if len(order) == 7:
            raise KeyboardInterrupt
        at_once(*arguments)

    monkeypatch.setattr(runs, "run_local", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.run(path, PLAN, HOW)
    monkeypatch.setattr(runs, "run_local", at_once)
    capsys.readouterr()
    runs.run(path, PLAN, HOW)
    assert len(order) == len(set(order)) == 3 * 5  # every point once
    assert "7 of them there already" in capsys.readouterr().out.splitlines()[0]
    first, second, third = (sorted(order[i : i + 5]) for i in (0, 5, 10))
    assert [n[:-2] for n in first] == [n[:-2] for n in second] == [n[:-2] for n in third]
    assert len({tuple(n[:-2] for n in order[i : i + 5]) for i in (0, 5, 10)}) > 1  # orders of their own
    runs.run(path, PLAN, HOW)
    assert len(order) == 15


def test_failed_points_stay_until_retried(tmp_path, monkeypatch):
    path = str(tmp_path / "study")
    order = fake_runs(monkeypatch, fail=(2,))
    runs.run(path, PLAN, HOW)
    assert [p.error for p in study.load(path).points if p.status == "failed"] == ["exit code 1: error: it broke"]
    runs.run(path, PLAN, HOW)
    assert len(order) == 15
    runs.run(path, PLAN, runs.How(retry=True))
    assert order[1] == order[15] and len(order) == 16
    assert len(study.load(path).done) == 15


def test_a_study_stops_at_a_point_of_another_environment(tmp_path, monkeypatch):
    path = str(tmp_path / "study")
    order = fake_runs(monkeypatch, environment={"commit": "another"})
    with pytest.raises(InputError, match="commit is .*another.*--allow-mixed"):
        runs.run(path, PLAN, HOW)
    assert len(order) == 2
    runs.run(path, PLAN, runs.How(retry=True, mixed=True))
    assert len(study.load(path).done) == 15


def test_a_folder_holds_one_study(tmp_path, monkeypatch):
    path = str(tmp_path / "study")
    fake_runs(monkeypatch)
    runs.run(path, PLAN, HOW)
    other = dataclasses.replace(PLAN, sizes=(1, 2), modes=("strong",), global_batch=32, repeats=1)
    with pytest.raises(InputError, match="global_batch 64, not 32"):
        runs.run(path, other, HOW)


def curves(path: str) -> dict[str, list[tuple[int, int]]]:
    """Ranks and batch of the sizes on each curve of a study."""
    found = study.load(path)
    return {
        curve.mode: [(size.ranks, size.measured.global_batch) for size in curve.sizes]
        for curve in sizes.curves_of(found, sizes.sizes_of(found))
    }


def test_a_study_keeps_its_curves_when_modes_and_sizes_are_added(tmp_path, monkeypatch):
    path = str(tmp_path / "study")
    fake_runs(monkeypatch)
    plan = dataclasses.replace(PLAN, sizes=(2, 4), modes=("strong",), repeats=1, weak_from=0)
    runs.run(path, plan, HOW)
    runs.run(path, dataclasses.replace(plan, modes=("weak",)), HOW)
    assert curves(path) == {"strong": [(2, 64), (4, 64)], "weak": [(2, 64), (4, 128)]}
    # A smaller size: weak scaling keeps 32 images per rank.
    runs.run(path, dataclasses.replace(plan, sizes=(1, 8), modes=("strong", "weak"), weak_from=0), HOW)
    assert curves(path) == {
        "strong": [(1, 64), (2, 64), (4, 64), (8, 64)],
        "weak": [(1, 32), (2, 64), (4, 128), (8, 256)],
    }


@pytest.mark.long
def test_a_study_that_is_terminated_leaves_no_run_and_carries_on(tmp_path):
    command = ["run", "--np", "1", "--mode", "strong", "--data", "synthetic", "--repeats", "1", "--global-batch", "4"]
    command += ["--recipe", "demo", "--model.width", "0.1", "--study", str(tmp_path / "study"), "--no-bench"]
    whole = [sys.executable, "-m", "job.scaling", *command]
    with subprocess.Popen([*whole, "--steps", "1000000"], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not any("images/s" in log.read_text() for log in tmp_path.glob("study/runs/*/log.txt")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)  # there is no event for a growing file
        second = run(*whole, "--steps", "1000000")  # over the first, by mistake
        assert second.returncode == 2 and f"in use by process {process.pid}" in error_lines(second)[0], second.stderr
        below = psutil.Process(process.pid).children(recursive=True)
        assert any("job.train" in child.cmdline() for child in below)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(below, 10)[1]
    points = tmp_path / "study" / "points"
    assert not list(points.iterdir())


@pytest.mark.long
def test_a_study_on_this_machine(tmp_path):
    """Real runs under horovodrun, one and two ranks: every section of every rank is there, and adds up."""
    command = ["run", "--np", "1,2", "--mode", "weak", "--data", "synthetic", "--repeats", "1", "--steps", "6"]
    command += ["--global-batch", "4", "--recipe", "demo", "--model.width", "0.1", "--model.classes", "10"]
    done = python("job.scaling", *command, "--study", tmp_path / "study", "--no-bench", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = study.load(str(tmp_path / "study"))
    assert [(p.ranks, p.status, p.error) for p in found.points] == [(1, "done", ""), (2, "done", "")]
    for point in found.points:
        assert len(point.timings["ranks"]) == point.ranks
        measured = point.measured()
        assert measured.step == pytest.approx(point.timings["step_seconds"]["mean"], rel=0.3)
    assert not list((tmp_path / "study").rglob("*.pt"))  # no checkpoints are left
    assert found.gradients[0].name.startswith("fc8") and found.gradients[-1].ready == 1.0


@pytest.mark.long
@pytest.mark.slurm
def test_a_study_on_a_slurm_cluster_with_slow_links(tmp_path):
    """scaling.sh submits and returns; called again it takes in what has ended, and submits nothing twice."""
    command = ["bash", "slurm/scaling.sh", "--nodes", "1,2", "--mode", "weak", "--data", "synthetic", "--repeats", "1"]
    command += ["--steps", "6", "--global-batch", "2", "--recipe", "demo", "--model.width", "0.2"]
    command += ["--model.classes", "10", "--study", str(tmp_path / "study"), "--sbatch=--time=5"]
    with Cluster(2, rate="100mbit" if not namespaces_refused() else "") as slurm:

        def scaling_sh(*more: str) -> str:
            return slurm.run(*command, *more, cwd=ROOT, timeout=240, env={"OMP_NUM_THREADS": "1"}).stdout

        assert "2 jobs in the queue" in scaling_sh()
        assert "images/s" in scaling_sh("--wait")
        assert "2 points, 2 of them there already" in scaling_sh()
        found = study.load(str(tmp_path / "study"))
        assert [(p.ranks, p.nodes, p.status, p.error) for p in found.points] == [(1, 1, "done", ""), (2, 2, "done", "")]
        if slurm.form == "hosts":
            assert [r["host"] for r in found.points[1].timings["ranks"]] == ["n1", "n2"]
            assert report(tmp_path / "study").returncode == 0
            facts = json.loads((tmp_path / "study" / "report" / "report.json").read_text())
            assert facts["curves"][0]["sizes"][1]["bottleneck"] == "communication"


@pytest.mark.parametrize("name", sorted(p.name for p in DATA.glob("study-*.json")))
def test_reports_of_measured_studies_are_rebuilt(tmp_path, name):
    """Studies that were measured on real machines, each in one file."""
    done = report(DATA / name, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "report.json").read_text())
    assert not facts["problems"]
    assert {row["ranks"] for curve in facts["curves"] for row in curve["sizes"]} == {1, 2}


# ---- Energy.


def set_energy(study, joules, of="GPU + CPU"):
    """Let the runs of a study have measured `joules(ranks)` per image; None: nothing."""
    for file in (study / "points").glob("*.json"):
        fields = json.loads(file.read_text())
        each = joules(fields["ranks"])
        fields["timings"]["energy"] = {"of": of if each else "not measured", "joules_per_image": each}
        file.write_text(json.dumps(fields))


def facts_of(study, *options):
    done = report(study, *options)
    assert done.returncode == 0, done.stderr
    text = (study / "report" / "report.json").read_text()
    return json.loads(text), (study / "report" / "report.html").read_text()


def test_energy_per_image_by_ranks_and_of_a_training_by_hand(tmp_path):
    study = scaling_data.write_study(tmp_path / "study", sizes=(1, 2, 4, 8), repeats=2)
    set_energy(study, lambda ranks: 0.01 * (1 + ranks / 8))
    facts, page = facts_of(study, "--epochs", "10", "--images", "1000000")
    sizes = {row["ranks"]: row for row in facts["curves"][0]["sizes"]}
    assert {r: row["joules_per_image"] for r, row in sizes.items()} == {
        r: pytest.approx(0.01 * (1 + r / 8)) for r in (1, 2, 4, 8)
    }
    assert sizes[8]["energy_of"] == "GPU + CPU" and "0.02 (GPU + CPU)" in page and 'alt="Energy per trained' in page
    found, watts = facts["cost"], 0.02 * sizes[8]["images_per_second"] / 8
    assert found["energy"] == f"GPU + CPU, {watts:,.0f} W per rank at 8 ranks"
    choices = found["offers"] + [deadline["choice"] for deadline in found["deadlines"] if deadline["choice"]]
    for choice in choices:
        if choice["gpus"] in sizes and "spot" not in choice["offer"]:
            assert choice["kwh"] == pytest.approx(sizes[choice["gpus"]]["joules_per_image"] * 1e7 / 3.6e6)
        elif "spot" not in choice["offer"]:
            assert choice["kwh"] == pytest.approx(watts * choice["gpus"] * choice["hours"] / 1000)
        assert choice["co2_kg"] == pytest.approx(0.473 * choice["kwh"])
    assert any(choice["gpus"] in sizes for choice in choices) and "473 g per kWh" in page


@pytest.mark.parametrize("measured", [lambda ranks: None, lambda ranks: 0.01 if ranks == 2 else None])
def test_energy_that_was_not_measured_is_said_and_never_0(tmp_path, measured):
    study = scaling_data.write_study(tmp_path / "study", sizes=(1, 2), repeats=1)
    set_energy(study, measured, of="GPU")
    prices = tmp_path / "prices.yaml"
    prices.write_text(Path(cost.EXAMPLE).read_text().replace("grams_co2_per_kwh: 473", ""))
    facts, page = facts_of(study, "--prices", str(prices))
    assert [row["joules_per_image"] for row in facts["curves"][0]["sizes"]] == [None, measured(2)]
    known = measured(2) is not None
    assert all((offer["kwh"] is not None) == known and offer["co2_kg"] is None for offer in facts["cost"]["offers"])
    assert "not measured" in page and ("has no grams_co2_per_kwh" in page) == known


def test_the_energy_of_other_gpus_is_not_known():
    clouds = (cost.Cloud("same", 1, on_demand=1.0), cost.Cloud("other", 1, on_demand=1.0, speed=2.0))
    found = cost.choices(cost.Prices("p", cloud=clouds, grams_co2_per_kwh=400), {1: 10.0, 2: 6.0}, {1: 5.0})
    by = {(c.offer, c.gpus): (c.kwh, c.co2_kg) for c in found}
    assert by["same, on demand", 1] == (5.0, pytest.approx(2.0))
    assert all(math.isnan(by[key][0]) for key in by if key != ("same, on demand", 1))


# ---- Cost.


def test_costs_by_hand():
    own = cost.Own(
        name="own",
        nodes=1,
        gpus_per_node=8,
        node_price=87600 * 8,
        years=1,
        node_kw=8,
        pue=1.0,
        kwh_price=0.1,
        staff_per_year=0,
        utilisation=0.5,
    )
    assert own.gpu_hour(1.0) == pytest.approx(87600 / 8760 + 0.1)
    assert own.break_even(20.1) == pytest.approx(0.5)
    assert own.break_even(0.05) == math.inf
    cloud = cost.Cloud("cloud", 8, on_demand=2.0, spot=1.0, interruptions_per_node_hour=0.5)
    prices = cost.Prices("p", cloud=(cloud,), own=(own,), checkpoint_minutes=60, restart_minutes=30)
    found = cost.choices(prices, {4: 10.0, 8: 6.0, 16: 4.0})
    by = {(c.offer, c.gpus): c for c in found}
    assert by["cloud, on demand", 4].cost == 8 * 10 * 2.0  # whole nodes
    assert by["cloud, spot", 8].hours == pytest.approx(6.0 / (1 - 0.5 * 1.0))
    assert ("cloud, spot", 16) not in by  # two nodes are lost as fast as they work
    assert ("own", 16) not in by
    assert [c.gpus if c else None for _, c in cost.by_deadline(found, (5, 1))] == [16, None]


def test_prices_with_mistakes_are_refused(tmp_path):
    text = Path(cost.EXAMPLE).read_text()
    assert cost.load_prices(cost.EXAMPLE).example
    for wrong, message in (
        (text.replace("on_demand: 4.00", "on_demand: dear"), "on_demand is 'dear'"),
        (text.replace("node_price:", "node_prise:"), "did you mean node_price?"),
        (text.replace("    years: 5 # of use\n", ""), "years is missing"),
        (text.replace("utilisation: 0.6", "utilisation: 60"), "at most 1"),
        (text.replace("per_kwh: 473", "per_kwh: much"), "grams_co2_per_kwh is 'much'"),
        ("[", "cannot read"),
    ):
        (tmp_path / "prices.yaml").write_text(wrong)
        with pytest.raises(InputError, match=re.escape(message)):
            cost.load_prices(str(tmp_path / "prices.yaml"))
