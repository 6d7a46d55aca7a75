#!/bin/bash
# Installs what tests/cluster.py starts (Slurm, munge, sshd) and shellcheck, on Debian or Ubuntu, as root. No MPI comes with
# it: the tests are to find the one that set-up chose. No service is started. Does nothing when all is there.
set -euo pipefail

programs=(slurmctld slurmd sbatch munged ip sshd ssh-keygen shellcheck)
pmix=$(ldconfig -p | awk '/libpmix\.so\.2 / {print $NF; exit}')
PATH=$PATH:/usr/sbin:/sbin
if ! type "${programs[@]}" >/dev/null 2>&1 || [ -z "$pmix" ]; then
    [ "$(id -u)" = 0 ] || { echo "error: installing Slurm for the tests needs root" >&2; exit 2; }
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    packages=(slurm-wlm munge libpmix2 iproute2 openssh-server openssh-client shellcheck)
    apt-get update -q
    apt-get install -y -q --no-install-recommends "${packages[@]}"
fi

# Slurm's PMIx plug-in opens libpmix.so, a link that Debian ships in libpmix-dev only (with all of autotools).
for library in /usr/lib/*/pmix2/lib/libpmix.so.2; do
    [ -e "${library%.2}" ] || ln -s libpmix.so.2 "${library%.2}"
done
