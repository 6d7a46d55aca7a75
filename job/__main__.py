"""The commands of this package: `python -m job`."""

from shards.command import run, say_commands

COMMANDS = {
    "train": "train AlexNet on any number of ranks",
    "watch": "show the progress of a run",
    "evaluate": "accuracy of a trained network on shards: as a whole, per class, per image",
    "predict": "classes of image files by a trained network",
    "look": "a page of pictures: what a network sees and confuses, or what is in a folder of shards",
    "export": "write a trained network for other programs",
    "bench": "measure the loader, the training step or the allreduce alone",
    "scaling": "scaling studies: run, report, predict",
    "doctor": "what is installed, what is slow, what is wrong, what to do",
}

if __name__ == "__main__":
    run(lambda: say_commands("job", COMMANDS))
