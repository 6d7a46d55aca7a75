"""A process among ranks: its start and end, what all ranks agree on, who hangs, and how gradients are averaged.

In: the settings, the launcher's environment, gradients of one rank. Out: a rank with a device; averaged gradients.
"""
