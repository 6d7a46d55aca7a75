"""Checks of the GPUs by NVML: memory, clocks and what slows them, NVLink and PCIe; and the speed of the copy to a GPU.

In: nvidia-ml-py, where it is installed. Out: findings. `nvml_facts` and `copy_facts` run in a process of their own.
"""

from typing import Any

from job.doctor.findings import Finding, ok, slow
from shards.errors import few

BUSY_BYTES = 1 << 30  # more than this in use on a GPU, and another process is on it
GIB = 1 << 30
COPY_BYTES = 64 << 20
# Why a clock is lower than it could be, by NVML's bits (NVML API Reference, nvmlClocksEventReasons). Those of an idle
# GPU, of a limit that an administrator set and of the power limit at full load are no fault.
THROTTLED = {
    0x08: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake of the supply",
}


def nvml_facts() -> list[dict[str, Any]]:
    """For each GPU: name, memory, clocks, reasons for a low clock, NVLinks that are up, PCIe generation and width."""
    import pynvml as nvml

    nvml.nvmlInit()
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        name = nvml.nvmlDeviceGetName(gpu)

        def ask(function: str, *arguments: Any, gpu=gpu) -> Any:
            try:
                return getattr(nvml, function)(gpu, *arguments)
            except (nvml.NVMLError, AttributeError):
                return None  # this GPU or this driver does not tell

        states = [ask("nvmlDeviceGetNvLinkState", link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
        found.append(
            {
                "name": name if isinstance(name, str) else name.decode(),
                "memory": memory.total,
                "used": memory.used,
                "clock": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
                "most_clock": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
                "throttled": ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0,
                "celsius": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
                "nvlinks": sum(state == 1 for state in states),
                "nvlinks_down": sum(state == 0 for state in states),
                "pcie": [ask("nvmlDeviceGetMaxPcieLinkGeneration"), ask("nvmlDeviceGetCurrPcieLinkWidth")],
                "pcie_width": ask("nvmlDeviceGetMaxPcieLinkWidth"),
            }
        )
    return found


def copy_facts() -> dict[str, float]:
    """Bytes per second of a copy from pinned memory to the first GPU."""
    import time

    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"bytes_per_second": COPY_BYTES / min(seconds)}


def check_gpus(gpus: list[dict[str, Any]] | dict[str, str]) -> list[Finding]:
    """Findings of what `nvml_facts` returned, or {"error": why}; none without a GPU."""
    if isinstance(gpus, dict):
        why = f"not measured: {gpus['error']}"
        advice = "pip install nvidia-ml-py" if "pynvml" in gpus["error"] else ""
        return [ok("gpu memory", why, advice), ok("clocks", why, advice), ok("links", why, advice)]
    return [_memory(gpus), _clocks(gpus), _links(gpus)] if gpus else []


def _memory(gpus: list[dict[str, Any]]) -> Finding:
    least = min(gpus, key=lambda gpu: gpu["memory"] - gpu["used"])
    free = least["memory"] - least["used"]
    text = f"{free / GIB:.1f} of {least['memory'] / GIB:.1f} GiB free, on the fullest of {len(gpus)}"
    busy = [str(index) for index, gpu in enumerate(gpus) if gpu["used"] > BUSY_BYTES]
    if busy:
        text += f"; in use: GPU {few(busy, separator=', ')}"
        return slow("gpu memory", text, "nvidia-smi shows by whom; leave that node out or end it", value=float(free))
    return ok("gpu memory", text, same=f"{least['memory'] / GIB:.1f} GiB", value=float(free))


def _clocks(gpus: list[dict[str, Any]]) -> Finding:
    clocks = [gpu["clock"] for gpu in gpus if gpu["clock"] is not None]
    most = max((gpu["most_clock"] or 0 for gpu in gpus), default=0)
    hottest = max((gpu["celsius"] or 0 for gpu in gpus), default=0)
    text = f"{min(clocks, default=0)} to {max(clocks, default=0)} of {most} MHz now, up to {hottest} C"
    for index, gpu in enumerate(gpus):
        reasons = [word for bit, word in THROTTLED.items() if gpu["throttled"] & bit]
        if reasons:
            text += f"; GPU {index} is throttled: {', '.join(reasons)}"
            return slow("clocks", text, "tell the administrators; all ranks wait for the slowest GPU", same=str(most))
    return ok("clocks", text, same=f"{most} MHz")


def _links(gpus: list[dict[str, Any]]) -> Finding:
    generation, width = gpus[0]["pcie"]
    text = f"{gpus[0]['nvlinks']} NVLinks per GPU, PCIe {generation} x{width}"
    down = [str(i) for i, gpu in enumerate(gpus) if gpu["nvlinks"] < max(g["nvlinks"] for g in gpus)]
    narrow = [str(i) for i, gpu in enumerate(gpus) if (gpu["pcie"][1] or 0) < (gpu["pcie_width"] or 0)]
    if down:
        advice = "nvidia-smi nvlink -s shows the links; leave that node out"
        return slow("links", f"{text}; GPU {few(down, separator=', ')} has fewer NVLinks up", advice, same=text)
    if narrow:
        text += f"; GPU {few(narrow, separator=', ')} has fewer PCIe lanes than it could"
        return slow("links", text, "copies to it are slower; tell the administrators", same=text)
    return ok("links", text, same=text)
