"""Modules and tensors whose names are keywords: whatever is done with their model, code is written that compiles."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from models_for_tests import conv, quiet
from torch import nn

import fxq
from fxq.keyword_paths import attribute_code

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleDict({"from": conv(), "2": conv(), "a-b": conv(), "None": nn.Softplus()})
        self.register_buffer("class", torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.heads["from"](x) + self.heads["2"](x) + self.heads["a-b"](x)
        return self.heads["None"](y) * getattr(self, "class")


class Parts(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("class", nn.Sequential(OrderedDict([("if", conv()), ("or", nn.ReLU()), ("else", conv(4, 4))])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = getattr(self, "class")(x)
        return y if float(y.sum()) != 0 else -y


def saved_and_loaded(model: nn.Module, net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    fxq.save(model, buffer)
    buffer.seek(0)
    return fxq.load(buffer, model=net)


AGAIN: dict[str, Callable[[nn.Module, nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "file": saved_and_loaded,
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "copy": lambda model, _: copy.deepcopy(model),
    "TorchScript": lambda model, _: fxq.to_torchscript(model),
    "program": lambda model, _: fxq.from_exported_program(fxq.to_exported_program(model)),
}


@pytest.mark.parametrize("net", [Keywords(), Parts()])
@pytest.mark.parametrize("again", AGAIN)
def test_equal_numbers(again: str, net: nn.Module) -> None:
    if isinstance(net, Parts) and again in ("TorchScript", "program"):
        pytest.skip("of whole models only")
    model = quiet(fxq.quantize, net.eval(), [X])
    torch.testing.assert_close(quiet(AGAIN[again], model, net)(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("a.b", "self.a.b"),
        ("a.0", 'getattr(self.a, "0")'),
        ("class.from", 'getattr(getattr(self, "class"), "from")'),
        ("match.print", "self.match.print"),
    ],
)
def test_code(path: str, code: str) -> None:
    assert attribute_code("self", path) == code
