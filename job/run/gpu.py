"""How much of a GPU this rank uses, as its driver tells it.

In: the rank's device. Out: bytes of memory in use by this process, and the share of the time in which kernels ran.
"""

import ctypes
import functools

import torch


class _Utilisation(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]  # nvmlUtilization_t, percent


@functools.cache
def _handle(device: torch.device):
    """NVML, the library behind nvidia-smi, and its handle of the device; None without it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return None
        return nvml, handle
    except (OSError, AttributeError):
        return None


def gpu_use(device: torch.device) -> tuple[float, float]:
    """(bytes of memory that this process holds, share of the last moments in which the GPU was busy; -1: unknown)."""
    if device.type != "cuda":
        return 0.0, -1.0
    found, use = _handle(device), _Utilisation()
    if found is None or found[0].nvmlDeviceGetUtilizationRates(found[1], ctypes.byref(use)):
        return float(torch.cuda.memory_reserved(device)), -1.0
    return float(torch.cuda.memory_reserved(device)), use.gpu / 100
