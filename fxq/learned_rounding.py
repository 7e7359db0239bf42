"""Learned rounding: whether each weight is rounded up or down is chosen by what that does to the layer's output.

Nearest rounding makes each weight's error smallest; the output's error is smallest when errors of the weights that
are added up cancel. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv:2004.10568),
relax the choice to ``h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)``, minimise the output's squared error by gradient
descent, and push ``h`` to 0 or 1 with the penalty ``1 - |2 h - 1| ** beta``, ``beta`` falling.

Here, layer by layer: inputs are the quantized model's, targets the float model's outputs, both clamped to the range
that the layer's quantized output can have. A sample of places is enough, since every place multiplies the same
weights. A quarter of the samples is held out, and a channel's new rounding is kept only if it is better on these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from tqdm import tqdm

from fxq.bias_correction import correct_layer
from fxq.calibration import ForwardFn, shows_progress
from fxq.graph_module import QuantModule
from fxq.lockstep import Step, lockstep
from fxq.ops import CONVS, LINEAR
from fxq.partition import Inputs
from fxq.plan import Slot
from fxq.qdq import is_quantize
from fxq.quant_layers import QuantLayer, quant_layers
from fxq.refinement import SAMPLES, refine

ITERATIONS = 300
_PLACES = 4096  # columns of a layer's input to learn from, if they fit
_NUMBERS = 1 << 24  # numbers in the columns of a layer: 64 MB
_BATCH = 256  # columns a step
_RATE = 0.02
_PENALTY = 0.3  # weight of the penalty beside the error, which is relative to nearest rounding's
_WARM_UP = 0.2  # part of the steps without penalty
_BETA = (20.0, 2.0)
_HELD_OUT = 4  # every fourth sample


def learn_rounding(
    reference: nn.Module,
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    samples: int = SAMPLES,
    iterations: int = ITERATIONS,
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """A reference graph with learned roundings of its conv and linear weights, and with corrected biases.

    Biases are corrected on the way (:func:`fxq.correct_bias`), before and after a layer's rounding is learned: else
    it would be learned to make up for a shift that a bias takes out at no cost. Transposed convs keep nearest rounding.
    Scales stay as they are. The same data gives the same result.

    Args:
        reference: from ``fxq.convert_to_reference(prepared)``; unchanged.
        prepared: the calibrated model it comes from; unchanged.
        data: batches, as for :func:`fxq.calibrate`; the first ``samples`` entries are used, a quarter for checking.
        samples: more than the default helps little; memory as for :func:`fxq.correct_bias`.
        iterations: gradient steps a layer. Time is proportional to it and to the number of weights.
        forward_fn: as for :func:`fxq.calibrate`.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        A new reference graph.

    Raises:
        StageError: if the two are not a reference and a prepared model.
        CalibrationError: if ``data`` is empty.

    Example:
        >>> reference = fxq.convert_to_reference(prepared)                            # doctest: +SKIP
        >>> reference = fxq.learn_rounding(reference, prepared, batches)              # doctest: +SKIP
    """
    show = shows_progress(progress)

    def learn(region: QuantModule, floats: QuantModule, inputs: Sequence[Inputs]) -> None:
        _learn_region(region, floats, inputs, iterations, show)

    return refine(reference, prepared, learn, data, samples=samples, forward_fn=forward_fn)


def _learn_region(
    reference: QuantModule, prepared: QuantModule, inputs: Sequence[Inputs], iterations: int, progress: bool
) -> None:
    layers = {layer.node: layer for layer in quant_layers(reference)}
    readers = [layer.weight_path for layer in layers.values()]
    for layer in layers.values():
        layer.set_bias(layer.bias(reference).clone(), reference)
    changed = total = 0
    with tqdm(desc="learn roundings", total=len(layers), disable=not progress) as bar:
        for step in lockstep(reference, prepared, inputs):
            if step.node not in layers:
                continue
            layer = layers[step.node]
            correct_layer(layer, step, reference)
            if layer.op in (*CONVS, LINEAR) and readers.count(layer.weight_path) == 1:
                changed += _learn_layer(layer, step, reference, prepared, iterations)
                total += layer.integers(reference).numel()
                step.rerun()
                correct_layer(layer, step, reference)
            bar.update()
    note = f"roundings learned: {changed} of {total} weights are not rounded to nearest; biases corrected"
    reference.plan.notes = [*reference.plan.notes, note]


def _learn_layer(
    layer: QuantLayer, step: Step, reference: QuantModule, prepared: QuantModule, iterations: int
) -> int:
    """Learn one layer's rounding and write it; returns how many weights it changed."""
    random = torch.Generator().manual_seed(0)
    train, check = _columns(layer, step, random, held_out=False), _columns(layer, step, random, held_out=True)
    if train is None or check is None:
        return 0
    scale, zero_point = layer.qparams(reference)
    grid = layer.float_weight(prepared) / scale + zero_point
    spec = reference.plan.specs[Slot(layer.node.name, (layer.op.index("weight"),))]
    nearest = layer.integers(reference)
    problem = _Problem(
        grid.floor().clamp(spec.quant_min, spec.quant_max - 1), grid, scale, zero_point,
        layer.bias(reference), _output_range(layer.node),
    )  # fmt: skip
    with torch.enable_grad():
        learned = problem.learn(train, nearest, iterations, random)
    better = problem.error(check, learned) < problem.error(check, nearest)
    chosen = torch.where(better.reshape(-1, *[1] * (nearest.dim() - 1)), learned, nearest)
    different = int((chosen != nearest).sum())
    nearest.copy_(chosen)
    return different


def _output_range(node: Node) -> tuple[float, float]:
    """The real values that a layer's quantized output can have; no bounds where it is read in float."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or not is_quantize(user):
        return -math.inf, math.inf
    _, scale, zero_point, low, high, _ = user.args
    return (low - zero_point) * scale, (high - zero_point) * scale  # type: ignore[operator, return-value]


@dataclass(frozen=True)
class Columns:
    """Inputs of a layer, ``[groups, inputs, places]``, and its float outputs there, ``[channels, places]``."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Problem:
    """Rounding one layer's weight: ``lower + h`` are its integers, ``h`` between 0 and 1.

    Weights outside the range of the integers, which clipping left there, are 0 or 1 above ``lower`` for good.
    """

    lower: Tensor
    grid: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor
    output: tuple[float, float]

    def learn(self, data: Columns, nearest: Tensor, iterations: int, random: torch.Generator) -> Tensor:
        """int8 weights with learned roundings."""
        start = (self.grid - self.lower).clamp(0, 1)
        v = torch.logit((start + 0.1) / 1.2).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=_RATE)
        usual = self.error(data, nearest).mean().clamp(min=1e-30)
        places = data.targets.shape[1]
        for number in range(iterations):
            chosen = torch.randint(places, (min(_BATCH, places),), generator=random)
            h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
            sample = Columns(data.inputs[..., chosen], data.targets[:, chosen])
            loss = self.error(sample, self.lower + h).mean() / usual
            progress = (number / iterations - _WARM_UP) / (1 - _WARM_UP)
            if progress > 0:
                beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * progress)) / 2
                loss = loss + _PENALTY * (1 - (2 * h - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (self.lower + (v.detach() > 0)).to(nearest.dtype)

    def error(self, data: Columns, integers: Tensor) -> Tensor:
        """Mean squared error of each output channel with these integers, ``[channels]``."""
        weight = (integers.float() - self.zero_point) * self.scale
        groups = data.inputs.shape[0]
        output = torch.bmm(weight.reshape(groups, -1, data.inputs.shape[1]), data.inputs).flatten(0, 1)
        difference = (output + self.bias[:, None]).clamp(*self.output) - data.targets.clamp(*self.output)
        return difference.square().mean(1)


def _columns(layer: QuantLayer, step: Step, random: torch.Generator, *, held_out: bool) -> Columns | None:
    """A random choice of places from the samples that are held out, or from the others; ``None`` if there are none."""
    found = list(_batch_columns(layer, step, random, held_out))
    if not found:
        return None
    inputs, targets = (torch.cat(parts, 0) for parts in zip(*found, strict=True))
    groups = 1 if layer.op is LINEAR else layer.op.get(layer.node, "groups")
    by_group = inputs.reshape(len(inputs), groups, -1).permute(1, 2, 0).contiguous()
    return Columns(by_group, targets.t().contiguous())


def _batch_columns(
    layer: QuantLayer, step: Step, random: torch.Generator, held_out: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each batch some places: ``[places, channels, taps]`` and ``[places, outputs]``."""
    number = itertools.count()
    for batch, (expected, actual) in enumerate(zip(step.expected, step.actual, strict=True)):
        if expected.shape != actual.shape or not expected.numel():
            continue  # what a model selects by its values may be other rows than in float
        x, y = (_channels_second(value, layer) for value in (step.arguments(batch)[0], expected))
        mine = [index for index in range(len(x)) if (next(number) % _HELD_OUT == _HELD_OUT - 1) == held_out]
        if mine:
            limit = max(_BATCH, min(_PLACES, _NUMBERS // (x.shape[1] * math.prod(layer.shape[2:])))) // step.batches
            yield _gather(layer, x[mine], y[mine], max(limit, 1), random)


def _channels_second(value: Tensor, layer: QuantLayer) -> Tensor:
    """``[samples, channels, places...]`` of a layer's input or output."""
    if layer.op is LINEAR:
        value = value[None] if value.dim() == 1 else value
        return value.reshape(len(value), -1, value.shape[-1]).transpose(1, 2)
    return value if value.dim() == len(layer.shape) else value[None]


def _gather(
    layer: QuantLayer, x: Tensor, y: Tensor, count: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the kernel sees at ``count`` random places of its output, and the output there."""
    places = y.shape[2:]
    sample = torch.randint(len(y), (count,), generator=random)
    at = [torch.randint(size, (count,), generator=random) for size in places]
    targets = y.movedim(1, -1)[tuple([sample, *at])]
    if layer.op is LINEAR:
        return x[sample, :, at[0]][:, :, None], targets
    kernel = layer.shape[2:]
    stride, dilation = (_each(layer.op.get(layer.node, name), len(places)) for name in ("stride", "dilation"))
    padding = _each(layer.op.get(layer.node, "padding"), len(places))
    x = F.pad(x, [side for size in reversed(padding) for side in (size, size)])
    index: Tensor | int = 0
    for axis, size in enumerate(x.shape[2:]):
        tap = torch.arange(kernel[axis]) * dilation[axis]
        tap = tap.reshape([-1 if other == axis else 1 for other in range(len(places))]).expand(kernel).flatten()
        index = index * size + (at[axis] * stride[axis])[:, None] + tap
    return x.flatten(2)[sample[:, None], :, index].transpose(1, 2), targets


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))
