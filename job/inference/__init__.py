"""A trained network in use: checkpoint and image in, classes out; what it got right and wrong; the record of a run.

In: a run directory or a checkpoint, images as files, arrays or batches. Out: scores, tables, CSV. No ranks needed.
"""
