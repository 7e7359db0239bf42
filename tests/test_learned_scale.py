"""Learned scales: torch's own kernel, the papers' formulas, and that training them lowers the error."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import same

from fxq.fake_quantize import FakeQuantize
from fxq.learned_scale import fake_quantize_learned, scale_of_step
from fxq.spec import QuantSpec

U8 = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, observer="lsq")
S4 = QuantSpec(dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True, observer="lsq")


@pytest.mark.parametrize(("spec", "zero_point"), [(S4, 0.0), (U8, 100.0)])
def test_gradients_are_those_of_torchs_kernel(spec, zero_point):
    x, scale = torch.randn(8, 16).requires_grad_(), torch.tensor([0.2]).requires_grad_()
    twin, twin_scale = (tensor.detach().clone().requires_grad_() for tensor in (x, scale))
    zero = torch.tensor([zero_point])
    factor = (16 * spec.quant_max) ** -0.5  # elements of one sample
    expected = torch._fake_quantize_learnable_per_tensor_affine(
        twin, twin_scale, zero, spec.quant_min, spec.quant_max, factor
    )
    actual = fake_quantize_learned(x, scale, zero, spec, frozen=False)
    seed = torch.randn_like(x)
    actual.backward(seed)
    expected.backward(seed)
    same(actual, expected, 1e-6)
    same(x.grad, twin.grad, 0)
    same(scale.grad, twin_scale.grad, 1e-4)


def test_gradients_of_channels_are_those_of_torchs_kernel():
    spec = S4.replace(ch_axis=1)
    x, scale = torch.randn(8, 5, 3).requires_grad_(), (torch.rand(5) + 0.1).requires_grad_()
    twin, twin_scale = (tensor.detach().clone().requires_grad_() for tensor in (x, scale))
    zero = torch.zeros(5)
    factor = (24 * 7) ** -0.5
    expected = torch._fake_quantize_learnable_per_channel_affine(twin, twin_scale, zero, 1, -8, 7, factor)
    fake_quantize_learned(x, scale, zero, spec, frozen=False).square().sum().backward()
    expected.square().sum().backward()
    same(x.grad, twin.grad, 1e-5)
    same(scale.grad, twin_scale.grad, 1e-4)


def test_a_frozen_scale_has_a_gradient_of_zero():
    """None would make DistributedDataParallel wait for it."""
    fake = FakeQuantize(S4)
    fake(torch.randn(9))
    fake.observing = False
    fake(torch.randn(9)).sum().backward()
    assert fake.step.grad.tolist() == [0.0]


def test_power_of_two_scales_get_the_gradient_of_their_logarithm():
    spec = S4.replace(pow2_scale=True)
    step = torch.tensor([-2.4]).requires_grad_()
    scale = scale_of_step(step, spec)
    assert scale.item() == 0.25
    scale.backward()
    assert step.grad.item() == pytest.approx(0.25 * 0.6931472)


@pytest.mark.parametrize("pow2", [False, True])
def test_learning_finds_a_better_scale_than_the_extremes(pow2):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(2000), torch.tensor([40.0])])
    spec = S4.replace(pow2_scale=pow2)
    fake = FakeQuantize(spec)
    fake(x)
    assert fake.qparams().item()[0] == (8.0 if pow2 else pytest.approx(40 / 7))

    def error() -> torch.Tensor:
        return (fake(x) - x).abs().mean()

    before = error().item()
    optimizer = torch.optim.Adam(fake.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.6 * before
    scale = fake.qparams().scale
    assert scale > 0 and (not pow2 or scale.log2().frac() == 0)


def test_a_scale_stays_positive():
    assert scale_of_step(torch.tensor([-0.5, 0.0]), S4).min() > 0
    assert scale_of_step(torch.tensor([-0.5, 0.0]), S4)[0] == 0.5


def test_first_batch_initialises_and_later_ones_do_not():
    fake = FakeQuantize(U8)
    fake(torch.tensor([-1.0, 4.1]))
    first = fake.qparams()
    fake(torch.tensor([-9.0, 9.0]))
    assert fake.qparams().equals(first) and fake.batches == 1
    assert first.item() == (pytest.approx(5.1 / 255), 50)
    low, high = fake.range()
    assert low.item() == pytest.approx(-1.0) and high.item() == pytest.approx(4.1)
