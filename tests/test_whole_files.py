"""Files: written as a whole or not at all, and one kind of error for every path that cannot be used."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fxq.errors import FileFormatError, FxqError
from fxq.whole_files import read_file, write_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a file and a folder."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"old")
    Path("folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/inside", "Not a directory"),
        ("none/file", "No such file"),
        ("folder", "Is a directory"),
        (".", "Is a directory"),
        ("/", "Is a directory"),
        ("", "Is a directory"),
        ("a" * 256, "File name too long"),
        ("a\0b", "embedded null byte"),
        (3, "not int"),
        (None, "not NoneType"),
    ],
)
def test_paths_that_cannot_be_used(path: Any, reason: str) -> None:
    with pytest.raises(FxqError, match=rf"cannot be written \(.*{reason}"):
        write_file(path, b"new")
    with pytest.raises(FileFormatError, match=rf"cannot be read \(.*{reason}"):
        read_file(path)
    assert sorted(os.listdir()) == ["file", "folder"]


@pytest.mark.parametrize("name", ["file", "new", "a" * 255, b"bytes"])
def test_what_is_written_is_read(name: Any) -> None:
    write_file(name, b"new")
    assert read_file(name) == b"new"
    Path("plain").touch()
    assert os.stat(name).st_mode == os.stat("plain").st_mode


def test_file_objects() -> None:
    buffer = io.BytesIO()
    write_file(buffer, b"new")
    buffer.seek(0)
    assert read_file(buffer) == b"new"
    with pytest.raises(FxqError, match="StringIO object: cannot be written"):
        write_file(io.StringIO(), b"new")  # type: ignore[arg-type]
    with pytest.raises(FileFormatError, match=r"StringIO object: cannot be read .*open it with 'rb'"):
        read_file(io.StringIO("text"))  # type: ignore[arg-type]
    with open("file", "rb") as closed:
        pass
    with pytest.raises(FileFormatError, match="closed file"):
        read_file(closed)


def test_links_and_devices_stay_what_they_are() -> None:
    Path("link").symlink_to("file")
    write_file("link", b"new")
    assert Path("link").is_symlink()
    assert read_file("file") == b"new"
    write_file("/dev/null", b"new")
    assert not Path("/dev/null").is_file()


def test_threads_that_write_one_file() -> None:
    contents = [bytes([number]) * 100_000 for number in range(4)]
    failed: list[FxqError] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                write_file("shared", content)
                assert read_file("shared") in contents
        except FxqError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(os.listdir()) == ["file", "folder", "shared"]
