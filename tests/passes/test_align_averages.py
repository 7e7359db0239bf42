"""Averages half way between two integers become the even one in the reference graph, kernels and onnxruntime."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda
from torch import nn

import fxq
from fxq.graph_module import QuantModule
from fxq.partition import reference_of
from fxq.qdq import DEQUANTIZE, QUANTIZE, QUANTIZE_AVERAGE, is_quantize

AVERAGES = {
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "padded": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 4),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
}


def averaging(average, **qconfig) -> QuantModule:
    """A model whose conv, with values on both sides of zero, is averaged before another conv."""
    torch.manual_seed(3)
    net = Lambda(lambda m, x: m.b(average(m.a(x))), a=nn.Conv2d(3, 16, 3, padding=1), b=nn.Conv2d(16, 8, 1))
    data = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    qmodel = fxq.quantize(net.eval(), data, progress=False, **qconfig)
    assert isinstance(qmodel, QuantModule)
    return qmodel


def average_of(qmodel: QuantModule) -> torch.fx.Node:
    (node,) = [n for n in reference_of(qmodel).graph.nodes if n.target is QUANTIZE_AVERAGE]
    return node


def on_the_grid(qmodel: QuantModule, x: torch.Tensor) -> torch.Tensor:
    """Inputs that are integers times the scale, as none of them is next to a half."""
    quantize = next(n for n in reference_of(qmodel).graph.nodes if is_quantize(n))
    return DEQUANTIZE(QUANTIZE(x, *quantize.args[1:]), *quantize.args[1:3])


@pytest.mark.parametrize("name", AVERAGES)
def test_kernels_and_onnxruntime_give_the_reference_graphs_integers(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    qmodel = averaging(AVERAGES[name])
    x = on_the_grid(qmodel, torch.randn(32, 3, 16, 16))
    expected = reference_of(qmodel)(x)
    assert torch.equal(qmodel(x), expected)
    fxq.to_onnx(qmodel, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert torch.equal(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), expected)


def test_zero_points_are_even_and_scales_short() -> None:
    _, scale, zero_point, *_ = average_of(averaging(AVERAGES["average pool"])).args
    assert zero_point % 2 == 0 and zero_point > 0
    assert math.frexp(scale)[0] * 2**12 % 1 == 0


def test_what_is_no_average_is_quantized_as_ever() -> None:
    reference = reference_of(averaging(AVERAGES["global"]))
    others = [n for n in reference.graph.nodes if is_quantize(n) and n.args[0].target is not F.adaptive_avg_pool2d]
    assert len(others) == 3 and all(n.target is QUANTIZE for n in others)


def test_the_range_is_covered_all_the_same() -> None:
    """With another zero_point the scale makes up for the step that is lost."""
    net = Lambda(lambda m, x: m.b(F.avg_pool2d(x, 2)), b=nn.Conv2d(1, 8, 1)).eval()
    for least in (-1.0, -1.003, -1.006):  # one of them has an odd zero_point
        x = torch.linspace(least, 1.0, 64).reshape(1, 1, 8, 8)
        prepared = fxq.prepare(net, x, calibration="simple")
        fxq.calibrate(prepared, [x], progress=False)
        reference = fxq.convert_to_reference(prepared)
        node = next(n for n in reference.graph.nodes if is_quantize(n))
        _, scale, zero_point, low, high, _ = node.args
        assert zero_point % 2 == 0
        assert (low - zero_point) * scale <= least + scale / 2 and (high - zero_point) * scale >= 1.0 - scale / 2


def test_powers_of_two_stay() -> None:
    _, scale, zero_point, *_ = average_of(averaging(AVERAGES["global"], pow2_scales=True)).args
    assert zero_point % 2 == 0 and math.frexp(scale)[0] == 0.5
