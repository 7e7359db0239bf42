"""Which layers are sensitive to quantization: what each costs when only it is quantized."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from fxq.api import Exclusions, as_inputs, convert_to_reference, prepare
from fxq.calibration import ForwardFn, calibrate, example_inputs_of, shows_progress, understood
from fxq.config import QConfig, QConfigMapping
from fxq.errors import FxqWarning
from fxq.layers import each_alone
from fxq.measures import Metric, OutputSqnr, evaluate, keep_batches
from fxq.op_table import Backend
from fxq.records import graph_records
from fxq.report import table


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    metric: Metric | None = None,
    backend: str | Backend = "x86",
    qconfig: QConfig | QConfigMapping | str = "per_channel",
    exclude: Exclusions = (),
    example_inputs: Any = None,
    num_batches: int | None = None,
    calibration: str = "default",
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> str:
    """A table of the layers, the one first that costs most when only it is quantized.

    The model is calibrated once. Then it runs on the data as often as it has layers, each time with the input, weight
    and output of one layer quantized and all else in float: mobilenet_v2 on 32 images takes about a minute.

    Args:
        model: in eval mode; left as it is.
        data: batches as for :func:`fxq.calibrate`; they calibrate, and without a metric they are measured on.
        metric: ``metric(model)`` is a number, higher is better, such as an accuracy on data of its own; called once
            for the float model and once a layer. By default the SQNR of the output to the float model's, in dB.
        backend, qconfig, exclude, example_inputs, forward_fn, progress: as for :func:`fxq.quantize`; ``forward_fn``
            returns the model's output.
        num_batches: use this many batches; all by default.
        calibration: as for :func:`fxq.prepare`; corrections that come after conversion are not made.

    Raises:
        ConfigError: if ``metric`` returns something else than a finite number.
        InputError: if the outputs of two models cannot be compared, as boxes of a detector; give a metric.
        FxqError: as :func:`fxq.quantize`.

    Example:
        >>> print(fxq.sensitivity(model, images))                                     # doctest: +SKIP
    """
    records = sensitivity_records(
        model, data, metric=metric, backend=backend, qconfig=qconfig, exclude=exclude, example_inputs=example_inputs,
        num_batches=num_batches, calibration=calibration, forward_fn=forward_fn, progress=progress,
    )  # fmt: skip
    measured = ["sqnr"] if metric is None else ["metric", "drop"]
    rows = [
        [place, r["node"], r["op"], r["module"], *(f"{r[key]:.4g}" for key in measured)]
        for place, r in enumerate(records, 1)
    ]
    headers = ["rank", "node", "op", "module", *(["SQNR dB"] if metric is None else ["metric", "drop"])]
    return table(rows, headers, [None, 32, 24, 32, *(None for _ in measured)])


def sensitivity_records(
    model: nn.Module,
    data: Iterable[Any],
    *,
    metric: Metric | None = None,
    backend: str | Backend = "x86",
    qconfig: QConfig | QConfigMapping | str = "per_channel",
    exclude: Exclusions = (),
    example_inputs: Any = None,
    num_batches: int | None = None,
    calibration: str = "default",
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """What :func:`sensitivity` prints, as records.

    Returns:
        Dicts with the keys ``region``, ``node``, ``module``, ``op``, ``sqnr`` (dB; ``None`` with a metric), ``metric``
        and ``drop`` (from the float model's metric; ``None`` without one), the most sensitive layer first.

    Raises:
        FxqError: as :func:`sensitivity`.
    """
    batches = keep_batches(data, num_batches)
    if example_inputs is None:
        args, kwargs = example_inputs_of(model, batches[0], forward_fn)
        example_inputs = args or kwargs
    if forward_fn is None:
        batches = list(understood(batches, as_inputs(example_inputs, model), model))
    prepared = prepare(
        model, example_inputs, backend=backend, qconfig=qconfig, exclude=exclude, calibration=calibration
    )
    calibrate(prepared, batches, forward_fn=forward_fn, progress=progress)
    best = 0.0 if metric is None else evaluate(metric, model)
    sqnr = OutputSqnr(model, batches, forward_fn)

    def measure(candidate: nn.Module) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxqWarning)
            reference = convert_to_reference(candidate)
        return sqnr(reference) if metric is None else evaluate(metric, reference)

    ops = {(record["region"], record["node"]): record["op"] for record in graph_records(prepared)}
    found = [
        {
            "region": layer.path,
            "node": layer.name,
            "module": layer.module,
            "op": ops[layer.path, layer.name],
            "sqnr": value if metric is None else None,
            "metric": None if metric is None else value,
            "drop": None if metric is None else best - value,
        }
        for layer, value in each_alone(prepared, measure, show=shows_progress(progress))
    ]
    return sorted(found, key=lambda record: record["sqnr"] if metric is None else record["metric"])
