# Source this: `. slurm/activate.sh` puts the environment that install.sh set up on PATH: the active one, else .venv.
# shellcheck shell=bash disable=SC1091
_active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
_own=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
if [ -f "$_own/bin/activate" ] && { [ -z "$_active" ] || [ ! -w "$_active/bin" ]; }; then
    . "$_own/bin/activate"
fi
unset _active _own
