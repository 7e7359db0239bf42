"""Fake quantization: torch's numbers and gradients, ranges that follow training only, state in float tensors."""

from __future__ import annotations

import copy

import pytest
import torch

from fxq.errors import CalibrationError, ConfigError
from fxq.fake_quantize import FakeQuantize, calibrating, fake_quantize
from fxq.numerics import dequantize, quantize
from fxq.spec import QuantSpec

U8 = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, observer="moving_average")
S8 = QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True, observer="minmax")
SPECS = {
    "affine": U8,
    "symmetric": S8,
    "per channel": S8.replace(ch_axis=1),
    "four bits": S8.replace(quant_min=-8, quant_max=7, ch_axis=0),
    "power of two": U8.replace(pow2_scale=True),
}


def observed(spec: QuantSpec, x: torch.Tensor) -> FakeQuantize:
    fake = FakeQuantize(spec, 1 if spec.ch_axis is None else x.shape[spec.ch_axis])
    fake.observe(x)
    return fake


@pytest.mark.parametrize("name", SPECS)
def test_forward_and_gradient_are_torchs(name):
    spec = SPECS[name]
    fake = observed(spec, torch.randn(6, 5, 4))
    x = (3 * torch.randn(6, 5, 4)).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    seed = torch.randn(6, 5, 4)
    fake.quantize(x).backward(seed)
    qparams = fake.qparams()
    if spec.ch_axis is None:
        expected = torch.fake_quantize_per_tensor_affine(twin, *qparams.item(), spec.quant_min, spec.quant_max)
    else:
        expected = torch.fake_quantize_per_channel_affine(
            twin, qparams.scale, qparams.zero_point, spec.ch_axis, spec.quant_min, spec.quant_max
        )
    expected.backward(seed)
    assert torch.equal(fake.quantize(x), expected) and torch.equal(x.grad, twin.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()  # some values saturate
    assert torch.equal(expected, dequantize(quantize(twin, qparams, spec), qparams, spec.ch_axis))


def test_a_moving_average_follows_the_batches():
    fake = FakeQuantize(U8)
    for _ in range(3):
        fake(torch.tensor([-1.0, 2.0]))
    fake(torch.tensor([-3.0, 2.0]))
    assert fake.low.item() == pytest.approx(-1.02) and fake.high.item() == pytest.approx(2.0)
    assert fake.batches == 4
    assert fake.scale.item() == pytest.approx(3.02 / 255)


def test_minmax_covers_all_batches_and_a_weight_its_present_values():
    activation, weight = FakeQuantize(S8), FakeQuantize(S8, weight=True)
    for fake in (activation, weight):
        fake(torch.tensor([-2.0, 1.0]))
        fake(torch.tensor([-1.0, 3.0]))
    assert (activation.low.item(), activation.high.item()) == (-2.0, 3.0)
    assert (weight.low.item(), weight.high.item()) == (-1.0, 3.0)


def test_only_training_and_calibration_observe():
    fake = FakeQuantize(U8).eval()
    x = torch.rand(5)
    assert fake(x) is x and not fake.has_data  # nothing is known yet
    with calibrating(fake):
        assert fake(x) is x
    assert fake.batches == 1 and not torch.equal(fake(x), x)
    fake(100 * x)
    assert fake.batches == 1
    fake.train()(x)
    assert fake.batches == 2
    fake.observing = False
    fake(x)
    assert fake.batches == 2


def test_calibrating_puts_modes_and_switches_back():
    model = torch.nn.Sequential(FakeQuantize(U8), torch.nn.Dropout())
    model[0].quantizing = False
    with pytest.raises(RuntimeError), calibrating(model):
        assert not model[1].training
        raise RuntimeError
    assert model[1].training and not model[0].quantizing and not model[0].calibrating


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value):
    """Rounding would turn NaN into a number, and hide it."""
    fake = FakeQuantize(U8)
    fake.where = "node 'relu'"
    with pytest.raises(CalibrationError, match="node 'relu'"):
        fake(torch.tensor([1.0, value]))


def test_an_empty_batch_changes_nothing():
    fake = FakeQuantize(U8)
    assert fake(torch.empty(0, 3)).shape == (0, 3) and not fake.has_data


def test_a_fixed_grid_observes_nothing():
    fake = FakeQuantize(U8, fixed=(1 / 256, 0))
    assert fake(torch.tensor([0.5, 9.0])).tolist() == [0.5, 255 / 256]
    assert fake.qparams().item() == (1 / 256, 0) and fake.batches == 1


def test_an_observer_that_needs_all_data_is_refused():
    with pytest.raises(ConfigError, match=r"'mse' cannot follow.*moving_average"):
        FakeQuantize(U8.replace(observer="mse"))
    with pytest.raises(CalibrationError, match="seen no data"):
        FakeQuantize(U8).qparams()
    with pytest.raises(CalibrationError, match="cannot be merged"):
        FakeQuantize(U8).merge(FakeQuantize(U8))


def test_state_travels_in_float_tensors():
    fake = observed(U8, torch.tensor([-1.0, 3.0]))
    fake.observing = False
    state = fake.state_dict()
    assert all(value.is_floating_point() for value in state.values())  # an average of models takes them as they are
    other = FakeQuantize(U8)
    other.load_state_dict(state)
    assert other.qparams().equals(fake.qparams()) and not other.observing
    average = torch.optim.swa_utils.AveragedModel(fake, use_buffers=True)
    for _ in range(3):
        average.update_parameters(fake)
    assert average.module.qparams().equals(fake.qparams())
    assert copy.deepcopy(fake).qparams().equals(fake.qparams())


def test_other_precisions():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        fake = FakeQuantize(S8.replace(ch_axis=0), 3).to(dtype)
        x = torch.randn(3, 4).to(dtype).requires_grad_()
        out = fake(x)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == dtype
        step = x.detach().float().abs().amax(1, keepdim=True) / 127
        assert bool(((out - x).abs().float() < 2 * step).all())


def test_another_tensor_on_the_same_grid():
    fake = observed(U8, torch.tensor([0.0, 255.0]))
    assert fake_quantize(torch.tensor([0.4, 0.6]), fake).tolist() == [0.0, 1.0]
    fake.quantizing = False
    assert fake_quantize(torch.tensor([0.25]), fake).tolist() == [0.25]
    assert fake.batches == 1
