"""Scaling studies: runs of `job.train` with several numbers of ranks, a model of a step, a report, costs.

In: a plan, or the folder of a study. Out: measured points, predictions for more GPUs, and report.html.
"""
