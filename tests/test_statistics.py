"""Statistics: exact merging, exact counts, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.errors import CalibrationError
from fxq.statistics import HistogramStatistics, MinMaxStatistics, MovingAverageStatistics, Statistics

EXACT = [MinMaxStatistics, HistogramStatistics]
ALL = [*EXACT, MovingAverageStatistics]
quick = settings(deadline=None, max_examples=50)
# Any finite float32, so that grids of very different widths meet.
values = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30)


def stats_of(cls: type[Statistics], *batches: torch.Tensor, ch_axis: int | None = None) -> Statistics:
    stats = cls(ch_axis)
    for batch in batches:
        stats.update(batch)
    return stats


def assert_equal(a: Statistics, b: Statistics) -> None:
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for name in left:
        same = torch.equal(left[name], right[name]) if torch.is_tensor(left[name]) else left[name] == right[name]
        assert same, name


def reference_counts(x: np.ndarray, width: float, bins: int) -> np.ndarray:
    index = np.trunc(x.astype(np.float64) / width).astype(np.int64) + bins // 2 - 1
    return np.bincount(index, minlength=bins - 1)


@pytest.mark.parametrize("cls", EXACT)
@quick
@given(a=values, b=values)
def test_merge_is_stats_of_cat(cls, a, b):
    a, b = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    whole = stats_of(cls, torch.cat([a, b]))
    assert_equal(stats_of(cls, a).merge(stats_of(cls, b)), whole)
    assert_equal(stats_of(cls, a, b), whole)


@pytest.mark.parametrize("cls", EXACT)
@quick
@given(seed=st.integers(0, 1 << 30), exponents=st.lists(st.integers(-60, 60), min_size=3, max_size=3))
def test_merge_is_stats_of_cat_per_channel(cls, seed, exponents):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([2.0**e for e in exponents])[:, None]
    a = torch.randn(5, 3, 4, generator=generator)
    b = torch.randn(2, 3, 4, generator=generator) * scale
    merged = stats_of(cls, a, ch_axis=1).merge(stats_of(cls, b, ch_axis=1))
    assert_equal(merged, stats_of(cls, torch.cat([a, b]), ch_axis=1))


@quick
@given(a=st.lists(values, min_size=1, max_size=4), b=st.lists(values, min_size=1, max_size=4))
def test_moving_average_merges_as_if_in_order(a, b):
    a = [torch.tensor(v).clamp(-1e6, 1e6) for v in a]
    b = [torch.tensor(v).clamp(-1e6, 1e6) for v in b]
    merged = stats_of(MovingAverageStatistics, *a).merge(stats_of(MovingAverageStatistics, *b))
    whole = stats_of(MovingAverageStatistics, *a, *b)
    torch.testing.assert_close(merged.low, whole.low, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(merged.high, whole.high, rtol=1e-9, atol=1e-6)
    assert (merged.batches, merged.count) == (whole.batches, whole.count)
    third = [torch.tensor([-3.0, 7.0])]  # the result of a merge must itself be mergeable
    merged = stats_of(MovingAverageStatistics, *third).merge(merged)
    torch.testing.assert_close(merged.low, stats_of(MovingAverageStatistics, *third, *a, *b).low, rtol=1e-9, atol=1e-6)


def test_moving_average_by_hand():
    stats = stats_of(MovingAverageStatistics, torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 4.0]))
    assert stats.low.item() == pytest.approx(-1.01)
    assert stats.high.item() == pytest.approx(2.02)


@quick
@given(x=values)
def test_histogram_counts_against_numpy(x):
    x = torch.tensor(x, dtype=torch.float32)
    stats = stats_of(HistogramStatistics, x)
    width = stats.width.item()
    assert torch.frexp(stats.width).mantissa.item() == 0.5  # a power of two
    magnitude = x.abs().max().item()
    assert magnitude < 2048 * width
    assert magnitude >= 1024 * width or width == 2.0**-100
    np.testing.assert_array_equal(stats.counts[0].numpy(), reference_counts(x.numpy(), width, 4096))


@pytest.mark.parametrize("edge", [4.0, -4.0, 16.0])
def test_a_value_on_the_end_of_the_grid_widens_it(edge):
    a, b = torch.tensor([3.9, -0.1]), torch.tensor([edge])  # 4 is 2048 bins of the first batch's width
    assert_equal(stats_of(HistogramStatistics, a, b), stats_of(HistogramStatistics, torch.cat([a, b])))


def test_histogram_of_large_tensors_and_edges():
    # More than one chunk; multiples of the width and their neighbours are where a rounding error would show.
    exact = torch.arange(-4095, 4096) / 1024.0
    edges = torch.cat([exact, torch.nextafter(exact, exact + 1), torch.nextafter(exact, exact - 1)])
    x = torch.cat([torch.randn(600_000).clamp(-3.9, 3.9), edges.clamp(-3.99999, 3.99999)])
    stats = stats_of(HistogramStatistics, x)
    assert stats.width.item() == 2.0**-9
    np.testing.assert_array_equal(stats.counts[0].numpy(), reference_counts(x.numpy(), 2.0**-9, 4096))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_is_per_tensor_of_each_channel(cls, axis):
    x = torch.randn(6, 4, 700) * torch.logspace(-3, 3, 700)
    x = x if axis == -1 else x[..., :50]
    bins = {"bins": 512} if cls is HistogramStatistics else {}
    stats = cls(axis, **bins)
    stats.update(x)
    stats.update(2 * x)
    for i, channel in enumerate(x.unbind(axis)):
        one = cls(None, **bins)
        one.update(channel)
        one.update(2 * channel)
        assert stats.low[i] == one.low[0] and stats.high[i] == one.high[0]
        if cls is HistogramStatistics:
            assert stats.width[i] == one.width[0]
            assert torch.equal(stats.counts[i], one.counts[0])


def test_memory_format_and_dtype_do_not_matter():
    x = torch.randn(2, 3, 5, 7).bfloat16()
    whole = stats_of(HistogramStatistics, x.float())
    for other in (x, x.double(), x.float().contiguous(memory_format=torch.channels_last), x.float().transpose(0, 3)):
        assert_equal(stats_of(HistogramStatistics, other), whole)
    assert_equal(
        stats_of(HistogramStatistics, torch.ones(1).expand(4, 5)), stats_of(HistogramStatistics, torch.ones(20))
    )


def test_sampling_counts_the_bulk_in_part_and_the_tails_in_full():
    x = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    x[12345], x[77777], x[200_002] = 30.0, 25.0, -40.0  # none of them is in the sample
    every = 61
    assert not {12345 % every, 77777 % every, 200_002 % every} & {0}
    stats, whole = HistogramStatistics(), stats_of(HistogramStatistics, x)
    stats.update(x, every=every)
    assert (stats.low.item(), stats.high.item(), stats.count) == (-40.0, 30.0, 200_003)
    assert stats.width.equal(whole.width)
    assert stats.counts.sum().item() == pytest.approx(len(x), rel=0.01)
    centre = whole.counts.shape[1] // 2
    beyond = int(4.0 / stats.width.item())  # 4 sigma: about 13 of 200,000 values, fewer than one in a sample
    for tail in (slice(None, centre - beyond), slice(centre + beyond, None)):
        assert torch.equal(stats.counts[:, tail], whole.counts[:, tail])
    # The bulk within four standard deviations of a sample of this size.
    for sigma in (-2, -1, 0, 1, 2):
        part = slice(centre + int((sigma - 0.5) / stats.width), centre + int((sigma + 0.5) / stats.width))
        expected = whole.counts[:, part].sum().item()
        assert abs(stats.counts[:, part].sum().item() - expected) < 4 * (expected * every) ** 0.5


def test_sampling_of_repeated_extremes_counts_them_once_each():
    x = torch.full((10_000,), 6.0)
    x[::2] = 0.0
    stats = HistogramStatistics()
    stats.update(x, every=7)
    used = stats.counts[stats.counts > 0]
    assert len(used) == 2 and used.sum().item() == pytest.approx(10_000, abs=7)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(
    ("bad", "message"), [(float("nan"), "1 NaN and 0 inf"), (float("inf"), "0 NaN and 1 inf"), (float("-inf"), "1 inf")]
)
def test_non_finite_raises_and_changes_nothing(cls, axis, bad, message):
    stats = stats_of(cls, torch.randn(4, 3), ch_axis=axis)
    before = stats.state()
    x = torch.zeros(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match=message):
        stats.update(x)
    assert_equal(stats, cls.from_state(before))


def test_float64_that_overflows_float32_raises():
    with pytest.raises(CalibrationError, match="1 inf among 1"):
        HistogramStatistics().update(torch.tensor([1e300], dtype=torch.float64))


@pytest.mark.parametrize("cls", ALL)
def test_refusals(cls):
    stats = stats_of(cls, torch.randn(4, 3), ch_axis=1)
    with pytest.raises(CalibrationError, match="saw 5 channels after 3"):
        stats.update(torch.randn(4, 5))
    with pytest.raises(CalibrationError, match="int64"):
        stats.update(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(CalibrationError, match="axis 1"):
        stats.merge(cls())
    with pytest.raises(CalibrationError, match="3 and 2 channels"):
        stats.merge(stats_of(cls, torch.randn(4, 2), ch_axis=1))
    with pytest.raises(CalibrationError, match="fields"):
        cls.from_state({"count": 1})


def test_histograms_of_different_bins_do_not_merge():
    a, b = HistogramStatistics(bins=64), HistogramStatistics(bins=128)
    for stats in (a, b):
        stats.update(torch.randn(9))
    with pytest.raises(CalibrationError, match="64 and 128 bins"):
        a.merge(b)


@pytest.mark.parametrize("cls", ALL)
def test_empty_tensors_are_ignored_and_merge_is_pure(cls):
    x = torch.randn(10)
    stats, empty = stats_of(cls, x), stats_of(cls, torch.empty(0, 5))
    assert empty.count == 0
    for merged in (stats.merge(empty), empty.merge(stats)):
        assert_equal(merged, stats)
        merged.update(torch.full((3,), 100.0))
    merged = stats.merge(stats)
    merged.update(torch.full((3,), 100.0))
    assert_equal(stats, stats_of(cls, x))


@pytest.mark.parametrize("cls", ALL)
def test_state_round_trip_is_a_copy(cls):
    stats = stats_of(cls, torch.randn(4, 3), ch_axis=1)
    state = stats.state()
    assert all(v is None or isinstance(v, (int, torch.Tensor)) for v in state.values())
    again = cls.from_state(state)
    assert_equal(again, stats)
    again.update(torch.randn(4, 3) * 100)
    assert_equal(stats, cls.from_state(state))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-12, 1e30, 3.4028234e38, -3.4028234e38, -1e-12])
def test_histogram_of_a_constant_at_any_magnitude(value):
    stats = stats_of(HistogramStatistics, torch.full((7,), value), torch.full((2,), value))
    assert stats.counts.sum() == 9 and stats.counts.max() == 9
    assert stats.width.isfinite().all() and (stats.width > 0).all()
    assert stats.low == stats.high == torch.tensor([value])


def test_unit_edges_end_at_zero_on_an_unseen_side():
    both, up, down = (stats_of(HistogramStatistics, torch.tensor(v)) for v in ([-1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]))
    assert both.unit_edges()[0, 2047:2049].tolist() == [-1, 1]
    assert up.unit_edges()[0, 2047:2049].tolist() == [0, 1]
    assert down.unit_edges()[0, 2047:2049].tolist() == [-1, 0]
    assert both.unit_edges()[0, [0, -1]].tolist() == [-2048, 2048]


def test_counts_get_wider_in_time(monkeypatch):
    """int32 is half the memory; what is counted must not depend on it."""
    x, y = (torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    narrow = HistogramStatistics()
    for part in (x, y):
        narrow.update(part)
    assert narrow.counts.dtype == torch.int32
    monkeypatch.setattr("fxq.statistics._MOST_IN_INT32", 1500)
    wide, other = HistogramStatistics(), HistogramStatistics()
    wide.update(x)
    assert wide.counts.dtype == torch.int32
    other.update(y)
    merged = wide.merge(other)
    wide.update(y)
    for found in (wide, merged):
        assert found.counts.dtype == torch.int64
        assert torch.equal(found.counts, narrow.counts.long())
    whole = HistogramStatistics()
    whole.update(torch.cat([x, y]))
    assert torch.equal(whole.counts, narrow.counts.long())
