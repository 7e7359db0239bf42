"""Files: what is saved comes back bit for bit, and no file does harm."""

from __future__ import annotations

import dataclasses
import hashlib
import io
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
from fxq.errors import BackendError, ConfigError, FileFormatError, FxqError, StageError
from fxq.plan import QuantPlan
from fxq.plan_json import encode_plan
from fxq.serialization import load_for_tables, with_header

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
    "rfft2": lambda m, x: m.b(torch.fft.irfft2(torch.fft.rfft2(m.a(x)) * m.spectrum)),
    "stft": lambda m, x: torch.stft(m.a(x).flatten(1), 32, window=m.window, return_complex=True).abs(),
    "complex": lambda m, x: m.b(torch.complex(m.a(x), m.a(x)).to(torch.complex128).imag.float()),
    "fields": lambda m, x: m.a(x).max(1).values + m.a(x).sort(1).indices[:, 0],
    "outputs": lambda m, x: {"a": m.a(x), "rest": (m.b(m.a(x)), [x])},
    "shared": shared_weight,
    "attention": attention,
    "scaled-dot-product": lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(m.a(x)), m.a(x), is_causal=True),
}


def model(forward=CASES["add"]) -> Lambda:
    torch.manual_seed(3)
    return Lambda(
        forward, a=conv(), b=conv(4, 4), mha=nn.MultiheadAttention(4, 2, batch_first=True),
        spectrum=torch.randn(4, 8, 5, dtype=torch.complex64).conj(), window=torch.hann_window(32),
    )  # fmt: skip


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
    with pytest.raises(FileFormatError, match="version 7; this fxq reads version 2"):
        fxq.load(bad)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.fxq", tmp_path):
        with pytest.raises(FileFormatError, match=rf"{re.escape(str(path))}: cannot be read \("):
            fxq.load(path)


def test_a_lowered_model_is_saved_as_its_reference(tmp_path: Path) -> None:
    reference = reference_of(model(), X)
    lowered = quiet(fxq.lower, reference, "x86")
    fxq.save(reference, tmp_path / "1.fxq")
    fxq.save(lowered, tmp_path / "2.fxq")
    assert (tmp_path / "1.fxq").read_bytes() == (tmp_path / "2.fxq").read_bytes()
    bits(fxq.load(tmp_path / "2.fxq")(X), lowered(X))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FxqError, match=r"none/net\.fxq: cannot be written \(No such file"):
        fxq.save(reference_of(model(), X), tmp_path / "none" / "net.fxq")


def test_file_objects(saved: Path) -> None:
    buffer = io.BytesIO()
    fxq.save(fxq.load_reference(saved), buffer)
    assert buffer.getvalue() == saved.read_bytes()
    buffer.seek(0)
    bits(fxq.load(buffer)(X), fxq.load(saved)(X))
    with pytest.raises(FileFormatError, match="BytesIO object: not an fxq file"):
        fxq.load(buffer)


@pytest.mark.parametrize("path", ["", "a" * 300, "a\0b", 3])
def test_what_is_no_path(path: str, saved: Path) -> None:
    with pytest.raises(FxqError, match="cannot be written"):
        fxq.save(fxq.load_reference(saved), path)
    for read in (fxq.load, fxq.load_reference, load_for_tables):
        with pytest.raises(FileFormatError, match="cannot be read"):
            read(path)


def test_a_failed_save_leaves_the_old_file(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.fxq").write_bytes(saved.read_bytes())

    def full(path: Path, data: bytes) -> None:
        path.open("wb").write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FxqError, match=r"cannot be written \(No space left"):
        fxq.save(fxq.load_reference(saved), tmp_path / "net.fxq")
    assert [path.name for path in tmp_path.iterdir()] == ["net.fxq"]
    assert (tmp_path / "net.fxq").read_bytes() == saved.read_bytes()


def test_only_the_tensor_is_written_not_what_it_is_a_part_of(tmp_path: Path) -> None:
    net = Lambda(lambda m, x: m.a(x) + m.table, a=conv(), table=torch.randn(500_000)[:8])
    fxq.save(reference_of(net, X), tmp_path / "net.fxq")
    assert (tmp_path / "net.fxq").stat().st_size < 50_000
    bits(fxq.load_reference(tmp_path / "net.fxq")(X), reference_of(net, X)(X))


def test_tensors_that_changed_places_are_seen(saved: Path, tmp_path: Path) -> None:
    """Two tensors of one shape, written by a tool that knows the outer checksum only."""
    archive = torch.load(io.BytesIO(saved.read_bytes()[HEADER:]), weights_only=True)
    tensors = archive["tensors"]["tensors "]
    tensors["a.bias"], tensors["b.bias"] = tensors["b.bias"], tensors["a.bias"]
    buffer = io.BytesIO()
    torch.save(archive, buffer)
    (tmp_path / "net.fxq").write_bytes(with_header(buffer.getvalue()))
    with pytest.raises(FileFormatError, match="not what was saved"):
        fxq.load(tmp_path / "net.fxq")


def test_every_field_of_the_plan_is_in_the_file() -> None:
    fields = {field.name for field in dataclasses.fields(QuantPlan)}
    of_other_stages = {"observers", "input_means", "smoothings", "kernels", "statistics", "unbounded"}
    assert set(encode_plan(reference_of(model(), X).plan)) == fields - of_other_stages


@pytest.mark.parametrize("stage", ["float", "prepared"])
def test_only_quantized_models_are_saved(stage: str, tmp_path: Path) -> None:
    net = model() if stage == "float" else fxq.prepare(model(), X)
    with pytest.raises(StageError):
        fxq.save(net, tmp_path / "net.fxq")
    assert not list(tmp_path.iterdir())


# -- models that need code of their own


class Untraceable(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1) * 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if float(x.sum()) > 0 else -x * self.scale


def with_leaf(leaf: nn.Module) -> Lambda:
    torch.manual_seed(5)
    return Lambda(lambda m, x: m.b(m.leaf(m.a(x))), a=conv(), leaf=leaf, b=conv(4, 4))


def test_a_module_of_ones_own_comes_from_the_model(tmp_path: Path) -> None:
    reference, path = reference_of(with_leaf(Untraceable()), X), tmp_path / "net.fxq"
    fxq.save(reference, path)
    with pytest.raises(ConfigError, match=r"net\.fxq: .*'leaf', a test_serialization\.Untraceable.*model="):
        fxq.load(path)
    other = with_leaf(Untraceable())
    other.leaf.scale.data.fill_(9.0)  # its code is wanted, not its weights
    shown = load_for_tables(path)
    assert tables(shown) == tables(quiet(fxq.lower, reference, "x86"))
    with pytest.raises(StageError, match="model= the float model"):
        shown(X)
    loaded = fxq.load(path, model=other)
    bits(loaded(X), quiet(fxq.lower, reference, "x86")(X))
    assert tables(loaded) == tables(quiet(fxq.lower, reference, "x86"))
    assert other.leaf.scale[0].item() == 9.0 and loaded.leaf is not other.leaf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: model(), "has no module 'leaf'"),
        (lambda: with_leaf(nn.Identity()), "'leaf' of the given model is a torch.*Identity"),
        (lambda: with_leaf(Untraceable(1)), "the tensors of module 'leaf' are not those"),
    ],
)
def test_another_model(given, message: str, tmp_path: Path) -> None:
    fxq.save(reference_of(with_leaf(Untraceable()), X), tmp_path / "net.fxq")
    with pytest.raises(FxqError, match=rf"net\.fxq: .*{message}"):
        fxq.load(tmp_path / "net.fxq", model=given())


class Branches(nn.Module):
    """Cannot be traced; its parts can."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(), nn.ReLU(), conv(4, width))
        self.head = nn.Sequential(conv(width, 4), nn.Flatten(), nn.Linear(256, 5))
        self.same_head = self.head
        self.shift = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x) + self.shift
        return self.head(x) if float(x.sum()) > 0 else self.same_head(-x)


def test_a_model_in_regions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = Branches().eval(), tmp_path / "net.fxq"
    reference = reference_of(net, X)
    lowered = quiet(fxq.lower, reference, "x86")
    fxq.save(lowered, path)
    with pytest.raises(ConfigError, match=r"a Branches could not be traced as a whole.*model="):
        fxq.load(path)
    other = Branches()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    loaded, again = fxq.load(path, model=other), fxq.load_reference(path, model=other)
    bits(loaded(X), lowered(X))
    bits(again(X), reference(X))
    assert loaded.head is loaded.same_head
    assert tables(loaded) == tables(lowered)
    assert other.training
    bits(other.state_dict(), before)
    shown = load_for_tables(path)
    assert tables(shown) == tables(lowered)
    with pytest.raises(StageError, match="model= the float model"):
        shown(X)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: model(), "is a Lambda; the file is of a Branches"),
        (lambda: Branches(6), "could not|is not"),
    ],
)
def test_a_model_in_other_regions(given, message: str, tmp_path: Path) -> None:
    fxq.save(reference_of(Branches().eval(), X), tmp_path / "net.fxq")
    if message == "could not|is not":  # its regions bring their own widths: nothing outside them differs
        bits(fxq.load_reference(tmp_path / "net.fxq", model=given()).shift, Branches().shift)
        return
    with pytest.raises(ConfigError, match=rf"net\.fxq: .*{message}"):
        fxq.load(tmp_path / "net.fxq", model=given())
