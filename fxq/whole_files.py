"""Files as bytes: one is written as a whole or not at all, and every path that cannot be used is one kind of error."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

from fxq.errors import FileFormatError, FxqError

File = str | os.PathLike[str] | BinaryIO  # a path, or an object to read from or write to


def file_name(file: File) -> str:
    """What messages call a file."""
    if not isinstance(file, (str, bytes, os.PathLike)):
        return f"{type(file).__name__} object"
    name = os.fsdecode(file)
    return name if name and name.isprintable() else repr(name)


def read_file(file: File) -> bytes:
    """The content of a file, or the rest of an open one.

    Raises:
        FileFormatError: if it cannot be read.
    """
    try:
        if isinstance(file, (str, bytes, os.PathLike)) or not hasattr(file, "read"):
            return _path(file).read_bytes()
        data = file.read()
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{file_name(file)}: cannot be read ({_reason(error)})") from error
    if not isinstance(data, bytes):
        raise FileFormatError(f"{file_name(file)}: cannot be read (it gives {type(data).__name__}; open it with 'rb')")
    return data


def write_file(file: File, data: bytes) -> None:
    """Write a file; whoever reads it meanwhile sees the old one or the whole new one.

    Args:
        file: a path, or an object with a ``write``. A link stays one: what it points to is written.

    Raises:
        FxqError: if it cannot be written; an old file is still there then.
    """
    try:
        if isinstance(file, (str, bytes, os.PathLike)) or not hasattr(file, "write"):
            _write_path(_path(file), data)
        else:
            file.write(data)
    except (OSError, ValueError, TypeError) as error:
        raise FxqError(f"{file_name(file)}: cannot be written ({_reason(error)})") from error


def _path(file: Any) -> Path:
    return Path(os.fsdecode(file))


def _write_path(path: Path, data: bytes) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not path.is_file():  # a pipe or a device, which a new file would replace
        path.write_bytes(data)
        return
    place = Path(os.path.realpath(path))
    unfinished = place.with_name(f".{secrets.token_hex(8)}.unfinished")  # short, as names have a longest length
    try:
        unfinished.write_bytes(data)
        unfinished.replace(place)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
