"""Pages of pictures: what a network sees, learned and confuses; what is in a folder of shards.

In: a run directory, or a folder of shards. Out: one HTML file that needs nothing else. See README.md of this folder.
"""
