"""Run the graph once on the example inputs and record each tensor's shape and dtype, and each layer's work.

Where values cannot matter, convs and linears compute one channel and repeat it: shapes are the same and most of the
work of a forward pass is spared.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxq.attention import multihead_attention, window_attention
from fxq.copying import copy_inputs
from fxq.errors import InputError
from fxq.graph_module import QuantModule
from fxq.interpreter import Interpreter
from fxq.macs import Counter, counting, node_macs
from fxq.ops import CONVS, DIV, LINEAR, Dictionary, Op
from fxq.pass_base import Pass
from fxq.plan import CHANNELS_LAST, QuantPlan, TensorFact

# Beside the ops of the vocabulary, what neither writes to its arguments nor makes the shape of its result from values.
_SHAPED = frozenset({
    getattr, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.eq, torch._assert,
    multihead_attention, window_attention, "size", "dim", "expand",
})  # fmt: skip


_LARGEST = 1e8
_HIDDEN = -1e3


class RecordFacts(Pass):
    """Shapes and dtypes, which later passes check and tables print."""

    requires = frozenset({"canonical"})
    ensures = frozenset({"facts"})

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], ops: Dictionary) -> None:
        self.args, self.kwargs, self.ops = args, kwargs, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if not (self._values_are_free(module) and self._thinly(module, plan)):
            self._record(_Recorder(module, plan, self.ops))
        if any(map(_is_channels_last, (*tree_leaves((self.args, self.kwargs)), *module.parameters()))):
            plan.properties.add(CHANNELS_LAST)
        return len(plan.facts)

    def _values_are_free(self, module: QuantModule) -> bool:
        """Whether nothing depends on values or keeps them: no float module, no update in place, no unknown function."""
        return all(
            self.ops.op_of(node) is not None or (node.op != "call_module" and node.target in _SHAPED)
            for node in module.graph.nodes
            if node.op.startswith("call_")
        )

    def _thinly(self, module: QuantModule, plan: QuantPlan) -> bool:
        """Record with one channel a layer; returns whether that worked."""
        try:
            self._record(_ThinRecorder(module, plan, self.ops))
        except InputError:  # if the inputs are at fault, so that the full run says so
            return False
        return True

    def _record(self, recorder: _Recorder) -> None:
        plan = recorder.plan
        plan.facts.clear()
        plan.containers.clear()
        plan.unbounded.clear()
        plan.macs.clear()
        placeholders = [node for node in recorder.graph.nodes if node.op == "placeholder"]
        args, kwargs = copy_inputs((self.args, self.kwargs), own=True)
        values = list(args)
        for node in placeholders[len(values) :]:
            if node.target in kwargs:
                values.append(kwargs[str(node.target)])
            elif node.args:
                values.append(node.args[0])
        try:
            with torch.no_grad():
                recorder.run(*values, enable_io_processing=False)
        except Exception as error:
            raise InputError(
                f"the model fails on the example inputs at {plan.where(recorder.current)}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error


class _Recorder(Interpreter):
    def __init__(self, module: QuantModule, plan: QuantPlan, ops: Dictionary) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.plan, self.ops = plan, ops
        self.current = ""

    def run_node(self, n: Node) -> Any:
        self.current = n.name
        value = super().run_node(n)
        self._record_macs(n, value)
        if isinstance(value, torch.Tensor):
            self.plan.facts[n.name] = TensorFact(tuple(value.shape), value.dtype)
            if self._may_be_mask(n) and _is_unbounded(value):
                self.plan.unbounded.add(n.name)
        elif _holds_tensors(value):
            self.plan.containers.add(n.name)
        return value

    def _may_be_mask(self, node: Node) -> bool:
        """Whether a tensor is none that layers compute, may be over next to nothing, or is computed of such a one."""
        unbounded = any(source.name in self.plan.unbounded for source in node.all_input_nodes)
        return unbounded or self.ops.op_of(node) in (None, DIV)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with counting(self.fetch_attr(target)) as macs:
            value = super().call_module(target, args, kwargs)
        self.plan.macs[self.current] = sum(macs.values())
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with Counter() as counter:  # of functions that are no op of the vocabulary: the others are counted below
            value = super().call_function(target, args, kwargs)
        if counter.found:
            self.plan.macs[self.current] = sum(counter.found.values())
        return value

    def _record_macs(self, node: Node, value: Any) -> None:
        op = self.ops.op_of(node)
        if op is not None and op.weight is not None:
            args, _ = self.fetch_args_kwargs_from_env(node)
            self.plan.macs[node.name] = node_macs(op, args, value)


class _ThinRecorder(_Recorder):
    """Computes one output channel (of each group) of a conv or linear and repeats it."""

    def run_node(self, n: Node) -> Any:
        self.thin = self.ops.op_of(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.thin in (*CONVS, LINEAR):
            return _one_channel(self.thin, args)
        return super().call_function(target, args, kwargs)


def _one_channel(op: Op, args: tuple[Any, ...]) -> torch.Tensor:
    weight, bias = (args[op.index(name)] for name in ("weight", "bias"))
    groups = 1 if op is LINEAR else args[op.index("groups")]
    each = max(1, weight.shape[0] // groups)
    given = list(args)
    given[op.index("weight")] = weight[::each]
    given[op.index("bias")] = None if bias is None else bias[::each]
    channels: torch.Tensor = op.target(*given)
    return channels.repeat_interleave(each, -1 if op is LINEAR else 1 - weight.dim())


def _is_unbounded(value: torch.Tensor) -> bool:
    """Whether values are infinite, too large for a step next to which others count, or there to hide others."""
    if not value.is_floating_point() or not value.numel():
        return False
    low, high = (float(extreme) for extreme in torch.aminmax(value))
    if max(-low, high) >= _LARGEST:
        return True
    return low <= _HIDDEN and bool(((value == 0) | (value == low)).all())


def _is_channels_last(value: Any) -> bool:
    """Whether a value is an image or a weight in channels_last, and not in the order of its dimensions as well."""
    if not isinstance(value, torch.Tensor) or value.dim() not in (4, 5) or value.is_contiguous():
        return False
    return value.is_contiguous(memory_format=torch.channels_last if value.dim() == 4 else torch.channels_last_3d)


def _holds_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return any(isinstance(item, torch.Tensor) or _holds_tensors(item) for item in items)
