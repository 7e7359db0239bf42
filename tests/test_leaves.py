"""Leaf modules in files: those of torch.nn come back without any code, and a file cannot make anything else of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, conv, quiet
from test_graph_json import closed, opened
from test_serialization import X, bits, reference_of, tables
from torch import nn

import fxq
from fxq.errors import FileFormatError
from fxq.leaves import REBUILT, decode_leaf, encode_leaf


def recurrent(cls: type[nn.Module], **options: Any) -> Lambda:
    torch.manual_seed(0)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.fc(m.rnn(m.a(x).flatten(2).transpose(1, 2))[0])

    rnn = cls(4, 6, batch_first=True, **options)
    return Lambda(forward, a=conv(), rnn=rnn, fc=nn.Linear(12 if options.get("bidirectional") else 6, 5))


NETS = {
    "lstm": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm without bias": lambda: recurrent(nn.LSTM, bias=False),
    "gru": lambda: recurrent(nn.GRU, num_layers=2, dropout=0.3),
    "rnn": lambda: recurrent(nn.RNN, nonlinearity="relu"),
    "lrn": lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.LocalResponseNorm(3, k=2.0), b=conv(4, 4)),
    "softplus": lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.Softplus(beta=2), b=conv(4, 4)),
    "glu": lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.GLU(dim=1), b=conv(2, 4)),
    "max": lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.AdaptiveMaxPool2d((3, None)), b=conv(4, 4)),
    "unshuffle": lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=conv(), n=nn.PixelUnshuffle(2), b=conv(16, 4)),
    "bilinear": lambda: Lambda(lambda m, x: m.n(m.a(x), m.a(x)), a=conv(), n=nn.Bilinear(8, 8, 3, bias=False)),
    "embedding": lambda: Lambda(
        lambda m, x: m.a(x).mean() + m.n((x[:, 0, 0] > 0).long()).sum(), a=conv(), n=nn.Embedding(2, 3, padding_idx=0)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    reference = reference_of(NETS[name](), X)
    assert any(node.op == "call_module" for node in reference.graph.nodes)
    lowered = quiet(fxq.lower, reference, "x86")
    fxq.save(lowered, tmp_path / "net.fxq")
    loaded = quiet(fxq.load, tmp_path / "net.fxq")
    bits(loaded(X), lowered(X))
    bits(fxq.load_reference(tmp_path / "net.fxq")(X), reference(X))
    assert tables(loaded) == tables(lowered)


SMALL: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.AdaptiveMaxPool1d: (2,), nn.AdaptiveMaxPool2d: (2,), nn.AdaptiveMaxPool3d: (2,), nn.Bilinear: (2, 3, 4),
    nn.ChannelShuffle: (2,), nn.Embedding: (4, 3), nn.Fold: (4, 2), nn.GRU: (2, 3), nn.GRUCell: (2, 3),
    nn.LPPool1d: (2, 3), nn.LPPool2d: (2, 3), nn.LSTM: (2, 3), nn.LSTMCell: (2, 3), nn.LocalResponseNorm: (2,),
    nn.PixelUnshuffle: (2,), nn.RNN: (2, 3), nn.RNNCell: (2, 3), nn.Threshold: (0.1, 20.0), nn.Unflatten: (1, (2, 2)),
    nn.Unfold: (2,), nn.LogSoftmax: (1,), nn.Softmin: (1,),
}  # fmt: skip


@pytest.mark.parametrize("cls", REBUILT, ids=lambda cls: cls.__name__)
def test_every_listed_class_says_how_it_was_made(cls: type[nn.Module]) -> None:
    module = cls(*SMALL.get(cls, ()))
    state = module.state_dict()
    again = decode_leaf(encode_leaf(module), "leaf", state, None, {})
    assert repr(again) == repr(module) and type(again) is cls
    bits(dict(again.state_dict()), dict(state))


@pytest.fixture
def lstm(tmp_path: Path) -> bytes:
    fxq.save(reference_of(recurrent(nn.LSTM), X), tmp_path / "net.fxq")
    return (tmp_path / "net.fxq").read_bytes()


RECORDS = {
    "class": {"class": "os.system"},
    "module": {"class": "torch.nn.modules.container.Sequential"},
    "own": {"class": "test_leaves.LSTM"},
    "class is a number": {"class": 1},
    "arguments": {"arguments": [1]},
    "argument": {"arguments": {"nope": 1}},
    "device": {"arguments": {"input_size": 4, "hidden_size": 6, "num_layers": 1, "device": "cuda"}},
    "layers": {"arguments": {"input_size": 4, "hidden_size": 6, "num_layers": 10**9}},
    "no layers": {"arguments": {"input_size": 4, "hidden_size": 6, "num_layers": 0}},
    "text": {"arguments": {"input_size": "4", "hidden_size": 6, "num_layers": 1}},
    "size": {"arguments": {"input_size": 10**15, "hidden_size": 6, "num_layers": 1}},
    "negative": {"arguments": {"input_size": -1, "hidden_size": 6, "num_layers": 1}},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_forged(record: dict[str, Any], lstm: bytes, tmp_path: Path) -> None:
    content, tensors = opened(lstm)
    content["regions"][""]["modules"]["rnn"].update(record)
    (tmp_path / "forged.fxq").write_bytes(closed(content, tensors))
    with pytest.raises(FileFormatError, match=r"forged\.fxq: "):
        fxq.load(tmp_path / "forged.fxq")


def test_forged_tensors_and_paths(lstm: bytes, tmp_path: Path) -> None:
    content, tensors = opened(lstm)
    section = tensors["module  rnn"]
    for state in ({}, section | {"nope": torch.ones(1)}, section | {"weight_ih_l0": torch.ones(3)}):
        (tmp_path / "forged.fxq").write_bytes(closed(content, tensors | {"module  rnn": state}))
        with pytest.raises(FileFormatError, match=r"are not those of a|of 1 layers with 0 tensors"):
            fxq.load(tmp_path / "forged.fxq")
    for path in ('a") if HIT() else ("', "meta", "forward", "", "plan"):
        content, tensors = opened(lstm)
        modules = content["regions"][""]["modules"]
        modules[path] = modules.pop("rnn")
        tensors[f"module  {path}"] = tensors.pop("module  rnn")
        for node in content["regions"][""]["nodes"]:
            node["target"] = path if node["target"] == "rnn" else node["target"]
        (tmp_path / "forged.fxq").write_bytes(closed(content, tensors))
        with pytest.raises(FileFormatError, match=r"forged\.fxq: "):
            fxq.load(tmp_path / "forged.fxq")
