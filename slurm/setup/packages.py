"""Torch and the packages of setup.py in this environment: what is installed, and installing the rest."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import runpy
import sys
import tempfile
import urllib.parse

from shell import REPOSITORY, Failed, Missing, ask_python, pip, same, say

SETUP = runpy.run_path(str(REPOSITORY / "setup.py"), run_name="versions")  # the lists of packages, without installing


def distribution(name: str) -> str:
    """Version of an installed distribution, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def in_this_environment(name: str) -> bool:
    """Whether a distribution is installed in this environment itself, not in one that it is put on top of."""
    if not distribution(name):
        return False
    place = pathlib.Path(str(importlib.metadata.distribution(name).locate_file(""))).resolve()
    return place.is_relative_to(pathlib.Path(sys.prefix).resolve())


def installed(requirement: str) -> bool:
    """Whether a requirement such as "numpy>=1.26" is met."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(requirement)
    if wanted.marker and not wanted.marker.evaluate():
        return True  # not for this platform
    version = distribution(wanted.name)
    return bool(version) and wanted.specifier.contains(version, prereleases=True)


@dataclasses.dataclass(frozen=True)
class Torch:
    version: str
    cuda: str  # CUDA version it is built for, or an empty string
    abi: bool  # C++11 ABI
    archs: tuple[str, ...]  # compute capabilities it is built for, ("80", "90")


def find_torch() -> Torch:
    """The installed torch. Raises Missing if it cannot be imported."""
    found, reason = ask_python(
        "import json, torch; flags = getattr(torch._C, '_cuda_getArchFlags', lambda: '')() or ''; print(json.dumps("
        "{'version': torch.__version__, 'cuda': torch.version.cuda or '', 'abi': bool(torch.compiled_with_cxx11_abi()),"
        "'archs': [flag[3:] for flag in flags.split() if flag.startswith('sm_')]}))"
    )
    if found is None:
        raise Missing(
            f"torch is installed but cannot be imported ({reason}); fix it, or remove it: pip uninstall torch"
        )
    return Torch(found["version"], found["cuda"], found["abi"], tuple(found["archs"]))


def step_torch() -> Torch:
    """Install torch if there is none. A torch that is installed is kept, whatever its version."""
    if distribution("torch"):
        torch = find_torch()
        say(f"torch: {torch.version} is here, kept")
    else:
        say(f"torch: installing {SETUP['TORCH_PIN']} (the largest download)")
        pip("install", SETUP["TORCH_PIN"], what=f"install {SETUP['TORCH_PIN']}")
        torch = find_torch()
    if not installed(SETUP["TORCH_RANGE"]):
        say(f"torch: WARNING: {torch.version} is outside {SETUP['TORCH_RANGE']}, which this project is tested with")
    return torch


def install_beside_torch(torch: Torch, requirements: list[str], what: str) -> None:
    """Install the requirements that are not met. A constraint keeps pip from changing the installed torch."""
    lacking = [requirement for requirement in requirements if not installed(requirement)]
    if not lacking:
        return
    say(f"packages: installing {', '.join(re.split('[<>=]', name)[0] for name in lacking)}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        constraint.write(f"torch=={distribution('torch') or torch.version}\n")
        constraint.flush()
        pip("install", "--constraint", constraint.name, *lacking, what=what)


def project_installed() -> bool:
    """Whether this repository is installed in this environment with `pip install -e`."""
    try:
        text = importlib.metadata.distribution("alexnet-horovod").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return False
    url = json.loads(text).get("url", "")
    return same(urllib.parse.unquote(urllib.parse.urlparse(url).path), str(REPOSITORY))


def step_packages(extras: list[str], torch: Torch) -> None:
    """Install what setup.py lists, with these extras, and make job and shards importable."""
    wanted = [*SETUP["REQUIRES"], *(name for extra in extras for name in SETUP["EXTRAS"][extra])]
    bound = [name for name in wanted if name.startswith("torchvision")]
    install_beside_torch(torch, [name for name in wanted if name not in bound], "install the packages of setup.py")
    try:
        install_beside_torch(torch, bound, "install torchvision")
    except (Failed, Missing) as error:
        say(f"packages: none of torchvision for torch {torch.version}, a test is skipped without it ({error})")
        wanted = [name for name in wanted if name not in bound]
    say(f"packages: all {len(wanted)} of setup.py are here")
    if not project_installed():
        say("packages: making job and shards importable (pip install -e)")
        pip("install", "--no-deps", "--editable", str(REPOSITORY), what="install this project")
