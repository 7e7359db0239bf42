"""Run the graph once on the example inputs and record each tensor's shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Interpreter, Node

from fxq.errors import InputError
from fxq.graph_module import QuantModule
from fxq.pass_base import Pass
from fxq.plan import QuantPlan, TensorFact


class RecordFacts(Pass):
    """Shapes and dtypes, which later passes check and tables print."""

    requires = frozenset({"canonical"})
    ensures = frozenset({"facts"})

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        plan.facts.clear()
        plan.containers.clear()
        recorder = _Recorder(module, plan)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = list(self.args)
        for node in placeholders[len(values) :]:
            if node.target in self.kwargs:
                values.append(self.kwargs[str(node.target)])
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
    def __init__(self, module: QuantModule, plan: QuantPlan) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.plan = plan
        self.current = ""

    def run_node(self, n: Node) -> Any:
        self.current = n.name
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.plan.facts[n.name] = TensorFact(tuple(value.shape), value.dtype)
        elif _holds_tensors(value):
            self.plan.containers.add(n.name)
        return value


def _holds_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return any(isinstance(item, torch.Tensor) or _holds_tensors(item) for item in items)
