"""Collections of images as people have them: class folders, ImageNet's archives, IDX files, label lists.

In: a path. Out: the splits found there, each a list of images and labels in one fixed order.
"""
