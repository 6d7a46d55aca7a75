"""--track: every tracker gets settings, values, events and the summary; whatever fails in one does not end a run."""

import json
import sys
import time

import pytest

from job import config
from job.run.log import RunLog
from job.tracking import apart, tracker
from job.tracking.apart import Apart
from shards.errors import InputError
from tests.launch import error_lines, horovodrun, metrics, python

SMALL = "--recipe demo --model.width 0.0625 --workers 0 --log-every 2 --max-steps 6".split()


def train(data, out, *options, ranks=0, home=None, **env):
    env = {"WANDB_MODE": "offline", **({"HOME": str(home)} if home else {}), **env}
    words = ["job.train", *SMALL, "--data", str(data), "--out", str(out), *options]
    return horovodrun(ranks, *words, env=env) if ranks else python(*words, env=env)


@pytest.fixture(scope="module")
def tracked(demo_data, tmp_path_factory):
    """A run of two ranks with all trackers, continued once."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    for steps, ranks in (("6", 2), ("10", 0)):
        done = train(demo_data, out, "--track", "tensorboard,wandb,mlflow", "--max-steps", steps, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return out


@pytest.mark.long
def test_mlflow_has_one_run_of_both_starts(tracked, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{tracked.parent}/mlruns")
    experiment = client.get_experiment_by_name("alexnet")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "0.0625" and run.data.params["max-steps"] == "6"
    assert run.data.tags["from step 6/max-steps"] == "10"
    found = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert found == {line["step"]: pytest.approx(line["loss"]) for line in metrics(tracked, "train")}
    assert {m.step for m in client.get_metric_history(run.info.run_id, "val/top1")} == {6, 10}
    events = [json.loads(text)["event"] for name, text in sorted(run.data.tags.items()) if name.startswith("event/")]
    assert events == ["start", "done", "start", "done"]
    assert run.data.metrics["summary/steps"] == 10 and run.data.tags["summary/status"] == "done"


def wandb_records(data):
    """What wandb's offline file holds: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.long
def test_wandb_keeps_one_id_and_gets_settings_values_events_and_summary(tracked):
    ids, lines, summaries, settings, codes = set(), [], {}, {}, []
    for file in sorted(tracked.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file.read_bytes()):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                lines.append({key: json.loads(value) for key, value in items.items()})
            summaries |= {"/".join(item.nested_key) or item.key: item.value_json for item in record.summary.update}
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert record.run.project == "alexnet" and record.run.display_name == "run"
                settings |= {item.key: item.value_json for item in record.run.config.update}
            if record.HasField("exit"):
                codes.append(record.exit.exit_code)
    assert ids == {json.loads((tracked / "trackers.json").read_text())["wandb"]} and codes == [0, 0]
    assert settings["model.width"] == "0.0625"
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in metrics(tracked, "train")}
    assert [json.loads(line["event"])["event"] for line in lines if "event" in line] == ["start", "done"] * 2
    assert summaries["summary/status"] == '"done"' and summaries["summary/steps"] == "10"


@pytest.mark.long
def test_tensorboard_gets_values_events_and_settings(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tracked / "tensorboard"))
    found.Reload()
    assert {e.step: e.value for e in found.Scalars("train/top1")} == {
        line["step"]: pytest.approx(line["top1"]) for line in metrics(tracked, "train")
    }
    assert {"settings/text_summary", "event/text_summary", "summary/text_summary"} <= set(found.Tags()["tensors"])


def test_nothing_is_tracked_where_none_is_wanted(demo_data, tmp_path):
    assert train(demo_data, tmp_path / "run", "--track", "none").returncode == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "metrics.jsonl" in names and not names & {"tensorboard", "wandb", "trackers.json"}


@pytest.mark.parametrize("text", ["wandbb", "", "none,wandb", "tensorboard,,mlflow"])
def test_a_list_with_a_mistake_is_one_line(text):
    with pytest.raises(InputError, match="--track is"):
        config.parse(["--recipe", "demo", "--data", "d", "--track", text], "job.train", "")
    assert tracker.parse("wandb, tensorboard,wandb") == ("wandb", "tensorboard")


@pytest.mark.parametrize(
    ("name", "env", "words"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "no credentials"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "mlflow does not start"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:///x.db"}, "needs all of MLflow"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_line_before_training(demo_data, tmp_path, name, env, words):
    env = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc"), **env}
    done = train(demo_data, tmp_path / "run", "--track", name, home=tmp_path, **env)
    assert done.returncode == 2 and words in error_lines(done)[0] and len(error_lines(done)) == 1
    assert "epoch" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, name, package, monkeypatch):
    hide(tmp_path, name, "raise ImportError('hidden')", monkeypatch)
    log = RunLog(str(tmp_path / "run"), active=True)
    with pytest.raises(InputError, match=rf"needs the package {package} .*pip install .*\[track\]"):
        log.open(0, name, {})


def hide(folder, package, code, monkeypatch):
    """A package of this name that is found first, in this and in started processes."""
    (folder / f"{package}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


FAKE = """
import os, time
class Run:
    id, url, dir = "abc", "https://somewhere", "x/y"
    summary = {}
    def define_metric(self, *a, **k): pass
    def mark_preempting(self): pass
    def log(self, values):
        print("noise on stdout")
        if values.get("step") == 2: %s
    def finish(self, exit_code): open(os.environ["ENDED"], "w").write(str(exit_code))
Settings = dict
def login(**options): return True
def init(**options): return Run()
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('server gone')", "RuntimeError: server gone"),
        ("os._exit(3)", "ended with code 3"),
        ("time.sleep(600)", "has not taken 50 records"),
    ],
)
def test_what_fails_or_hangs_in_a_tracker_is_reported_once_and_slows_nothing(
    tmp_path, monkeypatch, capsys, code, words
):
    hide(tmp_path, "wandb", FAKE % code, monkeypatch)
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    monkeypatch.setattr(apart, "WAITING", 50)
    log = RunLog(str(tmp_path / "run"), active=True)
    log.open(0, "wandb", {})
    assert "wandb: https://somewhere" in capsys.readouterr().out
    log.write("train", 2, 0, loss=1.0)
    deadline = time.monotonic() + 20
    text = ""
    number = 3
    while words not in text and time.monotonic() < deadline:
        began = time.monotonic()
        # Long enough that the pipe to a process that hangs is full soon.
        log.write("train", number, 0, **{f"value{i}": float(i) for i in range(100)})
        assert time.monotonic() - began < 2
        number += 1
        text += capsys.readouterr().err
    assert text.count("warning") == 1 and "wandb is off from here on" in text and words in text
    log.summary({"steps": 3})
    log.close("done")
    assert capsys.readouterr().err == "" and log.failures == 0 and not (tmp_path / "ended").exists()


@pytest.mark.parametrize(("status", "limit"), [("done", "CLOSE_SECONDS"), ("failed", "FAILED_SECONDS")])
def test_a_tracker_that_does_not_end_is_left(tmp_path, monkeypatch, capsys, status, limit):
    hide(tmp_path, "wandb", (FAKE % "pass").replace("open(os", "time.sleep(600); open(os"), monkeypatch)
    monkeypatch.setattr(apart, limit, 1.0)
    log = RunLog(str(tmp_path / "run"), active=True)
    log.open(0, "wandb", {})
    began = time.monotonic()
    log.close(status)
    assert time.monotonic() - began < 10 and "did not end within 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("done", "0"), ("stopped", "75"), ("failed", "1"), ("", "1")])
def test_how_a_run_ended_is_recorded_also_if_rank_0_was_killed(tmp_path, monkeypatch, status, code):
    hide(tmp_path, "wandb", FAKE % "pass", monkeypatch)
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    one = Apart("wandb", str(tmp_path))
    assert one.start({}, 0) == "https://somewhere" and apart.read_ids(str(tmp_path)) == {"wandb": "abc"}
    if status:
        one.close(status)
    else:
        one._put_line(None)  # its input ends, as when this process is killed
        one._process.wait(20)
    assert (tmp_path / "ended").read_text() == code and not one.failure


def test_a_run_under_way_goes_on_where_its_tracker_does_not_start(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / apart.IDS).write_text('{"wandb": "abc"}')
    hide(tmp_path, "wandb", "raise ImportError('hidden')", monkeypatch)
    log = RunLog(str(tmp_path / "run"), active=True)
    log.open(5, "wandb", {})
    assert "training goes on without wandb" in capsys.readouterr().err
    log.write("train", 6, 0, loss=1.0)
    log.close("done")


def test_rank_0_loads_no_tracker_itself(tmp_path, monkeypatch):
    hide(tmp_path, "wandb", FAKE % "pass", monkeypatch)
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    log = RunLog(str(tmp_path / "run"), active=True)
    log.open(0, "wandb", {})
    log.close("done")
    assert "wandb" not in sys.modules and (tmp_path / "ended").read_text() == "0"
