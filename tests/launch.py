"""Start commands of the project as a user would, with a time limit that leaves nothing behind."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

_KEPT: list[Any] = []
ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, timeout: float = 120, env: dict[str, str] | None = None, cwd: Path = ROOT):
    """Run a command in a session of its own; past `timeout` seconds the whole of it is killed and the test fails."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{command} did not end in {timeout} s\n{out}\n{err}") from None
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def python(*arguments: str, **options):
    """`python -m ...` in the tests' own environment."""
    return run(sys.executable, "-m", *arguments, **options)


def horovodrun(ranks: int, *arguments: str, gloo: bool = False, **options):
    """`horovodrun -np RANKS python -m ...`, over MPI or Gloo."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    controller = ["--gloo"] if gloo else []
    return run(launcher, "-np", str(ranks), *controller, sys.executable, "-m", *arguments, **options)


def error_lines(done: subprocess.CompletedProcess) -> list[str]:
    """Lines of a command's output that begin with `error:`, behind the launcher's rank tag where there is one."""
    text = done.stdout + done.stderr
    return [m[1] for line in text.splitlines() if (m := re.match(r"(?:\[[\d,]+\]<std\w+>:\s*)?(error: .*)", line))]


def metrics(run_directory: Path, kind: str) -> list[dict]:
    """Lines of one kind of a run's metrics.jsonl."""
    lines = (Path(run_directory) / "metrics.jsonl").read_text().splitlines()
    return [fields for line in lines if (fields := json.loads(line))["kind"] == kind]


def import_torchvision():
    """Torchvision; the test is skipped where there is none for the torch here.

    Its compiled operators need the libraries of CUDA. Where they cannot be loaded, as beside a torch for CPUs, two of
    them must at least be declared, and nothing here calls them.
    """
    import pytest
    import torch

    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: there is none for this torch")
    if "torchvision" not in sys.modules and not torch.version.cuda:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # the declarations end with it
    import torchvision

    return torchvision
