"""torch.fx's interpreter, which gives functions the lists and dicts that a compiled graph would give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list


class Interpreter(fx.Interpreter):
    """Runs a graph node by node; lists and dicts written in arguments are new at each call, and may be changed."""

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        return plain(n.args, self.env.__getitem__), plain(n.kwargs, self.env.__getitem__)

    def run_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the graph's forward would return for these arguments, without its code being written."""
        bound = graph_signature(self.graph).bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(*bound.args, enable_io_processing=False)


def plain(value: Any, value_of: Callable[[Node], Any]) -> Any:
    """Arguments of a node with ordinary lists and dicts, and with the values of nodes as they are: a function may write
    to one that others read later. A named tuple or a dict with attributes keeps the type of its own.
    """
    if isinstance(value, Node):
        found = value_of(value)
        return plain(found, value_of) if isinstance(found, (immutable_list, immutable_dict)) else found
    if isinstance(value, immutable_list) or type(value) is list:
        return [plain(item, value_of) for item in value]
    if type(value) is tuple:
        return tuple(plain(item, value_of) for item in value)
    if isinstance(value, immutable_dict) or type(value) is dict:
        return {key: plain(item, value_of) for key, item in value.items()}
    return fx.map_arg(value, value_of)


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
