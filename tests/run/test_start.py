"""A run that begins with weights from a file: which files are taken, what of them, and what stays as it is."""

import dataclasses
import os
import pickle
import re

import pytest
import torch

from job import config
from job.export import export_safetensors
from job.network.alexnet import build
from job.network.torchvision import to_torchvision
from job.network.weights import begin_with, read_weights
from job.run import checkpoint
from job.run.checkpoint import RunState
from job.run.resume import find_resume, first_state, remember_start
from shards.errors import InputError
from shards.format.split import Shard, Split
from tests.launch import error_lines, horovodrun, metrics, python
from tests.runlog import Log

SMALL = "--recipe demo --model.width 0.0625 --data d".split()
NORMALISED = ["--model.lrn", "none", "--model.batch-norm", "true"]
COLUMN = [*SMALL, "--model.layout", "torchvision", "--model.lrn", "none"]
SPLIT = Split("train", "/data", (Shard("train-000000.tar", 10, 1000, "0" * 64),), classes=("a", "b", "c"))


def settings(*options, classes=3):
    return config.with_classes(config.parse([*options], "job.train", ""), classes)


def saved(path, cfg, classes=("a", "b", "c"), **fields):
    """A checkpoint as a run of these settings leaves it, with weights of its own. Returns its state."""
    model = build(dataclasses.replace(cfg, seed=99)).state_dict()
    state = RunState(
        step=7,
        model=model,
        velocity=model,
        config=config.to_flat(cfg),
        classes=list(classes),
        mean=torch.zeros(3, 67, 67),
    )
    torch.save({"format": checkpoint.FORMAT, **vars(state), **fields}, path)
    return state


def begun(path, cfg, classes=("a", "b", "c")):
    """The state dict that a run begins with, and what it says."""
    return begin_with(read_weights(str(path)), cfg, classes)


def same(one, other, start=""):
    names = [name for name in one if name.startswith(start)]
    return bool(names) and all(torch.equal(one[name], other[name]) for name in names)


# Which files are taken.


@pytest.mark.parametrize("kind", ["checkpoint", "export", "torchvision", "old torchvision", "safetensors"])
def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path, kind):
    path, cfg = tmp_path / "weights.txt", settings(*(SMALL if kind in ("checkpoint", "export") else COLUMN))
    state = saved(path, cfg)
    if kind == "export":
        pytest.importorskip("safetensors")
        model = build(cfg)
        model.load_state_dict(state.model)
        export_safetensors(state, model, str(path))
    elif "torchvision" in kind:
        torch.save(to_torchvision(state.model), path, _use_new_zipfile_serialization=kind == "torchvision")
    elif kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(to_torchvision(state.model), str(path))
    found, text = begun(path, cfg)
    assert same(state.model, found) and found.keys() == state.model.keys()
    assert "fc8 too: " in text and ("without names" in text) == (kind not in ("checkpoint", "export"))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read .*: No such file"),
        (b"", "cannot be read as weights"),
        (b"The weights are elsewhere.\n", "cannot be read as weights"),
        (b"\xff" * 8 + b"{" + b"x" * 90, "cannot be read as weights"),  # a safetensors header of 2^64 bytes
        (pickle.dumps(Attack(), 2), "it is damaged, or holds more than tensors"),
        ([1, 2], "holds a list, no weights"),
        ({}, "is of another network"),
        ({"layer1.0.weight": torch.ones(2)}, "is of another network: it has layer1.0.weight"),
        ({"fc8.weight": "text"}, "fc8.weight is not a dense tensor"),
        ({"model": {"fc8.weight": torch.ones(2, 2)}, "config": {"no-such": 1}, "step": 1}, "a setting 'no-such'"),
        ({"model": 1, "config": {}, "step": 1}, "cannot be read as weights"),
    ],
)
def test_a_file_of_anything_else_is_one_line_and_runs_no_code(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=words) as error:
        read_weights(str(path))
    assert "\n" not in str(error.value) and not (tmp_path / "attacked").exists()


def test_damaged_weights_are_refused(tmp_path):
    cfg, path = settings(*SMALL), tmp_path / "file.pt"
    state = saved(path, cfg)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(str(path))
    state.model["fc6.bias"][3] = float("nan")
    torch.save({"format": 1, **vars(state)}, path)
    with pytest.raises(InputError, match="not finite, in fc6.bias"):
        read_weights(str(path))
    with pytest.raises(InputError, match="it is not a file|is a folder"):
        read_weights(str(tmp_path))
    # One that lies beside its sha256 must match it, as for --resume.
    saved(path, cfg)
    (tmp_path / "file.pt.sha256").write_text(f"{'0' * 64}  file.pt\n")
    new = RunState(config=config.to_flat(cfg), classes=["a", "b", "c"])
    with pytest.raises(InputError, match="its sha256 does not match.*give another --init"):
        first_state(new, dataclasses.replace(cfg, init=str(path)), Log(tmp_path))


# What of them.


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("abc", "abc", "fc8 too: the same 3 classes"),
        ("abc", "cab", "fc8 too: .* order of here"),
        ("abc", "abd", "fc8 begins anew: .*'d' is not among those there"),
        ("abc", "ab", "fc8 begins anew: 3 classes there, 2 here"),
        ("abc", "abcd", "fc8 begins anew: 3 classes there, 4 here"),
        ("abc", "", "fc8 too: 3 classes .* same order, without names"),
        ("aab", "aba", "fc8 begins anew"),  # names that do not tell classes apart
    ],
)
def test_the_last_layer_is_taken_over_where_the_classes_are_the_same(tmp_path, theirs, ours, words):
    state = saved(tmp_path / "w", settings(*SMALL, classes=len(theirs)), theirs)
    cfg = settings(*SMALL, classes=len(ours) or len(theirs))
    found, text = begun(tmp_path / "w", cfg, tuple(ours))
    assert re.search(words, text), text
    assert all(same(state.model, found, layer) for layer in ("conv", "fc6", "fc7"))
    if "anew" in words:
        assert same(build(cfg).state_dict(), found, "fc8")
    else:
        rows = [theirs.index(name) for name in ours or theirs]
        assert torch.equal(found["fc8.weight"], state.model["fc8.weight"][rows])
        assert torch.equal(found["fc8.bias"], state.model["fc8.bias"][rows])


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (["--model.width", "0.125"], [], "its conv1.weight is 12x3.*, this run's is 6x3.*; give --model.width 0.125,"),
        (["--image-size", "99"], [], "its fc6.weight is .*; give --image-size 99,"),
        (NORMALISED, [], "no conv1.bias, this run's has one.*--model.lrn none --model.batch-norm true"),
        ([], ["--model.batch-norm", "true"], "no norm1.weight, this run's has one; give --model.batch-norm false"),
        (["--model.lrn", "before-pool"], [], "normalises otherwise after conv1.*; give --model.lrn before-pool"),
        (COLUMN, [], "conv1.weight is .*; give --model.layout torchvision --model.lrn none"),
        ([], COLUMN, "conv1.weight is .*; give --model.layout alexnet --model.lrn after-pool"),
    ],
)  # fmt: skip
def test_weights_of_another_network_name_the_layer_and_the_way_out(tmp_path, theirs, ours, words):
    saved(tmp_path / "w", settings(*SMALL, *theirs))
    with pytest.raises(InputError, match=words) as error:
        begun(tmp_path / "w", settings(*SMALL, *ours))
    assert "\n" not in str(error.value)
    if theirs == COLUMN:
        torch.save(to_torchvision(torch.load(tmp_path / "w")["model"]), tmp_path / "w")
        with pytest.raises(InputError, match="torchvision's AlexNet, is of another network.*use --recipe torchvision"):
            begun(tmp_path / "w", settings(*SMALL))


def test_half_precision_becomes_single(tmp_path):
    state = saved(tmp_path / "w", settings(*COLUMN))
    torch.save({name: tensor.half() for name, tensor in to_torchvision(state.model).items()}, tmp_path / "w")
    found, _ = begun(tmp_path / "w", settings(*COLUMN))
    assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in state.model.items())


# When: at step 0 only.


def test_a_run_that_has_begun_keeps_to_its_beginning(tmp_path):
    saved(tmp_path / "w", settings(*SMALL))
    log, cfg = Log(tmp_path / "run"), settings(*SMALL, "--init", str(tmp_path / "w"), "--out", str(tmp_path / "run"))

    def start(cfg):
        new = RunState(config=config.to_flat(cfg), classes=["a", "b", "c"], mean=torch.zeros(3, 67, 67))
        state = find_resume(new, cfg, SPLIT, log)
        remember_start(state, new, cfg)
        return state, new

    state, new = start(cfg)
    assert state.step == 0 and not state.velocity and new.init["sha256"] == checkpoint.digest(str(tmp_path / "w"))
    assert new.init["file"] == cfg.init == new.config["init"] == str(tmp_path / "w")
    assert len(log.lines) == 1 and "conv1 to fc7 taken over, fc8 too" in log.lines.pop()
    writer = checkpoint.CheckpointWriter(log.path("checkpoints"), 1, log.warn)
    writer.save(dataclasses.replace(new, step=5, model=state.model, velocity={}), best=False)
    writer.wait()
    (tmp_path / "w").unlink()  # it is not needed any more
    for given, said in ((str(tmp_path / "w"), 0), ("", 0), ("other", 1)):
        again = dataclasses.replace(cfg, init=given)
        state, new = start(again)
        assert state.step == 5 and again.init == new.config["init"] == new.init["file"] == str(tmp_path / "w")
        warnings = [line for line in log.lines if "--init other is for the start of a run" in line]
        assert len(warnings) == said
    with pytest.raises(InputError, match="--init and --resume FILE both"):
        config.parse([*SMALL, "--init", "a", "--resume", "b"], "job.train", "")


# The command.

RUN = ["--recipe", "demo", "--model.width", "0.125", "--global-batch", "32", "--workers", "1", "--log-every", "1"]


def train(ranks, data, out, *options, expect=0):
    arguments = ["job.train", *RUN, "--data", str(data), "--out", str(out), *options]
    done = horovodrun(ranks, *arguments) if ranks else python(*arguments)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def newest(run):
    return checkpoint.load_named(str(run))[1]


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    """A run of a few steps with batch normalisation."""
    out = tmp_path_factory.mktemp("start") / "run"
    train(0, demo_data, out, *NORMALISED, "--max-steps", "5")
    return out


def test_a_run_begins_where_the_weights_are(demo_data, trained, tmp_path):
    still = ["--optim.lr", "0", "--max-steps", "1", "--freeze", "conv"]
    done = train(0, demo_data, tmp_path / "run", *NORMALISED, "--init", str(trained), *still)
    assert done.stdout.count("taken over") == 1 and "fc8 too: the same 10 classes" in done.stdout
    assert metrics(tmp_path / "run", "val")[-1]["loss"] == metrics(trained, "val")[-1]["loss"]
    (event,) = [line for line in metrics(tmp_path / "run", "event") if line["event"] == "start"]
    assert event["init_sha256"] == checkpoint.digest(event["init"]) and event["init"].startswith(str(trained))
    assert newest(tmp_path / "run").config["init"] == str(trained)
    assert config.read_flat(str(tmp_path / "run" / "config.yaml"))["init"] == str(trained)


FROZEN = [*NORMALISED, "--freeze", "conv", "--global-batch", "33", "--max-steps", "4", "--eval-every", "0"]


@pytest.fixture(scope="module")
def frozen_alone(demo_data, trained, tmp_path_factory):
    """Losses of one rank whose convolutions are frozen."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    train(0, demo_data, out, *FROZEN, "--init", str(trained))
    return [line["loss"] for line in metrics(out, "train")]


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["gradients", "weights", "hybrid"])
def test_frozen_convolutions_keep_every_bit_on_three_ranks(demo_data, trained, frozen_alone, tmp_path, parallel):
    """Also the running statistics of batch normalisation, whose average over three ranks could round them."""
    train(3, demo_data, tmp_path / "run", *FROZEN, "--init", str(trained), "--parallel", parallel)
    before, after = newest(trained), newest(tmp_path / "run")
    for layer in ("conv", "norm"):
        assert same(before.model, after.model, layer)
    assert not any(torch.equal(before.model[name], after.model[name]) for name in after.velocity)
    assert set(after.velocity) == {f"fc{i}.{kind}" for i in (6, 7, 8) for kind in ("weight", "bias")}
    losses = [line["loss"] for line in metrics(tmp_path / "run", "train")]
    assert losses == pytest.approx(frozen_alone, rel=2e-5) and len(losses) == 4


def test_a_file_that_does_not_fit_ends_all_ranks_with_one_line_and_leaves_nothing(demo_data, trained, tmp_path):
    done = train(2, demo_data, tmp_path / "run", "--init", str(trained), expect=2)
    (line,) = error_lines(done)
    assert "is of another network" in line and "--model.batch-norm true" in line
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "run" / "config.yaml").exists()
