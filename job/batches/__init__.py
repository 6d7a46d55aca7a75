"""From shards to batches on the training device: worker processes that decode, the copy.

In: a split of `shards`, the seed, the step to start from. Out: images and labels, the same for any number of ranks.
"""
