"""ImageNet in small: 40 classes, 800 training and 120 validation images with the oddities of the real one.

In: a folder. Out: the same images as class folders and as the archives in which ILSVRC2012 is distributed.
"""

import gzip
import io
import os
import tarfile

import numpy as np
from PIL import Image

from shards.sources.mat import load_mat

META = os.path.join(os.path.dirname(__file__), "data", "meta40.mat")  # written by scipy.io.savemat, compressed
PER_CLASS, VAL = 20, 120


def synsets() -> list[dict]:
    """The 40 classes as meta.mat has them, in the order of ILSVRC2012_ID, which is not that of the WordNet ids."""
    with open(META, "rb") as file:
        return load_mat(file.read(), META)["synsets"][:40]


def picture(number: int) -> np.ndarray:
    """Pixels of an image: any size from 20x24, smooth so that JPEG keeps it."""
    random = np.random.default_rng(number)
    height, width = random.integers(20, 60, 2)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((int(width) + 4, int(height)), Image.Resampling.BILINEAR))


def jpeg(image: np.ndarray, **options) -> bytes:
    """A JPEG file of quality 95."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def odd(number: int) -> bytes:
    """An image file; every 16th is one of those that make ImageNet hard to read."""
    image = picture(number)
    kind = number % 96
    file = io.BytesIO()
    if kind == 0:  # 22 images of ILSVRC2012 are CMYK
        Image.fromarray(image).convert("CMYK").save(file, "JPEG", quality=95)
        return file.getvalue()
    if kind == 16:  # n02105855_2933.JPEG is a PNG
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()
    if kind == 32:  # grey
        return jpeg(image[:, :, 0])
    if kind == 48:  # EXIF that says "rotate", and whose second entry points nowhere
        exif = (
            b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x87\x69\0\x04\0\0\0\x01\xff\xff\xff\xf0"
        )
        plain = jpeg(image)
        return plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    if kind == 64:  # progressive
        return jpeg(image, progressive=True)
    if kind == 80:  # bytes behind the end, as some cameras write them
        return jpeg(image) + b"\0junk"
    return jpeg(image)


def train_images() -> dict[str, dict[str, bytes]]:
    """File name and bytes of the training images, by WordNet id. All classes use the same base names."""
    wnids = [s["WNID"] for s in synsets()]
    return {
        wnid: {f"picture_{i}.JPEG": odd(c * PER_CLASS + i) for i in range(PER_CLASS)} for c, wnid in enumerate(wnids)
    }


def val_images() -> list[tuple[str, str, bytes]]:
    """File name, WordNet id and bytes of the validation images."""
    wnids = [s["WNID"] for s in synsets()]
    return [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", wnids[i * 7 % 40], odd(5000 + i)) for i in range(VAL)]


def write_folders(root: str, split: str = "") -> None:
    """`root`/train/WNID/* and `root`/val/WNID/*."""
    for wnid, files in train_images().items():
        for name, data in files.items():
            _write(os.path.join(root, "train", wnid, name), data)
    for name, wnid, data in val_images():
        _write(os.path.join(root, "val", wnid, name), data)


def write_archives(root: str) -> None:
    """`root`/ILSVRC2012_img_train.tar (of class tars), ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz."""
    os.makedirs(root, exist_ok=True)
    classes = {f"{wnid}.tar": _tar(files) for wnid, files in train_images().items()}
    _write(os.path.join(root, "ILSVRC2012_img_train.tar"), _tar(classes))
    _write(os.path.join(root, "ILSVRC2012_img_val.tar"), _tar({name: data for name, _, data in val_images()}))
    write_devkit(os.path.join(root, "ILSVRC2012_devkit_t12.tar.gz"))


def write_devkit(path: str) -> None:
    """meta.mat and the ground truth, in which a class is its ILSVRC2012_ID."""
    number = {s["WNID"]: int(s["ILSVRC2012_ID"].item()) for s in synsets()}
    truth = "".join(f"{number[wnid]}\n" for _, wnid, _ in val_images())
    with open(META, "rb") as file:
        meta = file.read()
    folder = "ILSVRC2012_devkit_t12/data"
    files = {f"{folder}/meta.mat": meta, f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    _write(path, gzip.compress(_tar(files)))


def write_val_text(path: str) -> None:
    """The same labels as a text file of two columns."""
    _write(path, "".join(f"{name} {wnid}\n" for name, wnid, _ in val_images()).encode())


def _tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
