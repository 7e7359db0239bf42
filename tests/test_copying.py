"""What the one call borrows of the user's model: it is never written, and nothing of it is in the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, conv, quiet
from torch import nn
from torch.nn.utils import parametrizations

import fxq
from fxq.api import as_inputs
from fxq.backends import get_backend
from fxq.config import QConfigMapping
from fxq.copying import give_back
from fxq.partition import reference_of, regions_of
from fxq.preparation import prepare_model

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Clipped(nn.Conv2d):
    """Writes to its own weight, and to a buffer, in each forward."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.calls += 1
            self.weight.clamp_(-0.01, 0.01)
        return super().forward(x)


class Blocking(nn.Module):
    """Cannot be traced, and writes to the weights of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4))
        self.own, self.rare, self.clipped = conv(4, 4, 1), conv(4, 4), Clipped()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.calls += 1
            self.rare.weight.mul_(0.9)
            if isinstance(self.own, nn.Conv2d):
                self.own.weight.mul_(0.9)
        if float(x.sum()) == 0:
            x = self.rare(x)
        return torch.nn.functional.conv2d(self.clipped(self.own(self.inner(x))), self.rare.weight, padding=1)


def tied(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.a(x)) + torch.nn.functional.conv2d(m.a(x), m.b.weight * 2, padding=1) + m.writer(m.a(x))


def with_tied_weights() -> nn.Module:
    model = Lambda(tied, a=conv(), b=conv(4, 4), writer=Blocking())
    model.writer.rare.weight = model.b.weight
    return model


def attention(m: nn.Module, x: torch.Tensor) -> Any:
    words = m.tokens(x[:, 0, 0].abs().mul(4).long().clamp(max=9))
    return m.out(m.lstm(m.attention(words, words, words)[0])[0])


def with_attention() -> nn.Module:
    return Lambda(
        attention, tokens=nn.Embedding(10, 8, max_norm=0.1), attention=nn.MultiheadAttention(8, 2, batch_first=True),
        lstm=nn.LSTM(8, 8, batch_first=True), out=parametrizations.weight_norm(nn.Linear(8, 4)),
    )  # fmt: skip


def hooked() -> nn.Module:
    model = plain()

    def write(layer: nn.Module, _: Any) -> None:
        with torch.no_grad():
            layer.weight.mul_(0.5)

    model.b.register_forward_pre_hook(write)
    return model


def plain() -> nn.Module:
    return Lambda(
        lambda m, x: m.fc(torch.relu(m.c(torch.relu(m.bn(m.b(torch.relu(m.a(x))))))).mean((2, 3))),
        a=conv(), b=conv(4, 4), bn=nn.BatchNorm2d(4), c=conv(4, 4), fc=nn.Linear(4, 5),
    )  # fmt: skip


def in_regions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 4), Blocking()).eval()


class Root(nn.Module):
    """Cannot be traced itself; a region of it has a leaf with regions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 4), Blocking(), nn.ReLU(), conv(4, 4))
        self.norm, self.last = nn.BatchNorm2d(4), conv(4, 4)
        self.listed = [self.last.weight]
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x) if float(x.abs().sum()) > 0 else x
        return self.norm(self.last(y)) + self.listed[0].mean()


class Padded(nn.Conv2d):
    """Has code of its own, if only to be made."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 4, 3, padding=1)


def with_subclasses() -> nn.Module:
    """One that torch's function reads, one that the model scales, and one that it writes to."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.c.weight.clamp_(-0.1, 0.1)
        return m.c(m.b(m.bn(m.a(x)))) + m.b.weight.mean()

    return Lambda(forward, a=Padded(3), bn=nn.BatchNorm2d(4), b=Padded(4), c=Padded(4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain, "tied": with_tied_weights, "attention": with_attention, "hooked": hooked, "leaf": in_regions,
    "partition": Root, "subclasses": with_subclasses,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {}, "per_tensor, advanced": {"qconfig": "per_tensor", "calibration": "advanced"},
    "max": {"calibration": "max"}, "float layers": {"exclude": nn.Conv2d}, "budget": {"target": "sqnr:1"},
}  # fmt: skip
# A budget runs the model itself, which some of these write to; some have no conv of torch's own class to exclude.
CASES = [
    (kind, options) for kind in MODELS for options in OPTIONS
    if (options != "budget" or kind == "plain")
    and (options != "float layers" or kind not in ("attention", "subclasses"))
]  # fmt: skip


def bits(model: nn.Module) -> dict[str, Any]:
    return {
        path: (tensor.clone(), tensor._version, tensor.data_ptr())
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for path, (tensor, *others) in before.items():
        assert torch.equal(tensor, after[path][0]) and others == list(after[path][1:]), path


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model)(X)  # some models count their calls


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_result_and_the_model_are_independent(kind: str, options: str) -> None:
    model = MODELS[kind]()
    before = bits(model)
    qmodel = quiet(fxq.quantize, model, [X, X * 2], example_inputs=X, **OPTIONS[options])
    same(before, bits(model))
    expected, state = run(qmodel), {name: value.clone() for name, value in tensors(qmodel).items()}
    again = run(reference_of(qmodel))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    assert all(torch.equal(value, state[name]) for name, value in tensors(qmodel).items())
    assert torch.equal(run(qmodel), expected) and torch.equal(run(reference_of(qmodel)), again)
    mine = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    for part in (qmodel, reference_of(qmodel)):
        assert not mine & {t.untyped_storage().data_ptr() for t in [*part.parameters(), *part.buffers()]}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def test_steps_and_the_one_call_agree_where_weights_are_borrowed() -> None:
    for kind in ("plain", "leaf"):
        model = MODELS[kind]()
        prepared = fxq.prepare(model, X)
        fxq.calibrate(prepared, [X])
        reference = quiet(fxq.convert_to_reference, prepared)
        if kind == "plain":  # of one graph
            reference = fxq.correct_bias(reference, prepared, [X])
        once = quiet(fxq.quantize, model, [X], example_inputs=X)
        assert torch.equal(run(fxq.lower(reference, "x86")), run(once))


def own_bytes(model: nn.Module, prepared: nn.Module) -> int:
    """Bytes of a prepared model's parameters that are not on the memory of the model."""
    mine = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    theirs = [p.untyped_storage() for p in prepared.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in theirs if s.data_ptr() not in mine}.values())


@pytest.mark.parametrize(
    ("kind", "borrows"),
    [
        ("plain", ["a.weight", "a.bias", "b.weight", "c.weight", "c.bias", "fc.weight", "fc.bias"]),
        ("subclasses", ["a.weight", "b.bias", "c.bias"]),
        ("partition", [f"body.{path}" for path in (
            "0.weight", "0.bias", "3.weight", "3.bias", "1.inner.0.weight", "1.clipped.bias",
        )]),
    ],
)  # fmt: skip
def test_preparing_copies_only_what_it_must(kind: str, borrows: list[str]) -> None:
    model = MODELS[kind]()
    table = get_backend("x86")
    config = QConfigMapping().set_global("per_channel").resolved(table, ())
    borrowing, copying = (prepare_model(model, as_inputs(X, model), table, config, borrow=b) for b in (True, False))
    saved = own_bytes(model, copying) - own_bytes(model, borrowing)
    assert saved == sum(4 * model.get_parameter(path).numel() for path in borrows)
    assert own_bytes(model, copying) == sum(4 * p.numel() for p in {id(p): p for p in copying.parameters()}.values())
    for region in regions_of(borrowing).values():
        give_back(region.modules(), model)
    assert own_bytes(model, borrowing) == own_bytes(model, copying)
