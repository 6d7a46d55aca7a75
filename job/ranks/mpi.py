"""Which MPI a text names: that of `mpirun --version`, or of MPI_Get_library_version. Standard library only.

Open MPI starts ranks in its own way. MPICH, Intel MPI, MVAPICH and Cray MPICH share one (PMI), so that the mpirun of
one starts ranks of another.
"""

import re
import subprocess

# The first that fits counts: the descendants of MPICH name it, too. `mpirun` of MPICH and MVAPICH says HYDRA.
_FAMILIES = {
    "Intel MPI": r"Intel\(R\) MPI",
    "MVAPICH": "MVAPICH",
    "Cray MPICH": "CRAY MPICH",
    "Spectrum MPI": "Spectrum MPI",
    "Open MPI": r"Open ?(MPI|RTE)|PRR?TE|prte",
    "MPICH": "HYDRA|MPICH",
}

# An MPI's own library among the files that a process has mapped; not those for C++, Fortran and Java.
LIBRARY = r"/\S*/libmpi(?!\w*(?:cxx|fort|mpifh|usempi|java))\w*\.so\S*"


def family(text: str) -> str:
    """Name of the MPI, or an empty string."""
    return next((name for name, words in _FAMILIES.items() if re.search(words, text)), "")


def describe(text: str) -> str:
    """Name and version, "MPICH 4.0.2"; the first line of a text that names no MPI that is known here."""
    found = re.search(r"\d+\.\d+(?:\.\d+)*", text)
    return f"{family(text)} {found[0] if found else ''}".strip() if family(text) else text.partition("\n")[0].strip()


def fits(launcher: str, library: str) -> bool:
    """Whether ranks that use `library` find each other when `launcher` starts them; True where one is not known."""
    own, other = family(launcher), family(library)
    if not own or not other:
        return True
    if "Open MPI" in (own, other):
        return describe(launcher) == describe(library)
    return own == other or "Spectrum MPI" not in (own, other)


def first_line(command: list[str], seconds: float = 60) -> str:
    """The first line of `output`."""
    return output(command, seconds).partition("\n")[0].strip()


def output(command: list[str], seconds: float = 60) -> str:
    """All that a command prints, or an empty string when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else ""
