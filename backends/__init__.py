"""Backends by name. A backend is a table of rows; adding one is a module with ``build()`` and a line here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping

from fxq.errors import BackendError
from fxq.op_table import Backend

BACKENDS: Mapping[str, str] = {
    "x86": "fxq.backends.x86",
    "fbgemm": "fxq.backends.fbgemm",
    "onednn": "fxq.backends.onednn",
    "qnnpack": "fxq.backends.qnnpack",
}


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of a name.

    Raises:
        BackendError: if there is no such backend.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend '{name}'; the backends are {', '.join(BACKENDS)}")
    backend: Backend = importlib.import_module(BACKENDS[name]).build()
    object.__setattr__(backend, "made_by", (get_backend, (name,)))  # by name: its rows hold local functions
    return backend
