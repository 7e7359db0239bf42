"""Code is written when a module runs or is read, and not before."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from models_for_tests import Lambda, conv, quiet
from torch import nn
from torch.fx import graph_module

import fxq
from fxq.errors import InputError
from fxq.graph_module import REFERENCE, QuantModule
from fxq.lazy_code import interpreted

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Lambda(lambda m, x: torch.relu(m.a(x)) + 1.0, a=conv())


@pytest.fixture
def lowered() -> QuantModule:
    made = quiet(fxq.quantize, net(), [X], progress=False)
    assert isinstance(made, QuantModule)
    return made


def has_code(module: nn.Module) -> bool:
    return "_code" in vars(module)


def test_only_what_runs_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    cache = graph_module._loader.cache
    monkeypatch.setattr(graph_module._loader, "cache", lambda src, *rest: sources.append(src) or cache(src, *rest))
    lowered = quiet(fxq.quantize, net(), [X], progress=False)
    assert not sources and not has_code(lowered) and not has_code(lowered.meta[REFERENCE])
    lowered(X), lowered(X)
    assert len(sources) == 1 and has_code(lowered) and not has_code(lowered.meta[REFERENCE])


def test_calibrating_with_few_batches_compiles_nothing() -> None:
    few, many, by_hand = (quiet(fxq.prepare, net(), X) for _ in range(3))
    fxq.calibrate(few, [X, X, X])
    fxq.calibrate(many, [X] * 6, num_batches=5)
    for _ in range(3):
        by_hand(X)
    assert (has_code(few), has_code(many), has_code(by_hand)) == (False, True, True)
    assert fxq.observer_table(few) == fxq.observer_table(by_hand)
    few(X)
    assert has_code(few)


def test_interpreted_calls_are_those_of_the_code() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()

        def forward(self, x: torch.Tensor, scale: torch.Tensor, *, shift: float = 1.0) -> torch.Tensor:
            return self.a(x) * scale + shift

    prepared = quiet(fxq.prepare, Called().eval(), (X, torch.ones(1)))
    with interpreted([prepared]):
        found = prepared(X, scale=torch.ones(1) * 2)
        for args, kwargs in (((X,), {}), ((X, X, 1.0, X), {}), ((X, X), {"other": 1})):
            with pytest.raises(InputError):
                prepared(*args, **kwargs)
    assert not has_code(prepared)
    assert torch.equal(prepared(X, torch.ones(1) * 2), found)


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.code,
        lambda m: inspect.signature(m.forward).parameters["x"],
        lambda m: type(m).forward.__code__,
        str,
        lambda m: m._lineno_map,
        lambda m: torch.jit.trace(m, X, check_trace=False),
    ],
)
def test_whoever_asks_finds_it(lowered: QuantModule, read: Callable[[nn.Module], object]) -> None:
    assert not has_code(lowered)
    assert read(lowered) is not None
    assert has_code(lowered)


def test_a_new_graph_has_its_own_code(lowered: QuantModule) -> None:
    before = lowered(X)
    output = next(iter(reversed(lowered.graph.nodes)))
    with lowered.graph.inserting_before(output):
        output.args = (lowered.graph.call_function(torch.neg, output.args),)
    assert torch.equal(lowered(X), before)  # as of torch.fx, until told
    lowered.recompile()
    assert not has_code(lowered)
    assert torch.equal(lowered(X), -before) and "neg" in lowered.code


def test_copies_have_code_of_their_own(lowered: QuantModule) -> None:
    twin = copy.deepcopy(lowered)
    expected = lowered(X)
    assert has_code(lowered) and not has_code(twin)
    del lowered
    assert torch.equal(twin(X), expected)
