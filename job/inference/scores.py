"""Class scores of batches of images: of the centre crop, or averaged over ten crops.

In: uint8 batches of job.batches.loader on a device, a network, its mean image. Out: float32 scores (N, classes).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from job.batches.device import mean_crop, prepare
from job.batches.planes import crops_as_rgb
from shards.errors import InputError
from shards.format.split import Split


def centre_input(mean: Tensor | None, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """For job.batches.device.to_device: the network's input of uint8 centre crops.

    Args:
        mean: float32 (3, S, S), of the centre crop: the mean image that the network was trained with. None: the uint8
            images themselves, as a copy, since on CUDA the next batch comes into the same memory.
    """
    if mean is None:
        return lambda images, offsets, mirror: crops_as_rgb(images, offsets).clone()
    mean = mean.permute(1, 2, 0).contiguous().to(device)  # (S, S, 3)
    # The crop's place in the stored image matters to its planes only: the mean is that of the crop.
    return lambda images, offsets, mirror: prepare(
        crops_as_rgb(images, offsets), torch.zeros_like(offsets), mirror, mean
    )


def scores_of(model: torch.nn.Module, images: Tensor, precision: str) -> Tensor:
    """Float32 scores (N, classes) of the network's input, without gradients, in the precision of training."""
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images).float()


class TenCrops(torch.nn.Module):
    """The test of Krizhevsky et al. (NIPS 2012), section 4.1: softmax outputs averaged over ten crops of an image.

    They are the four corners, the centre, and these five mirrored.

    In: uint8 (N, H, W, 3), H and W above the network's S. Out: logarithms of the average, (N, classes): their softmax
    is the average itself, so that loss and accuracy are computed from them as from scores.

    Args:
        mean: float32 (H, W, 3) of the whole images, or (S, S, 3): then every crop has the mean of the centre crop.
    """

    def __init__(self, model: torch.nn.Module, mean: Tensor, size: int):
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of the averaged softmax, float32 (N, classes)."""
        size, n = self.size, len(images)
        down, right = images.shape[1] - size, images.shape[2] - size
        corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        whole = self.mean.shape[:2] == images.shape[1:3]
        total = 0
        for top, left in corners:
            crops = images[:, top : top + size, left : left + size].contiguous()
            place = (top, left) if whole else (0, 0)
            offsets = torch.tensor(place, dtype=torch.int32, device=images.device).repeat(n, 1)
            for mirrored in (False, True):
                mirror = torch.full((n,), mirrored, device=images.device)
                total = total + F.softmax(self.model(prepare(crops, offsets, mirror, self.mean)).float(), dim=1)
        return (total / 10).log()


def whole_mean(mean: Tensor | None, own: Tensor) -> Tensor | None:
    """The mean image of whole stored images, float32 (H, W, 3), if it is the one that the network was trained with.

    Args:
        mean: that of the shards, as job.batches.device.load_mean returns it.
        own: the network's, float32 (3, S, S), of the centre crop.
    """
    size = own.shape[1]
    if mean is None or mean.shape[0] < size or mean.shape[1] < size:
        return None
    return mean if torch.equal(mean_crop(mean, size), own) else None


def check_ten_crops(split: Split, size: int) -> int:
    """Side in pixels of the centre square that ten crops of `size` are taken from.

    Raises:
        InputError: the images differ in size, or are as small as the crop.
    """
    side, where = min(split.height, split.width), f"the {split.name} images of {split.root}"
    if not side:
        raise InputError(f"--crops 10 needs images of one size, and {where} differ; pack them with --resize")
    if side <= size:
        raise InputError(
            f"--crops 10 makes no sense: {where} are {split.width}x{split.height}, the network takes {size}x{size}, so "
            "all crops would be the same; leave it out, or pack larger images"
        )
    return side
