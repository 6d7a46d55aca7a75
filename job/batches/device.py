"""From a batch of uint8 crops to the input of the network: mirror, mean image, cast and layout, on the training device.

In: batches of job.batches.loader. Out: float images (N, 3, H, W) and labels on the device. On CUDA the copy runs on a
separate stream during training, and the rest is one Triton kernel. On a CPU, and to test the kernel, it is plain
PyTorch.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from job.batches.loader import Batch
from job.batches.planes import crops_as_rgb
from shards.errors import InputError
from shards.format.split import Split, parse_npy
from shards.machine.caches import triton_lacks
from shards.machine.files import read_file

_BLOCK = 1024  # values of an image per Triton program


def load_mean(split: Split, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """Mean image of a split, float32 (H, W, 3), or (1, 1, 3) where its images have no fixed size; None: it has none.

    Raises:
        InputError: the file is missing, or its size is not that of the images.
    """
    if not split.mean:
        return None
    path = split.path(split.mean)
    try:
        mean = parse_npy(read_file(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the mean image {path}: {error}; pack the split again") from None
    if mean.ndim != 3 or mean.shape[2] != 3 or mean.dtype.kind != "f" or not np.isfinite(mean).all():
        raise InputError(f"{path} is not a mean image: {mean.dtype} of shape {mean.shape}, not float32 (H, W, 3)")
    if not (split.height and split.width):
        mean = mean.mean(axis=(0, 1), keepdims=True)
    elif mean.shape[:2] not in ((split.height, split.width), (1, 1)):
        raise InputError(
            f"{path} is {mean.shape[1]}x{mean.shape[0]}, the images are {split.width}x{split.height}; pack them again"
        )
    return torch.from_numpy(np.ascontiguousarray(mean, np.float32)).to(device)


def mean_crop(mean: torch.Tensor | None, size: int) -> torch.Tensor:
    """Mean image of centre crops, float32 (3, size, size) on the CPU: what a user of the network must subtract."""
    if mean is None:
        return torch.zeros(3, size, size)
    top, left = ((side - size) // 2 if side > 1 else 0 for side in mean.shape[:2])
    crop = mean[top : top + size, left : left + size].permute(2, 0, 1)
    return crop.expand(3, size, size).to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def prepare(
    images: torch.Tensor,
    offsets: torch.Tensor,
    mirror: torch.Tensor,
    mean: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """Subtract from each crop its part of the mean image, then mirror it: as if done before cropping, as published.

    Args:
        images: uint8 (N, crop, crop, 3), or their planes, see job.batches.planes.
        offsets: int32 (N, 2), top and left of each crop in the stored image.
        mirror: bool (N,), which to mirror left to right.
        mean: float32 (H, W, 3) of the stored images, or (1, 1, 3), or None.

    Returns:
        `dtype` (N, 3, crop, crop), contiguous or in channels-last memory.
    """
    images = crops_as_rgb(images, offsets)
    if images.is_cuda and _kernel() is not None:
        return prepare_triton(images, offsets, mirror, mean, dtype, channels_last)
    return prepare_plain(images, offsets, mirror, mean, dtype, channels_last)


def prepare_plain(images, offsets, mirror, mean, dtype=torch.float32, channels_last=False) -> torch.Tensor:
    """`prepare` in plain PyTorch."""
    crop = images.shape[1]
    x = images.to(torch.float32)  # (N, crop, crop, 3)
    if mean is not None and mean.shape[:2] == (1, 1):
        x -= mean
    elif mean is not None and x.is_cuda:
        index = torch.arange(crop, device=x.device)
        rows = (offsets[:, :1] + index)[:, :, None]  # (N, crop, 1)
        columns = (offsets[:, 1:] + index)[:, None, :]  # (N, 1, crop)
        x -= mean[rows, columns]
    elif mean is not None:
        # Slices instead of a gather take a third of the time on a CPU, and no second batch of floats.
        for image, (top, left) in zip(x, offsets.tolist(), strict=True):
            image -= mean[top : top + crop, left : left + crop]
    x = torch.where(mirror[:, None, None, None], x.flip(2), x).to(dtype).permute(0, 3, 1, 2)  # (N, 3, crop, crop)
    return x if channels_last else x.contiguous()


def prepare_triton(images, offsets, mirror, mean, dtype=torch.float32, channels_last=False) -> torch.Tensor:
    """`prepare` as one Triton kernel, which reads and writes a pixel once: 5 to 9 bytes per value, not 40."""
    n, crop = images.shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((n, 3, crop, crop), dtype=dtype, device=images.device, memory_format=layout)
    if n:
        mean_size = (0, 0) if mean is None else tuple(mean.shape[:2])
        grid = (n, -(-crop * crop * 3 // _BLOCK))
        _kernel()[grid](
            images.contiguous(),
            offsets.contiguous(),
            mirror.view(torch.uint8).contiguous(),
            images if mean is None else mean.contiguous(),  # not read where there is none
            out,
            *mean_size,
            CROP=crop,
            MEAN=0 if mean is None else 1 if mean_size == (1, 1) else 2,
            CHANNELS_LAST=channels_last,
            BLOCK=_BLOCK,
        )
    return out


@functools.cache
def _kernel():
    """The Triton kernel, or None where Triton is not installed or lacks a compiler or a folder for what it compiles."""
    try:
        from job.fast.input import prepare_kernel
    except ImportError:
        return None
    return None if triton_lacks() else prepare_kernel


def to_device(
    batches: Iterable[Batch],
    device: torch.device | str,
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """(batch, images, labels) of each batch: `prepare`d images and int64 labels on the device.

    Args:
        prepare: makes the network's input of a batch's images, offsets and mirror, which are on the device.

    On CUDA a batch is copied on a separate stream while the device works on the one before, from pinned memory
    (Loader(pin=True)) into one of two buffers in turn. The host waits only for the copy before last.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            images = prepare(batch.images.to(device), batch.offsets.to(device), batch.mirror.to(device))
            yield batch, images, batch.labels.to(device)
        return
    side = torch.cuda.Stream(device)
    buffers: list[list[torch.Tensor]] = [[], []]
    copied = [torch.cuda.Event(), torch.cuda.Event()]  # the slot may be written again
    used = [torch.cuda.Event(), torch.cuda.Event()]  # the buffer may be written again
    source = iter(batches)
    try:
        turn = 0
        while True:
            # The loader writes to the slot of the batch before last as soon as it is asked for another.
            copied[turn].synchronize()
            batch = next(source, None)
            if batch is None:
                return
            parts = (batch.images, batch.offsets, batch.mirror, batch.labels)
            compute = torch.cuda.current_stream(device)
            if not buffers[turn]:
                buffers[turn] = [torch.empty_like(part, device=device) for part in parts]
                side.wait_stream(compute)  # which may still be using the memory's last contents
            on_device = [buffer[: len(part)] for buffer, part in zip(buffers[turn], parts, strict=True)]
            with torch.cuda.stream(side):
                side.wait_event(used[turn])
                for target, part in zip(on_device, parts, strict=True):
                    target.copy_(part, non_blocking=True)
                copied[turn].record(side)
            compute.wait_event(copied[turn])
            images, offsets, mirror, labels = on_device
            prepared = prepare(images, offsets, mirror)
            labels = labels.clone()  # the caller's own: it may keep them beyond the next batch
            used[turn].record(compute)
            yield batch, prepared, labels
            turn = 1 - turn
    finally:
        side.synchronize()
