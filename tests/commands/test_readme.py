"""Every command of the README files runs; links lead somewhere; the table of options is that of the code."""

import re
import shlex
import shutil

import pytest

from job import config
from tests.imagenet40 import write_archives
from tests.launch import ROOT, run

README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "job/README.md").read_text()
DOCUMENTS = sorted(p for room in ("job", "shards", "slurm", "tests") for p in (ROOT / room).rglob("*.md"))

# What makes a command small enough for a test: the same command with more options behind it.
SMALLER = {
    "job.train --recipe paper": "--recipe demo --global-batch 32 --max-steps 3 --model.width 0.0625 --workers 1",
    "job.train --recipe demo": "--max-steps 3 --model.width 0.125 --workers 1",
}
# Run by CI itself, by tests of their own, or on a cluster only.
ELSEWHERE = (
    "bash tests/run.sh",
    "bash job/demo.sh",
    "bash slurm/install.sh",
    "sbatch ",
    "python -m job.scaling",
)


def commands() -> list[str]:
    """Commands of the bash blocks of both files in their order, lines joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", README + TRAINING, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.long
def test_every_command_of_the_readme_runs(demo_data, tmp_path):
    imagenet = tmp_path / "ILSVRC2012"
    write_archives(str(imagenet))
    shutil.copytree(demo_data, tmp_path / "runs" / "demo-data")
    done = []
    for command in commands():
        if command.startswith(ELSEWHERE):
            continue
        words = command.replace("/path/to/ILSVRC2012", str(imagenet)).replace("/scratch", str(tmp_path))
        for start, options in SMALLER.items():
            if start in command:
                words += f" {options}"
        result = run(*shlex.split(words), cwd=tmp_path, timeout=300)
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
        done.append(command)
    assert any("job.train --recipe paper" in c for c in done) and any("job.export" in c for c in done)


def test_the_table_of_options_is_that_of_the_code():
    rows = re.findall(r"^\| `--([\w.-]+)` \| (.*?) \| (.*?) \|$", TRAINING, re.M)
    assert [name for name, _, _ in rows] == list(config.LEAVES)
    for name, default, text in rows:
        leaf = config.LEAVES[name][1]
        assert default == ("" if leaf.default == "" else str(leaf.default).lower()), name
        assert text == leaf.metadata["help"], name


@pytest.mark.parametrize("document", [ROOT / "README.md", *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(document):
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", document.read_text()):
        assert (document.parent / target.split("#")[0]).exists(), target


def test_the_readme_fits_two_screens_and_a_bit():
    assert len(README.splitlines()) <= 140


@pytest.mark.parametrize("recipe", ["paper", "krizhevsky", "large-batch", "torchvision", "demo"])
def test_recipes_are_listed(recipe):
    assert f"| `{recipe}` |" in TRAINING
