"""Models that return classes of their own: files name these, and only the float model's code has them."""

from __future__ import annotations

import collections
import dataclasses
import io
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from models_for_tests import conv, quiet
from test_graph_json import closed, opened
from torch import nn

import fxq
from fxq.errors import ConfigError, FxqError, StageError
from fxq.record_classes import record_name
from fxq.serialization import load_for_tables

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Pair = collections.namedtuple("Pair", "scores mean")


class Typed(NamedTuple):
    scores: torch.Tensor
    mean: torch.Tensor


@dataclasses.dataclass
class Scores:
    scores: torch.Tensor
    mean: torch.Tensor | None = None


@dataclasses.dataclass
class Output(OrderedDict[str, Any]):
    """As transformers and diffusers have it."""

    scores: torch.Tensor
    mean: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class Busy:
    """One that does something when it is made."""

    scores: torch.Tensor
    mean: torch.Tensor

    def __post_init__(self) -> None:
        self.scores = self.scores + 1


class Net(nn.Module):
    class Inner(NamedTuple):
        scores: torch.Tensor
        mean: torch.Tensor

    def __init__(self, made: Callable[..., Any] = Pair) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.made = conv(), made

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.made(y, mean=y.mean(1))


def quantized(made: Callable[..., Any]) -> nn.Module:
    return quiet(fxq.quantize, Net(made).eval(), [X])


def saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    fxq.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("made", [Pair, Typed, Scores, Output, Net.Inner])
def test_what_is_loaded_returns_the_class(made: Callable[..., Any]) -> None:
    model = quantized(made)
    loaded = fxq.load(saved(model), model=Net(made))
    expected, found = model(X), loaded(X)
    assert type(found) is type(expected) is made
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.mean, expected.mean)
    assert saved(loaded).getvalue() == saved(model).getvalue()


def test_the_code_around_it_may_be_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model, around = quantized(Pair), type("Around", (nn.Sequential,), {"__module__": "elsewhere"})
    assert type(fxq.load(saved(model), model=around(Net()))(X)) is Pair
    with pytest.raises(ConfigError, match=r"returns a 'test_record_classes:Pair', and the code .*elsewhere.* has no"):
        fxq.load(saved(model), model=around(nn.ReLU()))


def test_without_the_float_model() -> None:
    model = quantized(Scores)
    with pytest.raises(ConfigError, match=r"'test_record_classes:Scores'.*model= the float model"):
        fxq.load(saved(model))
    shown = load_for_tables(saved(model))
    for table in (fxq.summary, fxq.graph_table, fxq.fusion_table):
        assert table(shown) == table(model)
    with pytest.raises(StageError, match=r"the code of 'test_record_classes:Scores' is missing"):
        shown(X)


@pytest.mark.parametrize("nested", [True, False])
def test_what_is_not_saved(nested: bool) -> None:
    class Local(NamedTuple):
        scores: torch.Tensor
        mean: torch.Tensor

    with pytest.raises(FxqError, match="which is not one of torch's own functions"):
        saved(quantized(Local if nested else Busy))


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "subprocess:Popen", "subprocess:CompletedProcess", "collections:Counter", "builtins:eval", "",
        ":", "a", "test_record_classes", "test_record_classes:", "test_record_classes:Busy", "test_record_classes:nope",
        "test_record_classes:Net", "test_record_classes:quantized", "test_record_classes:Pair.__new__",
        "test_record_classes:torch.Size", "test_record_classes:collections.Counter", "test_record_classes:os",
    ],
)  # fmt: skip
def test_what_a_file_may_not_name(name: str) -> None:
    content, tensors = opened(saved(quantized(Pair)).getvalue())
    (made,) = (node for node in content["regions"][""]["nodes"] if node["target"].startswith("class:"))
    made["target"] = f"class:{name}"
    with pytest.raises(ConfigError, match="has no such dataclass, named tuple or dict"):
        fxq.load(io.BytesIO(closed(content, tensors)), model=Net())


def test_nothing_is_imported_or_run_to_find_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module may do for names that it does not have yet."""
    lazy = types.ModuleType("test_record_classes.lazy")
    asked: list[str] = []
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "test_record_classes.lazy", lazy)
    content, tensors = opened(saved(quantized(Pair)).getvalue())
    (made,) = (node for node in content["regions"][""]["nodes"] if node["target"].startswith("class:"))
    for target in ("class:test_record_classes.lazy:Output", "class:test_record_classes.absent:Output"):
        made["target"] = target
        with pytest.raises(ConfigError, match="has no such"):
            fxq.load(io.BytesIO(closed(content, tensors)), model=Net())
    assert not asked


def test_names() -> None:
    assert record_name(Net.Inner) == "test_record_classes:Net.Inner"
    assert [record_name(value) for value in (dict, tuple, int, Net, print, 3, Busy)] == [None] * 7
