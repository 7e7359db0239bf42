"""Lowering: what is left between int8 kernels, at entries and exits, and that nothing else changes."""

from __future__ import annotations

import copy
import operator
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Two, conv
from torch import nn

import fxq
from fxq.agreement import kernel_agreement
from fxq.backends import BACKENDS, get_backend
from fxq.graph_module import QuantModule
from fxq.numerics import sqnr
from fxq.plan import Status

ROWS = pytest.mark.parametrize("backend", BACKENDS)
X = torch.linspace(-2, 2, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12).sin() * torch.linspace(0.2, 1, 12)


class Fn(nn.Module):
    """Two convs and a function of them and the input."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("constant", torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self, x)


def reference_of(model: nn.Module, backend: str = "x86", example: torch.Tensor = X) -> QuantModule:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    prepared = fxq.prepare(model.eval(), example, backend=backend)
    fxq.calibrate(prepared, [example, -example], progress=False)
    return fxq.convert_to_reference(prepared)


def targets(module: QuantModule) -> Counter[str]:
    """How often each function is called, under its bare name."""
    calls = (node.target for node in module.graph.nodes if node.op == "call_function")
    return Counter(str(getattr(target, "__name__", target)).removesuffix(".default") for target in calls)


def chain(m: Fn, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x).relu()
    y = F.max_pool2d(m.b(y) + y, 2)
    return (torch.cat([y, y], 1).chunk(2, 1)[0] * m.b(y)).flatten(1)


@ROWS
def test_one_quantize_one_dequantize(backend: str) -> None:
    lowered = fxq.lower(reference_of(Fn(chain), backend), backend)
    found = targets(lowered)
    assert found["quantize_per_tensor"] == 1 and found["dequantize"] == 1
    assert all(decision.status is not Status.FLOAT for decision in lowered.plan.decisions.values())


def test_one_quantize_at_each_true_entry_and_one_dequantize_at_each_true_exit() -> None:
    def function(m: Fn, x: torch.Tensor) -> object:
        y = m.a(x)
        z = F.silu(y)  # leaves int8 once, comes back once for two readers
        return m.b(z), m.b(z) + y, y, F.mish(y)

    lowered = fxq.lower(reference_of(Fn(function)), "x86")
    found = targets(lowered)
    assert found["quantize_per_tensor"] == 2
    assert found["dequantize"] == 4  # y for silu and mish, y as it is returned, and two results
    x = torch.randn(2, 3, 12, 12)
    for expected, actual in zip(reference_of(Fn(function))(x), lowered(x), strict=True):
        assert torch.allclose(expected, actual, atol=0.1 * expected.abs().max().item())


def test_no_conversion_between_int8_kernels() -> None:
    lowered = fxq.lower(reference_of(Fn(chain)), "x86")
    for node in lowered.graph.nodes:
        if node.target is torch.Tensor.dequantize:
            assert all(user.op == "output" for user in node.users)


def test_reading_a_shape_keeps_no_dequantize() -> None:
    def function(m: Fn, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        n, c, h, w = y.size(0), y.shape[1], y.shape[-2], y.size()[3]
        y = F.interpolate(m.b(F.max_pool2d(y, 2)), size=(h, w))
        return m.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w))

    lowered = fxq.lower(reference_of(Fn(function)), "x86")
    assert targets(lowered)["dequantize"] == 1
    assert lowered(torch.randn(3, 3, 20, 10)).shape == (3, 8, 20, 10)


def test_constants_are_folded() -> None:
    def function(m: Fn, x: torch.Tensor) -> torch.Tensor:
        return m.b(m.a(x) * m.constant)

    lowered = fxq.lower(reference_of(Fn(function)), "x86")
    assert targets(lowered)["quantize_per_tensor"] == 1
    constants = [getattr(lowered, n.target) for n in lowered.graph.nodes if n.op == "get_attr" and "." not in n.target]
    assert any(isinstance(value, torch.Tensor) and value.is_quantized for value in constants)
    lines = kernel_agreement(reference_of(Fn(function)), get_backend("x86"), torch.randn(2, 3, 12, 12))
    assert max(line.max_lsb for line in lines) <= 1


@ROWS
def test_a_copy_is_equal_bit_for_bit(backend: str) -> None:
    lowered = fxq.lower(reference_of(Fn(chain), backend), backend)
    torch.backends.quantized.engine, before = "qnnpack", torch.backends.quantized.engine
    try:
        twin = copy.deepcopy(lowered)
    finally:
        torch.backends.quantized.engine = before
    x = torch.randn(3, 3, 12, 12)
    assert torch.equal(twin(x), lowered(x))
    assert twin.plan is not lowered.plan and twin.plan.kernels == lowered.plan.kernels
    del lowered
    assert twin(x).shape == (3, 8 * 36)


def test_the_reference_is_unchanged() -> None:
    reference = reference_of(Fn(chain))
    code, plan = reference.code, copy.deepcopy(reference.plan)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    expected = reference(X)
    for backend in BACKENDS:
        fxq.lower(reference, backend)(X)
    assert reference.code == code
    assert (reference.plan.decisions, reference.plan.specs, reference.plan.stage) == (
        plan.decisions, plan.specs, plan.stage,
    )  # fmt: skip
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in reference.state_dict().items())
    assert torch.equal(reference(X), expected)


@pytest.mark.parametrize("made_for", BACKENDS)
@ROWS
def test_one_reference_for_every_backend(made_for: str, backend: str) -> None:
    reference = reference_of(Fn(chain), made_for)
    lowered = fxq.lower(reference, backend)
    lines = kernel_agreement(reference, get_backend(backend), X)
    assert max(line.max_lsb for line in lines) <= 1
    reasons = {name: d.reason.code for name, d in lowered.plan.decisions.items() if d.status is Status.FLOAT}
    if made_for == "onednn" and backend != "onednn":  # its conv and add are one kernel
        assert set(reasons.values()) == {"other-backend"} and len(reasons) == 2
    else:
        assert reasons == {}


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.a(x))


def test_per_channel_transposed_weights_run_on_qnnpack_only() -> None:
    reference = reference_of(Up(), "qnnpack")
    assert "quantized::conv_transpose2d [qnnpack]" in kernels(fxq.lower(reference, "qnnpack"))
    for backend in ("x86", "fbgemm", "onednn"):
        lowered = fxq.lower(reference, backend)
        reason = lowered.plan.decisions["up"].reason
        assert reason is not None and reason.text == "the backend's kernel takes per-tensor weights only"
        assert torch.allclose(lowered(X), reference(X), atol=0.1)
        assert "quantized::conv_transpose2d [fbgemm]" in kernels(fxq.lower(reference_of(Up(), backend), backend))


def kernels(lowered: QuantModule) -> set[str]:
    return {kernel.name for kernel in lowered.plan.kernels.values()}


def test_every_node_is_described() -> None:
    lowered = fxq.lower(reference_of(Fn(chain)), "x86")
    calls = {node.name for node in lowered.graph.nodes if node.op.startswith("call_")}
    assert lowered.plan.decisions.keys() == calls
    assert lowered.plan.kernels.keys() == calls - {
        name for name, decision in lowered.plan.decisions.items() if decision.status is Status.SHAPE_ONLY
    }


SILENT = """
import warnings
warnings.simplefilter("error")
import torch, fxq
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
fxq.quantize(model, [torch.randn(2, 3, 8, 8)], backend="{backend}", progress=False)(torch.randn(1, 3, 8, 8))
"""


@ROWS
def test_no_warnings(backend: str) -> None:
    done = subprocess.run([sys.executable, "-c", SILENT.format(backend=backend)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("op", [operator.add, operator.mul])
def test_the_first_operand_of_a_broadcasting_kernel_has_its_output_s_shape(op: Any) -> None:
    """torch's kernels make room for an output of that shape, and warn when they have to make more."""
    torch.manual_seed(0)
    model = Two(lambda m, x, y: op(m.a(x), m.b(y)), a=conv(), b=conv())
    small, large = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8)
    qmodel = fxq.quantize(model, [(small, large)])
    (node,) = [node for node in qmodel.graph.nodes if node.name == op.__name__]
    assert node.args[0].name == "b"
    with torch.no_grad():
        assert sqnr(model(small, large), qmodel(small, large)) > 25
