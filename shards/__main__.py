"""The commands of this package: `python -m shards`."""

from shards.command import run, say_commands

COMMANDS = {
    "pack": "pack images into shuffled WebDataset shards, in parallel",
    "index": "make the index of shards that others made",
    "verify": "read every byte of a folder of shards, report damage, and repair the index",
}

if __name__ == "__main__":
    run(lambda: say_commands("shards", COMMANDS))
