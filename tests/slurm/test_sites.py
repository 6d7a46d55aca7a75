"""Settings of well-known machines, the containers, conda's environment: they parse, and say what the rest says."""

import os
import re
import subprocess
import sys

import pytest

from tests.launch import ROOT

SLURM = ROOT / "slurm"
SITES = sorted(path.stem for path in (SLURM / "sites").glob("*.sh"))
# What the comment above a setting says: a page, or that there is none.
SOURCE = re.compile(r"https?://\S+|same page|guide, docs/|# not confirmed: check with your centre\n", re.IGNORECASE)


def bash(script, **env):
    env = {"PATH": os.environ["PATH"], "HOME": "/tmp", **env}
    return subprocess.run(["bash", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)


def known():
    """Variables that site.sh sets, or names in its comments."""
    return set(re.findall(r"\b([A-Z][A-Z_]+)=", (SLURM / "site.sh").read_text()))


# Further variables of sbatch itself that a machine may need (man sbatch, INPUT ENVIRONMENT VARIABLES).
OF_SBATCH = {"SBATCH_CONSTRAINT", "SBATCH_QOS", "SBATCH_TIMELIMIT", "SBATCH_HINT"}


def test_there_are_settings_for_the_machines_that_the_readme_names():
    assert SITES == ["jean-zay", "juwels-booster", "leonardo", "lumi", "perlmutter", "snellius"]
    text = (SLURM / "README.md").read_text()
    assert all(f"`{site}`" in text for site in SITES) and "polaris.pbs" in text


@pytest.mark.parametrize("path", sorted((SLURM / "sites").iterdir()), ids=lambda path: path.name)
def test_a_site_is_sound_shell_whose_settings_have_sources(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    text = path.read_text()
    assert "Not tested there." in text
    blocks = re.split(r"\n\n|(?<=\n)(?=[^#\n].*\n#)", text.partition("\n\n")[2] if path.suffix == ".sh" else text)
    settings = [block for block in blocks if re.search(r"^(export |[A-Z_]+=|module )", block, re.MULTILINE)]
    assert settings
    said = ""
    for line in text.splitlines():
        if line.startswith("#"):
            said += f"{line}\n"
            continue
        if re.match(r"(export )?[A-Z_]+=", line):
            assert SOURCE.search(said), f"{line} has no source"
        said = ""


@pytest.mark.parametrize("site", SITES)
def test_a_site_sets_what_site_sh_knows_and_nothing_else(site):
    show = "compgen -v | sort"
    before = set(bash(f"_=; {show}").stdout.split())
    done = bash(f"export SITE={site}; source slurm/site.sh; {show}")
    new = set(done.stdout.split()) - before - {"SITE"}
    assert done.returncode == 0 and not done.stderr
    assert new <= known() | OF_SBATCH, new - known()
    # The user's own setting wins.
    own = bash(
        "source slurm/site.sh; echo $LAUNCHER $SBATCH_PARTITION", SITE=site, LAUNCHER="mpirun", SBATCH_PARTITION="x"
    )
    assert own.stdout.split() == ["mpirun", "x"]


@pytest.mark.parametrize("site", SITES)
def test_the_job_script_starts_with_a_site_and_asks_for_its_ranks(site, tmp_path):
    """launch.sh on a node as Slurm would give it, with a faked srun and mpirun."""
    for name, text in {"scontrol": "echo n1", "srun": "exit 0", "mpirun": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    gpus = bash("source slurm/site.sh; echo ${SBATCH_GPUS_PER_NODE:-0}", SITE=site).stdout.strip()
    lines = f"repository={ROOT}\nsource slurm/lib/launch.sh\nfind_launcher mpirun srun\necho $ranks $LAUNCHER"
    node = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_NODELIST": "n[1-2]"}
    node |= {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURMD_NODENAME": "n1", "NETWORK_INTERFACE": "lo"}
    path = f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = bash(lines, SITE=site, PATH=path, SLURM_GPUS_ON_NODE=gpus, **node)
    ranks, launcher = done.stdout.split("\n")[-2].split()
    assert done.returncode == 0 and launcher in ("srun", "mpirun"), done.stderr
    assert int(ranks) == 2 * (int(gpus) or 16)


def test_a_site_that_is_not_there_is_one_line_and_the_job_ends():
    done = bash("source slurm/site.sh; echo $?", SITE="permutter")
    assert done.stdout == "2\n" and done.stderr.startswith("error: SITE=permutter is not one of jean-zay")
    done = bash(f"repository={ROOT}; source slurm/lib/launch.sh; echo went on", SITE="../site", SLURM_JOB_ID="7")
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1


@pytest.mark.slurm
def test_sbatch_takes_the_settings_of_every_site():
    """On a real Slurm; names of partitions, accounts and kinds of nodes are those of the machines, so they are cut."""
    from tests.cluster import Cluster

    with Cluster(2, form="simple") as cluster:
        for site in SITES:
            cut = "unset SBATCH_PARTITION SBATCH_CONSTRAINT SBATCH_QOS SBATCH_ACCOUNT; gpus=${SBATCH_GPUS_PER_NODE:-}"
            gpus = "unset SBATCH_GPUS_PER_NODE; [ -z $gpus ] || export SBATCH_GPUS_PER_NODE=2"
            sbatch = "sbatch --test-only slurm/train.sh --recipe demo"
            script = f"export SITE={site}; source slurm/site.sh; {cut}; {gpus}; {sbatch}"
            done = cluster.run("bash", "-c", script, cwd=ROOT, check=False)
            assert done.returncode == 0 and "to start at" in done.stderr, f"{site}: {done.stdout}{done.stderr}"


def test_polaris_starts_four_ranks_per_node(tmp_path):
    (tmp_path / "nodes").write_text("x1\nx2\nx1\n")
    (tmp_path / "bin").mkdir()  # an active environment, whose mpiexec is used
    (tmp_path / "bin" / "mpiexec").write_text('#!/bin/bash\nprintf "%s " "$@"\n')
    (tmp_path / "bin" / "mpiexec").chmod(0o755)
    script = "module() { :; }; conda() { :; }; export -f module conda; bash slurm/sites/polaris.pbs"
    env = {
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBS_O_WORKDIR": str(ROOT),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(tmp_path),
    }
    done = bash(script, TRAIN="--recipe paper --out runs/paper", **env)
    words = done.stdout.split()
    assert words[:2] == ["-n", "8"] and words[-6:] == ["-m", "job.train", "--recipe", "paper", "--out", "runs/paper"]
    assert bash(script, **env).returncode != 0  # without TRAIN
