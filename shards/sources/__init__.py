"""Where images come from: class folders, ImageNet's archives, IDX files, label lists, shards.

In: a path. Out: the splits found there, each with its images and labels in one fixed order.
"""
