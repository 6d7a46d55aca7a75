"""What a run uses of its machines: energy, memory, floating-point operations, a GPU's time.

In: counters of the driver and the kernel (NVML, RAPL, /proc), sizes of layers. Out: joules, bytes, FLOP/s, for every
rank; what cannot be measured is None or NaN, never 0.
"""

# Names of a run's energy so far, over all of its starts, in metrics.jsonl and summary.json; None: not measured.
JOULES = ("gpu_joules", "cpu_joules")
