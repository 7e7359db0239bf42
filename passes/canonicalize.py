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
from torch.fx.node import map_aggregate
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxq.aliases import after, aliases, overwrites, shape_values
from fxq.config import qualified_name
from fxq.graph_module import QuantModule, get_attribute, set_tensor
from fxq.ops import CONVS, REQUIRED, Dictionary, Op, Signature, Spelling
from fxq.pass_base import Pass
from fxq.plan import (
    INPLACE,
    OWN_FORWARD,
    RECURRENT,
    TORCHSCRIPT,
    UNKNOWN_OP,
    UNTRACEABLE,
    Decision,
    Origin,
    QuantPlan,
    float_decision,
)

# Hooks of older torch versions that compute a weight before each forward; it is constant in eval mode.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


class Canonicalize(Pass):
    """Every spelling of an op to one; records where each node comes from and why a node stays as it is."""

    ensures = frozenset({"canonical"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops
        self._tensors: dict[str, torch.Tensor] = {}
        self._order: dict[Node, int] = {}
        self._numbers: set[Node] = set()

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        changed = 0
        self._order = {node: position for position, node in enumerate(module.graph.nodes)}
        self._numbers = shape_values(module.graph)
        _compute_weights(module)
        for node in list(self._order):
            if not node.op.startswith("call_") or node.name in plan.origins:
                continue
            plan.origins.setdefault(node.name, _origin(node, module))
            changed += self._canonicalize(node, module, plan)
        for node in module.graph.nodes:
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _as_python)
        module.graph.eliminate_dead_code()
        for node in module.graph.nodes:
            node.meta.pop("nn_module_stack", None)  # the origins say it in short
        for name in plan.origins.keys() - {node.name for node in module.graph.nodes}:
            plan.forget(name)
        _release_modules(module, self._tensors)
        return changed

    def _canonicalize(self, node: Node, module: QuantModule, plan: QuantPlan) -> bool:
        found = self._spelled(node, module)
        if found is None:
            if node.op == "call_module":
                plan.decisions[node.name] = _why_left(node, module, plan, self.ops)
            self._order_after(node, module, plan)
            return False
        op, spelling = found
        spelled = _spelled_values(node, module, op, spelling)
        values = None if spelled is None else _canonical_values(op, spelling, spelled)
        if spelled is None or values is None:
            plan.decisions[node.name] = float_decision(UNKNOWN_OP, f"{op.name} with arguments fxq does not know")
            self._order_after(node, module, plan)
            return False
        if (spelling.inplace or bool(spelled.get("inplace"))) and node not in self._numbers:
            source = next(iter(values.values()))
            if not isinstance(source, Node) or not self._make_functional(node, source):
                self._order_after(node, module, plan)
                return False
        if op in CONVS:
            _make_padding_explicit(node, module, values, plan)
        self._rewrite(node, op, values)
        return True

    def _later_readers(self, source: Node, node: Node) -> list[Node]:
        position = self._order[node]
        return [user for user in source.users if self._order.get(user, -1) > position]

    def _make_functional(self, node: Node, source: Node) -> bool:
        """Let later readers of an overwritten tensor read ``node``; False where another name of it is read later, or
        the model itself keeps it.
        """
        names = aliases(source, self.ops)
        if names[0].op == "get_attr":
            return False
        for other in names:
            made_before = self._order[other] < self._order[node]
            if other is not source and made_before and self._later_readers(other, node):
                return False
        for reader in self._later_readers(source, node):
            reader.replace_input_with(source, node)
        return True

    def _order_after(self, node: Node, module: QuantModule, plan: QuantPlan) -> None:
        """Keep a node that overwrites memory in place, and make later reads of that memory depend on it."""
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        sources = node.all_input_nodes
        if node in self._numbers or not sources or not overwrites(node, leaf):
            return
        plan.decisions.setdefault(node.name, float_decision(INPLACE))
        maker, *others = aliases(sources[0], self.ops)
        for name in (maker, *others):
            if name is not maker:  # int8 views would be copies; the maker's float copy is what they are views of
                plan.decisions.setdefault(name.name, float_decision(INPLACE, f"by {node.name}"))
            readers = self._later_readers(name, node)
            if readers and self._order[name] < self._order[node]:
                with node.graph.inserting_after(node):
                    now = node.graph.create_node("call_function", after, (name, node), name=f"{name.name}_after")
                plan.origins[now.name] = plan.origin(node.name)
                plan.decisions[now.name] = float_decision(INPLACE)
                self._order[now] = self._order[node]  # after it, before all that follows
                for reader in readers:
                    reader.replace_input_with(name, now)

    def _spelled(self, node: Node, module: QuantModule) -> tuple[Op, Spelling] | None:
        if node.op != "call_module":
            return self.ops.spelled(node.target)
        if _hooked(module.get_submodule(str(node.target))):
            return None
        leaf = module.get_submodule(str(node.target))
        for cls in type(leaf).__mro__:
            found = self.ops.spelled(cls)
            if found is not None:
                # A subclass that computes something else is not its base class.
                same = getattr(type(leaf), "forward", None) is getattr(cls, "forward", None)
                return found if same else None
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


def _as_python(value: Any) -> Any:
    """A number of numpy, as strides that a library computed are, as Python's: code of a graph can name no other."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def _origin(node: Node, module: QuantModule) -> Origin:
    stack = node.meta.get("nn_module_stack") or {}
    around = tuple(qualified_name(kind) for path, kind in reversed(stack.values()) if path != node.target)
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        return Origin(str(node.target), qualified_name(parametrize.type_before_parametrizations(leaf)), around)
    path = next(reversed(stack.values()))[0] if stack else ""
    return Origin(path, f"Tensor.{node.target}" if node.op == "call_method" else qualified_name(node.target), around)


def _why_left(node: Node, module: QuantModule, plan: QuantPlan, ops: Dictionary) -> Decision:
    if str(node.target) in plan.untraceable:
        return float_decision(UNTRACEABLE, plan.untraceable[str(node.target)])
    leaf = module.get_submodule(str(node.target))
    if isinstance(leaf, torch.jit.ScriptModule):
        return float_decision(TORCHSCRIPT)
    if _hooked(leaf):
        return float_decision(OWN_FORWARD, "it has forward hooks")
    if any(ops.spelled(cls) for cls in type(leaf).__mro__):
        return float_decision(OWN_FORWARD, f"of {type(leaf).__mro__[1].__name__}")
    if isinstance(leaf, (nn.RNNBase, nn.RNNCellBase)):
        return float_decision(RECURRENT)
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
    renamed: dict[str, Any] = {}
    for name, value in spelled.items():  # of two names of one parameter, as dim and axis are, one is given
        if value is not None or spelling.rename.get(name, name) not in renamed:
            renamed[spelling.rename.get(name, name)] = value
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


def _compute_weights(module: QuantModule) -> None:
    """Run the hooks that compute a weight, so that the attributes are up to date, and drop them."""
    for path in dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module"):
        leaf = module.get_submodule(path)
        for key, hook in list(leaf._forward_pre_hooks.items()):
            if isinstance(hook, WEIGHT_HOOKS):
                hook(leaf, ())
                del leaf._forward_pre_hooks[key]


def _hooked(leaf: nn.Module) -> bool:
    """Whether a module does something besides its forward."""
    return bool(leaf._forward_hooks or leaf._forward_pre_hooks)


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
