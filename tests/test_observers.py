"""Observers: one module for every kind, its table, its state and its bounds."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

from fxq import observers
from fxq.errors import CalibrationError, ConfigError
from fxq.numerics import choose_qparams
from fxq.observers import (
    OBSERVERS,
    SAMPLE_SIZE,
    Observer,
    ObserverKind,
    make_observer,
    sample_limit,
    sampling_step,
    settle_ranges,
)
from fxq.ranges import histogram_range, percentile_range
from fxq.spec import QuantSpec
from fxq.statistics import HistogramStatistics, MinMaxStatistics

UINT8 = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)
WEIGHT = QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True, ch_axis=0)
NAMES = [*OBSERVERS, "percentile:99.9"]


def observed(spec: QuantSpec, *batches: torch.Tensor) -> Observer:
    observer = make_observer(spec)
    for batch in batches:
        observer(batch)
    return observer


@pytest.mark.parametrize("name", NAMES)
def test_forward_returns_its_input_and_records(name):
    observer = make_observer(UINT8.replace(observer=name))
    assert not observer.has_data
    x = torch.randn(3, 5, requires_grad=True)
    assert observer(x) is x
    assert observer.has_data and observer.batches == 1 and observer.statistics.count == 15
    assert not observer.range()[0].requires_grad
    observer.reset()
    assert not observer.has_data and observer.batches == 0


def test_disabled_observer_is_identity():
    observer = observed(UINT8, torch.ones(3))
    observer.enabled = False
    x = torch.tensor([float("nan")])
    assert observer(x) is x
    assert observer.batches == 1 and observer.range()[1].item() == 1.0


def test_qparams_follow_the_named_range():
    x = torch.cat([torch.randn(5000), torch.tensor([80.0])])
    stats = HistogramStatistics()
    stats.update(x)
    expected = {
        "histogram": histogram_range(stats, UINT8),
        "percentile": percentile_range(stats, 99.99),
        "percentile:99.9": percentile_range(stats, 99.9),
        "minmax": (x.min(), x.max()),
    }
    for name, (low, high) in expected.items():
        observer = observed(UINT8.replace(observer=name), x)
        assert observer.qparams().equals(choose_qparams(low, high, UINT8)), name
    assert expected["percentile"][1] > expected["percentile:99.9"][1]


def test_moving_average_differs_from_minmax():
    batches = torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 3.0])
    low, high = observed(UINT8.replace(observer="moving_average"), *batches).range()
    assert (low.item(), high.item()) == (pytest.approx(-1.02), pytest.approx(1.02))


def test_range_is_computed_anew_after_new_data():
    observer = observed(UINT8, torch.ones(1000))
    assert observer.range()[1].item() == 1.0
    observer(torch.full((2000,), 8.0))
    assert observer.range()[1].item() == 8.0
    observer.merge(observed(UINT8, torch.full((3000,), 16.0)))
    assert observer.range()[1].item() == 16.0


@pytest.mark.parametrize("name", NAMES)
def test_per_channel_qparams(name):
    spec = WEIGHT.replace(observer=name)
    weight = torch.randn(6, 4, 3, 3) * torch.arange(1.0, 7.0)[:, None, None, None]
    qparams = observed(spec, weight).qparams()
    assert qparams.scale.shape == qparams.zero_point.shape == (6,)
    assert (qparams.zero_point == 0).all()
    assert qparams.scale[5] > 2 * qparams.scale[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_data_raises(name):
    observer = make_observer(UINT8.replace(observer=name))
    observer(torch.empty(0, 3))
    for ask in (observer.qparams, observer.range):
        with pytest.raises(CalibrationError, match="no data"):
            ask()


def test_nan_raises_and_is_not_counted():
    observer = make_observer(UINT8)
    with pytest.raises(CalibrationError, match="1 NaN"):
        observer(torch.tensor([1.0, float("nan")]))
    assert observer.batches == 0 and not observer.has_data


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl", "minmax, moving_average, histogram, percentile, mse, entropy"),
        ("entropy:3", "takes no number"),
        ("", "unknown observer"),
        ("minmax:3", "takes no number"),
        ("percentile:", "percentage"),
        ("percentile:many", "percentage"),
        ("percentile:nan", "percentage"),
        ("percentile:50", "percentage"),
        ("percentile:100.1", "percentage"),
    ],
)
def test_names_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        make_observer(UINT8.replace(observer=name))


def test_one_row_adds_an_observer(monkeypatch):
    row = ObserverKind(
        MinMaxStatistics, lambda stats, spec, n: (stats.low * n / 100, stats.high * n / 100), default=80.0
    )
    monkeypatch.setitem(observers.OBSERVERS, "part", row)
    assert observed(UINT8.replace(observer="part"), torch.tensor([0.0, 10.0])).range()[1].item() == 8.0
    assert "part" in repr(observed(UINT8.replace(observer="part:60"), torch.ones(1)))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0.0, 6.0), (0.0, 6.0)),
        ((None, 6.0), (-4.0, 6.0)),
        ((0.0, None), (0.0, 9.0)),
        ((-50.0, 50.0), (-4.0, 9.0)),
        ((1.0, 2.0), (0.0, 2.0)),
    ],
)
def test_bounds_clip_the_range(bounds, expected):
    observer = Observer(UINT8.replace(observer="minmax"), bounds=bounds)
    observer(torch.tensor([-4.0, 9.0]))
    low, high = observer.range()
    assert (low.item(), high.item()) == expected
    assert observer.qparams().equals(choose_qparams(torch.tensor(expected[0]), torch.tensor(expected[1]), UINT8))


def test_bounds_refused_if_empty():
    with pytest.raises(ConfigError, match="empty"):
        Observer(UINT8, bounds=(6.0, 0.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [UINT8, WEIGHT], ids=["tensor", "channel"])
def test_copies_keep_everything(name, spec):
    observer = observed(spec.replace(observer=name), torch.randn(5, 7), torch.randn(5, 7))
    buffer = io.BytesIO()
    torch.save(observer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make_observer(observer.spec)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer)), loaded):
        assert other.qparams().equals(observer.qparams()) and repr(other) == repr(observer)
        before = repr(observer)
        other(torch.full((5, 7), 100.0))
        assert repr(observer) == before != repr(other)


@pytest.mark.parametrize("name", NAMES)
def test_merge_is_observing_both(name):
    spec = UINT8.replace(observer=name)
    a, b = torch.randn(2000), 5 * torch.randn(100_000)  # the second is sampled
    merged = observed(spec, a)
    merged.merge(observed(spec, b))
    whole = observed(spec, a, b)
    assert merged.batches == 2
    for left, right in zip(merged.range(), whole.range(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6 if name == "moving_average" else 0, atol=0)


def test_merge_of_different_specs_refused():
    with pytest.raises(CalibrationError, match="cannot merge"):
        observed(UINT8, torch.ones(1)).merge(observed(UINT8.replace(observer="mse"), torch.ones(1)))


@pytest.mark.parametrize(
    "numel", [0, 1, SAMPLE_SIZE, SAMPLE_SIZE + 1, 96 * 112 * 112, 3 * 5 * 7 * 11 * 13 * 1000, 1 << 22]
)
def test_sampling_step_shares_no_factor(numel):
    step = sampling_step(numel)
    assert math.gcd(step, numel) <= 1 or numel == 0
    assert numel <= step * sample_limit(numel)
    assert (step == 1) == (numel <= SAMPLE_SIZE)


def test_large_activations_are_sampled_evenly_and_weights_are_not():
    # Channels of very different sizes: a sample that lined up with them would miss most.
    x = (torch.arange(64.0) + 1).repeat(50 * 50, 1).t().reshape(1, 64, 50, 50)
    x[0, 3, 3, 3] = 200.0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        stats = observed(UINT8, x.contiguous(memory_format=memory_format)).statistics
        assert stats.high.item() == 200.0 and stats.count == x.numel()
        used = stats.counts[stats.counts > 0]
        assert stats.counts.sum().item() == pytest.approx(x.numel(), rel=0.01)
        assert len(used) >= 64 and used[:64].min() > 0.9 * used[:64].max()
    weight = torch.randn(4, 1 << 17)
    assert observed(WEIGHT.replace(observer="mse"), weight).statistics.counts.sum() == weight.numel()


def test_few_values_leave_room_for_those_to_come():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    low, high = observed(UINT8, scores).range()
    assert 1.3 < high.item() / scores.max().item() < 1.6 and 1.3 < low.item() / scores.min().item() < 1.6
    many = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    assert observed(UINT8, many).range()[1].item() <= many.max().item()


@pytest.mark.parametrize(
    ("values", "spec", "bounds", "high"),
    [
        (torch.full((40,), 3.0), UINT8, (None, None), 3.0),
        (torch.linspace(0, 6, 40), UINT8, (0.0, 6.0), 6.0),
        (torch.linspace(0, 6, 40), UINT8.replace(observer="minmax"), (None, None), 6.0),
    ],
    ids=["constant", "bounded", "minmax"],
)
def test_no_room_is_left_where_nothing_larger_can_come(values, spec, bounds, high):
    observer = make_observer(spec, bounds)
    observer(values)
    assert observer.range()[1].item() == pytest.approx(high, rel=1e-6)


def test_repr():
    observer = observed(UINT8, torch.tensor([-0.5, 5.9] * 1000), torch.tensor([-0.5, 5.9] * 1000))
    assert repr(observer) == "Observer(histogram, uint8 affine per-tensor, batches=2, range=[-0.5, 5.9])"
    assert repr(make_observer(UINT8, (0.0, None))) == (
        "Observer(histogram, uint8 affine per-tensor, batches=0, bounds=[0.0, None])"
    )


@pytest.mark.parametrize("name", NAMES)
def test_ranges_chosen_together_are_those_chosen_alone(name, monkeypatch):
    spec = UINT8.replace(observer=name)
    made = torch.Generator().manual_seed(3)
    tensors = [torch.randn(4000, generator=made) * 10**power for power in (-3, 0, 0, 2)]
    tensors += [tensors[1].abs(), -tensors[2].abs(), torch.zeros(5), tensors[1].clamp(max=0.1)]
    weights = [torch.randn(6, 50, generator=made) for _ in range(2)]
    alone = [observed(spec, x) for x in tensors] + [observed(WEIGHT.replace(observer=name), x) for x in weights]
    together = copy.deepcopy(alone)
    monkeypatch.setattr("fxq.observers._AT_ONCE", 2)
    settle_ranges([*together, make_observer(spec)])  # one without data is left alone
    searched = [stats for observer in together if isinstance(stats := observer.statistics, HistogramStatistics)]
    assert all(observer._range is not None for observer in together) or not searched
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.range(), one.range(), rtol=0, atol=0)


def test_ranges_chosen_together_stay_inside_their_own_bounds():
    clipped, free = Observer(UINT8, (0.0, 6.0)), Observer(UINT8)
    for observer in (clipped, free):
        observer(torch.linspace(-8, 8, 1000))
    settle_ranges([clipped, free])
    assert [float(end) for end in clipped.range()] == [0.0, 6.0] and free.range()[1] > 7
