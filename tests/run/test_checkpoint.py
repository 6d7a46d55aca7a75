"""Checkpoints: never a moment without a valid one; a run goes on from its own step, settings and data."""

import dataclasses
import hashlib
import os
import types

import pytest
import torch

from job import config
from job.network.sgd import MomentumSGD, parameter_groups
from job.ranks import average as parallel
from job.run import checkpoint
from job.run.checkpoint import CheckpointWriter, RunState, fault, list_checkpoints, newest_good, put_in_place
from job.run.resume import find_resume, leave_behind, new_state, same_settings
from shards.errors import InputError
from shards.format.split import Shard, Split
from tests.runlog import Log

SHARDS = tuple(Shard(f"train-{i:06d}.tar", 10 + i, 1000 * i + 1000, f"{i:064x}") for i in range(3))
SPLIT = Split("train", "/data", SHARDS, classes=("a", "b"), labels="train.labels.npy", labels_sha256="1" * 64)
MEAN = torch.ones(3, 2, 2)
# What the first checkpoints held.
OLDEST = ("format", "step", "model", "velocity", "config", "data", "mean", "classes")


def settings(out, *options):
    return config.parse(["--data", "/data", "--out", str(out), *options], "job.train", "")


def state(cfg=None, **fields):
    weights = {"fc8.bias": torch.zeros(2)}
    new = new_state(cfg or settings("run"), SPLIT, MEAN)
    return dataclasses.replace(new, **{"model": weights, "velocity": weights, "best": 0.5, **fields})


def save(out, step, best=False, keep=3, **fields):
    """Write a checkpoint as a run does; returns the writer."""
    folder = os.path.join(out, "checkpoints")
    os.makedirs(folder, exist_ok=True)
    said = []
    writer = CheckpointWriter(folder, keep, said.append)
    writer.said = said
    writer.save(state(step=step, wall_seconds=1.0, **fields), best)
    writer.wait()
    return writer


def started(cfg, log, split=SPLIT, mean=MEAN):
    """Where a run of these settings and data starts."""
    return find_resume(new_state(cfg, split, mean), cfg, split, log)


def steps(out):
    return [step for step, _ in list_checkpoints(os.path.join(out, "checkpoints"))]


def flip(path):
    data = bytearray(open(path, "rb").read())
    data[len(data) // 2] ^= 1
    with open(path, "wb") as file:
        file.write(data)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(6))
def test_a_file_that_is_replaced_is_valid_at_every_moment(tmp_path, monkeypatch, moment):
    target = str(tmp_path / "step-00000001.pt")

    def put(text):
        (tmp_path / "new").write_bytes(text)
        put_in_place(str(tmp_path / "new"), hashlib.sha256(text).hexdigest(), target)

    put(b"old")
    left, replace, sync = [moment], os.replace, checkpoint.sync_folder

    def killed_in(call):
        def until(*arguments):
            if not left[0]:
                raise Killed
            left[0] -= 1
            call(*arguments)

        return until

    monkeypatch.setattr(os, "replace", killed_in(replace))
    monkeypatch.setattr(checkpoint, "sync_folder", killed_in(sync))
    if moment < 5:  # two renames of the digest, one of the file, two flushes
        with pytest.raises(Killed):
            put(b"new")
    else:
        put(b"new")
    monkeypatch.undo()
    assert fault(target) == ""
    assert (tmp_path / "step-00000001.pt").read_bytes() == (b"old" if moment < 3 else b"new")
    put(b"newest")
    assert fault(target) == "" and len(open(f"{target}.sha256").read().splitlines()) == 1


def test_a_checkpoint_of_an_older_version_is_read_and_damage_is_found(tmp_path):
    save(tmp_path, 7)
    path = str(tmp_path / "checkpoints" / "step-00000007.pt")
    (line,) = open(f"{path}.sha256").read().splitlines()  # as they have always been, and as sha256sum writes them
    assert line == f"{checkpoint.digest(path)}  step-00000007.pt" and checkpoint.load(path).step == 7
    older = {name: value for name, value in torch.load(path, weights_only=True).items() if name in OLDEST}
    torch.save(older, path)  # without a sha256 that fits: a file of its own
    os.unlink(f"{path}.sha256")
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.owed, loaded.best, loaded.by) == (7, False, -1, "")
    assert loaded.velocity.keys() == {"fc8.bias"} and loaded.classes == ["a", "b"]
    save(tmp_path, 7)
    flip(path)
    assert "does not match" in fault(path)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


def test_what_was_just_written_is_never_removed(tmp_path):
    for step in (800, 900, 1000):
        save(tmp_path, step)
    save(tmp_path, 600)
    assert steps(tmp_path) == [1000, 900, 800, 600]
    save(tmp_path, 700, keep=1)
    assert steps(tmp_path) == [1000, 900, 800, 700]


def test_going_on_from_an_earlier_step_leaves_the_later_ones_behind(tmp_path):
    save(tmp_path, 500)
    save(tmp_path, 1000, best=True)
    flip(tmp_path / "checkpoints" / "step-00001000.pt")
    log = Log(tmp_path)
    start = started(settings(tmp_path, "--checkpoint-keep", "1"), log)
    assert start.step == 500 and "step-00001000.pt" in log.lines[0]
    leave_behind(start, settings(log.out), log)
    assert "step-00001000.pt, best.pt" in log.lines[-1] and "set-aside" in log.lines[-1]
    assert start.best == -1  # the best network was of the part that was left
    assert steps(tmp_path) == [500] and len(log.lines) == 2
    save(tmp_path, 600, keep=1)
    assert newest_good(log.path("checkpoints"), log.warn).endswith("step-00000600.pt")
    assert {p.name for p in (tmp_path / "checkpoints" / "set-aside").glob("*.pt")} == {"step-00001000.pt", "best.pt"}


def test_a_best_network_of_an_earlier_step_still_counts(tmp_path):
    save(tmp_path, 500, best=True)
    save(tmp_path, 600)
    log = Log(tmp_path)
    start = started(settings(tmp_path), log)
    leave_behind(start, settings(log.out), log)
    assert (start.step, start.best, log.lines) == (600, 0.5, [])
    assert fault(str(tmp_path / "checkpoints" / "best.pt")) == ""


def test_a_best_file_that_cannot_be_written_does_not_make_the_checkpoint_bad(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError("no links, no space")

    monkeypatch.setattr(os, "link", fails)
    monkeypatch.setattr(checkpoint.shutil, "copyfile", fails)
    writer = save(tmp_path, 5, best=True)
    assert not writer.last_failed and writer.failures == 1 and "step 5 is saved, but best.pt" in writer.said[0]
    assert checkpoint.load(newest_good(str(tmp_path / "checkpoints"), print)).step == 5
    monkeypatch.setattr(checkpoint, "put_in_place", fails)
    writer = save(tmp_path, 6)
    assert writer.last_failed and writer.failures == 1 and steps(tmp_path) == [5]


@pytest.mark.parametrize("resume", ["file", "none"])
def test_an_explicit_start_holds_until_the_run_has_a_checkpoint_of_its_own(tmp_path, resume):
    save(tmp_path / "other", 40)
    path = str(tmp_path / "other" / "checkpoints" / "step-00000040.pt") if resume == "file" else "none"
    out = tmp_path / "run"
    for _ in range(2):  # the second time after a kill before the first checkpoint
        log = Log(out)
        start = started(settings(out, "--resume", path), log)
        leave_behind(start, settings(log.out), log)
        assert (start.step, log.lines) == (40 if resume == "file" else 0, [])
        assert start.best == -1  # the other run's best.pt is not here
    save(out, 50)
    start = started(settings(out, "--resume", path), log)
    assert start.step == 50
    (line,) = log.lines
    assert f"--resume {path} is for the start of a run" in line and str(out) in line and "step-00000050.pt" in line


def test_starting_anew_asks_for_a_directory_without_checkpoints_of_other_settings(tmp_path):
    log = Log(tmp_path)
    leave_behind(started(settings(tmp_path), log), settings(tmp_path), log)
    with pytest.raises(InputError, match="--seed 1, not 2"):
        started(settings(tmp_path, "--seed", "2"), log)
    assert started(settings(tmp_path, "--seed", "2", "--resume", "none"), log).step == 0
    save(tmp_path, 5)
    with pytest.raises(InputError, match="--seed 1, not 3"):
        (tmp_path / "config.yaml").unlink()
        started(settings(tmp_path, "--seed", "3", "--resume", "none"), log)


def resume_with(tmp_path, split=SPLIT, mean=MEAN, **written):
    save(tmp_path, 5, **written)
    log = Log(tmp_path)
    started(settings(tmp_path), log, split, mean)
    return log.lines


def changed(**fields):
    shards = (SHARDS[0], dataclasses.replace(SHARDS[1], **fields), SHARDS[2])
    return dataclasses.replace(SPLIT, shards=shards)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (changed(sha256="f" * 64), "train-000001.tar has another content"),
        (changed(sha256="", filesize=999), "train-000001.tar has another content"),
        (changed(nsamples=99), "numbers of samples differ"),
        (changed(url="train-000009.tar"), "names or numbers"),
        (dataclasses.replace(SPLIT, shards=SHARDS[:2]), "names or numbers"),
        (dataclasses.replace(SPLIT, labels_sha256="2" * 64), "train.labels.npy has another content"),
    ],
)
def test_shards_of_other_content_are_refused(tmp_path, split, words):
    with pytest.raises(InputError, match=words):
        resume_with(tmp_path, split)


def test_shards_that_were_moved_are_the_same_and_another_mean_image_is_not(tmp_path):
    moved = tuple(dataclasses.replace(shard, url=f"/elsewhere/{shard.url}") for shard in SHARDS)
    assert resume_with(tmp_path / "a", dataclasses.replace(SPLIT, root="/elsewhere", shards=moved)) == []
    with pytest.raises(InputError, match="the mean image differs"):
        resume_with(tmp_path / "b", mean=MEAN + 1)


def test_an_index_or_an_older_checkpoint_without_digests_is_accepted_and_reported(tmp_path):
    bare = dataclasses.replace(SPLIT, shards=tuple(dataclasses.replace(shard, sha256="") for shard in SHARDS))
    (line,) = resume_with(tmp_path / "index", bare)
    assert "train.json of /data has no sha256 of the shards" in line
    (line,) = resume_with(tmp_path / "old", content=[])
    assert "step-00000005.pt has no sha256 of the shards" in line


@pytest.mark.parametrize(
    ("schedule", "name", "value", "allowed"),
    [
        ("step", "epochs", 9, True),
        ("constant", "epochs", 9, True),
        ("cosine", "epochs", 9, False),
        ("poly", "epochs", 9, False),
        ("cosine", "max-steps", 9, True),
        ("cosine", "checkpoint-every", 9, True),
        ("step", "average-every", 9, False),
    ],
)
def test_a_setting_may_change_only_if_it_changes_nothing_that_is_computed(schedule, name, value, allowed):
    before = {**config.to_flat(config.Config()), "optim.schedule": schedule}
    after = {**before, name: value}
    if allowed:
        same_settings(after, before, "run")
    else:
        with pytest.raises(InputError, match=f"run is a run with --{name} {before[name]}, not 9"):
            same_settings(after, before, "run")


def test_settings_of_another_version_are_one_line_or_their_defaults(tmp_path):
    ours = config.to_flat(config.Config())
    older = {name: value for name, value in ours.items() if name != "data.window"}
    same_settings(ours, older, "run")
    with pytest.raises(InputError, match="--data.window 1024, not 8"):
        same_settings({**ours, "data.window": 8}, older, "run")
    for wrong in ({**ours, "sharpness": 1}, {**ours, "global-batch": "many"}, None):
        save(tmp_path, 5, **{"config": wrong})
        with pytest.raises(InputError, match="step-00000005.pt.* (setting 'sharpness'|global-batch is|no settings)"):
            checkpoint.load(str(tmp_path / "checkpoints" / "step-00000005.pt"))


def test_weights_that_do_not_fit_the_settings_are_one_line():
    cfg = settings("run", "--recipe", "demo", "--model.width", "0.0625", "--model.classes", "3")
    with pytest.raises(InputError, match="x.pt holds the weights of another network") as error:
        checkpoint.network(state(cfg), "x.pt")
    assert "\n" not in str(error.value)


def test_a_state_is_kept_only_after_an_average_which_is_made_once(monkeypatch):
    averages = []
    fake = types.SimpleNamespace(
        size=lambda: 3, Average=None, allreduce_=lambda *_, **__: averages.append(1), grouped_allreduce_=None
    )
    monkeypatch.setattr(parallel, "hvd", fake)
    model = torch.nn.Linear(2, 2)
    optimizer = MomentumSGD(parameter_groups(model, config.Optim()), 0.1, 0.9)
    strategy = parallel.Weights(model, optimizer, every=2)
    counts = []
    for step in range(4):
        strategy.make_equal()  # where nothing has changed since the last average, this is none
        strategy.after_update(step)
        counts.append(len(averages))
    assert counts == [0, 2, 2, 4]


def test_ranks_that_are_lost_again_and_again_at_one_step_end_the_job(monkeypatch):
    """An error that every attempt meets again is no lost host; one that a commit came after is."""
    from job.ranks import elastic
    from job.ranks.process import Failed

    monkeypatch.setattr(elastic.heartbeat, "ELASTIC", True)
    monkeypatch.setattr(elastic.heartbeat, "forget", lambda: None)
    monkeypatch.setattr(elastic, "notification_manager", types.SimpleNamespace(init=int, register_listener=str))
    monkeypatch.setattr(elastic, "_find_each_other", lambda: None)
    fake = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0, broadcast_object=lambda value, name: value)
    monkeypatch.setattr(elastic, "hvd", fake)
    calls = []

    def train(config, memory):
        assert memory._every == 56  # --commit-every 50, where the ranks are equal
        calls.append(memory.step)
        if len(calls) < 8:  # hosts that go, while the run gets on
            memory.state = RunState(step=50 * len(calls))
        raise elastic.HorovodInternalError("the same error\nas before")

    cfg = settings("run", "--parallel", "weights", "--average-every", "7")
    with pytest.raises(Failed, match=f"lost {elastic.MOST_LOSSES} times after step 350.*: the same error as before"):
        elastic.run_elastic(train, cfg)
    assert calls[:8] == [0, 50, 100, 150, 200, 250, 300, 350] and len(calls) == 7 + elastic.MOST_LOSSES - 1
    memory = elastic.Memory(56)
    assert [step for step in range(7, 120) if memory.due(step, 7)] == [7, 56, 112]


def test_a_trace_that_cannot_be_written_is_reported_and_does_not_end_training(tmp_path):
    from job.run.log import RunLog
    from job.run.timing import Trace

    log = RunLog(str(tmp_path / "run"), active=True)
    for folder, failures in ((tmp_path, 0), (tmp_path / "no such folder", 1)):
        trace = Trace(str(folder / "profile.json"), 0, 1, log.attempt)
        for step in range(5):
            trace.before(step)
        trace.close()
        assert log.failures == failures
    assert (tmp_path / "profile.json").stat().st_size > 100


def test_settings_that_cannot_be_written_do_not_end_training(tmp_path, monkeypatch):
    from job.run.log import RunLog

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(config, "write_yaml", full)
    log = RunLog(str(tmp_path / "run"), active=True)
    leave_behind(started(settings(tmp_path / "run"), log), settings(tmp_path / "run"), log)
    assert log.failures == 1
