"""What NVML, the library behind nvidia-smi, says of this rank's GPU.

In: a torch device. Out: plain numbers; NaN for what NVML does not tell.
"""

import functools
import math
from typing import Any

import torch


@functools.cache
def _handle(device: torch.device) -> tuple[Any, Any] | None:
    """NVML's Python module, and its handle of the device; None without them.

    The handle is that of the UUID: NVML numbers all GPUs of the node, CUDA those of CUDA_VISIBLE_DEVICES.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # the package or the library is missing, or the driver is another one
        return None


def gpu_use(device: torch.device) -> tuple[float, float]:
    """Bytes of memory that this process holds, and the share of the last second in which kernels ran (-1: unknown)."""
    if device.type != "cuda":
        return 0.0, -1.0
    held, found = float(torch.cuda.memory_reserved(device)), _handle(device)
    if found is None:
        return held, -1.0
    nvml, handle = found
    try:
        return held, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except nvml.NVMLError:
        return held, -1.0


def joules(device: torch.device) -> float:
    """Energy that the GPU has drawn since its driver was loaded (Volta and later); NaN where it is not known.

    A slice of a GPU (MIG) has no counter of its own: that of the GPU would count the other slices' work.
    """
    found = _handle(device) if device.type == "cuda" else None
    if found is None:
        return math.nan
    nvml, handle = found
    try:
        if _sliced(nvml, handle):
            return math.nan
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except nvml.NVMLError:
        return math.nan


def _sliced(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a GPU that cannot be sliced
        return False
