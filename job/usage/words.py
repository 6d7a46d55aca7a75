"""What a run uses, in words, for the closing table of a run, job.watch and job.bench. Loads nothing.

In: fields of metrics.jsonl, summary.json or of a result of job.bench. Out: a line without its name.
"""

from typing import Any

NOT_MEASURED = "not measured"


def measured(gpu_joules: float | None, cpu_joules: float | None) -> str:
    """What the energy is of: "GPU + CPU", "GPU", "CPU", or "not measured"."""
    parts = [name for name, value in (("GPU", gpu_joules), ("CPU", cpu_joules)) if value is not None]
    return " + ".join(parts) or NOT_MEASURED


def energy(values: dict[str, Any]) -> str:
    """`12.3 J per image, 0.0123 kWh, 5.8 g of CO2 (GPU + CPU)`, or `not measured`."""
    if values.get("kwh") is None:
        return NOT_MEASURED
    parts = [f"{values['kwh']:.3g} kWh"]
    if values.get("joules_per_image") is not None:
        parts.insert(0, f"{values['joules_per_image']:.3g} J per image")
    if values.get("co2_grams") is not None:
        parts.append(f"{values['co2_grams']:.3g} g of CO2")
    return f"{', '.join(parts)} ({measured(values['gpu_joules'], values['cpu_joules'])})"


def flops(values: dict[str, Any]) -> str:
    """`102 TFLOP/s, 5.15% of the peak (1,979 TFLOP/s)`; of all ranks, as the values are."""
    rate, share = values["flops_per_second"], values["peak_fraction"]
    return _rate(rate) if not share else f"{_rate(rate)}, {share:.1%} of the peak ({_rate(rate / share)})"


def memory(values: dict[str, Any]) -> str:
    """`GPU 2.10 GiB allocated, 3.00 GiB reserved, host 1.20 GiB, readers 0.40 GiB`, of summary.json's `memory`."""
    sizes = {name: value / 2**30 for name, value in values.items() if value is not None}
    parts = [f"host {sizes['host_bytes']:.2f} GiB, readers {sizes['readers_bytes']:.2f} GiB"]
    if "gpu_allocated_bytes" in sizes:
        gpu = f"GPU {sizes['gpu_allocated_bytes']:.2f} GiB allocated, {sizes['gpu_reserved_bytes']:.2f} GiB reserved"
        parts.insert(0, gpu)
    return ", ".join(parts)


def _rate(flops_per_second: float) -> str:
    value, unit = (
        (flops_per_second / 1e12, "TFLOP/s") if flops_per_second >= 1e12 else (flops_per_second / 1e9, "GFLOP/s")
    )
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
