"""Compare a lowered model with its reference graph kernel by kernel.

Both graphs run on the same inputs, and after each quantize node the reference continues with the lowered
model's integers. So every kernel is judged on the integers it was given, and rounding does not add up on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxq.engine import running
from fxq.graph_module import QuantModule
from fxq.interpreter import Interpreter
from fxq.op_table import Backend
from fxq.passes.lower import Lowering
from fxq.qdq import is_quantize


class Agreement(NamedTuple):
    """How far a kernel is from the reference graph."""

    node: str  # in the lowered graph
    kernel: str
    max_lsb: int  # largest difference in units of the output's scale
    share: float  # part of the values that differ at all
    from_tie: float  # where they do, how far the real value is from the middle of two integers at most, in that unit


def kernel_agreement(
    reference: QuantModule, backend: Backend, *inputs: Any, engines: Mapping[str, str] | None = None
) -> list[Agreement]:
    """One line for each int8 value of a reference graph lowered for ``backend``.

    Args:
        reference: from ``fxq.convert_to_reference``; unchanged.
        inputs: what the model is called with.
        engines: as for :func:`fxq.passes.lower.lower`.

    Example:
        >>> max(line.max_lsb for line in kernel_agreement(reference, get_backend("x86"), x))  # doctest: +SKIP
        1
    """
    lowering = Lowering(reference, backend, engines or {})
    lowered = lowering.run()
    recorder = _Recorder(lowered)
    with torch.no_grad(), running():
        recorder.run(*inputs)
        judge = _Judge(lowering, recorder.values)
        judge.run(*inputs)
    kernels = lowered.plan.kernels
    return [
        Agreement(node, kernels[node].name if node in kernels else "", *numbers)
        for node, numbers in judge.found.items()
    ]


class _Recorder(Interpreter):
    """Keeps the integers of every quantized tensor."""

    def __init__(self, module: QuantModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_quantized:
            self.values[n.name] = value.int_repr()
        elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and not value.is_mkldnn:
            self.values[n.name] = value.clone()
        return value


class _Judge(Interpreter):
    """Runs the reference graph, each quantize node replaced by the lowered model's integers after comparing."""

    def __init__(self, lowering: Lowering, values: dict[str, torch.Tensor]) -> None:
        super().__init__(lowering.reference)
        self.extra_traceback = False
        self.lowering, self.values = lowering, values
        self.found: dict[str, tuple[int, float, float]] = {}

    def run_node(self, n: Node) -> Any:
        expected = super().run_node(n)
        if not is_quantize(n):
            return expected
        twin = self.lowering.ints[n].name
        actual = self.values[twin]
        if n.args[5] == torch.int8:
            actual = (actual.to(torch.int16) - 128).to(torch.int8)
        assert actual.shape == expected.shape, f"{twin}: {list(actual.shape)}, expected {list(expected.shape)}"
        difference = (actual.int() - expected.int()).abs()
        differ = difference > 0
        share = differ.count_nonzero().item() / max(difference.numel(), 1)
        steps = self.env[n.args[0]][differ] / n.args[1]  # type: ignore[index]
        from_tie = (steps - steps.floor() - 0.5).abs().max().item() if share else 0.0
        self.found[twin] = (int(difference.max()) if share else 0, share, from_tie)
        return actual
