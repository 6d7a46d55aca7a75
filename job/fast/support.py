"""Where the fast path can be taken. In: a device, or the settings of a run. Out: the reason why not, or nothing."""

from collections.abc import Mapping
from typing import Any

import torch

from shards.machine.caches import triton_lacks


def unsupported(device: torch.device) -> str:
    """Why the fast path cannot run on a device, or an empty string. Does not launch anything on the device."""
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    if torch.version.hip:
        return "it is made for NVIDIA's GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bf16 tensor cores (compute capability 8.0)"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    return triton_lacks()


def lacks(settings: Mapping[str, Any]) -> str:
    """Why the fast path has no kernels for these settings, by option name, or an empty string."""
    if settings.get("parallel") == "hybrid":
        return "--parallel hybrid has none"
    if settings.get("model.layout", "alexnet") != "alexnet":
        return f"--model.layout {settings['model.layout']} has none"
    if settings.get("freeze") == "conv" and settings.get("model.batch-norm"):
        return "--freeze conv has none with batch normalisation"
    return ""
