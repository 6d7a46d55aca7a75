"""Where a run goes on: the newest checkpoint of its directory that verifies, if settings and shards are still the same.

In: settings, the split, the run directory. Out: the step to start from, and weights and velocities put in place.
"""

import hashlib
import os

import torch

from job import checkpoint
from job import config as settings
from shards.cli import InputError


def find_resume(config: settings.Config, split, log) -> dict:
    """Where to start: {"path", "step", "wall_seconds", "best", "owed"}; path is empty for a new run. Rank 0 only.

    Writes config.yaml for a new run. Raises InputError when the run directory or the checkpoint has other settings.
    """
    flat = settings.to_flat(config)
    known = log.path("config.yaml")
    if config.resume == "none" and os.path.exists(known):
        raise InputError(f"{config.out} holds a run already; --resume auto goes on with it, another --out starts anew")
    if os.path.exists(known):
        same_settings(flat, settings.read_flat(known), config.out)
    path = config.resume
    if path == "auto":
        path = checkpoint.newest_good(log.path("checkpoints"), log.warn)
    elif path == "none":
        path = ""
    start = {"path": path, "step": 0, "wall_seconds": 0.0, "best": -1.0, "owed": False}
    if path:
        state = checkpoint.load(path)
        same_settings(flat, state["config"], path)
        if state["data"] != fingerprint(split):
            raise InputError(f"{path} was trained on other shards than {config.data}; give the same --data")
        start.update({name: state[name] for name in start if name != "path"})
    settings.write_yaml(flat, known)
    return start


def same_settings(ours: dict, theirs: dict, where: str) -> None:
    """Raise InputError when a setting that decides what is computed differs from that of an earlier part of the run."""
    for name, value in theirs.items():
        if name not in settings.MAY_CHANGE and ours.get(name) != value:
            raise InputError(
                f"{where} is a run with --{name} {value}, not {ours.get(name)}; give the same settings or another --out"
            )


def restore(path: str, model, optimizer) -> None:
    """Load weights and velocities of a checkpoint, in place."""
    put(checkpoint.load(path), model, optimizer)


def put(state: dict, model, optimizer) -> None:
    """Put weights and velocities of a checkpoint's content in place."""
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for name, param in model.named_parameters():
            optimizer.velocity(param).copy_(state["velocity"][name])


def fingerprint(split) -> str:
    """What the order of samples depends on: names and lengths of the shards, wherever they lie."""
    text = "\n".join(f"{os.path.basename(shard.url)} {shard.nsamples}" for shard in split.shards)
    return hashlib.sha256(text.encode()).hexdigest()
