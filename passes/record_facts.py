"""Run the graph once on the example inputs and record each tensor's shape and dtype, and each layer's work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxq.copying import copy_inputs
from fxq.errors import InputError
from fxq.graph_module import QuantModule
from fxq.macs import Counter, counting, node_macs
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.plan import QuantPlan, TensorFact


class RecordFacts(Pass):
    """Shapes and dtypes, which later passes check and tables print."""

    requires = frozenset({"canonical"})
    ensures = frozenset({"facts"})

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], ops: Dictionary) -> None:
        self.args, self.kwargs, self.ops = args, kwargs, ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        plan.facts.clear()
        plan.containers.clear()
        plan.macs.clear()
        recorder = _Recorder(module, plan, self.ops)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        args, kwargs = copy_inputs((self.args, self.kwargs))
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
        return len(plan.facts)


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
        elif _holds_tensors(value):
            self.plan.containers.add(n.name)
        return value

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        # Lists of a graph are immutable, but functions may change the lists they are given, as the compiled graph's.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

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


def _plain(value: Any) -> Any:
    """The same with ordinary lists and dicts; a named tuple or a dict with attributes keeps the type of its own."""
    if isinstance(value, immutable_list) or type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if isinstance(value, immutable_dict) or type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return value


def _holds_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return any(isinstance(item, torch.Tensor) or _holds_tensors(item) for item in items)
