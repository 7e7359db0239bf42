"""Rewrite every spelling of an op to one: a ``call_function`` of ``op.target`` with all parameters given.

``nn.Conv2d``, ``F.conv2d`` and a parametrized conv all become ``conv2d(input, weight, bias, stride, ...)`` with
``get_attr`` weights under their original paths, so that later passes see one form of each op. Nodes keep
their names. In-place spellings become plain ones: later readers of the overwritten tensor read the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxq.config import qualified_name
from fxq.graph_module import QuantModule, get_attribute, set_tensor
from fxq.ops import (
    CHUNK,
    CONV_TRANSPOSES,
    CONVS,
    FLATTEN,
    GETITEM,
    PAD,
    PERMUTE,
    REQUIRED,
    RESHAPE,
    SPLIT,
    SQUEEZE,
    TRANSPOSE,
    UNSQUEEZE,
    Dictionary,
    Op,
    Signature,
    Spelling,
)
from fxq.pass_base import Pass
from fxq.plan import INPLACE, OWN_FORWARD, UNKNOWN_OP, UNTRACEABLE, Decision, Origin, QuantPlan, float_decision

_VIEWS = (CHUNK, FLATTEN, GETITEM, PERMUTE, RESHAPE, SPLIT, SQUEEZE, TRANSPOSE, UNSQUEEZE)


class Canonicalize(Pass):
    """Every spelling of an op to one; records where each node comes from and why a node stays as it is."""

    ensures = frozenset({"canonical"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops
        self._tensors: dict[str, torch.Tensor] = {}

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        changed = 0
        for node in list(module.graph.nodes):
            if not node.op.startswith("call_") or self.ops.op_of(node) and node.name in plan.origins:
                continue
            plan.origins.setdefault(node.name, _origin(node, module))
            changed += self._canonicalize(node, module, plan)
        module.graph.eliminate_dead_code()
        for name in plan.origins.keys() - {node.name for node in module.graph.nodes}:
            plan.forget(name)
        _release_modules(module, self._tensors)
        return changed

    def _canonicalize(self, node: Node, module: QuantModule, plan: QuantPlan) -> bool:
        found = self._spelled(node, module)
        if found is None:
            if node.op == "call_module":
                plan.decisions[node.name] = _why_left(node, module, plan, self.ops)
            return False
        op, spelling = found
        spelled = _spelled_values(node, module, op, spelling)
        values = None if spelled is None else _canonical_values(op, spelling, spelled)
        if spelled is None or values is None:
            plan.decisions[node.name] = float_decision(UNKNOWN_OP, f"{op.name} with arguments fxq does not know")
            return False
        inplace = spelling.inplace or bool(spelled.get("inplace"))
        if inplace and not _redirect_later_readers(node, self.ops):
            plan.decisions[node.name] = float_decision(INPLACE)
            return False
        if op in CONVS:
            _make_padding_explicit(node, module, values, plan)
        self._rewrite(node, op, values)
        return True

    def _spelled(self, node: Node, module: QuantModule) -> tuple[Op, Spelling] | None:
        if node.op != "call_module":
            return self.ops.spelled(node.target)
        leaf = module.get_submodule(str(node.target))
        for cls in type(leaf).__mro__:
            found = self.ops.spelled(cls)
            if found is not None:
                # A subclass that computes something else is not its base class.
                return found if type(leaf).forward is cls.forward else None
        return None

    def _rewrite(self, node: Node, op: Op, values: Mapping[str, Any]) -> None:
        nodes = dict(values)
        with node.graph.inserting_before(node):
            for name, value in values.items():
                if isinstance(value, _Attribute):
                    # A tensor computed by a parametrization (weight_norm, spectral_norm) is constant in eval mode.
                    self._tensors[value.path] = value.tensor
                    nodes[name] = node.graph.create_node("get_attr", value.path)
        args, kwargs = op.arguments(nodes)
        node.op, node.target = "call_function", op.target
        node.args, node.kwargs = args, kwargs


class _Attribute:
    """A tensor parameter of a module call: becomes a ``get_attr`` node."""

    def __init__(self, path: str, tensor: torch.Tensor) -> None:
        self.path, self.tensor = path, tensor


def _origin(node: Node, module: QuantModule) -> Origin:
    if node.op == "call_module":
        return Origin(str(node.target), qualified_name(type(module.get_submodule(str(node.target)))))
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return Origin(path, f"Tensor.{node.target}" if node.op == "call_method" else qualified_name(node.target))


def _why_left(node: Node, module: QuantModule, plan: QuantPlan, ops: Dictionary) -> Decision:
    if str(node.target) in plan.untraceable:
        return float_decision(UNTRACEABLE, plan.untraceable[str(node.target)])
    leaf = module.get_submodule(str(node.target))
    if any(ops.spelled(cls) for cls in type(leaf).__mro__):
        return float_decision(OWN_FORWARD, f"of {type(leaf).__mro__[1].__name__}")
    return float_decision(UNKNOWN_OP, type(leaf).__name__)


def _spelled_values(node: Node, module: QuantModule, op: Op, spelling: Spelling) -> dict[str, Any] | None:
    if node.op != "call_module":
        signature = Signature(spelling.signature) if spelling.signature else op.signature
        return signature.bind(node.args, node.kwargs)
    path = str(node.target)
    leaf = module.get_submodule(path)
    call = Signature(spelling.signature or ", ".join(op.tensors)).bind(node.args, node.kwargs)
    if call is None:
        return None
    back = {canonical: spelled for spelled, canonical in spelling.rename.items()}
    for name in (*op.signature.defaults, *spelling.must, "inplace"):
        if name in call or name in spelling.fixed:
            continue
        attribute = back.get(name, name)
        if name in spelling.derive:
            call[attribute] = spelling.derive[name](leaf)
        elif hasattr(leaf, attribute):
            call[attribute] = _attribute(f"{path}.{attribute}", getattr(leaf, attribute))
    return call


def _attribute(path: str, value: Any) -> Any:
    return _Attribute(path, value.detach() if value.grad_fn else value) if isinstance(value, torch.Tensor) else value


def _canonical_values(op: Op, spelling: Spelling, spelled: Mapping[str, Any]) -> dict[str, Any] | None:
    if any(spelled.get(name, value) != value for name, value in spelling.must.items()):
        return None
    renamed = {spelling.rename.get(name, name): value for name, value in spelled.items()}
    renamed.update(spelling.fixed)
    values: dict[str, Any] = {}
    for name, default in op.signature.defaults.items():
        value = renamed.get(name)
        value = default if value is None else value
        if value is REQUIRED:
            return None
        values[name] = value
    if "inplace" in values:
        values["inplace"] = False
    if op.signature.rest is not None:
        values[op.signature.rest] = _unpack(renamed.get(op.signature.rest, ()))
    return values


def _unpack(rest: Any) -> tuple[Any, ...]:
    """``view(2, 3)``, ``view((2, 3))`` and ``view(size)`` have one canonical form: the sizes one by one."""
    if not isinstance(rest, (tuple, list)):
        return (rest,)
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)


def _redirect_later_readers(node: Node, ops: Dictionary) -> bool:
    """Let readers of the overwritten tensor that come after ``node`` read ``node``; False if it is a live view."""
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    order = {other: position for position, other in enumerate(node.graph.nodes)} if _has_others(source, node) else {}
    base = source.args[0] if ops.op_of(source) in _VIEWS or source.target in ("view", "chunk", "split") else None
    if isinstance(base, Node) and _has_others(base, source):
        order = order or {other: position for position, other in enumerate(node.graph.nodes)}
        if any(order[user] > order[node] for user in base.users):
            return False
    source.replace_all_uses_with(node, delete_user_cb=lambda user: order.get(user, -1) > order.get(node, 0))
    return True


def _has_others(node: Node, user: Node) -> bool:
    return any(other is not user for other in node.users)


def _make_padding_explicit(node: Node, module: QuantModule, values: dict[str, Any], plan: QuantPlan) -> None:
    """Turn ``padding='same'`` and other padding modes into integers, with a pad before where they need one."""
    pads: list[int] | None = None
    mode = "constant"
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if getattr(leaf, "padding_mode", "zeros") != "zeros":
            mode, pads = str(leaf.padding_mode), list(leaf._reversed_padding_repeated_twice)  # type: ignore[arg-type]
            values["padding"] = 0
    if values["padding"] == "valid":
        values["padding"] = 0
    elif values["padding"] == "same":
        kernel = _shape(values["weight"], module)[2:]
        dilation = values["dilation"]
        dilations = dilation if isinstance(dilation, (tuple, list)) else [dilation] * len(kernel)
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        values["padding"] = 0 if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)
        if values["padding"] == 0:
            pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    if pads is not None:
        with node.graph.inserting_before(node):
            pad = node.graph.create_node(
                "call_function", F.pad, (values["input"], pads, mode, None), name=f"{node.name}_pad"
            )
        values["input"] = pad
        plan.origins[pad.name] = plan.origin(node.name)


def _shape(weight: Any, module: QuantModule) -> torch.Size:
    tensor = weight.tensor if isinstance(weight, _Attribute) else get_attribute(module, str(weight.target))
    return torch.Size(tensor.shape)


def _release_modules(module: QuantModule, tensors: Mapping[str, torch.Tensor]) -> None:
    """Drop leaf modules that no node calls any more, keeping the tensors that nodes read."""
    read = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    kept = {path: tensors[path] if path in tensors else get_attribute(module, path) for path in read}
    called = {str(n.target): module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"}
    for name in list(module._modules):
        delattr(module, name)
    for path, leaf in called.items():
        module.add_submodule(path, leaf)
    for path, tensor in kept.items():
        if path.rpartition(".")[0] not in called:
            set_tensor(module, path, tensor)
