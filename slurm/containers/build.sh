#!/bin/bash
# The steps inside an image, for the Dockerfile and alexnet.def alike: system packages, then the set-up of every other
# machine. Options go to slurm/install.sh (--cuda yes, --cuda no). Run as root in an image of Debian or Ubuntu.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export DEBIAN_FRONTEND=noninteractive
apt-get update
# A compiler builds Horovod and, when training starts, Triton's kernels and the JPEG decoder; ssh is for horovodrun -H.
apt-get install -y --no-install-recommends ca-certificates g++ git openssh-client python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
case " $* " in
    # torch without CUDA, which is 2 GB smaller
    *" --cuda no "*) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;;
esac
cache=$(mktemp -d)
# PyPI's Open MPI 5: its PMIx talks to that of Slurm, so srun --mpi=pmix needs no MPI outside the container.
XDG_CACHE_HOME=$cache PIP_NO_CACHE_DIR=1 bash "$repository/slurm/install.sh" --mpi wheel "$@"
rm -rf "$cache"
