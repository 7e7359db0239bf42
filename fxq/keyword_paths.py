"""Code for graphs that use modules named like keywords: ``nn.ModuleDict({"from": ...})``, ``add_module("class", ...)``.

torch.fx writes ``getattr(self, "a-b")`` for a name that is no identifier, but ``self.from`` for one that only looks so,
which does not compile.
"""

from __future__ import annotations

import keyword
import types
from collections.abc import Callable
from typing import Any

import torch.fx.graph
from torch.fx import Graph
from torch.fx.graph import CodeGen


def attribute_code(base: str, path: str) -> str:
    """Python code for what is at a dotted path of ``base``.

    Example:
        >>> attribute_code("self", "heads.from.0.weight")
        'getattr(getattr(self.heads, "from"), "0").weight'
    """
    code = base
    for name in path.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        code = f"{code}.{name}" if plain else f'getattr({code}, "{name}")'
    return code


def _with_attribute_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.fx.graph`` that calls :func:`attribute_code`; torch's own stays as it is for others."""
    names = vars(torch.fx.graph) | {"_format_target": attribute_code}
    made = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class _CodeGen(CodeGen):
    _gen_python_code = _with_attribute_code(CodeGen._gen_python_code)


def allow_keywords(graph: Graph) -> None:
    """Let the code of a graph, and of copies of it, read paths with keywords in them."""
    if type(graph._codegen) is CodeGen:
        graph.set_codegen(_CodeGen())
