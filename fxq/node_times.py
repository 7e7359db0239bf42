"""How long each node of a graph takes."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxq.engine import running
from fxq.graph_module import QuantModule
from fxq.interpreter import Interpreter
from fxq.partition import Inputs


class NodeTime(NamedTuple):
    """The shortest time of a node in seconds, and the multiply-accumulates it did in it."""

    seconds: float
    macs: int


def node_times(modules: list[QuantModule], inputs: Inputs, runs: int) -> list[dict[str, NodeTime]]:
    """The time of each call node of lowered modules that take the same inputs, by node name.

    Each module runs as a whole, so that every node finds the caches as the nodes before it leave them, and the modules
    take turns, so that a busy moment of the machine meets all of them. The minimum of all runs counts: anything that
    is added to it is something else's.

    Args:
        inputs: positional and keyword inputs.
        runs: of each module, after one that warms up.
    """
    watches = [_Stopwatch(module) for module in modules]
    with torch.no_grad(), running():
        for run in range(runs + 1):
            for watch in watches:
                watch.run_call(*inputs)
                if run == 0:
                    watch.seconds.clear()
    return [watch.times() for watch in watches]


class _Stopwatch(Interpreter):
    def __init__(self, module: QuantModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.plan = module.plan
        self.seconds: dict[str, float] = {}
        self.sizes: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        if not n.op.startswith("call_"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = getattr(self, n.op)
        start = time.perf_counter()
        value = call(n.target, args, kwargs)
        elapsed = time.perf_counter() - start
        self.seconds[n.name] = min(elapsed, self.seconds.get(n.name, math.inf))
        if isinstance(value, torch.Tensor):
            self.sizes[n.name] = value.numel()
        return value

    def times(self) -> dict[str, NodeTime]:
        return {name: NodeTime(seconds, self._macs(name)) for name, seconds in self.seconds.items()}

    def _macs(self, name: str) -> int:
        """Those recorded with the example inputs, for the size of the output that was seen."""
        fact, macs = self.plan.facts.get(name), self.plan.macs.get(name, 0)
        if fact is None or not macs or name not in self.sizes:
            return macs
        return macs * self.sizes[name] // max(math.prod(fact.shape), 1)
