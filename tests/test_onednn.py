"""Finding oneDNN's C API."""

from __future__ import annotations

import ctypes
import importlib.metadata
from typing import Any

import pytest

from fxq import onednn
from fxq.errors import BackendError, MissingDependencyError
from fxq.onednn import Library, library


def stripped() -> dict[str, int]:
    raise LookupError("the library was stripped of its symbol table")


def not_found(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_inside_torch", stripped)
    monkeypatch.setattr(importlib.metadata, "files", not_found)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxq\[onednn\]'"):
        library.__wrapped__()


@pytest.mark.parametrize("problem", ["another version", "a function less", "stripped"])
def test_the_extra_takes_over_from_torchs(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn._path():
        pytest.skip("pip install 'fxq[onednn]'")
    of_torch = {"another version": as_version(2), "a function less": as_version(3) | {"dnnl_primitive_execute": None}}
    found = {name: address for name, address in of_torch.get(problem, {}).items() if address is not None}
    monkeypatch.setattr(onednn, "_inside_torch", (lambda: found) if found else stripped)
    assert library.__wrapped__().version == Library(onednn._installed()).version


_ALIVE: list[Any] = []


def as_version(major: int) -> dict[str, Any]:
    """Addresses of an installed oneDNN that says it is of this version."""
    version = onednn._Version(major, 6, 0)
    says = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    _ALIVE.extend((version, says))
    return onednn._installed() | {"dnnl_version": ctypes.cast(says, ctypes.c_void_p).value}


def test_another_version() -> None:
    if not onednn._path():
        pytest.skip("pip install 'fxq[onednn]'")
    with pytest.raises(BackendError, match=r"this is oneDNN 2\.6\.0, not 3: pip install"):
        Library(as_version(2))
    with pytest.raises(BackendError, match="has no dnnl_version"):
        Library({})
