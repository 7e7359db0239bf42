"""Addresses of functions of a loaded ELF library (Linux), also of those that it does not export.

A library that is not stripped names all of its functions in its symbol table.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

import torch

_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
_SECTION = "<IIQQQQIIQQ"  # name, type, flags, address, offset, size, link, info, alignment, entry size
_SYMBOL_TABLE = 2
_SYMBOL = "<IBBHQQ"  # name, info, other, section, address, size
_SYMBOL_SIZE = struct.calcsize(_SYMBOL)


def function_addresses(path: str, prefix: str, exported: str) -> dict[str, int]:
    """Where in this process the functions of a library are, by their names.

    Args:
        path: of the library, which is loaded.
        prefix: of the names.
        exported: a function that the library exports, by which it is found in memory.

    Raises:
        OSError: if the library is not loaded, or cannot be read.
        LookupError: if it is no ELF library with a symbol table, or does not have the exported function.
    """
    library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    if not hasattr(library, exported):
        raise LookupError(f"{path} exports no {exported}")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            found = _offsets(content, (prefix, exported))
        except (struct.error, ValueError) as error:
            raise LookupError(f"the symbol table of {path} cannot be read: {error}") from error
    if exported not in found:
        raise LookupError(f"{path} does not name {exported}")
    base = ctypes.cast(getattr(library, exported), ctypes.c_void_p).value - found[exported]  # type: ignore[operator]
    return {name: base + offset for name, offset in found.items() if name.startswith(prefix)}


def _offsets(content: mmap.mmap, prefixes: tuple[str, ...]) -> dict[str, int]:
    """Where in the library the functions are whose names start with one of these."""
    if content[: len(_ELF64_LITTLE_ENDIAN)] != _ELF64_LITTLE_ENDIAN:
        raise LookupError("not a 64-bit ELF library")
    (start,) = struct.unpack_from("<Q", content, 0x28)
    size, count = struct.unpack_from("<HH", content, 0x3A)
    sections = [struct.unpack_from(_SECTION, content, start + index * size) for index in range(count)]
    table = next((section for section in sections if section[1] == _SYMBOL_TABLE), None)
    if table is None:
        raise LookupError("the library was stripped of its symbol table")
    _, _, _, _, first, length, link, *_ = table
    _, _, _, _, text, text_length, *_ = sections[link]
    end = text + text_length
    names = {at - text: name for prefix in prefixes for at, name in _names(content, prefix, text, end)}
    symbols = torch.frombuffer(bytearray(content[first : first + length]), dtype=torch.int32)
    of_symbols = symbols.view(-1, _SYMBOL_SIZE // 4)[:, 0]
    found = {}
    for index in torch.isin(of_symbols, torch.tensor(list(names), dtype=torch.int32)).nonzero().flatten().tolist():
        name, *_, address, _ = struct.unpack_from(_SYMBOL, content, first + index * _SYMBOL_SIZE)
        if address:
            found[names[name]] = address
    return found


def _names(content: mmap.mmap, prefix: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    """Names that start so in a table of strings, and where they are."""
    wanted = b"\0" + prefix.encode()
    at = content.find(wanted, start, end)
    while at >= 0:
        stop = content.find(b"\0", at + 1, end)
        yield at + 1, content[at + 1 : stop].decode()
        at = content.find(wanted, stop, end)
