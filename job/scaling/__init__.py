"""Scaling studies: runs of `job.train` on several numbers of ranks, a model of a step's time, a report, the cost.

In: a plan, or the directory of a study. Out: points, predictions for more GPUs, and report.html.
"""
