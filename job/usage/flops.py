"""Floating-point operations of a training step, and the peak of a device, whose share a run reaches.

In: a network, the name of a GPU. Out: FLOP per image, FLOP/s. A multiplication and an addition are two.
"""

import re

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from job.network.alexnet import AlexNet

# The backward pass multiplies twice as often as the forward pass: for the gradients of inputs and of weights. (Kaplan
# et al. 2020, arXiv:2001.08361, section 2.1.) The first layer needs no gradient of its input, which is left uncounted
# here as elsewhere, so that rates can be compared.
TRAINING = 3

# Dense peaks, TFLOP/s in fp32 without matrix units, tf32 and bf16 with them, from NVIDIA's data sheets (which state
# those of the matrix units with sparsity since the A100: halved here). None: the GPU has no such unit.
# V100: "NVIDIA V100 Tensor Core GPU" 2020; A100: "NVIDIA A100 Tensor Core GPU" 2022; A30, A40, A10, L4, L40, L40S:
# their data sheets; H100: "NVIDIA H100 Tensor Core GPU" 2024; H200: "NVIDIA H200 Tensor Core GPU" 2024; GH200: "NVIDIA
# GH200 Grace Hopper Superchip" 2023. The first expression that fits torch's name of the device counts.
PEAKS = (
    (r"V100S", (16.4, None, None)),
    (r"V100.*PCI", (14.0, None, None)),
    (r"V100", (15.7, None, None)),
    (r"A100\b", (19.5, 156.0, 312.0)),
    (r"A30\b", (10.3, 82.0, 165.0)),
    (r"A40\b", (37.4, 74.8, 149.7)),
    (r"A10\b", (31.2, 62.5, 125.0)),
    (r"GH200\b", (67.0, 494.0, 990.0)),
    (r"H200 NVL", (60.0, 417.5, 835.5)),
    (r"H200\b", (67.0, 494.5, 989.5)),
    (r"H100 NVL", (60.0, 417.5, 835.5)),
    (r"H100 PCIe", (51.0, 378.0, 756.5)),
    (r"H100\b", (67.0, 494.5, 989.5)),
    (r"L40S\b", (91.6, 183.0, 362.0)),
    (r"L40\b", (90.5, 90.5, 181.0)),
    (r"L4\b", (30.3, 60.0, 121.0)),
)
PRECISIONS = ("fp32", "tf32", "bf16")


def training_flops(model: AlexNet) -> float:
    """FLOP per training image: of convolutions and matrix products, by the sizes of the layers; 4.3e9 for `paper`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}  # nothing is computed
    images = torch.empty(2, 3, model.image_size, model.image_size, device="meta")  # batch normalisation takes no less
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, sizes, (images,))
    return TRAINING * counter.get_total_flops() / len(images)


def peak(device: str, precision: str) -> float | None:
    """FLOP/s of a GPU at most, by its name and the precision of the products; None: not known. A slice of a GPU (MIG)
    has a part of it, which its name does not say."""
    if "MIG" in device:
        return None
    found = next((peaks for name, peaks in PEAKS if re.search(name, device)), None)
    value = found[PRECISIONS.index(precision)] if found else None
    return value * 1e12 if value else None


class Flops:
    """The arithmetic of a run: its work per image, and what its devices can do at most. No model: nothing is known."""

    def __init__(self, model: AlexNet | None, device: torch.device, precision: str):
        self._per_image = training_flops(model) if model else 0.0
        self._peak = peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None

    def rate(self, images_per_second: float | None, ranks: int) -> dict[str, float | None]:
        """`flops_per_second` of all ranks together, and `peak_fraction`, the share of what their devices can do; None:
        not known."""
        total = images_per_second * self._per_image if images_per_second and self._per_image else None
        return {
            "flops_per_second": total,
            "peak_fraction": total / ranks / self._peak if total and self._peak else None,
        }
