"""Parts of a model that are TorchScript stay float, and say so."""

from __future__ import annotations

import copy

import pytest
import torch
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.compiled import SCRIPTED, python_modules
from fxq.numerics import sqnr

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MAKE = {"script": torch.jit.script, "trace": lambda part: torch.jit.trace(part, torch.randn(2, 4, 8, 8))}


def whole(m, x):
    return m.b(m.part(m.a(x)))


def in_regions(m, x):
    return whole(m, x if x.sum() < 1e9 else -x)


def net(make, forward) -> nn.Module:
    part = nn.Sequential(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)), nn.ReLU()).eval()
    return Lambda(forward, a=conv(3, 4), part=MAKE[make](part), b=conv(4, 2))


@pytest.mark.parametrize("forward", [whole, in_regions])
@pytest.mark.parametrize("make", MAKE)
def test_a_torchscript_part_stays_float_and_says_so(make, forward, tmp_path):
    model = net(make, forward)
    qmodel = fxq.quantize(model, [X])
    assert SCRIPTED in " ".join(fxq.summary(qmodel).split())
    with torch.no_grad():
        assert sqnr(model(X), qmodel(X)) > 25
    assert torch.equal(copy.deepcopy(qmodel)(X), qmodel(X))
    fxq.save(qmodel, tmp_path / "model.fxq")
    assert torch.equal(fxq.load(tmp_path / "model.fxq", model=model)(X), qmodel(X))


@pytest.mark.parametrize("forward", [whole, in_regions])
@pytest.mark.parametrize("make", MAKE)
def test_what_torchscript_computes_counts_as_float(make, forward):
    macs = {layer: 8 * 8 * 2 * 9 * count for layer, count in {"a": 3 * 4, "part": 4 * 4, "b": 4 * 2}.items()}
    share = 1 - macs["part"] / sum(macs.values())
    assert f"{share:.1%} of" in fxq.summary(fxq.quantize(net(make, forward), [X]))


def test_python_modules_are_those_that_take_hooks():
    assert [path for path, _ in python_modules(net("script", whole))] == ["", "a", "b"]
