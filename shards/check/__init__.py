"""Looking for damage in shards.

In: a tar file. Out: what is wrong with which member.
"""
