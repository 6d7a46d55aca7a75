#!/bin/bash
# Copies the files of a folder of shards to this node's own disk, several at a time: bash slurm/stage.sh SOURCE DEST
# A copy that was cut off goes on where it stopped, file by file: what is there with the same size and time is kept.
# Every node needs all shards, because each epoch deals them out anew.
set -euo pipefail
umask 077
source=$1 dest=$2
streams=8 # files at a time: a single one does not fill a parallel file system

mkdir -p "$dest"
[ -O "$dest" ] || { echo "error: $dest belongs to another user; set SCRATCH in slurm/site.sh" >&2; exit 2; }

copy() {
    # shellcheck disable=SC2312
    if [ "$(stat -c '%s %Y' "$1")" != "$(stat -c '%s %Y' "$2/${1##*/}" 2>/dev/null)" ]; then
        cp --preserve=timestamps "$1" "$2/${1##*/}.$$.part" && mv "$2/${1##*/}.$$.part" "$2/${1##*/}"
    fi
}
export -f copy

need=$(du -sk --apparent-size "$source" | cut -f1)
have=$(($(df -Pk "$dest" | awk 'END {print $4}') + $(du -sk --apparent-size "$dest" | cut -f1)))
if ((need > have)); then
    echo "error: $source has $((need >> 20)) GiB, $dest on $(hostname) room for $((have >> 20)) GiB; do without STAGE=1" >&2
    exit 2
fi
# shellcheck disable=SC2016
find -H "$source" -maxdepth 1 -type f -print0 | xargs -0 -r -P "$streams" -I{} bash -c 'copy "$1" "$2"' copy {} "$dest"
