"""Functions that would crash the process, or show its memory, when a file calls them."""

from __future__ import annotations

import io
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv, quiet
from test_graph_json import closed, node, opened
from torch import nn

import fxq
from fxq.checked_functions import checked, empty, empty_like, fold, power, repeat_interleave, unfold
from fxq.errors import FileFormatError

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    fxq.save(model, buffer)
    buffer.seek(0)
    again = fxq.load(buffer)
    second = io.BytesIO()
    fxq.save(again, second)
    second.seek(0)
    torch.testing.assert_close(fxq.load(second)(X), again(X), rtol=0, atol=0)
    return again


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.repeat_interleave(m.a(x), 2, dim=1),
        lambda m, x: m.a(x).repeat_interleave(2, 1),
        lambda m, x: m.a(x).repeat_interleave(torch.arange(4), dim=1),
        lambda m, x: F.fold(F.unfold(m.a(x), 3, padding=1), (8, 8), 3, padding=1),
        lambda m, x: m.fold(m.unfold(m.a(x))),
        lambda m, x: m.a(x) + torch.empty(8).fill_(1.0) + torch.empty_like(x[:, :1]).zero_() + x.new_empty(8).fill_(2),
    ],
)
def test_files_call_them_to_the_same_numbers(forward: Any) -> None:
    net = Lambda(forward, a=conv(), unfold=nn.Unfold(3, padding=1), fold=nn.Fold((8, 8), 3, padding=1))
    model = quiet(fxq.quantize, net, [X])
    torch.testing.assert_close(reloaded(model)(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("count", [1 << 62, 1 << 60, 1 << 31, -1])
def test_counts_that_no_memory_holds(count: int) -> None:
    counts = torch.full((16,), count)
    for arguments in ((counts,), (torch.ones(16), counts), (torch.ones(16), counts, 0)):
        with pytest.raises(ValueError, match="negative or too large"):
            repeat_interleave(*arguments)
    with pytest.raises(ValueError, match="negative or too large"):
        repeat_interleave(torch.ones(16), repeats=counts)


@pytest.mark.parametrize("options", [{"dilation": 1 << 62}, {"padding": (1, 1 << 61)}, {"stride": -(1 << 62)}])
def test_sizes_that_overflow(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is no size"):
        unfold(X, 8, **options)
    with pytest.raises(ValueError, match="is no size"):
        fold(X, (8, 8), 8, **options)


@pytest.mark.parametrize("position", [3, 4, 5, 6])
def test_a_convolution_whose_sizes_overflow(position: int) -> None:
    buffer = io.BytesIO()
    fxq.save(quiet(fxq.quantize, Lambda(lambda m, x: m.a(x), a=conv()), [X]), buffer)
    content, tensors = opened(buffer.getvalue())
    node(content["regions"][""], "call_function", "op:conv2d")["args"]["tuple"][position] = 1 << 61
    with pytest.raises(FileFormatError, match="is no size"):
        fxq.load_reference(io.BytesIO(closed(content, tensors)))


def test_a_layer_whose_sizes_overflow() -> None:
    model = quiet(fxq.quantize, Lambda(lambda m, x: m.unfold(m.a(x)), a=conv(), unfold=nn.Unfold(3)), [X])
    buffer = io.BytesIO()
    fxq.save(model, buffer)
    content, tensors = opened(buffer.getvalue())
    content["regions"][""]["modules"]["unfold"]["arguments"]["dilation"] = 1 << 62
    with pytest.raises(FileFormatError, match="is no size"):
        fxq.load(io.BytesIO(closed(content, tensors)))


def test_memory_that_was_not_cleared() -> None:
    assert not empty(1000).any() and not empty((10, 10), dtype=torch.int64).any()
    assert not empty_like(torch.ones(1000)).any()
    assert checked("call_method", "new_empty") == ("call_method", "new_zeros")


def test_whole_numbers_are_raised_to_small_powers_only() -> None:
    assert checked("call_function", operator.pow) == ("call_function", power)
    assert power(3, 4) == 81
    torch.testing.assert_close(power(torch.tensor([2.0]), 100), torch.tensor([2.0**100]))
    with pytest.raises(ValueError, match="too large an exponent"):
        power(9, 9**9)
