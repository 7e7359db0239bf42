"""Which modules have their tensors or submodules read by code outside them.

``self.embeddings.projection.weight.dtype`` in the forward of a model needs the modules that it names: none of them can
become a graph module, which has other parts, while the code around it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn


@contextmanager
def watching_reads(model: nn.Module) -> Iterator[set[str]]:
    """While open, collects the paths of the modules of which parts are read while they do not run."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: set[str] = set()
    running: list[int] = []
    original = nn.Module.__getattr__

    def read(module: nn.Module, name: str) -> Any:
        value = original(module, name)
        if running and id(module) in paths and id(module) not in running:
            found.add(paths[id(module)])
        return value

    def enter(module: nn.Module, _: Any) -> None:
        running.append(id(module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        running.remove(id(module))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with mock.patch.object(nn.Module, "__getattr__", read):
            yield found
    finally:
        for handle in handles:
            handle.remove()
