"""What a row is given to emit its kernel with; see :class:`fxq.op_table.Emission`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import Node

from fxq.engine import packing
from fxq.graph_module import get_attribute
from fxq.matcher import Match, other_operand
from fxq.op_table import IntWeight, Out, OutQuant
from fxq.passes.find_kernels import int_weight
from fxq.size_checks import UNCHECKED, UNCHECKED_SMALLER

if TYPE_CHECKING:
    from fxq.passes.lower import Lowering


class KernelEmission:
    """One kernel of a lowering under construction.

    ``calls`` are the nodes made, ``overwritten`` the operands that the kernel writes over.
    """

    def __init__(self, lowering: Lowering, match: Match, out: OutQuant) -> None:
        self.lowering, self.match = lowering, match
        self.nodes, self.out = match.nodes, out
        self.engine: str | None = None
        self.calls: list[Node] = []
        self.overwritten: list[Node] = []
        ends_at_zero = (out.quant_min, out.quant_max) == (out.zero_point, 255)
        self.relu = not out.saturates and match.row.relu_kernel and ends_at_zero
        # ops that share their input's qparams were given integers inside the range and return no others
        self.needs_clamp = not (out.saturates or self.relu or match.row.out is Out.SHARE)

    @property
    def _op(self) -> Any:
        return self.match.row.op

    def get(self, parameter: str) -> Any:
        value = self._op.get(self.match.root, parameter)
        return fx.map_arg(value, self.lowering.float_value)

    def input(self, parameter: str) -> Any:
        return fx.map_arg(
            self._op.get(self.match.root, parameter),
            lambda node: self.lowering.quantized(self.lowering.int_value(node, self.out)),
        )

    def plain_input(self, parameter: str) -> tuple[Node, float, int]:
        node = self.lowering.int_value(self._op.get(self.match.root, parameter), self.out)
        return self.lowering.uint8(node), *self.lowering.qparams[node]

    def shape(self, parameter: str) -> list[int]:
        fact = self.lowering.old.facts.get(self._op.get(self.match.root, parameter).name)
        return [] if fact is None else list(fact.shape)

    def tail_input(self, position: int) -> Node:
        _, producer = other_operand(self.nodes, position, self.lowering.ops)
        return self.lowering.quantized(self.lowering.int_value(producer, self.out))

    def weight(self) -> IntWeight:
        return int_weight(self.lowering.reference, self._op.get(self.match.root, self._op.weight))

    def tensor(self, parameter: str) -> torch.Tensor | None:
        node = self._op.get(self.match.root, parameter)
        if node is None:
            return None
        tensor: torch.Tensor = get_attribute(self.lowering.reference, str(node.target)).detach()
        if tensor.dtype != torch.float32:  # kernels read the memory as if it were
            raise TypeError(f"the {parameter} of '{self.match.root.name}' is {tensor.dtype}, not torch.float32")
        return tensor

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        self.calls.append(self.lowering.call(self.match.root.name, target, args, kwargs))
        return self.calls[-1]

    def plain_call(self, target: Callable[..., Any], *args: Any) -> Node:
        made = self.call(target, *args)
        self.lowering.plain[made] = None
        return made

    def constant(self, suffix: str, value: Any) -> Node:
        return self.lowering.constant(f"{self.match.root.name}_{suffix}", value)

    def overwrites(self, operand: Node) -> None:
        self.overwritten.append(operand)

    def unchecked(self, larger: bool = False) -> None:
        self.lowering.plan.properties.add(UNCHECKED if larger else UNCHECKED_SMALLER)

    def pack(self, function: Callable[..., Any], *args: Any, engines: tuple[str, ...] = ()) -> Any:
        candidates = engines or (self.lowering.backend.engine,)
        wanted = self.lowering.engines.get(self.match.root.name)
        self.engine = wanted if wanted in candidates else candidates[0]
        with packing(self.engine):
            return function(*args)
