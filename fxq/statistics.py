"""What was seen of a tensor, apart from how a range is chosen from it (:mod:`fxq.ranges`).

Statistics are plain values: they can be updated batch by batch, merged, and turned into plain tensors and
integers. ``merge(stats(a), stats(b))`` equals ``stats(cat(a, b))`` exactly, so calibration can be split over
processes without changing its result. Inside, channels come first; a per-tensor statistic has one channel.

Keeping the two apart follows AIMET's ``EncodingAnalyzer``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fxq.errors import CalibrationError

if TYPE_CHECKING:
    from typing_extensions import Self

State = dict[str, "Tensor | int | None"]

TENSOR_BINS = 4096
# A weight of 2048 channels would need 64 MB with 4096 bins each; with 512 a bin is still about one step of 8 bits.
CHANNEL_BINS = 512
# Narrowest bin, 2**MIN_EXPONENT. It and the widest, 2**120, are normal float32 numbers, as are their reciprocals.
MIN_EXPONENT = -100
# Elements binned at a time: large enough to hide the call's overhead, small enough for temporaries to stay in cache.
_CHUNK = 1 << 18
# Elements that int32 can count in one bin, with room for those that a sample stands for and that do not exist.
_MOST_IN_INT32 = 1 << 30
# Elements of a sample beyond which all elements are counted, on either side.
_TAIL = 16
_ROWS = 64


class Statistics:
    """Base of the three statistics: checks and reshapes a batch, then hands it to :meth:`_add`.

    Args:
        ch_axis: axis of the channels of the tensors to come, ``None`` for one statistic a tensor. The number
            of channels ``C`` is learnt at the first update (1 for ``None``).

    Attributes:
        count: elements seen, over all channels.
        low, high: float32 ``[C]``, ``[0]`` before the first update. What they are is the subclass's matter.
    """

    _FIELDS: ClassVar[tuple[str, ...]] = ("ch_axis", "count", "low", "high")

    def __init__(self, ch_axis: int | None = None) -> None:
        self.ch_axis = ch_axis
        self.count = 0
        self.low = torch.empty(0)
        self.high = torch.empty(0)

    def update(self, x: Tensor, every: int = 1) -> None:
        """Add one batch.

        Args:
            x: floating tensor of any shape; converted to float32. An empty one is ignored.
            every: count only every n-th element of each channel, in memory order (only histograms count). Without
                channels each then counts ``n`` times, and values near the extremes are counted among all elements.
                The extremes themselves always come from all.

        Raises:
            CalibrationError: if ``x`` has NaN or inf, is not floating, or has another number of channels.
        """
        if not x.is_floating_point():
            raise CalibrationError(f"a tensor of {x.dtype} cannot be observed; only floating tensors are quantized")
        if x.numel() == 0:
            return
        x = _channels_first(x.detach().to(torch.float32), self.ch_axis)
        ends = _ends(x) if every > 1 and self.ch_axis is None else x
        low, high = _min_max(ends)
        if self.count and low.numel() != self.low.numel():
            raise CalibrationError(f"saw {low.numel()} channels after {self.low.numel()} on axis {self.ch_axis}")
        if every > 1:
            self._add_part(x, ends, low, high, every)
        else:
            self._add(x, low, high)
        self.count += x.numel()

    def merge(self, other: Self) -> Self:
        """The statistics of both data, this one's first; neither argument is changed.

        Raises:
            CalibrationError: if the two are of different kinds or numbers of channels.
        """
        if type(self) is not type(other) or self.ch_axis != other.ch_axis:
            raise CalibrationError(
                f"cannot merge {type(self).__name__} on axis {self.ch_axis} with {type(other).__name__} "
                f"on axis {other.ch_axis}"
            )
        if not self.count or not other.count:
            return copy.deepcopy(self if self.count else other)
        if self.low.numel() != other.low.numel():
            raise CalibrationError(f"cannot merge statistics of {self.low.numel()} and {other.low.numel()} channels")
        merged = copy.deepcopy(self)
        merged._merge(other)
        merged.count += other.count
        return merged

    def state(self) -> State:
        """Everything needed to rebuild it: tensors and integers by name."""
        values = {name: getattr(self, name) for name in self._FIELDS}
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The statistics whose :meth:`state` was ``state``.

        Raises:
            CalibrationError: if ``state`` is not a state of this class.
        """
        if set(state) != set(cls._FIELDS):
            raise CalibrationError(f"{cls.__name__} has the fields {sorted(cls._FIELDS)}, not {sorted(state)}")
        result = cls.__new__(cls)
        for name, value in state.items():
            setattr(result, name, value.clone() if isinstance(value, Tensor) else value)
        return result

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Add a finite batch ``x``, float32 ``[C, N]``, whose extremes are ``low`` and ``high``, ``[C]``."""
        raise NotImplementedError

    def _add_part(self, x: Tensor, ends: Tensor, low: Tensor, high: Tensor, every: int) -> None:
        """As :meth:`_add`, but look only at every n-th element; ``ends`` are those of :func:`_ends`."""
        self._add(x[:, ::every], low, high)

    def _merge(self, other: Self) -> None:
        """Add ``other``; neither is empty and the channels agree."""
        raise NotImplementedError


class MinMaxStatistics(Statistics):
    """Smallest and largest value of each channel: ``low`` and ``high``.

    Example:
        >>> stats = MinMaxStatistics()
        >>> stats.update(torch.tensor([[-1.0, 2.0]]))
        >>> stats.low.item(), stats.high.item(), stats.count
        (-1.0, 2.0, 2)
    """

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.low = torch.minimum(self.low, low) if self.count else low
        self.high = torch.maximum(self.high, high) if self.count else high

    def _merge(self, other: Self) -> None:
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)


class MovingAverageStatistics(Statistics):
    """Exponential moving averages of each batch's minimum (``low``) and maximum (``high``).

    ``average += 0.01 * (batch - average)``, starting at the first batch: Jacob et al. (arXiv:1712.05877),
    section 3.1. Kept in float64. Merging is exact up to float tolerance: the merged average is
    ``b + 0.99**n (a - first batch of b)`` for the ``n`` batches of ``b``, which follows from writing both sums out.

    Attributes:
        batches: non-empty batches seen.
        first_low, first_high: float64 ``[C]``, extremes of the first batch.
    """

    CONSTANT: ClassVar[float] = 0.01
    _FIELDS = (*Statistics._FIELDS, "batches", "first_low", "first_high")

    def __init__(self, ch_axis: int | None = None) -> None:
        super().__init__(ch_axis)
        self.batches = 0
        self.first_low = torch.empty(0, dtype=torch.float64)
        self.first_high = torch.empty(0, dtype=torch.float64)

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = low.double(), high.double()
        if self.batches:
            self.low = self.low + self.CONSTANT * (low - self.low)
            self.high = self.high + self.CONSTANT * (high - self.high)
        else:
            self.low, self.high, self.first_low, self.first_high = low, high, low, high
        self.batches += 1

    def _merge(self, other: Self) -> None:
        decay = (1 - self.CONSTANT) ** other.batches
        self.low = other.low + decay * (self.low - other.first_low)
        self.high = other.high + decay * (self.high - other.first_high)
        self.batches += other.batches


class HistogramStatistics(MinMaxStatistics):
    """Extremes, and exact counts on a grid whose bin width is a power of two.

    ::

        edges   -H*w ... -2w   -w         w    2w ... H*w        H = bins / 2, w = width
                  |  ...  |     |    0    |     |  ...  |
        bin       0       H-2      H-1       H     ..  2H-2      value x is in bin trunc(x / w) + H - 1

    ``w`` is the smallest power of two (not below ``2**-100``) with ``max |x| < H * w``. When the range grows,
    bins are added pairwise, ``trunc(trunc(x / w) / 2) = trunc(x / 2w)``: no count is ever split, so updating and
    merging are exact. Truncation instead of floor keeps the grid symmetric and makes underflow of ``x / w``
    harmless; the price is the middle bin's double width. Counting takes about 1.2 ns an element.

    Attributes:
        bins: ``2 * H``; by default 4096 per tensor and 512 per channel.
        counts: ``[C, bins - 1]``, int32 as long as that holds them: half the memory of int64.
        width: float32 ``[C]``, powers of two.
    """

    _FIELDS = (*Statistics._FIELDS, "bins", "counts", "width")

    def __init__(self, ch_axis: int | None = None, bins: int | None = None) -> None:
        super().__init__(ch_axis)
        self.bins = bins or (TENSOR_BINS if ch_axis is None else CHANNEL_BINS)
        self.counts = torch.empty(0, self.bins - 1, dtype=torch.int32)
        self.width = torch.empty(0)

    def unit_edges(self) -> Tensor:
        """Edges of the bins in units of :attr:`width`, float64 ``[C, bins]``: bin ``i`` is between ``i`` and ``i + 1``.

        The middle bin ends at zero on a side where nothing was seen.
        """
        half = self.bins // 2
        edges = torch.cat([torch.arange(-half, 0), torch.arange(1, half + 1)]).double()
        edges = edges.repeat(self.low.numel(), 1)
        edges[self.low >= 0, half - 1] = 0.0
        edges[self.high <= 0, half] = 0.0
        return edges

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        """Statistics that have those of several tensors as channels; their ``count`` is that of all."""
        result = cls(0, parts[0].bins)
        result.count = sum(part.count for part in parts)
        for name in ("low", "high", "counts", "width"):
            setattr(result, name, torch.cat([getattr(part, name) for part in parts]))
        return result

    def update(self, x: Tensor, every: int = 1) -> None:
        self._make_room(x.numel())
        super().update(x, every)

    def _make_room(self, more: int) -> None:
        if self.count + more > _MOST_IN_INT32:
            self.counts = self.counts.long()

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self._cover(low, high)
        _count_into(self.counts, x, self.width.reciprocal())
        super()._add(x, low, high)

    def _cover(self, low: Tensor, high: Tensor) -> None:
        """Make bins as wide as these extremes need."""
        if not self.count:
            self.width = _grid_width(low, high, self.bins)
            self.counts = torch.zeros(low.numel(), self.bins - 1, dtype=self.counts.dtype)
        elif self._outside(low, high):
            self._widen(_grid_width(low, high, self.bins))

    def _add_part(self, x: Tensor, ends: Tensor, low: Tensor, high: Tensor, every: int) -> None:
        """A sample, each of its elements ``every`` times, whose tails are exchanged for those of ``x`` itself.

        A tail begins at the sample's own ``_TAIL``-th smallest or largest value. A sample alone would miss most of
        the rare large values, and a range search would clip them as if they did not matter.
        """
        if self.ch_axis is not None:
            super()._add_part(x, ends, low, high, every)
            return
        self._cover(low, high)
        super()._add(x, low, high)
        sample = x[0, ::every].contiguous()
        tail = min(_TAIL, -(-len(sample) // 2))
        tails = torch.cat([sample.topk(tail, largest=False).values, sample.topk(tail).values])
        lower, upper = tails[tail - 1].item(), tails[-1].item()
        row, inverse_width = self.counts[0], self.width.reciprocal()
        row.add_(_histogram(sample, inverse_width, self.bins), alpha=every)
        if low.item() < lower or high.item() > upper:
            row.add_(_histogram(_beyond(ends[0], lower, upper), inverse_width, self.bins))
            row.sub_(_histogram(_beyond(tails, lower, upper), inverse_width, self.bins), alpha=every)

    def _merge(self, other: Self) -> None:
        if self.bins != other.bins:
            raise CalibrationError(f"cannot merge histograms of {self.bins} and {other.bins} bins")
        self._make_room(other.count)
        self._widen(other.width)
        self.counts += _coarsen(other.counts, other.width, self.width)
        super()._merge(other)

    def _outside(self, low: Tensor, high: Tensor) -> bool:
        """Whether any channel's extremes do not fit its grid."""
        # Python numbers: for the usual single channel a handful of tensor operations would cost more.
        half = self.bins // 2
        extremes = zip(low.tolist(), high.tolist(), self.width.tolist(), strict=True)
        return any(max(-a, b) >= half * width for a, b, width in extremes)

    def _widen(self, width: Tensor) -> None:
        """Go over to bins at least ``width`` (``[C]``) wide."""
        width = torch.maximum(self.width, width)
        self.counts = _coarsen(self.counts, self.width, width)
        self.width = width


def extremes(x: Tensor, ch_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a floating tensor, or of each of its channels: float32 ``[C]`` each.

    Raises:
        CalibrationError: if any value is not finite.
    """
    return _min_max(_channels_first(x.detach().to(torch.float32), ch_axis))


def _channels_first(x: Tensor, ch_axis: int | None) -> Tensor:
    """``[C, N]`` view of ``x`` where possible; ``[1, N]`` in memory order if there are no channels."""
    if ch_axis is None:
        if x.is_contiguous():
            return x.view(1, -1)
        # The order of elements does not matter here, and memory order spares channels-last tensors a copy.
        return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(1, -1)
    x = x.movedim(ch_axis, 0)
    return x.reshape(x.shape[0], -1)


def _min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes of each row of float32 ``[C, N]``; raises CalibrationError if any value is not finite."""
    if x.shape[0] == 1:
        low, high = (v.reshape(1) for v in torch.aminmax(x))
    else:
        low, high = x.amin(1), x.amax(1)  # aminmax with a dimension is 10 times slower
    # NaN propagates and inf is an extreme: looking at the extremes is as good as a pass over x.
    if not all(map(math.isfinite, low.tolist() + high.tolist())):
        nans, infs = int(x.isnan().sum()), int(x.isinf().sum())
        raise CalibrationError(f"{nans} NaN and {infs} inf among {x.numel()} values, as float32")
    return low, high


def _grid_width(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Smallest power of two ``w >= 2**MIN_EXPONENT`` with ``max(-low, high) < bins / 2 * w``, float32 ``[C]``."""
    magnitude = torch.maximum(-low, high)
    exponent = torch.frexp(magnitude).exponent  # magnitude < 2**exponent and >= 2**(exponent - 1)
    exponent = (exponent - (bins // 2).bit_length() + 1).clamp(min=MIN_EXPONENT)
    exponent = torch.where(magnitude > 0, exponent, MIN_EXPONENT)
    return torch.exp2(exponent.double()).float()  # exact: exp2 of an integer in float64


def _coarsen(counts: Tensor, width: Tensor, wider: Tensor) -> Tensor:
    """Counts ``[C, bins - 1]`` on bins ``width`` (``[C]``) wide, moved to bins ``wider`` (``[C]``)."""
    middle = counts.shape[1] // 2
    index = torch.arange(-middle, middle + 1)
    # Everything is in the middle long before 2**32; the ratio itself may not fit an integer.
    factor = (wider.double() / width.double()).clamp(max=2.0**32).to(torch.int64)[:, None]
    target = torch.div(index, factor, rounding_mode="trunc") + middle
    return torch.zeros_like(counts).scatter_add_(1, target, counts)


def _ends(x: Tensor) -> Tensor:
    """The extremes of columns of ``_ROWS`` elements of ``x``, float32 ``[1, N]``, and the elements that are left over.

    They have the extremes of ``x``, and stand for all elements far out: few columns have two there. Finding them takes
    no longer than the extremes alone.
    """
    columns = x[0, : x.shape[1] // _ROWS * _ROWS].view(_ROWS, -1)
    return torch.cat([columns.amin(0), columns.amax(0), x[0, columns.numel() :]])[None]


def _count_into(counts: Tensor, x: Tensor, inverse_width: Tensor) -> None:
    """Add the histogram of ``x``, float32 ``[C, N]``, to ``counts``, ``[C, bins - 1]``, in place.

    Scaling by a power of two is exact and a conversion to integers truncates, so bins are exact. Of torch's ways
    to count (ns per element, one core): this 1.3, int64 indices 7, ``histc`` 6 and off by one bin at edges,
    ``histogram`` 8.
    """
    channels, bins = counts.shape
    if channels == 1:
        row = counts[0]
        for chunk in x[0].split(_CHUNK) if x.shape[1] > _CHUNK else x:
            row += _histogram(chunk, inverse_width, bins + 1)
        return
    rows = max(1, min(_CHUNK // x.shape[1], _CHUNK // bins))
    for start in range(0, channels, rows):
        block = x[start : start + rows]
        index = (block * inverse_width[start : start + rows, None]).to(torch.int32)
        index += (torch.arange(len(block), dtype=torch.int32) * bins + bins // 2)[:, None]
        counts[start : start + rows] += torch.bincount(index.reshape(-1), minlength=len(block) * bins).view(-1, bins)


def _histogram(x: Tensor, inverse_width: Tensor, bins: int) -> Tensor:
    """How many of ``x``, float32 ``[N]``, are in each bin, ``[bins - 1]``; ``bins`` is even."""
    return torch.bincount((x * inverse_width).to(torch.int16).add_(bins // 2 - 1), minlength=bins - 1)


def _beyond(x: Tensor, lower: float, upper: float) -> Tensor:
    """The elements of ``x``, float32 ``[N]``, below ``lower`` or above ``upper``."""
    return x.masked_select((x < lower) | (x > upper))
