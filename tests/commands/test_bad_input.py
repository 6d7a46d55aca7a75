"""Mistakes end in one line `error: ...` and exit code 2, once for all ranks, with nothing lost."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from shards.command import Parser
from shards.errors import InputError
from tests.launch import ROOT, error_lines, horovodrun, python

SMALL = ["--recipe", "demo", "--model.width", "0.125", "--max-steps", "4", "--eval-every", "0", "--workers", "1"]


def fails(done, *words, code=2):
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert "Traceback" not in text, text
    errors = error_lines(done)
    assert len(errors) == 1, text
    for word in words:
        assert str(word) in errors[0], errors[0]


def train(ranks, data, out, *options, gloo=False):
    arguments = ["job.train", *SMALL, "--data", str(data), "--out", str(out), *options]
    return horovodrun(ranks, *arguments, gloo=gloo) if ranks else python(*arguments)


@pytest.fixture
def copied(demo_data, tmp_path):
    return shutil.copytree(demo_data, tmp_path / "data")


def edit(data, change, split="train"):
    path = data / f"{split}.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("gloo", [False, True])
def test_no_such_data_folder(tmp_path, gloo):
    fails(train(2, tmp_path / "nowhere", tmp_path / "run", gloo=gloo), "no data folder", tmp_path / "nowhere")


def test_no_shards_for_the_split(copied, tmp_path):
    for path in copied.glob("val*"):
        path.unlink()
    fails(train(0, copied, tmp_path / "run", "--eval-every", "1"), "no shards of split 'val'", copied)


def test_an_index_that_does_not_match_the_tar(copied, tmp_path):
    shard = sorted(copied.glob("train-*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[1024:])
    fails(train(2, copied, tmp_path / "run", "--max-steps", "60"), shard.name)


def test_a_shard_that_is_missing(copied, tmp_path):
    shard = sorted(copied.glob("train-*.tar"))[0]
    shard.unlink()
    fails(train(0, copied, tmp_path / "run", "--max-steps", "60"), shard.name)


def test_labels_outside_the_classes(copied, tmp_path):
    edit(copied, lambda fields: fields.update(classes=fields["classes"][:7]))
    edit(copied, lambda fields: fields.update(classes=fields["classes"][:7]), "val")
    fails(train(0, copied, tmp_path / "run", "--max-steps", "60"), "label", "7")


def test_a_batch_that_the_ranks_do_not_divide(demo_data, tmp_path):
    fails(train(2, demo_data, tmp_path / "run", "--global-batch", "33"), "33", "2 ranks", "32 or 34")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epoch", "3"], ["--epoch", "did you mean --epochs?"]),
        (["--recipe", "dmo"], ["'dmo'", "did you mean demo?"]),
        (["--image-size", "99"], ["99"]),  # larger than the stored images
        (["--device", "cuda"], ["--device cuda"]),
    ],
)
def test_wrong_options(demo_data, tmp_path, options, words):
    import torch

    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    fails(train(2, demo_data, tmp_path / "run", *options), *words)


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_read(demo_data, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    fails(train(2, demo_data, tmp_path / "run", "--resume", str(tmp_path / "broken.pt")), "broken.pt", "checkpoint")
    fails(train(0, demo_data, tmp_path / "run", "--resume", str(tmp_path / "none.pt")), "no checkpoint", "none.pt")
    fails(python("job.evaluate", str(tmp_path / "broken.pt"), "--data", str(demo_data)), "broken.pt")
    fails(python("job.evaluate", str(tmp_path), "--data", str(demo_data)), "no checkpoint in")


@pytest.mark.long
def test_a_run_directory_of_another_configuration(demo_data, tmp_path):
    assert train(0, demo_data, tmp_path / "run").returncode == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.name != ".lock")
    fails(train(2, demo_data, tmp_path / "run", "--optim.lr", "0.5"), "--optim.lr 0.03, not 0.5", "another --out")
    fails(train(0, demo_data, tmp_path / "run", "--resume", "none"), "holds a finished run already")
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.name != ".lock")


def test_a_run_directory_that_cannot_be_made(demo_data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(train(2, demo_data, tmp_path / "file" / "run"), "cannot write the run directory", tmp_path / "file")


@pytest.mark.parametrize("gloo", [False, True])
def test_a_rank_that_raises_ends_the_job_with_its_error_shown_once(tmp_path, gloo):
    script = tmp_path / "failing.py"
    script.write_text(
        "import horovod.torch as hvd, torch\n"
        "from job.ranks.process import run_ranks\n"
        "def main():\n"
        "    for step in range(1000):\n"
        "        hvd.allreduce(torch.ones(3), name='x')\n"
        "        if step == 5 and hvd.rank() == 1: raise RuntimeError('the disk is on fire')\n"
        "run_ranks(main)\n"
    )
    done = horovodrun(2, "failing", gloo=gloo, timeout=60, env={"PYTHONPATH": f"{tmp_path}:."})
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert text.count("RuntimeError: the disk is on fire") == 1 and "rank 1 on" in text
    assert len(error_lines(done)) == 1, text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bench"], "unknown option --bench "),
        (["--rezise=9", "a", "b"], "unknown option --rezise=9; did you mean --resize?"),
        (["a"], "required: DEST"),
        (["a", "b", "c"], "unknown argument c"),
        (["--resize", "--", "a"], "--resize: expected one argument"),
    ],
)
def test_an_option_that_is_not_there_is_named_before_what_is_missing(words, message):
    parser = Parser(prog="pack")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("dest", metavar="DEST")
    parser.add_argument("--resize", type=int)
    with pytest.raises(InputError, match=re.escape(message)):
        parser.parse_args(words)
    assert parser.parse_args(["--resize=3", "--", "--a", "b"]).source == "--a"


COMMANDS = [
    "job.train --data DIR",
    "job.evaluate RUN --data DIR",
    "job.export RUN --format onnx --out net.onnx",
    "job.bench compute",
    "job.bench loader --data DIR",
    "job.scaling run --data DIR --np 1",
    "shards.pack SOURCE DIR",
    "shards.verify DIR",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_python_without_the_packages_is_named(command, demo_data, tmp_path):
    """As when the environment was not activated. `-S`: Python without what is installed."""
    given = {"DIR": demo_data, "SOURCE": demo_data, "RUN": tmp_path}
    words = [str(given.get(word, word)) for word in command.split()]
    alone = [sys.executable, "-S", "-m"]
    done = subprocess.run([*alone, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    fails(done, "is not installed for", sys.executable, "slurm/install.sh", "slurm/activate.sh")
    helped = subprocess.run([*alone, words[0], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0 and "usage" in helped.stdout, helped.stderr
