"""The container recipes and conda's environment, as far as a machine without Docker, Apptainer and conda can tell."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import setup
from tests.launch import ROOT, run

CONTAINERS = ROOT / "slurm/containers"


def dockerfile() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile: (FROM, ...), (COPY, ...), with continued lines joined."""
    text = (CONTAINERS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def definition() -> dict[str, list[str]]:
    """Sections of alexnet.def, by name; "" is the header."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in (CONTAINERS / "alexnet.def").read_text().splitlines():
        if line.startswith("%"):
            name = line.split()[0]
            sections[name] = []
        elif line.strip() and not line.startswith("#"):
            sections[name].append(line.strip())
    return sections


def copies() -> dict[str, dict[str, str]]:
    """What each recipe copies: source -> place in the image."""
    found: dict[str, dict[str, str]] = {"Dockerfile": {}, "alexnet.def": {}}
    for instruction, rest in dockerfile():
        if instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                found["Dockerfile"][source] = f"{target}{source}" if target.endswith("/") else target
    for line in definition()["%files"]:
        source, target = line.split()
        found["alexnet.def"][source] = target
    return found


def test_both_recipes_copy_the_same_files_and_all_of_them_are_there():
    found = copies()
    assert found["Dockerfile"] == found["alexnet.def"] and len(found["Dockerfile"]) == 6
    for source, target in found["Dockerfile"].items():
        assert (ROOT / source).exists() and target == f"/opt/alexnet/{source}"


def test_both_recipes_have_the_same_base_and_the_same_steps():
    arguments = dict(rest.split("=") for instruction, rest in dockerfile() if instruction == "ARG")
    sections = definition()
    assert dict(line.split("=") for line in sections["%arguments"]) == arguments
    assert sections[""] == ["Bootstrap: docker", "From: {{ BASE }}"]
    (step,) = [rest for instruction, rest in dockerfile() if instruction == "RUN"]
    assert step.replace('"$CUDA"', "{{ CUDA }}") == sections["%post"][0]
    known = {"ARG", "FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {instruction for instruction, _ in dockerfile()} <= known
    assert set(sections) == {"", "%arguments", "%files", "%post", "%environment", "%runscript", "%test"}


def test_every_step_is_sound_shell():
    scripts = [rest for instruction, rest in dockerfile() if instruction == "RUN"]
    scripts += ["\n".join(lines).replace("{{ CUDA }}", "yes") for name, lines in definition().items() if name in
                ("%post", "%environment", "%runscript", "%test")]  # fmt: skip
    scripts += [path.read_text() for path in CONTAINERS.glob("*.sh")]
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0, script
    if shutil.which("shellcheck"):
        for path in CONTAINERS.glob("*.sh"):
            done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
    readme = (CONTAINERS / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block


@pytest.fixture
def image(tmp_path):
    """The files that the recipes copy, in a folder of their own in place of /opt/alexnet."""
    root = tmp_path / "opt/alexnet"
    root.mkdir(parents=True)
    for source in copies()["Dockerfile"]:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, root / source)
    return root


@pytest.mark.parametrize(("cuda", "index"), [("yes", ""), ("no", "https://download.pytorch.org/whl/cpu")])
def test_the_steps_install_packages_and_call_the_set_up_of_every_machine(image, tmp_path, cuda, index):
    (tmp_path / "apt-get").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/apt\n')
    (tmp_path / "apt-get").chmod(0o755)
    # The set-up itself is what tests/run.sh does on a fresh machine.
    says = 'echo "$@" "$PIP_EXTRA_INDEX_URL"; [ -d "$XDG_CACHE_HOME" ]'
    (image / "slurm/install.sh").write_text(f"#!/bin/bash\n{says}\n")
    # `rm -rf /var/lib/apt/lists/*` is for an image, not for this machine.
    script = (image / "slurm/containers/build.sh").read_text()
    assert "rm -rf /var/lib/apt/lists/*\n" in script
    (image / "slurm/containers/build.sh").write_text(script.replace("/var/lib/apt/lists", str(tmp_path / "lists")))
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run("bash", str(image / "slurm/containers/build.sh"), "--cuda", cuda, env=env)
    assert done.returncode == 0
    assert done.stdout.split() == ["--mpi", "wheel", "--cuda", cuda, *([index] if index else [])]
    update, install = (tmp_path / "apt").read_text().splitlines()
    assert update == "update" and {"g++", "python3-venv", "python3-dev"} <= set(install.split())


@pytest.mark.long
def test_the_entry_trains_in_the_image_from_any_folder(image, tmp_path):
    """horovodrun inside the container, and mpirun outside of one container per rank."""
    (image / ".venv").symlink_to(sys.prefix)  # in place of the environment that the steps make
    entry = ["bash", str(image / "slurm/containers/entry.sh")]
    train = ["python", "-m", "job.train", "--recipe", "demo", "--data", "synthetic", "--model.classes", "10"]
    train += ["--max-steps", "2", "--eval-every", "0"]
    (tmp_path / "work").mkdir()
    mpirun = os.path.join(os.path.dirname(sys.executable), "mpirun")
    inside = [*entry, "horovodrun", "-np", "2", *train, "--out", "inside"]
    outside = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", "2", *entry, *train, "--out", "outside"]
    for command in (inside, outside):
        done = run(*command, cwd=tmp_path / "work", env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"world_size": 2' in (tmp_path / "work" / command[-1] / "summary.json").read_text()
    where = run(*entry, "python", "-c", "import job; print(job.__file__)", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert where.stdout.startswith(str(image))


def test_condas_environment_has_the_versions_of_setup_py():
    environment = yaml.safe_load((CONTAINERS / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"] and environment["name"] == "alexnet"
    pins = dict(re.match(r"([\w-]+)(.*)", pin).groups() for pin in environment["dependencies"])
    ours = [setup.TORCH_RANGE, setup.MPI_WHEEL, *setup.REQUIRES, f"python{setup.PYTHONS}"]
    versions = dict(re.match(r"([\w-]+)(.*)", pin).groups() for pin in ours)
    versions["pytorch"] = versions.pop("torch")
    assert {"python", "pytorch", "openmpi", "mpi4py"} <= set(pins)
    for name, version in pins.items():
        assert version == versions.get(name, ""), name
