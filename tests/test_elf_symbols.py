"""Functions of a loaded library are found where they are."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fxq.elf_symbols import function_addresses

SOURCE = """
__attribute__((visibility("hidden"))) int inner_twice(int x) { return 2 * x; }
__attribute__((visibility("hidden"))) int inner_thrice(int x) { return 3 * x; }
int outer(int x) { return inner_twice(x) + inner_thrice(x); }
"""
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "inner.c").write_text(SOURCE)
    options = ["-O1", "-shared", "-fPIC", "-fno-inline", "-o", "libinner.so"]
    subprocess.run(["cc", *options, "inner.c"], cwd=folder, check=True)
    return folder / "libinner.so"


def test_hidden_functions_are_found(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    assert not hasattr(loaded, "inner_twice")
    found = function_addresses(str(library), "inner_", exported="outer")
    assert set(found) == {"inner_twice", "inner_thrice"}
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
    assert call(found["inner_twice"])(21) == 42 and call(found["inner_thrice"])(5) == 15
    assert function_addresses(str(library), "nothing_", exported="outer") == {}


def test_what_cannot_be_found(library: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot open shared object file"):
        function_addresses(str(tmp_path / "libmissing.so"), "inner_", exported="outer")
    copy = shutil.copy(library, tmp_path / "libcopy.so")
    with pytest.raises(OSError):  # it is there, but not loaded
        function_addresses(str(copy), "inner_", exported="outer")
    ctypes.CDLL(str(copy))
    with pytest.raises(LookupError, match="exports no inner_twice"):
        function_addresses(str(copy), "inner_", exported="inner_twice")


def test_a_stripped_library(library: Path, tmp_path: Path) -> None:
    if shutil.which("strip") is None:
        pytest.skip("needs strip")
    stripped = shutil.copy(library, tmp_path / "libstripped.so")
    subprocess.run(["strip", os.fspath(stripped)], check=True)
    ctypes.CDLL(str(stripped))
    with pytest.raises(LookupError, match="stripped of its symbol table"):
        function_addresses(str(stripped), "inner_", exported="outer")
