"""Spellings of names: which split a name means, which files nobody meant to be there, Unicode forms.

In: the name of a file or a folder. Out: the split that it names ("train", "val" or "test"), or whether it is stray.
"""

import re
import unicodedata

# Files with other endings are left out, and counted.
IMAGE_ENDINGS = tuple(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .ppm .pgm .pbm .pnm .tif .tiff".split())

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_FILLERS = "datasets?|imagenet|ilsvrc|images?|imgs?|pictures?|photos?|jpe?gs?|splits?|folders?|data|sets?|all"
_SPLIT = re.compile(f"(?:{_FILLERS})*({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?:{_FILLERS})*")
_FILLER = re.compile(f"(?:{_FILLERS})+")

# Made by macOS, Windows, Synology, QNAP, Python and Linux beside people's own files; hidden files are stray as well.
_STRAY = {
    "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler",
    "system volume information", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__pycache__",
    "lost+found",
}  # fmt: skip


def is_stray(path: str) -> bool:
    """Whether any part of a path is a hidden file or one that a system made: `.DS_Store`, `__MACOSX/x.jpg`."""
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in _STRAY for part in path.split("/"))


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_stray(name)


def split_of(name: str) -> str:
    """The split, if a name means nothing else: `Train`, `training_set`, `val_images`, `ILSVRC2012_img_val`.

    Empty for other names, such as `freight_train`.
    """
    found = _SPLIT.fullmatch(_letters(name))
    return SPLIT_WORDS[found[1]] if found else ""


def split_word(name: str) -> str:
    """The split named by the last word that names one: `seg_train`, `imagenet-val-0001`. Empty: no word does."""
    found = [split for word in re.split(r"[\W\d_]+", name) if (split := split_of(word))]
    return found[-1] if found else ""


def is_filler(name: str) -> bool:
    """Whether a name tells nothing: `images`, `JPEGImages`, `data`."""
    return bool(_FILLER.fullmatch(_letters(name)))


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC). macOS writes the same name decomposed."""
    return unicodedata.normalize("NFC", name)


def _letters(name: str) -> str:
    return re.sub(r"[\W\d_]+", "", name).lower()
