"""The last step of the set-up: two ranks add up numbers over MPI and over Gloo, and mpi4py sees both."""

import os
import re
import shutil
import subprocess
import sys
import tempfile

import shell
from install_horovod import Horovod
from packages import SETUP
from shell import TAIL_LINES, Failed, mpi_names, pip, say, wait

CHECK_SECONDS = 180  # time limit of two ranks for one allreduce

ALLREDUCE = """
import sys, torch, horovod.torch as hvd
hvd.init()
rank, size = hvd.rank(), hvd.size()
if size != 2:
    sys.exit(f"horovodrun -np 2 started a job of {size} rank(s)")
device = torch.device("cpu")
if hvd.nccl_built() and torch.cuda.device_count() >= 2:  # two ranks cannot share a GPU under NCCL
    device = torch.device("cuda", hvd.local_rank())
    torch.cuda.set_device(device)
total = hvd.allreduce(torch.arange(1000.0, device=device) + rank, op=hvd.Sum, name="check").cpu()
if not torch.equal(total, 2 * torch.arange(1000.0) + 1):
    sys.exit(f"rank {rank}: the sum over two ranks is wrong: {total[:4].tolist()}")
if rank == 0:
    print("ALLREDUCE", device.type, flush=True)
hvd.shutdown()
"""

MPI4PY = """
import sys
from mpi4py import MPI
if MPI.COMM_WORLD.size != 2:
    sys.exit(f"mpi4py sees {MPI.COMM_WORLD.size} rank(s) of 2: it uses another MPI than mpirun")
if MPI.COMM_WORLD.rank == 0:
    print("MPI4PY", MPI.Get_library_version().splitlines()[0].split(",")[0], flush=True)
"""


def launch(option: str, code: str, marker: str) -> tuple[str, str]:
    """Run `code` in two ranks by `horovodrun OPTION`.

    Returns what rank 0 printed after `marker` (an empty string if the job failed), and the end of all output.
    """
    # Always two ranks on this host, even inside another job or step.
    outer = ("SLURM_", "PMI_", "PMIX_", "OMPI_COMM_", "HOROVOD_RANK", "HOROVOD_SIZE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(outer)} | {"OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file, tempfile.TemporaryFile("w+") as out:
        file.write(code)
        file.flush()
        command = ["horovodrun", option, "-np", "2", sys.executable, file.name]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
        )
        exit_code = wait(process, CHECK_SECONDS)
        out.seek(0)
        text = out.read()
    with open(shell.LOG, "a") as log:
        log.write(f"\n$ {' '.join(command)}\n{text}")
    found = re.search(rf"{marker} (.*)", text)
    return (found[1].strip() if found and exit_code == 0 else ""), "\n".join(text.splitlines()[-TAIL_LINES:])


def check_allreduce(name: str, hint: str) -> None:
    """Sum over two ranks with "MPI" or "Gloo". Raises Failed, which ends with `hint`."""
    option = f"--{name.lower()}"
    device, text = launch(option, ALLREDUCE, "ALLREDUCE")
    if not device:
        print(text, file=sys.stderr)
        raise Failed(f"two ranks under horovodrun with {name} did not add up (lines above). {hint}")
    say(f"check: horovodrun {option} -np 2: the sum over two ranks is right ({device})")


def check_mpi4py() -> None:
    """mpi4py uses the MPI of mpirun, or is built for it. Raises Failed."""
    version, text = launch("--mpi", MPI4PY, "MPI4PY")
    if not version:
        say("check: mpi4py's wheel does not work with this MPI, building mpi4py from source")
        (mpi4py,) = (requirement for requirement in SETUP["REQUIRES"] if requirement.startswith("mpi4py"))
        source = ["--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "mpi4py", mpi4py]
        pip("install", *source, what="build mpi4py")
        version, text = launch("--mpi", MPI4PY, "MPI4PY")
    if not version:
        print(text, file=sys.stderr)
        raise Failed("mpi4py does not work under mpirun (lines above)")
    say(f"check: mpi4py sees both ranks ({version})")


def step_check(here: Horovod) -> None:
    """Try Horovod and mpi4py with two ranks. Raises Failed."""
    print(mpi_names.output(["horovodrun", "--check-build"]), flush=True)
    mpirun = shutil.which("mpirun")
    if not here.mpi:
        say("check: this Horovod was built without MPI")
    elif not mpirun:
        say("check: no mpirun on PATH; Horovod with MPI can only be checked by srun (slurm/train.sh)")
    else:
        check_allreduce("MPI", f"mpirun is {mpirun}; build for this one with --rebuild")
    if here.gloo:
        check_allreduce("Gloo", "")
    else:
        say("check: this Horovod was built without Gloo")
    if here.mpi and mpirun:
        check_mpi4py()
