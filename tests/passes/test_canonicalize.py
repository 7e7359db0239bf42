"""Canonicalize: every spelling becomes the one op, with equal output; in-place updates keep their meaning."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_for_tests import OPS, Lambda, Two, canonical, conv, graph_text, op_names, reason, run, same
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves

import fxq
from fxq.graph_module import get_attribute
from fxq.ops import VOCABULARY
from fxq.passes.canonicalize import Canonicalize
from fxq.plan import INPLACE, OWN_FORWARD, UNKNOWN_OP, UNTRACEABLE, Status

X1, X2, X3 = torch.randn(2, 4, 12), torch.randn(2, 4, 6, 6), torch.randn(2, 4, 4, 4, 4)
BY_RANK = {"1d": X1, "2d": X2, "3d": X3}
W = {"conv1d": (4, 4, 3), "conv2d": (4, 4, 3, 3), "conv3d": (4, 4, 3, 3, 3)}

# Module constructor arguments and function arguments for what cannot be called with the input alone.
MODULES = {
    nn.Linear: (6, 3), nn.LayerNorm: (6,), nn.GroupNorm: (2, 4), nn.PixelShuffle: (2,), nn.Softmax: (1,),
    nn.Upsample: (None, 2), nn.AdaptiveAvgPool1d: (2,), nn.AdaptiveAvgPool2d: ((3, 2),),
    nn.AdaptiveAvgPool3d: (2,), nn.Hardtanh: (-0.5, 0.7), nn.PReLU: (4,),
    **{
        getattr(nn, f"{kind}Pad{rank}"): (1, 0.5) if kind == "Constant" else (2,)
        for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular") for rank in BY_RANK
    },
}  # fmt: skip
ARGUMENTS = {
    "linear": (torch.randn(3, 6),), "matmul": (torch.randn(2, 4, 12, 5),),
    "batch_norm": (torch.randn(4), torch.rand(4) + 1),
    "layer_norm": ([6],), "group_norm": (2,), "clamp": (-0.5, 0.6), "prelu": (torch.rand(4),), "softmax": (1,),
    "add": (torch.randn(6, 6),), "sub": (2.0,), "mul": (torch.randn(6, 6),), "div": (torch.rand(6, 6) + 1,),
    "max_pool1d": (2,), "max_pool2d": (3, 2, 1), "max_pool3d": (2,), "avg_pool1d": (2,), "avg_pool2d": (3, 2, 1),
    "avg_pool3d": (2,), "adaptive_avg_pool1d": (2,), "adaptive_avg_pool2d": ((3, 2),), "adaptive_avg_pool3d": (2,),
    "mean": ((2, 3),), "interpolate": (None, 2.0), "pad": ([1, 1],), "pixel_shuffle": (2,), "flatten": (1,),
    "permute": (0, 2, 3, 1), "transpose": (1, 2), "squeeze": (0,), "unsqueeze": (1,), "chunk": (2, 1), "split": (2, 1),
    "getitem": (0,), "dropout": (0.5, False), "reshape": (2, -1),
}  # fmt: skip


def spellings():
    for op in VOCABULARY:
        for spelling in {s.what: s for s in op.all_spellings()}.values():
            what = spelling.what
            if isinstance(what, type(torch.Tensor.reshape)):
                continue  # torch.fx itself refuses torch.Tensor.reshape(x, ...); only canonical nodes call it
            name = what if isinstance(what, str) else f"{getattr(what, '__module__', None) or 'torch'}.{what.__name__}"
            yield pytest.param(op, what, id=f"{op.name}-{name}")


def example(op):
    return next((x for rank, x in BY_RANK.items() if rank in op.name), X2)


def model_of(op, what):
    """A model that spells ``op`` as ``what``, called with the example input."""
    x = example(op)
    if isinstance(what, type):
        rank = next((value for suffix, value in BY_RANK.items() if what.__name__.endswith(suffix)), None)
        channels = (4,) if "Norm" in what.__name__ and what not in MODULES else ()
        arguments = (4, 4, 3) if what.__name__.startswith("Conv") else MODULES.get(what, channels)
        if what.__name__.endswith(("Pool1d", "Pool2d", "Pool3d")) and what not in MODULES:
            arguments = (2,)
        module = what(*arguments)
        x = x if rank is None else rank
        return Lambda(lambda m, v: m.part(v), part=module), x
    arguments = ARGUMENTS.get(op.name, ())
    if op.name == "matmul":
        x, arguments = (X1, (torch.randn(2, 12, 5),))
    if what in (torch.mm, "mm"):
        x, arguments = (X1[0], (torch.randn(12, 5),))
    if "conv" in op.name:
        arguments = (torch.randn(W[op.name.replace("_transpose", "")]),)
    if op.name == "pixel_shuffle":
        x = X2
    if op.name == "cat":
        return Lambda(lambda m, v: what([v, v], 1)), x
    name = what if isinstance(what, str) else what.__name__
    if "clamp_m" in name:
        arguments = (0.1,)
    if what in (torch.permute, torch.reshape):
        arguments = (arguments,)
    if "dropout" in name and what not in (F.dropout, torch.dropout):
        arguments = (0.5, False)
    if what is F.relu6:
        arguments = ()
    if what is F.dropout1d:
        x = X1
    constants = {f"c{i}": a for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
    augmented = name.startswith("i") and what in vars(operator).values()
    in_place = name.endswith("_") or augmented

    def forward(m, v):
        values = [getattr(m, f"c{i}") if f"c{i}" in constants else a for i, a in enumerate(arguments)]
        v = v * 1 if in_place else v  # the test's input must survive
        return getattr(v, what)(*values) if isinstance(what, str) else what(v, *values)

    return Lambda(forward, **constants), x


@pytest.mark.parametrize(("op", "what"), list(spellings()))
def test_every_spelling_becomes_the_op(op, what):
    model, x = model_of(op, what)
    expected = model(x)
    module = canonical(model, x)
    assert op.name in op_names(module)
    assert all(OPS.op_of(node) is not None for node in module.graph.nodes if node.op.startswith("call_"))
    same(module(x), expected)
    assert not module.plan.decisions


@pytest.mark.parametrize(
    "what", [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.SiLU, nn.Mish, nn.Hardsigmoid]
)
def test_inplace_modules_with_a_later_reader(what):
    model = Lambda(lambda m, x: _two(m, x + 0.25), part=what(inplace=True))
    expected = model(X2)
    module = canonical(model, X2)
    same(module(X2), expected)
    assert not module.plan.decisions


def _two(model, y):
    z = model.part(y)
    return y + 2 * z


@pytest.mark.parametrize("function", [F.relu, F.relu6, F.leaky_relu, F.elu, F.hardswish, F.silu])
def test_inplace_argument_of_functions(function):
    def forward(m, x):
        y = x + 0.25
        function(y, inplace=True)
        return y

    model = Lambda(forward)
    same(canonical(model, X2)(X2), model(X2))


def by_statement(x):
    y = x * 1.0
    y.relu_()
    return y


def by_augmented_add(x):
    y = x * 1.0
    z = y
    y += 1
    return z * y


def by_keyword(m, x):
    y = x * 1.0
    z = m.relu(input=y)
    return y + z


def of_a_view(x):
    y = x * 1.0
    y[:, :2].relu_()
    return y


def base_after_view(x):
    y = x * 1.0
    z = y.view(-1)
    y.relu_()
    return z


def half_of_a_chunk(x):
    y = x * 1.0
    a, b = y.chunk(2, 1)
    a.relu_()
    return torch.cat([a, b], 1) + y


def setitem(x):
    y = x * 1.0
    y[:, 0] = 3.0
    return y


def setitem_then_view(x):
    y = x * 1.0
    z = y.flatten(1)
    y[:, 0] = 3.0
    return z + 1, y


def unknown_method(x):
    y = x * 1.0
    y.abs_()
    y.masked_fill_(y < 0.5, 2.0)
    return y


def unknown_function(x):
    y = x * 1.0
    F.selu_(y)
    return y


def through_dropout(x):
    y = x * 1.0
    z = F.dropout(y, training=False)
    z.relu_()
    return y + z


def read_before_and_after(x):
    y = x * 1.0
    a = y + 1
    y.mul_(2)
    b = y + 1
    y.sub_(0.5)
    return a, b, y


def shape_arithmetic(x):
    n = x.shape[2]
    m = n
    m += 1
    k = n * m
    k //= m
    return x.reshape(x.size(0), -1, n, k)


@pytest.mark.parametrize(
    "forward",
    [by_statement, by_augmented_add, of_a_view, base_after_view, half_of_a_chunk, setitem, setitem_then_view,
     unknown_method, unknown_function, through_dropout, read_before_and_after, shape_arithmetic],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_updates_in_place_keep_their_meaning(forward):
    model = Lambda(lambda m, x: forward(x))
    x = X2.clone()
    module = canonical(model, x)
    same(module(x), model(x))
    same(x, X2)


def test_inplace_module_called_by_keyword():
    model = Lambda(by_keyword, relu=nn.ReLU(inplace=True))
    same(canonical(model, X2)(X2), model(X2))


def test_a_residual_block_in_place_is_plain_arithmetic():
    def forward(m, x):
        y = m.relu(m.a(x))
        z = m.b(y)
        z += y
        return m.relu(z)

    model = Lambda(forward, a=conv(4, 4), b=conv(4, 4), relu=nn.ReLU(inplace=True))
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert op_names(module) == ["conv2d", "relu", "conv2d", "add", "relu"] and not module.plan.decisions


def test_inplace_of_a_live_view_is_refused_with_its_reason():
    module = canonical(Lambda(lambda m, x: of_a_view(x)), X2)
    assert reason(module, "relu_") is INPLACE and reason(module, "getitem") is INPLACE


@pytest.mark.parametrize("inplace", [False, True])
def test_unknown_inplace_module_with_a_later_reader(inplace):
    model = Lambda(lambda m, x: _two(m, x * 1.0), part=nn.SELU(inplace=inplace))
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert reason(module, "part") is UNKNOWN_OP


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_modes(mode, dims, stride):
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    x = (X1, X2, X3)[dims - 1]
    model = Lambda(lambda m, v: m.c(v), c=cls(4, 6, 3, padding=1, padding_mode=mode, stride=stride))
    module = canonical(model, x)
    same(module(x), model(x))
    assert op_names(module) == ([f"conv{dims}d"] if mode == "zeros" else ["pad", f"conv{dims}d"])


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1), (3, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_by_name(padding, kernel, dilation, mode):
    part = nn.Conv2d(4, 5, kernel, padding=padding, dilation=dilation, padding_mode=mode)
    model = Lambda(lambda m, v: m.c(v), c=part)
    module = canonical(model, X2)
    same(module(X2), model(X2))
    node = next(n for n in module.graph.nodes if n.name == "c")
    assert not isinstance(OPS.op_of(node).get(node, "padding"), str)


def test_functional_conv_with_padding_same():
    model = Lambda(lambda m, v: F.conv2d(v, m.w, padding="same"), w=nn.Parameter(torch.randn(4, 4, 2, 3)))
    same(canonical(model, X2)(X2), model(X2))


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class PlainConv(nn.Conv2d):
    """A subclass without a forward of its own."""


class LibraryReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


LibraryReLU.__module__ = "torch.nn.modules.activation"  # as a leaf of torch.fx


@pytest.mark.parametrize("cls", [OwnConv, PlainConv])
def test_subclasses_of_users_are_traced_into(cls):
    model = Lambda(lambda m, v: m.c(v), c=cls(4, 4, 3))
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert op_names(module) == ["conv2d", "mul"][: 1 + (cls is OwnConv)]
    assert [n.target for n in module.graph.nodes if n.op == "get_attr"] == ["c.weight", "c.bias"]


def test_a_leaf_with_its_own_forward_is_not_its_base_class():
    model = Lambda(lambda m, v: m.act(v), act=LibraryReLU())
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert reason(module, "act") is OWN_FORWARD


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_leaf_with_hooks_is_not_its_class(hook):
    part = nn.ReLU()
    getattr(part, hook)((lambda m, i, o: o + 1) if hook == "register_forward_hook" else (lambda m, i: (i[0] - 1,)))
    model = Lambda(lambda m, v: m.act(v), act=part)
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert module.plan.decisions["act"].status is Status.FLOAT


@pytest.mark.parametrize(
    "reparametrize",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
     lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "spectral_norm", "old-weight_norm", "old-spectral_norm", "prune"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:DeprecationWarning")
def test_computed_weights_become_constants(reparametrize):
    part = reparametrize(nn.Conv2d(4, 5, 3))
    model = Lambda(lambda m, v: m.c(v), c=part)
    model(X2)
    with torch.no_grad():  # as load_state_dict does: the computed weight is out of date until the next forward
        for parameter in part.parameters():
            parameter.mul_(1.5)
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert op_names(module) == ["conv2d"]
    assert module.plan.origin("c").kind == "torch.nn.modules.conv.Conv2d"


def test_weights_keep_their_paths():
    model = Lambda(lambda m, v: m.block(v), block=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    module = canonical(model, X2)
    keys = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert module.state_dict().keys() == keys.keys()
    assert torch.equal(get_attribute(module, "block.0.weight"), keys["block.0.weight"])


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: torch.add(x, x, alpha=2), lambda m, x: torch.mean(x, 1, dtype=torch.float64),
     lambda m, x: F.softmax(x, -1, dtype=torch.float64), lambda m, x: torch.div(x, 2.0, rounding_mode="floor"),
     lambda m, x: F.dropout2d(x, 0.0, True), lambda m, x: torch.mean(input=x, dim=1, dtype=torch.float64)],
    ids=["alpha", "mean-dtype", "softmax-dtype", "rounding", "active-dropout2d", "mean-keywords"],
)  # fmt: skip
def test_arguments_outside_the_canonical_op_are_left_alone(forward):
    model = Lambda(forward)
    module = canonical(model, X2)
    same(module(X2), model(X2))
    (decision,) = module.plan.decisions.values()
    assert decision.reason is UNKNOWN_OP and "arguments" in decision.detail
    assert not any(OPS.op_of(node) for node in module.graph.nodes)


def test_return_indices_is_left_alone():
    model = Lambda(lambda m, x: m.p(x), p=nn.MaxPool2d(2, return_indices=True))
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert reason(module, "p") is UNKNOWN_OP


def test_alpha_dropout_is_inactive_by_default():
    model = Lambda(lambda m, x: F.alpha_dropout(x))
    same(canonical(model, X2)(X2), X2)


def test_untraceable_and_unknown_modules_keep_their_reason():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    module = canonical(Lambda(lambda m, x: m.s(m.o(x)), o=Odd(), s=nn.SELU()), X2)
    assert reason(module, "o") is UNTRACEABLE and __file__ in module.plan.decisions["o"].detail
    assert reason(module, "s") is UNKNOWN_OP


def test_shared_module_keeps_one_weight():
    model = Lambda(lambda m, x: m.c(m.c(x)), c=nn.Conv2d(4, 4, 1))
    module = canonical(model, X2)
    same(module(X2), model(X2))
    assert list(module.state_dict()) == ["c.weight", "c.bias"]


def test_origins_name_the_modules_around():
    model = Lambda(lambda m, x: m.block(x), block=nn.Sequential(OwnConv(4, 4, 1)))
    plan = canonical(model, X2).plan
    assert plan.origin("mul").module_path == "block.0"
    assert plan.origin("mul").around[0].endswith("OwnConv")
    assert plan.origin("mul").around[1] == "torch.nn.modules.container.Sequential"


def test_twice_is_once():
    selu = nn.SELU(inplace=True)
    model = Two(lambda m, x, y: F.relu(m.c(x), inplace=True) + m.d(y).view(-1)[0], c=conv(4, 4), d=selu)
    module = canonical(model, X2, X2)
    text = graph_text(module)
    assert run(Canonicalize(OPS), module) == 0
    assert graph_text(module) == text


def add_one_to(x):
    x.add_(1.0)


torch.fx.wrap("add_one_to")


def test_a_wrapped_function_called_as_a_statement_keeps_its_effect():
    """torch.fx alone would drop it as dead code: nothing reads its result."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            add_one_to(y)
            return y.transpose(1, 2) * 2

    model, x = Model().eval(), torch.randn(1, 3, 8, 8)
    prepared = fxq.prepare(model, x)
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
        assert torch.allclose(fxq.convert(prepared)(x), model(x), atol=0.1)


def test_numbers_of_numpy_become_python_s() -> None:
    """pytorchvideo computes strides with numpy."""
    strided = nn.Conv2d(3, 4, 3, stride=(np.int64(2), np.int64(1)))
    model = nn.Sequential(strided, nn.Hardtanh(np.float64(-1.0), 2.0)).eval()
    qmodel = fxq.quantize(model, [torch.randn(2, 3, 8, 8)])
    prepared = fxq.prepare(model, torch.randn(2, 3, 8, 8))
    arguments = tree_leaves([(node.args, node.kwargs) for node in prepared.graph.nodes])
    assert not any(isinstance(value, np.generic) for value in arguments)
    assert qmodel(torch.randn(1, 3, 8, 8)).shape == (1, 4, 3, 6)
