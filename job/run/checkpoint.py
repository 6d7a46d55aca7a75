"""Checkpoints of a run: written in the background by rank 0, verified before they are used.

In: a `RunState`. Out: `checkpoints/step-00001234.pt` with its sha256 beside it, and `best.pt` for the best validation.
The files hold tensors and plain values only, so reading one runs no code from it.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from job.config import from_flat
from job.network.alexnet import AlexNet, build
from shards.errors import InputError, few
from shards.machine.files import sync_folder, write_whole
from shards.machine.launcher import launched_rank

_NAME = re.compile(r"step-(\d{8,})\.pt")
_FILE = re.compile(r"(step-(\d{8,})\.pt|best\.pt)(\.sha256)?(.*\.tmp)?")
FORMAT = 1
# Folder inside checkpoints/ for those of later steps than the one that a run resumes from. Nothing reads it.
ASIDE = "set-aside"


@dataclasses.dataclass
class RunState:
    """What a run resumes from, whether a checkpoint file or the memory of an elastic run holds it.

    The names of the fields are those in the files. Older files lack some; then the default counts.
    """

    step: int = 0  # steps made
    model: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # weights and buffers; empty in a new run
    velocity: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # of the optimizer, by parameter
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings, by option name
    data: str = ""  # hash of what the order of the samples depends on
    content: list = dataclasses.field(default_factory=list)  # (name, bytes, sha256) of labels and shards
    image: list[int] = dataclasses.field(default_factory=lambda: [0, 0])  # height, width of the stored images
    classes: list[str] = dataclasses.field(default_factory=list)
    mean: Tensor | None = None  # float32 (3, S, S), subtracted from a centre crop
    by: str = ""  # the kernels and the device that computed it
    best: float = -1.0  # top-1 of the best validation; -1: none
    owed: bool = False  # the run was stopped before a validation that was due: resume with it
    wall_seconds: float = 0.0  # over all starts of the run
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    # `init` as given, `file` and `sha256` of the weights that the run began with; empty: initial ones.
    init: dict[str, str] = dataclasses.field(default_factory=dict)

    def summary(self) -> "RunState":
        """The same without tensors and lists: what every rank needs to know about the start."""
        return RunState(step=self.step, by=self.by, best=self.best, owed=self.owed, wall_seconds=self.wall_seconds)


# Without these a file cannot be resumed from.
_REQUIRED = ("step", "model", "velocity", "config", "data", "mean", "classes")


def checkpoint_path(folder: str, step: int) -> str:
    """Path of the checkpoint after `step` steps."""
    return os.path.join(folder, f"step-{step:08d}.pt")


def digest(path: str) -> str:
    """sha256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(folder: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints in a folder, newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted(((int(m[1]), name) for name in names if (m := _NAME.fullmatch(name))), reverse=True)
    return [(step, os.path.join(folder, name)) for step, name in steps]


def fault(path: str) -> str:
    """Why a checkpoint cannot be trusted, or "": it must match the sha256 written beside it."""
    try:
        known = _digests(path)
        found = digest(path)
        # Read again: a running job may have replaced both files meanwhile.
        good = found in known or found in _digests(path)
        return "" if good else "its sha256 does not match: it is damaged or half written"
    except (OSError, IndexError, UnicodeDecodeError) as error:
        return f"it cannot be verified: {error}"


def _digests(path: str) -> list[str]:
    """The sha256 beside a checkpoint; two while it is being replaced, of the new file and of the old one."""
    with open(f"{path}.sha256", encoding="ascii") as file:
        return [line.split()[0] for line in file]


def put_in_place(source: str, sha256: str, target: str) -> None:
    """Rename `source`, already synced to disk, to `target`. A kill at any moment leaves a `target` that verifies."""
    folder, name = os.path.split(target)
    new, old = f"{sha256}  {name}\n", ""
    if os.path.exists(target):
        with contextlib.suppress(OSError, UnicodeDecodeError), open(f"{target}.sha256", encoding="ascii") as file:
            old = file.read()
    write_whole(f"{target}.sha256", f"{new}{old}".encode())
    sync_folder(folder)
    os.replace(source, target)
    sync_folder(folder)
    if old:
        write_whole(f"{target}.sha256", new.encode())


def set_aside(folder: str, step: int) -> list[str]:
    """Move the checkpoints after `step`, and best.pt if it is of a later one, into the folder `set-aside`.

    Returns: the names of the moved files.
    """
    late = [os.path.basename(path) for found, path in list_checkpoints(folder) if found > step]
    best = os.path.join(folder, "best.pt")
    if os.path.exists(best) and not _step_of(best) <= step:
        late.append("best.pt")
    aside = os.path.join(folder, ASIDE)
    for name in late:
        os.makedirs(aside, exist_ok=True)
        for ending in ("", ".sha256"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(os.path.join(folder, name + ending), os.path.join(aside, name + ending))
    return late


def _step_of(path: str) -> float:
    """Step of a checkpoint; infinite when it cannot be read. Its tensors stay on disk."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # torch.load raises errors of many kinds on damaged files
        return math.inf


def newest_good(folder: str, warn: Callable[[str], None]) -> str:
    """Path of the newest checkpoint that verifies, or ""; each one that was passed over is reported to `warn`."""
    for _, path in list_checkpoints(folder):
        reason = fault(path)
        if not reason:
            return path
        warn(f"passed over the checkpoint {path}: {reason}")
    return ""


def load_named(path: str, which: str = "best") -> tuple[str, RunState]:
    """Path and content of the checkpoint that a user names: a file, or one of a run directory.

    Args:
        path: checkpoint file, or run directory.
        which: of a run directory. best: best.pt, or the newest where there is none; newest: the newest that is whole;
            or a file, as a path or by its name in the run's `checkpoints`.

    Raises:
        InputError: the run directory has no such checkpoint, or the file cannot be used.
    """
    if not os.path.isdir(path):
        if which != "best":
            raise InputError(f"{path} is not a run directory; give either a checkpoint file or --checkpoint {which}")
        return path, load(path)
    folder = os.path.join(path, "checkpoints")
    if which not in ("best", "newest"):
        inside = os.path.join(folder, which)
        file = inside if os.path.isfile(inside) else which
        if not os.path.isfile(file):
            names = [os.path.basename(found) for _, found in list_checkpoints(folder)]
            raise InputError(
                f"no checkpoint {which}; best, newest, or a file of {folder}: {few(names, separator=', ')}"
            )
        return file, load(file)
    best, missing = os.path.join(folder, "best.pt"), ""
    if which == "best" and os.path.exists(best):
        if not (missing := fault(best)):
            return best, load(best, verified=True)
        _say(f"passed over the checkpoint {best}: {missing}")
    found = newest_good(folder, _say)
    if not found:
        raise InputError(f"no checkpoint in {folder}; give a run directory of job.train or a .pt file")
    if which == "best" and not missing:
        _say(f"{path} has no best.pt, since nothing was validated: taking its newest checkpoint, {found}", "note")
    return found, load(found, verified=True)


def _say(text: str, kind: str = "warning") -> None:
    """A line on stderr, from one rank of a job."""
    if launched_rank() == 0:
        print(f"{kind}: {text}", file=sys.stderr, flush=True)


def load(path: str, verified: bool = False) -> RunState:
    """Content of a checkpoint, tensors on the CPU.

    Args:
        verified: its sha256 has just been compared.

    Raises:
        InputError: not there, damaged, or not a checkpoint of this project.
    """
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint {path}")
    if not verified and os.path.exists(f"{path}.sha256") and (reason := fault(path)):
        raise InputError(f"cannot use the checkpoint {path}: {reason}; give an older one of the same folder")
    try:
        fields = torch.load(path, map_location="cpu", weights_only=True)
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']}")
        for name in _REQUIRED:
            fields[name]
        from_flat(fields["config"], path)
        known = {field.name for field in dataclasses.fields(RunState)}
        return RunState(**{name: value for name, value in fields.items() if name in known})
    except InputError:
        raise
    except Exception as error:  # torch.load raises errors of many kinds on damaged files
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path} is not a checkpoint of job.train that can be read: {reason}") from None


def network(state: RunState, path: str) -> AlexNet:
    """The network of a checkpoint's content, with its weights, on the CPU.

    Raises:
        InputError: the weights do not fit the settings, for example those of another version of this project.
    """
    model = build(from_flat(state.config, path))
    try:
        model.load_state_dict(state.model)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds the weights of another network than its settings: {reason}") from None
    return model


class CheckpointWriter:
    """Writes checkpoints in a thread of its own; training goes on with the next step meanwhile.

    A write that fails (disk full, folder gone) does not end the run: it is reported to `warn`, and older checkpoints
    stay as they are.

    Args:
        keep: newest checkpoints to keep, besides best.pt.

    Attributes:
        failures: files that could not be written.
        last_failed: the newest checkpoint was not written.
    """

    def __init__(self, folder: str, keep: int, warn: Callable[[str], None]):
        self.folder = folder
        self.keep = keep
        self.warn = warn
        self.failures = 0
        self.last_failed = False
        self._thread: threading.Thread | None = None
        self._kept: dict[str, Tensor] = {}

    def save(self, state: RunState, best: bool) -> None:
        """Take a copy of `state` and write it in the background; `best`: as best.pt, too."""
        self.wait()
        content = {"format": FORMAT, **vars(snapshot(state, self._kept))}
        self._thread = threading.Thread(target=self._write, args=(state.step, content, best), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the write in progress, if any, has ended."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, content: dict[str, Any], best: bool) -> None:
        path = checkpoint_path(self.folder, step)
        temporary = f"{path}.tmp"
        try:
            # Training comes first where cores are few. On Linux a thread has a priority of its own.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            if not all(torch.isfinite(tensor).all() for tensor in content["model"].values()):
                raise ValueError("the weights are not finite")
            with open(temporary, "wb") as file:
                digesting = _Digesting(file)
                torch.save(content, digesting)
                file.flush()
                os.fsync(file.fileno())
            sha256 = digesting.sha256.hexdigest()
            put_in_place(temporary, sha256, path)
            self.last_failed = False
        except Exception as error:  # whatever it is, training must go on and the user must know
            self.failures += 1
            self.last_failed = True
            self.warn(f"checkpoint of step {step} was not written to {self.folder}: {error}")
            with contextlib.suppress(OSError):  # the folder cannot be written at all
                for leftover in (temporary, *([] if os.path.exists(path) else [f"{path}.sha256"])):
                    if os.path.exists(leftover):
                        os.unlink(leftover)
            return
        try:
            if best:
                self._keep_as_best(path, sha256)
            self._remove_old(step)
        except Exception as error:  # the checkpoint itself is good
            self.failures += 1
            self.warn(f"step {step} is saved, but best.pt or old files of {self.folder} are not in order: {error}")

    def _keep_as_best(self, path: str, sha256: str) -> None:
        best = os.path.join(self.folder, "best.pt")
        temporary = f"{best}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            os.link(path, temporary)  # a second name costs nothing
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        put_in_place(temporary, sha256, best)

    def _remove_old(self, step: int) -> None:
        """Keep the newest ones up to `step`, just written; remove older ones and leftovers of killed writes."""
        newest = [name for found, name in list_checkpoints(self.folder) if found <= step][: self.keep]
        kept = {"best.pt", *map(os.path.basename, newest)}
        for name in os.listdir(self.folder):
            if (m := _FILE.fullmatch(name)) and (m[4] or m[1] not in kept and int(m[2]) <= step):
                os.unlink(os.path.join(self.folder, name))


class _Digesting:
    """A file written from front to back, and the sha256 of it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def snapshot(state: RunState, kept: dict[str, Tensor]) -> RunState:
    """A copy of `state`, its tensors in the memory of `kept`: new memory costs more than the copy (page faults)."""

    def copy(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if name not in kept:
                kept[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            return kept[name].copy_(value.detach())
        if isinstance(value, dict):
            return {key: copy(item, f"{name}/{key}") for key, item in value.items()}
        return value

    return RunState(**copy(vars(state), ""))
