"""The machine: files local and remote, locks, cache folders, cores, launchers, facts to report, and the terminal.

In: paths, URLs, limits of the process. Out: bytes, locks, numbers of cores. Nothing here knows tar files or images.
"""
