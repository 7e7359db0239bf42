"""Which uses of tensors have one scale and zero_point."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from models_for_tests import Lambda, before, conv, reason, run
from torch import nn

import fxq
from fxq.backends import get_backend
from fxq.config import QConfig, QConfigMapping
from fxq.numerics import sqnr
from fxq.passes.share_qparams import ShareQParams
from fxq.plan import MIXED_QPARAMS, Slot

X = torch.randn(2, 3, 8, 8)


def share(forward, backend="x86", qconfig=None, **parts):
    parts = parts or {"a": conv(), "b": conv(4, 4), "d": conv()}
    module, step = before(ShareQParams, Lambda(forward, **parts), X, backend=backend, qconfig=qconfig)
    run(step, module)
    groups, fixed = dict(module.plan.groups), dict(module.plan.fixed)
    run(step, module)
    assert (groups, fixed) == (module.plan.groups, module.plan.fixed)
    assert groups.keys() == module.plan.specs.keys()
    return module, groups


def test_selecting_ops_share_with_their_input():
    def forward(m, x):
        return m.b(F.max_pool2d(m.a(x), 2).flatten(2).transpose(1, 2).transpose(1, 2).reshape(2, 4, 4, 4))

    _, groups = share(forward)
    names = ("a", "max_pool2d", "flatten", "transpose", "transpose_1", "reshape")
    assert len({groups[Slot(name)] for name in names} | {groups[Slot("b", (0,))]}) == 1
    assert groups[Slot("b")] != groups[Slot("a")] != groups[Slot("a", (0,))]


def test_cat_unites_its_inputs():
    _, groups = share(lambda m, x: m.b(torch.cat([m.a(x), m.d(x)], 1)[:, :4]))
    assert groups[Slot("a")] == groups[Slot("d")] == groups[Slot("cat")] == groups[Slot("cat", (0, 1))]


def test_add_unites_nothing():
    _, groups = share(lambda m, x: m.b(m.a(x) + m.d(x)))
    assert len({groups[Slot("a")], groups[Slot("d")], groups[Slot("add")]}) == 3


def test_y_plus_y_reads_one_group():
    def forward(m, x):
        y = m.a(x)
        return m.b(y + y)

    _, groups = share(forward)
    assert groups[Slot("add", (0,))] == groups[Slot("add", (1,))] == groups[Slot("a")] != groups[Slot("add")]


def test_readers_of_a_float_tensor_share():
    _, groups = share(lambda m, x: m.b(m.a(x) + m.d(x)))
    assert groups[Slot("a", (0,))] == groups[Slot("d", (0,))]


def test_pieces_of_a_chunk_share():
    def forward(m, x):
        p, q = m.a(x).chunk(2, 1)
        return m.b(torch.cat([q, p], 1))

    _, groups = share(forward)
    assert groups[Slot("a")] == groups[Slot("getitem")] == groups[Slot("getitem_1")] == groups[Slot("cat")]


def test_a_shared_weight_has_one_group():
    _, groups = share(lambda m, x: m.b(m.b(m.a(x))))
    assert groups[Slot("b", (1,))] == groups[Slot("b_1", (1,))] != groups[Slot("a", (1,))]
    assert groups[Slot("b")] != groups[Slot("b_1")]


def test_other_bit_widths_are_kept_apart():
    table = get_backend("x86")
    narrow = QConfig(activation=table.activation.replace(quant_max=15), weight=table.weight)
    _, groups = share(lambda m, x: m.b(m.a(x)), qconfig=QConfigMapping().set_module_name("b", narrow))
    assert groups[Slot("a")] != groups[Slot("b", (0,))]


def test_kernels_that_dictate_fix_their_group():
    module, groups = share(lambda m, x: m.b(F.max_pool2d(torch.sigmoid(m.a(x)), 2)))
    assert module.plan.fixed == {groups[Slot("sigmoid")]: (1 / 256, 0)}
    assert groups[Slot("sigmoid")] == groups[Slot("max_pool2d")] == groups[Slot("b", (0,))]


def fixed_in_cat(m, x):
    y = m.a(x)
    return m.b(torch.cat([torch.sigmoid(y), y], 1)[:, :4])


def test_a_fixed_member_of_a_cat_is_requantized():
    module, groups = share(fixed_in_cat)
    assert groups[Slot("cat", (0, 0))] == groups[Slot("sigmoid")] != groups[Slot("cat")]
    assert groups[Slot("cat")] == groups[Slot("a")]
    assert len(module.plan.fixed) == 1


def test_what_a_layer_reads_too_keeps_a_scale_of_its_own():
    def forward(m, x):
        y = m.a(x)
        z = m.b(F.max_pool2d(y, 3, 1, 1))
        return m.d(torch.cat([y, z], 1))

    _, groups = share(forward, a=conv(), b=conv(4, 4), d=conv(8, 4))
    assert groups[Slot("a")] == groups[Slot("max_pool2d")] == groups[Slot("cat", (0, 0))] != groups[Slot("cat")]
    assert groups[Slot("b")] == groups[Slot("cat", (0, 1))] == groups[Slot("cat")] == groups[Slot("d", (0,))]


def test_what_comes_from_a_join_shares_with_the_next():
    """As in ShuffleNet: nothing to requantize."""

    def forward(m, x):
        left, right = torch.cat([m.a(x), m.e(x)], 1).chunk(2, 1)
        return m.d(torch.cat([left, m.b(right)], 1))

    _, groups = share(forward, a=conv(), e=conv(), b=conv(4, 4), d=conv(8, 4))
    assert groups[Slot("cat")] == groups[Slot("getitem_1")] == groups[Slot("cat_1")] == groups[Slot("b")]


def test_a_small_tensor_that_a_layer_reads_is_not_flattened_by_a_join():
    def forward(m, x):
        y = m.a(x)
        return torch.cat([m.d(m.b(y)), m.d(torch.cat([y, x * 100], 1)[:, :4])], 1)

    model = Lambda(forward, a=conv(), b=conv(4, 4), d=conv(4, 4))
    data = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    qmodel = fxq.quantize(model, data[:2], progress=False)
    expected, actual = model(data[2]).detach(), qmodel(data[2])
    assert sqnr(expected[:, :4], actual[:, :4]) > 30


def test_the_output_of_a_join_is_observed_where_not_all_of_its_inputs_share():
    def forward(m, x):
        left, right = m.a(x).chunk(2, 1)
        return torch.cat([left * 1.0, left, m.b(right) * 0.01], 1)

    model = Lambda(forward, a=conv(), b=conv(2, 2))
    data = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    qmodel = fxq.quantize(model, data[:2], progress=False)
    assert sqnr(model(data[2]).detach(), qmodel(data[2])) > 30


def test_cats_of_fixed_members_only():
    module, groups = share(lambda m, x: m.b(torch.cat([torch.sigmoid(m.a(x)), torch.tanh(m.d(x))], 1)[:, :4]))
    assert len({groups[Slot("sigmoid")], groups[Slot("tanh")], groups[Slot("cat")]}) == 3
    assert groups[Slot("cat")] not in module.plan.fixed


def test_a_kernel_that_cannot_requantize_stays_float():
    table = get_backend("x86")
    rows = tuple(dataclasses.replace(r, mixed_inputs=False) if r.name == "cat" else r for r in table.rows)
    module, groups = share(fixed_in_cat, backend=dataclasses.replace(table, rows=rows))
    assert reason(module, "cat") is MIXED_QPARAMS
    assert not any(slot.node == "cat" for slot in groups)
    without = dataclasses.replace(table, rows=rows)
    plain, _ = share(lambda m, x: m.b(torch.cat([m.a(x), m.d(x)], 1)[:, :4]), backend=without)
    assert reason(plain, "cat") is None


def test_readers_of_what_became_float_share_one_quantized_version():
    table = get_backend("x86")
    rows = tuple(dataclasses.replace(r, mixed_inputs=False) if r.name == "cat" else r for r in table.rows)

    def forward(m, x):
        y = m.a(x)
        z = torch.cat([torch.sigmoid(y), y], 1)
        return m.e(z) + m.f(z)

    parts = {"a": conv(), "e": conv(8, 4), "f": conv(8, 4)}
    _, groups = share(forward, backend=dataclasses.replace(table, rows=rows), **parts)
    assert groups[Slot("e", (0,))] == groups[Slot("f", (0,))]


def test_linear_reads_flattened():
    _, groups = share(lambda m, x: m.fc(torch.flatten(m.a(x), 1)), a=conv(), fc=nn.Linear(256, 2))
    assert groups[Slot("a")] == groups[Slot("fc", (0,))]
