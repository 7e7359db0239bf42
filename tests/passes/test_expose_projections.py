"""Attention modules and functions become linears around float attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, Two, before, graph_text, op_names, quiet, run, same
from torch import nn

import fxq
from fxq.attention import multihead_attention, window_attention
from fxq.numerics import sqnr
from fxq.passes.expose_projections import ExposeProjections
from fxq.plan import ATTENTION, EXCLUDED, WHOLE_ATTENTION
from fxq.torchvision_ops import import_torchvision

import_torchvision()
from torchvision.models import swin_transformer  # noqa: E402
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2  # noqa: E402
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d  # noqa: E402

X = torch.randn(2, 6, 8)


def attention(**options):
    leaf = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    for parameter in leaf.parameters():
        nn.init.normal_(parameter, std=0.5)
    return leaf


def exposed(model, *inputs, count=1, **options):
    """The module after the pass, which fires ``count`` times."""
    module, step = before(ExposeProjections, model, *inputs, **options)
    text = graph_text(module)
    assert run(step, module) == count
    assert (graph_text(module) == text) == (count == 0)
    text = graph_text(module)
    assert run(step, module) == 0 and graph_text(module) == text
    return module


def equal(module, model, *inputs):
    with torch.no_grad():
        same(module(*inputs), model(*inputs))


FORWARDS = {
    "first of two": (lambda m, x: m.a(x, x, x, need_weights=False)[0], False),
    "weights only": (lambda m, x: m.a(x, x, x)[1], True),
    "both": (lambda m, x: (lambda out: (out[0], out[1]))(m.a(x, x, x)), True),
    "by head": (lambda m, x: (lambda out: (out[0], out[1]))(m.a(x, x, x, average_attn_weights=False)), True),
    "keywords": (lambda m, x: m.a(query=x, key=x, value=x, need_weights=False)[0], False),
    "cross": (lambda m, x: m.a(x[:, :2] if m.a.batch_first else x[:1], x, x)[0], False),
}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no bias"])
def test_fires(forward, batch_first, options):
    function, has_weights = FORWARDS[forward]
    model = Lambda(function, a=attention(batch_first=batch_first, **options))
    module = exposed(model, X)
    names = op_names(module)
    assert names.count("linear") == 4 - (forward == "weights only")
    call = next(node for node in module.graph.nodes if node.target is multihead_attention)
    assert call.args[6] is has_weights
    assert module.plan.decisions[call.name].reason is ATTENTION
    assert all(module.plan.origin(n.name).module_path == "a" for n in module.graph.nodes if "linear" in str(n.target))
    for x in (X, torch.randn(5, 9, 8)):
        equal(module, model, x)


def test_other_sizes_of_key_and_value():
    model = Two(lambda m, x, y: m.a(x, y, torch.cat([y, y], 2))[0], a=attention(kdim=5, vdim=10))
    module = exposed(model, X, torch.randn(2, 4, 5))
    equal(module, model, torch.randn(3, 2, 8), torch.randn(3, 7, 5))


@pytest.mark.parametrize("kind", ["key_padding_mask", "attn_mask"])
def test_masks_are_inputs(kind):
    model = Two(lambda m, x, mask: m.a(x, x, x, **{kind: mask})[0], a=attention())
    shape = (2, 6) if kind == "key_padding_mask" else (6, 6)
    module = exposed(model, X, torch.zeros(shape, dtype=torch.bool))
    mask = torch.rand(shape) < 0.4
    mask[:, 0] = False
    equal(module, model, X, mask)
    assert not torch.equal(module(X, mask), module(X, torch.zeros_like(mask)))


def test_the_fold_table_says_so():
    prepared = fxq.prepare(Lambda(lambda m, x: m.a(x, x, x)[0], a=attention()), X)
    (line,) = [fusion for fusion in prepared.plan.fusions if fusion.action == "split"]
    assert (line.what, line.into) == ("MultiheadAttention a", "linears of a")
    assert "MultiheadAttention a" in fxq.fusion_table(prepared)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_are_refused(options):
    model = Lambda(lambda m, x: m.a(x, x, x)[0], a=attention(**options))
    equal(exposed(model, X, count=0), model, X)


def test_a_tuple_that_is_kept_whole_is_refused():
    model = Lambda(lambda m, x: m.a(x, x, x), a=attention())
    equal(exposed(model, X, count=0), model, X)
    model = Lambda(lambda m, x: (lambda out: (out[0], out))(m.a(x, x, x)), a=attention())
    equal(exposed(model, X, count=0), model, X)


@pytest.mark.parametrize(("index", "count"), [(-2, 1), (-1, 1), (slice(1), 0), (slice(None), 0)])
def test_a_part_by_another_index(index, count):
    model = Lambda(lambda m, x: m.a(x, x, x)[index], a=attention())
    equal(exposed(model, X, count=count), model, X)


def test_weights_read_though_not_needed():
    """They are None then."""
    model = Lambda(lambda m, x: (lambda out: (out[0], out[1]))(m.a(x, x, x, need_weights=False)), a=attention())
    module, step = before(ExposeProjections, model, X)
    run(step, module)
    assert module(X)[1] is None
    equal(module, model, X)


@pytest.mark.parametrize("what", ["a", "block.*", nn.MultiheadAttention])
def test_excluded(what):
    model = Lambda(
        lambda m, x: m.block[0](x, x, x)[0] if what == "block.*" else m.a(x, x, x)[0],
        a=attention(), block=nn.ModuleList([attention()]),
    )  # fmt: skip
    module = exposed(model, X, count=0, exclude=[what])
    equal(module, model, X)
    prepared = fxq.prepare(Lambda(lambda m, x: m.l(m.a(x, x, x)[0]), a=attention(), l=nn.Linear(8, 8)), X, exclude="a")
    assert [type(m) for m in prepared.modules() if isinstance(m, nn.MultiheadAttention)]
    assert EXCLUDED in {d.reason for d in prepared.plan.decisions.values()}


def test_a_subclass_stays_whole():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return super().forward(query * 2, key, value, need_weights=False)

    model = Lambda(lambda m, x: m.a(x, x, x)[0], a=Own(8, 2, batch_first=True))
    equal(exposed(model, X, count=0), model, X)


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 8, "bias": False}])
def test_one_module_called_twice(options):
    model = Lambda(lambda m, x: m.a(m.a(x, x, x)[0], x, x)[0] + x, a=attention(**options))
    module = exposed(model, X, count=2)
    equal(module, model, torch.randn(3, 4, 8))
    quantized = quiet(fxq.quantize, model, [X])
    with torch.no_grad():
        assert sqnr(model(X), quantized(X)) > 20
    records = [record for record in fxq.graph_records(quantized) if record["op"].startswith("linear")]
    assert len(records) == 8 and {record["type"] for record in records} == {"int8"}


def test_one_module_called_twice_once_as_a_whole():
    model = Lambda(lambda m, x: (m.a(x, x, x)[0], m.a(x, x, x)), a=attention())
    equal(exposed(model, X), model, X)


def test_two_names_of_one_module():
    leaf = attention()
    model = Lambda(lambda m, x: m.b(m.a(x, x, x)[0], x, x)[0], a=leaf, b=leaf)
    equal(exposed(model, X, count=2), model, X)


def test_weights_are_copies():
    model = Lambda(lambda m, x: m.a(x, x, x)[0], a=attention())
    module = exposed(model, X)
    with torch.no_grad():
        expected = module(X).clone()
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(module(X), expected)


WINDOWS = {
    "v1": (lambda: ShiftedWindowAttention(8, [3, 3], [1, 1], 2), (2, 7, 6, 8), (1, 5, 9, 8)),
    "v1 no shift": (lambda: ShiftedWindowAttention(8, [3, 3], [0, 0], 2), (2, 6, 6, 8), (1, 3, 7, 8)),
    "v1 no bias": (lambda: ShiftedWindowAttention(8, [3, 3], [1, 1], 2, qkv_bias=False), (2, 7, 6, 8), (1, 5, 9, 8)),
    "v2": (lambda: ShiftedWindowAttentionV2(8, [3, 3], [1, 1], 2), (2, 7, 6, 8), (1, 5, 9, 8)),
    "3d": (lambda: ShiftedWindowAttention3d(8, [2, 3, 3], [1, 1, 1], 2), (1, 4, 7, 6, 8), (2, 4, 7, 6, 8)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    make, shape, other = WINDOWS[name]
    leaf = make()
    for parameter in leaf.parameters():
        nn.init.normal_(parameter, std=0.5)
    model = Lambda(lambda m, x: m.a(x), a=leaf)
    x = torch.randn(shape)
    module = exposed(model, x)
    for y in (x, torch.randn(other)):
        with torch.no_grad():
            same(module(y), model(y), 1e-4)
    call = next(node for node in module.graph.nodes if node.target is window_attention)
    assert module.plan.decisions[call.name].reason is ATTENTION
    quantized = quiet(fxq.quantize, model, [x])
    heavy = [record for record in fxq.graph_records(quantized) if record["macs"]]
    assert [r["type"] for r in heavy].count("int8") >= 2
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 15


def test_windows_excluded_or_in_training():
    leaf = ShiftedWindowAttention(8, [3, 3], [1, 1], 2).eval()
    model = Lambda(lambda m, x: m.a(x), a=leaf)
    equal(exposed(model, torch.randn(1, 6, 6, 8), count=0, exclude="a"), model, torch.randn(1, 6, 6, 8))

    def forward(m, x):
        return swin_transformer.shifted_window_attention(
            x, m.w, m.p, m.r, [3, 3], 2, shift_size=[0, 0], dropout=0.0, attention_dropout=0.0
        )

    model = Lambda(
        forward, w=nn.Parameter(torch.randn(24, 8)), p=nn.Parameter(torch.randn(8, 8)),
        r=nn.Parameter(torch.randn(1, 2, 9, 9)),
    )  # fmt: skip
    module, step = before(ExposeProjections, model, torch.randn(1, 6, 6, 8))
    assert run(step, module) == 0  # training is its default
    equal(module, model, torch.randn(1, 6, 6, 8))


class Functional(nn.Module):
    """``F.multi_head_attention_forward`` with the parameters of an ``nn.MultiheadAttention``."""

    def __init__(self, leaf, separate=False, computed=False, **options):
        super().__init__()
        self.iw, self.ib, self.ow = leaf.in_proj_weight, leaf.in_proj_bias, leaf.out_proj.weight
        self.ob = leaf.out_proj.bias
        self.q, self.k, self.v = (nn.Parameter(part.detach().clone()) for part in leaf.in_proj_weight.chunk(3))
        self.separate, self.computed, self.options = separate, computed, options
        self.eval()

    def forward(self, x, y):
        weights = {"use_separate_proj_weight": True, "q_proj_weight": self.q, "k_proj_weight": self.k,
                   "v_proj_weight": self.v} if self.separate else {}  # fmt: skip
        bias = self.ib * 1.0 if self.computed else self.ib
        size = x.shape[-1] if self.computed else 8
        options = {"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.1} | self.options
        return F.multi_head_attention_forward(
            x, y, y, size, 2, None if self.separate else self.iw, bias, options.pop("bias_k"), options.pop("bias_v"),
            options.pop("add_zero_attn"), options.pop("dropout_p"), self.ow, self.ob,
            **{"training": False, **weights, **options},
        )[0]  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"separate": True}, {"computed": True}, {"need_weights": False}, {"attn_mask": torch.randn(5, 6)},
    {"training": True, "dropout_p": 0.0}, {"separate": True, "computed": True},
], ids=lambda options: " ".join(options) or "packed")  # fmt: skip
def test_functional_attention(options):
    """Called by the user, with packed and with separate projections, also computed from others."""
    model = Functional(attention(batch_first=False), **options)
    x, y = torch.randn(5, 2, 8), torch.randn(6, 2, 8)
    module = exposed(model, x, y)
    assert op_names(module).count("linear") == 4
    others = (x, y) if "attn_mask" in options else (torch.randn(3, 4, 8), torch.randn(7, 4, 8))
    equal(module, model, *others)
    quantized = quiet(fxq.quantize, model, [(x, y), others])
    linears = [record for record in fxq.graph_records(quantized) if record["op"].startswith("linear")]
    assert [record["type"] for record in linears] == ["int8"] * 4
    assert sum(record["macs"] for record in linears) == 8 * 8 * 2 * (5 + 6 + 6 + 5)
    with torch.no_grad():
        assert sqnr(model(*others), quantized(*others)) > 20


REFUSED = {
    "bias_k and bias_v": {"bias_k": torch.randn(1, 1, 8), "bias_v": torch.randn(1, 1, 8)},
    "add_zero_attn": {"add_zero_attn": True},
    "projected keys": {"static_k": torch.randn(4, 6, 4)},
    "at random": {"training": True},
}


@pytest.mark.parametrize("why", REFUSED)
def test_functional_attention_refused(why):
    model = Functional(attention(batch_first=False), **REFUSED[why])
    x, y = torch.randn(5, 2, 8), torch.randn(6, 2, 8)
    module = exposed(model, x, y, count=0)
    (call,) = [node for node in module.graph.nodes if node.target is F.multi_head_attention_forward]
    decision = module.plan.decisions[call.name]
    assert decision.reason is WHOLE_ATTENTION and why in decision.detail
    if why != "at random":
        equal(module, model, x, y)
    prepared = fxq.prepare(model, (x, y))
    (record,) = [record for record in fxq.graph_records(prepared) if record["macs"]]
    assert why in record["reason"] and record["macs"] == 8 * 8 * 2 * (5 + 6 + 6 + 5)
    assert "attention that cannot be taken apart" in fxq.summary(prepared)


def test_refused_modules_say_why_and_count():
    model = Lambda(lambda m, x: m.a(x, x, x)[0], a=attention(add_zero_attn=True))
    (record,) = [record for record in fxq.graph_records(fxq.prepare(model, X)) if record["macs"]]
    assert "zeros" in record["reason"] and record["macs"] == 4 * 8 * 8 * 12
