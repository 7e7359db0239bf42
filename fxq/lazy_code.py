"""Code for a graph once something runs or reads it.

torch.fx writes and compiles a function whenever a module gets a graph. That takes long, and for a while some 10 KiB a
node, more than all else that is known of the node; and the source stays in a table of torch.fx for good. Most graphs
on the way from a model to a lowered one never run, and the prepared one may run for a few batches only, for which it is
interpreted.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import fx

from fxq.interpreter import Interpreter

# What torch.fx keeps of the code beside its function.
TEXTS = ("_code", "_lineno_map", "_prologue_start")


class _Writer(Protocol):
    def write_code(self) -> None:
        """Put the function that runs the graph on the class of this module."""


class Uncompiled:
    """Stands for ``forward`` on the class that torch.fx makes for each graph module, until it is looked up."""

    def __init__(self, module: _Writer) -> None:
        self._module = weakref.ref(module)

    def __get__(self, instance: object | None, owner: type) -> Any:
        module = self._module()
        if module is None:  # its class, which is its own, outlived it
            raise AttributeError("forward")
        module.write_code()
        return vars(owner)["forward"].__get__(instance, owner)


@contextlib.contextmanager
def interpreted(modules: Iterable[fx.GraphModule]) -> Iterator[None]:
    """While open, modules without code run node by node, which takes a few microseconds a node longer."""
    uncompiled = [module for module in modules if isinstance(vars(type(module)).get("forward"), Uncompiled)]
    for module in uncompiled:
        module.__dict__["forward"] = functools.partial(_interpret, module)
    try:
        yield
    finally:
        for module in uncompiled:
            del module.__dict__["forward"]


def _interpret(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    interpreter = Interpreter(module)
    interpreter.extra_traceback = False
    return interpreter.run_call(args, kwargs)
