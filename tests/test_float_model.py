"""What may be given as the float model, and what torch.compile made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.errors import ConfigError, TraceError
from fxq.float_model import float_model, without_compile
from fxq.numerics import sqnr

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def whole(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.part(m.a(x)))  # type: ignore[no-any-return]


def in_regions(m: Any, x: torch.Tensor) -> torch.Tensor:
    return whole(m, x if x.sum() < 1e9 else -x)


def net(make: Any, forward: Any = whole) -> nn.Module:
    part = nn.Sequential(conv(4, 4), nn.ReLU())
    return Lambda(forward, a=conv(3, 4), part=make(part), b=conv(4, 2))


def int8_layers(qmodel: nn.Module) -> int:
    return sum(record["op"].startswith("conv2d") and record["type"] == "int8" for record in fxq.graph_records(qmodel))


@pytest.mark.parametrize("forward", [whole, in_regions])
@pytest.mark.parametrize("make", [compiled, compiled_in_place])
def test_a_compiled_part_is_quantized_like_the_module_inside(make, forward):
    model = net(make, forward)
    names, part = list(model.state_dict()), model.part
    qmodel = fxq.quantize(model, [X])
    assert int8_layers(qmodel) == 3
    with torch.no_grad():
        assert sqnr(model(X), qmodel(X)) > 25
    assert list(model.state_dict()) == names and model.part is part


@pytest.mark.parametrize("how", ["quantize", "prepare", "prepare_qat"])
def test_a_compiled_model_is_quantized_like_the_module_inside(how):
    model = compiled(net(nn.Sequential))
    if how == "quantize":
        qmodel = fxq.quantize(model, [X])
    else:
        prepared = getattr(fxq, how)(model.train(how == "prepare_qat"), X)
        prepared(X)
        qmodel = fxq.convert(prepared)
    assert int8_layers(qmodel) == 3
    assert qmodel.plan.model == "Lambda"
    assert "part" in fxq.compare(model.eval(), qmodel, [X])


def test_a_file_takes_a_compiled_model_for_its_code(tmp_path):
    model = net(compiled, in_regions)
    qmodel = fxq.quantize(model, [X])
    fxq.save(qmodel, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq", model=model)
    assert torch.equal(loaded(X), qmodel(X))


def test_without_compile_copies_no_tensor_and_only_where_something_was_compiled():
    plain, model = net(nn.Sequential), net(compiled)
    assert without_compile(plain) is plain
    inside = without_compile(model)
    ours, theirs = ({id(tensor) for tensor in m.parameters()} for m in (model, inside))
    assert ours == theirs and type(inside.part) is nn.Sequential


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_a_torchscript_model_is_refused_with_the_remedy(make):
    model = make(nn.Sequential(conv(3, 4), nn.ReLU()).eval())
    for call in (lambda: fxq.quantize(model, [X]), lambda: fxq.prepare(model, X), lambda: fxq.prepare_qat(model, X)):
        with pytest.raises(TraceError, match=r"is TorchScript .*give the Python model"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_without_float32_parameters_is_refused_with_the_remedy(dtype):
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)).eval().to(dtype)
    with pytest.raises(ConfigError, match=rf"parameter '0.weight' is {dtype}.*call model.float\(\)"):
        fxq.quantize(model, [X.to(dtype)])


def test_layers_of_other_dtypes_stay_float():
    low = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))
    model = Lambda(lambda m, x: m.low(m.a(x).bfloat16()).float(), a=conv(3, 4), low=low)
    model.low.bfloat16()
    qmodel = fxq.quantize(model, [X], calibration="advanced")
    why = {record["module"]: record["reason"] for record in fxq.graph_records(qmodel)}
    assert "not a float32 tensor" in why["low.0"] and "not a float32 tensor" in why["low.3"]
    assert int8_layers(qmodel) == 1
    with torch.no_grad():
        assert sqnr(model(X), qmodel(X)) > 25


def test_models_without_parameters_and_with_numbers_of_other_kinds_are_taken():
    assert float_model(nn.ReLU())
    model = nn.Linear(2, 2)
    model.places = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    assert float_model(model) is model
