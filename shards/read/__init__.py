"""Reading samples: which comes when, from its number to the bytes of its image, and from these to pixels.

In: the index of a split and the number of a sample; bytes of JPEG, PNG, planes, ... Out: uint8 arrays (H, W, 3).
"""
