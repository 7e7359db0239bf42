"""Tuning keeps the fastest right engine of each layer, and the choice stays with the model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models_for_tests import conv
from torch import nn

import fxq
from fxq import tuning
from fxq.errors import StageError
from fxq.graph_module import ENGINES, QuantModule
from fxq.node_times import NodeTime
from fxq.partition import reference_of

X = torch.randn(1, 3, 12, 12)


def quantized(backend: str = "x86") -> QuantModule:
    torch.manual_seed(0)
    depthwise, head = nn.Conv2d(8, 8, 3, groups=8), nn.LazyLinear(5)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), depthwise, conv(8, 4), nn.Flatten(), head)
    model(X)
    qmodel = fxq.quantize(model.eval(), [X, torch.randn_like(X)], backend=backend, progress=False)
    assert isinstance(qmodel, QuantModule)
    return qmodel


def engines_of(qmodel: nn.Module) -> dict[str, str]:
    assert isinstance(qmodel, QuantModule)
    return {name: kernel.name for name, kernel in qmodel.plan.kernels.items() if "[" in kernel.name}


def rigged(monkeypatch: pytest.MonkeyPatch, fast: dict[str, str], gain: float) -> None:
    """Let each node take a second, and the engine that ``fast`` names for it ``gain`` less."""

    def times(modules: list[QuantModule], inputs: object, runs: int) -> list[dict[str, NodeTime]]:
        return [
            {
                name: NodeTime(1 - gain if fast.get(name, "?") in kernel else 1, 0)
                for name, kernel in tuning.kernels_of(module).items()
            }
            for module in modules
        ]

    monkeypatch.setattr(tuning, "node_times", times)


def test_the_fastest_engine_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = quantized()
    rigged(monkeypatch, {"_0": "[fbgemm]", "_5": "[onednn]"}, 0.5)
    tuned = fxq.tune(qmodel, X)
    before, after = engines_of(qmodel), engines_of(tuned)
    assert {name: after[name] for name in after if after[name] != before[name]} == {
        "_0": "quantized::conv2d [fbgemm]", "_5": "quantized::linear [onednn]",
    }  # fmt: skip
    assert engines_of(qmodel) == before


def test_a_small_gain_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = quantized()
    rigged(monkeypatch, {"_0": "[fbgemm]", "_5": "[onednn]"}, 0.02)
    assert engines_of(fxq.tune(qmodel, X)) == engines_of(qmodel)


def test_a_wrong_engine_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = quantized()
    rigged(monkeypatch, {"_2": "[fbgemm]"}, 0.9)  # adds up pairs of products of a depthwise conv in 16 bits
    assert engines_of(fxq.tune(qmodel, X))["_2"] == "quantized::conv2d [onednn]"


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
def test_numbers_stay_those_of_the_reference(backend: str) -> None:
    qmodel = quantized(backend)
    tuned = fxq.tune(qmodel, X, runs=2)
    reference = reference_of(qmodel)
    with torch.no_grad():
        scale = (reference(X).max() - reference(X).min()) / 255
        assert (tuned(X) - reference(X)).abs().max() <= 2 * scale


def test_copies_and_pickles_keep_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    rigged(monkeypatch, {"_0": "[fbgemm]"}, 0.5)
    tuned = fxq.tune(quantized(), X)
    assert isinstance(tuned, QuantModule) and tuned.meta[ENGINES] == {"_0": "fbgemm"}
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert engines_of(twin) == engines_of(tuned)
        assert torch.equal(twin(X), tuned(X))


def test_regions_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = nn.Sequential(conv(3, 4), conv(4, 4)), nn.Sequential(conv(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) if x.sum() != 0 else self.unused(x)

    rigged(monkeypatch, {"_0": "[fbgemm]"}, 0.5)
    qmodel = fxq.quantize(Loops().eval(), [X], progress=False)
    assert engines_of(fxq.tune(qmodel, X).get_submodule("net"))["_0"] == "quantized::conv2d [fbgemm]"


def test_refuses_what_is_not_lowered() -> None:
    with pytest.raises(StageError, match="lowered"):
        fxq.tune(reference_of(quantized()), X)
