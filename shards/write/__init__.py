"""Writing shards: images resized and encoded by several processes or ranks, the same bytes for any number of them.

In: images and labels of `shards.sources`. Out: tar shards, their .idx files, the mean image.
"""
