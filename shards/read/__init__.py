"""From a position in a shard to the pixels of an image.

In: a split's index and a sample's number; bytes of JPEG, PNG, ... Out: uint8 arrays of shape (H, W, 3).
"""
