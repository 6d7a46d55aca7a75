"""What lies on disk: tar shards, the .idx file beside each, the JSON index of a split, and how shards are named.

In: a folder or a URL of shards. Out: where each sample's bytes and label are. Nothing here decodes an image.
"""
