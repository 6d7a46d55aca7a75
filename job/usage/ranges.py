"""Named ranges in the profile of a GPU (NVTX), which `nsys` shows above the kernels that were launched within them.

In: the name of what comes. Out: a context. Without --profile-nvtx it does nothing.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch

from shards.errors import InputError

Range = Callable[[str], AbstractContextManager]


def make_range(wanted: bool, device: torch.device) -> Range:
    """A function that makes the context of a name. Raises InputError where ranges are wanted without a GPU."""
    if not wanted:
        nothing = contextlib.nullcontext()
        return lambda name: nothing
    if device.type != "cuda":
        raise InputError(
            "--profile-nvtx marks the work of GPUs, and this run has none; --profile N traces CPUs as well"
        )
    return torch.cuda.nvtx.range


def each(iterable: Iterable, named: Range, name: str) -> Iterator:
    """The items of an iterable, with a range of this name around the wait for each."""
    items = iter(iterable)
    while True:
        with named(name):
            item = next(items, None)
        if item is None:
            return
        yield item
