"""The user's door: one call, or the same in steps."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from fxq.backends import get_backend
from fxq.bias_correction import correct_bias, correct_means, float_means
from fxq.calibration import (
    ForwardFn,
    calibrate,
    example_inputs_of,
    iterate,
    most_arguments,
    shows_progress,
    understood,
)
from fxq.config import QConfig, QConfigMapping
from fxq.copying import give_back
from fxq.engine import require_engine
from fxq.errors import CalibrationError, FxqWarning
from fxq.float_model import float_model
from fxq.graph_module import BACKEND, QuantModule, copy_module, transformed_copy
from fxq.learned_rounding import learn_rounding
from fxq.lockstep import region_inputs
from fxq.measures import Metric
from fxq.mixed_precision import TARGET_SAMPLES, Budget, Judge, if_enough, within_budget
from fxq.op_table import Backend
from fxq.partition import Inputs, map_regions, regions_of
from fxq.pass_base import Pipeline
from fxq.passes.absorb_clamp import AbsorbClamp
from fxq.passes.correct_bias import CorrectBias
from fxq.passes.finish_training import TRAINABLE, FinishTraining
from fxq.passes.fold_batchnorm import FoldBatchNorm
from fxq.passes.lower import lower as lower_graph
from fxq.passes.round_biases import RoundBiases
from fxq.passes.settle_smoothing import SettleSmoothing
from fxq.passes.simplify_qdq import SimplifyQDQ
from fxq.passes.to_reference import ToReference
from fxq.plan import NEVER_OBSERVED, Stage
from fxq.preparation import prepare_model
from fxq.presets import Preset, get_preset
from fxq.refinement import settle
from fxq.spread import KeepSpread, in_pieces, spread_samples
from fxq.tracing import require_eval
from fxq.training_table import training_rows

Exclusions = Iterable[str | type[nn.Module]] | str | type[nn.Module]


def quantize(
    model: nn.Module,
    calibration_data: Iterable[Any],
    *,
    backend: str | Backend = "x86",
    qconfig: QConfig | QConfigMapping | str = "per_channel",
    exclude: Exclusions = (),
    example_inputs: Any = None,
    num_batches: int | None = None,
    calibration: str = "default",
    pow2_scales: bool = False,
    forward_fn: ForwardFn | None = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
    target: str | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize an unmodified model to int8 in one call.

    Args:
        model: in eval mode; left as it is.
        calibration_data: representative inputs: any iterable of tensors, tuples, dicts, or a DataLoader's
            ``(input, target)`` pairs. A hundred images are plenty for most models. What a tuple or list has beyond the
            parameters of forward are labels, and dropped. Where forward needs one input that is itself a list of
            tensors, as the two pathways of a video model, a batch is ``([slow, fast],)`` or ``[slow, fast]``: a list of
            float tensors is one input if the model takes it and does not take its first member alone, of which the
            first batch is tried. A model that takes both is an error, which says what to write.
        backend: ``"x86"``, ``"fbgemm"``, ``"onednn"``, ``"qnnpack"``, or a table of your own.
        qconfig: ``"per_channel"``, ``"per_tensor"``, a :class:`QConfig` or a :class:`QConfigMapping`.
        exclude: what stays float: module paths (with what is inside, ``*`` allowed), module classes or op names.
        example_inputs: a tensor, tuple or dict of inputs; by default the first calibration batch. A list is as a tuple,
            or one input if it is longer than the parameters of forward.
        num_batches: calibrate with this many batches; all by default.
        calibration: how ranges are chosen and which errors are corrected: ``"simple"``, ``"default"``,
            ``"advanced"`` or ``"max"`` (:data:`fxq.presets.PRESETS`, docs/accuracy.md).
        pow2_scales: every scale is a power of two, for devices that requantize with shifts.
        forward_fn: ``forward_fn(model, batch)``, where a batch does not tell how the model is called; needs
            ``example_inputs``.
        metric: ``metric(model)`` is a number, higher is better, such as the accuracy in percent on data of its own.
            With ``max_drop``, the fewest layers stay float with which the int8 model's is at most that much below the
            float model's (:mod:`fxq.mixed_precision`). The summary says which and why.
        max_drop: in the units of ``metric``.
        target: ``"sqnr:30"`` instead of the two: the output's SQNR to the float model's is at least 30 dB on the
            32 samples spread over the calibration data.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        A ``torch.fx.GraphModule`` that is called like the model. Where the model cannot be traced as a whole, a
        copy of it in which its largest traceable submodules are such graph modules.

    Raises:
        FxqError: one of its kinds, naming what is wrong and the remedy. ConfigError, if not even the model with all
            layers float is good enough.

    Example:
        >>> qmodel = fxq.quantize(resnet18().eval(), loader, backend="x86")           # doctest: +SKIP
        >>> print(fxq.summary(qmodel))                                                # doctest: +SKIP
    """
    budget = Budget.parse(metric, max_drop, target)
    preset = get_preset(calibration)
    model = float_model(model)
    if example_inputs is None:
        batches = iterate(calibration_data)
        first = next(batches, None)
        if first is None:
            raise CalibrationError("the calibration data is empty: give at least one batch")
        inputs: Inputs = example_inputs_of(model, first, forward_fn)
        calibration_data = _Chained(first, batches, calibration_data)
    else:
        inputs = as_inputs(example_inputs, model)
    if forward_fn is None:
        calibration_data = understood(calibration_data, inputs, model)
    prepared = _prepare(model, inputs, backend, qconfig, exclude, preset, pow2_scales, borrow=True)
    samples = preset.correct_bias if not preset.frugal or regions_of(prepared).keys() == {""} else 0
    options: dict[str, Any] = {"samples": samples, "forward_fn": forward_fn, "progress": progress}
    kept = samples if budget is None else max(samples, TARGET_SAMPLES)
    limit = _bytes_of(model) / 4 if preset.frugal and budget is None else math.inf
    data = KeepSpread(calibration_data, kept, whole=forward_fn is not None, limit=limit)
    calibrate(prepared, data, num_batches=num_batches, forward_fn=forward_fn, progress=progress)
    if budget is not None:
        judge = Judge(model, data.kept, budget, forward_fn)
        reference = _within_budget(prepared, judge, preset, options)
    elif preset.learn_rounding:
        reference = learn_rounding(_to_reference(prepared, stacklevel=4), prepared, data.kept, **options)
    elif samples:
        reference = _corrected(prepared, data, **options)
    else:
        reference = _to_reference(prepared, stacklevel=4, region_to_reference=_become_reference)
    del prepared  # or its float weights, which went one by one
    give_back(reference.modules(), model)
    return _lowered(reference)


def _bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))


def _corrected(
    prepared: nn.Module, data: KeepSpread, samples: int, forward_fn: ForwardFn | None, progress: bool | None
) -> nn.Module:
    """The reference graph that a prepared model becomes, with corrected biases; the two never exist side by side."""
    problem, batches = None, data.taken()
    try:
        if forward_fn is None:
            batches = in_pieces(batches)
        inputs = region_inputs(prepared, batches, samples=samples, forward_fn=forward_fn)
        means = {path: float_means(region, inputs[path]) for path, region in regions_of(prepared).items()}
    except Exception as error:  # of any kind: not every model runs on a part of a batch
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        problem = f"biases are not corrected from data, because the model fails on a part of a batch: {reason}"
    del batches
    reference = _to_reference(prepared, stacklevel=5, region_to_reference=_become_reference)
    for path, region in regions_of(reference).items():
        if problem is not None:
            region.plan.notes = [*region.plan.notes, problem]
        else:
            correct_means(region, means[path], inputs.pop(path), shows_progress(progress))
            settle(region)
    return reference


def _within_budget(prepared: nn.Module, judge: Judge, preset: Preset, options: Mapping[str, Any]) -> nn.Module:
    """The reference graph with the fewest layers float, which are chosen with corrected biases if they will be.

    Roundings are learned once they are chosen, because that takes long, and kept if the budget is met with them.
    """

    def corrected(candidate: nn.Module, **changes: Any) -> nn.Module:
        reference = _to_reference(candidate, stacklevel=6)
        if not options["samples"]:
            return reference
        batches = spread_samples(judge.batches, options["samples"], whole=options["forward_fn"] is not None)
        return correct_bias(reference, candidate, batches, **{**options, **changes})

    def candidate_of(candidate: nn.Module) -> nn.Module:
        return _lowered(corrected(candidate, progress=False))

    chosen = within_budget(
        prepared, judge, convert=convert_to_reference, lower=candidate_of, progress=options["progress"]
    )
    reference = corrected(chosen)
    if not preset.learn_rounding:
        return reference
    refined = learn_rounding(_to_reference(chosen, stacklevel=5), chosen, judge.batches, **options)
    return if_enough(refined, reference, judge, _lowered, "learned roundings")


class _Chained:
    """The first batch that was looked at, then the others; keeps the length of the data for the progress bar."""

    def __init__(self, first: Any, rest: Iterable[Any], data: Iterable[Any]) -> None:
        self._first, self._rest, self._data = first, rest, data

    def __iter__(self) -> Any:
        return itertools.chain([self._first], self._rest)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str | Backend = "x86",
    qconfig: QConfig | QConfigMapping | str = "per_channel",
    exclude: Exclusions = (),
    calibration: str = "default",
    pow2_scales: bool = False,
) -> nn.Module:
    """Trace, fold, fuse, and put observers on the edges; the result is called like the model to calibrate it.

    Args:
        model: in eval mode; left as it is.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; a list is as a tuple, or one
            input if it is longer than the parameters of forward. Only their shapes and dtypes matter, except where
            layers are equalized (``calibration="advanced"`` and ``"max"``): then they must be real inputs, some dozens.
        backend, qconfig, exclude, pow2_scales: as for :func:`quantize`.
        calibration: a preset's observers, what it corrects for the rounding of weights, its smoothing and, where
            weights have one scale a tensor, its equalization. Corrections from data come after conversion:
            :func:`fxq.correct_bias`, :func:`fxq.learn_rounding`.

    Raises:
        FxqError: one of its kinds, naming what is wrong and the remedy.

    Example:
        >>> prepared = fxq.prepare(model, torch.rand(1, 3, 224, 224), backend="x86")  # doctest: +SKIP
        >>> for images, _ in loader: prepared(images)                                 # doctest: +SKIP
        >>> qmodel = fxq.convert(prepared)                                            # doctest: +SKIP
    """
    preset = get_preset(calibration)
    model = float_model(model)
    return _prepare(model, as_inputs(example_inputs, model), backend, qconfig, exclude, preset, pow2_scales)


def as_inputs(example_inputs: Any, model: nn.Module) -> Inputs:
    """``(args, kwargs)`` of example inputs as :func:`prepare` takes them."""
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if type(example_inputs) is list and len(example_inputs) > most_arguments(model):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _prepare(
    model: nn.Module,
    inputs: Inputs,
    backend: str | Backend,
    qconfig: QConfig | QConfigMapping | str,
    exclude: Exclusions,
    preset: Preset,
    pow2_scales: bool,
    borrow: bool = False,
) -> nn.Module:
    require_eval(model)
    table = get_backend(backend) if isinstance(backend, str) else backend
    require_engine(table.engine)
    mapping = qconfig if isinstance(qconfig, QConfigMapping) else QConfigMapping().set_global(qconfig)
    config = mapping.resolved(table, exclude, preset.qconfig, pow2_scales)
    return prepare_model(model, inputs, table, config, preset=preset, borrow=borrow)


def convert_to_reference(prepared: nn.Module) -> nn.Module:
    """The calibrated model as a graph of quantize/dequantize pairs on plain integers, with float ops between.

    It runs anywhere float torch runs, exports, and defines the numbers that every lowering is judged against.

    Args:
        prepared: calibrated; unchanged, so that calibration may go on.

    Raises:
        StageError: if the model was not prepared.
        CalibrationError: if no observer saw any data.
    """
    return _to_reference(prepared, stacklevel=4)


def _to_reference(
    prepared: nn.Module, stacklevel: int, region_to_reference: Callable[[QuantModule], QuantModule] | None = None
) -> nn.Module:
    _require_data(regions_of(prepared, Stage.PREPARED).values())
    reference = map_regions(prepared, region_to_reference or _region_to_reference)
    _warn_never_observed(reference, stacklevel)
    return reference


def _require_data(regions: Iterable[QuantModule]) -> None:
    observers = [region.get_submodule(path) for region in regions for path in region.plan.observers.values()]
    activations = [observer for observer in observers if observer.enabled]
    if activations and not any(observer.has_data for observer in activations):
        raise CalibrationError(
            "no observer saw any data: run fxq.calibrate(prepared, data), or prepared(batch) on some batches, "
            "before converting"
        )


def _region_to_reference(prepared: QuantModule) -> QuantModule:
    if TRAINABLE in prepared.plan.properties:  # training's end writes to tensors
        return _become_reference(copy_module(prepared))
    return transformed_copy(prepared, _become_reference, map(prepared.get_submodule, prepared.plan.watching()))


def _become_reference(module: QuantModule) -> QuantModule:
    table: Backend = module.meta[BACKEND]
    trained = TRAINABLE in module.plan.properties
    if trained:
        module.eval().cpu().float()  # it may have trained elsewhere and in another precision
        Pipeline([FinishTraining(training_rows()), FoldBatchNorm(table.dictionary)])(module)
    ops = table.dictionary
    # what was trained stays as it is: the numbers are those of the fake_quant model
    to_reference = ToReference(table, ops, align=not trained)
    Pipeline([SettleSmoothing(ops), CorrectBias(ops), to_reference, AbsorbClamp(ops), SimplifyQDQ()])(module)
    if not trained:
        Pipeline([RoundBiases()])(module)
    module.release_unused()
    module.plan.stage = Stage.REFERENCE
    return module


def _warn_never_observed(reference: nn.Module, stacklevel: int) -> None:
    silent = [
        region.plan.where(name)
        for region in regions_of(reference).values()
        for name, decision in region.plan.decisions.items()
        if decision.reason is NEVER_OBSERVED
    ]
    if silent:
        warnings.warn(
            f"{', '.join(silent[:5])}{' and others' if len(silent) > 5 else ''} saw no data while calibrating and "
            f"stays float; calibrate with inputs that reach it, or exclude it",
            FxqWarning,
            stacklevel=stacklevel,
        )


def convert(prepared: nn.Module) -> nn.Module:
    """The calibrated model with the packed int8 kernels of its backend.

    Corrections from data are steps of their own, between :func:`convert_to_reference` and :func:`lower`:
    :func:`fxq.correct_bias`, :func:`fxq.learn_rounding`.

    Args:
        prepared: calibrated; unchanged.

    Raises:
        StageError, CalibrationError: as :func:`convert_to_reference`.
    """
    return _convert(prepared)


def _convert(prepared: nn.Module) -> nn.Module:
    return _lowered(_to_reference(prepared, stacklevel=5))


def _lowered(reference: nn.Module) -> nn.Module:
    return map_regions(reference, lambda region: lower_graph(region, region.meta[BACKEND]))


def lower(reference: nn.Module, backend: str | Backend) -> nn.Module:
    """The packed model of a reference graph, for any backend.

    Args:
        reference: from :func:`convert_to_reference`; unchanged.
        backend: a name or a table.

    Raises:
        StageError: if ``reference`` is no reference graph.
        BackendError: for an unknown backend or an engine this torch lacks.
    """
    regions_of(reference, Stage.REFERENCE)
    table = get_backend(backend) if isinstance(backend, str) else backend
    return map_regions(reference, lambda region: lower_graph(region, table))
