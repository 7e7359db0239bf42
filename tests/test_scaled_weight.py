"""A weight that is computed when it is read equals the product that it stands for, and nothing is ever written."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.copying import give_back
from fxq.scaled_weight import ScaledWeight


def example(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    factor = torch.randn(shape[0], dtype=torch.float64, generator=generator)
    return weight, factor, (weight.double() * factor.reshape(-1, *[1] * (len(shape) - 1))).float()


@pytest.mark.parametrize("shape", [(3, 2), (6, 2, 3, 3), (600, 50, 3, 3), (2, 300_000), (0, 3)])
def test_it_is_the_product_rounded_once(shape: tuple[int, ...]) -> None:
    weight, factor, expected = example(*shape)
    before = weight.clone()
    scaled = ScaledWeight(weight, factor)
    assert torch.equal(scaled.detach(), expected) and torch.equal(weight, before)
    assert type(scaled.detach()) is torch.Tensor and scaled.shape == weight.shape and scaled.dtype == torch.float32


def test_other_memory_formats_and_dtypes() -> None:
    weight, factor, _ = example(600, 50, 3, 3)
    for other in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1)[:, ::2].transpose(0, 1)):
        expected = (other.double() * factor.reshape(-1, 1, 1, 1)[: len(other)]).float()
        assert torch.equal(ScaledWeight(other, factor[: len(other)]).value(), expected)
    half = weight.half()
    assert torch.equal(ScaledWeight(half, factor).value(), (half.double() * factor.reshape(-1, 1, 1, 1)).float())


def test_a_layer_runs_with_it() -> None:
    weight, factor, expected = example(6, 2, 3, 3)
    x = torch.ones(1, 2, 5, 5)
    assert torch.equal(F.conv2d(x, ScaledWeight(weight, factor)), F.conv2d(x, expected))


def test_copies_are_plain_parameters() -> None:
    weight, factor, expected = example(6, 2)
    module = nn.Module()
    module.register_buffer("a", ScaledWeight(weight, factor))
    module.b = module.a
    for made in (copy.deepcopy(module), module):
        give_back([made], nn.Linear(1, 1))
        assert type(made.a) is nn.Parameter and torch.equal(made.a, expected)
    assert "6, 2" in repr(ScaledWeight(weight, factor))
