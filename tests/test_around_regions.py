"""Code around regions finds what it found around the float modules: ways to call them, hooks, classes, attributes."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

import fxq
from fxq.errors import InputError
from fxq.numerics import sqnr
from fxq.partition import left_in, regions_of

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers, with switches and things that code outside may use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.factor, self.last, self.settings = 1.0, None, {"factor": 2}

    def forward(self, x, doubled=False, memory=None):
        self.last = self.a(x)
        y = torch.relu(self.last) * self.factor
        y = y * 2 if doubled else y
        return self.b(y if memory is None else y + memory)


class Around(nn.Module):
    """A model that cannot be traced as a whole; ``use(model, x)`` is what it does with its parts."""

    def __init__(self, use) -> None:
        super().__init__()
        self.block, self.last, self.layers = Block(), nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), Block()])
        self.use, self.seen = use, {}

    def forward(self, x):
        if x.sum() == 1e9:
            return x
        return self.use(self, x)

    def remember(self, module, inputs, output):
        self.seen["output"] = output


def quantized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return fxq.quantize(model.eval(), [X, X.flip(0)], progress=False)


def outputs(model: nn.Module, x: torch.Tensor = X) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(x)
    return list(found) if isinstance(found, tuple) else [found]


def assert_close(model: nn.Module, qmodel: nn.Module) -> None:
    for expected, actual in zip(outputs(model), outputs(qmodel), strict=True):
        assert sqnr(expected, actual) > 25


def in_turn(model, x):
    memory = None
    for _ in range(3):
        memory = model.block(x, memory=memory)
    return memory


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (m.block(x, False), m.block(x, True)),
        lambda m, x: (m.block(x), m.block(x, memory=x)),
        in_turn,
    ],
    ids=["switches", "left out", "in turn"],
)
def test_a_part_called_in_several_ways_is_looked_into(use):
    model = Around(use)
    qmodel = quantized(model)
    assert_close(model, qmodel)
    assert regions_of(qmodel).keys() == {"block.a", "block.b"}


def test_a_switch_left_at_its_default_is_no_other_way():
    qmodel = quantized(Around(lambda m, x: (m.block(x), m.block(x, False), m.block(x, doubled=False, memory=None))))
    assert regions_of(qmodel).keys() == {"block"}


def test_a_layer_called_in_several_ways_says_so():
    class Scaled(nn.Linear):
        def forward(self, x, scaled=False):
            return super().forward(x) * (2 if scaled else 1)

    model = Around(lambda m, x: (m.scaled(x), m.scaled(x, True), m.last(x)))
    model.scaled = Scaled(8, 8)
    qmodel = quantized(model)
    assert_close(model, qmodel)
    assert "several ways" in left_in(qmodel)["scaled"]


def test_a_switch_with_another_value_is_an_error_of_fxq():
    with pytest.raises(InputError, match=r"doubled was False .* quantize it with example inputs"):
        quantized(Block())(X, True)


def hooked(register, arguments=1):
    model = Around(lambda m, x: m.last(m.block(x)))
    register(model)
    return model


HOOKS = {
    "after the model": lambda m: m.register_forward_hook(lambda module, inputs, output: output * 3),
    "after a part": lambda m: m.block.register_forward_hook(lambda module, inputs, output: output * 3),
    "after a layer": lambda m: m.last.register_forward_hook(lambda module, inputs, output: output * 3),
    "before a part": lambda m: m.block.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,)),
    "with keywords": lambda m: m.block.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True
    ),
    "another type": lambda m: m.register_forward_hook(lambda module, inputs, output: (output, output * 2)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_do_what_they_did(name):
    model = hooked(HOOKS[name])
    assert_close(model, quantized(model))


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_a_traceable_model_do_what_they_did(kind):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    if kind == "pre":
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    else:
        model.register_forward_hook(lambda module, inputs, output: (output, output * 3))
    assert_close(model, quantized(model))


def test_hooks_that_are_methods_are_those_of_the_copy():
    model = Around(lambda m, x: m.last(m.block(x)) + m.seen["output"])
    model.last.register_forward_hook(model.remember)
    outputs(model)
    before = model.seen.pop("output")
    qmodel = quantized(model)
    assert not model.seen
    assert_close(model, qmodel)
    assert sqnr(before, qmodel.seen["output"]) > 25
    assert "returns nothing" in left_in(qmodel)["last"]


def test_a_hook_that_looks_at_a_part_goes_on_doing_so():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    qmodel = quantized(model)
    seen.clear()
    assert_close(model, qmodel)
    assert seen == [(4, 8), (4, 8)]
    assert {"0.0", "0.2"} <= regions_of(qmodel).keys()


class Collecting(nn.Module):
    """Gives what hooks on its layers collect, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.found = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), []
        for layer in self.body[1::2]:
            layer.register_forward_hook(self.collect)

    def collect(self, module, inputs, output):
        self.found.append(output)

    def forward(self, x):
        self.found.clear()
        self.body(x)
        return tuple(self.found)


def test_what_hooks_collect_for_the_forward_is_part_of_the_graph():
    model, images = Collecting().eval(), torch.randn(2, 3, 8, 8)
    qmodel = fxq.quantize(model, [images], progress=False)
    assert regions_of(qmodel).keys() == {""}
    for expected, actual in zip(outputs(model, images), outputs(qmodel, images), strict=True):
        assert sqnr(expected, actual) > 25


def test_a_forward_of_its_own_is_the_one_that_runs():
    def twice(self, x):
        return self.b(self.a(x)) * 2

    whole = Block()
    whole.forward = types.MethodType(twice, whole)
    assert_close(whole, quantized(whole))
    model = Around(lambda m, x: m.block(x))
    model.block.forward = types.MethodType(twice, model.block)
    assert_close(model, quantized(model))


def by_class(model, x):
    for layer in model.layers:
        x = layer(x) if isinstance(layer, nn.Linear) else layer(x) * 2 if isinstance(layer, Block) else x
    return x


@pytest.mark.parametrize("form", ["lowered", "frozen", "copied", "loaded", "reference"])
def test_regions_are_of_the_class_they_stand_for(form, tmp_path):
    model = Around(by_class)
    qmodel = quantized(model)
    assert regions_of(qmodel).keys() == {"layers.0", "layers.1"}
    if form == "frozen":
        qmodel = fxq.freeze(qmodel, X)
    elif form == "copied":
        qmodel = copy.deepcopy(qmodel)
    elif form == "loaded":
        fxq.save(qmodel, tmp_path / "net.fxq")
        qmodel = fxq.load(tmp_path / "net.fxq", model=model)
    elif form == "reference":
        qmodel = fxq.partition.reference_of(qmodel)
    assert isinstance(qmodel.layers[1], Block) and not isinstance(qmodel.layers[1], nn.Linear)
    assert_close(model, qmodel)


def sets_factor(model, x):
    model.block.factor = 2.0
    return model.block(x)


def counts(model, x):
    return model.block(x) * sum(isinstance(part, nn.Linear) for part in model.modules())


def walks(model, x):
    for _, layer in model.block.named_children():
        list(layer.named_children())  # of a layer, which has none: it may be a region all the same
        x = layer(x)
    return x


@pytest.mark.parametrize(
    "use",
    [
        sets_factor,
        walks,
        lambda m, x: (m.block(x), m.block.last),
        lambda m, x: m.block(x) * m.block.settings["factor"],
        counts,
    ],
    ids=["set", "children", "kept", "settings", "modules"],
)
def test_a_part_whose_state_code_outside_uses_is_looked_into(use):
    model = Around(use)
    qmodel = quantized(model)
    assert_close(model, qmodel)
    assert {"block.a", "block.b"} <= regions_of(qmodel).keys()


def test_numbers_that_stay_the_same_leave_a_part_whole():
    qmodel = quantized(Around(lambda m, x: m.block(x) * m.block.factor))
    assert regions_of(qmodel).keys() == {"block"}


class Views(nn.Module):
    """Views of what a convolution gives."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.conv, self.head, self.traceable = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4), traceable

    def forward(self, x):
        y = self.conv(x)
        if not self.traceable and y.sum() == 1e9:
            return y
        return self.head(y.view(y.size(0), -1))


@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
def test_what_leaves_kernels_is_laid_out_as_in_the_float_model(backend):
    images = torch.randn(2, 3, 8, 8)
    model = Views(traceable=False)
    qmodel = fxq.quantize(model.eval(), [images], backend=backend, progress=False)
    assert regions_of(qmodel).keys() == {"conv", "head"}
    assert sqnr(model(images).detach(), qmodel(images)) > 25
    whole = fxq.quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), [images], backend=backend, progress=False)
    assert whole(images).is_contiguous()


class Viewing(nn.Module):
    def forward(self, y):
        return y.view(y.size(0), -1) if y.sum() != 1e9 else y


def test_modules_that_a_graph_calls_get_the_float_models_layout():
    images = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Viewing(), nn.Linear(8 * 36, 4)).eval()
    qmodel = fxq.quantize(model, [images], progress=False)
    assert regions_of(qmodel).keys() == {""}
    assert sqnr(model(images).detach(), qmodel(images)) > 25
