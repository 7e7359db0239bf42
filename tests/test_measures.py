"""SQNR and cosine summed over batches, outputs of any form, and what a metric may return."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import Lambda
from torch import nn

from fxq.errors import CalibrationError, ConfigError, InputError
from fxq.measures import Noise, OutputSqnr, evaluate, keep_batches, model_outputs, output_noise
from fxq.numerics import sqnr


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_sums_over_batches_are_the_whole(seed, parts):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(8, 5, generator=generator)
    actual = expected + 0.1 * torch.randn(8, 5, generator=generator)
    noise = Noise()
    for x, y in zip(expected.chunk(parts), actual.chunk(parts), strict=True):
        noise.add(x, y)
    assert noise.sqnr == pytest.approx(sqnr(expected, actual), abs=1e-4)
    cosine = F.cosine_similarity(expected.double().flatten(), actual.double().flatten(), 0).item()
    assert noise.cosine == pytest.approx(cosine, abs=1e-6)


def test_no_noise_and_no_signal():
    zero, one = torch.zeros(3), torch.ones(3)
    cases = {(one, one): (math.inf, 1.0), (zero, zero): (math.inf, 1.0), (zero, one): (-math.inf, 0.0),
             (one, zero): (0.0, 0.0), (one, -one): (-6.02, -1.0)}  # fmt: skip
    for (expected, actual), (decibels, cosine) in cases.items():
        noise = Noise()
        noise.add(expected, actual)
        assert noise.sqnr == pytest.approx(decibels, abs=0.01) and noise.cosine == pytest.approx(cosine)


def test_outputs_however_nested():
    net = Lambda(lambda m, x: {"a": (x, [x.long(), 2 * x]), "b": None})
    (found,) = model_outputs(net, [torch.ones(2)], None)
    assert [x.tolist() for x in found] == [[1, 1], [2, 2]]
    (found,) = model_outputs(net, ["two"], lambda model, batch: model(torch.ones(2))["a"][0])
    assert [x.tolist() for x in found] == [[1, 1]]


def test_no_float_output_is_refused():
    with pytest.raises(ConfigError, match="the model returns no float tensor"):
        model_outputs(Lambda(lambda m, x: x.argmax(1)), [torch.ones(2, 2)], None)
    with pytest.raises(ConfigError, match="forward_fn returned no float tensor"):
        model_outputs(nn.Identity(), [torch.ones(2, 2)], lambda model, batch: None)


def test_outputs_of_other_shapes_are_refused():
    for actual in ([[torch.ones(3)]], [[torch.ones(2), torch.ones(2)]]):
        with pytest.raises(InputError, match="differ in number or shape"):
            output_noise([[torch.ones(2)]], actual)


def test_sqnr_of_outputs():
    net, half = Lambda(lambda m, x: x), Lambda(lambda m, x: 0.5 * x)
    measure = OutputSqnr(net, [torch.randn(4, 2), torch.randn(2, 2)])
    assert measure(half) == pytest.approx(6.02, abs=0.01)
    assert measure(net) == math.inf


def test_keep_batches():
    assert keep_batches(iter("abc"), 2) == ["a", "b"]
    for data, count in (([], None), ("abc", 0), (5, None)):
        with pytest.raises(CalibrationError):
            keep_batches(data, count)


@pytest.mark.parametrize(
    "value", [3, 2.5, np.float32(2.5), np.int64(3), torch.tensor(2.5), torch.ones(1, 1), Fraction(5, 2)]
)
def test_numbers(value):
    assert evaluate(lambda model: value, nn.Identity()) == float(value)


@pytest.mark.parametrize("value", [None, "3", True, math.nan, -math.inf, torch.ones(2), 1j, [3]])
def test_no_numbers(value):
    with pytest.raises(ConfigError, match="higher is better"):
        evaluate(lambda model: value, nn.Identity())
