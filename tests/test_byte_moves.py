"""Joins and shuffles move integers as torch's own functions do."""

from __future__ import annotations

import pytest
import torch

from fxq import onednn
from fxq.byte_moves import Join, Shuffle
from fxq.onednn_primitives import dense

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="pip install 'fxq[onednn]' for oneDNN's C API")


def images(*shape: int) -> torch.Tensor:
    return dense(torch.randint(0, 256, shape, dtype=torch.uint8))


def as_quint8(x: torch.Tensor) -> torch.Tensor:
    return torch._make_per_tensor_quantized_tensor(x, 0.1, 7)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (3, 5, 29), (1, 2)])
def test_joins(channels: tuple[int, ...], fixed: bool) -> None:
    parts = [images(2, c, 5, 4) for c in channels]
    out = dense(torch.empty(2, sum(channels), 5, 4, dtype=torch.uint8))
    call = Join().call(out, None, parts if fixed else [None] * len(parts))
    assert call(*parts) is out
    assert torch.equal(out, torch.cat(parts, 1)) and out.is_contiguous(memory_format=torch.channels_last)
    parts[0].add_(1)
    assert torch.equal(call(*parts), torch.cat(parts, 1))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 5, 4), (3, 29, 7, 7), (2, 1, 1, 1)])
def test_shuffles(shape: tuple[int, ...], fixed: bool) -> None:
    first, second = images(*shape), images(*shape)
    second[0, 0, 0, 0], first[0, 0, 0, 0] = 255, 255
    whole = torch.cat([first, second], 1)
    wanted = torch.channel_shuffle(whole, 2)
    out = dense(torch.empty_like(whole))
    call = Shuffle(shape).call(out, None, [first, second] if fixed else [None, None])
    assert call(first, second) is out and torch.equal(out, wanted)
    halves = whole.chunk(2, 1)  # that lie in one block of memory
    assert torch.equal(Shuffle(shape).call(out, None)(*halves), wanted)


def test_quantized_tensors_are_read_and_written_where_they_are() -> None:
    first, second = as_quint8(images(1, 6, 3, 3)), as_quint8(images(1, 6, 3, 3))
    out = as_quint8(dense(torch.zeros(1, 12, 3, 3, dtype=torch.uint8)))
    whole = torch.cat([first.int_repr(), second.int_repr()], 1)
    assert torch.equal(Join().call(out, None)(first, second).int_repr(), whole)
    found = Shuffle(first.shape).call(out, None, [first, second])(first, second)
    assert torch.equal(found.int_repr(), torch.channel_shuffle(whole, 2)) and found.q_scale() == 0.1
