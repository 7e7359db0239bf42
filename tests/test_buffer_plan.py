"""Places in memory."""

from __future__ import annotations

import itertools
import random

import pytest

from fxq.buffer_plan import ALIGNMENT, Span, place


@pytest.mark.parametrize("seed", range(5))
def test_what_is_alive_at_once_does_not_overlap(seed: int) -> None:
    numbers = random.Random(seed)
    spans = []
    for _ in range(60):
        start = numbers.randrange(50)
        spans.append(Span(start, start + numbers.randrange(8), numbers.randrange(1, 3000)))
    offsets, size = place(spans)
    for (a, at), (b, other) in itertools.combinations(zip(spans, offsets, strict=True), 2):
        if a.start <= b.end and b.start <= a.end:
            assert at + a.size <= other or other + b.size <= at
    assert all(at % ALIGNMENT == 0 for at in offsets)
    assert all(at + span.size <= size for span, at in zip(spans, offsets, strict=True))
    assert size < sum(span.size for span in spans) / 2


def test_a_chain_takes_two_places() -> None:
    spans = [Span(step, step + 1, 640) for step in range(20)]
    assert place(spans)[1] == 2 * 640


def test_nothing() -> None:
    assert place([]) == ([], 0)
