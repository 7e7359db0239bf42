"""Which int8 engines this build of torch has, what the CPU can do, and how a model runs under the right one.

A packed weight remembers the engine it was packed for and runs under it whatever the global setting is. Two kinds
of kernels look at the global engine when they run: those without weights (add, pools, sigmoid, ...) round
differently under qnnpack, and conv2d_add exists under onednn only. So a lowered model needs weights packed
under their engines, and one fixed engine while it runs, the same for all models.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from fxq.errors import BackendError

# The engine is one setting for all threads: models run side by side under theirs, packing needs it for itself.
_TURN = threading.Condition(threading.RLock())
_THREAD = threading.local()  # .depth: how many models this thread is inside of
_running = 0
_waiting_to_pack = 0
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
    """Pack weights for ``engine``, while no model runs; the global setting is put back afterwards."""
    global _waiting_to_pack
    require_engine(engine)
    with _TURN:
        if _depth() == 0:  # inside a running model waiting would never end
            _waiting_to_pack += 1
            try:
                _TURN.wait_for(lambda: _running == 0)
            finally:
                _waiting_to_pack -= 1
                _TURN.notify_all()
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


def running_engine() -> str:
    """The engine models run under: onednn, alone in having conv2d_add; any but qnnpack, which rounds differently."""
    available = available_engines()
    return next((engine for engine in ("onednn", "x86", "fbgemm") if engine in available), "qnnpack")


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run a lowered model: results do not depend on the global engine, also with several threads.

    All lowered models need the same setting, so the first one in sets it and the last one out restores it.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _depth() -> int:
    return getattr(_THREAD, "depth", 0)


def _enter() -> None:
    global _running, _saved_engine
    with _TURN:
        if _depth() == 0:  # let those who wait to pack go first, lest busy models keep them waiting for ever
            _TURN.wait_for(lambda: _waiting_to_pack == 0, timeout=1.0)
        if _running == 0:
            _saved_engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = running_engine()
        _running += 1
        _THREAD.depth = _depth() + 1


def _leave() -> None:
    global _running
    with _TURN:
        _THREAD.depth -= 1
        _running -= 1
        if _running == 0:
            torch.backends.quantized.engine = _saved_engine
            _TURN.notify_all()
