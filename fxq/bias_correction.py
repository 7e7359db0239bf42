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

from fxq.bias_statistics import correct_from_statistics
from fxq.calibration import ForwardFn, shows_progress
from fxq.graph_module import BACKEND, QuantModule, get_attribute
from fxq.lockstep import Step, samples_in
from fxq.ops import LINEAR, Op
from fxq.partition import Inputs
from fxq.plan import Slot, counted
from fxq.quant_layers import QuantLayer, quant_layers
from fxq.refinement import SAMPLES, refine
from fxq.walk import Walk

Means = dict[str, list[torch.Tensor]]


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
    if data is None:
        return refine(reference, prepared, correct_from_statistics)
    show = shows_progress(progress)

    def empirical(region: QuantModule, floats: QuantModule, inputs: Sequence[Inputs]) -> None:
        correct_means(region, float_means(floats, inputs), inputs, show)

    return refine(reference, prepared, empirical, data, samples=samples, forward_fn=forward_fn)


def float_means(prepared: QuantModule, inputs: Sequence[Inputs]) -> Means:
    """Means of what the layers of a prepared graph give in float, each input by itself.

    Args:
        prepared: its observers do not see the inputs.
        inputs: of each call.

    Returns:
        By the name of the layer, for each call; float64 ``[N, channels]``.
    """
    layers = _weight_dims(prepared)
    means: Means = {node.name: [] for node in layers}
    with torch.no_grad():
        for given in inputs:
            walk = Walk(prepared, [given])
            for node in prepared.graph.nodes:
                walk.run(node)
                if node in layers:
                    means[node.name].append(_sample_means(walk.values(node)[0], layers[node]))
                walk.release(node)
    return means


def correct_means(reference: QuantModule, means: Means, inputs: Sequence[Inputs], progress: bool) -> None:
    """Change a reference graph's biases until its layers have these means, each with those before it corrected.

    Args:
        reference: is changed.
        means: from :func:`float_means`, for the same inputs.
    """
    layers = {layer.node: layer for layer in quant_layers(reference) if layer.node.name in means}
    if not layers:
        return
    for layer in layers.values():
        layer.set_bias(layer.bias(reference).clone(), reference)
    samples, walk = sum(samples_in(given) for given in inputs), Walk(reference, inputs, frugal=True)
    del inputs  # which the walk lets go of
    with torch.no_grad(), tqdm(desc="correct biases", total=len(layers), disable=not progress) as bar:
        corrected = 0
        for node in reference.graph.nodes:
            walk.run(node)
            if node in layers:
                corrected += _correct_to(means[node.name], layers[node], walk, reference)
                bar.update()
            walk.release(node)
    layers_corrected = counted(corrected, "layer")
    note = f"biases corrected: {layers_corrected}, for what else shifts their outputs, from {samples} samples"
    if not corrected:
        note = "biases are not corrected from data, because one sample tells no mean error from chance"
    reference.plan.notes = [*reference.plan.notes, note]


def _correct_to(means: Sequence[torch.Tensor], layer: QuantLayer, walk: Walk, reference: QuantModule) -> bool:
    """Add what a layer that just ran lacks of its means to its bias, and run it again; whether there were enough."""
    dims = _dims(layer.op, len(layer.shape))
    actual = (_sample_means(walk.value(layer.node, batch), dims) for batch in range(len(means)))
    if not _add_mean_error(layer, means, actual, reference):
        return False
    walk.run(layer.node)
    return True


def correct_layer(layer: QuantLayer, step: Step, reference: QuantModule) -> None:
    """Add the mean error of a layer that just ran to its own bias, and run it again."""
    dims = _dims(layer.op, len(layer.shape))
    expected, actual = ((_sample_means(value, dims) for value in values) for values in (step.expected, step.actual))
    if _add_mean_error(layer, expected, actual, reference):
        step.rerun()


def _add_mean_error(
    layer: QuantLayer, expected: Iterable[torch.Tensor], actual: Iterable[torch.Tensor], reference: QuantModule
) -> bool:
    """Add the mean of what samples lack to a bias; whether there are enough to tell it from chance."""
    pairs = zip(expected, actual, strict=True)
    # what a model selects by its values may be other rows than in float
    errors = [wanted - found for wanted, found in pairs if wanted.shape == found.shape]
    if sum(map(len, errors)) < 2:
        return False
    layer.set_bias(layer.bias(reference) + shrunken_mean(torch.cat(errors)).float(), reference)
    return True


def _weight_dims(prepared: QuantModule) -> dict[Node, int]:
    """Layers whose weights will be integers, and how many dimensions their outputs have after the channels'."""
    ops, found = prepared.meta[BACKEND].dictionary, {}
    for node in prepared.graph.nodes:
        op = ops.op_of(node)
        if op is None or op.weight is None or Slot(node.name, (op.index(op.weight),)) not in prepared.plan.groups:
            continue
        observer = op.get(node, op.weight)
        if observer.args[0].op == "get_attr":
            found[node] = _dims(op, get_attribute(prepared, str(observer.args[0].target)).dim())
    return found


def _dims(op: Op, weight: int) -> int:
    """How many dimensions a layer's output has after the channels', by how many its weight has."""
    return 0 if op is LINEAR else weight - 2


def _sample_means(output: torch.Tensor, dims: int) -> torch.Tensor:
    """Means of a layer's output over places, float64 ``[N, channels]``; of no sample where there are no places."""
    if not output.numel():
        return output.new_empty(0, output.shape[-1 - dims], dtype=torch.float64)
    if dims:
        batched = output if output.dim() == dims + 2 else output[None]
        return batched.flatten(2).mean(2).double()
    if output.dim() == 1:
        return output.double()[None]
    return (output.flatten(1, -2).mean(1) if output.dim() > 2 else output).double()


def shrunken_mean(errors: torch.Tensor) -> torch.Tensor:
    """The mean of ``[N, C]`` over ``N``, which is 2 or more, times the part of its square that twice the samples'
    scatter does not explain.

    Twice, because what the corrections of earlier layers owe to chance looks like an error of the later ones.
    """
    count = errors.shape[0]
    mean = errors.mean(0)
    scatter = 2 * errors.var(0).sum() / count
    return mean * (1 - scatter / mean.square().sum().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=0)
