"""No int8 result is next to the middle of two integers, so that all kernels agree; scales that are not free stay."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import fxq
from fxq.agreement import kernel_agreement
from fxq.backends import get_backend
from fxq.graph_module import QuantModule
from fxq.ops import ADD, MUL
from fxq.qdq import is_quantize
from fxq.quant_layers import QuantLayer, quant_layers

BASE = get_backend("x86")
INTEGERS = torch.arange(-255, 256, dtype=torch.float64)


class Two(nn.Module):
    """What two layers give, joined by a function."""

    def __init__(self, join, other: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), join
        self.other = other or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.join(self.a(x), self.other(self.b(x))))


class Residuals(nn.Module):
    """A sum of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Conv2d(3, 4, 1), nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def calibrated(model: nn.Module, *shape: int, qconfig: str | fxq.QConfig = "per_channel") -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(shape or (2, 3, 12, 12), generator=generator) for _ in range(2)]
    prepared = fxq.prepare(model, data[0], backend="x86", qconfig=qconfig)
    fxq.calibrate(prepared, data, progress=False)
    return prepared


def reference_of(model: nn.Module, *shape: int, qconfig: str | fxq.QConfig = "per_channel") -> QuantModule:
    return fxq.convert_to_reference(calibrated(model, *shape, qconfig=qconfig))


def scales(reference: QuantModule, target) -> list[tuple[float, float, float]]:
    """Of the operands and the output of each call of an op."""
    found = []
    for node in reference.graph.nodes:
        if node.target is target:
            (quantize,) = node.users
            found.append((node.args[0].args[1], node.args[1].args[1], quantize.args[1]))
    return found


def ratios(layer: QuantLayer, reference: QuantModule) -> torch.Tensor:
    """What a unit of a layer's sums is in steps of its output, read from the graph itself."""
    (quantize,) = layer.node.users
    assert is_quantize(quantize)
    return layer.qparams(reference)[0].double().flatten() * layer.node.args[0].args[1] / quantize.args[1]


def observed(weight: torch.Tensor) -> torch.Tensor:
    """The scale of each output channel of a weight as its range has it."""
    return weight.detach().flatten(1).abs().amax(1) / BASE.weight.quant_max


def scales_observed(prepared: nn.Module) -> set[float]:
    """Of whole tensors."""
    return {record["scale"][0] for record in fxq.observer_records(prepared) if len(record["scale"]) == 1}


def from_half(values: torch.Tensor) -> float:
    return float((values - values.floor() - 0.5).abs().min())


def from_half_of_sums(one: float, other: float, output: float) -> float:
    return from_half(one / output * INTEGERS[:, None] + other / output * INTEGERS)


# -- sums and products


@pytest.mark.parametrize(
    ("model", "sums"),
    [(Two(operator.add), 1), (Residuals(), 3), (Two(operator.add, nn.Sigmoid()), 1)],
    ids=["two convs", "residuals", "scale of sigmoid"],
)
def test_sums_keep_away_from_halves(model, sums):
    found = scales(reference_of(randomized(model)), ADD.target)
    assert len(found) == sums
    assert all(from_half_of_sums(*line) > 1e-4 for line in found)


def test_a_tensor_added_to_itself():
    ((one, other, output),) = scales(reference_of(randomized(Two(lambda a, b: a + a))), ADD.target)
    assert one == other and from_half(2 * one / output * INTEGERS) > 1e-4


def test_products_keep_away_from_halves():
    ((one, other, output),) = scales(reference_of(randomized(Two(operator.mul))), MUL.target)
    assert from_half(one * other / output * torch.arange(65026, dtype=torch.float64)) > 1e-4


def test_a_scale_that_the_kernel_dictates_stays():
    ((_, other, _),) = scales(reference_of(randomized(Two(operator.add, nn.Sigmoid()))), ADD.target)
    assert other == 1 / 256


def test_a_sum_of_settled_scales_leaves_the_ones_before_it_alone():
    """Both operands of the second sum are operands of the first."""
    first, second = scales(reference_of(randomized(Two(lambda a, b: (a + b) * (b + a)))), ADD.target)
    assert from_half_of_sums(*first) > 1e-4
    assert first[0] == second[1] and first[1] == second[0]


def test_activation_scales_move_by_little():
    prepared = calibrated(randomized(Two(operator.add)))
    before = scales_observed(prepared)
    after = scales(fxq.convert_to_reference(prepared), ADD.target)[0]
    assert all(min(abs(scale / other - 1) for other in before) < 1.5e-3 for scale in after)
    assert len(set(after) - before) == 2


# -- layers

MODELS = {
    "convs": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), (8, 3, 24, 24)),
    "linears": (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), (64, 16)),
}


@pytest.mark.parametrize("qconfig", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_keep_away_from_halves(name, qconfig):
    model, shape = MODELS[name]
    reference = reference_of(randomized(model), *shape, qconfig=qconfig)
    layers = quant_layers(reference)
    assert len(layers) == 2
    for layer in layers:
        for ratio in ratios(layer, reference):
            products = torch.arange(1, 1 << 20, dtype=torch.float64) * ratio
            assert from_half(products[products < 256]) > 1e-4


def test_weight_scales_move_by_little_and_weights_are_rounded_with_them():
    model, shape = MODELS["convs"]
    reference = reference_of(randomized(model), *shape)
    for layer, conv in zip(quant_layers(reference), (model[0], model[2]), strict=True):
        scale, _ = layer.qparams(reference)
        assert 1e-6 < (scale.flatten() / observed(conv.weight) - 1).abs().max() < 1e-3
        assert torch.equal(layer.integers(reference), torch.round(conv.weight.detach() / scale).to(torch.int8))


def test_kernels_are_the_reference_graph_bit_for_bit():
    """Without aligned scales 27 of 4.7 million values differ here."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU6(), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 32, 1))
    reference = reference_of(randomized(model), 8, 3, 64, 64)
    lines = kernel_agreement(reference, BASE, torch.randn(8, 3, 64, 64, generator=generator))
    assert [line.share for line in lines[1:]] == [0, 0, 0]  # the first quantizes the float input


def test_a_channel_without_weights_gets_a_scale_that_holds_its_bias():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.3217
    reference = reference_of(model)
    layer = quant_layers(reference)[0]
    (quantize,) = layer.node.users
    assert ratios(layer, reference)[1] == pytest.approx(1 / 4095, rel=1e-6)
    assert layer.bias(reference)[1].item() == pytest.approx(0.3217, abs=quantize.args[1] / 4000)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 2), nn.SiLU()), nn.Sequential(nn.Conv2d(3, 4, 2))])
def test_a_layer_whose_sums_are_not_rounded_at_once_keeps_its_scales(model):
    """With silu between the sums and the integers."""
    reference = reference_of(randomized(model))
    (layer,) = quant_layers(reference)
    same = torch.equal(layer.qparams(reference)[0].flatten(), observed(model[0].weight))
    assert same == (len(model) == 2)


def test_a_coarse_unit_stays():
    """The second channel's weights are large, and what they multiply is small."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1e-3]]).reshape(2, 2, 1, 1))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 300.0]]).reshape(2, 2, 1, 1))
    reference = reference_of(model.eval(), 2, 2, 8, 8)
    layer = quant_layers(reference)[1]
    moved = layer.qparams(reference)[0].flatten() != observed(model[1].weight)
    assert ratios(layer, reference)[1] > 0.5
    assert moved.tolist() == [True, False]


def test_powers_of_two_stay():
    pow2 = fxq.QConfig(activation=BASE.activation.replace(pow2_scale=True), weight=BASE.weight.replace(pow2_scale=True))
    reference = reference_of(randomized(Two(operator.add)), qconfig=pow2)
    ((one, other, output),) = scales(reference, ADD.target)
    weights = [layer.qparams(reference)[0].flatten() for layer in quant_layers(reference)]
    assert torch.cat([torch.tensor([one, other, output]), *weights]).log2().frac().eq(0).all()


def test_trained_scales_stay():
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    prepared = fxq.prepare_qat(randomized(Two(operator.add)).train(), x, backend="x86")
    prepared(x)
    ((one, other, output),) = scales(fxq.convert_to_reference(prepared.eval()), ADD.target)
    assert {one, other, output} <= scales_observed(prepared)
