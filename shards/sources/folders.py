"""Images in folders: SOURCE/train/CLASS/*, SOURCE/val/CLASS/*, SOURCE/CLASS/*, or flat folders with labels.

In: a folder. Out: one `Items` per split; the order of images depends on their names only. Notes say what is left out;
what is ambiguous is an error.
"""

import collections
import dataclasses
import os

from shards.errors import InputError, nearest
from shards.sources import ilsvrc
from shards.sources.items import Items, Rows
from shards.sources.labels import Labels, NameTable
from shards.sources.spellings import composed, is_filler, is_image, is_stray, split_of, split_word


@dataclasses.dataclass
class _Listing:
    """What is in the folder of a split, sorted."""

    root: str
    folders: dict[str, list[str]]  # images by class folder, relative to it
    flat: list[str]  # images in no class folder, relative to `root`
    others: collections.Counter  # other files, by their ending


def split_folders(source: str, labels: str = "") -> dict[str, list[str]]:
    """Names of the folders in `source` that are splits, by split. Empty: its folders, if any, are classes."""
    folders = [entry.name for entry in _scan(source) if entry.is_dir()]
    found = _by_split(folders, split_of)
    if not found:
        # seg_train and seg_test: only if such folders hold folders, as a class seldom does.
        deep = [name for name in folders if split_word(name) and _holds_folders(os.path.join(source, name))]
        found = _by_split(deep, split_word)
        return found if "train" in found and len(found) > 1 else {}
    named = [name for names in found.values() for name in names]
    if len(named) == 1 and not labels and not _holds_folders(os.path.join(source, named[0])):
        others = [os.path.join(source, name) for name in folders if name not in named]
        if any(entry.is_file() and is_image(entry.name) for other in others for entry in _scan(other)):
            return {}  # train is a class, like bus and bicycle
    return found


def _by_split(names: list[str], split_by) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if split_by(name):
            found.setdefault(split_by(name), []).append(name)
    return found


def find_in_folders(source: str, split: str, labels: str) -> list[Items]:
    """Splits in `source`, or its class folders as one split.

    Args:
        split: name of the only split, or the one of several that is to be packed.
        labels: file with the labels of images that are in no class folder.

    Raises:
        InputError: there are no images, labels are missing, or something is ambiguous.
    """
    places = ilsvrc.label_folders(source)
    roots = _choose(source, split, labels)
    listed: dict[str, _Listing] = {}
    for name, root in roots.items():
        root = _descend(root, name, next(iter(listed.values())).folders if listed else {})
        listed[name] = _list(root)
    if labels and not any(listing.flat and not listing.folders for listing in listed.values()):
        for listing in listed.values():  # the labels say the classes: these folders are not classes
            listing.flat += [f"{folder}/{file}" for folder, files in listing.folders.items() for file in files]
            listing.folders = {}
    found: list[tuple] = []
    classes: list[str] = next((_class_names(x) for x in listed.values() if x.folders), [])
    words = ilsvrc.synset_words(places, labels or ilsvrc.find_labels(places))
    for name, listing in listed.items():
        rows = Rows()
        if listing.folders:
            _check_full(listing)
            _add_folders(rows, listing, classes, f"{source}/{os.path.basename(next(iter(roots.values())))}")
        else:
            known = _labels_of(listing, name, labels, places)
            classes = classes or known.classes
            for label, file in sorted(zip(known.numbers(listing.flat, classes), listing.flat, strict=True)):
                rows.add(file, label)
        found.append((name, listing, rows))
    wnids = tuple(classes) if ilsvrc.are_wnids(classes) else ()
    named = [words.get(name, name) for name in classes]
    return [rows.items(name, [x.root], named, wnids=wnids, left_out=dict(x.others)) for name, x, rows in found]


def _choose(source: str, split: str, labels: str) -> dict[str, str]:
    """Folder of each split that is packed. Prints which folders are not."""
    found = split_folders(source, labels)
    if not found:
        return {split or "train": source}
    wanted = split_of(split) or split
    chosen = [name for name in ("train", "val") if name in found and wanted in ("", name)]
    serves = "test" in found and "val" not in found and wanted in ("", "val")
    if wanted == "test" and "test" in found:
        chosen = ["test"]
    elif serves and (labels or wanted or not _is_flat(os.path.join(source, found["test"][0]))):
        chosen.append("val")
        found["val"] = found.pop("test")
        print(f"note: {source}/{found['val'][0]} serves as the validation split: there is no other")
    if not chosen:
        raise InputError(f"{source} holds no split {split!r}, but {', '.join(sorted(found))}")
    for name in chosen:
        if len(found[name]) > 1:
            raise InputError(
                f"{source} holds both {found[name][0]} and {found[name][1]} for the split {name!r}; join them, or pack "
                f"one of them with --split {name} and its own path"
            )
    taken = {found[name][0] for name in chosen}
    if not split:
        rest = [e.name for e in _scan(source) if e.is_dir() and e.name not in taken and _holds_images(e.path)]
        if rest:
            print(f"note: of {source}, {', '.join(sorted(taken))} are packed, and {', '.join(rest)} not (--split NAME)")
    return {name: os.path.join(source, found[name][0]) for name in chosen}


def _descend(root: str, split: str, classes: dict[str, list[str]]) -> str:
    """The folder that holds the classes of a split, as in seg_train/seg_train/CLASS or val/images/*."""
    while (inner := only_folder(root)) and os.path.basename(inner) not in classes:
        name = os.path.basename(inner)
        if not (split_of(name) == split or split_word(name) == split or is_filler(name) or holds_classes(inner)):
            break
        root = inner
    return root


def only_folder(folder: str) -> str:
    """In a folder without images of its own: its only folder with images. Else an empty string."""
    full = []
    for entry in _scan(folder):
        if entry.is_dir():
            full += [entry.path] if _holds_images(entry.path) else []
            if len(full) > 1:
                return ""
        elif is_image(entry.name):
            return ""
    return full[0] if full else ""


def holds_classes(folder: str) -> bool:
    """Whether a folder holds two folders with images, or more, and no images of its own."""
    entries = _scan(folder)
    full = (entry for entry in entries if entry.is_dir() and _holds_images(entry.path))
    return not any(e.is_file() and is_image(e.name) for e in entries) and next(full, next(full, None)) is not None


def _holds_folders(folder: str) -> bool:
    return any(entry.is_dir() for entry in _scan(folder))


def _is_flat(folder: str) -> bool:
    """Whether a folder holds images without class folders."""
    inner = only_folder(folder)
    return not _holds_folders(folder) or bool(inner and is_filler(os.path.basename(inner)) and _is_flat(inner))


def _holds_images(folder: str, above: tuple = ()) -> bool:
    """Whether there is an image anywhere below a folder."""
    above = _enter(folder, above)
    return any(_holds_images(entry.path, above) if entry.is_dir() else is_image(entry.name) for entry in _scan(folder))


def _list(root: str) -> _Listing:
    """All images of a split."""
    listing = _Listing(root, {}, [], collections.Counter())
    above = _enter(root, ())
    for entry in _scan(root):
        if entry.is_dir():
            listing.folders[entry.name] = _images_below(entry.path, listing.others, above)
        else:
            _sort_in(entry, listing.flat, listing.others)
    if not any(listing.folders.values()):
        listing.folders = {}
        if not listing.flat:
            packed = ilsvrc.compressed(root)
            raise InputError(
                f"nothing to pack in {root}: neither class folders with images, nor IDX files, nor the ILSVRC2012 "
                "archives, nor shards with an index (python -m shards.index makes it)"
                + (f"; unpack {packed} first" if packed else "")
            )
    elif listing.flat:
        print(
            f"note: {len(listing.flat):,} images of {root} are in no class folder and are left out: {listing.flat[0]}"
        )
    return listing


def _images_below(folder: str, others: collections.Counter, above: tuple) -> list[str]:
    """Paths of the images below a folder, relative to it, sorted."""
    files: list[str] = []
    above = _enter(folder, above)
    for entry in _scan(folder):
        if entry.is_dir():
            files += [f"{entry.name}/{name}" for name in _images_below(entry.path, others, above)]
        else:
            _sort_in(entry, files, others)
    return sorted(files, key=os.fsencode)


def _sort_in(entry: os.DirEntry, images: list[str], others: collections.Counter) -> None:
    if is_image(entry.name) and entry.is_file():  # not a pipe, which would never end
        images.append(entry.name)
    else:
        others[os.path.splitext(entry.name)[1].lower() or entry.name] += 1


def _enter(folder: str, above: tuple) -> tuple:
    """`above`, the folders that contain this one, and this one. Raises InputError if links form a circle."""
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        raise InputError(f"{folder} is a link to a folder that contains it; remove it")
    return *above, here


def _scan(folder: str) -> list[os.DirEntry]:
    """Entries that are not stray, sorted by the bytes of their names."""
    with os.scandir(folder) as entries:
        found = sorted((e for e in entries if not is_stray(e.name)), key=lambda e: os.fsencode(e.name))
    for entry in found:
        if entry.is_symlink():
            try:
                entry.stat()
            except FileNotFoundError:
                raise InputError(f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there") from None
    return found


# ---- classes ----------------------------------------------------------------------------------------------------


def _class_names(listing: _Listing) -> list[str]:
    """Names of the class folders, sorted. Raises InputError if two are one name in two Unicode forms."""
    names = sorted(listing.folders, key=os.fsencode)
    known: dict[str, str] = {}
    for name in names:
        if composed(name) in known:
            raise InputError(
                f"two class folders of {listing.root} have one name, {name}, in two forms of Unicode; move their "
                "images into one"
            )
        known[composed(name)] = name
    return sorted(known, key=os.fsencode)


def _check_full(listing: _Listing) -> None:
    empty = [name for name, files in listing.folders.items() if not files]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise InputError(
            f"the class folder {listing.root}/{empty[0]}{more} holds no images; remove it, or restore its images"
        )


def _add_folders(rows: Rows, listing: _Listing, classes: list[str], first: str) -> None:
    """Add all images of a split with class folders. `first`: the split that gives the classes, for the message."""
    known = NameTable(classes)
    numbered: dict[int, str] = {}
    for folder in listing.folders:
        number = known.find(folder)
        if number is None:
            raise InputError(
                f"class {folder} of {listing.root} is not among the classes of {first}{nearest(folder, classes)}"
            )
        if number in numbered:
            raise InputError(f"{numbered[number]} and {folder} of {listing.root} are both class {classes[number]}")
        numbered[number] = folder
    for number, folder in sorted(numbered.items()):
        for file in listing.folders[folder]:
            rows.add(f"{folder}/{file}", number)


def _labels_of(listing: _Listing, split: str, labels: str, places: list[str]) -> Labels:
    """Labels of images that are in no class folder."""
    folders = [listing.root, os.path.dirname(listing.root), *places]
    labels = labels or ("" if split == "train" else ilsvrc.find_labels(folders))
    known = ilsvrc.read_labels(labels, listing.flat) if labels else ilsvrc.labels_in_names(listing.flat)
    if known is None:
        tables = [f"{p}/{n}" for p in dict.fromkeys(folders) for n in os.listdir(p) if n.endswith((".csv", ".txt"))]
        raise InputError(
            f"{listing.root} holds images but no class folders; give their labels with --labels FILE"
            + (f" (is it {min(tables)}?)" if tables else "")
        )
    return known
