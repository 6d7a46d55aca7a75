"""Every command of the course runs, in its order, on sizes that take seconds."""

import re
import shlex

import pytest

from tests.launch import ROOT, run

COURSE = (ROOT / "job/COURSE.md").read_text()

# What makes a command small enough for a test: the same command with more options behind it.
SMALLER = {
    "job.train": "--max-steps 3 --model.width 0.125 --workers 1",
    "job.bench loader": "--seconds 0.2 --rounds 1",
    "job.bench compute": "--steps 2 --rounds 1 --warmup 1",
    "job.scaling run": "--repeats 1 --steps 13 --no-bench --model.width 0.125 --data synthetic --mode strong",
}
ON_A_CLUSTER = ("sbatch ", "bash slurm/scaling.sh ")  # tests/slurm runs the like


def commands() -> list[str]:
    """Commands of the bash blocks, in their order, lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", COURSE, re.S)
    return [line for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.long
def test_every_command_of_the_course_runs(tmp_path):
    for name in ("job", "shards", "slurm", "tests"):  # the reader is in the repository; what is written stays out of it
        (tmp_path / name).symlink_to(ROOT / name)
    done = 0
    for command in commands():
        if command.startswith(ON_A_CLUSTER) or command == ". slurm/activate.sh":
            continue
        small = [options for start, options in SMALLER.items() if f"python -m {start}" in command]
        words = shlex.split(" ".join([command, *small]))
        result = run(*words, cwd=tmp_path, timeout=300)
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
        done += 1
    assert done >= 20
