"""A reference graph and its plan as JSON, and back. Nothing in it can name code outside a fixed list.

Functions are written by name and looked up again only among the vocabulary's targets, the qdq ops, arithmetic
operators, ``torch.nn.functional`` and torch's own tensor functions; methods must be torch tensor methods; what
torch.fx writes into the code of ``forward`` (inputs, keywords, paths of tensors) must be plain names. So neither
reading nor running a graph executes anything that the file brings.
"""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node

from fxq.aliases import after
from fxq.attention import multihead_attention, window_attention
from fxq.errors import FileFormatError, FxqError
from fxq.ops import VOCABULARY
from fxq.plan import (
    Decision,
    Fusion,
    Origin,
    QuantPlan,
    Reason,
    Region,
    Slot,
    Stage,
    Status,
    TensorFact,
)
from fxq.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from fxq.schema import wrong_field
from fxq.spec import QuantSpec

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.bool,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(order).removeprefix("torch."): order
    for order in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}

# Arithmetic, comparison and indexing only: operator.call and methodcaller would let a file call anything.
_OPERATORS = (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "index", "invert", "le", "lt", "matmul", "mod",
    "mul", "ne", "neg", "not_", "or_", "pos", "pow", "sub", "truediv", "xor",
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "setitem",
)  # fmt: skip
_ATTRIBUTES = frozenset({"shape", "ndim", "device", "dtype", "data", "T", "mT"})
# Functions and methods that read files or foreign memory, call Python back, or trust their arguments blindly.
_UNSAFE = frozenset({
    "from_file", "from_numpy", "frombuffer", "asarray", "empty_quantized", "apply_", "map_", "map2_", "set_", "numpy",
    "data_ptr", "const_data_ptr", "untyped_storage", "record_stream", "as_subclass", "resize_as_sparse_",
})  # fmt: skip
_PYTHON_METHODS = frozenset({"split", "norm", "unflatten", "unique", "unique_consecutive", "stft", "istft"})
_UNSAFE_FAMILIES = ("cudnn_", "miopen_", "mkldnn_", "fbgemm_", "sparse_", "quantized_", "fused_", "batch_norm_")


def _is_safe(name: str) -> bool:
    return name not in _UNSAFE and not name.startswith(("_", *_UNSAFE_FAMILIES))


def _functions() -> dict[str, Callable[..., Any]]:
    """Every function that a file may name."""
    named: dict[str, Callable[..., Any]] = {f"op:{op.name}": op.target for op in VOCABULARY}
    named |= {"fxq:quantize": QUANTIZE, "fxq:dequantize": DEQUANTIZE, "fxq:dequantize_channel": DEQUANTIZE_CHANNEL}
    named |= {f"fxq:{f.__name__}": f for f in (multihead_attention, window_attention, after)}
    named |= {"builtins:getattr": getattr, "torch:_assert": torch._assert}
    named |= {f"operator:{name}": getattr(operator, name) for name in _OPERATORS}
    for name in dir(torch._C._VariableFunctions):
        if _is_safe(name):
            named[f"torch:{name}"] = getattr(torch._C._VariableFunctions, name)
    for name, value in vars(F).items():
        if isinstance(value, types.FunctionType) and value.__module__ == F.__name__ and not name.startswith("_"):
            named[f"functional:{name}"] = value
    named |= {f"torch.functional:{name}": getattr(torch.functional, name) for name in torch.functional.__all__}
    return named


def _is_tensor_method(name: str) -> bool:
    method = getattr(torch.Tensor, name, None)
    return name in _PYTHON_METHODS or (_is_safe(name) and isinstance(method, types.MethodDescriptorType))


def _is_path(path: str) -> bool:
    """Whether torch.fx may write ``path`` into code: it quotes what is no identifier, but escapes nothing."""
    return path.isprintable() and not {'"', "'", "\\"} & set(path)


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph as JSON values.

    Raises:
        FxqError: for a node that a file cannot hold, naming it.
    """
    names: dict[Any, str] = {}
    for name, function in _functions().items():
        names.setdefault(function, name)
    return [_encode_node(node, names) for node in graph.nodes]


def _encode_node(node: Node, names: dict[Any, str]) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_module":
        raise FxqError(
            f"node '{node.name}' calls the module '{target}', which is not one of the operations fxq knows and whose "
            f"code a file cannot hold; write it with torch functions, or keep the model in memory"
        )
    if node.op == "call_function":
        if target not in names:
            raise FxqError(f"node '{node.name}' calls {target!r}, which is not one of torch's own functions")
        target = names[target]
    if node.op == "call_method" and not _is_tensor_method(target):
        raise FxqError(f"node '{node.name}' calls the method '{target}', which a file may not call")
    args, kwargs = (_encode(value, node.name) for value in (node.args, node.kwargs))
    return {"name": node.name, "op": node.op, "target": target, "args": args, "kwargs": kwargs}


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(item, where) for item in value]
    if isinstance(value, tuple):  # a torch.Size too
        return {"tuple": [_encode(item, where) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, where), _encode(v, where)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(part, where) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise FxqError(f"node '{where}' has an argument of type {type(value).__name__}, which a file cannot hold")


def decode_graph(records: list[dict[str, Any]], tensors: Collection[str]) -> fx.Graph:
    """A graph from what :func:`encode_graph` made.

    Args:
        tensors: paths that its nodes may read.

    Raises:
        FileFormatError: for anything it would not have made.
    """
    functions = _functions()
    graph = fx.Graph()
    nodes: dict[str, Node] = {}
    for record in records:
        name, op = record["name"], record["op"]
        target = _decode_target(name, op, record["target"], functions, tensors)
        args, kwargs = _decode(record["args"], nodes), _decode(record["kwargs"], nodes)
        if not all(isinstance(key, str) and key.isidentifier() for key in kwargs):
            raise FileFormatError(f"node '{name}' has a keyword argument whose name is no identifier")
        if target is getattr and args[1] not in _ATTRIBUTES:
            raise FileFormatError(f"node '{name}' reads the attribute '{args[1]}', which a file may not read")
        nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
        if nodes[name].name != name:
            raise FileFormatError(f"'{name}' is the name of two nodes, or cannot be the name of one")
    if [node.op for node in graph.nodes].count("output") != 1:
        raise FileFormatError("a graph has exactly one output node")
    return graph


def _decode_target(
    name: str, op: str, target: Any, functions: dict[str, Callable[..., Any]], tensors: Collection[str]
) -> Any:
    if not isinstance(target, str):
        raise FileFormatError(f"the target of node '{name}' is no text")
    if op == "call_function":
        if target not in functions:
            raise FileFormatError(f"node '{name}' names the function '{target}', which a file may not call")
        return functions[target]
    if op == "call_method":
        if not _is_tensor_method(target):
            raise FileFormatError(f"node '{name}' names the method '{target}', which a file may not call")
    elif op == "get_attr":
        if target not in tensors or not _is_path(target):
            raise FileFormatError(f"node '{name}' reads '{target}', which is no tensor of the file")
    elif op == "placeholder":
        if not target.removeprefix("*").removeprefix("*").isidentifier():
            raise FileFormatError(f"node '{name}' is an input with the name '{target}', which is no identifier")
    elif op != "output":
        raise FileFormatError(f"node '{name}' is of the unknown kind '{op}'")
    return target


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "dict":
        return {_decode(k, nodes): _decode(v, nodes) for k, v in content}
    if kind == "slice":
        return slice(*(_decode(part, nodes) for part in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "memory_format":
        return _MEMORY_FORMATS[content]
    if kind == "device":
        return torch.device(content)
    raise FileFormatError(f"an argument of the unknown kind '{kind}'")


def encode_plan(plan: QuantPlan) -> dict[str, Any]:
    """A reference graph's plan as JSON values."""
    return {
        "backend": plan.backend,
        "stage": plan.stage.value,
        "model": plan.model,
        "properties": sorted(plan.properties),
        "specs": [[slot.node, list(slot.path), _encode_spec(spec)] for slot, spec in plan.specs.items()],
        "groups": [[slot.node, list(slot.path), group] for slot, group in plan.groups.items()],
        "fixed": [[group, *pair] for group, pair in plan.fixed.items()],
        "regions": [[r.row, list(r.nodes), list(r.absorbed)] for r in plan.regions],
        "decisions": {name: _encode_decision(decision) for name, decision in plan.decisions.items()},
        "origins": {name: [origin.module_path, origin.kind] for name, origin in plan.origins.items()},
        "facts": {name: [list(f.shape), str(f.dtype).removeprefix("torch.")] for name, f in plan.facts.items()},
        "containers": sorted(plan.containers),
        "fusions": [dataclasses.astuple(fusion) for fusion in plan.fusions],
        "notes": plan.notes,
        "macs": plan.macs,
        "attributes": _encode(plan.attributes, "(attributes)"),
        "weight_bytes": list(plan.weight_bytes),
        "untraceable": plan.untraceable,
    }


def _encode_spec(spec: QuantSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    return fields | {"dtype": str(spec.dtype).removeprefix("torch.")}


def _encode_decision(decision: Decision) -> list[Any]:
    reason = None if decision.reason is None else [decision.reason.code, decision.reason.text]
    return [decision.status.value, decision.row, reason, decision.detail]


def decode_plan(record: dict[str, Any]) -> QuantPlan:
    """A plan from what :func:`encode_plan` made.

    Raises:
        FileFormatError, KeyError, TypeError, ValueError: for anything else.
    """
    plan = QuantPlan(
        backend=record["backend"],
        stage=Stage(record["stage"]),
        model=record["model"],
        properties=set(_list(record["properties"])),
        specs={Slot(node, tuple(path)): _decode_spec(spec) for node, path, spec in record["specs"]},
        groups={Slot(node, tuple(path)): group for node, path, group in record["groups"]},
        fixed={group: (scale, zero_point) for group, scale, zero_point in record["fixed"]},
        regions=[Region(row, tuple(nodes), tuple(absorbed)) for row, nodes, absorbed in record["regions"]],
        decisions={name: _decode_decision(*parts) for name, parts in record["decisions"].items()},
        origins={name: Origin(*parts) for name, parts in record["origins"].items()},
        facts={name: TensorFact(tuple(shape), _DTYPES[dtype]) for name, (shape, dtype) in record["facts"].items()},
        containers=set(_list(record["containers"])),
        fusions=[Fusion(*parts) for parts in record["fusions"]],
        notes=_list(record["notes"]),
        macs=dict(record["macs"]),
        attributes=_decode(record["attributes"], {}),
        weight_bytes=(record["weight_bytes"][0], record["weight_bytes"][1]),
        untraceable=dict(record["untraceable"]),
    )
    wrong = wrong_field(plan)
    if wrong is not None:
        raise FileFormatError(f"the plan's '{wrong}' has a value of the wrong type")
    return plan


def check_loaded(plan: QuantPlan, graph: fx.Graph) -> None:
    """Verify what is true of every reference graph's plan, beyond :meth:`QuantPlan.check`.

    Raises:
        FileFormatError: naming what is not.
    """
    if plan.stage is not Stage.REFERENCE:
        raise FileFormatError(f"the plan is of a {plan.stage.value} graph; a file holds a reference graph")
    if "annotated" not in plan.properties:
        raise FileFormatError("the plan has no decisions")
    calls = {node.name for node in graph.nodes if node.op.startswith("call_")}
    for region in plan.regions:
        if not region.nodes or not calls.issuperset(region.nodes):
            raise FileFormatError(f"the plan's region '{region.row}' is of nodes that the graph does not have")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} where a list is due")
    return value


def _decode_spec(record: dict[str, Any]) -> QuantSpec:
    return QuantSpec(**(record | {"dtype": _DTYPES[record["dtype"]]}))


def _decode_decision(status: str, row: str | None, reason: list[str] | None, detail: str) -> Decision:
    return Decision(Status(status), row, None if reason is None else Reason(*reason), detail)
