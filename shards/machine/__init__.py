"""What the machine gives: files near and far, locks, cache folders, cores, and the terminal.

In: paths, URLs, the process's own limits. Out: bytes, locks, numbers of cores. Nothing here knows tar files or images.
"""
