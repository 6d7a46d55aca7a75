"""What is on disk: tar shards, the .idx file beside each, the JSON index of a split, and how shards are named.

In: a folder or a URL of shards. Out: where the bytes and the label of each sample are. Nothing here decodes an image.
"""
