"""What ``calibration="..."`` stands for: how ranges are chosen, and which corrections are made.

A preset chooses the observers of the named qconfigs (``"per_channel"``, ``"per_tensor"``); a :class:`QConfig` of the
user's own keeps its observers. The corrections are for every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxq.config import QConfig, named_qconfig
from fxq.errors import ConfigError
from fxq.op_table import Backend


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One way to calibrate.

    Attributes:
        text: what it does, for help and documentation.
        activation: observer; ``None`` leaves the qconfig's own.
        weight: observer of weights with one scale a channel; clipping a weight that has one scale for all its
            channels to what is best for the sum of them destroys the channel with the largest weights.
        equalize: scale layers that follow each other against each other where weights have one scale a tensor
            (:mod:`fxq.passes.equalize`), and absorb high biases (:mod:`fxq.passes.absorb_bias`).
        smooth: move channels of a LayerNorm that are far larger than the others into the weights that read them
            (:mod:`fxq.passes.smooth`).
        correct_rounding: take out of each layer's bias what rounding its weight adds to the mean of its output, by
            means recorded while calibrating (:mod:`fxq.passes.correct_bias`).
        correct_bias: samples with which the mean error of any cause is taken out of each layer's bias
            (:func:`fxq.correct_bias`); 0 for none.
        frugal: do so only for models traced as a whole, and with no more samples than the first batch has, a quarter
            of the model's bytes hold, or four, so that quantizing takes little more memory than the model.
        learn_rounding: learn whether each weight is rounded up or down (:func:`fxq.learn_rounding`).
    """

    text: str
    activation: str | None = None
    weight: str | None = None
    equalize: bool = False
    smooth: bool = True
    correct_rounding: bool = True
    correct_bias: int = 0
    frugal: bool = False
    learn_rounding: bool = False

    def qconfig(self, name: str, backend: Backend) -> QConfig:
        """The QConfig of a name with this preset's observers."""
        found = named_qconfig(name, backend)
        return QConfig(
            activation=found.activation.replace(observer=self.activation or found.activation.observer),
            weight=found.weight.replace(observer=(found.weight.per_channel and self.weight) or found.weight.observer),
        )


PRESETS: Mapping[str, Preset] = {
    "simple": Preset(
        text="the smallest and largest value seen",
        activation="minmax", weight="minmax", smooth=False, correct_rounding=False,
    ),
    "default": Preset(
        text="the backend's recommended observers; corrected biases, weights take over outlier channels of LayerNorms",
        correct_bias=16, frugal=True,
    ),
    "advanced": Preset(
        text="histogram ranges that clip outliers, clipped weights, equalized layers (where weights have one scale a "
        "tensor), corrected biases; no labels, no gradients",
        activation="histogram", weight="mse", equalize=True, correct_bias=64,
    ),
    "max": Preset(
        text="as advanced, and the rounding of each weight is learned",
        activation="histogram", weight="mse", equalize=True, correct_bias=64, learn_rounding=True,
    ),
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: for any other name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown calibration {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
