"""Corrupted files and random graphs. ``FXQ_FUZZ=5000`` runs that many corruptions instead of a few hundred,
``FXQ_GRAPHS=300`` that many graphs.

Whatever a file holds, loading and running it ends in an fxq error or in a model, soon, and in one process.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models_for_tests import Lambda, conv, quiet
from test_graph_json import closed, opened
from test_serialization import HEADER
from torch import nn

import fxq
from fxq.agreement import kernel_agreement
from fxq.backends import get_backend
from fxq.errors import FileFormatError, FxqError

COUNT = int(os.environ.get("FXQ_FUZZ", "300"))
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
GRAPHS = int(os.environ.get("FXQ_GRAPHS", "20"))
SECONDS = 20


def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(m.b(m.a(x)) + m.a(x))
    y = torch.cat([F.max_pool2d(y, 2), m.c(y)[:, :, ::2, ::2]], 1).reshape(x.shape[0], -1, 16)
    return m.gru(y)[0].mean(1)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, torch.Tensor]:
    torch.manual_seed(0)
    net = Lambda(forward, a=conv(), b=conv(4, 4), c=conv(4, 4), gru=nn.GRU(16, 5, batch_first=True))
    path = tmp_path_factory.mktemp("fuzz") / "net.fxq"
    model = quiet(fxq.quantize, net, [X])
    fxq.save(model, path)
    return path.read_bytes(), model(X)


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """Whatever takes longer than ``SECONDS`` is interrupted and fails."""

    def late(*_: Any) -> None:
        pytest.fail(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sealed(payload: bytes) -> bytes:
    """The payload under a header whose checksum fits."""
    header = b"FXQ\x00" + (2).to_bytes(4, "little")
    return header + hashlib.sha256(payload).digest() + payload


def flip(data: bytes, chance: random.Random, most: int = 3) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, most)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.choice([len(data), chance.randint(1, 400)]) :]


def with_tensors_swapped(data: bytes, chance: random.Random) -> bytes:
    _, tensors = opened(data)
    archive = torch.load(io.BytesIO(data[HEADER:]), weights_only=True)
    section = chance.choice([name for name in tensors if len(tensors[name]) > 1])
    one, two = chance.sample(sorted(tensors[section]), 2)
    found = archive["tensors"][section]
    found[one], found[two] = found[two], found[one]
    buffer = io.BytesIO()
    torch.save(archive, buffer)
    return sealed(buffer.getvalue())


VALUES = [None, True, -1, 0, 1, 10**30, 0.0, float("nan"), float("inf"), -1e300, "", "x", [], {}, [[]], {"node": "x"},
          {"tuple": []}, {"dtype": "int8"}, {"slice": [0, None, None]}, "a" * 1000, 2**31, -(2**63)]  # fmt: skip


def with_json_edited(data: bytes, chance: random.Random) -> bytes:
    """A forger who knows both checksums changes values anywhere in the JSON."""
    content, tensors = opened(data)
    for _ in range(chance.randint(1, 2)):
        holder, key = chance.choice(places(content))
        holder[key] = copy.deepcopy(chance.choice([*VALUES, holder[chance.choice(keys(holder))]]))
    return closed(content, tensors)


def with_tensor_edited(data: bytes, chance: random.Random) -> bytes:
    content, tensors = opened(data)
    section = tensors[chance.choice(sorted(tensors))]
    name = chance.choice(sorted(section))
    tensor = section[name]
    section[name] = chance.choice(
        [
            tensor.flatten(), tensor[:1], tensor.double(), tensor.to(torch.int64), torch.empty(0), tensor.unsqueeze(0),
            torch.full_like(tensor, 127), tensor.float() * float("nan"), torch.zeros(()), torch.ones(3, 3, 3, 3, 3),
        ]
    )  # fmt: skip
    return closed(content, tensors)


def keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as its holder and key."""
    if not isinstance(value, (dict, list)):
        return []
    return [(value, key) for key in keys(value)] + [place for key in keys(value) for place in places(value[key])]


# Corruptions that a checksum sees: every one must be refused.
SEEN: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda data, chance: data[: chance.randrange(len(data))],
    "cut": cut,
    "flipped": flip,
    "longer": lambda data, chance: data + bytes(chance.randint(1, 9)),
    "version": lambda data, chance: data[:4] + chance.choice([0, 1, 3, 2**31]).to_bytes(4, "little") + data[8:],
    "flipped under a checksum": lambda data, chance: sealed(flip(data[HEADER:], chance)),
    "cut under a checksum": lambda data, chance: sealed(cut(data[HEADER:], chance)),
    "tensors swapped": with_tensors_swapped,
}
# Forgeries: refused, or a model, which may fail on the inputs as any model may.
FORGED = {"json": with_json_edited, "tensor": with_tensor_edited}


@pytest.mark.parametrize("kind", SEEN)
def test_corrupted(kind: str, honest: tuple[bytes, torch.Tensor], tmp_path: Path) -> None:
    data, expected = honest
    chance, path, outcomes = random.Random(kind), tmp_path / "net.fxq", Counter[str]()
    for _ in range(max(COUNT // 10, 10)):
        bad = SEEN[kind](data, chance)
        if bad == data:
            continue
        path.write_bytes(bad)
        try:
            with soon():
                found = quiet(fxq.load, path)(X)
        except FileFormatError as error:
            assert "net.fxq" in str(error)
            outcomes["refused"] += 1
        else:  # a bit that nobody reads, such as one of the archive's dates
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            outcomes["same"] += 1
    print(kind, dict(outcomes))
    assert outcomes["refused"] > 0
    assert "checksum" in kind or not outcomes["same"]


@pytest.mark.parametrize("kind", FORGED)
def test_forged(kind: str, honest: tuple[bytes, torch.Tensor], tmp_path: Path) -> None:
    data, _ = honest
    chance, path, outcomes = random.Random(kind), tmp_path / "net.fxq", Counter[str]()
    for _ in range(COUNT):
        path.write_bytes(FORGED[kind](data, chance))
        try:
            with soon():
                model = quiet(fxq.load, path)
        except FxqError as error:
            outcomes["refused"] += 1
            assert str(error)
            continue
        try:
            with soon():
                assert model(X) is not None
            outcomes["runs"] += 1
        except Exception as error:
            outcomes[f"fails to run: {type(error).__name__}"] += 1
    print(kind, dict(outcomes))
    assert outcomes["refused"] > 0


# -- random graphs


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int]]]:
    """Steps ``(op, operand, other operand)`` of a graph with branches and shared weights; operands count backwards."""
    names = ["conv", "shared", "add", "mul", "cat", "pool", "avg", "relu", "reshape", "scale", "hardswish", "slice"]
    step = st.tuples(st.sampled_from(names), st.integers(0, 3), st.integers(0, 3))
    return draw(st.integers(0, 2**16)), draw(st.lists(step, min_size=2, max_size=9))


class Random(nn.Module):
    """Every value has 4 channels and 8 x 8 pixels, so that any two can meet."""

    def __init__(self, seed: int, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        self.first, self.shared = conv(), conv(4, 4)
        self.convs = nn.ModuleList(conv(8 if name == "cat" else 4, 4) for name, _, _ in steps)
        self.last = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [self.first(x)]
        for (name, one, two), layer in zip(self.steps, self.convs, strict=True):
            a, b = values[-1 - one % len(values)], values[-1 - two % len(values)]
            values.append(self.step(name, layer, a, b))
        return self.last((values[-1] + values[len(values) // 2]).mean((2, 3)))

    def step(self, name: str, layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if name in ("conv", "shared"):
            return layer(a) if name == "conv" else self.shared(a)
        if name == "cat":
            return layer(torch.cat([a, b], 1))
        if name == "reshape":
            return a.reshape(a.shape[0], 4, -1).transpose(1, 2).transpose(2, 1).reshape(a.shape[0], 4, 8, 8)
        return {
            "add": lambda: a + b, "mul": lambda: a * b, "pool": lambda: F.max_pool2d(a, 3, 1, 1),
            "avg": lambda: F.avg_pool2d(a, 3, 1, 1), "relu": lambda: torch.relu(a), "scale": lambda: a * 0.5,
            "hardswish": lambda: F.hardswish(a), "slice": lambda: torch.cat([a[:, 2:], b[:, :2]], 1),
        }[name]()  # fmt: skip


@settings(
    max_examples=GRAPHS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
    phases=[Phase.generate],  # a graph has few steps; making it smaller would take many times the test
)  # fmt: skip
@given(graphs(), st.sampled_from(["x86", "qnnpack", "onednn"]))
def test_random_graphs_are_saved_loaded_and_right(
    tmp_path_factory: pytest.TempPathFactory, graph: tuple[int, list[tuple[str, int, int]]], backend: str
) -> None:
    model = Random(*graph).eval()
    prepared = fxq.prepare(model, X, backend=backend)
    prepared(X)
    reference = quiet(fxq.convert_to_reference, prepared)
    lowered = quiet(fxq.lower, reference, backend)
    path = tmp_path_factory.mktemp("random") / "net.fxq"
    fxq.save(lowered, path)
    loaded, again = quiet(fxq.load, path), fxq.load_reference(path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), lowered(X), rtol=0, atol=0)
        torch.testing.assert_close(again(X), reference(X), rtol=0, atol=0)
    assert fxq.graph_table(loaded) == fxq.graph_table(lowered)
    agreement = quiet(kernel_agreement, again, get_backend(backend), X)
    assert max(line.max_lsb for line in agreement) <= 1
