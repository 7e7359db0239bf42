"""Models that cannot be traced as a whole: their traceable submodules are quantized in place."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from models_for_tests import Lambda, Two, conv, quiet
from torch import nn

import fxq
from fxq.errors import CalibrationError, FxqError, FxqWarning, InputError, StageError, TraceError
from fxq.graph_module import QuantModule
from fxq.numerics import sqnr
from fxq.partition import partition_of, recording, reference_of, regions_of
from fxq.plan import NEVER_OBSERVED, Stage
from fxq.torchvision_ops import import_torchvision

X = torch.randn(2, 3, 8, 8)


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4))
        self.out_channels = 4
        self.sizes = [(1, 2), "three"]
        self._hidden = 1


class Detector(nn.Module):
    """A root that looks at the data, with parts that do not."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.ModuleDict({"box": conv(4, 4, 1), "mask": nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 2))})
        self.rare = nn.Sequential(conv(4, 4))
        self.norm = nn.BatchNorm2d(4)
        self.calls = 0
        self.eval()

    def forward(self, x, scale=1.0, *, extra=None):
        self.calls += 1
        y = self.backbone(x * scale)
        assert y.shape[1] == self.backbone.out_channels
        y = self.norm(y)
        if x.max() > 50:
            y = self.rare(y)
        if extra is not None:
            y = y + extra
        boxes = self.head["box"](y)
        return {"boxes": boxes[boxes.mean((1, 2, 3)) > -1e9], "mask": self.head["mask"](y)}


REGIONS = {"backbone", "head.box", "head.mask"}


def close(model, quantized, *inputs, lowest=20.0, **keywords):
    with torch.no_grad():
        expected, actual = model(*inputs, **keywords), quantized(*inputs, **keywords)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert sqnr(value, actual[name]) > lowest, name


def stages(model, data=(X,), **options):
    prepared = fxq.prepare(model, X, **options)
    fxq.calibrate(prepared, list(data))
    return prepared, fxq.convert_to_reference(prepared), quiet(fxq.convert, prepared)


def snapshot(model):
    return {
        path: (type(module), {n: v for n, v in vars(module).items() if n not in ("_parameters", "_buffers", "_modules")
                              and n != "calls"})
        for path, module in model.named_modules()
    }  # fmt: skip


def test_every_stage():
    model = Detector()
    prepared, reference, lowered = stages(model)
    for stage, made in ((Stage.PREPARED, prepared), (Stage.REFERENCE, reference), (Stage.LOWERED, lowered)):
        assert type(made) is Detector and not made.training
        assert regions_of(made, stage).keys() == REGIONS
    for x in (X, torch.randn(5, 3, 12, 10)):
        close(model, reference, x)
        close(model, lowered, x)
        close(reference, lowered, x, lowest=30)
    again = quiet(fxq.lower, reference, "onednn")
    assert {region.plan.backend for region in regions_of(again).values()} == {"onednn"}
    close(reference, again, X, lowest=30)


def test_quantize_in_one_call():
    model = Detector()
    quantized = quiet(fxq.quantize, model, [X, torch.randn(2, 3, 8, 8)], example_inputs=X)
    close(model, quantized, X)
    records = [record for record in fxq.graph_records(quantized) if record["macs"]]
    assert {record["region"] for record in records} == REGIONS
    assert {record["type"] for record in records} == {"int8"}


def test_observers_see_what_the_whole_model_feeds_them():
    model = Detector()
    prepared = fxq.prepare(model, X)
    fxq.calibrate(prepared, [X, 3 * X])
    entry = next(r for r in fxq.observer_records(prepared) if r["region"] == "head.box" and r["watches"] == ["input_1"])
    with torch.no_grad():
        inside = [model.norm(model.backbone(x)) for x in (X, 3 * X)]
    assert entry["batches"] == 2
    torch.testing.assert_close(entry["max"], [max(y.max().item() for y in inside)], rtol=1e-4, atol=1e-4)


def test_inputs_by_keyword():
    model = Detector()
    extra = torch.randn(2, 4, 8, 8)
    prepared = fxq.prepare(model, {"x": X, "extra": extra})
    fxq.calibrate(prepared, [{"x": X, "extra": extra, "label": 1}])
    lowered = quiet(fxq.convert, prepared)
    close(model, lowered, X, extra=extra)
    close(model, lowered, X, 0.5)


def test_submodules_called_by_keyword():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(3, 4)

        def forward(self, x, *, other=None, times=1.0):
            return self.a(x) * times if other is None else self.a(x) + other

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = Head(), conv(3, 4)

        def forward(self, x):
            return {"y": self.head(x=x, other=self.stem(x)) if x.sum() > -1e9 else x}

    model = Model().eval()
    _, _, lowered = stages(model)
    assert regions_of(lowered).keys() == {"head", "stem"}
    close(model, lowered, X)


def test_what_the_inputs_do_not_reach_stays_float():
    model = Detector()
    prepared, _, lowered = stages(model, [X, 100 * X])
    assert partition_of(prepared).left == {"rare": "the example inputs do not reach it"}
    assert type(lowered.rare[0]) is nn.Conv2d
    close(model, lowered, X * 100)
    text = fxq.summary(lowered)
    assert "rare" in text and "do not reach it" in text


def test_a_region_that_saw_no_data_stays_float():
    class Model(Detector):
        def forward(self, x):
            y = self.backbone(x)
            return {"y": self.rare(y) if x.max() > 50 else self.head["box"](y)}

    model = Model().eval()
    prepared = fxq.prepare(model, X * 100)
    fxq.calibrate(prepared, [X])
    assert regions_of(prepared).keys() == {"backbone", "rare"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference = fxq.convert_to_reference(prepared)
    assert [w.category for w in caught] == [FxqWarning] and "rare" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = fxq.convert(prepared)
    for made in (reference, lowered):
        decisions = made.rare.plan.decisions.values()
        assert {decision.reason for decision in decisions} == {NEVER_OBSERVED}
        close(model, made, X)
        with torch.no_grad():  # and still computes what it did
            torch.testing.assert_close(made.rare(X[:, :1].repeat(1, 4, 1, 1)), model.rare(X[:, :1].repeat(1, 4, 1, 1)))
    assert "saw no data" in fxq.summary(lowered)


def test_uncalibrated():
    with pytest.raises(CalibrationError, match="no observer saw any data"):
        fxq.convert(fxq.prepare(Detector(), X))


class Sharing(nn.Module):
    """One submodule under two names, and with ``where`` also inside another that comes after or before."""

    def __init__(self, where):
        super().__init__()
        shared = nn.Sequential(conv(3, 3), nn.ReLU())
        if where == "before":
            self.c = nn.Sequential(shared, conv(3, 3))
        self.a = self.b = shared
        if where != "before":
            self.c = nn.Sequential(shared, conv(3, 3)) if where == "after" else conv(3, 3)
        self.eval()

    def forward(self, x):
        y = self.a(x) if x.sum() > -1e9 else x
        return {"y": self.c(self.b(y * 0.5))}


@pytest.mark.parametrize("where", ["nowhere", "after", "before"])
def test_a_shared_submodule_is_one_region(where):
    model = Sharing(where)
    prepared, _, lowered = stages(model)
    assert regions_of(lowered).keys() == {"a", "c"} and not partition_of(lowered).left
    assert prepared.a is prepared.b and lowered.a is lowered.b
    assert isinstance(lowered.a, QuantModule) and isinstance(lowered.c, QuantModule)
    close(model, lowered, X)


def test_attributes_of_a_submodule_are_still_readable():
    _, reference, lowered = stages(Detector())
    for made in (reference, lowered, copy.deepcopy(lowered)):
        assert made.backbone.out_channels == 4 and made.backbone.sizes == [(1, 2), "three"]
        for absent in ("_hidden", "no_such"):
            with pytest.raises(AttributeError, match=absent):
                getattr(made.backbone, absent)


def test_tables_name_each_region():
    prepared, _, lowered = stages(Detector())
    for text in (fxq.summary(lowered), fxq.graph_table(lowered), fxq.observer_table(prepared)):
        assert all(path in text for path in REGIONS)
    assert partition_of(lowered).reason.startswith("TraceError: symbolically traced variables")
    assert "Detector" in fxq.summary(lowered) and "3: the model cannot be traced as a whole" in fxq.summary(lowered)
    assert "backbone.0" in fxq.fusion_table(lowered)


def test_untraceable_all_the_way_down():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.w if x.sum() > 0 else x

    with pytest.raises(TraceError, match="cannot be traced"):
        fxq.prepare(Alone().eval(), torch.randn(2, 4))


def test_untraceable_below_the_root():
    """The search goes on inside what cannot be traced; the innermost that cannot is named."""

    class Stage1(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = conv(3, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return self.a(x) if x.sum() > -1e9 else x

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x):
            return x * self.w if x.sum() > -1e9 else x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd, self.last = Stage1(), Odd(), conv(4, 4)

        def forward(self, x):
            y = self.first(x)
            return {"y": self.last(self.odd(y) if y.sum() > -1e9 else y)}

    model = Model().eval()
    prepared, _, lowered = stages(model)
    assert regions_of(prepared).keys() == {"first.a", "last"}
    left = partition_of(prepared).left
    assert left.keys() == {"odd"} and "x * self.w if x.sum()" in left["odd"] and __file__ in left["odd"]
    close(model, lowered, X)


@pytest.mark.parametrize("what", ["head.mask.0", "backbone", "head.*", nn.BatchNorm2d, "conv2d", Backbone])
def test_exclusions_by_full_path(what):
    model = Detector()
    _, _, lowered = stages(model, exclude=what) if what != "conv2d" else (None, None, None)
    if what == "conv2d":
        lowered = quiet(fxq.convert, _calibrated(fxq.prepare(model, X, exclude=[what, "head.box"])))
    floats = {r["module"] for r in fxq.graph_records(lowered) if r["macs"] and r["type"] == "float"}
    every = {"backbone.0", "backbone.3", "head.box", "head.mask.0", "head.mask.2"}
    expected = {
        "head.mask.0": {"head.mask.0"}, "backbone": {"backbone.0", "backbone.3"}, nn.BatchNorm2d: set(),
        "head.*": {"head.box", "head.mask.0", "head.mask.2"}, "conv2d": every, Backbone: {"backbone.0", "backbone.3"},
    }[what]  # fmt: skip
    assert floats == expected
    close(model, lowered, X)


def _calibrated(prepared):
    prepared(X)
    return prepared


def test_a_name_that_matches_nothing():
    with pytest.raises(FxqError, match="matches nothing"):
        fxq.prepare(Detector(), X, exclude="mask.0")


def test_the_model_is_left_as_it_is():
    model = Detector()
    hook = model.backbone.register_forward_hook(lambda *_: None)
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    parts = {path: id(module) for path, module in model.named_modules()}
    calls = model.calls
    hook.remove()
    before = snapshot(model)
    _, _, lowered = stages(model)
    lowered(X)
    assert model.calls == calls
    assert parts == {path: id(module) for path, module in model.named_modules()}
    after = snapshot(model)
    assert before == after
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *lowered.modules()])
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in lowered.parameters()}
    assert not shared


def test_copies_are_independent():
    model = Detector()
    prepared, _, lowered = stages(model)
    twin = copy.deepcopy(lowered)
    with torch.no_grad():
        expected = lowered(X)
        twin.norm.weight.zero_()
        assert torch.equal(lowered(X)["boxes"], expected["boxes"])
        assert not torch.equal(twin(X)["boxes"], expected["boxes"])
    assert regions_of(twin, Stage.LOWERED).keys() == REGIONS
    other = copy.deepcopy(prepared)
    other(100 * X.clamp(max=0.4))
    counts = [{r["batches"] for r in fxq.observer_records(p)} for p in (prepared, other)]
    assert counts[0] != counts[1]


def test_stages_in_the_wrong_order():
    prepared, reference, lowered = stages(Detector())
    for made in (prepared, reference, lowered):
        with pytest.raises(StageError, match="already prepared"):
            fxq.prepare(made, X)
    with pytest.raises(StageError, match="a prepared one is needed"):
        fxq.convert(reference)
    with pytest.raises(StageError, match="a reference one is needed"):
        fxq.lower(prepared, "x86")
    with pytest.raises(StageError, match="not made by fxq"):
        regions_of(Detector())


def test_example_inputs_that_fail():
    with pytest.raises(InputError, match="fails on the example inputs"):
        fxq.prepare(Detector(), torch.randn(2, 5, 8, 8))


def zoo(name, *args, **options):
    torch.manual_seed(0)
    return import_torchvision().models.get_model(name, *args, weights=None, **options).eval()


def give_statistics(model, *inputs):
    """BatchNorm statistics of these inputs: with random weights and none, activations all but vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        model(*inputs)
    for norm in norms:
        norm.eval()


def share_of_macs(quantized):
    records = fxq.graph_records(quantized)
    total = partition_of(quantized).left_macs + sum(record["macs"] for record in records)
    return sum(record["macs"] for record in records if record["type"] == "int8") / total


def test_ssdlite():
    model = zoo("ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=5)
    images = [torch.rand(3, 96, 96), torch.rand(3, 64, 96)]
    give_statistics(model, images)
    quantized = quiet(fxq.quantize, model, [images], example_inputs=(images,), forward_fn=lambda m, x: m(x))
    assert share_of_macs(quantized) > 0.95
    x = model.transform(images)[0].tensors
    with torch.no_grad():
        found = quantized(images)
        expected, actual = model.backbone(x), quantized.backbone(x)
    assert [image.keys() for image in found] == [{"boxes", "scores", "labels"}] * 2
    assert all(image["boxes"].isfinite().all() for image in found)
    assert expected.keys() == actual.keys()
    assert sqnr(expected["0"], actual["0"]) > 8  # with random weights each later level is noisier


def test_raft():
    model = zoo("raft_small")
    frames = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    give_statistics(model, *frames)
    quantized = quiet(
        fxq.quantize, model, [frames], example_inputs=tuple(frames), forward_fn=lambda m, b: m(*b, num_flow_updates=2)
    )
    assert share_of_macs(quantized) > 0.95
    with torch.no_grad():
        expected, actual = (m(*frames, num_flow_updates=2) for m in (model, quantized))
    assert len(actual) == len(expected) == 2
    assert sqnr(expected[0], actual[0]) > 10


class Gate(nn.Module):
    """Looks at the data, with parts that do not; called inside a model that can be traced."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4))
        self.flat, self.rare = conv(4, 4, 1), conv(4, 4, 1)

    def forward(self, x, *, scale=1.0):
        if x.max() > 1e6:
            x = self.rare(x)
        return self.flat(x) + self.deep(x) * scale


class Gated(nn.Module):
    def __init__(self, times=1):
        super().__init__()
        self.stem, self.gate, self.last, self.times = conv(3, 4), Gate(), conv(4, 2), times
        self.eval()

    def forward(self, x):
        y = torch.relu(self.stem(x))
        for number in range(self.times):
            y = self.gate(y, scale=1.0 + number)
        return {"y": self.last(y)}


NESTED = {"", "gate.deep", "gate.flat"}


@pytest.mark.parametrize("times", [1, 2])
def test_regions_inside_a_leaf_of_a_graph(times):
    model = Gated(times)
    prepared, reference, lowered = stages(model)
    for stage, made in ((Stage.PREPARED, prepared), (Stage.REFERENCE, reference), (Stage.LOWERED, lowered)):
        assert isinstance(made, QuantModule) and regions_of(made, stage).keys() == NESTED
    again = quiet(fxq.lower, reference, "onednn")
    assert {region.plan.backend for region in regions_of(again).values()} == {"onednn"}
    assert {region.plan.backend for region in regions_of(reference).values()} == {"x86"}
    for x in (X, torch.randn(5, 3, 12, 10)):
        for made in (reference, lowered, again, copy.deepcopy(lowered), reference_of(lowered)):
            close(model, made, x, lowest=15)
    assert regions_of(reference_of(lowered), Stage.REFERENCE).keys() == NESTED
    records = [record for record in fxq.graph_records(lowered) if record["macs"]]
    assert {record["region"] for record in records} == NESTED and {record["type"] for record in records} == {"int8"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *lowered.modules()])


def test_regions_inside_a_leaf_see_what_they_are_fed():
    model = Gated()
    prepared = fxq.prepare(model, X)
    fxq.calibrate(prepared, [X, 3 * X])
    entries = [r for r in fxq.observer_records(prepared) if r["region"] == "gate.flat" and r["watches"] == ["input_1"]]
    with torch.no_grad():
        highest = max(torch.relu(model.stem(x)).max().item() for x in (X, 3 * X))
    assert [entry["batches"] for entry in entries] == [2]
    torch.testing.assert_close(entries[0]["max"], [highest], rtol=1e-4, atol=1e-4)


def test_tables_name_regions_inside_a_leaf():
    prepared, _, lowered = stages(Gated())
    for text in (fxq.summary(lowered), fxq.graph_table(lowered), fxq.observer_table(prepared)):
        assert "(the model)" in text and "gate.deep" in text and "gate.flat" in text
    summary = fxq.summary(lowered)
    assert "3: the model, and parts" in summary and "100.0% of" in summary
    assert "x.max()" in summary and "gate.rare" in summary and "do not reach it" in summary


@pytest.mark.parametrize("inside", [False, True])
def test_files_with_regions_inside_a_leaf(tmp_path, inside):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Gated()

        def forward(self, x):
            return self.inner(x) if x.sum() > -1e9 else {"y": x}

    model = Root().eval() if inside else Gated()
    _, reference, lowered = stages(model)
    with torch.no_grad():
        expected = lowered(X)["y"]
        for made in (reference, lowered):
            fxq.save(made, tmp_path / "model.fxq")
            loaded = fxq.load(tmp_path / "model.fxq", model=model)
            assert regions_of(loaded, Stage.LOWERED).keys() == regions_of(lowered).keys()
            assert torch.equal(loaded(X)["y"], expected)
        assert fxq.summary(loaded) == fxq.summary(lowered)
        restored = pickle.loads(pickle.dumps(lowered)) if not inside else lowered
        restored.load_state_dict(lowered.state_dict())
        assert torch.equal(restored(X)["y"], expected)
    with pytest.raises(FxqError, match="load it with model="):
        fxq.load(tmp_path / "model.fxq")


def test_what_stays_float_in_a_leaf_counts():
    model = Gated()
    prepared = fxq.prepare(model, X, exclude="gate.flat")
    floats = {r["module"]: r["macs"] for r in fxq.graph_records(prepared) if r["macs"] and r["type"] == "float"}
    assert floats == {"gate.flat": 2 * 4 * 8 * 8 * 4}
    prepared = fxq.prepare(model, X, exclude="gate")
    assert all(r["type"] == "float" for r in fxq.graph_records(prepared) if r["macs"] and "gate" in r["module"])
    total = sum(record["macs"] for record in fxq.graph_records(prepared))
    assert total == sum(record["macs"] for record in fxq.graph_records(fxq.prepare(model, X)))


def test_a_layer_that_cannot_be_traced_in_a_leaf_counts():
    class Picky(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    model = Gated()
    model.gate.flat = Picky(4, 4, 1).eval()
    prepared = fxq.prepare(model, X)
    assert regions_of(prepared).keys() == {"", "gate.deep"}
    (record,) = [r for r in fxq.graph_records(prepared) if r["macs"] and r["type"] == "float"]
    assert record["macs"] == 2 * 4 * 8 * 8 * 4 and record["module"] == "gate"
    assert "gate.flat" in fxq.summary(prepared)


def test_a_leaf_inside_a_region_of_a_partition():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Gated()

        def forward(self, x):
            return self.inner(x) if x.sum() > -1e9 else {"y": x}

    model = Root().eval()
    _, _, lowered = stages(model)
    assert regions_of(lowered).keys() == {"inner", "inner.gate.deep", "inner.gate.flat"}
    close(model, lowered, X)
    assert "inner.gate.rare" in fxq.summary(lowered)


class ReadsInside(nn.Module):
    """Takes something of a weight of a submodule's submodule, and cannot be traced."""

    def __init__(self, take):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.take = take

    def forward(self, x):
        x = self.take(self.embed.get_submodule("0").weight, x) if x.sum() > -1e9 else x
        return self.body(self.embed(x))


def test_what_code_outside_gives_new_weights_is_no_region():
    class Assigning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.raw = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:
                return x
            self.inner.weight.data = self.raw * x.mean()
            return self.outer(self.inner(x))

    torch.manual_seed(0)
    model = Assigning().eval()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    quantized = fxq.quantize(model, [images, 3 * images], progress=False)
    assert list(regions_of(quantized)) == ["outer"]
    expected = model(3 * images)
    assert (quantized(3 * images) - expected).abs().max() < 0.02 * expected.abs().max()


def test_what_code_outside_reads_is_no_region():
    torch.manual_seed(0)
    model = ReadsInside(lambda weight, x: x * weight.mean()).eval()
    x = torch.randn(2, 3, 12, 12)
    quantized = quiet(fxq.quantize, model, [x])
    assert set(regions_of(quantized)) == {"embed.1", "body"}
    assert "code outside it reads its tensors or submodules" in fxq.summary(quantized)
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


class AsksOneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = conv(3, 4)

    def forward(self, x):
        state = torch.zeros(1, 4, 1, 1, device=self.layer.weight.device, dtype=self.layer.weight.dtype)
        return self.layer(x if x.sum() < 1e9 else -x) + state


def described(weight, x):
    assert weight.shape == (4, 3, 1, 1) and weight.size(1) == 3 and weight.numel() == 12
    assert weight.ndim == weight.dim() == 4 and weight.is_floating_point()
    return x.to(weight.dtype).to(weight.device)


def test_what_code_outside_asks_of_a_weight_it_may_ask_of_a_region(tmp_path):
    torch.manual_seed(0)
    model, x = ReadsInside(described).eval(), torch.randn(2, 3, 12, 12)
    prepared = quiet(fxq.prepare, model, x)
    fxq.calibrate(prepared, [x])
    reference = fxq.convert_to_reference(prepared)
    quantized = fxq.lower(reference, "x86")
    fxq.save(reference, tmp_path / "model.fxq")
    with torch.no_grad():
        expected, actual = model(x), quantized(x)
        for made in (prepared, reference, copy.deepcopy(quantized), fxq.load(tmp_path / "model.fxq", model=model)):
            assert set(regions_of(made)) == {"embed", "body"}
            assert sqnr(expected, made(x)) > 25
    assert sqnr(expected, actual) > 25
    assert quantized.embed.get_submodule("0").weight.dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_layer_that_is_a_region_still_tell_of_its_weight(copied):
    model = AsksOneLayer().eval()
    prepared = fxq.prepare(model, X)
    prepared(X)
    reference = fxq.convert_to_reference(prepared)
    for made in (prepared, reference, fxq.lower(reference, "x86")):
        assert torch.equal(copied(copied(made))(X), made(X))


def test_values_that_are_part_of_a_kernel_cannot_be_read():
    model, x = ReadsInside(described).eval(), torch.randn(2, 3, 12, 12)
    quantized = quiet(fxq.quantize, model, [x])
    with pytest.raises(AttributeError, match=r"'0\.weight' is part of an int8 kernel"):
        quantized.embed.get_submodule("0").weight.mean()


def next_parameter(model, x):
    first = next(model.parameters())
    assert first.shape == (4, 3, 1, 1) and not first.is_cuda and first.data.layout == torch.strided
    zeros = first.new_zeros(1) + torch.zeros_like(first).sum() + first.data.new_ones(0).sum()
    return x.to(first.device, first.dtype) + zeros


def by_name(model, x):
    named = dict(model.embed.named_parameters("inside"))
    assert list(named) == ["inside.0.weight", "inside.0.bias", "inside.1.weight", "inside.1.bias"]
    return x.to(named["inside.1.weight"]).type_as(model.embed.get_submodule("0").bias)


def of_a_part(model, x):
    assert sum(parameter.numel() for parameter in model.parameters()) == 312
    assert [len(parameter) for parameter in model.embed.get_submodule("1").parameters()] == [4, 4]
    return x * next(model.body.parameters()).ndim


def of_a_property(model, x):
    return x.to(model.body.dtype)


class Typed(nn.Sequential):
    @property
    def dtype(self):
        return next(self.parameters()).dtype


class Lists(nn.Module):
    def __init__(self, take):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3))
        self.body = Typed(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.take = take

    def forward(self, x):
        return self.body(self.embed(self.take(self, x) if x.sum() > -1e9 else x))


@pytest.mark.parametrize("take", [next_parameter, by_name, of_a_part, of_a_property])
def test_code_outside_lists_the_parameters_of_regions(take, tmp_path):
    torch.manual_seed(0)
    model, x = Lists(take).eval(), torch.randn(2, 3, 12, 12)
    prepared = quiet(fxq.prepare, model, x)
    fxq.calibrate(prepared, [x])
    reference = fxq.convert_to_reference(prepared)
    quantized = fxq.lower(reference, "x86")
    fxq.save(reference, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq", model=model)
    pickled = pickle.loads(pickle.dumps(quantized))
    expected = model(x)
    for made in (prepared, reference, quantized, copy.deepcopy(quantized), pickled, loaded):
        assert set(regions_of(made)) == {"embed", "body"}
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert sqnr(expected, made(x)) > 25


def test_listed_parameters_whose_values_are_needed_stay():
    torch.manual_seed(0)
    model, x = Lists(lambda model, x: x * next(model.parameters()).mean()).eval(), torch.randn(2, 3, 12, 12)
    quantized = quiet(fxq.quantize, model, [x])
    assert set(regions_of(quantized)) == {"embed.1", "body"}
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


class HasStride:
    kind = "encoder"

    @property
    def stride(self):
        return 2**self._depth

    @property
    def broken(self):
        raise RuntimeError

    @property
    def outdated(self):
        warnings.warn("ask for stride", DeprecationWarning, stacklevel=2)
        return 1


class Strided(nn.Module, HasStride):
    def __init__(self):
        super().__init__()
        self.conv, self._depth = nn.Conv2d(3, 4, 3, padding=1), 3

    def forward(self, x):
        return self.conv(x)


class AsksStride(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Strided()

    def forward(self, x):
        if x.sum() > 1e9 or x.shape[-1] % self.encoder.stride or self.encoder.kind != "encoder":
            return x
        return self.encoder(x)


def test_properties_of_a_region_are_still_readable():
    model, x = AsksStride().eval(), torch.randn(2, 3, 8, 8)
    quantized = quiet(fxq.quantize, model, [x])
    assert set(regions_of(quantized)) == {"encoder"}
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


def test_properties_that_nobody_asks_for_warn_nobody():
    model, x = AsksStride().eval(), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxq.quantize(model, [x])
    assert not [warning for warning in caught if "ask for stride" in str(warning.message)]


def test_a_part_called_self_does_not_shadow_the_module():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.self, self.output = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.output(self.self(x).relu())

    model, x = Attention().eval(), torch.randn(2, 8)
    quantized = quiet(fxq.quantize, model, [x])
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


def test_layers_whose_weights_are_read_keep_their_parts():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    quantized = quiet(fxq.quantize, model, [x])
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


def test_a_lowered_model_keeps_its_reference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    prepared = fxq.prepare(model, torch.rand(1, 3, 8, 8), backend="x86")
    prepared(torch.rand(2, 3, 8, 8))
    reference = fxq.convert_to_reference(prepared)
    lowered = fxq.lower(reference, "x86")
    assert reference_of(lowered) is reference
    assert reference_of(reference) is reference
    with pytest.raises(StageError, match="prepared"):
        reference_of(prepared)


class Listed(nn.Module):
    """Calls its parts from a list, a tuple with a list in it and a dict, in another order than it registers them."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]
        for number, layer in enumerate(layers):
            self.add_module(f"layer{number}", layer)
        self.reverse, self.pair, self.named = [layers[2]], (layers[0], [layers[1]]), {"last": layers[3]}

    def listed(self):
        first, (second,) = self.pair
        return *self.reverse, first, second, self.named["last"]

    def forward(self, x):
        for layer in self.listed():
            x = layer(x).relu() if x.sum() < 1e9 else x
        return x


@pytest.mark.parametrize("inside", [False, True])
def test_parts_that_are_called_from_lists(inside, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Listed()).eval() if inside else Listed().eval()
    listed = model[1] if inside else model
    kept = listed.listed()
    x = torch.randn(2, 3, 12, 12)
    prepared = quiet(fxq.prepare, model, x)
    fxq.calibrate(prepared, [x])
    reference = fxq.convert_to_reference(prepared)
    fxq.save(reference, tmp_path / "model.fxq")
    with torch.no_grad():
        for made in (fxq.lower(reference, "x86"), fxq.load(tmp_path / "model.fxq", model=model)):
            assert len(regions_of(made)) == (5 if inside else 4)
            assert "multiply-accumulates in int8  100.0%" in fxq.summary(made)
            assert 25 < sqnr(model(x), made(x)) < 60
    assert all(a is b for a, b in zip(kept, listed.listed(), strict=True))
    copied = prepared[1] if isinstance(prepared, nn.Sequential) else getattr(prepared, "1", prepared)
    assert not set(map(id, [*prepared.modules(), *copied.listed()])) & set(map(id, model.modules()))


class Several(nn.Module):
    """Traceable as called without ``more``, which is a list of any length."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x, more=None):
        for other in [] if more is None else more:
            x = x + other
        return self.last(self.conv(x))


def test_inputs_are_kept_only_for_what_may_become_a_region():
    model = Detector().eval()
    with recording(model) as found, torch.no_grad():
        model(X)
    assert {"backbone"} <= set(found.seen) and not [path for path in found.seen if path.startswith("backbone.")]


def test_parts_of_what_only_seems_traceable_become_regions():
    model = Lambda(lambda m, x: m.several(x, [x] * int(x.abs().sum() > 0)), several=Several()).eval()
    with recording(model) as found, torch.no_grad():
        model(X)
    assert set(found.seen) == {"", "several"}
    qmodel = fxq.quantize(model, [X], progress=False)
    assert set(regions_of(qmodel)) == {"several.conv", "several.last"}
    assert sqnr(model(X).detach(), qmodel(X)) > 25


def test_parts_called_from_outside_what_seems_traceable():
    """``head`` could be traced, but only its conv runs."""
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = Lambda(lambda m, x: m.head[0](x) if float(x.abs().sum()) > 0 else x, head=head).eval()
    assert set(regions_of(fxq.quantize(model, [X], progress=False))) == {"head.0"}


class TakesHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, head):
        return head(self.conv(x).relu())


class GivesHead(nn.Module):
    """Hands one of its parts to another."""

    def __init__(self):
        super().__init__()
        self.decoder, self.head = TakesHead(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.decoder(x, self.head) if x.sum() < 1e9 else x


def test_a_module_that_is_an_argument():
    torch.manual_seed(0)
    model, x = GivesHead().eval(), torch.randn(2, 3, 8, 8)
    quantized = quiet(fxq.quantize, model, [x])
    assert set(regions_of(quantized)) == {"decoder", "head"}
    with torch.no_grad():
        assert 25 < sqnr(model(x), quantized(x)) < 60


class OneWay(nn.Module):
    """Can be traced as long as nothing is known of its inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x=None):
        return self.conv(x) if x is not None and x.sum() < 1e9 else self.conv(torch.zeros(1, 3, 8, 8))


def test_a_leaf_that_seems_traceable_without_its_inputs():
    torch.manual_seed(0)
    model, x = nn.Sequential(OneWay(), nn.Conv2d(4, 4, 1)).eval(), torch.randn(2, 3, 8, 8)
    quantized = quiet(fxq.quantize, model, [x])
    assert set(regions_of(quantized)) == {"", "0.conv"}
    with torch.no_grad():
        assert 25 < sqnr(model(x), quantized(x)) < 60


class LetsGo(nn.Module):
    """Frees its input and what its parts read."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        one, two = (part.contiguous() for part in x.chunk(2, dim=1))
        one_out = one + self.first(two)
        y = torch.cat((one_out, two + self.second(one_out)), dim=1)
        for part in (one, two, one_out, x.data):
            part.set_()
        return y


def test_parts_whose_inputs_are_freed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LetsGo(), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 3, 12, 12)
    quantized = quiet(fxq.quantize, model, [x])
    assert {"1.first", "1.second"} < set(regions_of(quantized))
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


class CalledInPart(nn.Module):
    """Calls a part of a part before the part itself, as Tacotron does with the projection of its memory."""

    def __init__(self):
        super().__init__()
        self.attention = Two(lambda m, x, y: m.last(m.query(x) + y), query=conv(), memory=conv(), last=conv(4, 4))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.attention(x, self.attention.memory(x))


def test_a_part_that_is_called_from_outside_leaves_the_others_to_be_found():
    model = CalledInPart().eval()
    quantized = quiet(fxq.quantize, model, [torch.randn(2, 3, 8, 8)])
    assert set(regions_of(quantized)) == {"attention.query", "attention.memory", "attention.last"}


class AsksKernelSize(nn.Module):
    """Pads by what it reads of a conv two modules away, whose weight a hook computes, as EnCodec does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv1d(3, 4, 5, dilation=2)), nn.ReLU())

    def forward(self, x):
        first = self.body.get_submodule("0")
        padding = (first.kernel_size[0] - 1) * first.dilation[0]
        return self.body(nn.functional.pad(x, (padding, 0)) if x.sum() > -1e9 else x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_numbers_inside_a_region_are_still_readable(tmp_path):
    torch.manual_seed(0)
    model, x = AsksKernelSize().eval(), torch.randn(2, 3, 20)
    prepared = quiet(fxq.prepare, model, x)
    fxq.calibrate(prepared, [x])
    reference = fxq.convert_to_reference(prepared)
    fxq.save(reference, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq", model=model)
    lowered = fxq.lower(reference, "x86")
    with torch.no_grad():
        for made in (prepared, reference, lowered, copy.deepcopy(lowered), loaded):
            assert set(regions_of(made)) == {"body"}
            assert sqnr(model(x), made(x)) > 25


class AsksAndCalls(AsksKernelSize):
    def forward(self, x):
        first = self.body.get_submodule("0")
        padding = first.kernel_size[0] if x.sum() > -1e9 else 0
        return self.body.get_submodule("1")(first(nn.functional.pad(x, (padding, 0))))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_is_asked_and_called_from_outside_is_no_part_of_a_region():
    torch.manual_seed(0)
    model, x = AsksAndCalls().eval(), torch.randn(2, 3, 20)
    quantized = quiet(fxq.quantize, model, [x])
    assert set(regions_of(quantized)) == {"body.0"}
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 25


class ChangesItsInput(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.conv, self.whole = conv(), whole

    def forward(self, x):
        if not self.whole and x.sum() > 1e9:
            return x
        x *= 100
        return self.conv(x)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_changes_its_input_is_calibrated_on_what_was_given(whole):
    torch.manual_seed(0)
    model, batch = ChangesItsInput(whole).eval(), torch.randn(2, 3, 8, 8)
    x = batch.clone()
    quantized = quiet(fxq.quantize, model, [batch])
    with torch.no_grad():
        assert sqnr(model(x.clone()), quantized(x.clone())) > 25


class Shifted(nn.Module):
    """Masks every second block, and at other sizes than it was made for every one, as SwinIR does."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleList(MaskedPair() for _ in range(2))

    def forward(self, x):
        for number, attention in enumerate(self.attention):
            other = x.shape[-1] != 8
            x = attention(x, mask=torch.ones_like(x) if number or other else None)
        return x


class MaskedPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 3), conv(3, 3)

    def forward(self, x, mask=None):
        x = self.first(x)
        return self.second(x if mask is None else x * mask)


def test_what_others_of_its_class_get_a_part_may_get_at_another_size():
    torch.manual_seed(0)
    model = Shifted().eval()
    quantized = quiet(fxq.quantize, model, [torch.randn(2, 3, 8, 8)])
    assert set(regions_of(quantized)) == {"attention.0.first", "attention.0.second", "attention.1"}
    other = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert sqnr(model(other), quantized(other)) > 20


class TakesApart(nn.Module):
    """Asks a Sequential, which it also calls, for its parts."""

    def __init__(self, ask):
        super().__init__()
        self.inner = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))
        self.ask = ask

    def forward(self, x):
        y = self.inner(x) + self.ask(self.inner, x)
        return y if y.sum() < 1e9 else -y


ASKS = {
    "weight": lambda inner, x: inner[0].weight.detach().mean(),
    "dtype": lambda inner, x: torch.ones(1, dtype=inner[0].weight.dtype),
    "last": lambda inner, x: inner[-1].weight.shape[0],
    "number": lambda inner, x: inner[0].kernel_size[0],
    "loop": lambda inner, x: sum(layer.weight.shape[1] for layer in inner if hasattr(layer, "weight")),
    "len": lambda inner, x: len(inner),
    "call": lambda inner, x: inner[0](x),
    "slice": lambda inner, x: inner[:2](x),
}


@pytest.mark.parametrize("ask", ASKS)
def test_code_outside_may_take_a_sequential_apart(ask):
    torch.manual_seed(0)
    model = TakesApart(ASKS[ask]).eval()
    qmodel = fxq.quantize(model, [X], progress=False)
    assert "inner.2" in regions_of(qmodel) and ("inner.0" in regions_of(qmodel)) == (ask != "weight")
    assert sqnr(model(X).detach(), qmodel(X)) > 25


def test_a_sequential_that_is_only_called_is_one_region():
    qmodel = fxq.quantize(TakesApart(lambda inner, x: 0).eval(), [X], progress=False)
    assert list(regions_of(qmodel)) == ["inner"]


def test_a_model_in_regions_that_lists_parameters_compiles():
    class AsksDtype(TakesApart):
        def forward(self, x):
            return super().forward(x.to(next(self.parameters()).dtype))

    qmodel = fxq.quantize(AsksDtype(lambda inner, x: 0).eval(), [X], progress=False)
    with torch.no_grad():
        assert torch.equal(torch.compile(qmodel, backend="eager")(X), qmodel(X))
