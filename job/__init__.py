"""Data-parallel training of AlexNet with Horovod: train, evaluate, measure. Knows batches, and nothing of tar files.

For notebooks: `load_network` and `load_run`. Importing this package takes no time: torch comes with the first call.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from job.inference.record import Run
    from job.inference.trained import TrainedNetwork

__all__ = ["load_network", "load_run"]


def load_network(path: str | os.PathLike, checkpoint: str = "best", device: str = "auto") -> "TrainedNetwork":
    """A trained network that takes images as they are.

    >>> net = load_network("runs/first")  # doctest: +SKIP
    >>> net.predict(["shoe.png"], top=2)  # doctest: +SKIP
    [[Guess(name='Sneaker', label=7, probability=0.94), Guess(name='Sandal', label=5, probability=0.05)]]
    >>> scores = net(net.preprocess("shoe.png")[None])  # float32 (1, classes)  # doctest: +SKIP

    Args:
        path: run directory, or checkpoint file.
        checkpoint: of a run directory: best (best.pt, or the newest where nothing was validated), newest, or a file.
        device: auto (a GPU where there is one), cpu or cuda.

    Raises:
        InputError: no such checkpoint, it is damaged, or there is no GPU for `cuda`.
    """
    from job.inference import trained

    return trained.load_network(os.fspath(path), checkpoint, device)


def load_run(path: str | os.PathLike) -> "Run":
    """Settings, metrics and summary of a training run, finished or not.

    >>> run = load_run("runs/first")  # doctest: +SKIP
    >>> run.settings["optim.lr"], run.summary["top1"]  # doctest: +SKIP
    >>> [(line["step"], line["loss"]) for line in run.train]  # doctest: +SKIP

    Raises:
        InputError: not a run directory.
    """
    from job.inference import record

    return record.load_run(os.fspath(path))
