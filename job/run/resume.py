"""Where a run resumes: the newest checkpoint of its directory that verifies, if settings and shards are still the same.
A new run begins with initial weights, or with those of --init.

In: settings, the split, the run directory. Out: the `RunState` to start from.
"""

import dataclasses
import hashlib
import os
import platform

import horovod
import torch
from torch import Tensor

from job import config as settings
from job.batches.synthetic import NAME
from job.network.weights import begin_with, read_weights
from job.run import checkpoint
from job.run.checkpoint import RunState
from job.run.log import RunLog
from shards.errors import InputError
from shards.format.split import Split


def new_state(config: settings.Config, split: Split, mean: Tensor, by: str = "") -> RunState:
    """The state of a run before its first step; what does not change with a step is filled in.

    Args:
        mean: float32 (3, S, S), subtracted from a centre crop.
        by: the kernels and the device that compute.
    """
    return RunState(
        config=settings.to_flat(config),
        data=fingerprint(split),
        content=content(split),
        image=[split.height, split.width],
        classes=list(split.classes),
        mean=mean,
        by=by,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "horovod": horovod.__version__}


def find_resume(new: RunState, config: settings.Config, split: Split, log: RunLog) -> RunState:
    """The state to start from: `new`, or that of a checkpoint. Rank 0 only.

    `--resume FILE`, `none` and `--init` say how a run begins. Once its directory has a checkpoint, the same command
    resumes from that, as a requeued job must.

    Raises:
        InputError: the run directory or the checkpoint has other settings or data.
    """
    known = log.path("config.yaml")
    path = checkpoint.newest_good(log.path("checkpoints"), log.warn)
    verified = bool(path)
    if config.resume != "auto" and path:
        log.warn(f"--resume {config.resume} is for the start of a run; {config.out} has begun and goes on from {path}")
    elif config.resume not in ("auto", "none"):
        path = config.resume
    if os.path.exists(known) and (path or config.resume != "none"):
        same_settings(new.config, settings.read_flat(known), config.out)
    if not path:
        return first_state(new, config, log)
    state = checkpoint.load(path, verified)
    same_settings(new.config, state.config, path)
    same_data(new, state, split, path, log)
    if config.init and config.init != state.init.get("init"):
        began = f"began with {state.init['file']}" if state.init else "began without it"
        log.warn(f"--init {config.init} is for the start of a run; {config.out} {began} and goes on from {path}")
    if config.parallel == "weights" and state.step % config.average_every:
        log.warn(
            f"{path} is the end of a shorter run: its last average, after step {state.step}, is one more than "
            f"--average-every {config.average_every} alone would have made"
        )
    return state


def first_state(new: RunState, config: settings.Config, log: RunLog) -> RunState:
    """The state before the first step: `new`, with the weights of --init if it is given. Rank 0 only.

    Raises:
        InputError: the file cannot be read, or is of another network.
    """
    if not config.init:
        if config.freeze == "conv":
            log.warn("--freeze conv without --init: the convolutions keep their random initial weights")
        return new
    path = checkpoint.load_named(config.init)[0] if os.path.isdir(config.init) else config.init
    if os.path.exists(f"{path}.sha256") and (reason := checkpoint.fault(path)):
        raise InputError(f"cannot begin with {path}: {reason}; give another --init")
    weights = read_weights(path)
    model, taken = begin_with(weights, config, new.classes)
    log.say(f"begins with {path}, {weights.what}: conv1 to fc7 taken over, {taken}")
    found = {"init": config.init, "file": os.path.abspath(path), "sha256": checkpoint.digest(path)}
    return dataclasses.replace(new, model=model, init=found)


def remember_start(state: RunState, new: RunState, config: settings.Config) -> None:
    """Keep in `new` and `config`, for the checkpoints and config.yaml, what the run of `state` began with."""
    new.init = state.init
    config.init = new.config["init"] = state.init.get("init", "")


def leave_behind(start: RunState, config: settings.Config, log: RunLog) -> None:
    """Begin at `start`: write config.yaml, and move later checkpoints away, which is reported.

    A best result counts only while its best.pt is there.
    """
    log.attempt("config.yaml", lambda: settings.write_yaml(settings.to_flat(config), log.path("config.yaml")))
    folder = log.path("checkpoints")
    try:
        moved = checkpoint.set_aside(folder, start.step)
    except OSError as error:
        raise InputError(f"cannot move later checkpoints in {folder} away: {error.strerror}; free the folder") from None
    if moved:
        aside = os.path.join(folder, checkpoint.ASIDE)
        log.warn(f"going on from step {start.step}: moved {', '.join(moved)} to {aside}, which nothing reads")
    if not os.path.exists(os.path.join(folder, "best.pt")):
        start.best = -1.0


def same_settings(ours: dict, theirs: dict, where: str) -> None:
    """Raise InputError when a setting that decides what is computed is not the same as before.

    A setting that an older version did not have counts as its default.

    Args:
        ours, theirs: settings by option name, of this start and of an earlier one.
        where: file or folder of the earlier ones.
    """
    theirs = settings.to_flat(settings.from_flat(theirs, where))
    for name, value in theirs.items():
        if ours[name] == value or name in settings.MAY_CHANGE:
            continue
        if name != "epochs":
            advice = "give the same settings or another --out"
        elif ours["optim.schedule"] in settings.SCHEDULES_TO_THE_END:
            advice = (
                f"the learning rate of --optim.schedule {ours['optim.schedule']} depends on it; give the same, or "
                "another --out"
            )
        else:
            continue
        raise InputError(f"{where} is a run with --{name} {value}, not {ours[name]}; {advice}")


def same_data(ours: RunState, theirs: RunState, split: Split, path: str, log: RunLog) -> None:
    """Raise InputError when a checkpoint, `theirs`, was trained on other samples than those of `split`."""
    other, advice = f"{path} was trained on other shards than {split.root}", "give the same --data or another --out"
    if theirs.data != ours.data:
        raise InputError(f"{other}: their names or numbers of samples differ; {advice}")
    before = [tuple(item) for item in theirs.content] or [("", 0, "")] * len(ours.content)
    for (name, size, sha256), (_, old_size, old_sha256) in zip(ours.content, before, strict=True):
        if size and old_size and size != old_size or sha256 and old_sha256 and sha256 != old_sha256:
            raise InputError(f"{other}: {name} has another content; {advice}")
    # In levels of 255. A mean colour is summed up again at every start, perhaps by a CPU that rounds differently.
    if not torch.allclose(theirs.mean, ours.mean, rtol=0, atol=1e-3):
        raise InputError(f"{other}: the mean image differs; {advice}")
    if split.root != NAME and not all(a[2] and b[2] for a, b in zip(ours.content, before, strict=True)):
        what = f"{split.name}.json of {split.root}" if not all(item[2] for item in ours.content) else path
        log.warn(f"{what} has no sha256 of the shards: only their names, sizes and numbers of samples were compared")


def content(split) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of the labels and of every shard, as the index has them; 0 and "" where it has not."""
    shards = [(os.path.basename(shard.url), shard.filesize, shard.sha256) for shard in split.shards]
    return [(split.labels, 0, split.labels_sha256), *shards]


def fingerprint(split) -> str:
    """sha256 of what the order of samples depends on: names and lengths of the shards, in whatever folder they are."""
    text = "\n".join(f"{os.path.basename(shard.url)} {shard.nsamples}" for shard in split.shards)
    return hashlib.sha256(text.encode()).hexdigest()
