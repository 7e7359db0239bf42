"""Quantization-aware training: prepare a model for it, and the switches to use while it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fxq.api import Exclusions, as_inputs
from fxq.backends import get_backend
from fxq.config import QConfig, QConfigMapping, ResolvedConfig
from fxq.engine import require_engine
from fxq.errors import ConfigError, StageError
from fxq.fake_quantize import LEARNED, FakeQuantize, fake_quantizes
from fxq.float_model import float_model
from fxq.op_table import Backend
from fxq.passes.canonicalize import WEIGHT_HOOKS
from fxq.preparation import prepare_model
from fxq.training_mode import NormMode


def prepare_qat(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str | Backend = "x86",
    qconfig: QConfig | QConfigMapping | str = "per_channel",
    exclude: Exclusions = (),
    learn_scales: bool = False,
) -> nn.Module:
    """A copy of a model that trains with fake quantization, called and trained like the model.

    Its parameters have the model's names; optimizers, schedulers, checkpoints, averages of models and
    ``DistributedDataParallel`` work as before, and ``train()`` and ``eval()`` too: in eval mode it computes what the
    int8 model will. A layer and the BatchNorm after it train as one quantized op (:mod:`fxq.conv_bn`).
    :func:`fxq.convert` makes the int8 model at any time, without disturbing the training.

    Args:
        model: float, usually in training mode; left as it is.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; only their shapes and
            dtypes matter.
        backend, exclude: as for :func:`fxq.quantize`.
        qconfig: as for :func:`fxq.quantize`; the backend's own specs observe moving averages of the extremes of
            activations, and a QConfig may say ``observer="moving_average"``, ``"minmax"`` or ``"lsq"``.
        learn_scales: train all scales with the weights (LSQ; TQT for power-of-two scales) instead of observing.

    Raises:
        FxqError: one of its kinds, naming what is wrong and the remedy.

    Example:
        >>> prepared = fxq.prepare_qat(model.train(), torch.rand(2, 3, 224, 224))     # doctest: +SKIP
        >>> for images, labels in loader:                                             # doctest: +SKIP
        ...     loss(prepared(images), labels).backward()
        ...     optimizer.step()
        >>> qmodel = fxq.convert(prepared)                                            # doctest: +SKIP
    """
    model = float_model(model)
    _require_own_weights(model)
    table = get_backend(backend) if isinstance(backend, str) else backend
    require_engine(table.engine)
    mapping = qconfig if isinstance(qconfig, QConfigMapping) else QConfigMapping().set_global(qconfig)
    following = dataclasses.replace(
        table,
        activation=table.activation.replace(observer="moving_average"),
        weight=table.weight.replace(observer="minmax"),
    )
    config = mapping.resolved(following, exclude)
    return prepare_model(
        model, as_inputs(example_inputs, model), table, _learning(config) if learn_scales else config, training=True
    )


def _learning(config: ResolvedConfig) -> ResolvedConfig:
    """The same with learned scales."""

    def learned(qconfig: QConfig | None) -> QConfig | None:
        if qconfig is None:
            return None
        return QConfig(
            activation=qconfig.activation.replace(observer=LEARNED), weight=qconfig.weight.replace(observer=LEARNED)
        )

    return dataclasses.replace(
        config,
        default=learned(config.default),
        types={key: learned(qconfig) for key, qconfig in config.types.items()},
        names={key: learned(qconfig) for key, qconfig in config.names.items()},
        regexes={key: learned(qconfig) for key, qconfig in config.regexes.items()},
    )


def _require_own_weights(model: nn.Module) -> None:
    """Raise ConfigError where a layer's weight is computed from other parameters."""
    for path, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        if parametrize.is_parametrized(module) or any(isinstance(hook, WEIGHT_HOOKS) for hook in hooks):
            raise ConfigError(
                f"the weight of '{path}' is computed by a parametrization, which fxq cannot train with fake "
                f"quantization; remove it first, with torch.nn.utils.parametrize.remove_parametrizations or "
                f"torch.nn.utils.remove_weight_norm"
            )


def freeze_batchnorm(model: nn.Module, frozen: bool = True) -> None:
    """Let BatchNorms use their running statistics, as the int8 model will, and update them no more.

    Weight and bias go on training. Stays so in training mode, in copies and in the ``state_dict``.

    Args:
        model: from :func:`prepare_qat`, or a module around it such as ``DistributedDataParallel``.
        frozen: False lets them follow the batches again.

    Raises:
        StageError: if nothing in the model is prepared for training.
    """
    _fakes(model)
    for module in model.modules():
        if isinstance(module, NormMode):
            module.frozen = frozen


def freeze_observers(model: nn.Module) -> None:
    """Keep the scales of activations and weights as they are; the same as ``disable_observers(model)``."""
    disable_observers(model)


def enable_observers(model: nn.Module, *, weights: bool = True, activations: bool = True) -> None:
    """Let ranges follow what the model sees in training mode (learned scales: let them learn).

    Args:
        model: from :func:`prepare_qat`, or a module around it.
        weights, activations: which of them.

    Raises:
        StageError: if nothing in the model is prepared for training.
    """
    for fake in _fakes(model, weights, activations):
        fake.observing = True


def disable_observers(model: nn.Module, *, weights: bool = True, activations: bool = True) -> None:
    """The opposite of :func:`enable_observers`."""
    for fake in _fakes(model, weights, activations):
        fake.observing = False


def enable_fake_quant(model: nn.Module, *, weights: bool = True, activations: bool = True) -> None:
    """Round weights and activations to their grids.

    Args:
        model: from :func:`prepare_qat`, or a module around it.
        weights, activations: which of them.

    Raises:
        StageError: if nothing in the model is prepared for training.
    """
    for fake in _fakes(model, weights, activations):
        fake.quantizing = True


def disable_fake_quant(model: nn.Module, *, weights: bool = True, activations: bool = True) -> None:
    """The opposite of :func:`enable_fake_quant`; observers go on observing."""
    for fake in _fakes(model, weights, activations):
        fake.quantizing = False


def fake_quant_effects(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    """What a model in training scores in eval mode with all, some and no fake quantization.

    The value at ``"weights and activations"`` simulates the int8 model in float.

    Args:
        model: from :func:`prepare_qat`; switches and modes are put back.
        evaluate: ``evaluate(model)``, e.g. the accuracy on a test set.

    Returns:
        ``{"float": ..., "weights": ..., "activations": ..., "weights and activations": ...}``

    Example:
        >>> fxq.fake_quant_effects(prepared, accuracy)                                # doctest: +SKIP
        {'float': 0.91, 'weights': 0.64, 'activations': 0.90, 'weights and activations': 0.63}
    """
    fakes = _fakes(model)
    before = [(fake, fake.quantizing) for fake in fakes]
    modes = [(module, module.training) for module in model.modules()]
    cases = {"float": (False, False), "weights": (True, False), "activations": (False, True)}
    scores = {}
    model.eval()
    try:
        for name, (weights, activations) in (cases | {"weights and activations": (True, True)}).items():
            for fake in fakes:
                fake.quantizing = weights if fake.weight else activations
            scores[name] = evaluate(model)
    finally:
        for fake, quantizing in before:
            fake.quantizing = quantizing
        for module, training in modes:
            module.training = training
    return scores


def _fakes(model: nn.Module, weights: bool = True, activations: bool = True) -> list[FakeQuantize]:
    found = fake_quantizes(model)
    if not found:
        raise StageError(
            f"nothing in this {type(model).__name__} is prepared for training; start with "
            f"fxq.prepare_qat(model, example_inputs)"
        )
    return [fake for fake in found if (weights if fake.weight else activations)]
