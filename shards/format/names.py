"""Which tars of a folder or server belong to which split, by their names, and which seem to be missing.

In: a folder or URL, or patterns. Out: the tars of each split, in the order of their numbers.
"""

import collections
import glob
import itertools
import os
import re
from collections.abc import Iterable

from shards.errors import InputError, few
from shards.machine.files import is_remote
from shards.sources.spellings import split_word

STATE = ".pack"  # folder beside the shards in which shards.pack keeps settings, tables, records, unfinished shards


def natural(path: str) -> list:
    """Sort key that compares numbers as numbers: shard-9 comes before shard-10."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in re.split(r"([0-9]+)", path)]


def find_tars(paths: Iterable[str]) -> dict[str, list[str]]:
    """Tars by split, from paths relative to the data folder. Raises InputError if the split of one is unclear."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in sorted(paths, key=natural):
        folder, _, base = path.rpartition("/")
        stem = base.removesuffix(".tar")
        prefix = re.sub(r"([-_.]of)?[-_.]?[0-9]*$", "", re.sub(r"[-_.]of[-_.][0-9]+$", "", stem))
        groups.setdefault((folder, prefix), []).append(path)
    found: dict[str, list[str]] = {}
    origin: dict[str, str] = {}
    for (folder, prefix), tars in groups.items():
        name = split_word(prefix) or split_word(folder.rpartition("/")[2]) or folder.rpartition("/")[2] or prefix
        if not name:
            raise InputError(f"{tars[0]}: its name does not tell the split; give --splits 'train=*.tar'")
        if name in found:
            raise InputError(
                f"both {origin[name]} and {tars[0]} could be split {name!r}; say which tars are with "
                f"--splits '{name}=PATTERN'"
            )
        found[name], origin[name] = tars, tars[0]
    return found


def list_tars(folder: str) -> list[str]:
    """Relative paths of all that is named .tar in a local folder and one level below, except folders of tars."""
    found = glob.glob("*.tar", root_dir=folder) + glob.glob("*/*.tar", root_dir=folder)
    return sorted(set(found) - {os.path.dirname(path) for path in found})


def not_read(dest: str) -> list[str]:
    """Files that seem to be compressed or half downloaded shards: train-000003.tar.gz, .tgz, .tar.part."""
    if is_remote(dest):
        return []
    patterns = [folder + name for folder in ("", "*/") for name in ("*.tar.*", "*.tgz", "*.tzst", "*.txz")]
    found = sorted(path for pattern in patterns for path in glob.glob(pattern, root_dir=dest))
    return [path for path in found if not path.endswith((".idx", ".json", ".tar"))]


_SERIES = re.compile(r"(.*?)([0-9]+)(?:([-_.]of[-_.])([0-9]+))?\.tar")


def missing_numbers(paths: Iterable[str]) -> list[str]:
    """A note for each series of numbered tars with gaps: no train-000003.tar between 2 and 4, or 7 of 8 `-of-0008`."""
    series: dict[tuple, dict[int, str]] = collections.defaultdict(dict)
    for path in paths:
        match = _SERIES.fullmatch(path)
        if match and len(match[2]) < 10 and len(match[4] or "") < 10:
            series[match[1], match[3], match[4]][int(match[2])] = match[2]
    notes = []
    for (prefix, of, total), numbers in series.items():
        low, high, width = min(numbers), max(numbers), len(next(iter(numbers.values())))
        if total and low <= 1 and high <= int(total):
            low, high = (1, int(total)) if int(total) in numbers else (0, int(total) - 1)
        missing = itertools.islice((n for n in range(low, high + 1) if n not in numbers), 1000)
        names = [f"{prefix}{n:0{width}d}{of or ''}{total or ''}.tar" for n in missing]
        if names:
            notes.append(f"shards are missing in the series: {few(names, 4, ', ')}")
    return notes


def expand(pattern: str) -> list[str]:
    """All paths of a pattern with ranges such as `{0000..0127}`; numbers have as many digits as the first."""
    match = re.search(r"\{([0-9]+)\.\.([0-9]+)\}", pattern)
    if not match:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= 1 << 20:
        raise InputError(f"{pattern!r}: {match[0]} is not a range of shard numbers")
    width = len(match[1])
    rest = expand(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{n:0{width}d}{tail}" for n in range(first, last + 1) for tail in rest]


def chosen_tars(dest: str, choices: list[str]) -> dict[str, list[str]]:
    """Tars by split, as --splits (`choices`) or their names say: relative to `dest`, or URLs. Raises InputError."""
    if not choices:
        if is_remote(dest):
            from shards.machine import remote

            base = dest.rstrip("/") + "/"
            return find_tars(url.removeprefix(base) for url in remote.list_tars(dest))
        return find_tars(list_tars(dest))
    found: dict[str, list[str]] = {}
    for choice in choices:
        name, equals, pattern = choice.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"--splits {choice}: expected NAME=PATTERN, for example 'train=*-train-*.tar'")
        tars = expand(pattern)
        if tars == [pattern] and not is_remote(dest) and not is_remote(pattern):
            tars = sorted(glob.glob(pattern, root_dir=dest, recursive=True), key=natural)
        if not tars:
            raise InputError(f"--splits {choice}: no such tars in {dest}")
        found.setdefault(name, []).extend(tars)
    return found
