"""What all tests share: markers that a machine may lack the hardware for, and the demo data packed once."""

import contextlib
import os
import shutil
import signal

import pytest

from tests.launch import python

# Several ranks share few cores here: one thread each, in this process and in those that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell lets what it starts in the background ignore Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart():
    """Where there is no GPU, Triton's own functions are to be interpreted too, and they are made at its import."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        with contextlib.suppress(ImportError):
            import triton.language  # noqa: F401
        del os.environ["TRITON_INTERPRET"]


def _lacks(marker: str) -> str:
    """Why tests with this marker cannot run on this machine, or an empty string."""
    if marker == "slurm":
        # Debian keeps the daemons out of a user's PATH.
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        return "" if shutil.which("slurmctld", path=path) else "no Slurm on this machine (slurmctld)"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA GPU on this machine"


# Long tests in these folders measure times that the product promises, such as 90 s to notice a hang.
ALONE = ("tests/ranks/", "tests/slurm/")
# These measure none.
NOT_ALONE = ("tests/ranks/test_hybrid.py", "tests/slurm/test_containers.py", "tests/slurm/test_nsys.py")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long") and item.nodeid.startswith(ALONE) and not item.nodeid.startswith(NOT_ALONE):
            item.add_marker("alone")
    for marker in ("gpu", "slurm"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = _lacks(marker) if marked else ""
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """Folder of shards made from shards/demo as job/demo.sh makes them; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    done = python("shards.pack", "shards/demo", str(folder), "--resize", "70")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def demo_run(demo_data, tmp_path_factory):
    """Run directory of a small network, trained for two epochs of the demo data on one rank; tests only read it."""
    out = tmp_path_factory.mktemp("demo") / "run"
    small = ["--recipe", "demo", "--model.width", "0.25", "--epochs", "2", "--log-every", "10"]
    done = python("job.train", *small, "--data", str(demo_data), "--out", str(out), "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    return out
