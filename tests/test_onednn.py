"""Finding oneDNN's C API."""

from __future__ import annotations

import ctypes
import importlib.metadata

import pytest

from fxq import onednn
from fxq.errors import BackendError, MissingDependencyError
from fxq.onednn import Library, library


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_found)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxq\[onednn\]'"):
        library.__wrapped__()


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __init__(self, path: str) -> None:
            self.dnnl_version = lambda: ctypes.pointer(onednn._Version(2, 6, 0))

    monkeypatch.setattr(ctypes, "CDLL", Old)
    with pytest.raises(BackendError, match=r"libdnnl.so is oneDNN 2\.6\.0, not 3"):
        Library("libdnnl.so")
