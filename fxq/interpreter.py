"""torch.fx's interpreter, which gives functions the lists and dicts that a compiled graph would give them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list


class Interpreter(fx.Interpreter):
    """Runs a graph node by node; containers among arguments are new at each call, and may be changed."""

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return plain(args), plain(kwargs)

    def run_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the graph's forward would return for these arguments, without its code being written."""
        bound = graph_signature(self.graph).bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(*bound.args, enable_io_processing=False)


def plain(value: Any) -> Any:
    """The same with ordinary lists and dicts; a named tuple or a dict with attributes keeps the type of its own."""
    if isinstance(value, immutable_list) or type(value) is list:
        return [plain(item) for item in value]
    if type(value) is tuple:
        return tuple(plain(item) for item in value)
    if isinstance(value, immutable_dict) or type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value


def graph_signature(graph: fx.Graph) -> inspect.Signature:
    """That of the function torch.fx would write for a graph, which is not written for it: that takes much memory."""
    kinds = {0: inspect.Parameter.POSITIONAL_OR_KEYWORD, 1: inspect.Parameter.VAR_POSITIONAL,
             2: inspect.Parameter.VAR_KEYWORD}  # fmt: skip
    parameters = []
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            default = node.args[0] if node.args else inspect.Parameter.empty
            parameters.append(inspect.Parameter(name, kinds[len(str(node.target)) - len(name)], default=default))
    return inspect.Signature(parameters)
