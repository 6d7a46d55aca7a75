"""Measurements of one part of the job alone: reading, the training step, the allreduce.

In: options of the command line. Out: a table or a JSON object; nothing here is used by training.
"""
