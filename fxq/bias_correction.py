"""Bias correction: take out of each layer's bias the mean error that quantization adds to its output.

Rounding a weight, and clipping or rounding its input, shifts the mean of each output channel, most where few weights
share a channel, as in depthwise convs. Means add up over the layers, but a shift can be taken out at no cost, because
a layer has a bias anyway: section 4.2 of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv:1906.04721).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.fx import Node
from tqdm import tqdm

from fxq.calibration import ForwardFn, shows_progress
from fxq.graph_module import QuantModule
from fxq.lockstep import Step, lockstep
from fxq.ops import CLAMP, CONV_TRANSPOSES, LINEAR, RELU
from fxq.partition import Inputs
from fxq.passes.layer_weights import constant_response
from fxq.quant_layers import QuantLayer, quant_layers
from fxq.refinement import SAMPLES, refine


def correct_bias(
    reference: nn.Module,
    prepared: nn.Module,
    data: Iterable[object] | None = None,
    *,
    samples: int = SAMPLES,
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """A reference graph whose biases make up for the mean error of each output channel.

    With data: the mean difference of each layer's output to the float model's, layer by layer in the order of
    execution, each measured after the ones before were quantized and corrected. Means of few samples are uncertain;
    a layer's correction is shrunk by the share of it that their scatter explains, and one sample corrects nothing.

    Without data: ``(W - W_int8) * E[input]``, where the input comes from a layer that a BatchNorm was folded into,
    directly or through relu or clamp; the BatchNorm's statistics then tell the input's mean. Other layers stay, and so
    do those whose input means were recorded while calibrating: conversion has corrected them.

    Args:
        reference: from ``fxq.convert_to_reference(prepared)``; unchanged.
        prepared: the calibrated model it comes from; unchanged.
        data: batches, as for :func:`fxq.calibrate`; the first ``samples`` entries are used.
        samples: memory grows with it: about the largest layer's input and output in float, twice, for each.
        forward_fn: as for :func:`fxq.calibrate`.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        A new reference graph, to be lowered, saved or refined further.

    Raises:
        StageError: if the two are not a reference and a prepared model.
        CalibrationError: if ``data`` is empty.

    Example:
        >>> reference = fxq.convert_to_reference(prepared)                            # doctest: +SKIP
        >>> reference = fxq.correct_bias(reference, prepared, batches)                # doctest: +SKIP
        >>> qmodel = fxq.lower(reference, "x86")                                      # doctest: +SKIP
    """
    show = shows_progress(progress)

    def empirical(region: QuantModule, floats: QuantModule, inputs: Sequence[Inputs]) -> None:
        _correct_from_data(region, floats, inputs, show)

    if data is None:
        return refine(reference, prepared, _correct_from_statistics)
    return refine(reference, prepared, empirical, data, samples=samples, forward_fn=forward_fn)


def _correct_from_data(
    reference: QuantModule, prepared: QuantModule, inputs: Sequence[Inputs], progress: bool
) -> None:
    layers = {layer.node: layer for layer in quant_layers(reference)}
    for layer in layers.values():
        layer.set_bias(layer.bias(reference).clone(), reference)
    with tqdm(desc="correct biases", total=len(layers), disable=not progress) as bar:
        for step in lockstep(reference, prepared, inputs):
            if step.node in layers:
                correct_layer(layers[step.node], step, reference)
                bar.update()
    note = f"biases corrected: {len(layers)} layers, from {len(inputs)} batches"
    reference.plan.notes = [*reference.plan.notes, note]


def correct_layer(layer: QuantLayer, step: Step, reference: QuantModule) -> None:
    """Add the mean error of a layer that just ran to its own bias, and run it again."""
    errors = [
        _sample_means(expected - actual, layer)
        for expected, actual in zip(step.expected, step.actual, strict=True)
    ]
    if not errors:
        return
    layer.set_bias(layer.bias(reference) + shrunken_mean(torch.cat(errors)).float(), reference)
    step.rerun()


def _sample_means(error: torch.Tensor, layer: QuantLayer) -> torch.Tensor:
    """Means over places, float64 ``[N, channels]``."""
    if layer.op is not LINEAR:
        batched = error if error.dim() == len(layer.shape) else error[None]
        return batched.double().flatten(2).mean(2)
    if error.dim() == 1:
        return error.double()[None]
    return error.double().flatten(1, -2).mean(1) if error.dim() > 2 else error.double()


def shrunken_mean(errors: torch.Tensor) -> torch.Tensor:
    """The mean of ``[N, C]`` over ``N``, times the part of its square that the samples' scatter does not explain."""
    count = errors.shape[0]
    if count < 2:
        return torch.zeros_like(errors[0])
    mean = errors.mean(0)
    scatter = errors.var(0).sum() / count
    return mean * (1 - scatter / mean.square().sum().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=0)


def _correct_from_statistics(reference: QuantModule, prepared: QuantModule, inputs: Sequence[Inputs]) -> None:
    twins = {node.name: node for node in prepared.graph.nodes}
    corrected = 0
    for layer in quant_layers(reference):
        if layer.node.name in prepared.plan.input_means:
            continue  # corrected when it was converted
        mean = _input_mean(twins[layer.node.name], prepared, layer)
        if mean is None:
            continue
        rounding = layer.float_weight(prepared).double() - layer.dequantized(reference).double()
        shift = constant_response(rounding, mean, layer.op, layer.node)
        layer.set_bias(layer.bias(reference) + shift.float(), reference)
        corrected += 1
    note = f"biases corrected: {corrected} layers, from BatchNorm statistics"
    reference.plan.notes = [*reference.plan.notes, note]


def _input_mean(twin: Node, prepared: QuantModule, layer: QuantLayer) -> torch.Tensor | None:
    """Mean of each input channel of a layer by the BatchNorm before it, float64 ``[in]``; ``None`` if unknown."""
    if layer.op in CONV_TRANSPOSES:
        return None  # with a stride, places differ in how many weights reach them
    plan = prepared.plan
    observers = set(plan.observer_nodes(prepared.graph))
    low, high = float("-inf"), float("inf")
    node = twin.args[0]
    while isinstance(node, Node) and node.name not in plan.statistics:
        bounds = _bounds(node) if node.name not in observers else (None, None)
        if bounds is None:
            return None
        # this op comes before those seen so far: its bounds are clamped by theirs
        low, high = (max(low, min(high, default if bound is None else bound))
                     for bound, default in zip(bounds, (low, high), strict=True))  # fmt: skip
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in plan.statistics[node.name])
    return clipped_normal_mean(mean, std, low, high)


def _bounds(node: Node) -> tuple[float | None, float | None] | None:
    """The bounds of a relu or of a clamp between numbers; ``None`` for any other node."""
    if node.target is RELU.target:
        return 0.0, None
    if node.target is CLAMP.target and not any(isinstance(bound, Node) for bound in node.args[1:]):
        return node.args[1], node.args[2]  # type: ignore[return-value]
    return None


def clipped_normal_mean(mean: torch.Tensor, std: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Mean of ``clamp(x, low, high)`` for normal ``x``; appendix C of arXiv:1906.04721.

    Example:
        >>> clipped_normal_mean(torch.zeros(1), torch.ones(1), 0.0, float("inf"))  # of a relu: 1 / sqrt(2 pi)
        tensor([0.3989])
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    width = std.clamp(min=1e-30)
    total = mean.clone()
    if low != float("-inf"):
        a = (low - mean) / width
        total = total + (low - mean) * normal.cdf(a) + width * normal.log_prob(a).exp()
    if high != float("inf"):
        b = (high - mean) / width
        total = total + (high - mean) * normal.cdf(-b) - width * normal.log_prob(b).exp()
    return total
