"""State dicts, copies and pickles of prepared and quantized models, and their use from several threads."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from pathlib import Path

import pytest
import torch
from models_for_tests import Lambda, conv, quiet
from torch import nn

import fxq
from fxq.backends import BACKENDS, get_backend
from fxq.errors import ConfigError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
STAGES = ("prepared", "reference", "lowered", "per-tensor")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Lambda(
        lambda m, x: m.fc(torch.relu(m.norm(m.a(x)) + m.b(m.a(x))).mean((2, 3))),
        a=conv(), norm=nn.BatchNorm2d(4), b=conv(4, 4), fc=nn.Linear(4, 5),
    )  # fmt: skip


class Regions(nn.Module):
    """Quantized in two regions, with a parameter around them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Sequential(conv(), nn.ReLU(), conv(4, 4)), nn.Linear(4, 5)
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x) + self.shift
        return self.head(x.mean((2, 3))) if float(x.abs().sum()) > 0 else x


def regions(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Regions().eval()


def at(stage: str, model: nn.Module, spread: float = 1.0, backend: str = "x86") -> nn.Module:
    """The model at a stage, calibrated on data of a spread."""
    qconfig = "per_tensor" if stage == "per-tensor" else "per_channel"
    prepared = fxq.prepare(model, X, qconfig=qconfig, backend=backend)
    prepared(X * spread)
    if stage == "prepared":
        return prepared
    return fxq.convert_to_reference(prepared) if stage == "reference" else quiet(fxq.convert, prepared)


def final(model: nn.Module) -> nn.Module:
    """What a prepared model becomes; others as they are."""
    return quiet(fxq.convert, model) if any("observer" in name for name, _ in model.named_modules()) else model


def bits(value: object, other: object) -> None:
    torch.testing.assert_close(value, other, rtol=0, atol=0)


@pytest.mark.parametrize("make", [net, regions])
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_dict_carries_weights_and_calibration(stage: str, make, tmp_path: Path) -> None:
    source, target = at(stage, make(0), 1.0), at(stage, make(1), 5.0)
    expected = final(source)(X)
    assert not torch.equal(final(target)(X), expected)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    result = target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    bits(final(target)(X), expected)
    assert target.state_dict().keys() == source.state_dict().keys()


def test_the_state_dict_is_of_integers() -> None:
    state = at("lowered", net()).state_dict()
    assert state["a.weight"].dtype == torch.int8
    assert state["x_q_qparams"].tolist()[1:] == [int(n) for n in state["x_q_qparams"].tolist()[1:]]
    assert {key for key in state if key.endswith("_qparams")} >= {"x_q_qparams", "a_q_qparams"}
    assert "fc.weight_scale" in state and all(isinstance(value, torch.Tensor) for value in state.values())


class Nested(nn.Module):
    """Attention, float layers beside packed ones at nested paths, and a float layer that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.block(x)
        return self.gru(self.attention(tokens, tokens, tokens)[0] + tokens)[0]


@pytest.mark.parametrize("stage", ["prepared", "reference", "lowered"])
def test_modules_that_only_hold_tensors_load_what_is_theirs(stage: str) -> None:
    tokens = X[..., 0]

    def made(seed: int, spread: float) -> nn.Module:
        torch.manual_seed(seed)
        prepared = fxq.prepare(Nested().eval(), tokens)
        prepared(tokens * spread)
        if stage == "prepared":
            return prepared
        return fxq.convert_to_reference(prepared) if stage == "reference" else quiet(fxq.convert, prepared)

    source, target = made(0, 1.0), made(1, 5.0)
    expected = final(source)(tokens)
    source.load_state_dict(source.state_dict())
    bits(final(source)(tokens), expected)
    target.load_state_dict(source.state_dict())
    bits(final(target)(tokens), expected)


def test_a_layer_that_is_called_twice_has_the_same_keys_when_it_comes_from_a_file() -> None:
    """Each call has a corrected bias of its own, and nobody reads the layer's."""
    torch.manual_seed(0)
    twice = Lambda(lambda m, x: torch.relu(m.b(m.a(x))) + m.a(x), a=conv(3, 8), b=conv(8, 8, groups=8))
    model = quiet(fxq.quantize, twice, [torch.randn(4, 3, 8, 8) for _ in range(3)])
    buffer = io.BytesIO()
    fxq.save(model, buffer)
    buffer.seek(0)
    loaded = fxq.load(buffer)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.load_state_dict(model.state_dict())
    bits(loaded(X), model(X))


NUMBERS = {
    "scale is nan": (0, float("nan")),
    "scale is infinite": (0, float("inf")),
    "scale is zero": (0, 0.0),
    "scale is negative": (0, -1.0),
    "zero_point is large": (1, 999),
    "zero_point is nan": (1, float("nan")),
    "zero_point is infinite": (1, float("inf")),
    "zero_point is real": (1, 0.5),
    "zero_point is huge": (1, 1e30),
    "bound is low": (2, -999),
    "bound is high": (3, 999),
    "bounds are empty": (2, 255),
}


@pytest.mark.parametrize("position, number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("stage", ["reference", "lowered"])
def test_numbers_that_no_graph_has(stage: str, position: int, number: float) -> None:
    model = at(stage, net())
    expected, state = model(X), {key: value.clone() for key, value in at(stage, net(1), 3.0).state_dict().items()}
    state["a_q_qparams"][3] = 254
    state["a_q_qparams"][position] = number
    with pytest.raises(ConfigError, match="'a_q_qparams' has "):
        model.load_state_dict(state)
    bits(model(X), expected)


def test_what_does_not_fit() -> None:
    model = at("lowered", net())
    state, expected = model.state_dict(), model(X)
    with pytest.raises(ConfigError, match=r"lowered model.*\n.*Missing key.*x_q_qparams"):
        model.load_state_dict(net().state_dict())
    with pytest.raises(ConfigError, match=r"Unexpected key\(s\) in state_dict: \"nope\""):
        model.load_state_dict({**state, "nope": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"'a\.weight' is torch\.float32 \[4, 3, 3, 3\], the model's is torch\.int8"):
        model.load_state_dict({**state, "a.weight": state["a.weight"].float()}, strict=False)
    with pytest.raises(ConfigError, match=r"'fc\.weight' is torch\.int8 \[5, 3\], the model's is torch\.int8 \[5, 4\]"):
        model.load_state_dict({**state, "fc.weight": state["fc.weight"][:, :3]})
    with pytest.raises(ConfigError, match=r"'a\.bias' is a int, not a tensor"):
        model.load_state_dict({**state, "a.bias": 3})
    bits(model(X), expected)
    result = model.load_state_dict({"a.weight": state["a.weight"], "nope": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["nope"] and "a.bias" in result.missing_keys
    bits(model(X), expected)


def test_what_does_not_fit_a_region() -> None:
    model = at("lowered", regions())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"'trunk\.0\.weight' is torch\.float32"):
        model.load_state_dict({**state, "trunk.0.weight": state["trunk.0.weight"].float()})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"trunk\.0\.weight\"\."):
        model.load_state_dict({key: value for key, value in state.items() if key != "trunk.0.weight"})


def test_loading_leaves_copies_and_siblings_alone() -> None:
    reference = at("reference", net(0))
    one, two = quiet(fxq.lower, reference, "x86"), quiet(fxq.lower, reference, "x86")
    copied, expected = copy.deepcopy(one), one(X)
    one.load_state_dict(at("lowered", net(1), 3.0).state_dict())
    assert not torch.equal(one(X), expected)
    for other in (two, copied, quiet(fxq.lower, reference, "x86")):
        bits(other(X), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_into_a_reference_leaves_what_was_lowered_alone(backend: str) -> None:
    reference, other = at("reference", net(), backend=backend), at("reference", net(1), backend=backend)
    lowered, expected = (quiet(fxq.lower, reference, backend) for _ in range(2))
    expected = expected(X)  # some kernels pack their weights at the first call
    reference.load_state_dict(other.state_dict())
    assert torch.equal(lowered(X), expected)
    assert torch.equal(reference(X), other(X))


@pytest.mark.parametrize("make", [net, regions])
@pytest.mark.parametrize("stage", STAGES)
def test_copies_and_pickles(stage: str, make) -> None:
    model = at(stage, make())
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        again = copied(model)
        bits(again(X), model(X))
        bits(final(again)(X), final(model)(X))
        assert fxq.graph_records(again) == fxq.graph_records(model)
        assert fxq.summary(final(again)) == fxq.summary(final(model))
        assert again.training == model.training


def test_a_pickle_keeps_names() -> None:
    for stage in STAGES:
        model = at(stage, net())
        again = pickle.loads(pickle.dumps(model))
        assert [str(node) for node in again.graph.nodes] == [str(node) for node in model.graph.nodes]
        assert [str(node.args) for node in again.graph.nodes] == [str(node.args) for node in model.graph.nodes]


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_pickled_by_name(name: str) -> None:
    assert pickle.loads(pickle.dumps(get_backend(name))) is get_backend(name)
    lowered = at("lowered", net(), backend=name)
    bits(pickle.loads(pickle.dumps(lowered))(X), lowered(X))


def _answer(model: nn.Module, x: torch.Tensor, answers: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    answers.put(model(x).tolist())


def test_in_another_process() -> None:
    """By spawn, as DataLoader workers and servers start theirs: everything goes through pickle."""
    model = at("lowered", net())
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_answer, args=(model, X, answers))
    process.start()
    try:
        bits(torch.tensor(answers.get(timeout=240)), model(X))  # no answer for ever from one that died
    finally:
        process.join(60)
        process.kill()
    assert process.exitcode == 0


def test_many_threads(tmp_path: Path) -> None:
    """Models of all backends run while others are loaded, copied, pickled and packed; every result is compared."""
    reference = at("reference", net())
    fxq.save(reference, tmp_path / "net.fxq")
    models = {name: quiet(fxq.lower, reference, name) for name in BACKENDS}
    inputs = [X * scale for scale in (0.5, 1.0, 2.0)]
    expected = {name: [model(x) for x in inputs] for name, model in models.items()}
    wrong: list[str] = []
    start = threading.Barrier(2 * len(models))

    def compare(name: str, model: nn.Module, what: str) -> None:
        wrong.extend(what for x, y in zip(inputs, expected[name], strict=True) if not torch.equal(model(x), y))

    def call(name: str) -> None:
        start.wait()
        for _ in range(40):
            compare(name, models[name], f"{name} called")

    def make(name: str) -> None:
        start.wait()
        for _ in range(4):
            compare(name, fxq.load(tmp_path / "net.fxq", name), f"{name} loaded")
            compare(name, copy.deepcopy(models[name]), f"{name} copied")
            compare(name, pickle.loads(pickle.dumps(models[name])), f"{name} pickled")
            compare(name, fxq.lower(reference, name), f"{name} lowered")

    threads = [threading.Thread(target=task, args=(name,)) for name in models for task in (call, make)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("stage", ["prepared", "reference", "lowered"])
@pytest.mark.parametrize("fault", ["shape", "missing", "unexpected"])
def test_a_refused_state_dict_changes_nothing(stage: str, fault: str) -> None:
    tokens = X[..., 0]

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        prepared = fxq.prepare(Nested().eval(), tokens)
        prepared(tokens * (1 + seed))
        if stage == "prepared":
            return prepared
        return fxq.convert_to_reference(prepared) if stage == "reference" else quiet(fxq.convert, prepared)

    target, state = made(0), made(1).state_dict()
    expected = target(tokens)
    if fault == "shape":
        state["gru.weight_ih_l0"] = torch.zeros(3, 3)
    elif fault == "missing":
        del state["gru.weight_hh_l0"]
    else:
        state["nobody.weight"] = torch.zeros(3)
    with pytest.raises(fxq.FxqError):
        target.load_state_dict(state)
    bits(target(tokens), expected)
