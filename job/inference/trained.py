"""A trained network that takes images as they are: files, arrays, uint8 batches.

In: a run directory or a checkpoint. Out: `TrainedNetwork`. Images are prepared as in validation: as shards.pack stores
them, centre crop, the network's own mean image. The one difference is that no JPEG is made of them in between.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from job.batches.device import prepare
from job.batches.reader import short_side
from job.inference.outcomes import class_name
from job.network.precision import set_precision
from job.run import checkpoint
from shards.errors import InputError
from shards.machine.cores import cores_given
from shards.machine.files import read_file
from shards.read.images import as_rgb, cover, decode, fit_image

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 64  # images per pass


class Guess(NamedTuple):
    """A class that an image may be of."""

    name: str
    label: int
    probability: float


class TrainedNetwork(nn.Module):
    """A network with all that belongs to it: class names, mean image, preparation of images.

    Attributes:
        path: the checkpoint.
        step: steps of training.
        best_top1: accuracy of the best validation of its run up to this step, a fraction; None: there was none.
        classes: names of the classes by label; of the same length as the scores.
        image_size: side S of the images that the network takes, in pixels.
        settings: of the training run, by option name.
        network: the AlexNet itself: float32 (N, 3, S, S), mean subtracted -> scores (N, classes).
        mean: float32 (3, S, S).
    """

    def __init__(self, path: str, state: checkpoint.RunState):
        super().__init__()
        self.path, self.step, self.settings = path, state.step, state.config
        self.best_top1 = state.best if state.best >= 0 else None
        self.network = checkpoint.network(state, path)
        self.classes = [class_name(state.classes, label) for label in range(self.network.fc8.out_features)]
        self.image_size = state.mean.shape[1]
        self.stored = tuple(state.image)  # height and width of the images in the shards; (0, 0): they differed
        self.precision = state.config.get("precision", "fp32")
        self.register_buffer("mean", state.mean)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # uint8 (N, S, S, 3)
        """Scores (N, classes), float32, of prepared images: uint8 (N, S, S, 3) on any device."""
        size = self.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"got {images.dtype} {tuple(images.shape)}, need torch.uint8 (N, {size}, {size}, 3); preprocess() "
                "makes it of an image"
            )
        images = images.to(self.mean.device)
        still = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        corner = torch.zeros(len(images), 2, dtype=torch.int32, device=images.device)
        inputs = prepare(images, corner, still, self.mean.permute(1, 2, 0).contiguous())  # (N, 3, S, S)
        set_precision(self.precision)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(inputs).float()

    def preprocess(self, image: "str | os.PathLike | bytes | np.ndarray | Image") -> Tensor:
        """An image as the network takes it: uint8 (S, S, 3).

        Args:
            image: path or bytes of an image file, a PIL image, or an array, uint8 (H, W, 3) RGB or (H, W).

        Raises:
            BadImage: the file cannot be decoded. (A ValueError.)
            OSError: it cannot be read.
        """
        return torch.from_numpy(np.array(crop_centre(self._fit(image), self.image_size)))

    def _fit(self, image: Any) -> np.ndarray:
        """The image as shards.pack stores it (--fit crop), or as the readers scale images of different sizes."""
        if isinstance(image, str | os.PathLike):
            image = read_file(os.fspath(image))
        height, width = self.stored
        size = min(height, width) or short_side(self.image_size)
        square = height == width > 0
        if isinstance(image, bytes | bytearray | memoryview):
            image = decode(bytes(image), size, square=square)
        elif not isinstance(image, np.ndarray):
            image = np.asarray(image.convert("RGB"))
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3:
            raise ValueError(f"got {image.dtype} {image.shape}, need uint8 (H, W, 3) or (H, W)")
        if square or not height:
            return as_rgb(fit_image(image, size, "crop" if square else "none"))
        return as_rgb(cover(image, height, width))

    def predict(self, images: Iterable, top: int = 5) -> list[list[Guess]]:
        """The `top` most likely classes of each image, the most likely first. Images as in `preprocess`."""
        guesses: list[list[Guess]] = []
        batch: list[Tensor] = []
        for image in [images] if isinstance(images, str | bytes | os.PathLike) else images:
            batch.append(self.preprocess(image))
            if len(batch) == BATCH:
                guesses += self.guess(torch.stack(batch), top)
                batch = []
        return guesses + (self.guess(torch.stack(batch), top) if batch else [])

    def guess(self, images: Tensor, top: int = 5) -> list[list[Guess]]:
        """The `top` most likely classes of each prepared image, uint8 (N, S, S, 3)."""
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            likely = torch.softmax(self(images), dim=1).topk(min(top, len(self.classes)), dim=1)
        self.train(was_training)
        return [
            [Guess(self.classes[label], label, probability) for label, probability in zip(*pair, strict=True)]
            for pair in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]

    def extra_repr(self) -> str:
        """For print()."""
        return f"{self.path}, step {self.step}, {len(self.classes)} classes, {self.image_size}x{self.image_size} pixels"


def crop_centre(image: np.ndarray, size: int) -> np.ndarray:
    """The centre crop of validation: (H, W, 3) -> (size, size, 3)."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def use_given_cores() -> None:
    """Compute on the cores that Slurm or the control group gives this process: for commands. torch may count more."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_given(1).count)


def choose_device(name: str) -> torch.device:
    """The device for `--device auto|cpu|cuda`. Raises InputError when there is no GPU for cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; python -m job.doctor says why")
    use_gpu = name == "cuda" or name == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def load_network(path: str, which: str = "best", device: str = "auto") -> TrainedNetwork:
    """See `job.load_network`."""
    chosen = choose_device(device)
    found, state = checkpoint.load_named(path, which)
    return TrainedNetwork(found, state).to(chosen)
