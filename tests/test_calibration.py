"""Calibration data of every form, and data that is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, Two, conv
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxq
from fxq.backends import get_backend
from fxq.calibration import forward_parameters, model_inputs
from fxq.config import named_qconfig
from fxq.errors import CalibrationError, StageError
from fxq.observers import OBSERVERS
from fxq.qdq import is_quantize

X = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
LABELS = [torch.tensor([i, i]) for i in range(4)]


def one() -> nn.Module:
    torch.manual_seed(1)
    return fxq.prepare(Lambda(lambda m, x: torch.relu(m.a(x)), a=conv()), X[0])


def two() -> nn.Module:
    torch.manual_seed(1)
    return fxq.prepare(Two(lambda m, x, y: m.a(x) + m.a(y), a=conv()), (X[0], X[0]))


class Optional(nn.Module):
    """A second input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.a(x) if mask is None else self.a(x) * mask


class Many(nn.Module):
    """As many inputs as one likes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.a(inputs[0]) + self.a(inputs[1])


def seen(prepared: nn.Module) -> list[dict[str, Any]]:
    return fxq.observer_records(prepared)


def looped(prepared: nn.Module, *batches: tuple[torch.Tensor, ...]) -> list[dict[str, Any]]:
    """What the observers saw after a plain loop."""
    for batch in batches:
        prepared(*batch)
    return seen(prepared)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.cat(X), torch.cat(LABELS)), batch_size=2)


FORMS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: X,
    "tuples": lambda: [(x,) for x in X],
    "lists": lambda: [[x] for x in X],
    "dicts": lambda: [{"x": x} for x in X],
    "dicts with more": lambda: [{"x": x, "label": y, "id": 3} for x, y in zip(X, LABELS, strict=True)],
    "pairs": lambda: list(zip(X, LABELS, strict=True)),
    "triples": lambda: [(x, y, "name") for x, y in zip(X, LABELS, strict=True)],
    "loader": loader,
    "generator": lambda: (x for x in X),
    "tensor": lambda: torch.stack(X),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_means_the_same(form: str) -> None:
    prepared = one()
    fxq.calibrate(prepared, FORMS[form]())
    assert seen(prepared) == looped(one(), *((x,) for x in X))
    assert {r["batches"] for r in seen(prepared) if r["watches"] == ["x"]} == {4}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "tensor"])
def test_every_form_in_one_call(form: str) -> None:
    torch.manual_seed(1)
    net = Lambda(lambda m, x: torch.relu(m.a(x)), a=conv())
    prepared = fxq.prepare(net, X[0], calibration="simple")
    fxq.calibrate(prepared, X)
    assert torch.equal(fxq.quantize(net, FORMS[form](), calibration="simple")(X[0]), fxq.convert(prepared)(X[0]))
    assert torch.equal(fxq.quantize(net, FORMS[form]())(X[0]), fxq.quantize(net, X)(X[0]))


def scales(qmodel: nn.Module) -> list[float]:
    nodes = fxq.partition.reference_of(qmodel).graph.nodes
    return [node.args[1] for node in nodes if is_quantize(node)]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_order_of_the_batches(observer: str) -> None:
    """Ranges do not depend on it, but for a moving average; the same order gives the same model, bit for bit."""
    torch.manual_seed(1)
    net = Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(), b=conv(4, 4))
    data = [x * scale for x, scale in zip(X, (0.5, 3.0, 1.0, 2.0), strict=True)]
    backend = get_backend("x86")
    qconfig = fxq.QConfig(activation=backend.activation.replace(observer=observer), weight=backend.weight)

    def quantized(order: list[int], calibration: str) -> nn.Module:
        batches = [data[i] for i in order]
        return fxq.quantize(net, batches, qconfig=qconfig, example_inputs=X[0], calibration=calibration)

    first, again, other = (quantized(order, "default") for order in ([0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 0, 2]))
    assert torch.equal(first(X[0]), again(X[0]))
    assert (scales(first) == scales(other)) == (observer != "moving_average")
    if observer != "moving_average":  # without corrections nothing depends on it
        uncorrected = (quantized(order, "simple")(X[0]) for order in ([0, 1, 2, 3], [3, 1, 0, 2]))
        assert torch.equal(*uncorrected)


@pytest.mark.parametrize(
    "batch",
    [(X[0], X[1]), [X[0], X[1]], (X[0], X[1], LABELS[0]), {"y": X[1], "x": X[0]}, {"x": X[0], "z": 1, "y": X[1]}],
)
def test_two_inputs(batch: Any) -> None:
    prepared = two()
    fxq.calibrate(prepared, [batch])
    assert seen(prepared) == looped(two(), (X[0], X[1]))


def test_a_batch_too_short() -> None:
    with pytest.raises(CalibrationError, match=r"1 members.*needs 2 inputs \(x, y\).*forward_fn"):
        fxq.calibrate(two(), [(X[0],)])


def test_a_dict_of_strangers_is_the_input() -> None:
    parameters = list(inspect.signature(lambda features: 0).parameters.values())
    assert model_inputs({"a": 1}, parameters) == (({"a": 1},), {})


def test_var_args() -> None:
    prepared = fxq.prepare(Many().eval(), (X[0], X[1]))
    fxq.calibrate(prepared, [(X[0], X[1]), [X[2], X[3]]])
    assert {r["batches"] for r in seen(prepared) if "channel" not in r["spec"]} >= {2}
    qmodel = fxq.quantize(Many().eval(), [(X[0], X[1])])
    assert qmodel(X[0], X[1]).shape == (2, 4, 8, 8)


def test_a_label_or_an_optional_input() -> None:
    batches = list(zip(X, LABELS, strict=True))
    with pytest.raises(CalibrationError, match=r"label or the optional input 'mask'.*forward_fn"):
        fxq.quantize(Optional().eval(), batches)
    prepared = fxq.prepare(Optional().eval(), X[0])
    fxq.calibrate(prepared, batches, forward_fn=lambda model, batch: model(batch[0]))
    assert {r["batches"] for r in seen(prepared) if "channel" not in r["spec"]} >= {4}
    fxq.quantize(Optional().eval(), batches, example_inputs=X[0], forward_fn=lambda model, batch: model(batch[0]))


def test_forward_fn_needs_example_inputs() -> None:
    with pytest.raises(CalibrationError, match="example_inputs"):
        fxq.quantize(Optional().eval(), X, forward_fn=lambda model, batch: model(batch))


def test_forward_fn_is_given_the_batch_as_it_is() -> None:
    got: list[Any] = []
    prepared = one()
    fxq.calibrate(prepared, [{"image": X[0]}], forward_fn=lambda m, b: got.append((m, b)) or m(b["image"]))
    assert got[0][0] is prepared
    assert seen(prepared) == looped(one(), (X[0],))


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_num_batches(count: int) -> None:
    prepared, taken = one(), []
    fxq.calibrate(prepared, (taken.append(x) or x for x in X), num_batches=count)
    assert seen(prepared) == looped(one(), *((x,) for x in X[:count]))
    assert len(taken) == min(count, 4)  # no batch is read to be thrown away


def test_the_first_batch_of_a_generator_counts() -> None:
    net = Lambda(lambda m, x: torch.relu(m.a(x)), a=conv())
    assert torch.equal(fxq.quantize(net, (x for x in X))(X[0]), fxq.quantize(net, X)(X[0]))
    two_batches = fxq.quantize(net, (x for x in X), num_batches=2)(X[0])
    assert torch.equal(two_batches, fxq.quantize(net, X[:2])(X[0]))


def test_calibrating_twice_goes_on() -> None:
    prepared = one()
    fxq.calibrate(prepared, X[:2])
    fxq.calibrate(prepared, X[2:])
    assert seen(prepared) == looped(one(), *((x,) for x in X))


@pytest.mark.parametrize("data", [[], iter(()), DataLoader(TensorDataset(torch.empty(0, 3, 8, 8)))])
def test_no_data(data: Any) -> None:
    with pytest.raises(CalibrationError, match="empty: give at least one batch"):
        fxq.calibrate(one(), data)
    with pytest.raises(CalibrationError, match="empty: give at least one batch"):
        fxq.quantize(Lambda(lambda m, x: m.a(x), a=conv()), data)


def test_num_batches_of_none_at_all() -> None:
    for count in (0, -1):
        with pytest.raises(CalibrationError, match="num_batches"):
            fxq.calibrate(one(), X, num_batches=count)


def test_data_that_is_no_iterable() -> None:
    for call in (lambda: fxq.calibrate(one(), 3), lambda: fxq.quantize(Lambda(lambda m, x: m.a(x), a=conv()), None)):
        with pytest.raises(CalibrationError, match="iterable"):
            call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_input_that_is_not_finite(value: float) -> None:
    bad = X[1].clone()
    bad[0, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match=r"input 'x'.*batch 1.*NaN or inf"):
        fxq.calibrate(one(), [X[0], bad])
    with pytest.raises(CalibrationError, match=r"input 'x'.*batch 1.*NaN or inf"):
        fxq.calibrate(one(), [{"x": X[0]}, {"x": bad}])


class Inner(nn.Module):
    def __init__(self, bad: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.bad = conv(), conv(4, 4), bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.bad(self.first(x)))


BAD = {
    "sqrt": lambda x: torch.sqrt(x),
    "truediv": lambda x: x / torch.relu(x),
    "log": lambda x: torch.log(torch.relu(x)),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("call", ["calibrate", "loop", "quantize", "forward_fn"])
def test_not_finite_only_inside(kind: str, call: str) -> None:
    net = Lambda(lambda m, x: m.block(x), block=Inner(BAD[kind]))
    with torch.no_grad():
        net.block.first.weight.zero_()
        net.block.first.weight[:, 0, 1, 1] = 1.0
        net.block.first.bias.fill_(0.1)
    fine, bad = torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), -1.0)
    message = rf"node '{kind}\w*' \(module 'block'\), batch 1: .*(NaN|inf)"
    prepared = fxq.prepare(net, fine)
    with pytest.raises(CalibrationError, match=message):
        if call == "calibrate":
            fxq.calibrate(prepared, [fine, bad])
        elif call == "forward_fn":
            fxq.calibrate(prepared, [fine, bad], forward_fn=lambda model, batch: model(batch))
        elif call == "loop":
            looped(prepared, (fine,), (bad,))
        else:
            fxq.quantize(net, [fine, bad])


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_bar(
    progress: bool | None, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    prepared = one()
    capsys.readouterr()
    fxq.calibrate(prepared, X, num_batches=3, progress=progress)
    text = capsys.readouterr().err
    if terminal if progress is None else progress:
        assert "calibrate" in text and "3/3" in text
    else:
        assert text == ""


def test_the_bar_knows_the_length_in_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    net = Lambda(lambda m, x: m.a(x), a=conv())
    fxq.quantize(net, X, progress=True)
    assert "4/4" in capsys.readouterr().err
    fxq.quantize(net, (x for x in X), progress=True)
    assert "4it" in capsys.readouterr().err


def test_no_gradients_and_the_same_outputs() -> None:
    prepared, modes = one(), []
    fxq.calibrate(prepared, X[:1], forward_fn=lambda m, b: modes.append(torch.is_grad_enabled()) or m(b))
    assert modes == [False]
    net = Lambda(lambda m, x: torch.relu(m.a(x)), a=conv())
    assert torch.equal(fxq.prepare(net, X[0])(X[0]), net(X[0]))


def test_only_a_prepared_model() -> None:
    net = Lambda(lambda m, x: m.a(x), a=conv())
    with pytest.raises(StageError, match=r"not made by fxq.*prepare"):
        fxq.calibrate(net, X)
    with pytest.raises(StageError, match="is lowered, but a prepared one is needed"):
        fxq.calibrate(fxq.quantize(net, X), X)


def test_forward_parameters_are_the_models() -> None:
    assert [p.name for p in forward_parameters(two())] == ["x", "y"]


class Known(nn.Module):
    """A convolution, then an activation whose range is known, then one that reads it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Conv2d(3, 8, 1), activation, nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(x)))


@pytest.mark.parametrize("observer", [*OBSERVERS, "percentile:90"])
@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        (nn.ReLU(), 0.0, None),
        (nn.ReLU6(), 0.0, 6.0),
        (nn.Hardtanh(0.0, 4.0), 0.0, 4.0),
        (nn.Hardtanh(-1.0, 1.0), -1.0, 1.0),
        (nn.Softmax(1), 0.0, 1.0),
        (nn.Sigmoid(), 0.0, 255 / 256),
        (nn.Hardsigmoid(), 0.0, 255 / 256),
        (nn.Tanh(), -1.0, 127 / 128),
        (nn.Hardswish(), -0.375, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_ranges_that_the_graph_knows(
    activation: nn.Module, low: float, high: float | None, observer: str
) -> None:
    torch.manual_seed(0)
    qconfig = named_qconfig("per_channel", get_backend("x86"))
    qconfig = fxq.QConfig(activation=qconfig.activation.replace(observer=observer), weight=qconfig.weight)
    data = [20 * torch.randn(2, 3, 9, 9) for _ in range(2)]
    model = Known(activation).eval()
    prepared = fxq.prepare(model, data[0], qconfig=qconfig)
    fxq.calibrate(prepared, data, progress=False)
    reference = fxq.convert_to_reference(prepared)
    reader = next(node for node in reference.graph.nodes if node.name == "last")
    _, scale, zero_point = reader.args[0].args
    real_low, real_high = -zero_point * scale, (255 - zero_point) * scale
    # Half a step is what rounding the zero point may move the range.
    assert real_low >= low - scale / 2 and (high is None or real_high <= high * 1.0001 + scale / 2 * (low < 0))
    if low == 0.0:
        assert zero_point == 0
    if isinstance(activation, (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh)):  # whatever was seen: kernels dictate it
        assert (real_low, real_high) == (low, high)


@pytest.mark.parametrize(
    ("forward", "batch", "expected"),
    [
        (lambda x, **more: x, {"x": 1, "mask": 2}, ((), {"x": 1, "mask": 2})),
        (lambda x, scale=1: x, {"x": 1, "label": 2}, ((), {"x": 1})),
        (lambda batch, **more: batch, {"x": 1}, (({"x": 1},), {})),
    ],
)
def test_what_a_dict_means(forward, batch, expected):
    assert model_inputs(batch, list(inspect.signature(forward).parameters.values())) == expected


class Pair(nn.Module):
    """Both inputs are optional, and needed."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, image=None, text=None):
        return self.image(image) @ self.text(text).T


class Spare(nn.Module):
    """Takes a second input that it can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, other=None, targets=None):
        return self.last(self.first(x) if other is None else self.first(x) + other)


def batches_of(*members):
    return [members] * 2


def test_members_that_the_model_fails_without_are_inputs():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert fxq.quantize(Pair().eval(), batches_of(x, y), progress=False)(x, y).shape == (3, 3)


def test_dicts_for_a_forward_that_requires_nothing():
    batch = {"image": torch.randn(3, 4), "text": torch.randn(3, 4), "label": torch.zeros(3)}
    qmodel = fxq.quantize(Pair().eval(), [batch, batch], progress=False)
    assert qmodel(image=batch["image"], text=batch["text"]).shape == (3, 3)


def test_members_that_may_be_labels_are_an_error_which_example_inputs_resolve():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(CalibrationError, match="a label or the optional input 'other'"):
        fxq.quantize(Spare().eval(), batches_of(x, y), progress=False)
    both = fxq.quantize(Spare().eval(), batches_of(x, y), example_inputs=(x, y), progress=False)
    assert not torch.equal(both(x, y), both(x, 3 * y))
    one = fxq.quantize(Spare().eval(), batches_of(x, y), example_inputs=(x,), progress=False)
    assert one(x).shape == (3, 4)
    assert "linear" in fxq.compare(Spare().eval(), one, batches_of(x, y), example_inputs=(x,))


def test_a_member_that_is_none_is_no_label():
    x = torch.randn(3, 4)
    assert fxq.quantize(Spare().eval(), batches_of(x, None), progress=False)(x).shape == (3, 4)


def test_members_in_the_place_of_targets_are_labels():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, images, targets=None):
            return self.head(images)

    x = torch.randn(3, 4)
    assert fxq.quantize(Detector().eval(), batches_of(x, [{}]), progress=False)(x).shape == (3, 4)
