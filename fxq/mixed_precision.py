"""Mixed precision by budget: keep the fewest layers float that hold a quantized model within what it may lose.

Layers are ranked by the SQNR of the output when each alone is quantized. Then int8 models are made with the first k
layers of that ranking float: k = 0, 1, 2, 4, ... until one is good enough, and by bisection down to the smallest such
k. At last each of the k layers is quantized again, the least sensitive first; it stays float only if the model is not
good enough otherwise, and what it was then is what the layer costs. With n layers that is n runs of a fake-quantized
model on a few samples, and about 2 log2(k) + k int8 models to judge.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from fxq.calibration import ForwardFn, shows_progress
from fxq.errors import ConfigError, FxqWarning, InputError
from fxq.layers import Layer, each_alone, with_float
from fxq.measures import Metric, OutputSqnr, evaluate
from fxq.partition import regions_of
from fxq.spread import spread_samples

# Samples of the calibration data that a target in dB is measured with, and those that layers are ranked with: their
# order needs fewer, and ranking takes most of the time. Where only forward_fn knows what a batch is, it is not cut.
TARGET_SAMPLES = 32
RANKING_SAMPLES = 16

Convert = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Budget:
    """What a quantized model may lose: ``max_drop`` of a metric, or the SQNR of its output may fall to ``sqnr`` dB.

    Example:
        >>> Budget.parse(None, None, "sqnr:30").sqnr
        30.0
    """

    metric: Metric | None = None
    max_drop: float = 0.0
    sqnr: float = 0.0

    @classmethod
    def parse(cls, metric: Metric | None, max_drop: float | None, target: str | None) -> Budget | None:
        """The budget that the options of :func:`fxq.quantize` ask for, ``None`` if they are not given.

        Raises:
            ConfigError: if they contradict each other or are malformed.
        """
        if target is not None:
            if metric is not None or max_drop is not None:
                raise ConfigError("give either target='sqnr:30', or metric= with max_drop=, not both")
            return cls(sqnr=_decibels(target))
        if metric is None and max_drop is None:
            return None
        if metric is None or max_drop is None:
            given, missing = ("metric", "max_drop") if max_drop is None else ("max_drop", "metric")
            raise ConfigError(f"{given}= needs {missing}=: metric(model) is judged against the float model's")
        if not callable(metric):
            raise ConfigError(f"metric is a {type(metric).__name__}; give a function: metric(model) -> float")
        if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not 0 <= max_drop < math.inf:
            raise ConfigError(f"max_drop={max_drop!r}: give a number of at least 0, in the units of the metric")
        return cls(metric, float(max_drop))


def _decibels(target: str) -> float:
    kind, _, number = target.partition(":") if isinstance(target, str) else ("", "", "")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind != "sqnr" or not math.isfinite(value):
        raise ConfigError(f"target={target!r}: write 'sqnr:30' for an output SQNR of at least 30 dB")
    return value


class Judge:
    """Says whether int8 models are good enough for a budget.

    Args:
        model: the float model.
        batches: to measure the SQNR on, if that is the budget.
        budget: what a model may lose.
        forward_fn: as for :func:`fxq.quantize`.

    Raises:
        ConfigError: if the metric returns no number.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], budget: Budget, forward_fn: ForwardFn | None) -> None:
        self.model, self.batches, self.budget, self.forward_fn = model, batches, budget, forward_fn
        self.sqnr = self.output_sqnr(TARGET_SAMPLES)
        self.best = math.inf if budget.metric is None else evaluate(budget.metric, model)

    def output_sqnr(self, samples: int) -> OutputSqnr:
        """The SQNR to the float model's output on so many samples."""
        chosen = spread_samples(self.batches, samples, whole=self.forward_fn is not None)
        return OutputSqnr(self.model, chosen, self.forward_fn)

    def score(self, candidate: nn.Module) -> float:
        """How good a model is: the metric, or the SQNR in dB."""
        return self.sqnr(candidate) if self.budget.metric is None else evaluate(self.budget.metric, candidate)

    def is_enough(self, score: float) -> bool:
        """Whether the budget is met."""
        return score >= (self.budget.sqnr if self.budget.metric is None else self.best - self.budget.max_drop)

    @property
    def limit(self) -> str:
        """The budget in words."""
        if self.budget.metric is None:
            return f"the target is {self.budget.sqnr:g} dB"
        return f"max_drop={self.budget.max_drop:g} from {self.best:.4g}"

    def named(self, score: float, is_sqnr: bool = False) -> str:
        """A score in words; ``is_sqnr`` if it is one where the budget is of a metric."""
        return f"SQNR {score:.1f} dB" if is_sqnr or self.budget.metric is None else f"metric {score:.4g}"


def within_budget(
    prepared: nn.Module, judge: Judge, *, convert: Convert, lower: Convert, progress: bool | None
) -> nn.Module:
    """The calibrated model with the fewest layers float that meets a budget, still to be converted.

    Args:
        prepared: calibrated; unchanged.
        judge: of int8 models; layers are ranked on its batches.
        convert: makes a reference graph of a prepared model, to rank layers with.
        lower: makes the int8 model to judge of a prepared model, with all its corrections.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        ConfigError: if the metric returns no number, or if not even the model with all layers float is good enough.
    """
    return _Search(prepared, judge, convert, lower, shows_progress(progress)).run()


def if_enough(refined: nn.Module, otherwise: nn.Module, judge: Judge, lower: Convert, what: str) -> nn.Module:
    """One of two reference graphs: the first if it meets the budget, which the other is known to; notes which.

    Args:
        refined: of the layers that :func:`within_budget` chose with other corrections.
        otherwise: with the corrections it chose them with.
        judge: of int8 models.
        lower: makes the int8 model of a reference graph.
        what: was done to the first.
    """
    score = judge.score(lower(refined))
    enough = judge.is_enough(score)
    note = f"with {what} {judge.named(score)}" + ("" if enough else ": too low, so they are not used")
    chosen = refined if enough else otherwise
    plan = next(iter(regions_of(chosen).values())).plan
    plan.notes = [*plan.notes, note]
    return chosen


class _Search:
    def __init__(self, prepared: nn.Module, judge: Judge, convert: Convert, lower: Convert, show: bool) -> None:
        self.prepared, self.judge, self.budget = prepared, judge, judge.budget
        self.ranked_by = judge.output_sqnr(RANKING_SAMPLES)
        self.convert, self.lower, self.show = convert, lower, show
        self.scores: dict[frozenset[Layer], float] = {}
        self.no_sqnr = False
        self.bar = tqdm(desc="int8 models judged", disable=not show)

    def run(self) -> nn.Module:
        score = self._score([])
        if self.judge.is_enough(score):
            return self._noted(f"{self.judge.named(score)}: {self.judge.limit}, no layer had to stay float", {})
        ranking = self._rank()
        chosen = self._fewest(ranking)
        costs = self._give_back([layer for layer, _ in chosen])
        alone, named = dict(ranking), self.judge.named
        details = {
            layer: f"alone in int8 {named(alone[layer], not self.no_sqnr)}; int8 here too {named(cost)}"
            for layer, cost in costs.items()
        }
        final = self.judge.named(self._score(list(costs)))
        kept = f"{len(costs)} of {len(ranking)} layers float"
        return self._noted(f"{final} with {kept}: {self.judge.limit}; all in int8, {self.judge.named(score)}", details)

    def _score(self, floats: Sequence[Layer]) -> float:
        """How good the int8 model is with these layers float."""
        key = frozenset(floats)
        if key not in self.scores:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FxqWarning)
                candidate = self.lower(with_float(self.prepared, dict.fromkeys(floats, "")))
            self.bar.update()
            self.scores[key] = self.judge.score(candidate)
        return self.scores[key]

    def _rank(self) -> list[tuple[Layer, float]]:
        """Layers with what the output is when each alone is int8, the most sensitive first."""

        def alone(candidate: nn.Module) -> float:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FxqWarning)
                reference = self.convert(candidate)
            return self.judge.score(reference) if self.no_sqnr else self.ranked_by(reference)

        try:
            found = each_alone(self.prepared, alone, show=self.show)
        except InputError:
            if self.budget.metric is None:
                raise
            self.no_sqnr = True  # as for boxes, whose number differs
            found = each_alone(self.prepared, alone, show=self.show)
        return sorted(found, key=lambda pair: pair[1])

    def _fewest(self, ranking: list[tuple[Layer, float]]) -> list[tuple[Layer, float]]:
        """The shortest beginning of the ranking that is enough, as far as doubling and bisection see."""

        def enough(count: int) -> bool:
            return self.judge.is_enough(self._score([layer for layer, _ in ranking[:count]]))

        low, high = 0, 1
        while not enough(high):
            if high == len(ranking):
                hint = "lower it" if self.budget.metric is None else "is the metric the same each time it is called?"
                score = self.judge.named(self._score([layer for layer, _ in ranking]))
                raise ConfigError(
                    f"not even with all {len(ranking)} layers float is the model good enough: {score}, but "
                    f"{self.judge.limit}; {hint}"
                )
            low, high = high, min(2 * high, len(ranking))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return ranking[:high]

    def _give_back(self, floats: list[Layer]) -> dict[Layer, float]:
        """The layers that cannot be int8, each with how good the model is when it is."""
        costs: dict[Layer, float] = {}
        for layer in reversed(floats):
            others = [other for other in floats if other is not layer]
            score = self._score(others)
            if self.judge.is_enough(score):
                floats = others
            else:
                costs[layer] = score
        return {layer: costs[layer] for layer in floats}

    def _noted(self, note: str, details: dict[Layer, str]) -> nn.Module:
        self.bar.close()
        found = with_float(self.prepared, details)
        next(iter(regions_of(found).values())).plan.notes.append(note)
        return found
