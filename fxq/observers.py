"""The module that watches a tensor during calibration, and the table of the ways to choose its range.

An observer is statistics (:mod:`fxq.statistics`) plus a range function (:mod:`fxq.ranges`): one row of
:data:`OBSERVERS`. A new kind of observer is one more row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxq.errors import CalibrationError, ConfigError
from fxq.numerics import choose_qparams
from fxq.ranges import Range, entropy_range, histogram_range, minmax_range, mse_range, percentile_range
from fxq.spec import QParams, QuantSpec
from fxq.statistics import HistogramStatistics, MinMaxStatistics, MovingAverageStatistics, Statistics

Bounds = tuple[float | None, float | None]

# How much of one activation enters a histogram: this many elements, or this share of a large batch if that is more.
# Counting costs 10 times as much as finding the extremes.
SAMPLE_SIZE = 1 << 14
SAMPLE_SHARE = 1 / 64
_AT_ONCE = 8  # histograms whose ranges are searched together


class ObserverKind(NamedTuple):
    """One way to observe: what is kept of the data, and how the range follows from it.

    ``estimate(statistics, spec, argument)`` gives ``(low, high)``; ``argument`` is the number after the colon in
    ``spec.observer``, by default ``default``. ``default`` is ``None`` for a kind that takes no number.
    """

    statistics: Callable[[int | None], Statistics]
    estimate: Callable[[Any, QuantSpec, float], Range]
    default: float | None = None


OBSERVERS: dict[str, ObserverKind] = {
    "minmax": ObserverKind(MinMaxStatistics, lambda stats, spec, _: minmax_range(stats)),
    "moving_average": ObserverKind(MovingAverageStatistics, lambda stats, spec, _: minmax_range(stats)),
    "histogram": ObserverKind(HistogramStatistics, lambda stats, spec, _: histogram_range(stats, spec)),
    "percentile": ObserverKind(HistogramStatistics, lambda stats, spec, p: percentile_range(stats, p), default=99.99),
    "mse": ObserverKind(HistogramStatistics, lambda stats, spec, _: mse_range(stats, spec)),
    "entropy": ObserverKind(HistogramStatistics, lambda stats, spec, _: entropy_range(stats, spec)),
}


def parse_observer(name: str) -> tuple[ObserverKind, float]:
    """The row and the argument that an observer's name stands for.

    Raises:
        ConfigError: for an unknown name, or a number that is missing, malformed or not wanted.

    Example:
        >>> parse_observer("percentile:99.9")[1]
        99.9
    """
    base, colon, text = name.partition(":")
    if base not in OBSERVERS:
        raise ConfigError(f"unknown observer {name!r}; use one of {', '.join(OBSERVERS)}")
    kind = OBSERVERS[base]
    if not colon:
        return kind, kind.default if kind.default is not None else 0.0
    if kind.default is None:
        raise ConfigError(f"observer {name!r}: {base} takes no number; write {base!r}")
    try:
        argument = float(text)
    except ValueError:
        argument = float("nan")
    if not 50.0 < argument <= 100.0:
        raise ConfigError(f"observer {name!r}: {text!r} is not a percentage above 50 and up to 100; try '{base}:99.99'")
    return kind, argument


def sample_limit(numel: int) -> int:
    """The most elements counted of a tensor with ``numel`` elements."""
    return max(SAMPLE_SIZE, int(numel * SAMPLE_SHARE))


def sampling_step(numel: int) -> int:
    """How many elements to go forward for the next one to count: 1 up to ``SAMPLE_SIZE`` elements.

    The smallest step that leaves at most :func:`sample_limit` and has no factor in common with ``numel``, hence with
    no dimension of the tensor: every channel, row and column is sampled alike.
    """
    step = max(1, -(-numel // sample_limit(numel)))
    while math.gcd(step, numel) > 1:
        step += 1
    return step


ENOUGH = 3000  # values, of which the extremes are those of values to come
_FEWEST = 8  # values that tell any range


class Observer(torch.nn.Module):
    """Records the statistics of a tensor that passes through it unchanged, and chooses qparams from them.

    Of a per-tensor activation with more than ``SAMPLE_SIZE`` elements, a histogram counts a regular sample (see
    :func:`sampling_step`), the same at every run, and the tails in full; its extremes come from all elements. Channels
    are counted in full: they are weights, seen once.

    Args:
        spec: what the tensor will be quantized to; ``spec.observer`` is a name of :data:`OBSERVERS`.
        bounds: real limits that the chosen range is clipped to, ``None`` for no limit. After a relu6 that the
            producer's saturation will do: ``(0.0, 6.0)``.

    Attributes:
        enabled: when False, ``forward`` does nothing.
        batches: batches recorded.
        where: the node it watches, for error messages.
        statistics: the :class:`~fxq.statistics.Statistics` recorded so far.

    Raises:
        ConfigError: for an unknown observer, or bounds that are empty.

    Example:
        >>> observer = Observer(QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False,
        ...                               observer="minmax"))
        >>> _ = observer(torch.tensor([-0.5, 4.6]))
        >>> observer
        Observer(minmax, uint8 affine per-tensor, batches=1, range=[-0.5, 4.6])
        >>> observer.qparams().zero_point.item()
        25
    """

    statistics: Statistics

    def __init__(self, spec: QuantSpec, bounds: Bounds = (None, None)) -> None:
        super().__init__()
        parse_observer(spec.observer)  # fail here, not at the first batch
        if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
            raise ConfigError(f"observer bounds {bounds} are empty: the first must not be above the second")
        self.spec = spec
        self.bounds = bounds
        self.enabled = True
        self.where = "a tensor"
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        kind, _ = parse_observer(self.spec.observer)
        self.statistics = kind.statistics(self.spec.ch_axis)
        self.batches = 0
        self._range: Range | None = None

    @property
    def has_data(self) -> bool:
        """Whether any element was recorded."""
        return self.statistics.count > 0

    def forward(self, x: Tensor) -> Tensor:
        """Record ``x`` (floating, any shape) and return it, the same object.

        Raises:
            CalibrationError: if ``x`` is not floating or has values that are not finite.
        """
        if self.enabled:
            try:
                with torch.no_grad():
                    self.statistics.update(x, 1 if self.spec.per_channel else sampling_step(x.numel()))
            except CalibrationError as error:
                raise CalibrationError(
                    f"{self.where}, batch {self.batches}: {error}; look at what the model computes there, or exclude it"
                ) from error
            # Past nn.Module.__setattr__, which costs as much as counting some thousand elements.
            self.__dict__["batches"] += 1
            self.__dict__["_range"] = None
        return x

    def range(self) -> Range:
        """The real range chosen, with zero inside and inside :attr:`bounds`: float32 ``[C]`` each.

        Raises:
            CalibrationError: if nothing was recorded.
        """
        if not self.has_data:
            raise CalibrationError(
                f"the {self.spec.observer} observer has seen no data; calibrate with at least one batch"
            )
        if self._range is None:  # a search takes milliseconds, and printing a model asks every observer
            self._settle(*_estimate(self.statistics, self.spec))
        assert self._range is not None
        return self._range

    def _settle(self, low: Tensor, high: Tensor) -> None:
        room = self._headroom()
        self._range = self._clip(low * room).clamp(max=0.0), self._clip(high * room).clamp(min=0.0)

    def _headroom(self) -> float:
        """The part by which values to come are larger than few values seen, as the scores of four images are.

        Of ``n`` normal numbers the largest is near ``sqrt(2 log n)`` deviations.
        """
        count, varied = self.statistics.count, bool((self.statistics.low < self.statistics.high).any())
        if not (self.enabled and varied and self.spec.observer == "histogram" and 1 < count < ENOUGH):
            return 1.0
        return math.sqrt(math.log(ENOUGH) / math.log(max(count, _FEWEST)))

    def _clip(self, values: Tensor) -> Tensor:
        return values if self.bounds == (None, None) else values.clamp(*self.bounds)

    def qparams(self) -> QParams:
        """Scale and zero point for the range chosen.

        Raises:
            CalibrationError: if nothing was recorded.
        """
        return choose_qparams(*self.range(), self.spec)

    def vanishing(self) -> float:
        """The part of the values seen that the range chosen rounds to zero; 0.0 where no histogram tells."""
        stats = self.statistics
        if not isinstance(stats, HistogramStatistics) or not self.has_data or self.spec.per_channel:
            return 0.0
        edges = (stats.unit_edges() * stats.width.double()[:, None])[0]
        near = torch.maximum(edges[:-1].abs(), edges[1:].abs()) <= self.qparams().scale.item() / 2
        counts = stats.counts[0].double()
        return float(counts[near].sum() / counts.sum())

    def merge(self, other: Observer) -> None:
        """Add what ``other`` recorded, as if its batches had come after these.

        Raises:
            CalibrationError: if the two observe differently.
        """
        if self.spec != other.spec:
            raise CalibrationError(f"cannot merge an observer of '{other.spec}' into one of '{self.spec}'")
        self.statistics = self.statistics.merge(other.statistics)
        self.batches += other.batches
        self._range = None

    def get_extra_state(self) -> dict[str, Any]:
        """The statistics, for ``state_dict``: tensors and integers only."""
        return {"batches": self.batches, "statistics": self.statistics.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_extra_state`'s result."""
        self.statistics = type(self.statistics).from_state(state["statistics"])
        self.batches = state["batches"]
        self._range = None

    def extra_repr(self) -> str:
        """``histogram, uint8 affine per-tensor, batches=2, range=[-0.5, 5.9]``."""
        name = self.spec.observer
        text = f"{name}, {str(self.spec).removesuffix(' ' + name)}, batches={self.batches}"
        if self.has_data:
            low, high = self.range()
            text += f", range=[{low.min().item():.4g}, {high.max().item():.4g}]"
        if self.bounds != (None, None):
            text += f", bounds={list(self.bounds)}"
        return text


def make_observer(spec: QuantSpec, bounds: Bounds = (None, None)) -> Observer:
    """The observer that ``spec.observer`` names.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    return Observer(spec, bounds)


def settle_ranges(observers: Iterable[Observer]) -> None:
    """Choose the ranges that observers with data have not chosen yet; those of histograms together.

    A search consists of hundreds of operations on small tensors: for some tensors at once it takes little longer. What
    it holds of each is half a MiB, so that they are not all searched at once.
    """
    alike: dict[tuple[Any, ...], list[tuple[Observer, HistogramStatistics]]] = defaultdict(list)
    for observer in observers:
        stats = observer.statistics
        if observer.has_data and observer._range is None and isinstance(stats, HistogramStatistics):
            # Ranges of one sign are searched in another way than those of both.
            negative, positive = bool((stats.low < 0).any()), bool((stats.high > 0).any())
            alike[observer.spec, stats.bins, negative, positive].append((observer, stats))
    for (spec, *_), members in alike.items():
        for start in range(0, len(members), _AT_ONCE):
            _settle_together(members[start : start + _AT_ONCE], spec)


def _settle_together(group: list[tuple[Observer, HistogramStatistics]], spec: QuantSpec) -> None:
    together = [stats for _, stats in group]
    low, high = _estimate(HistogramStatistics.stacked(together), spec)
    sizes = [stats.low.numel() for stats in together]
    for (observer, _), *ends in zip(group, low.split(sizes), high.split(sizes), strict=True):
        observer._settle(*ends)


def _estimate(statistics: Statistics, spec: QuantSpec) -> Range:
    kind, argument = parse_observer(spec.observer)
    with torch.no_grad():
        return kind.estimate(statistics, spec, argument)
