"""Range estimation: exact where it must be, better than min-max where it can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.numerics import choose_qparams, dequantize, quantize
from fxq.ranges import (
    CLIPPING,
    entropy_range,
    expected_error,
    histogram_range,
    minmax_range,
    mse_range,
    percentile_range,
)
from fxq.spec import QuantSpec
from fxq.statistics import HistogramStatistics

UINT8 = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)
INT8 = QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True)
UINT4 = UINT8.replace(quant_max=15)
INT4 = INT8.replace(quant_min=-8, quant_max=7)
SPECS = [UINT8, INT8, UINT4, INT4, UINT8.replace(pow2_scale=True), INT4.replace(pow2_scale=True)]
SEARCHES = [mse_range, histogram_range]
ESTIMATES = [*SEARCHES, entropy_range]
quick = settings(deadline=None, max_examples=50)


def stats_of(x: torch.Tensor, ch_axis: int | None = None, bins: int | None = None) -> HistogramStatistics:
    stats = HistogramStatistics(ch_axis, bins)
    stats.update(x)
    return stats


def real_error(x: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor], spec: QuantSpec) -> float:
    qparams = choose_qparams(*bounds, spec)
    actual = dequantize(quantize(x, qparams, spec), qparams, spec.ch_axis)
    return (actual.double() - x.double()).square().mean().item()


def data(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=generator)
    return {
        "gaussian": x,
        "relu": x.relu(),
        "shifted": x + 3,
        "negative": -x.relu(),
        "outlier": torch.cat([x, torch.tensor([60.0])]),
        "outliers": torch.cat([x, torch.tensor([60.0, -45.0])]),
        "laplace": x.sign() * torch.empty(50_000).exponential_(generator=generator),
        "uniform": torch.rand(50_000, generator=generator),
        "gelu": torch.nn.functional.gelu(4 * x),
    }[name]


NAMES = ["gaussian", "relu", "shifted", "negative", "outlier", "outliers", "laplace", "uniform", "gelu"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_search_is_never_worse_than_the_wider_one(name, spec):
    x = data(name)
    stats = stats_of(x)
    wide, mse, free = (
        real_error(x, r, spec) for r in (minmax_range(stats), mse_range(stats, spec), histogram_range(stats, spec))
    )
    # The estimate takes values as uniform in their bin; a percent allows for that.
    assert mse <= wide * 1.01
    assert free <= mse * 1.01


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.05])
def test_expected_error_is_the_real_error(name, spec, fraction):
    x = data(name)
    stats = stats_of(x)
    low, high = (v.double() * fraction for v in minmax_range(stats))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    expected = expected_error(stats, low[:, None], high[:, None], spec).item()
    assert expected == pytest.approx(real_error(x, (low, high), spec), rel=0.03)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cost_counts_what_is_clipped_twice(name, spec):
    x = data(name)
    stats = stats_of(x)
    low, high = (0.5 * v.double()[:, None] for v in minmax_range(stats))
    qparams = choose_qparams(low, high, spec)
    scale = qparams.scale.double()
    error = (dequantize(quantize(x, qparams, spec), qparams).double() - x.double()).abs()
    extra = error[error > scale * 0.500001].square().sum() / len(x)
    cost = expected_error(stats, low.clamp(max=0), high.clamp(min=0), spec, clipping=2.0).item()
    once = expected_error(stats, low.clamp(max=0), high.clamp(min=0), spec).item()
    assert cost - once == pytest.approx(extra.item(), rel=0.03, abs=1e-3 * once)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_search_is_near_the_cheapest_of_all_candidates(name, spec):
    """The closed form only chooses what is looked at closely: nothing better may be missed."""
    stats = stats_of(data(name))
    fractions = torch.cat([2.0 ** -torch.arange(0, 6, 0.125), torch.zeros(1)]).double()
    pairs = torch.cartesian_prod(fractions, fractions)
    lows, highs = stats.low.double().clamp(max=0), stats.high.double().clamp(min=0)

    def cost(low: torch.Tensor, high: torch.Tensor) -> float:
        return expected_error(stats, low.double()[None], high.double()[None], spec, CLIPPING).min().item()

    low, high = histogram_range(stats, spec)
    assert cost(low, high) <= 1.02 * cost(lows * pairs[:, 0], highs * pairs[:, 1])


def test_entropy_against_onnxruntime():
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    for name in ("gaussian", "laplace", "outlier"):
        x = data(name)
        collector = calibrate.HistogramCollector("entropy", True, 2048, 128, 99.99, "same")
        bound = float(x.abs().max())
        counts, edges = np.histogram(x.numpy(), 2048, (-bound, bound))
        _, theirs, *_ = collector.get_entropy_threshold((counts, edges, -bound, bound, bound), 128)
        ours = entropy_range(stats_of(x, bins=2048), INT8.replace(quant_min=-63, quant_max=63))[1]
        # Both curves are flat and noisy near their minimum, and the candidates differ.
        assert ours.item() == pytest.approx(float(theirs), rel=0.25), name


def test_entropy_clips_a_lone_outlier_whatever_its_size():
    for outlier in (20.0, 1e3):
        x = torch.cat([data("gaussian"), torch.tensor([outlier])])
        assert entropy_range(stats_of(x), UINT8)[1].item() < max(6.0, outlier / 7)


def test_outliers_are_clipped_and_clearly_beat_minmax():
    x = data("outlier")
    stats = stats_of(x)
    for spec in (UINT4, INT4):
        for search in SEARCHES:
            assert real_error(x, search(stats, spec), spec) < 0.25 * real_error(x, minmax_range(stats), spec)
    # Independent sides: the outlier above must not cost range below.
    low, high = histogram_range(stats, UINT4)
    assert high / stats.high < 0.2 and low / stats.low > 0.4


def test_independent_sides_beat_one_ratio():
    x = torch.cat([data("relu"), torch.linspace(-0.5, 0, 20_000), torch.tensor([60.0])])
    stats = stats_of(x)
    assert real_error(x, histogram_range(stats, UINT4), UINT4) < 0.9 * real_error(x, mse_range(stats, UINT4), UINT4)


def test_search_is_near_the_optimum_of_a_brute_force():
    x = data("outliers")
    found = real_error(x, histogram_range(stats_of(x), UINT4), UINT4)
    grid = torch.arange(1.0, 8.0, 0.25)
    best = min(real_error(x, (-low, high), UINT4) for low in grid for high in grid)
    assert found <= best * 1.02


@pytest.mark.parametrize("search", SEARCHES)
def test_exact_extremes_where_no_clipping_is_better(search):
    # Half of the values at each end: any clipping costs more than a finer step gains.
    for x in (torch.tensor([-1.3] * 50 + [0.7] * 50), torch.tensor([0.3] * 50 + [5.9] * 50)):
        low, high = search(stats_of(x), UINT8)
        assert low.item() == min(0.0, x.min().item())
        assert high.item() == x.max().item()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@quick
@given(x=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=40))
def test_range_has_zero_inside_and_stays_inside_the_observed(search, spec, x):
    stats = stats_of(torch.tensor(x, dtype=torch.float32))
    low, high = search(stats, spec)
    assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == (1,)
    assert min(0.0, stats.low.item()) <= low.item() <= 0 <= high.item() <= max(0.0, stats.high.item())
    found, mse, wide = (
        expected_error(stats, a.double()[:, None].clamp(max=0), b.double()[:, None].clamp(min=0), spec, CLIPPING).item()
        for a, b in ((low, high), mse_range(stats, spec), minmax_range(stats))
    )
    assert found <= mse * (1 + 1e-5) and mse <= wide * (1 + 1e-5)


def test_an_empty_range_is_no_candidate():
    # By convention it has scale 1, which would happen to suit these values.
    empty = torch.zeros(1, 1, dtype=torch.float64)
    assert expected_error(stats_of(torch.linspace(0, 255, 20_000)), empty, empty, UINT8).item() == float("inf")


@pytest.mark.parametrize("search", ESTIMATES)
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-12, -1e-12, 5.0, -5.0, 1e30, -3e38])
def test_constant_tensors_keep_their_value(search, value):
    x = torch.full((10,), value)
    for spec in (UINT8, INT8):
        low, high = search(stats_of(x), spec)
        assert (low.item(), high.item()) == (min(0.0, x[0].item()), max(0.0, x[0].item()))


@pytest.mark.parametrize(
    "search", [*ESTIMATES, lambda s, spec: percentile_range(s, 99.0), lambda s, _: minmax_range(s)]
)
@pytest.mark.parametrize("spec", [INT8, INT4, UINT8], ids=str)
def test_per_channel_is_per_tensor_of_each_channel(search, spec):
    x = torch.randn(40, 300) * torch.logspace(-6, 6, 40)[:, None]
    x[0] = 0.0
    x[1] = x[1].abs()
    x[2, 7] = 50 * x[2].max()
    low, high = search(stats_of(x, ch_axis=0), spec.replace(ch_axis=0))
    for i, channel in enumerate(x):
        one = search(stats_of(channel, bins=512), spec)
        assert (low[i], high[i]) == (one[0][0], one[1][0]), i


@quick
@given(seed=st.integers(0, 1 << 30), size=st.integers(1, 3000), percent=st.sampled_from([60.0, 90.0, 99.9, 100.0]))
def test_percentile_against_quantile_within_a_bin(seed, size, percent):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(3).exp().sub(2)
    stats = stats_of(x)
    low, high = percentile_range(stats, percent)
    # torch.quantile in float64, so that the rank is not rounded across an integer.
    expected_high = torch.quantile(x.double(), percent / 100, interpolation="higher").item()
    expected_low = -torch.quantile(-x.double(), percent / 100, interpolation="higher").item()
    width = stats.width.item() * 2  # the middle bin's
    assert abs(low.item() - expected_low) <= width
    assert abs(high.item() - expected_high) <= width
    assert x.min() <= low <= high <= x.max() or size < 3
    if percent == 100.0:
        assert (low.item(), high.item()) == (x.min().item(), x.max().item())


def test_percentile_ignores_outliers_on_both_sides_and_is_monotone():
    x = torch.cat([data("gaussian"), torch.tensor([1e4, -1e4])])
    ranges = [percentile_range(stats_of(x), p) for p in (51, 75, 99, 99.9, 99.99, 100)]
    assert ranges[4][1].item() < 20 and ranges[4][0].item() > -20
    for inner, outer in itertools.pairwise(ranges):
        assert outer[0] <= inner[0] and inner[1] <= outer[1]
