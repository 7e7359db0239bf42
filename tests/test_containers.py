"""A quantized model returns containers of the classes that the float model returns, in every form that has them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, canonical, conv, op_names, quiet
from torch import nn
from torch.utils._pytree import tree_map

import fxq
from fxq.containers import is_made_of_items, plain_containers
from fxq.errors import FxqError
from fxq.numerics import sqnr

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Results(list):  # type: ignore[type-arg]
    """A list of a class of its own."""


class Named(dict):  # type: ignore[type-arg]
    """A dict of a class of its own."""


def flat(a, b):
    return OrderedDict(out=b, aux=a)


def nested(a, b):
    return OrderedDict(out=OrderedDict(b=b), rest={"list": [a, OrderedDict(b=b)], "pair": (a, b)})


def own_classes(a, b):
    return Results([a, Named(b=b)])


def net(returned: Any) -> nn.Module:
    def forward(m, x):
        a = m.a(x)
        return returned(a, m.b(a))

    return Lambda(forward, a=conv(3, 4), b=conv(4, 2))


def kinds(value: Any) -> Any:
    """The classes of a nested output, with its keys."""
    if isinstance(value, dict):
        return type(value), [(key, kinds(item)) for key, item in value.items()]
    return (type(value), [kinds(item) for item in value]) if isinstance(value, (list, tuple)) else type(value)


def stages(model: nn.Module) -> dict[str, Any]:
    prepared = fxq.prepare(model, X)
    fxq.calibrate(prepared, [X])
    reference = fxq.convert_to_reference(prepared)
    lowered = fxq.lower(reference, "x86")
    frozen = quiet(fxq.freeze, lowered, X)
    copies = copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))
    return dict(zip(("prepared", "reference", "lowered", "frozen", "deepcopy", "pickle"),
                    (prepared, reference, lowered, frozen, *copies), strict=True))  # fmt: skip


@pytest.mark.parametrize("returned", [flat, nested, own_classes])
def test_every_stage_returns_what_the_float_model_returns(returned):
    model = net(returned)
    expected = kinds(model(X))
    for stage, made in stages(model).items():
        assert kinds(made(X)) == expected, stage


@pytest.mark.parametrize("returned", [flat, nested])
def test_a_file_and_an_exported_program_keep_ordered_dicts(returned, tmp_path):
    model = net(returned)
    qmodel = fxq.quantize(model, [X])
    fxq.save(qmodel, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq")
    program = fxq.to_exported_program(qmodel, X)
    assert kinds(loaded(X)) == kinds(fxq.from_exported_program(program)(X)) == kinds(model(X))
    assert type(program.module()(X)) is OrderedDict


def test_a_class_that_a_file_cannot_name_is_an_error(tmp_path):
    with pytest.raises(FxqError, match="test_containers"):
        fxq.save(fxq.quantize(net(own_classes), [X]), tmp_path / "model.fxq")


def test_torchscript_returns_a_plain_dict():
    qmodel = fxq.quantize(net(flat), [X])
    out = fxq.to_torchscript(qmodel, X)(X)
    assert list(out) == ["out", "aux"]
    tree_map(lambda one, other: torch.testing.assert_close(one, other), out, dict(qmodel(X)))


def test_onnx_names_outputs_by_keys(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for returned, names in ((flat, ["out", "aux"]), (own_classes, ["output_0", "output_1_b"])):
        path = Path(tmp_path / "model.onnx")
        fxq.to_onnx(fxq.quantize(net(returned), [X]), path)
        session = onnxruntime.InferenceSession(path)
        assert [output.name for output in session.get_outputs()] == names


def test_a_container_is_no_operation_that_stays_float():
    qmodel = fxq.quantize(net(nested), [X])
    assert "2 of 2" in fxq.summary(qmodel)
    assert not [record for record in fxq.graph_records(qmodel) if record["type"] == "float"]


def test_a_module_that_cannot_be_traced_gets_the_container_that_it_is_given():
    class Fuse(nn.Module):
        def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
            assert type(features) is OrderedDict
            return features["out"] if features["aux"].sum() < 1e9 else -features["out"]

    model = Lambda(lambda m, x: m.fuse(OrderedDict(aux=m.a(x), out=m.b(x))), a=conv(3, 4), b=conv(3, 4), fuse=Fuse())
    with torch.no_grad():
        assert sqnr(model(X), fxq.quantize(model, [X])(X)) > 25


def test_plain_containers_leave_a_graph_of_dicts_and_lists():
    module = canonical(net(nested), X)
    plain_containers(module.graph)
    module.recompile()
    assert op_names(module) == ["conv2d", "conv2d"]
    assert type(module(X)["out"]) is not OrderedDict and list(module(X)["rest"]["list"][1]) == ["b"]


class Refusing(dict):  # type: ignore[type-arg]
    def __init__(self) -> None:
        super().__init__()


class Adding(list):  # type: ignore[type-arg]
    def __init__(self, items: Any) -> None:
        super().__init__([*items, 1])


@pytest.mark.parametrize("value", [{}, [], (1,), defaultdict(list, a=[1]), Refusing(), Adding([])])
def test_only_what_its_items_make_again_is_a_container_of_its_own(value):
    assert not is_made_of_items(value)
    assert is_made_of_items(OrderedDict(a=1)) and is_made_of_items(Results([1])) and is_made_of_items(Named())
