"""Guarded memory cannot be written to; everything else runs as without a guard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxq.write_guard import WriteGuard, WriteRefused

WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda w: w.mul_(2), "a view": lambda w: w[0].fill_(1), "data": lambda w: w.data.zero_(),
    "out": lambda w: torch.add(w, 1, out=w), "item": lambda w: w.__setitem__(0, 1.0),
    "a list": lambda w: torch._foreach_mul_([w, torch.ones(2)], 2.0), "copied into": lambda w: w.copy_(w + 1),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITES)
def test_writes_are_refused(how: str) -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    shared = nn.Parameter(weight.detach())
    with torch.no_grad(), WriteGuard([weight]) as guard, pytest.raises(WriteRefused):
        WRITES[how](shared)
    assert guard.refused and torch.equal(weight, torch.arange(6.0).reshape(2, 3))


def test_reads_and_other_writes_are_not() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    with torch.no_grad():
        expected = layer(x) + 1
        with WriteGuard(layer.parameters()) as guard:
            assert torch.equal(layer(x).add_(1), expected)
    assert not guard.refused
