"""Weights from a file, for the start of another run: a checkpoint of job.train, its safetensors export, or
torchvision's AlexNet, each recognised by what it holds.

In: a file, and the network that is to begin with it. Out: a state dict for that network, and a line that says what was
taken over. Only tensors and plain values are read, so that a file from elsewhere runs no code.
"""

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from job.config import Config, from_flat, to_flat
from job.network.alexnet import build
from job.network.torchvision import NAMES, from_torchvision
from shards.errors import InputError, few, short
from shards.machine.files import check_regular

LAST = "fc8.weight", "fc8.bias"
ACCEPTED = "a run directory or checkpoint of job.train, its safetensors export, or torchvision's AlexNet"
# Settings that decide what the layers are, with those of the image.
_NETWORK = ("model.layout", "model.lrn", "model.batch-norm", "model.width", "image-size")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network's weights under our names.

    Attributes:
        what: whose they are, for messages.
        settings: of the run that made them, by option name; empty: not known.
        classes: their names; empty: not known.
    """

    path: str
    what: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: Sequence[str] = ()


def read_weights(path: str) -> Weights:
    """The weights in a file, tensors on the CPU. Raises InputError: no such file, damaged, or of something else."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; --init takes {ACCEPTED}") from None
    try:
        # A safetensors file begins with the length of its header, in 8 bytes, and the header, which is JSON.
        content, metadata = _read_safetensors(path) if start[8:] == b"{" else (_read_torch(path), {})
        found = _recognise(path, content, metadata)
        broken = [name for name, tensor in found.tensors.items() if not torch.isfinite(tensor).all()]
    except InputError:
        raise
    except Exception as error:  # torch.load and safetensors raise errors of many kinds on damaged files
        # Torch's own text advises to run the code in such a file.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it is damaged, or holds more than tensors and plain values" if unsafe else str(error).strip()
        reason = short(reason.split("\n")[0], 200)
        raise InputError(f"{path} cannot be read as weights: {reason}; --init takes {ACCEPTED}") from None
    if broken:
        raise InputError(f"{path} holds weights that are not finite, in {few(broken)}; give another file")
    return found


def _read_torch(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise InputError(
            f"{path} is a safetensors file, and {error.name} is not installed; pip install safetensors"
        ) from None
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _recognise(path: str, content: Any, metadata: Mapping[str, str]) -> Weights:
    """What `content`, and for safetensors `metadata`, is. Raises InputError for anything else."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, no weights; --init takes {ACCEPTED}")
    if "model" in content and "config" in content:
        settings = to_flat(from_flat(content["config"], path))
        what = f"a checkpoint of step {content['step']:,}"
        return Weights(path, what, _tensors(path, content["model"]), settings, list(content.get("classes", ())))
    if NAMES.keys() <= content.keys():
        if more := content.keys() - NAMES.keys():
            raise InputError(f"{path} is not torchvision's AlexNet alone: it also has {few(sorted(more))}")
        return Weights(path, "torchvision's AlexNet", from_torchvision(_tensors(path, content)))
    if LAST[0] in content:
        settings = to_flat(from_flat(json.loads(metadata["config"]), path)) if "config" in metadata else {}
        tensors = {name: tensor for name, tensor in content.items() if name != "mean"}
        classes = json.loads(metadata.get("classes", "[]"))
        return Weights(path, "an export", _tensors(path, tensors), settings, classes)
    raise InputError(
        f"{path} is of another network: it has {few(sorted(map(str, content)), 3)}; --init takes {ACCEPTED}"
    )


def _tensors(path: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors in single precision. Raises InputError for what is none."""
    for name, tensor in content.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.is_quantized
            or tensor.is_complex()
            or tensor.layout != torch.strided
        ):
            raise InputError(f"{path}: {name} is not a dense tensor of real numbers; --init takes {ACCEPTED}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in content.items()}


def begin_with(weights: Weights, config: Config, classes: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The weights that a run begins with: those of a file, with an fc8 of initial values where its classes are others.

    Args:
        config: settings of the run, with the number of its classes.
        classes: their names; empty: not known.

    Returns: a state dict, and what was taken over, as text.

    Raises:
        InputError: the file is of another network.
    """
    state = build(config).state_dict()
    _check_network(weights, config, state)
    kept, text = _match_classes(weights, config.model.classes, list(classes))
    state.update({name: tensor for name, tensor in weights.tensors.items() if name not in LAST})
    if kept is not None:
        state.update({name: weights.tensors[name][kept] for name in LAST})
    return state, text


def _match_classes(weights: Weights, number: int, ours: list[str]) -> tuple[Any, str]:
    """Rows of the file's fc8 for this run's classes, or None: it begins anew; and the sentence that says so."""
    theirs, rows = list(weights.classes), len(weights.tensors[LAST[0]])
    if rows != number:
        return None, f"fc8 begins anew: {rows:,} classes there, {number:,} here"
    if not theirs or not ours:
        return slice(None), f"fc8 too: {number:,} classes here and there, taken to be in the same order, without names"
    if theirs == ours:
        return slice(None), f"fc8 too: the same {number:,} classes"
    if len(set(ours)) == number and set(ours) == set(theirs):
        return [
            theirs.index(name) for name in ours
        ], f"fc8 too: the same {number:,} classes, put into the order of here"
    other = next(name for name in ours if name not in theirs) if set(ours) - set(theirs) else ours[0]
    return None, f"fc8 begins anew: as many classes, but others; {short(other, 40)!r} is not among those there"


def _check_network(weights: Weights, config: Config, state: Mapping[str, Tensor]) -> None:
    """Raise InputError that names the first layer in which the file's network is not this run's."""
    ours, theirs, difference = to_flat(config), weights.settings, ""
    for name in [*state, *(name for name in weights.tensors if name not in state)]:
        here, there = (tensors.get(name) for tensors in (state, weights.tensors))
        if here is None or there is None:
            difference = (
                f"it has {'no ' if there is None else ''}{name}, this run's has {'none' if here is None else 'one'}"
            )
        elif (name in LAST and here.shape[1:] != there.shape[1:]) or (name not in LAST and here.shape != there.shape):
            difference = f"its {name} is {_shape(there)}, this run's is {_shape(here)}"
        if difference:
            break
    if not difference and theirs and theirs["model.lrn"] != ours["model.lrn"]:
        difference = "it normalises otherwise after conv1 and conv2"
    if not difference:
        return
    unlike = [f"--{name} {str(theirs[name]).lower()}" for name in _NETWORK if theirs and theirs[name] != ours[name]]
    advice = f"give {' '.join(unlike)}" if unlike else "give the settings of its network"
    if weights.what.startswith("torchvision") and config.model.layout != "torchvision":
        advice = "use --recipe torchvision"
    raise InputError(
        f"{weights.path}, {weights.what}, is of another network: {difference}; {advice}, or another --init"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
