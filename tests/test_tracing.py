"""Tracing: unmodified models, float leaves for what cannot be traced, and a model that is left as it is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models_for_tests import Lambda, canonical, checked, conv, fresh, quiet, same
from torch import nn

import fxq
from fxq.errors import FxqError, InputError, StageError, TraceError
from fxq.graph_module import QuantModule
from fxq.numerics import sqnr
from fxq.tracing import blocking_statement, trace

X = torch.randn(2, 3, 8, 8)


class DataDependent(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, skip=None, factor: float = 1.0, *, flag=True):
        y = self.conv(x)
        if skip is not None:
            y = y + skip
        return y * factor if flag else y


class Keeps(nn.Module):
    """Does to itself what real models do in their forward."""

    def __init__(self):
        super().__init__()
        self.conv = conv()
        self.seen = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        self.last = x
        self.seen.append(1)
        self.register_buffer("added", torch.ones(1))
        return self.conv(x) + self.added + torch.tensor([2.0])


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {
            name: (id(m), m.training, {k: id(v) for k, v in vars(m).items()}, list(m._forward_hooks),
                   list(m._forward_pre_hooks), list(m._buffers))
            for name, m in model.named_modules()
        },
    )  # fmt: skip


def assert_untouched(model, before):
    state, modules = snapshot(model)
    assert modules == before[1]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: {"out": m.conv(x), "aux": [x, (m.conv(x) * 2,)]},
        lambda m, x: (m.conv(x), None, 3),
        lambda m, x: m.conv(x).view(x.size(0), -1),
        lambda m, x: nn.functional.interpolate(m.conv(x), size=x.shape[-2:]),
        lambda m, x: m.relu(m.conv(m.relu(x))),
    ],
    ids=["dict", "tuple", "view", "interpolate", "shared-module"],
)
def test_structures_are_traced(forward):
    model = Lambda(forward, conv=conv(), relu=nn.ReLU())
    module = fresh(model, X)
    same(module(X), model(X))
    other = torch.randn(3, 3, 10, 6)
    same(module(other), model(other))


def test_star_args():
    class Star(nn.Module):
        def forward(self, *xs):
            return xs[0] + xs[1]

    module, _ = trace(Star().eval(), (X, X), {})
    same(module(X, X), X + X)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.chunk(3, 1),
        lambda x: torch.chunk(x, chunks=3, dim=1),
        lambda x: x.split([1, 2], dim=1),
        lambda x: torch.split(x, (1, 1, 1), 1),
        lambda x: x.split_with_sizes([1, 2], 1),
    ],
)
def test_parts_of_a_tensor_are_iterated_over(cut):
    def forward(m, x):
        parts = list(cut(x))
        parts.extend(part * 2 for part in cut(parts[0] + x))
        return torch.cat(parts, 1)

    model = Lambda(forward)
    module = fresh(model, X)
    same(module(X), model(X))
    other = torch.randn(3, 3, 10, 6)
    same(module(other), model(other))


def test_fewer_chunks_than_asked_for():
    model = Lambda(lambda m, x: m.c(torch.cat([2 * part for part in x.chunk(4, 2)], 2)), c=conv())
    assert len(X[:, :, :5].chunk(4, 2)) == 3
    quantized = quiet(fxq.quantize, model, [X[:, :, :5]])
    assert "IndexError" in fxq.summary(quantized)
    with torch.no_grad():
        assert sqnr(model(X[:, :, :5]), quantized(X[:, :, :5])) > 25


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((X,), {}), ((X, X), {}), ((), {"scale": 3.0}), ((X,), {"bias": X})]
)
def test_star_args_beside_other_parameters(args, kwargs):
    class Star(nn.Module):
        def forward(self, x, *rest, scale=2.0, **more):
            return self.inner(x, *rest, **more) * scale

        def inner(self, x, *rest, bias=None):
            return sum(rest, x) if bias is None else x + bias

    model = Star().eval()
    module, _ = trace(model, (X, *args), kwargs)
    same(module(X, *args, **kwargs), model(X, *args, **kwargs))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((X.mean(1, True),), {}), ((), {"skip": X.mean(1, True)}), ((), {"flag": False})],
    ids=["none", "positional", "keyword", "flag"],
)
def test_optional_inputs(args, kwargs):
    model = Options().eval()
    module, _ = trace(model, (X, *args), kwargs)
    same(module(X, *args, **kwargs), model(X, *args, **kwargs))


def test_a_switch_is_fixed_at_the_value_it_was_given():
    module, _ = trace(Options().eval(), (X,), {"flag": False})
    with pytest.raises(InputError, match="flag was False when the model was traced"):
        module(X)


def test_a_decorated_forward_with_more_keywords():
    def decorated(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            return forward(self, *args, **kwargs) + 1

        return wrapper

    class Model(nn.Module):
        @decorated
        def forward(self, ids=None, mask=None, flag=True, **more):
            y = ids if mask is None else ids * mask
            return y + more["bias"] if flag and "bias" in more else y

    model = Model().eval()
    for kwargs in ({"ids": X}, {"ids": X, "mask": 2 * X}, {"ids": X, "bias": X}):
        module, _ = trace(model, (), kwargs)
        same(module(**kwargs), model(**kwargs))
        same(module(**kwargs, flag=True), model(**kwargs))
    module, _ = trace(model, (X,), {})
    same(module(X), model(X))
    with pytest.raises(InputError, match="mask was None"):
        module(X, X)


def test_an_input_fixed_at_none_refuses_another_value():
    module, _ = trace(Options().eval(), (X,), {})
    with pytest.raises(InputError, match="skip"):
        module(X, X)
    qmodel = fxq.quantize(Options().eval(), [X], example_inputs=X)
    with pytest.raises(InputError, match="skip"):
        qmodel(X, X)


def test_untraceable_submodule_is_a_leaf_with_its_statement():
    model = Lambda(lambda m, x: m.after(m.odd(m.conv(x))), conv=conv(), odd=DataDependent(), after=nn.ReLU())
    module, untraceable = trace(model, (X,), {})
    same(module(X), model(X))
    assert list(untraceable) == ["odd"]
    assert f"{__file__}:" in untraceable["odd"] and "if x.sum() > 0:" in untraceable["odd"]


def test_only_the_innermost_module_is_a_leaf():
    block = nn.Sequential(conv(), nn.Sequential(DataDependent(), nn.ReLU()))
    module, untraceable = trace(Lambda(lambda m, x: m.block(x), block=block), (X,), {})
    assert list(untraceable) == ["block.1.0"]
    assert [n.target for n in module.graph.nodes if n.op == "call_module"] == ["block.0", "block.1.0", "block.1.1"]


def test_nodes_after_a_leaf_know_where_they_are():
    """A failed forward must not stay on the tracer's stack of modules."""
    model = Lambda(lambda m, x: torch.relu(m.odd(x)) + 1, odd=DataDependent())
    plan = canonical(model, X).plan
    assert plan.origin("relu").module_path == "" and plan.origin("add").module_path == ""


def test_a_leaf_keeps_the_nodes_before_it():
    model = Lambda(lambda m, x: (torch.relu(x), m.odd(torch.tanh(x))), odd=DataDependent())
    same(fresh(model, X)(X), model(X))


def test_root_that_cannot_be_traced_names_statement_and_remedy():
    with pytest.raises(TraceError) as error:
        fresh(DataDependent().eval(), X)
    assert "if x.sum() > 0:" in str(error.value) and __file__ in str(error.value)
    assert "submodule" in str(error.value)


def test_the_named_statement_is_the_models_not_torchs():
    def broken():
        return nn.functional.conv2d(torch.ones(1), torch.ones(1))

    try:
        nn.functional.interpolate(torch.ones(1), size=3, scale_factor=3)
    except ValueError as error:
        assert __file__ in blocking_statement(error)


@pytest.mark.parametrize(("path", "name"), [("", "the model"), ("drop", "'drop'")])
def test_training_mode_names_the_module(path, name):
    model = Lambda(lambda m, x: m.drop(x), drop=nn.Dropout())
    model.get_submodule(path).training = True
    with pytest.raises(StageError, match=f"{name}.*training mode.*eval"):
        fresh(model, X)


@pytest.mark.parametrize("path", ["trace", "quantize", "fails"])
def test_the_model_is_never_modified(path):
    model = Keeps().eval()
    before = snapshot(model)
    expected = copy.deepcopy(model)(X)
    if path == "trace":
        fresh(model, X)
    elif path == "quantize":
        fxq.quantize(model, [X, X])
    else:
        with pytest.raises(FxqError):
            fxq.quantize(model, [X, X], exclude=["nothing of this name"])
    assert_untouched(model, before)
    same(model(X), expected)


def test_the_model_is_not_modified_where_tracing_fails():
    model = Lambda(lambda m, x: m.odd(x) if m.keeps(x).sum() > 0 else x, odd=DataDependent(), keeps=Keeps())
    before = snapshot(model)
    with pytest.raises(TraceError):
        fresh(model, X)
    assert_untouched(model, before)


def test_the_copy_is_independent():
    leaf = nn.LSTM(8, 4)
    shift = nn.Parameter(torch.ones(4))
    model = Lambda(lambda m, x: m.lstm(m.conv(x)[0])[0] + m.shift, conv=conv(), lstm=leaf, shift=shift)
    module = fresh(model, X)
    expected = model(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    same(module(X), expected)


def test_a_leaf_inside_a_leaf_stays_the_users():
    """``outer`` is a leaf and ``outer.inner`` is called besides: only copies may be replaced."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DataDependent()

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    model = Lambda(lambda m, x: m.outer(x) + m.outer.inner(x), outer=Outer())
    inner = model.outer.inner
    module = fresh(model, X)
    assert model.outer.inner is inner
    same(module(X), model(X))


def test_shared_tensors_stay_shared():
    a, b = conv(3, 3), conv(3, 3)
    b.weight = a.weight
    module = fresh(Lambda(lambda m, x: m.b(m.a(x)), a=a, b=b), X)
    assert module.get_submodule("a").weight is module.get_submodule("b").weight
    assert module.get_submodule("a").weight is not a.weight


def test_several_threads_trace_and_run_models_at_once():
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval() for _ in range(4)]
    x = torch.randn(1, 3, 8, 8)
    expected = [model(x) for model in models]

    def work(number):
        for _ in range(10):
            module, _ = trace(models[number], (x,), {})
            assert torch.equal(module(x), expected[number])
            assert torch.equal(models[number](x), expected[number])

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, range(len(models))))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8), "not an image: "),
        ((2, 4, 8, 8), "a check of the model fails"),
        ((2, 3, 0, 8), "a check of the model fails"),
    ],
)
def test_checks_that_raise_are_traced_and_still_made(shape, message):
    model = Lambda(checked, a=nn.Conv2d(3, 4, 3, padding=1))
    module, untraceable = trace(model, (torch.randn(2, 3, 8, 8),), {})
    assert not untraceable
    x = torch.randn(5, 3, 6, 6)
    assert torch.equal(module(x), model(x))
    with pytest.raises(AssertionError, match=message):
        module(torch.randn(shape))


def test_a_branch_that_does_more_than_raise_is_not_traced():
    def forward(m, x):
        if x.sum() > 0:
            m.seen = True
            raise ValueError
        return x

    with pytest.raises(TraceError, match="control flow"):
        trace(Lambda(forward), (torch.randn(2),), {})


@dataclasses.dataclass
class Output(dict):
    """A dict whose items are attributes too, as of some libraries' outputs."""

    scores: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return Output(scores=self.conv(x))


def test_an_output_with_attributes_keeps_its_type():
    model = Answers().eval()
    qmodel = fxq.quantize(model, [X])
    out = qmodel(X)
    assert type(out) is Output and list(out) == ["scores"] and out.hidden is None
    assert (out.scores - model(X).scores).abs().max() < 0.1


class OddAnswers(Answers):
    def forward(self, x):
        return super().forward(x + 1 if x.sum() > 1e9 else x)


class Projects(nn.Module):
    """Changes an attribute of what a part that cannot be traced returns."""

    def __init__(self):
        super().__init__()
        self.answers, self.head = OddAnswers(), conv(4, 4)

    def forward(self, x):
        out = self.answers(x)
        out.scores = self.head(out.scores)
        return out


def test_attributes_that_a_model_sets_are_set():
    model = Projects().eval()
    qmodel = fxq.quantize(model, [X])
    assert (qmodel(X).scores - model(X).scores).abs().max() < 0.1


class Cache:
    """What a model appends to while it runs."""

    def __init__(self):
        self.seen = []

    def update(self, x):
        self.seen.append(x)
        return torch.cat(self.seen, 1)


class Appends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, cache):
        return self.conv(cache.update(x))  # fails when the cache is not empty


class MakesCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.appends = Appends()

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.appends(x, Cache())


def test_inputs_that_a_module_changes_are_as_they_were_each_time():
    model = MakesCache().eval()
    qmodel = fxq.quantize(model, [X, X])
    assert (qmodel(X) - model(X)).abs().max() < 0.1
    assert isinstance(qmodel.appends, QuantModule)


class MaybeNone(nn.Module):
    """Cannot be traced, and its second result may be None."""

    def forward(self, x):
        return x, x if x.sum() > 1e9 else None


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.maybe = conv(), conv(), MaybeNone()

    def forward(self, x):
        first, second = self.maybe(x)[:2]
        return self.conv(first) if second is None else self.other(second)


def test_what_is_traced_wrong_is_quantized_inside():
    model = nn.Sequential(Chooses()).eval()
    qmodel = fxq.quantize(model, [X])
    assert (qmodel(X) - model(X)).abs().max() < 0.1
    assert "what was traced fails where the model does not" in str(fxq.summary(qmodel))


class SameConv(nn.Conv2d):
    """Pads as much as the input's size needs for an output of size / stride."""

    def forward(self, x):
        height, width = x.size()[-2:]
        tall, wide = (max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in (height, width))
        x = nn.functional.pad(x, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2])
        return nn.functional.conv2d(x, self.weight, self.bias, 2)


class Sized(nn.Module):
    """Its layers are of a class of its own, into which tracing goes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = SameConv(3, 8, 3), SameConv(8, 8, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_padding_computed_from_the_size_is_traced(tmp_path):
    model = Sized().eval()
    qmodel = fxq.quantize(model, [X])
    assert all(record["type"] == "int8" for record in fxq.graph_records(qmodel) if record["macs"])
    prepared = fxq.prepare(model, X)
    fxq.save(qmodel, tmp_path / "model.fxq")
    torch.testing.assert_close(fxq.load(tmp_path / "model.fxq")(X), qmodel(X), atol=0, rtol=0)
    for size in (8, 9, 13):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        torch.testing.assert_close(prepared(x), model(x))
        assert qmodel(x).shape == model(x).shape
    assert max is original_max


original_max = max


class Branching(nn.Module):
    """Cannot be traced, and uses its input before."""

    def forward(self, x):
        x = x + 1
        return x if x.sum() > 0 else -x


def test_an_attribute_that_a_module_which_cannot_be_traced_gets():
    model = Lambda(lambda m, x: m.branching(x.mT) + x.mT, branching=Branching())
    module, untraceable = trace(model, (X,), {})
    module.graph.lint()
    assert set(untraceable) == {"branching"}
    same(module(X), model(X))


class Checks(nn.Module):
    def __init__(self, check):
        super().__init__()
        self.conv, self.check = nn.Conv2d(3, 4, 3), check

    def forward(self, x):
        self.check(x)
        return self.conv(x)


def _says(x):  # as an assert does, whose code pytest would change
    if x.shape[2] != 8:
        raise AssertionError("images must have 8 rows")


def _formats(x):
    if x.shape[2] != 8:
        raise AssertionError(f"images must have 8 rows, not {x.shape[2]}")


def _raises(x):
    if x.shape[2] != 8:
        raise ValueError("images must have 8 rows")


def _says_nothing(x):
    if not x.shape[2] == 8:
        raise AssertionError


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (_says, "images must have 8 rows"),
        (_formats, "images must have 8 rows, not ..."),
        (_raises, "images must have 8 rows"),
        (_says_nothing, "a check of the model fails"),
    ],
)
def test_a_check_keeps_its_message(check, message):
    module, _ = trace(Checks(check).eval(), (torch.rand(1, 3, 8, 8),), {})
    with pytest.raises(AssertionError) as caught:
        module(torch.rand(1, 3, 9, 9))
    assert str(caught.value) == message


class Merged(nn.Module):
    """Computes the weight of a conv from those of two others in each call."""

    def __init__(self, early=False):
        super().__init__()
        self.wide, self.narrow, self.merged = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)
        self.early = early
        self.mean = torch.full((1, 3, 1, 1), 0.3)

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        x = x - self.mean
        before = self.merged(x) if self.early else 0
        narrow = nn.functional.pad(self.narrow.weight.data.clone().detach(), (1, 1, 1, 1))
        self.merged.weight.data = self.wide.weight.data + narrow
        return self.merged(x) + before


def test_a_weight_that_is_computed_in_each_call_becomes_a_constant():
    torch.manual_seed(0)
    model, x = Merged().eval(), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    unused = model.merged.weight.detach().clone()
    qmodel = fxq.quantize(model, [x], progress=False)
    assert torch.equal(model.merged.weight, unused) and isinstance(model.mean, torch.Tensor)
    assert isinstance(qmodel, QuantModule) and not qmodel.plan.untraceable
    assert "convs and linears in int8     1 of 1" in fxq.summary(qmodel)
    assert sqnr(model(x).detach(), qmodel(x)) > 30


def test_a_weight_that_is_read_before_it_is_computed_is_not_traced():
    """The first read gives what the call before has computed."""
    with pytest.raises(TraceError, match="sets the attribute 'data'"):
        trace(Merged(early=True).eval(), (torch.rand(1, 3, 8, 8),), {})


class Inside(nn.Module):
    """A conv whose weight the module around it computes, or it itself, and a branch on values."""

    def __init__(self, itself):
        super().__init__()
        self.conv, self.itself = nn.Conv2d(3, 4, 3), itself

    def forward(self, x):
        if self.itself:
            self.conv.weight.data = self.conv.bias.data.reshape(4, 1, 1, 1).expand(4, 3, 3, 3).clone()
        return self.conv(x) if x.sum() > -1e9 else x


def test_leaves_do_not_read_weights_from_before():
    def around(m, x):
        m.inner.conv.weight.data = m.weight.data + 1
        return m.inner(x)

    model = Lambda(around, inner=Inside(itself=False))
    model.weight = nn.Parameter(torch.ones(4, 3, 3, 3))
    with pytest.raises(TraceError):
        trace(model.eval(), (X,), {})
    module, untraceable = trace(Lambda(lambda m, x: m.inner(x) + 1, inner=Inside(itself=True)).eval(), (X,), {})
    assert set(untraceable) == {"inner"} and [n.op for n in module.graph.nodes][1] == "call_module"


class WritesToItsList(nn.Module):
    """As YOLO's head: puts what it computes into the list or dict that it is given, then does what cannot be traced."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys
        self.layers = nn.ModuleList(conv(4, 2) for _ in keys)

    def forward(self, features):
        for key, layer in zip(self.keys, self.layers, strict=True):
            features[key] = layer(features[key])
        if features[self.keys[0]].sum() > 1e9:
            features[self.keys[0]] = -features[self.keys[0]]
        return features[self.keys[0]] + 1


@pytest.mark.parametrize("calibration", ["default", "max"])
@pytest.mark.parametrize("keys", [[0, 1], ["a", "b"]])
def test_what_an_untraceable_module_writes_into_a_list_is_read_after_it(keys, calibration, tmp_path):
    def forward(m, x):
        features = [m.a(x), m.b(x)] if keys == [0, 1] else {"a": m.a(x), "b": m.b(x), "size": 3}
        first = m.head(features)
        return [first, *(features[key] for key in keys)]

    model = Lambda(forward, a=conv(3, 4), b=conv(3, 4), head=WritesToItsList(keys))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    qmodel = fxq.quantize(model, [x], calibration=calibration)
    fxq.save(qmodel, tmp_path / "model.fxq")
    with torch.no_grad():
        for made in (qmodel, copy.deepcopy(qmodel), fxq.load(tmp_path / "model.fxq", model=model)):
            for expected, actual in zip(model(x), made(x), strict=True):
                assert sqnr(expected, actual) > 25
    shapes = {record["shape"] for record in fxq.graph_records(qmodel) if record["op"] == "getitem"}
    assert shapes == {(2, 2, 8, 8)}


def test_a_list_that_an_untraceable_module_makes_longer_is_not_traced():
    class Appends(nn.Module):
        def forward(self, features):
            features.append(features[0] + 1)
            return features[0] if features[0].sum() < 1e9 else -features[0]

    def forward(m, x):
        features = [m.a(x)]
        m.grow(features)
        return features[1]

    model = Lambda(forward, a=conv(3, 4), grow=Appends())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert sqnr(model(x), fxq.quantize(model, [x])(x)) > 25


def test_a_caller_may_try_arguments_that_a_module_does_not_take():
    def forward(m, x):
        for layer in m.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x

    model = Lambda(forward, layers=nn.ModuleList([conv(3, 4), nn.Sequential(nn.ReLU(), conv(4, 4)), nn.ReLU()]))
    module, untraceable = trace(model, (X,), {})
    assert not untraceable
    same(module(X), model(X))
