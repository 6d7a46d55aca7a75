"""Packing: from the images of a source to shards, by any number of processes, to the same bytes.

In: `Items` of shards.sources and `Options`. Out: tars, .idx files, `<split>.json`, labels, CRC-32s, mean.npy.
"""
