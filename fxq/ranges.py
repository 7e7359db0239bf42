"""Range estimation: pure functions from statistics to the real range ``(low, high)`` to quantize.

All return float32 tensors ``[C]`` (``[1]`` per tensor). :func:`fxq.numerics.choose_qparams` extends a range to
contain zero; ``minmax_range`` and ``percentile_range`` leave that to it, the other two return ranges with zero inside.

``mse_range`` and ``histogram_range`` minimise the same estimate of the squared quantization error. The first searches
one number, by which the observed range shrinks as a whole; the second then moves low and high apart from each other.
For a symmetric spec only the longer side matters, so there they are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.numerics import choose_qparams
from fxq.spec import QuantSpec
from fxq.statistics import HistogramStatistics, Statistics

Range = tuple[Tensor, Tensor]

_STEP = 2.0**-0.25
# Fractions of the observed bound: geometric, because an outlier may be 1000 times the rest.
_COARSE = _STEP ** torch.arange(0, 41, dtype=torch.float64)
# Then in between, around the best one.
_FINE = _STEP ** torch.linspace(-1, 1, 17, dtype=torch.float64)[1:-1]
_ROUNDS = 2
# float64 numbers in a temporary of the error estimate: 1 MB stays in cache.
_CHUNK = 1 << 17


def minmax_range(stats: Statistics) -> Range:
    """The observed extremes, or their moving averages: ``stats.low`` and ``stats.high``."""
    return stats.low.float(), stats.high.float()


def percentile_range(stats: HistogramStatistics, percent: float) -> Range:
    """The range from percentile ``100 - percent`` to percentile ``percent``, right to one bin.

    Outward order statistics (as ``torch.quantile`` with ``lower`` and ``higher``), interpolated inside their bin
    and never outside the observed extremes; 100 gives these exactly.

    Args:
        stats: the histogram.
        percent: above 50, at most 100.
    """
    cumulative = stats.counts.cumsum(1)
    last = cumulative[:, -1:] - 1
    rank_high = torch.ceil(last * (percent / 100)).to(torch.int64).clamp(max=last)
    rank_low = last - rank_high
    low = _value_at(stats, cumulative, rank_low, offset=0)
    high = _value_at(stats, cumulative, rank_high, offset=1)
    return torch.maximum(low.float(), stats.low), torch.minimum(high.float(), stats.high)


def _value_at(stats: HistogramStatistics, cumulative: Tensor, rank: Tensor, offset: int) -> Tensor:
    """Value of the element number ``rank`` (from 0) of each channel: its lower (0) or upper (1) end, ``[C]``."""
    index = torch.searchsorted(cumulative, rank, right=True)
    counts = stats.counts.gather(1, index)
    before = cumulative.gather(1, index) - counts
    edges = stats.unit_edges()
    left, right = edges.gather(1, index), edges.gather(1, index + 1)
    value = left + (right - left) * ((rank + offset - before) / counts)
    return value[:, 0] * stats.width.double()


def mse_range(stats: HistogramStatistics, spec: QuantSpec) -> Range:
    """The observed range shrunk by the one ratio that minimises the expected squared quantization error.

    Example:
        >>> stats = HistogramStatistics()
        >>> stats.update(torch.cat([torch.randn(10_000), torch.tensor([100.0])]))
        >>> spec = QuantSpec(dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True)
        >>> bool(mse_range(stats, spec)[1] < 20)
        True
    """
    search = _Search(stats, spec)
    search.shrink(low=True, high=True)
    return search.range()


def histogram_range(stats: HistogramStatistics, spec: QuantSpec) -> Range:
    """Low and high, chosen independently to minimise the expected squared quantization error.

    Coordinate descent from :func:`mse_range`'s answer, so its error is never above that one's, nor above min-max's.
    Returns the exact observed bound where no clipping is better, and zero for a side without data.
    """
    search = _Search(stats, spec)
    search.shrink(low=True, high=True)
    if not spec.symmetric:
        for _ in range(_ROUNDS):
            search.shrink(high=True)
            search.shrink(low=True)
    return search.range()


def expected_error(stats: HistogramStatistics, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Expected squared error of one element when ``[low, high]`` is quantized with the spec's integers.

    Values are taken as uniform inside their bin, which makes the integral over a bin exact, clipped or not; zeros
    (of a relu) have no error. In units of the scale, with ``q`` the integer that ``u`` is rounded and clamped to
    (less the zero point)::

        F(u) = integral from 0 to u of (t - q(t))**2 dt = (q + 4 (u - q)**3) / 12

    and a bin of ``n`` values between ``a`` and ``b`` contributes ``n (F(b) - F(a)) / (b - a)``. Scale and zero
    point are those that ``choose_qparams`` will give, powers of two and rounding of the zero point included.

    Args:
        stats: the histogram.
        low, high: float64 ``[C, K]``, ``K`` candidates for each channel.

    Returns:
        float64 ``[C, K]``; infinite for an empty range.
    """
    qparams = choose_qparams(low, high, spec)
    width = stats.width.double()[:, None]
    scale = qparams.scale.double().view_as(low) / width
    zero = qparams.zero_point.double().view_as(low)
    edges, falls = _edges_and_falls(stats)
    rows = max(1, _CHUNK // (low.shape[1] * edges.shape[1]))
    parts = [
        _integrate(edges[i : i + rows], falls[i : i + rows], scale[i : i + rows], zero[i : i + rows], spec)
        for i in range(0, low.shape[0], rows)
    ]
    error = torch.cat(parts) * (scale**3 * width**2 / (12 * stats.counts.sum(1, keepdim=True)))
    return error.masked_fill_(low == high, float("inf"))


def _edges_and_falls(stats: HistogramStatistics) -> Range:
    """Bin edges in widths, and the density's fall at each: ``sum n (F(b) - F(a)) / (b - a) = sum F * fall``."""
    used = stats.counts.any(0).nonzero()
    first, last = int(used[0]), int(used[-1])
    edges = stats.unit_edges()
    # Two edges coincide in a channel of zeros only, where every range is right.
    density = stats.counts / edges.diff(dim=1).clamp(min=1.0)
    # What the middle bin has above its neighbours are zeros of a relu. They are quantized without error, while a
    # uniform bin of them would raise the estimate by a quarter.
    middle = density.shape[1] // 2
    neighbours = torch.maximum(density[:, middle - 1], density[:, middle + 1])
    density[:, middle] = torch.minimum(density[:, middle], neighbours)
    density, edges = density[:, first : last + 1], edges[:, first : last + 2]
    fall = torch.nn.functional.pad(density, (1, 0)) - torch.nn.functional.pad(density, (0, 1))
    return edges, fall


def _integrate(edges: Tensor, falls: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``sum over edges of 12 F * fall``, ``[C, K]``, for edges ``[C, B]`` and qparams ``[C, K]`` in widths."""
    u = edges[:, None, :] / scale[:, :, None]
    q = torch.clamp(torch.round(u), (spec.quant_min - zero)[:, :, None], (spec.quant_max - zero)[:, :, None])
    u -= q
    q.addcmul_(u.square(), u, value=4.0)
    return torch.bmm(q, falls[:, :, None])[:, :, 0]


class _Search:
    """The state of a search: the fraction of the observed low and high that is kept, float64 ``[C]`` each."""

    def __init__(self, stats: HistogramStatistics, spec: QuantSpec) -> None:
        self.stats, self.spec = stats, spec
        self.observed_low = stats.low.double().clamp(max=0.0)
        self.observed_high = stats.high.double().clamp(min=0.0)
        self.low = torch.ones_like(self.observed_low)
        self.high = torch.ones_like(self.observed_high)

    def shrink(self, *, low: bool = False, high: bool = False) -> None:
        """Set the chosen sides to the best of many common fractions; the present one stays unless one is better."""
        grid = _COARSE if low and high else torch.cat([_COARSE, torch.zeros(1, dtype=torch.float64)])
        present = (self.low if low else self.high)[:, None]
        best = self._best(torch.cat([present, grid.expand(len(present), -1)], 1), low, high)
        best = self._best(torch.cat([best, (best * _FINE).clamp(max=1.0)], 1), low, high)
        self.low = best[:, 0] if low else self.low
        self.high = best[:, 0] if high else self.high

    def _best(self, fractions: Tensor, low: bool, high: bool) -> Tensor:
        """The column of ``fractions``, ``[C, K]``, with the smallest error, the first of equals: ``[C, 1]``."""
        lows = self.observed_low[:, None] * (fractions if low else self.low[:, None].expand_as(fractions))
        highs = self.observed_high[:, None] * (fractions if high else self.high[:, None].expand_as(fractions))
        error = expected_error(self.stats, lows, highs, self.spec)
        return fractions.gather(1, error.argmin(1, keepdim=True))

    def range(self) -> Range:
        """The range found, float32 ``[C]`` each."""
        return (self.observed_low * self.low).float(), (self.observed_high * self.high).float()
