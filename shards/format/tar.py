"""Where the bytes of each sample are in a tar. Only member headers are read, not the data between them.

In: a tar as a function `read(offset, size)`. Out: its members, or its samples: consecutive members with the same key,
grouped as WebDataset does. Damage is reported with its position, and the scan can go on after it.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from shards.errors import InputError, short
from shards.format.split import Member, idx_word
from shards.machine import remote
from shards.machine.files import check_regular, is_remote

BLOCK = 512  # bytes; a tar is made of such blocks
_ZEROS = bytes(BLOCK)
_WINDOW = 4096  # bytes per read: usually the header of a label, its text, and the header of the next image
_META_LIMIT = 1 << 20  # bytes; a longer name or PAX header is damage or an attack
_MOST_ZEROS = 2 << 20  # bytes at the end; tar pads to records of 10,240 bytes, or of up to 1 MiB (tar -b)
_TAIL_CHUNK = 1 << 20  # bytes per read when the end of the archive is searched

_FILE_TYPES = b"0\x007"  # regular, regular as of 1979, contiguous
_NO_DATA_TYPES = b"123456V"  # links, devices, folders, FIFOs, GNU volume label: no data follow, whatever `size` says

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes; fewer only where the file ends


class TarError(Exception):
    """A damaged place in a tar. `offset`: bytes from the start of the file to the damaged block."""

    def __init__(self, offset: int, message: str):
        super().__init__(f"at byte {offset}: {message}")
        self.offset = offset

    @property
    def verdict(self) -> str:
        """What this means for the whole file."""
        return f"not a whole tar: {self}"


class NotTar(TarError):
    """The file is of another kind. The message says of which."""

    def __init__(self, message: str):
        Exception.__init__(self, message)
        self.offset = 0

    @property
    def verdict(self) -> str:
        return f"not a tar: {self}"


_UNPACK = "unpack it to a plain .tar first"
_FETCH = "the download failed, fetch it again"
_MAGIC = (  # first bytes of files that are sometimes named .tar
    (b"\x1f\x8b\x08", f"gzip data; {_UNPACK} (gunzip)"),
    (b"\x1f\x9d", f"compress data; {_UNPACK} (uncompress)"),
    (b"BZh", f"bzip2 data; {_UNPACK} (bunzip2)"),
    (b"\xfd7zXZ\0", f"xz data; {_UNPACK} (unxz)"),
    (b"\x28\xb5\x2f\xfd", f"zstd data; {_UNPACK} (unzstd)"),
    (b"\x04\x22\x4d\x18", f"lz4 data; {_UNPACK} (unlz4)"),
    (b"PK\3\4", "a zip archive; unpack it and pack its files as a .tar"),
    (b"PK\5\6", "an empty zip archive; fetch it again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it and pack its files as a .tar"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it and pack its files as a .tar"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"%PDF-", "a PDF file"),
    (b"\x7fELF", "a program (ELF)"),
)
_LFS = b"version https://git-lfs.github.com/spec"
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\x1b"))  # bytes that no text has


def foreign_kind(block: bytes) -> str:
    """What kind of file begins with these 512 bytes, and what to do about it; empty: not known.

    Call it only if the block is not a tar header: a tar begins with a name, which can be anything.
    """
    for magic, kind in _MAGIC:
        if block.startswith(magic) and (magic != b"BZh" or block[4:10] == b"1AY&SY"):
            return kind
    if block.startswith(_LFS):
        return "a Git LFS pointer in place of the file; fetch the file itself with git lfs pull"
    text = block.removeprefix(b"\xef\xbb\xbf").strip()
    words = text.decode("utf-8", "replace")
    if not text or text.translate(None, _CONTROL) != text or words.count("\ufffd") > 1:  # one: cut off at byte 512
        return ""
    start = text[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        kind = "a web page (HTML)"
    elif start.startswith(b"<"):
        kind = "XML, as a server answers errors"
    elif start[:1] in b"{[":
        kind = "JSON"
    else:
        kind = "plain text"
    quote = " ".join(words.removeprefix('<?xml version="1.0" encoding="UTF-8"?>').split())
    return f"{kind}: {short(quote, 80)!r}; {_FETCH}"


def refuse_foreign(path: str) -> None:
    """Raise InputError if a local file is known to be of another kind than a tar."""
    with open(path, "rb") as file:
        block = file.read(BLOCK)
    if header_size(block) is None and (kind := foreign_kind(block)):
        raise InputError(f"{path} is not a tar: it is {kind}", everywhere=False)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the path up to, and all after, the first dot of its base name.

    The extension is empty for files that WebDataset ignores: no dot, hidden files, `__MACOSX`.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or name.startswith("__MACOSX/") or "/__MACOSX/" in name:
        return name, ""
    return name[:dot], name[dot + 1 :]


def window_read(read: Read, window: int = _WINDOW) -> Read:
    """`read` with a small buffer, so that neighbouring headers and labels take one call of `read`."""
    held, at = b"", 0

    def buffered(offset: int, size: int) -> bytes:
        nonlocal held, at
        begin = offset - at
        if begin < 0 or begin + size > len(held):
            held, at, begin = read(offset, max(size, window)), offset, 0
        return held[begin : begin + size]

    return buffered


def file_read(file: BinaryIO) -> Read:
    """A buffered `Read` of an open local file. The position of the file is neither used nor changed."""
    descriptor = file.fileno()
    return window_read(lambda offset, size: os.pread(descriptor, size, offset))


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[tuple[Read, int]]:
    """An unbuffered `Read` of a tar, local or remote, and its size in bytes. Raises OSError or InputError."""
    if is_remote(path):
        size = remote.size_of(path)
        yield lambda offset, wanted: remote.read_range(path, offset, max(0, min(wanted, size - offset))), size
    else:
        check_regular(path)
        with open(path, "rb", buffering=0) as file:
            descriptor = file.fileno()
            yield lambda offset, wanted: os.pread(descriptor, wanted, offset), os.fstat(descriptor).st_size


def scan(file: BinaryIO, name: str, start: int = 0, size: int | None = None) -> list[tuple[Member, ...]]:
    """All samples of a tar in an open local file. `start`, `size`: where in the file the tar is, in bytes.

    Raises:
        InputError: the tar is damaged or cut off; `name` is what the message calls it.
    """
    if size is None:
        size = os.fstat(file.fileno()).st_size - start
    try:
        return list(samples(file_read(file), start + size, start))
    except TarError as error:
        raise InputError(f"{name} is {error.verdict}", everywhere=False) from None


def samples(read: Read, end: int, start: int = 0, damage: list[TarError] | None = None) -> Iterator[tuple[Member, ...]]:
    """Samples of the tar from byte `start` to byte `end`: consecutive members with the same key.

    Damage raises TarError. If a list is given for it, damage is appended there and the scan goes on at the next sound
    header. A sample never spans damage.
    """
    current: list[Member] = []
    current_key = None
    for item in _walk(read, end, start):
        if isinstance(item, TarError):
            if damage is None:
                raise item
            damage.append(item)
            key = None
        else:
            key, ext = split_name(item.name)
            if not ext:
                continue
        if key != current_key:
            if current:
                yield tuple(current)
            current, current_key = [], key
        if key is not None:
            current.append(item)
    if current:
        yield tuple(current)


def members(read: Read, end: int, start: int = 0) -> Iterator[Member]:
    """All regular files in the tar from byte `start` to byte `end`. Raises TarError if it is damaged."""
    for item in _walk(read, end, start):
        if isinstance(item, TarError):
            raise item
        yield item


def header_size(block: bytes) -> int | None:
    """Bytes of data that follow this block by its own account; None: it is not a sound tar header."""
    try:
        return _parse_header(block, 0)[2] if len(block) == BLOCK else None
    except TarError:
        return None


def is_header_of(block: bytes, member: Member) -> bool:
    """Whether the 512 bytes before a member's data are its header: a sound one, with its size and name.

    Only the size is compared where the .idx has no names (v1.1), and where the name is long or not ASCII: it is then
    in a PAX header before this one.
    """
    if header_size(block) != member.size:
        return False
    if not member.name or len(member.name) >= 100 or not member.name.isascii():
        return True
    names = (_parse_header(block, 0)[1], member.name)
    return len({idx_word(name).removeprefix("./") for name in names}) == 1


class _Extensions:
    """What PAX headers and GNU long names say of the members that follow them."""

    def __init__(self):
        self._all: dict[str, bytes] = {}  # PAX records of all members that follow
        self.next: dict[str, bytes] = {}  # those of the next member, and its GNU long name

    def header(self, block: bytes, position: int) -> tuple[bytes, str, int]:
        """Type, name and size of the member whose header is `block`. Raises TarError."""
        kind, name, size = _parse_header(block, position)
        path = self.next.get("path") or self._all.get("path")
        if path and kind in _FILE_TYPES:  # a long name, which the header itself has cut off
            name = path.decode("utf-8", "surrogateescape")
        if kind in _NO_DATA_TYPES or (kind == b"\0" and name.endswith("/")):  # the latter: a folder, before 1988
            size = size if "size" in self.next else 0
        elif "size" in self.next or "size" in self._all:
            size = _decimal(self.next.get("size", self._all.get("size", b"")), position)
        return kind, name, size

    def add(self, kind: bytes, text: bytes, position: int) -> None:
        """Take over the data of a header of type `kind` at `position`. Raises TarError."""
        if kind == b"L":
            self.next["path"] = text.split(b"\0", 1)[0]
        elif kind in b"xX":
            self.next.update(_parse_pax(text, position))
        elif kind == b"g":
            self._all.update(_parse_pax(text, position))


# Python's tarfile reads the same formats, but stops without a word at a damaged or cut-off header (so samples would be
# lost unnoticed), never notices data after an end-of-archive mark, and parses a third as many headers per second.
def _walk(read: Read, end: int, start: int) -> Iterator[Member | TarError]:
    """Regular files in order, and a TarError at each damaged place, after which the next sound header is sought."""
    position = start
    if start >= end:
        yield TarError(start, "it is empty (0 bytes)")
    extensions = _Extensions()
    while position < end:
        block = read(position, BLOCK)
        try:
            if len(block) < BLOCK or end - position < BLOCK:
                raise TarError(position, f"the file ends {len(block)} bytes into a 512-byte header: it was cut off")
            if block == _ZEROS:
                error, position = _end_mark(read, position, end)
                extensions.next = {}
                if error:
                    yield error
                if position >= end:
                    return
                continue
            kind, name, size = extensions.header(block, position)
            data = position + BLOCK
            following = data + (size + BLOCK - 1) // BLOCK * BLOCK
            if data + size > end:
                yield TarError(position, f"{short(name)!r} should have {size} bytes, the file ends after {end - data}")
                return
            if kind in b"xgXLK":
                if size > _META_LIMIT:
                    raise TarError(position, f"a header of {size} bytes")
                extensions.add(kind, read(data, size), position)
            else:
                if kind == b"S" or any(key.startswith("GNU.sparse.") for key in extensions.next):
                    raise TarError(position, f"{short(name)!r} is a sparse file; pack it again without tar's --sparse")
                if kind in _FILE_TYPES and not name.endswith("/"):
                    yield Member(split_name(name)[1], data, size, name)
                extensions.next = {}
            if following > end:
                yield TarError(position, f"the file ends within the padding of {short(name)!r}: it was cut off")
                return
            position = following
        except TarError as error:
            error, position = _after_damage(error, read, block, position, end, start)
            yield error
            if position >= end:
                return
            extensions.next = {}
    if start < end:
        yield TarError(end, "it ends without an end-of-archive mark: it may have been cut off between two files")


def _end_mark(read: Read, position: int, end: int) -> tuple[TarError | None, int]:
    """What is wrong from a block of zeros on, and where the next sound header is (`end`: there is none)."""
    after = _first_nonzero(read, position + BLOCK, end)
    if after is not None:
        error = TarError(after, "there is data after the end-of-archive mark")
        return error, _next_header(read, after - BLOCK, end)
    if end - position > _MOST_ZEROS:
        message = f"its last {end - position:,} bytes are zeros: a download that has not finished?"
        return TarError(position, message), end
    return None, end


def _after_damage(
    error: TarError, read: Read, block: bytes, position: int, end: int, start: int
) -> tuple[TarError, int]:
    """The error to report for a damaged `block` at `position`, and where the next sound header is."""
    first = position == start and header_size(block) is None
    if first and (kind := foreign_kind(block)):
        return NotTar(f"it is {kind}"), end
    following = _next_header(read, position, end)
    if first and following >= end and len(block) == BLOCK:
        return NotTar(f"it is {end - start} bytes without one tar header, which begin with {block[:16]!r}"), end
    return error, following


def _parse_header(block: bytes, offset: int) -> tuple[bytes, str, int]:
    """Type, name and size of a header block. Raises TarError unless its checksum is right.

    Source: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format" (base-256 numbers).
    """
    field = block[148:156]
    stored = _number(field, offset)
    # The checksum is the sum of all bytes with the field itself read as spaces. adler32 holds 1 + sum modulo 65521 in
    # its low half: sum(block) in C, at a thirtieth of the time.
    if (stored - 8 * 32 + sum(field) + 1) % 65521 != zlib.adler32(block) & 0xFFFF:
        signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])  # some tars before 1990
        if stored != signed + 8 * 32:
            raise TarError(offset, "the header's checksum is wrong")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return block[156:157], name.decode("utf-8", "surrogateescape"), _number(block[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """A header's number: octal digits, or GNU's base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    try:
        if text and not text.isdigit():  # int() would take a sign or an underscore
            raise ValueError
        return int(text or b"0", 8)
    except ValueError:
        raise TarError(offset, f"no tar header here ({bytes(field)!r} is not a number)") from None


def _decimal(text: bytes, offset: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise TarError(offset, f"a PAX header gives the size {text[:40]!r}")
    return int(text)


def _parse_pax(data: bytes, offset: int) -> dict[str, bytes]:
    """Records `length key=value` and newline of a PAX header."""
    records = {}
    at = 0
    while at < len(data) and data[at]:
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit():
            raise TarError(offset, "a PAX header is damaged")
        record = data[at : at + int(length)]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if len(record) != int(length) or not equals or not record.endswith(b"\n"):
            raise TarError(offset, "a PAX header is damaged")
        records[key.decode("utf-8", "replace")] = value
        at += len(record)
    return records


def _first_nonzero(read: Read, position: int, end: int) -> int | None:
    """Start of the first block from `position` on that is not all zeros; None: there is none."""
    while position < end:
        chunk = read(position, min(_TAIL_CHUNK, end - position))
        if not chunk:
            return None
        rest = len(chunk.lstrip(b"\0"))
        if rest:
            return position + (len(chunk) - rest) // BLOCK * BLOCK
        position += len(chunk)
    return None


def _next_header(read: Read, position: int, end: int) -> int:
    """Start of the first block after `position` that is a sound header; `end` if there is none."""
    position += BLOCK
    while position + BLOCK <= end:
        block = read(position, BLOCK)
        if len(block) < BLOCK:
            break
        if block != _ZEROS and header_size(block) is not None:
            return position
        position += BLOCK
    return end
