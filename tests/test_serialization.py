"""Files: what is saved comes back bit for bit, and no file does harm."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, Two, conv, quiet
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.errors import BackendError, FileFormatError, FxqError, StageError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
HEADER = 4 + 4 + 32


def attention(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens = m.a(x).flatten(2).transpose(1, 2)
    return m.mha(tokens, tokens, tokens, need_weights=False)[0]


def shared_weight(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(m.b(m.a(x)), m.b.weight, None, padding=1) + m.b(m.a(x) * 0.5)


CASES = {
    "conv-relu": lambda m, x: torch.relu(m.a(x)),
    "cat": lambda m, x: torch.cat([m.a(x), m.b(m.a(x))], 1),
    "chunk": lambda m, x: torch.cat([m.a(x).chunk(2, dim=1)[1] * 2.0, x], dim=1),
    "pad": lambda m, x: m.b(F.pad(m.a(x), (1, 2, 0, 1))),
    "slice": lambda m, x: m.b(m.a(x)[:, :, 1:-1, ::2])[..., 0],
    "add": lambda m, x: torch.relu(m.a(x) + m.b(m.a(x))),
    "shape": lambda m, x: m.a(x).view(x.shape[0], -1, x.size(2) * x.size(3) // 2).mean(-1),
    "interpolate": lambda m, x: F.interpolate(m.a(x), size=(x.shape[-2] * 2, x.shape[-1] * 2), mode="nearest"),
    "split-method": lambda m, x: m.b(m.a(x)).split(2, 1)[1],
    "split-function": lambda m, x: torch.split(m.b(m.a(x)), [1, 3], 1)[1],
    "einsum": lambda m, x: torch.einsum("nchw,dc->ndhw", m.a(x), m.b.weight[:, :, 0, 0]),
    "norm-method": lambda m, x: m.a(x).norm(dim=1),
    "channels-last": lambda m, x: m.b(m.a(x).contiguous(memory_format=torch.channels_last)),
    "device": lambda m, x: m.a(x) + torch.arange(8, dtype=torch.float32, device=torch.device("cpu")),
    "dtype": lambda m, x: m.a(x).to(torch.float64).sum(dtype=torch.float64),
    "outputs": lambda m, x: {"a": m.a(x), "rest": (m.b(m.a(x)), [x])},
    "shared": shared_weight,
    "attention": attention,
}


def model(forward=CASES["add"]) -> Lambda:
    torch.manual_seed(3)
    return Lambda(forward, a=conv(), b=conv(4, 4), mha=nn.MultiheadAttention(4, 2, batch_first=True))


def reference_of(net: nn.Module, *inputs: torch.Tensor, backend="x86") -> nn.Module:
    prepared = fxq.prepare(net, inputs, backend=backend)
    prepared(*inputs)
    return quiet(fxq.convert_to_reference, prepared)


def tables(net: nn.Module) -> list[str]:
    return [fxq.summary(net), fxq.graph_table(net), fxq.fusion_table(net)]


def bits(value, other) -> None:
    torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.fxq"
    fxq.save(reference_of(model(), X), path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    reference = reference_of(model(CASES[case]), X)
    lowered = quiet(fxq.lower, reference, "x86")
    fxq.save(reference, tmp_path / "net.fxq")
    again, loaded = fxq.load_reference(tmp_path / "net.fxq"), quiet(fxq.load, tmp_path / "net.fxq")
    bits(again(X), reference(X))
    bits(loaded(X), lowered(X))
    assert tables(again) == tables(reference)
    assert tables(loaded) == tables(lowered)
    assert fxq.graph_records(loaded) == fxq.graph_records(lowered)


@pytest.mark.parametrize("case", ["chunk", "attention", "shape"])
def test_saving_what_was_loaded_gives_the_same_file(case: str, tmp_path: Path) -> None:
    fxq.save(reference_of(model(CASES[case]), X), tmp_path / "1.fxq")
    fxq.save(fxq.load_reference(tmp_path / "1.fxq"), tmp_path / "2.fxq")
    assert (tmp_path / "1.fxq").read_bytes() == (tmp_path / "2.fxq").read_bytes()


def test_two_inputs_and_keywords(tmp_path: Path) -> None:
    net = Two(lambda m, x, y: m.a(x) + m.a(y), a=conv())
    reference = reference_of(net, X, X + 1)
    fxq.save(reference, tmp_path / "net.fxq")
    bits(fxq.load(tmp_path / "net.fxq")(y=X, x=X + 1), quiet(fxq.lower, reference, "x86")(X + 1, X))


def test_a_default_comes_back(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return self.conv(x) * scale

    reference = reference_of(Scaled().eval(), X)
    fxq.save(reference, tmp_path / "net.fxq")
    bits(fxq.load_reference(tmp_path / "net.fxq")(X), reference(X))


@pytest.mark.parametrize("backend", ["qnnpack", "fbgemm", "onednn"])
def test_for_another_backend(backend: str, saved: Path) -> None:
    expected = quiet(fxq.lower, fxq.load_reference(saved), backend)
    loaded = quiet(fxq.load, saved, backend)
    assert loaded.plan.backend == backend
    bits(loaded(X), expected(X))


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    own = dataclasses.replace(get_backend("x86"), name="own")
    reference = reference_of(model(), X, backend=own)
    fxq.save(reference, tmp_path / "net.fxq")
    with pytest.raises(BackendError, match=r"net\.fxq.*'own'.*backend="):
        fxq.load(tmp_path / "net.fxq")
    bits(fxq.load(tmp_path / "net.fxq", own)(X), fxq.lower(reference, own)(X))
    assert fxq.load(tmp_path / "net.fxq", "qnnpack").plan.backend == "qnnpack"
    with pytest.raises(BackendError, match="'nope'"):
        fxq.load(tmp_path / "net.fxq", "nope")


def test_truncated_anywhere(saved: Path, tmp_path: Path) -> None:
    data, cut = saved.read_bytes(), tmp_path / "cut.fxq"
    lengths = [0, 1, 3, 4, 6, 7, 8, 20, HEADER - 1, HEADER, HEADER + 1, len(data) // 2, len(data) - 1]
    for length in lengths:
        cut.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match=r"cut\.fxq"):
            fxq.load(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(FileFormatError, match="checksum"):
        fxq.load(cut)


def test_no_flipped_bit_passes(saved: Path, tmp_path: Path) -> None:
    data, bad = saved.read_bytes(), tmp_path / "bad.fxq"
    chance = random.Random(0)
    places = [*range(HEADER), *(chance.randrange(len(data)) for _ in range(300))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        bad.write_bytes(changed)
        with pytest.raises(FileFormatError, match=r"bad\.fxq"):
            fxq.load_reference(bad)


def test_flipped_bits_under_a_checksum_that_fits(saved: Path, tmp_path: Path) -> None:
    """Whoever wrote the file: it loads or is refused, nothing else."""
    data, bad = saved.read_bytes(), tmp_path / "bad.fxq"
    chance = random.Random(1)
    refused = 0
    for _ in range(150):
        payload = bytearray(data[HEADER:])
        payload[chance.randrange(len(payload))] ^= 1 << chance.randrange(8)
        bad.write_bytes(data[:8] + hashlib.sha256(payload).digest() + payload)
        try:
            fxq.load_reference(bad)
        except FileFormatError as error:
            assert "bad.fxq" in str(error)
            refused += 1
    assert refused > 0


def test_wrong_magic_and_version(saved: Path, tmp_path: Path) -> None:
    data, bad = saved.read_bytes(), tmp_path / "bad.fxq"
    bad.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(FileFormatError, match="not an fxq file"):
        fxq.load(bad)
    bad.write_bytes(data[:4] + (7).to_bytes(4, "little") + data[8:])
    with pytest.raises(FileFormatError, match="version 7; this fxq reads version 1"):
        fxq.load(bad)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.fxq", tmp_path):
        with pytest.raises(FileFormatError, match=rf"{re.escape(str(path))}: cannot be read \("):
            fxq.load(path)


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_float_leaf_cannot_be_saved(tmp_path: Path) -> None:
    net = Lambda(lambda m, x: m.b(m.leaf(m.a(x))), a=conv(), leaf=Untraceable(), b=conv(4, 4))
    with pytest.raises(FxqError, match=r"node 'leaf'.*module 'leaf'"):
        fxq.save(reference_of(net, X), tmp_path / "net.fxq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["float", "prepared", "lowered"])
def test_only_references_are_saved(stage: str, tmp_path: Path) -> None:
    prepared = fxq.prepare(model(), X)
    prepared(X)
    net = {"float": model, "prepared": lambda: prepared, "lowered": lambda: fxq.convert(prepared)}[stage]()
    with pytest.raises(StageError):
        fxq.save(net, tmp_path / "net.fxq")
