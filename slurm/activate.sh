# Source this file: `. slurm/activate.sh` activates the environment that install.sh has set up: .venv of the repository,
# unless an environment that you can write is active already.
# shellcheck shell=bash disable=SC1091
_active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
_own=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
if [ -f "$_own/bin/activate" ] && { [ -z "$_active" ] || [ ! -w "$_active/bin" ]; }; then
    . "$_own/bin/activate"
fi
unset _active _own
