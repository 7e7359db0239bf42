"""Biases become whole numbers of their layer's sums where that grid is fine; nothing else changes."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import run
from torch import nn

import fxq
from fxq.graph_module import get_attribute
from fxq.passes.round_biases import RoundBiases
from fxq.quant_layers import quant_layers


def reference_of(model: nn.Module, *shape: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    prepared = fxq.prepare(model.eval(), torch.randn(shape, generator=generator), backend="x86")
    fxq.calibrate(prepared, [torch.randn(shape, generator=generator) for _ in range(2)], progress=False)
    return fxq.convert_to_reference(prepared)


def units(layer, reference) -> torch.Tensor:
    """Biases in units of input scale times weight scale, read from the graph itself."""
    _, input_scale, _ = layer.node.args[0].args
    weight_scale = get_attribute(reference, layer.node.args[1].args[1].target)
    return layer.bias(reference).double() / (weight_scale.double() * input_scale)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), (2, 3, 12, 12)),
        (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), (8, 16)),
    ],
    ids=["convs", "linears"],
)
def test_biases_are_whole_numbers(model, shape):
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = reference_of(model, *shape)
    layers = quant_layers(reference)
    assert len(layers) == 2
    for layer in layers:
        found = units(layer, reference)
        assert found.abs().max() > 10
        # a bias of float32 is off a whole number by its own rounding
        assert (found - found.round()).abs().max() <= found.abs().max() * 2**-23
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_the_grid_is_coarse_the_bias_stays():
    """The second channel's weights are large, and what they multiply is small."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1e-3]]).reshape(2, 2, 1, 1))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 300.0]]).reshape(2, 2, 1, 1))
        model[1].bias.copy_(torch.tensor([0.3217, 0.3217]))
    reference = reference_of(model, 2, 2, 8, 8)
    layer = quant_layers(reference)[1]
    first, second = (layer.bias(reference) == model[1].bias.detach()).tolist()
    assert second and not first


def test_a_layer_called_twice_keeps_one_bias_if_its_inputs_share_a_scale():
    class Twice(nn.Module):
        def __init__(self, other: bool) -> None:
            super().__init__()
            self.a, self.b, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + self.a(self.b(x) if self.other else x)

    for other, biases in ((False, 2), (True, 4)):
        reference = reference_of(Twice(other), 2, 3, 8, 8)
        assert sum(".bias" in name for name in reference.state_dict()) == biases


def test_a_shared_bias_gets_a_path_for_each_layer():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Shared()
    bias = model.a.bias.detach().clone()
    reference = reference_of(model, 4, 8)
    first, second = quant_layers(reference)
    assert not torch.equal(first.bias(reference), second.bias(reference))
    for layer in (first, second):
        found = units(layer, reference)
        torch.testing.assert_close(found, found.round(), rtol=2**-23, atol=1e-6)
    assert torch.equal(model.a.bias, bias)


def test_twice_is_once():
    reference = reference_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), 2, 3, 12, 12)
    assert run(RoundBiases(), reference) == 0


def test_layers_of_float_inputs_keep_their_biases():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1))
    reference = reference_of(model, 2, 3, 8, 8)
    transposed = quant_layers(reference)[0]
    assert torch.equal(transposed.bias(reference), model[0].bias.detach())
