"""Reads MATLAB version 5 files (.mat): numbers, text, structures and cells, which is what ILSVRC's meta.mat holds.

In: the bytes of a file. Out: its variables: numbers as arrays, text as str, cells and structures as flat lists in
column-major order. Our own reader: SciPy would be 35 MB for this one file.
"""

import struct
import zlib

import numpy as np

from shards.errors import InputError

# Source: MathWorks, "MAT-File Format", R2021b, chapter 1: tables 1-1 (data types) and 1-3 (array classes).
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMBERS = range(6, 16)
_UNPACKED_LIMIT = 1 << 28  # bytes; meta.mat unpacks to less than 2 MB


def load_mat(data: bytes, path: str) -> dict:
    """Variables of a .mat file by name. A structure array is a list of dicts, a cell array a list.

    Raises:
        InputError: it is not a version 5 file, is damaged, or has contents of another kind; `path` is for the message.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or len(data) < 136:
        raise InputError(f"{path} is not a MATLAB version 5 file")
    variables = {}
    try:
        at = 128
        while at < len(data):
            kind, body, at = _element(data, at, order)
            if kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                unpacked = unpacker.decompress(body, _UNPACKED_LIMIT)
                if not unpacker.eof:
                    raise ValueError("it is cut off, or unpacks to more than 256 MB")
                kind, body, _ = _element(unpacked, 0, order)
            if kind == _MATRIX:
                name, value = _matrix(body, order)
                variables[name] = value
    except (ValueError, KeyError, IndexError, struct.error, zlib.error, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a MATLAB file: {error}") from None
    return variables


def _element(data: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """Type and bytes of the element at `at`, and where the next one starts."""
    (tag,) = struct.unpack_from(order + "I", data, at)
    if tag >> 16:  # small form: four bytes of data within the tag
        size = tag >> 16
        if size > 4:
            raise ValueError(f"damaged at byte {at}")
        return tag & 0xFFFF, data[at + 4 : at + 4 + size], at + 8
    (size,) = struct.unpack_from(order + "I", data, at + 4)
    if at + 8 + size > len(data):
        raise ValueError(f"it ends within the element at byte {at}")
    end = at + 8 + size
    return tag, data[at + 8 : end], end if tag == _COMPRESSED else end + -size % 8


def _matrix(data: bytes, order: str) -> tuple[str, object]:
    """Name and value of a matrix element."""
    if not data:
        return "", np.empty(0)
    _, flags, at = _element(data, 0, order)
    kind = struct.unpack(order + "I", flags[:4])[0] & 0xFF
    _, dimensions, at = _element(data, at, order)
    shape = tuple(np.frombuffer(dimensions, order + "i4").tolist())
    _, name, at = _element(data, at, order)
    count = int(np.prod(shape))
    if kind in (_STRUCT, _CELL):
        fields = [""]
        if kind == _STRUCT:
            _, width, at = _element(data, at, order)
            (width,) = struct.unpack(order + "i", width)
            _, text, at = _element(data, at, order)
            fields = [text[i : i + width].split(b"\0")[0].decode() for i in range(0, len(text), width)]
        values = []
        for _ in range(count):
            entry = {}
            for field in fields:
                _, body, at = _element(data, at, order)
                entry[field] = _matrix(body, order)[1]
            values.append(entry if kind == _STRUCT else entry[""])
        return name.decode(), values
    stored, body, at = _element(data, at, order)
    if kind == _CHAR:
        if stored in _TEXT:
            return name.decode(), body.decode(_TEXT[stored])
        return name.decode(), "".join(map(chr, np.frombuffer(body, order + _TYPES[stored]).tolist()))
    if kind not in _NUMBERS:
        raise ValueError(f"array class {kind} is not supported")
    return name.decode(), np.frombuffer(body, order + _TYPES[stored]).reshape(shape, order="F")
