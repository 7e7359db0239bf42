"""The contract of extension: a new op on a new backend is one row, a new pass is one class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from models_for_tests import Lambda, conv, quiet

import fxq
from fxq.backends import get_backend
from fxq.errors import BackendError
from fxq.op_table import CLAMPED, Fixed, OpRow, Out, Tail, Weights
from fxq.ops import CONV2D, RELU, Op
from fxq.plan import Status

X = torch.randn(2, 3, 8, 8)


def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def int8_triple(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return torch.quantize_per_tensor(triple(x.dequantize()), scale, zero_point, torch.quint8)


torch.fx.wrap("triple")
TRIPLE = Op("triple", triple, "input")


@dataclass(frozen=True)
class EmitTriple:
    kernel: str = "toy::triple"

    def __call__(self, emission):
        return emission.call(int8_triple, emission.input("input"), emission.out.scale, emission.out.zero_point)


ROW = OpRow("triple", TRIPLE, EmitTriple(), tail=(CLAMPED,))


def toy():
    """x86 with one row more: all that the new op needs."""
    table = get_backend("x86")
    return dataclasses.replace(table, name="toy", rows=(*table.rows, ROW))


def test_one_row_is_enough():
    model = Lambda(lambda m, x: m.b(torch.relu(triple(m.a(x)))), a=conv(), b=conv(4, 4))
    prepared = fxq.prepare(model, X, backend=toy())
    prepared(X)
    groups = prepared.plan.groups
    observed = {slot.node for slot, group in groups.items() if group in prepared.plan.observers and not slot.path}
    assert "relu" in observed  # observed after what is fused into it
    assert "triple" in str(fxq.observer_table(prepared)) or "relu" in str(fxq.observer_table(prepared))
    reference, lowered = fxq.convert_to_reference(prepared), quiet(fxq.convert, prepared)
    decision, kernel = lowered.plan.decisions["triple"], lowered.plan.kernels["triple"]
    assert decision.status is Status.QUANTIZED and decision.row == "triple"
    assert kernel.name.startswith("toy::triple") and kernel.fused == ("relu",)
    assert "toy::triple" in str(fxq.graph_table(lowered))
    assert "triple" in str(fxq.fusion_table(lowered))
    with torch.no_grad():
        torch.testing.assert_close(lowered(X), reference(X), atol=2 * lowered.plan.kernels["b"].scale, rtol=0)


def test_without_the_row_it_is_float_with_a_reason():
    model = Lambda(lambda m, x: m.b(triple(m.a(x))), a=conv(), b=conv(4, 4))
    lowered = quiet(fxq.quantize, model, [X])
    assert lowered.plan.decisions["triple"].status is Status.FLOAT
    assert lowered.plan.decisions["triple"].reason.code == "unknown-op"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (OpRow("triple", TRIPLE, EmitTriple(), weight=Weights.TENSOR), "triple.*weight"),
        (OpRow("conv", CONV2D, EmitTriple()), "conv2d.*weight"),
        (dataclasses.replace(ROW, out=Out.SHARE), "tail"),
        (dataclasses.replace(ROW, out=Fixed(1.0, 0)), "tail"),
        (OpRow("triple", TRIPLE, EmitTriple(), mixed_inputs=True), "mixed_inputs"),
        (OpRow("relu", RELU, EmitTriple()), "relu.*more than once"),
    ],
    ids=["weight", "no-weight", "shared-tail", "fixed-tail", "mixed", "name"],
)
def test_a_row_that_contradicts_itself_is_refused(row, message):
    table = get_backend("x86")
    with pytest.raises(BackendError, match=message):
        dataclasses.replace(table, rows=(*table.rows, row))


def test_a_required_step_makes_a_chain():
    row = OpRow("relu_triple", TRIPLE, EmitTriple(), tail=(Tail((RELU,)),))
    table = dataclasses.replace(toy(), rows=(*toy().rows, row))
    model = Lambda(lambda m, x: m.b(torch.relu(triple(m.a(x)))), a=conv(), b=conv(4, 4))
    rows = {r.nodes[0]: r.row for r in fxq.prepare(model, X, backend=table).plan.regions}
    assert rows["triple"] == "relu_triple"
