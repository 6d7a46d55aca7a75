"""The command lines of slurm/README.md for NVIDIA's profiler, with stand-ins for nsys and srun."""

import os
import re
import shlex
import sys

import pytest

from tests.launch import ROOT, run

# Accepts what `nsys profile --help` of 2024.6 lists among its options, writes a report per process, runs the program.
NSYS = """#!/bin/bash
[ "$1" = profile ] || exit 9
shift
while [[ $1 == --* ]]; do
    case $1 in
        --trace=cuda,nvtx | --cuda-graph-trace=node | --sample=none) ;;
        --output=*) output=${1#--output=} ;;
        *) echo "unrecognised option $1" >&2; exit 9 ;;
    esac
    shift
done
output=${output//%h/$HOSTNAME}
echo "$@" > "$REPORTS/${output//%p/$$}.nsys-rep"
exec "$@"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec mpirun --allow-run-as-root --oversubscribe -np 2 "$@"
"""


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "slurm/README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "nsys profile" in line]


def test_there_is_one_for_horovodrun_and_one_for_srun():
    assert [line.split()[0] for line in commands()] == ["horovodrun", "srun"]


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 1])
def test_each_rank_trains_under_the_profiler(number, demo_data, tmp_path):
    for name, text in (("nsys", NSYS), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    line = commands()[number].replace("/scratch/imagenet", str(demo_data)).replace("runs/nsys", f"{tmp_path}/run")
    assert "--profile-nvtx" in line  # which needs a GPU, and this test has none
    line = line.replace("--profile-nvtx", "").replace("--recipe paper", "--recipe demo --model.width 0.125")
    line = line.replace("--max-steps 200", "--max-steps 3 --workers 0 --global-batch 32")
    path = f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = run(*shlex.split(line), env={"PATH": path, "REPORTS": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    reports = list(tmp_path.glob("nsys-*.nsys-rep"))
    assert len(reports) == 2 and all("-m job.train" in report.read_text() for report in reports)
    assert "2 x cpu" in done.stdout
