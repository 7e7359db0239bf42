"""Range estimation: pure functions from statistics to the real range ``(low, high)`` to quantize.

All return float32 tensors ``[C]`` (``[1]`` per tensor). :func:`fxq.numerics.choose_qparams` extends a range to
contain zero; ``minmax_range`` and ``percentile_range`` leave that to it, the others return ranges with zero inside.

``mse_range`` and ``histogram_range`` minimise the same cost, the squared quantization error with clipping counted
:data:`CLIPPING` times. The first searches one number, by which the observed range shrinks as a whole; the second
moves low and high independently. For a symmetric spec only the longer side matters, so there they are the same.

Both search in two steps. A closed form judges hundreds of ranges at once: rounding costs ``scale**2 / 12`` a value,
clipping follows from sums over the histogram from its ends (:class:`_Tails`). Then :func:`expected_error`, exact
for the histogram, compares the best of them, their neighbours and the whole observed range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxq.numerics import choose_qparams
from fxq.spec import QuantSpec
from fxq.statistics import HistogramStatistics, Statistics

Range = tuple[Tensor, Tensor]

# A value's rounding error is as often up as down and averages out in the sums that follow; its clipping error is
# always to the same side and does not. Twice the weight is best or next to best on real and random-weight models.
CLIPPING = 2.0
_STEP = 2.0**-0.25
# Fractions of the observed bound: geometric, because an outlier may be 1000 times the rest.
_COARSE = _STEP ** torch.arange(0, 41, dtype=torch.float64)
# Then in between, around the best one, and once more around the best of these.
_FINE = [_STEP ** (reach * torch.linspace(-1, 1, 9, dtype=torch.float64)) for reach in (1.0, 0.2)]
# float64 numbers in a temporary of the error estimate, of which there are four: 256 KiB each stay in cache.
_CHUNK = 1 << 15


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


def entropy_range(stats: HistogramStatistics, spec: QuantSpec) -> Range:
    """The observed range, without what is larger than the bound that loses least information.

    Information is Kullback-Leibler divergence, the bound one for both signs.

    For each candidate, the reference distribution ``P`` is the histogram inside the range, with what is outside
    added to its outermost bins; ``Q`` is the histogram inside, where the bins that one integer stands for share
    their values evenly (empty bins stay empty). The candidate with the smallest ``sum P log(P / Q)`` wins. The
    narrowest candidate has one bin an integer, so with few bins (channels) there are few candidates.

    Source: S. Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017; here for signed and
    unsigned ranges, with geometric steps instead of one bin each.

    Example:
        >>> stats = HistogramStatistics()
        >>> stats.update(torch.cat([torch.randn(10_000), torch.tensor([100.0])]))
        >>> spec = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False)
        >>> bool(entropy_range(stats, spec)[1] < 100)
        True
    """
    low, high = stats.low.double().clamp(max=0.0)[:, None], stats.high.double().clamp(min=0.0)[:, None]
    octaves = max(0.0, math.log2(stats.bins / 2 / (spec.quant_max - spec.quant_min + 1)))
    bounds = torch.maximum(-low, high) * torch.logspace(0, -octaves, 1 + round(16 * octaves), base=2.0).double()
    lows, highs = torch.maximum(low, -bounds), torch.minimum(high, bounds)
    rows = zip(*_density(stats), stats.width.double(), lows, highs, strict=True)
    best = torch.stack([_divergence(edges * width, density, below, above, spec).argmin().reshape(1)
                        for edges, density, width, below, above in rows])  # fmt: skip
    return lows.gather(1, best)[:, 0].float(), highs.gather(1, best)[:, 0].float()


def _divergence(edges: Tensor, density: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """``sum P log(P / Q)`` of :func:`entropy_range` for the candidates ``[K]`` of one channel."""
    used = density > 0
    if not used.any():  # zeros alone
        return torch.zeros_like(low)
    mass = (density * edges.diff())[used]
    centres = ((edges[1:] + edges[:-1]) / 2)[used]
    qparams = choose_qparams(low, high, spec)
    level = centres / qparams.scale.double()[:, None] + qparams.zero_point[:, None]
    level = level.round_().clamp_(spec.quant_min, spec.quant_max).sub_(spec.quant_min).long()
    # At least the bin next to zero is inside.
    nearest = centres.abs() == centres.abs().min()
    inside = ((centres >= low[:, None]) & (centres <= high[:, None])) | nearest
    kept = torch.where(inside, mass, 0.0)
    levels = torch.zeros(len(low), spec.quant_max - spec.quant_min + 1, dtype=torch.float64)
    shared = levels.scatter_add(1, level, kept) / levels.scatter_add(1, level, inside.double())
    q = torch.where(inside, shared.gather(1, level), 0.0)
    below, above = (mass * ((centres < 0) & ~inside)).sum(1), (mass * ((centres > 0) & ~inside)).sum(1)
    ends = inside.double().argmax(1), inside.shape[1] - 1 - inside.double().flip(1).argmax(1)
    p = kept
    for end, outside in zip(ends, (below, above), strict=True):
        p = p.scatter_add(1, end[:, None], outside[:, None])
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return torch.where(inside, p * torch.log(p / q), 0.0).sum(1)


def mse_range(stats: HistogramStatistics, spec: QuantSpec) -> Range:
    """The observed range shrunk by the one ratio with the smallest cost.

    Example:
        >>> stats = HistogramStatistics()
        >>> stats.update(torch.cat([torch.randn(10_000), torch.tensor([100.0])]))
        >>> spec = QuantSpec(dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True)
        >>> bool(mse_range(stats, spec)[1] < 20)
        True
    """
    return _Search(stats, spec).together()


def histogram_range(stats: HistogramStatistics, spec: QuantSpec) -> Range:
    """Low and high, chosen independently for the smallest cost.

    Its cost is never above :func:`mse_range`'s, nor above min-max's. Returns the exact observed bound where no
    clipping is better, and zero for a side without data.
    """
    search = _Search(stats, spec)
    one_sided = spec.symmetric or not search.low.any() or not search.high.any()
    return search.together() if one_sided else search.apart()


def expected_error(
    stats: HistogramStatistics, low: Tensor, high: Tensor, spec: QuantSpec, clipping: float = 1.0
) -> Tensor:
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
        clipping: how many times the squared error of a value counts that is off by more than half a step.

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
        _integrate(edges[i : i + rows], falls[i : i + rows], scale[i : i + rows], zero[i : i + rows], spec, clipping)
        for i in range(0, low.shape[0], rows)
    ]
    error = torch.cat(parts) * (scale**3 * width**2 / (12 * stats.counts.sum(1, keepdim=True)))
    return error.masked_fill_(low == high, float("inf"))


def _density(stats: HistogramStatistics) -> Range:
    """Edges of the bins ``[C, B + 1]`` and values per width in them ``[C, B]``, both in widths."""
    edges = stats.unit_edges()
    # Two edges coincide in a channel of zeros only, where every range is right.
    density = stats.counts / edges.diff(dim=1).clamp(min=1.0)
    # What the middle bin has above its neighbours are zeros of a relu. They are quantized without error, while a
    # uniform bin of them would raise the estimate by a quarter.
    middle = density.shape[1] // 2
    neighbours = torch.maximum(density[:, middle - 1], density[:, middle + 1])
    density[:, middle] = torch.minimum(density[:, middle], neighbours)
    return edges, density


def _edges_and_falls(stats: HistogramStatistics) -> Range:
    """Bin edges in widths, and the density's fall at each: ``sum n (F(b) - F(a)) / (b - a) = sum F * fall``."""
    used = stats.counts.any(0).nonzero()
    first, last = int(used[0]), int(used[-1])
    edges, density = _density(stats)
    density, edges = density[:, first : last + 1], edges[:, first : last + 2]
    fall = torch.nn.functional.pad(density, (1, 0)) - torch.nn.functional.pad(density, (0, 1))
    return edges, fall


def _integrate(
    edges: Tensor, falls: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, clipping: float
) -> Tensor:
    """``sum over edges of 12 F * fall``, ``[C, K]``, for edges ``[C, B]`` and qparams ``[C, K]`` in widths."""
    u = edges[:, None, :] / scale[:, :, None]
    q = torch.clamp(torch.round(u), (spec.quant_min - zero)[:, :, None], (spec.quant_max - zero)[:, :, None])
    u -= q
    if clipping != 1.0:
        rounding = u.clamp(-0.5, 0.5)
        q.addcmul_(rounding.square().mul_(rounding), torch.tensor(4.0 * (1 - clipping), dtype=torch.float64))
    q.addcmul_(u.square(), u, value=4.0 * clipping)
    return torch.bmm(q, falls[:, :, None])[:, :, 0]


class _Tails:
    """Number of values beyond a bound, and the sum of their squared distances to it, on one side of zero.

    With ``n[i]`` the values between ``i`` and ``i + 1`` widths from zero, uniform there, the sums beyond a whole
    bound ``j`` follow from the ones beyond ``j + 1``: ``N = N' + n``, first moment ``A = A' + N' + n / 2``, second
    ``S = S' + 2 A' + N' + n / 3``.
    """

    def __init__(self, cells: Tensor) -> None:
        def from_the_end(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values.flip(1).cumsum(1).flip(1), (0, 1))

        self.number = from_the_end(cells)
        beyond = self.number[:, 1:]
        first = from_the_end(beyond + cells / 2)
        self.squares = from_the_end(2 * first[:, 1:] + beyond + cells / 3)

    def beyond(self, bound: Tensor) -> Range:
        """Number and squares beyond bounds ``[C, K]`` in widths, between whole bounds linearly."""
        bound = bound.clamp(max=self.number.shape[1] - 1.001)
        whole = bound.long()
        part = bound - whole
        number, squares = (
            values.gather(1, whole).lerp(values.gather(1, whole + 1), part) for values in (self.number, self.squares)
        )
        return number, squares


class _Search:
    """Candidates are fractions of the observed low and high, and are judged by their cost."""

    def __init__(self, stats: HistogramStatistics, spec: QuantSpec) -> None:
        self.stats, self.spec = stats, spec
        self.low = stats.low.double().clamp(max=0.0)[:, None]
        self.high = stats.high.double().clamp(min=0.0)[:, None]
        _, density = _density(stats)
        middle = density.shape[1] // 2
        negative, positive = density[:, : middle + 1].flip(1), density[:, middle:].clone()
        negative[:, 0].masked_fill_(stats.low >= 0, 0.0)
        positive[:, 0].masked_fill_(stats.high <= 0, 0.0)
        self.below, self.above = _Tails(negative), _Tails(positive)

    def together(self) -> Range:
        """The best fraction common to both sides."""
        fraction = self._together()
        return self._range(fraction, fraction)

    def apart(self) -> Range:
        """The best fraction of each side."""
        together = self._together()
        zero = torch.zeros(1, dtype=torch.float64)
        pairs = torch.cartesian_prod(torch.cat([_COARSE, zero]), torch.cat([_COARSE, zero]))
        low, high = self._coarse(pairs[:, 0], pairs[:, 1])
        low, high = self._best(torch.cat([together, low], 1), torch.cat([together, high], 1))
        for fine in _FINE:
            near = self._near(high, fine)
            low, high = self._best(low.expand_as(near), near)
            near = self._near(low, fine)
            low, high = self._best(near, high.expand_as(near))
        return self._range(low, high)

    def _together(self) -> Tensor:
        fraction, _ = self._coarse(_COARSE, _COARSE)
        for fine in _FINE:
            near = self._near(fraction, fine)
            fraction, _ = self._best(near, near)
        return fraction

    @staticmethod
    def _near(fraction: Tensor, fine: Tensor) -> Tensor:
        """``[C, K]``: all of the observed bound, the fraction itself, and some around it."""
        return torch.cat([torch.ones_like(fraction), fraction, (fraction * fine).clamp(max=1.0)], 1)

    def _coarse(self, low: Tensor, high: Tensor) -> Range:
        """The pair of fractions, ``[K]`` each, with the smallest cost by the closed form: ``[C, 1]`` each."""
        lows, highs = self.low * low, self.high * high
        qparams = choose_qparams(lows, highs, self.spec)
        scale = qparams.scale.double().view_as(lows) / self.stats.width.double()[:, None]
        zero = qparams.zero_point.double().view_as(lows)
        fewer, below = self.below.beyond((zero - self.spec.quant_min) * scale)
        more, above = self.above.beyond((self.spec.quant_max - zero) * scale)
        inside = self.below.number[:, :1] + self.above.number[:, :1] - fewer - more
        cost = CLIPPING * (below + above) + inside * scale.square() / 12
        best = cost.masked_fill_(lows == highs, float("inf")).argmin(1)
        return low[best][:, None], high[best][:, None]

    def _best(self, low: Tensor, high: Tensor) -> Range:
        """The pair of fractions, ``[C, K]`` each, with the smallest cost, the first of equals: ``[C, 1]`` each."""
        cost = expected_error(self.stats, self.low * low, self.high * high, self.spec, CLIPPING)
        best = cost.argmin(1, keepdim=True)
        return low.gather(1, best), high.gather(1, best)

    def _range(self, low: Tensor, high: Tensor) -> Range:
        """The range of fractions ``[C, 1]``, float32 ``[C]`` each."""
        return (self.low * low)[:, 0].float(), (self.high * high)[:, 0].float()
