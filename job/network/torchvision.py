"""What torchvision's AlexNet has that ours has not: the names of its layers, and the scale of its input.

In and out: state dicts. Torchvision's network takes (x / 255 - MEAN) / STD of pixels x from 0 to 255; ours takes pixels
minus a mean image. In the layout `torchvision` that image is the constant colour 255 * MEAN, and conv1 divides by
255 * STD. So both networks have the same weights, gradients and learning rates, and a conversion is a change of names.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of ImageNet's images, as all weights of torchvision assume.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_OURS = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}
NAMES = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in _OURS.items() for kind in ("weight", "bias")}


def mean_colour(device: torch.device | str = "cpu") -> Tensor:
    """The mean image of the layout, float32 (1, 1, 3): see `job.batches.device.load_mean`."""
    return 255 * torch.tensor(MEAN, device=device).view(1, 1, 3)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `torchvision.models.alexnet` under our names. Raises KeyError for a name that it has not."""
    return {NAMES[name]: tensor for name, tensor in state.items()}


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of our network in the layout `torchvision` under torchvision's names and in its order."""
    return {theirs: state[ours] for theirs, ours in NAMES.items()}


class PixelConv2d(nn.Conv2d):
    """conv1 of the layout `torchvision`: a convolution of x / (255 * STD), for images x (N, 3, H, W) in pixel values.

    It scales its filters, not the images: that costs 23 thousand multiplications per step. (Filters that were stored
    scaled would need a learning rate of their own, 3,300 times smaller.)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scale = 1 / (255 * torch.tensor(STD, dtype=torch.float64))
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)
