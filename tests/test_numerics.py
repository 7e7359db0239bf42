"""The arithmetic of quantization: invariants of every qparams, and torch's own kernels as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.errors import ConfigError
from fxq.numerics import MIN_SCALE, choose_qparams, dequantize, quantize, sqnr
from fxq.spec import QParams, QuantSpec

UINT8 = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)
SPECS = [
    UINT8,
    UINT8.replace(quant_max=127),
    UINT8.replace(quant_max=15),
    UINT8.replace(symmetric=True),
    UINT8.replace(dtype=torch.int8, quant_min=-128, quant_max=127),
    UINT8.replace(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True),
    UINT8.replace(dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True),
]
SPECS += [spec.replace(pow2_scale=True) for spec in SPECS]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=str)
quick = settings(deadline=None, max_examples=50)
reals = (
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-8, 8, width=32)
    | st.sampled_from([0.0, 1e-12, -1e-12, 2.0**-149])
)
ranges = st.tuples(reals, reals).map(sorted)
TORCH_DTYPES = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def qparams_of(bounds: tuple[float, float], spec: QuantSpec) -> QParams:
    return choose_qparams(torch.tensor(bounds[0]), torch.tensor(bounds[1]), spec)


def all_integers(spec: QuantSpec) -> torch.Tensor:
    return torch.arange(spec.quant_min, spec.quant_max + 1).to(spec.dtype)


@EVERY
@quick
@given(bounds=ranges)
def test_qparams_are_valid_and_zero_is_exact(spec, bounds):
    qparams = qparams_of(bounds, spec)
    scale, zero_point = qparams.item()
    assert qparams.scale.dtype == torch.float32 and qparams.zero_point.dtype == torch.int32
    assert MIN_SCALE <= scale < math.inf
    assert spec.quant_min <= zero_point <= spec.quant_max
    zero = torch.zeros(1)
    assert dequantize(quantize(zero, qparams, spec), qparams).item() == 0.0
    if spec.pow2_scale:
        assert math.frexp(scale)[0] == 0.5
    if spec.symmetric:
        assert zero_point == (spec.quant_min + spec.quant_max + 1) // 2


@EVERY
@quick
@given(bounds=ranges)
def test_range_is_covered_and_no_wider_than_needed(spec, bounds):
    qparams = qparams_of(bounds, spec)
    scale, zero_point = qparams.item()
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    slack = scale * (0.5 + 1e-4)  # the rounding of the zero point
    assert scale * (spec.quant_min - zero_point) <= low + slack
    assert scale * (spec.quant_max - zero_point) >= high - slack
    widest = 2 * max(-low, high) if spec.symmetric else high - low
    steps = (spec.quant_max - spec.quant_min) // 2 * 2 if spec.symmetric else spec.quant_max - spec.quant_min
    if spec.symmetric:
        steps = 2 * min(zero_point - spec.quant_min, spec.quant_max - zero_point)
    if widest / steps > MIN_SCALE:
        assert scale <= widest / steps * (2 if spec.pow2_scale else 1) * (1 + 1e-6)


@EVERY
@quick
@given(bounds=ranges)
def test_grid_round_trip_is_exact(spec, bounds):
    qparams, q = qparams_of(bounds, spec), all_integers(spec)
    assert torch.equal(quantize(dequantize(q, qparams), qparams, spec), q)


@EVERY
@quick
@given(bounds=ranges, x=st.lists(reals, min_size=2, max_size=20))
def test_quantize_is_monotone_and_within_half_a_step(spec, bounds, x):
    qparams = qparams_of(bounds, spec)
    x = torch.tensor(sorted(x), dtype=torch.float32)
    q = quantize(x, qparams, spec)
    assert (q.int().diff() >= 0).all()
    scale, zero_point = qparams.item()
    low, high = scale * (spec.quant_min - zero_point), scale * (spec.quant_max - zero_point)
    error = (dequantize(q, qparams).double() - x.double().clamp(low, high)).abs()
    assert (error <= scale * (0.5 + 1e-4)).all()


def assert_same_but_for_ties(q: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Equal except within float rounding of a tie, where they may be one apart.

    torch's kernels add the zero point before they round (``quantize_per_tensor`` with one rounding of both
    operations, ``quantize_per_channel`` with two), so an odd zero point sends ties the other way.
    """
    distance = (x.double() / scale.double()).remainder(1.0).sub(0.5).abs()
    different = q.int() - theirs.int()
    assert (different[distance > 1e-4] == 0).all()
    assert (different.abs() <= 1).all()


def ties_and_randoms(scale: float, size: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ties = (torch.arange(-300, 300) + 0.5) * scale
    near = torch.cat([torch.nextafter(ties, ties + 1e30), torch.nextafter(ties, ties - 1e30)])
    return torch.cat([torch.randn(size, generator=generator) * 100 * scale, ties, near])


@pytest.mark.parametrize("spec", [s for s in SPECS if s.saturates_with_dtype], ids=str)
@pytest.mark.parametrize(
    "bounds", [(-1.0, 1.0), (0.0, 6.0), (-0.37, 5.91), (-3.3e-7, 1e-9), (-1e20, 3e20), (-7.0, 0.0)]
)
def test_quantize_is_torchs(spec, bounds):
    qparams = qparams_of(bounds, spec)
    scale, zero_point = qparams.item()
    x = ties_and_randoms(scale)
    theirs = torch.quantize_per_tensor(x, scale, zero_point, TORCH_DTYPES[spec.dtype])
    q = quantize(x, qparams, spec)
    assert_same_but_for_ties(q, theirs.int_repr(), x, qparams.scale)
    if zero_point == 0:
        assert torch.equal(q, theirs.int_repr())
    integers = theirs.int_repr()
    assert torch.equal(dequantize(integers, qparams), theirs.dequantize())
    # Training's fake quantization rounds ties as fxq does.
    fake = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.quant_min, spec.quant_max)
    assert torch.equal(dequantize(q, qparams), fake)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_is_torchs(axis, symmetric):
    spec = UINT8.replace(dtype=torch.int8, quant_min=-128, quant_max=127, ch_axis=axis, symmetric=symmetric)
    x = torch.stack([ties_and_randoms(s).reshape(20, -1) for s in (0.1, 0.033, 7.0)]).movedim(0, axis).contiguous()
    others = [d for d in range(3) if d != axis]
    qparams = choose_qparams(x.amin(others) * 0.3, x.amax(others) * 0.7, spec)
    theirs = torch.quantize_per_channel(x, qparams.scale, qparams.zero_point, axis, torch.qint8)
    q = quantize(x, qparams, spec)
    shape = [-1 if d == axis else 1 for d in range(3)]
    assert_same_but_for_ties(q, theirs.int_repr(), x, qparams.scale.reshape(shape))
    if symmetric:  # as weights are: bit for bit
        assert torch.equal(q, theirs.int_repr())
    assert torch.equal(dequantize(theirs.int_repr(), qparams, axis), theirs.dequantize())
    for i, channel in enumerate(x.unbind(axis)):
        one = QParams(qparams.scale[i : i + 1], qparams.zero_point[i : i + 1])
        assert torch.equal(q.select(axis, i), quantize(channel, one, spec.replace(ch_axis=None)))


@EVERY
@pytest.mark.parametrize("bounds", [(0.0, 0.0), (5.0, 5.0), (-5.0, -5.0), (1e-30, 1e-30), (0.0, 3e38), (-1e30, 1e-12)])
def test_degenerate_ranges(spec, bounds):
    scale, _ = qparams_of(bounds, spec).item()
    assert MIN_SCALE <= scale < math.inf
    if bounds == (0.0, 0.0):
        assert scale == 1.0


def test_choose_qparams_by_hand():
    assert qparams_of((-1.0, 1.55), UINT8).item() == (pytest.approx(0.01), 100)
    assert qparams_of((2.0, 2.55), UINT8).item() == (pytest.approx(0.01), 0)  # extended to zero
    assert qparams_of((-1.27, 0.5), SPECS[5]).item() == (pytest.approx(0.01), 0)
    assert qparams_of((-0.7, 0.5), SPECS[6]).item() == (pytest.approx(0.1), 0)
    assert qparams_of((0.0, 2.55), UINT8.replace(pow2_scale=True)).item() == (2.0**-6, 0)
    assert qparams_of((0.0, 255.0), UINT8.replace(pow2_scale=True)).item() == (1.0, 0)  # already one: not rounded up


def test_spec_refusals_and_bits():
    assert [spec.bits for spec in SPECS[:7]] == [8, 7, 4, 8, 8, 8, 4]
    for changes in ({"quant_max": 256}, {"quant_min": 5, "quant_max": 5}, {"dtype": torch.int32}, {"quant_min": -1}):
        with pytest.raises(ConfigError):
            UINT8.replace(**changes)
    shifted = SPECS[4].as_unsigned()
    assert (shifted.dtype, shifted.quant_min, shifted.quant_max) == (torch.uint8, 0, 255)


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert sqnr(x, x) == math.inf
    assert sqnr(x, x * 0.9) == pytest.approx(20.0, rel=1e-5)
    assert sqnr(torch.zeros(2), x) == -math.inf
