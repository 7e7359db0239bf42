"""Which int8 engines this build of torch has, what the CPU can do, and how a model runs under the right one.

A packed weight remembers the engine it was packed for and runs under it whatever the global setting is.
Only the kernels without weights (add, pools, sigmoid, ...) look at the global engine, and only to ask
whether it is qnnpack. So a lowered model needs two things: weights packed under its engine, and the
other kernels run under one fixed engine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from fxq.errors import BackendError

_LOCK = threading.RLock()
_running = 0
_saved_engine = ""


def available_engines() -> tuple[str, ...]:
    """Engines of this build of torch."""
    return tuple(torch.backends.quantized.supported_engines)


def require_engine(engine: str) -> None:
    """Raise BackendError unless this torch has ``engine``."""
    if engine not in available_engines():
        have = ", ".join(available_engines()) or "none"
        raise BackendError(
            f"this build of torch has no '{engine}' engine (it has: {have}); choose a backend that "
            f"fxq.backends() lists as available"
        )


def cpu_has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit integers with 32-bit accumulation (AVX512-VNNI or AVX-VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


@contextlib.contextmanager
def packing(engine: str) -> Iterator[None]:
    """Pack weights for ``engine``; the global setting is put back afterwards."""
    require_engine(engine)
    with _LOCK:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


def _neutral_engine() -> str:
    """The engine under which kernels without weights run: any but qnnpack, whose versions round differently."""
    return next((engine for engine in ("x86", "fbgemm", "onednn") if engine in available_engines()), "qnnpack")


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run a lowered model: results do not depend on the global engine, also with several threads.

    All lowered models need the same setting, so the first one in sets it and the last one out restores it.
    """
    global _running, _saved_engine
    with _LOCK:
        if _running == 0:
            _saved_engine = torch.backends.quantized.engine
            if _saved_engine == "qnnpack":
                torch.backends.quantized.engine = _neutral_engine()
        _running += 1
    try:
        yield
    finally:
        with _LOCK:
            _running -= 1
            if _running == 0 and _saved_engine == "qnnpack":
                torch.backends.quantized.engine = _saved_engine
