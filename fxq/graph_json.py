"""A reference graph as JSON, and back. Nothing in it can name code outside a fixed list.

Functions and methods are written by name and looked up again only in a list of harmless ones
(:mod:`fxq.file_functions`), some with checks that torch lacks (:mod:`fxq.checked_functions`); modules must be those the
reader has made (:mod:`fxq.leaves`), and classes of results those of the model that the reader has
(:mod:`fxq.record_classes`); what torch.fx writes into the code of ``forward`` (inputs, keywords, paths of tensors and
modules) must be plain names. So neither reading nor running a graph executes anything that the file brings.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fxq.checked_functions import TORCHS, checked, require_sizes
from fxq.errors import FileFormatError, FxqError
from fxq.file_functions import functions, tensor_methods
from fxq.record_classes import Classes, classes_of, record_name

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(order).removeprefix("torch."): order
    for order in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}

# Of tensors; "values" and "indices" of what max and the like return.
_ATTRIBUTES = frozenset(
    {"shape", "ndim", "device", "dtype", "data", "T", "mT", "H", "mH", "real", "imag", "values", "indices"}
)


_CLASS = "class:"


def _is_path(path: str) -> bool:
    """Whether torch.fx may write ``path`` into code: it quotes what is no identifier, but escapes nothing."""
    return path.isprintable() and not {'"', "'", "\\"} & set(path)


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph as JSON values; of the modules it calls, their paths.

    Raises:
        FxqError: for a node that a file cannot hold, naming it.
    """
    names: dict[Any, str] = {}
    for name, function in functions().items():
        names.setdefault(function, name)
    return [_encode_node(node, names) for node in graph.nodes]


def _encode_node(node: Node, names: dict[Any, str]) -> dict[str, Any]:
    target: Any = TORCHS.get(node.target, node.target)
    if node.op == "call_function":
        record = None if target in names else record_name(target)
        if record is None and target not in names:
            raise FxqError(f"node '{node.name}' calls {target!r}, which is not one of torch's own functions")
        target = f"{_CLASS}{record}" if record else names[target]
    if node.target is getattr and node.args[1] not in _ATTRIBUTES:
        raise FxqError(f"node '{node.name}' reads the attribute '{node.args[1]}', which a file may not read")
    if node.op == "call_method" and target not in tensor_methods():
        raise FxqError(f"node '{node.name}' calls the method '{target}', which a file may not call")
    args, kwargs = (encode_value(value, node.name) for value in (node.args, node.kwargs))
    return {"name": node.name, "op": node.op, "target": target, "args": args, "kwargs": kwargs}


def encode_value(value: Any, where: str) -> Any:
    """An argument as JSON values.

    Raises:
        FxqError: for a type that a file cannot hold, naming ``where``.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode_value(item, where) for item in value]
    if isinstance(value, tuple):  # a torch.Size too
        return {"tuple": [encode_value(item, where) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode_value(k, where), encode_value(v, where)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode_value(part, where) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise FxqError(f"node '{where}' has an argument of type {type(value).__name__}, which a file cannot hold")


def decode_graph(
    records: list[dict[str, Any]],
    tensors: Collection[str],
    modules: Collection[str] = (),
    classes: Classes | None = None,
) -> fx.Graph:
    """A graph from what :func:`encode_graph` made.

    Args:
        tensors: paths that its nodes may read.
        modules: paths that its nodes may call.
        classes: looks up the classes that it names; by default it may name none.

    Raises:
        FileFormatError: for anything it would not have made.
        ConfigError: for a class that is not there.
    """
    graph = fx.Graph()
    nodes: dict[str, Node] = {}
    for record in records:
        name, op = record["name"], record["op"]
        target = _decode_target(name, op, record["target"], tensors, modules, classes or classes_of(None))
        args, kwargs = decode_value(record["args"], nodes), decode_value(record["kwargs"], nodes)
        if not all(isinstance(key, str) and key.isidentifier() for key in kwargs):
            raise FileFormatError(f"node '{name}' has a keyword argument whose name is no identifier")
        if target is getattr and args[1] not in _ATTRIBUTES:
            raise FileFormatError(f"node '{name}' reads the attribute '{args[1]}', which a file may not read")
        if op == "call_function" and record["target"].partition(":")[2].startswith("conv"):
            require_sizes((args, kwargs))  # which torch adds up and multiplies without a look at overflows
        nodes[name] = graph.create_node(*checked(op, target), args, kwargs, name=name)
        if nodes[name].name != name:
            raise FileFormatError(f"'{name}' is the name of two nodes, or cannot be the name of one")
    if [node.op for node in graph.nodes].count("output") != 1:
        raise FileFormatError("a graph has exactly one output node")
    return graph


def _decode_target(
    name: str,
    op: str,
    target: Any,
    tensors: Collection[str],
    modules: Collection[str],
    classes: Classes,
) -> Any:
    if not isinstance(target, str):
        raise FileFormatError(f"the target of node '{name}' is no text")
    if op == "call_function":
        if target.startswith(_CLASS):
            return classes(target.removeprefix(_CLASS))
        if target not in functions():
            raise FileFormatError(f"node '{name}' names the function '{target}', which a file may not call")
        return functions()[target]
    if op == "call_method":
        if target not in tensor_methods():
            raise FileFormatError(f"node '{name}' names the method '{target}', which a file may not call")
    elif op == "get_attr":
        if target not in tensors or not _is_path(target):
            raise FileFormatError(f"node '{name}' reads '{target}', which is no tensor of the file")
    elif op == "call_module":
        if target not in modules or not _is_path(target):
            raise FileFormatError(f"node '{name}' calls '{target}', which is no module of the file")
    elif op == "placeholder":
        if not target.removeprefix("*").removeprefix("*").isidentifier():
            raise FileFormatError(f"node '{name}' is an input with the name '{target}', which is no identifier")
    elif op != "output":
        raise FileFormatError(f"node '{name}' is of the unknown kind '{op}'")
    return target


def decode_value(value: Any, nodes: dict[str, Node]) -> Any:
    """An argument from what :func:`encode_value` made; ``nodes`` are those it may refer to."""
    if isinstance(value, list):
        return [decode_value(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(decode_value(item, nodes) for item in content)
    if kind == "dict":
        return {decode_value(k, nodes): decode_value(v, nodes) for k, v in content}
    if kind == "slice":
        return slice(*(decode_value(part, nodes) for part in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype":
        return DTYPES[content]
    if kind == "memory_format":
        return _MEMORY_FORMATS[content]
    if kind == "device":
        return torch.device(content)
    raise FileFormatError(f"an argument of the unknown kind '{kind}'")
