"""Reading whole tars: to make an index of them, to find damage in them, and to take damage out of an index.

In: tars and what an earlier index says of them. Out: `Problem`s that name shard and sample, and new index files.
"""
