"""torch.ao's FX graph mode as the oracle: with one set of scales, zero_points and integer weights in both, the
outputs agree.

Activations are forced through torch.ao's observers, weights and biases into its converted modules. Then both run
the same kernels, so models without an average at the exit agree bit for bit.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxq
from fxq.backends import get_backend
from fxq.backends.kernels import quantized_weight
from fxq.graph_module import QuantModule, get_attribute
from fxq.models import load_model
from fxq.passes.find_kernels import int_weight, output_quant
from fxq.passes.lower import Lowering
from fxq.qdq import is_dequantize, is_quantize

WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch.ao.quantization announces its removal at every step."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.backends.quantized.engine = before


def alive(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """BatchNorm statistics that fit the random weights."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.train()
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model(torch.randn(4, *shape[1:]))
    return model.eval()


def activations(reference: QuantModule) -> dict[str, tuple[float, int]]:
    """Scale and zero_point by the name of the node before the quantize, and before the relu absorbed in it."""
    found: dict[str, tuple[float, int]] = {}
    for node in reference.graph.nodes:
        if is_quantize(node):
            out = output_quant(node)
            ends = node.name.removesuffix("_q"), node.args[0].name
            found.update(dict.fromkeys(ends, (out.scale, out.zero_point)))
    return found


def weights(reference: QuantModule, backend: str) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Quantized weight and float bias by the name of their conv or linear."""
    lowering = Lowering(reference, get_backend(backend))
    found = {}
    for node in reference.graph.nodes:
        op = lowering.ops.op_of(node)
        if op is not None and op.name in WEIGHTED and is_dequantize(node.args[1]):
            bias = None if node.args[2] is None else get_attribute(reference, node.args[2].target).detach()
            found[node.name] = quantized_weight(int_weight(lowering.reference, node.args[1])), bias
    return found


def oracle(model: nn.Module, reference: QuantModule, backend: str, example: torch.Tensor) -> fx.GraphModule:
    """torch.ao's model with the numbers of ``reference``."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.observer import MinMaxObserver
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    class Forced(MinMaxObserver):
        """Has seen everything."""

        forced: tuple[float, int] = (1.0, 0)

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            scale, zero_point = self.forced
            return torch.tensor([scale]), torch.tensor([zero_point])

    torch.backends.quantized.engine = backend
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(backend), (example,))
    prepared(example)
    forced = activations(reference)
    for node in prepared.graph.nodes:
        if node.op == "call_module" and "activation_post_process" in node.target:
            observer = Forced(dtype=torch.quint8, quant_min=0, quant_max=255)
            observer.forced = forced[known(node.args[0], forced)]
            setattr(prepared, node.target, observer)
    converted = convert_fx(prepared)
    named = weights(reference, backend)
    for node in converted.graph.nodes:
        leaf = converted.get_submodule(node.target) if node.op == "call_module" else None
        if hasattr(leaf, "set_weight_bias"):
            leaf.set_weight_bias(*named.pop(node.name))
    assert not named, f"torch.ao left {sorted(named)} in float"
    return converted


def known(node: fx.Node, forced: dict[str, tuple[float, int]]) -> str:
    """The node whose scale this one has: dropout and averages at the exit are no int8 nodes of fxq's."""
    while node.name not in forced:
        node = node.all_input_nodes[0]
    return node.name


def scale_of(lowered: QuantModule, output: torch.Tensor) -> float:
    end = next(iter(lowered.graph.output_node().all_input_nodes))
    while lowered.plan.kernels.get(end.name) is None:
        end = end.all_input_nodes[0]  # an average at the exit runs in float: its input's scale
    scale = lowered.plan.kernels[end.name].scale
    assert scale is not None
    return scale


def largest_difference(model: nn.Module, backend: str, shape: tuple[int, ...]) -> float:
    """Largest difference of the two outputs in units of the output's scale."""
    data = [torch.randn(shape) for _ in range(2)]
    prepared = fxq.prepare(model, data[0], backend=backend)
    fxq.calibrate(prepared, data, progress=False)
    reference = fxq.convert_to_reference(prepared)
    lowered = fxq.lower(reference, backend)
    converted = oracle(model, reference, backend, data[0])
    x = torch.randn(shape)
    with torch.no_grad():
        expected, actual = converted(x), lowered(x)
    assert expected.std() > 3 * scale_of(lowered, actual)  # else anything would agree
    return (expected - actual).abs().max().item() / scale_of(lowered, actual)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.a, self.bn, self.relu = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = self.relu(x + self.bn(self.a(x)))
        return self.fc(torch.flatten(x, 1))


class Joined(nn.Module):
    """Branches of different ranges joined by cat, average pools, a tensor product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
        x = self.c(F.avg_pool2d(x, 2))
        return operator.mul(x, x)


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24),
        nn.ReLU(), nn.Conv2d(24, 8, 1, groups=2), nn.Flatten(), nn.Linear(8 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


EXACT = {
    "chain": (chain, (2, 3, 16, 16)),
    "residual": (Residual, (2, 3, 16, 16)),
    "joined": (Joined, (2, 3, 16, 16)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, 2)), (2, 4, 20)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)), (2, 2, 6, 6, 6)),
}


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", EXACT)
def test_same_graph_same_bits(name: str, backend: str) -> None:
    make, shape = EXACT[name]
    assert largest_difference(alive(make(), shape), backend, shape) == 0


@pytest.mark.parametrize(
    ("name", "backend"), [("resnet18", "x86"), ("resnet18", "fbgemm"), ("resnet18", "qnnpack"), ("googlenet", "x86")]
)
def test_torchvision_same_bits(name: str, backend: str) -> None:
    shape = (2, 3, 64, 64)
    assert largest_difference(alive(load_model(name), shape), backend, shape) == 0


def test_an_average_at_the_exit_is_not_rounded() -> None:
    """fxq's runs in float, torch.ao's rounds to integers: up to half of one apart."""
    shape = (2, 3, 64, 64)
    difference = largest_difference(alive(load_model("squeezenet1_1"), shape), "x86", shape)
    assert 0 < difference < 0.51


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With qparams of its own torch.ao's outputs are further away."""
    shape = (2, 3, 16, 16)
    real = activations

    def wider(reference: QuantModule) -> dict[str, Any]:
        return {name: (scale * 1.3, zero_point) for name, (scale, zero_point) in real(reference).items()}

    monkeypatch.setitem(globals(), "activations", wider)
    assert largest_difference(alive(chain(), shape), "x86", shape) > 1
