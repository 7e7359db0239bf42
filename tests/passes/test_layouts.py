"""Code that fxq does not know gets tensors in the order of their dimensions where the float model has them so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv, quiet
from torch import nn
from torch.utils._pytree import tree_leaves

import fxq
from fxq.numerics import sqnr
from fxq.partition import regions_of
from fxq.plan import CHANNELS_LAST

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CHANNELS_LAST_X = X.contiguous(memory_format=torch.channels_last)


class Viewing(nn.Module):
    """Cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x if x.sum() < 1e9 else -x).view(len(x), -1)


@torch.fx.wrap
def viewed(x: torch.Tensor) -> torch.Tensor:
    return x.view(len(x), -1)


def around_a_region(m, x):
    y = m.a(x)
    return (y if y.sum() < 1e9 else -y).view(len(y), -1)


READERS = {
    "around a region": around_a_region,
    "a float module": lambda m, x: m.viewing(m.a(x)),
    "a float module after a float op": lambda m, x: m.viewing(F.gelu(m.a(x))),
    "a function of the user's": lambda m, x: viewed(m.a(x)),
    "as_strided": lambda m, x: torch.as_strided(m.a(x), (2, 4), (4 * 64, 64)),
    "stride": lambda m, x: m.a(x) * m.a(x).stride(1),
    "view_as": lambda m, x: m.a(x).view_as(x.new_zeros(2, 256)),
    "view_as_complex": lambda m, x: torch.view_as_complex(m.a(x).reshape(2, 4, 8, 4, 2)).abs(),
    "a dict in the output": lambda m, x: {"one": m.a(x), "more": [m.b(m.a(x))]},
    "the output of three dimensions": lambda m, x: F.conv3d(m.a(x)[:, :, None], m.weight).sigmoid(),
}  # fmt: skip


def net(reader: Any) -> nn.Module:
    weight = nn.Parameter(torch.randn(4, 4, 1, 1, 1, generator=torch.Generator().manual_seed(2)))
    return Lambda(reader, a=conv(3, 4), b=conv(4, 2), viewing=Viewing(), weight=weight)


@pytest.mark.parametrize("reader", READERS)
def test_code_that_fxq_does_not_know_may_take_views(reader):
    model = net(READERS[reader])
    qmodel = fxq.quantize(model, [X])
    frozen = [quiet(fxq.freeze, qmodel, X)] if reader.startswith(("a dict", "the output")) else []
    with torch.no_grad():
        expected = tree_leaves(model(X))
        for made in (qmodel, copy.deepcopy(qmodel), fxq.lower(fxq.convert_to_reference(prepared(model)), "qnnpack"),
                     *frozen):  # fmt: skip
            for one, other in zip(expected, tree_leaves(made(X)), strict=True):
                assert sqnr(one, other) > 25
                assert other.stride() == one.stride()


def prepared(model: nn.Module) -> nn.Module:
    made = quiet(fxq.prepare, model, X)
    made(X)
    return made


@pytest.mark.parametrize("of", ["the inputs", "the weights"])
def test_models_in_channels_last_stay_so(of):
    model = net(lambda m, x: m.b(m.a(x)))
    if of == "the weights":
        model.a.to(memory_format=torch.channels_last)
    x = CHANNELS_LAST_X if of == "the inputs" else X
    qmodel = fxq.quantize(model, [x])
    assert CHANNELS_LAST in qmodel.meta["fxq_reference"].plan.properties
    assert not contiguous(qmodel)
    assert qmodel(x).stride() == model(x).stride()


def contiguous(qmodel: nn.Module) -> list[str]:
    return [record["node"] for record in fxq.graph_records(qmodel) if record["kernel"] == "aten::contiguous"]


def test_integers_are_reordered_once_and_only_for_who_needs_it():
    model = net(lambda m, x: (lambda y: [y, m.viewing(y), F.gelu(y).mean((2, 3))])(m.a(x)))
    qmodel = fxq.quantize(model, [X])
    assert contiguous(qmodel) == ["a_contiguous"]
    assert "convs and linears in int8     1 of 1\n" in fxq.summary(qmodel)


def test_what_is_no_image_is_not_reordered():
    model = net(lambda m, x: m.fc(torch.relu(m.a(x)).flatten(1)))
    model.fc = nn.Linear(256, 4).eval()
    assert not contiguous(fxq.quantize(model, [X]))


def test_files_know_of_channels_last(tmp_path):
    for x, expected in ((X, ["b_contiguous"]), (CHANNELS_LAST_X, [])):
        fxq.save(fxq.quantize(net(lambda m, x: m.b(m.a(x))), [x]), tmp_path / "model.fxq")
        assert contiguous(fxq.load(tmp_path / "model.fxq")) == expected


def test_each_region_gives_contiguous_outputs():
    def forward(m, x):
        y = m.a(x)
        return m.b(y.view(y.shape) if y.sum() < 1e9 else y)

    qmodel = fxq.quantize(net(forward), [X])
    assert [len(contiguous(region)) for region in regions_of(qmodel).values()] == [1, 1]
