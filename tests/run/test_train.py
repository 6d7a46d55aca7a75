"""Training under horovodrun: the same result on any number of ranks, with either strategy, resumed or not."""

import bisect
import itertools
import json
import shutil

import pytest
import torch
import yaml

from job.run.checkpoint import digest
from shards.format.split import image_member, load_split, read_idx
from tests.launch import error_lines, horovodrun, metrics, python
from tests.shardmaker import damage

# A network small enough for many runs on two cores; everything else is as in real training.
SMALL = ["--recipe", "demo", "--model.width", "0.125", "--model.dropout", "0", "--log-every", "1", "--workers", "1"]


def train(ranks, data, out, *options, gloo=False, expect=0, **kwargs):
    arguments = ["job.train", *SMALL, "--data", str(data), "--out", str(out), *options]
    done = horovodrun(ranks, *arguments, gloo=gloo, **kwargs) if ranks else python(*arguments, **kwargs)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def losses(run):
    return [line["loss"] for line in metrics(run, "train")]


def weights(run):
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    return torch.load(newest, weights_only=True)


FIFTY_STEPS = ["--max-steps", "50", "--global-batch", "64", "--eval-every", "0"]


@pytest.fixture(scope="module")
def one_rank(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train(0, demo_data, out, *FIFTY_STEPS)
    return out


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "gloo"), [(2, False), (4, False), (2, True), (4, True)])
def test_any_number_of_ranks_gives_the_same_losses(demo_data, tmp_path, one_rank, ranks, gloo):
    train(ranks, demo_data, tmp_path / "run", *FIFTY_STEPS, gloo=gloo)
    assert len(losses(one_rank)) == 50
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=2e-5)
    right = [[round(64 * line["top1"]) for line in metrics(run, "train")] for run in (tmp_path / "run", one_rank)]
    assert right[0] == pytest.approx(right[1], abs=1) and max(right[0]) > 6  # two scores may be equal


@pytest.mark.long
def test_averaged_weights_equal_averaged_gradients(demo_data, tmp_path):
    for strategy in ("gradients", "weights"):
        train(2, demo_data, tmp_path / strategy, *FIFTY_STEPS, "--parallel", strategy)
    by_gradients, by_weights = weights(tmp_path / "gradients"), weights(tmp_path / "weights")
    for part in ("model", "velocity"):
        for name, tensor in by_gradients[part].items():
            scale = tensor.abs().max()
            torch.testing.assert_close(by_weights[part][name] / scale, tensor / scale, rtol=0, atol=1e-4)
    assert losses(tmp_path / "weights") == pytest.approx(losses(tmp_path / "gradients"), rel=2e-5)


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_gradients_that_are_handed_in_are_averaged_where_they_lie(wire):
    done = horovodrun(2, "tests.handed_gradients", wire)
    assert done.returncode == 0 and "averaged" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs")
@pytest.mark.parametrize("strategy", ["gradients", "weights", "hybrid"])
def test_two_gpus_train_as_one_does(demo_data, tmp_path, strategy):
    options = [*FIFTY_STEPS, "--device", "cuda", "--deterministic", "true", "--parallel", strategy]
    for ranks in (1, 2):
        train(ranks, demo_data, tmp_path / str(ranks), *options)
    one, two = (losses(tmp_path / str(ranks))[2:] for ranks in (1, 2))  # a loss is read two steps late
    assert two == pytest.approx(one, rel=1e-3)


def test_half_precision_on_the_wire_gives_nearly_the_same_losses(demo_data, tmp_path, one_rank):
    train(2, demo_data, tmp_path / "half", *FIFTY_STEPS, "--wire", "fp16")
    assert losses(tmp_path / "half") == pytest.approx(losses(one_rank), rel=1e-2)
    assert losses(tmp_path / "half") != pytest.approx(losses(one_rank), rel=1e-7)


@pytest.mark.long
def test_eight_ranks_train_and_validate(demo_data, tmp_path):
    done = train(8, demo_data, tmp_path / "run", "--max-steps", "6", "--global-batch", "64", timeout=300)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 8 and summary["status"] == "done"
    assert metrics(tmp_path / "run", "val")[-1]["samples"] == 600
    assert "run directory" in done.stdout


@pytest.mark.long
def test_a_run_directory_holds_what_the_contract_names(demo_data, tmp_path):
    out = tmp_path / "run"
    train(2, demo_data, out, "--epochs", "1", "--checkpoint-every", "40", "--checkpoint-keep", "2")
    assert yaml.safe_load((out / "config.yaml").read_text())["model.classes"] == 10
    assert list((out / "tensorboard").iterdir())
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {f"{n}.pt{s}" for n in ("step-00000080", "step-00000094", "best") for s in ("", ".sha256")}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 94 and summary["samples"] == 94 * 32
    for name in ("top1", "top5", "loss", "epochs", "images_per_second", "data_wait_fraction", "wall_seconds"):
        assert isinstance(summary[name], float), name
    assert 0 <= summary["top1"] <= summary["top5"] <= 1 and 0 <= summary["data_wait_fraction"] <= 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "val", "event"}
    assert all({"kind", "step", "epoch", "time"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 95))

    # job.evaluate gives the figures of the last validation.
    done = horovodrun(2, "job.evaluate", str(out), "--data", str(demo_data), "--json")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    for name in ("top1", "top5", "loss"):
        assert found[name] == summary[name]
    done = python("job.evaluate", str(out / "checkpoints" / "best.pt"), "--data", str(demo_data), "--json")
    alone = json.loads(done.stdout)
    assert alone["samples"] == 600 and alone["top1"] == pytest.approx(summary["top1"], abs=2 / 600)
    assert alone["loss"] == pytest.approx(summary["loss"], rel=1e-5)

    # The same command again finds the run finished and changes nothing.
    before = (out / "metrics.jsonl").read_text()
    again = train(2, demo_data, out, "--epochs", "1", "--checkpoint-every", "40", "--checkpoint-keep", "2")
    assert "is finished" in again.stdout and (out / "metrics.jsonl").read_text() == before


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["gradients", "weights"])
def test_a_resumed_run_has_the_same_bits_as_an_undisturbed_one(demo_data, tmp_path, strategy):
    """Also with averages every few steps, which checkpoints and validations must not add to."""
    options = ["--global-batch", "64", "--parallel", strategy, "--model.dropout", "0.5"]
    options += ["--average-every", "4"] if strategy == "weights" else []
    train(2, demo_data, tmp_path / "whole", *options, "--max-steps", "30", "--eval-every", "0")
    parts = [*options, "--checkpoint-every", "5", "--eval-every", "1"]
    train(2, demo_data, tmp_path / "parts", *parts, "--max-steps", "16")
    train(2, demo_data, tmp_path / "parts", *parts, "--max-steps", "30")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for part in ("model", "velocity"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])


@pytest.mark.long
def test_resume_passes_over_a_damaged_checkpoint_and_says_so(demo_data, tmp_path):
    out = tmp_path / "run"
    options = ["--eval-every", "0", "--checkpoint-every", "5"]
    train(1, demo_data, out, *options, "--max-steps", "10")
    expected = losses(out)
    newest = out / "checkpoints" / "step-00000010.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    before = out / "checkpoints" / "step-00000005.pt"
    torch.save({**torch.load(before, weights_only=True), "by": "fast kernels on cuda"}, before)
    before.with_suffix(".pt.sha256").write_text(digest(str(before)))
    done = train(1, demo_data, out, *options, "--max-steps", "10")
    assert "passed over the checkpoint" in done.stderr and "step-00000010.pt" in done.stderr
    assert "moved step-00000010.pt to" in done.stderr
    assert "computed by fast kernels on cuda, the next are by plain kernels on cpu" in done.stderr
    assert losses(out) == expected


def test_bfloat16_trains_on_the_cpu(demo_data, tmp_path):
    train(0, demo_data, tmp_path / "run", "--precision", "bf16", "--max-steps", "4", "--eval-every", "0")
    assert all(1 < loss < 4 for loss in losses(tmp_path / "run"))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(demo_data, tmp_path):
    options = ["--max-steps", "60", "--eval-every", "0", "--checkpoint-every", "2", "--optim.warmup-epochs", "0"]
    done = train(2, demo_data, tmp_path / "run", *options, "--optim.lr", "1e6", expect=1)
    assert len(error_lines(done)) == 1 and "the loss is" in error_lines(done)[0]
    assert "Traceback" not in done.stdout + done.stderr
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        state = torch.load(checkpoint, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize(("name", "bad", "limit"), [("train", range(0, 3000, 400), 6), ("val", (10, 301), 1)])
def test_unusable_samples_of_all_ranks_count_together(demo_data, tmp_path, name, bad, limit):
    """Neither rank alone meets more than are allowed; together they do, and all end with one line."""
    data = tmp_path / "data"
    shutil.copytree(demo_data, data)
    split = load_split(str(data), name)
    ends = list(itertools.accumulate(shard.nsamples for shard in split.shards))
    for sample in bad:
        shard = bisect.bisect_right(ends, sample)
        inside = sample - (ends[shard] - split.shards[shard].nsamples)
        image = image_member(read_idx(split, split.shards[shard])[inside], split.encoding)
        damage(split, shard, image.offset, bytes(100))
    steps = ["--max-steps", "94" if name == "train" else "2"]
    fraction = ["--data.max-bad-fraction", str(limit / split.nsamples)]
    done = train(2, data, tmp_path / "run", *steps, *fraction, expect=2)
    (line,) = error_lines(done)
    assert f"{limit + 1} of the {split.nsamples} samples of {name} cannot be used" in line and "rank" not in line
