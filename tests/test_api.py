"""The one call and its steps: what they refuse, what they leave alone, and what they choose."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, Two, conv
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.errors import (
    BackendError,
    CalibrationError,
    ConfigError,
    FxqError,
    FxqWarning,
    InputError,
    StageError,
    TraceError,
)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(2)
    return Lambda(
        lambda m, x: m.fc(torch.relu(m.bn(m.a(x))).mean((2, 3))), a=conv(), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 5)
    )


def prepared_net(model: nn.Module | None = None, **options: Any) -> nn.Module:
    prepared = fxq.prepare(model or net(), X, **options)
    fxq.calibrate(prepared, [X])
    return prepared


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a model is: its tensors by bits, which objects they are, attributes, hooks and modes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}:{name}"] = (
                list(value.items()) if name in ("_modules", "_parameters", "_buffers") else copy.copy(value)
            )
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[f"{path}.{name}"] = (tensor.tolist(), tensor.requires_grad, tensor._version)
    return found


def same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith((":_modules", ":_parameters", ":_buffers")):
            assert [(n, id(v)) for n, v in value] == [(n, id(v)) for n, v in after[key]], key
        else:
            assert value == after[key], key


class Blocking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def nan_data() -> list[torch.Tensor]:
    return [X, torch.full_like(X, float("nan"))]


RAISING: dict[str, tuple[Callable[[nn.Module], Any], type[FxqError], str]] = {
    "training": (lambda m: fxq.quantize(m.train(), [X]), StageError, r"\(Lambda\) is in training mode; call .*eval"),
    "training inside": (
        lambda m: m.bn.train() and fxq.prepare(m, X), StageError, r"module 'bn' \(BatchNorm2d\) is in training mode"
    ),
    "no data": (lambda m: fxq.quantize(m, []), CalibrationError, "empty: give at least one batch"),
    "no data with inputs": (lambda m: fxq.quantize(m, [], example_inputs=X), CalibrationError, "empty"),
    "nan": (lambda m: fxq.quantize(m, nan_data()), CalibrationError, r"input 'x' of calibration batch 1.*, batch 1"),
    "uncalibrated": (lambda m: fxq.convert(fxq.prepare(m, X)), CalibrationError, "calibrate"),
    "backend": (lambda m: fxq.quantize(m, [X], backend="tpu"), BackendError, r"'tpu'.*x86, fbgemm, onednn, qnnpack"),
    "exclude a path": (lambda m: fxq.quantize(m, [X], exclude=["a", "layer9"]), ConfigError, "'layer9'"),
    "exclude a class": (lambda m: fxq.quantize(m, [X], exclude=nn.Conv3d), ConfigError, "Conv3d"),
    "qconfig name": (lambda m: fxq.quantize(m, [X], qconfig="best"), ConfigError, "'best'.*per_channel, per_tensor"),
    "qconfig type": (lambda m: fxq.quantize(m, [X], qconfig=8), ConfigError, "8 is not a qconfig"),
    "example inputs": (lambda m: fxq.prepare(m, X[:, :2]), InputError, "example inputs"),
    "other batch": (lambda m: fxq.quantize(m, [X, X[:, :2]]), InputError, r"\[2, 2, 8, 8\].*\[2, 3, 8, 8\]"),
    "mapping": (
        lambda m: fxq.quantize(m, [X], qconfig=fxq.QConfigMapping().set_module_name("nope", None)), ConfigError,
        "'nope'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RAISING)
def test_mistakes_and_that_they_leave_the_model_alone(case: str) -> None:
    call, error, message = RAISING[case]
    model = net()
    before = state(model)
    with pytest.raises(error, match=message):
        call(model)
    if not case.startswith("training"):
        same_state(before, state(model))


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
@pytest.mark.parametrize("exclude", [(), ["fc"]])
def test_the_model_is_never_modified(backend: str, exclude: Any) -> None:
    model = net()
    model.a.register_forward_hook(lambda *_: None)
    model.a.weight.requires_grad_(False)
    before, expected = state(model), model(X)
    qmodel = fxq.quantize(model, [X, X * 2], backend=backend, exclude=exclude)
    same_state(before, state(model))
    assert torch.equal(model(X), expected)
    mine = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    theirs = {tensor.data_ptr() for tensor in [*qmodel.parameters(), *qmodel.buffers()] if tensor.numel()}
    assert not mine & theirs


def test_nothing_can_be_traced() -> None:
    with pytest.raises(TraceError, match=r"Blocking cannot be traced .*test_api\.py:\d+"):
        fxq.prepare(Blocking().eval(), X)


def test_an_engine_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = fxq.convert_to_reference(prepared_net())
    monkeypatch.setattr("fxq.engine.available_engines", lambda: ("onednn",))
    for call in (lambda: fxq.prepare(net(), X, backend="qnnpack"), lambda: fxq.lower(reference, "qnnpack")):
        with pytest.raises(BackendError, match=r"no 'qnnpack' engine \(it has: onednn\); choose a backend"):
            call()


def test_an_observer_that_saw_no_data() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x).sum() + self.b(y).sum()

    prepared = fxq.prepare(Optional().eval(), (X, X))
    prepared(X, X[:0])
    message = r"node 'b' \(module 'b'\) saw no data.*stays float; calibrate.*exclude"
    with pytest.warns(FxqWarning, match=message) as seen:
        qmodel = fxq.convert(prepared)
    assert len(seen) == 1 and seen[0].filename == __file__
    kinds = {r["node"]: (r["type"], r["reason"]) for r in fxq.graph_records(qmodel)}
    assert kinds["a"] == ("int8", "")
    assert kinds["b"][0] == "float" and "saw no data" in kinds["b"][1]


STAGES: dict[str, Callable[[], nn.Module]] = {
    "float": net,
    "prepared": prepared_net,
    "reference": lambda: fxq.convert_to_reference(prepared_net()),
    "lowered": lambda: fxq.convert(prepared_net()),
}
WRONG_STAGE = [
    (fxq.convert, "prepared"),
    (fxq.convert_to_reference, "prepared"),
    (fxq.observer_table, "prepared"),
    (lambda m: fxq.calibrate(m, [X]), "prepared"),
    (lambda m: fxq.lower(m, "x86"), "reference"),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("call", "right"), WRONG_STAGE)
def test_a_step_on_the_wrong_stage(stage: str, call: Callable[[nn.Module], Any], right: str) -> None:
    model = STAGES[stage]()
    if stage == right:
        call(model)
        return
    message = "not made by fxq" if stage == "float" else f"is {stage}, but a {right} one is needed"
    with pytest.raises(StageError, match=message):
        call(model)


@pytest.mark.parametrize("stage", ["prepared", "reference", "lowered"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_preparing_twice(stage: str, wrapped: bool) -> None:
    model: nn.Module = nn.Sequential(STAGES[stage](), nn.ReLU()).eval() if wrapped else STAGES[stage]()
    for call in (lambda: fxq.prepare(model, X), lambda: fxq.quantize(model, [X])):
        with pytest.raises(StageError, match="already prepared or quantized by fxq; prepare takes the float model"):
            call()


@pytest.mark.parametrize("stage", ["prepared", "reference", "lowered"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (X[:, :2], [r"\[2, 2, 8, 8\]", r"\[2, 3, 8, 8\]"]),
        (X[0, 0], [r"\[8, 8\]", r"\[2, 3, 8, 8\]"]),
        (X.double(), ["torch.float64", "torch.float32"]),
        (X.to(torch.int32), ["torch.int32", "torch.float32"]),
        ("image", ["is a str", r"\[2, 3, 8, 8\]"]),
    ],
)
def test_inputs_the_model_cannot_take(stage: str, given: Any, words: list[str]) -> None:
    with pytest.raises(InputError, match=rf"input 'x'.*{'.*'.join(words)}"):
        STAGES[stage]()(given)


def test_another_image_size_where_the_model_cannot() -> None:
    model = Lambda(lambda m, x: m.fc(m.a(x).flatten(1)), a=conv(), fc=nn.Linear(256, 3))
    qmodel = fxq.quantize(model, [X])
    with pytest.raises(InputError, match=r"\[2, 3, 9, 9\].*\[2, 3, 8, 8\]"):
        qmodel(torch.ones(2, 3, 9, 9))


def test_too_many_and_too_few_inputs() -> None:
    model = Two(lambda m, x, y: m.a(x) + m.a(y), a=conv())
    qmodel = fxq.quantize(model, [(X, X)])
    for call, words in (
        (lambda: qmodel(X), "'y' is not given.*example inputs"),
        (lambda: qmodel(X, X, X), "traced with x, y and takes no other inputs"),
        (lambda: qmodel(X, y=X, z=X), "traced with x, y and takes no other inputs"),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize("stage", [fxq.prepare, fxq.quantize])
def test_leaving_out_what_the_model_was_traced_with(stage: Any) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, *more: torch.Tensor) -> torch.Tensor:
            x = self.conv(x) if scale is None else self.conv(x) * scale
            return sum(more, start=x)

    model, ones = Sum().eval(), torch.ones(1)
    made = fxq.prepare(model, (X, ones, ones)) if stage is fxq.prepare else fxq.quantize(model, [(X, ones, ones)])
    made(X, ones, ones)
    for given, missing in (((X, ones), "more_0"), ((X,), "scale"), ((X, None, ones), "scale")):
        with pytest.raises(InputError, match=f"'{missing}' is not given.*example inputs"):
            made(*given)


@pytest.mark.parametrize("stage", ["prepared", "reference", "lowered"])
def test_deepcopy_of_each_stage(stage: str) -> None:
    model = STAGES[stage]()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(X), model(X))
    assert fxq.graph_table(clone) == fxq.graph_table(model)
    if stage == "prepared":
        clone(X * 9)
        assert fxq.observer_table(clone) != fxq.observer_table(model)
        assert not torch.equal(fxq.convert(clone)(X), fxq.convert(model)(X))
    if stage == "reference":
        assert torch.equal(fxq.lower(clone, "x86")(X), fxq.lower(model, "x86")(X))


def test_calibration_goes_on_after_convert() -> None:
    prepared = prepared_net()
    first, before = fxq.convert(prepared), fxq.observer_table(prepared)
    expected = first(X)
    assert fxq.observer_table(prepared) == before
    fxq.calibrate(prepared, [X * 5])
    assert torch.equal(first(X), expected)
    whole = fxq.prepare(net(), X)
    fxq.calibrate(whole, [X, X * 5])
    assert torch.equal(fxq.convert(prepared)(X), fxq.convert(whole)(X))


def four_bit() -> fxq.QConfig:
    table = get_backend("x86")
    return fxq.QConfig(activation=table.activation, weight=table.weight.replace(quant_min=-8, quant_max=7))


QCONFIGS: dict[str, Callable[[], Any]] = {
    "per_channel": lambda: "per_channel",
    "per_tensor": lambda: "per_tensor",
    "qconfig": four_bit,
    "mapping": lambda: fxq.QConfigMapping().set_global("per_tensor").set_module_name("fc", None),
    "mapping of one": lambda: fxq.QConfigMapping().set_global(None).set_object_type(nn.Linear, four_bit()),
}
EXPECTED = {
    "per_channel": {"a": "per-channel(0)", "fc": "per-channel(0)"},
    "per_tensor": {"a": "per-tensor minmax", "fc": "per-tensor minmax"},
    "qconfig": {"a": "int8[-8, 7]", "fc": "int8[-8, 7]"},
    "mapping": {"a": "per-tensor minmax"},
    "mapping of one": {"fc": "int8[-8, 7]"},
}


@pytest.mark.parametrize("kind", QCONFIGS)
def test_every_kind_of_qconfig(kind: str) -> None:
    qconfig = QCONFIGS[kind]()
    prepared = prepared_net(qconfig=qconfig)
    weights = {
        slot.node: str(spec) for slot, spec in prepared.plan.specs.items() if slot.path == (1,) and spec.symmetric
    }
    assert weights.keys() == EXPECTED[kind].keys()
    for name, words in EXPECTED[kind].items():
        assert words in weights[name]
    qmodel = fxq.quantize(net(), [X], qconfig=qconfig)
    reference = fxq.correct_bias(fxq.convert_to_reference(prepared), prepared, [X])
    assert torch.equal(qmodel(X), fxq.lower(reference, "x86")(X))
    int8 = {r["node"] for r in fxq.graph_records(qmodel) if r["type"] == "int8" and r["node"] in ("a", "fc")}
    assert int8 == weights.keys()


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    get_backend.cache_clear()
    yield
    get_backend.cache_clear()


@pytest.mark.parametrize(("vnni", "bits"), [(True, 8), (False, 7)])
@pytest.mark.parametrize("backend", ["x86", "fbgemm"])
def test_bit_width_and_its_note(
    vnni: bool, bits: int, backend: str, monkeypatch: pytest.MonkeyPatch, fresh_tables: None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    qmodel = fxq.quantize(net(), [X], backend=backend)
    prepared = prepared_net(backend=backend)
    assert {spec.bits for spec in prepared.plan.specs.values() if spec.symmetric} == {bits}
    text = fxq.summary(qmodel)
    assert f"{bits}-bit weights" in text and ("no VNNI" in text) is not vnni and ("has VNNI" in text) is vnni


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}])
def test_forms_of_example_inputs(inputs: Any) -> None:
    prepared = fxq.prepare(net(), inputs)
    fxq.calibrate(prepared, [X])
    assert torch.equal(fxq.convert(prepared)(X), fxq.convert(prepared_net())(X))


def test_a_table_of_ones_own() -> None:
    own = dataclasses.replace(get_backend("x86"), name="own")
    qmodel = fxq.quantize(net(), [X], backend=own)
    assert "own" in fxq.summary(qmodel)
    assert torch.equal(qmodel(X), fxq.quantize(net(), [X])(X))


def test_steps_equal_the_one_call_and_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxqWarning)
        prepared = prepared_net()
        reference = fxq.convert_to_reference(prepared)
        whole = fxq.quantize(net(), iter([X]))
    expected = whole(X)
    assert torch.equal(fxq.convert(prepared)(X), expected)
    assert torch.equal(fxq.lower(reference, "x86")(X), expected)
    assert (reference(X) - expected).abs().max() <= 0.05 * expected.abs().max()
