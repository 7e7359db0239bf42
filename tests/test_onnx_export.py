"""ONNX files, judged by onnx's checker, onnxruntime and OpenVINO."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, conv, quiet, randomize
from torch import nn

import fxq
from fxq.errors import FxqError, InputError, MissingDependencyError, StageError
from fxq.onnx_rows import ROWS
from fxq.ops import VOCABULARY
from fxq.qdq import is_quantize
from fxq.torchvision_ops import import_torchvision

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def reference_of(net: nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
    prepared = fxq.prepare(net, inputs, **options)
    prepared(*inputs)
    return quiet(fxq.convert_to_reference, prepared)


def session_of(path: Path, optimized: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(path: Path, *inputs: torch.Tensor, optimized: bool = True) -> list[torch.Tensor]:
    session = session_of(path, optimized)
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in flat(item)]


def largest_scale(reference: Any) -> float:
    """The coarsest step of an activation: one rounding more or less is at most that."""
    return max([node.args[1] for node in reference.graph.nodes if is_quantize(node)], default=1e-5)


def op_types(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def a(function: Any) -> Any:
    return lambda m, x: function(m.a(x))


def tokens(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.a(x).flatten(2).transpose(1, 2)


def attend(m: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    return m.mha(tokens(m, x), tokens(m, x), tokens(m, x), **options)


def sequence_first(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    t = tokens(m, x).transpose(0, 1)
    return m.mha_l(t, t, t, need_weights=False)[0]


MASK = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))

# op: functions of a model with a conv `a` from 3 to 4 channels and other parts
CASES: dict[str, list[Any]] = {
    "conv1d": [lambda m, x: m.c1(x.flatten(2)), lambda m, x: m.c1(m.a(x).flatten(2)[:, :3])],
    "conv2d": [
        lambda m, x: m.a(x), lambda m, x: torch.relu(m.g(m.a(x))),
        lambda m, x: F.conv2d(m.a(x), m.g.weight, None, 1, "same", (2, 1), 2),
        lambda m, x: F.conv2d(m.a(x), m.g.weight, m.g.bias, (2, 1), "valid", 1, 2),
    ],
    "conv3d": [lambda m, x: m.c3(x.unsqueeze(2))],
    "conv_transpose1d": [lambda m, x: m.t1(x.flatten(2))],
    "conv_transpose2d": [lambda m, x: m.t2(m.a(x)), lambda m, x: m.t2n(m.a(x))],
    "conv_transpose3d": [lambda m, x: m.t3(x.unsqueeze(2))],
    "linear": [lambda m, x: m.fc(m.a(x)), lambda m, x: m.fc(m.a(x).mean((2, 3)) @ m.w48),
               lambda m, x: F.linear(m.a(x), m.fc.weight), lambda m, x: F.linear(m.a(x)[:, 0, 0], m.fc.weight)],
    "matmul": [lambda m, x: torch.matmul(m.a(x), m.a(x).transpose(-1, -2)), lambda m, x: m.a(x) @ m.w88],
    "batch_norm": [lambda m, x: m.bn(x), lambda m, x: m.a(torch.relu(m.bn(x))), lambda m, x: m.plain_bn(m.a(x))],
    # the norm runs in float: a step of what it reads, divided by its deviation, must not count more than a step
    "layer_norm": [lambda m, x: m.ln(4 * m.a(x)), a(lambda y: F.layer_norm(y, (8, 8)))],
    "group_norm": [lambda m, x: m.gn(m.a(x)), a(lambda y: F.group_norm(y, 2))],
    "instance_norm": [lambda m, x: m.inorm(m.a(x)), a(lambda y: F.instance_norm(y))],
    "relu": [a(torch.relu), lambda m, x: torch.relu(x) + 1],
    "clamp": [a(lambda y: y.clamp(-0.3, 0.4)), a(lambda y: y.clamp(max=0.2)), a(F.relu6),
              lambda m, x: torch.cat([m.a(x).clamp(min=-0.1), m.b(m.a(x))], 1)],
    "leaky_relu": [a(lambda y: F.leaky_relu(y, 0.2))],
    "elu": [a(F.elu)],
    "prelu": [lambda m, x: m.prelu(m.a(x)), lambda m, x: m.prelu4(m.a(x))],
    "sigmoid": [a(torch.sigmoid)],
    "hardsigmoid": [a(F.hardsigmoid)],
    "tanh": [a(torch.tanh)],
    "hardswish": [a(F.hardswish), lambda m, x: m.b(F.hardswish(m.a(x)))],
    "silu": [a(F.silu), lambda m, x: m.b(F.silu(m.a(x)))],
    "mish": [a(F.mish)],
    "gelu": [a(F.gelu), a(lambda y: F.gelu(y, approximate="tanh"))],
    "softmax": [a(lambda y: torch.softmax(y, 1)), a(lambda y: y.softmax(-1))],
    "add": [lambda m, x: m.a(x) + m.b(m.a(x)), a(lambda y: y + 0.5), a(lambda y: 2 + y), lambda m, x: m.a(x) + m.row],
    "sub": [lambda m, x: m.a(x) - m.b(m.a(x)), a(lambda y: 1 - y)],
    "mul": [lambda m, x: m.a(x) * m.b(m.a(x)), a(lambda y: y * -0.5), a(lambda y: y * y.mean((2, 3), keepdim=True))],
    "div": [a(lambda y: y / 3), lambda m, x: m.a(x) / (2.5 + torch.sigmoid(m.a(x)))],
    "cat": [lambda m, x: torch.cat([m.a(x), x, m.b(m.a(x))], 1)],
    "max_pool1d": [a(lambda y: F.max_pool1d(y.flatten(2), 3, 2, 1))],
    "max_pool2d": [a(lambda y: F.max_pool2d(y, 3, 2, 1)), a(lambda y: F.max_pool2d(y, 3, 2, ceil_mode=True)),
                   a(lambda y: F.max_pool2d(y, (3, 2), dilation=2)),
                   a(lambda y: F.max_pool2d(y, 3, 3, 1, ceil_mode=True))],
    "max_pool3d": [a(lambda y: F.max_pool3d(y.unsqueeze(2), (1, 2, 2)))],
    "avg_pool1d": [a(lambda y: F.avg_pool1d(y.flatten(2), 3, 2, 1))],
    "avg_pool2d": [a(lambda y: F.avg_pool2d(y, 3, 2, 1)), a(lambda y: F.avg_pool2d(y, 3, 2, ceil_mode=True)),
                   a(lambda y: F.avg_pool2d(y, 3, 2, 1, True, False))],
    "avg_pool3d": [a(lambda y: F.avg_pool3d(y.unsqueeze(2), (1, 2, 2)))],
    "adaptive_avg_pool1d": [a(lambda y: F.adaptive_avg_pool1d(y.flatten(2), 5))],
    "adaptive_avg_pool2d": [a(lambda y: F.adaptive_avg_pool2d(y, 1)), a(lambda y: F.adaptive_avg_pool2d(y, (2, 4))),
                            a(lambda y: F.adaptive_avg_pool2d(y, (3, 5))), a(lambda y: F.adaptive_avg_pool2d(y, 11))],
    "adaptive_avg_pool3d": [a(lambda y: F.adaptive_avg_pool3d(y.unsqueeze(2), (1, 2, 4)))],
    "mean": [a(lambda y: y.mean((2, 3))), a(lambda y: y.mean(1, keepdim=True))],
    "interpolate": [
        a(lambda y: F.interpolate(y, scale_factor=2)), a(lambda y: F.interpolate(y, size=(5, 11))),
        a(lambda y: F.interpolate(y, size=(13, 6), mode="bilinear", align_corners=False)),
        a(lambda y: F.interpolate(y, size=(13, 6), mode="bilinear", align_corners=True)),
        a(lambda y: F.interpolate(y, scale_factor=1.7, mode="bilinear")),
        a(lambda y: F.interpolate(y, scale_factor=2, mode="bicubic")),
        a(lambda y: F.interpolate(y, size=(13, 6), mode="nearest-exact")),
        a(lambda y: F.interpolate(y, size=(3, 4), mode="area")),
    ],
    "pad": [a(lambda y: F.pad(y, (1, 2, 0, 3))), a(lambda y: F.pad(y, (1, 0), value=0.5)),
            a(lambda y: F.pad(y, (1, 2, 3, 0), "reflect")), a(lambda y: F.pad(y, (1, 2, 3, 0), "replicate"))],
    "pixel_shuffle": [a(lambda y: F.pixel_shuffle(y, 2))],
    "flatten": [a(lambda y: y.flatten(1)), a(lambda y: y.flatten(0, 1))],
    "reshape": [a(lambda y: y.reshape(y.shape[0], -1)), a(lambda y: y.view(-1, 2, 2, 64)), a(lambda y: y.view(-1))],
    "permute": [a(lambda y: y.permute(0, 2, 3, 1)), a(lambda y: torch.permute(y, (0, -1, 1, 2)))],
    "transpose": [a(lambda y: y.transpose(1, -1))],
    "squeeze": [a(lambda y: y[:, :1].squeeze(1)), a(lambda y: y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1))],
    "unsqueeze": [a(lambda y: y.unsqueeze(1)), a(lambda y: y.unsqueeze(-1))],
    "chunk": [a(lambda y: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1)), a(lambda y: y.chunk(1, 1)[0])],
    "split": [a(lambda y: y.split([1, 3], 1)[1]), a(lambda y: torch.split(y, 3, 1)[0])],
    "getitem": [a(lambda y: y[:, 1:3, ::2]), a(lambda y: y[..., -1]), a(lambda y: y[:, None, 0, 2:-1, -2]),
                a(lambda y: y[:, :, -3:])],
    "contiguous": [a(lambda y: y.transpose(1, 2).contiguous())],
    "dropout": [a(lambda y: F.dropout(y, training=False))],
    "expand": [lambda m, x: torch.cat([m.row.expand(x.shape[0], -1, -1, -1), m.a(x)], 1)],
    "attention": [lambda m, x: attend(m, x, need_weights=False)[0], lambda m, x: attend(m, x)[0],
                  lambda m, x: attend(m, x, average_attn_weights=False)[1], sequence_first,
                  lambda m, x: attend(m, x, attn_mask=m.mask)[0]],
    "scaled_dot_product": [
        a(lambda y: F.scaled_dot_product_attention(y, y, y)),
        a(lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True)),
        a(lambda y: F.scaled_dot_product_attention(y.flatten(2), y.flatten(2), y.flatten(2), scale=0.2)),
    ],
    "outputs": [lambda m, x: {"out": m.a(x), "aux": (m.b(m.a(x)), [torch.relu(x)])}],
}  # fmt: skip


def parts() -> dict[str, Any]:
    torch.manual_seed(3)
    plain_bn = nn.BatchNorm2d(4, affine=False)
    return {
        "a": conv(), "b": conv(4, 4), "g": conv(4, 4, groups=2), "c1": nn.Conv1d(3, 4, 3, 2), "c3": nn.Conv3d(3, 4, 1),
        "t1": nn.ConvTranspose1d(3, 4, 3, 2), "t2": nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2),
        "t2n": nn.ConvTranspose2d(4, 6, 2, bias=False), "t3": nn.ConvTranspose3d(3, 4, (1, 2, 2)),
        "fc": nn.Linear(8, 5), "bn": nn.BatchNorm2d(3), "plain_bn": plain_bn, "ln": nn.LayerNorm(8),
        "gn": nn.GroupNorm(2, 4), "inorm": nn.InstanceNorm2d(4, affine=True), "prelu": nn.PReLU(),
        "prelu4": nn.PReLU(4), "mha": nn.MultiheadAttention(4, 2, batch_first=True),
        "mha_l": nn.MultiheadAttention(4, 2), "w88": torch.randn(8, 8), "w48": torch.randn(4, 8),
        "row": nn.Parameter(torch.randn(1, 4, 8, 8)), "mask": MASK,
    }  # fmt: skip


def net(forward: Any) -> nn.Module:
    return randomize(Lambda(forward, **parts()))


@pytest.mark.parametrize("qconfig", ["per_channel", "per_tensor"])
@pytest.mark.parametrize(("op", "number"), [(op, i) for op, cases in CASES.items() for i in range(len(cases))])
def test_every_op(op: str, number: int, qconfig: str, tmp_path: Path) -> None:
    """Another batch than the example's, against the reference graph, as the runtime fuses it and as it is written."""
    path = tmp_path / "net.onnx"
    reference = reference_of(net(CASES[op][number]), X, qconfig=qconfig)
    fxq.to_onnx(reference, path)
    onnx.checker.check_model(str(path), full_check=True)
    with torch.no_grad():
        expected = flat(reference(MORE))
    step = largest_scale(reference) + 1e-5
    for optimized in (False, True):
        found = answers(path, MORE, optimized=optimized)
        assert len(found) == len(expected)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=2.01 * step)
            assert (actual - wanted).abs().gt(1.01 * step).float().mean() < 0.005
            assert (actual - wanted).abs().gt(0.25 * step).float().mean() < 0.05


def test_every_op_of_the_vocabulary_has_a_row() -> None:
    assert set(ROWS) == set(VOCABULARY)
    assert {op.name for op in VOCABULARY} <= set(CASES)


def small(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.fc(torch.relu(m.b(m.a(x)) + m.a(x)).mean((2, 3)) @ m.w48)


def test_int8_weights_int32_biases_and_names(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    fxq.to_onnx(reference_of(net(small), X), path)
    model = onnx.load(str(path))
    stored = {i.name: i.data_type for i in model.graph.initializer}
    assert stored["a.weight"] == stored["fc.weight"] == onnx.TensorProto.INT8
    assert stored["a.bias_int32"] == stored["fc.bias_int32"] == onnx.TensorProto.INT32
    assert "a.bias" not in stored and not [name for name in stored if name.startswith("mha")]
    scales = next(i for i in model.graph.initializer if i.name == "a.weight_scale")
    assert list(scales.dims) == [4]
    assert model.graph.input[0].name == "x" and model.graph.output[0].name == "output"
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == ["batch", 5]
    assert {node.name for node in model.graph.node} >= {"a", "b", "relu_q", "fc"}


def test_runtimes_fuse_it_into_int8_kernels(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    fxq.to_onnx(reference_of(net(small), X), tmp_path / "net.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options)
    kernels = op_types(tmp_path / "optimized.onnx")
    assert kernels["QLinearConv"] == 3 and kernels["QGemm"] == 1 and kernels["QLinearAdd"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Add"} & set(kernels)


def hidden(*shape: int) -> torch.Tensor:
    """A random boolean mask with a true and a false value in each row."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[..., 0], mask[..., 1] = False, True
    return mask


def mha(m: nn.Module, x: torch.Tensor, **masks: torch.Tensor) -> torch.Tensor:
    return m.mha(m.fc(x), m.fc(x), m.fc(x), **masks)[0]


def sdpa(m: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(m.fc(x), m.fc(x), m.fc(x), attn_mask=mask)


MASKED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "2d": (lambda m, x, mask: mha(m, x, attn_mask=mask), (6, 6)),
    "3d": (lambda m, x, mask: mha(m, x, attn_mask=mask), (6, 6, 6)),
    "padding": (lambda m, x, mask: mha(m, x, key_padding_mask=mask), (3, 6)),
    "both": (lambda m, x, mask: mha(m, x, attn_mask=mask[0, :, :6], key_padding_mask=mask[:, 0, :6]), (3, 6, 7)),
    "where to look": (sdpa, (3, 6, 6)),
}


class Masked(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.fc, self.mha = case, nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return MASKED[self.case][0](self, x, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("case", MASKED)
def test_masks_of_attention(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(3)
    x, mask = torch.randn(3, 6, 4), hidden(*MASKED[case][1])
    mask = mask if dtype == torch.bool else torch.randn(mask.shape)
    reference = reference_of(Masked(case).eval(), x, mask)
    fxq.to_onnx(reference, tmp_path / "net.onnx", dynamic_batch=MASKED[case][1][0] == len(x))
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    (found,) = answers(tmp_path / "net.onnx", x, mask)
    torch.testing.assert_close(found, reference(x, mask), rtol=0, atol=1.01 * largest_scale(reference))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("case", ["fused module", "where to look", "weights"])
def test_a_row_that_hides_everything(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """torch's fused attention gives nothing for it, and NaN if it is asked for the weights."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.mha = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if case == "where to look":
                return sdpa(self, x, mask)
            y = self.fc(x)
            return self.mha(y, y, y, attn_mask=mask, need_weights=case == "weights")[int(case == "weights")]

    torch.manual_seed(3)
    x, mask = torch.randn(3, 6, 4), hidden(6, 6)
    mask[2] = case != "where to look"
    if dtype == torch.float32:
        hides = mask == (case != "where to look")
        mask = torch.zeros(6, 6).masked_fill(hides, -math.inf)
    model = Hidden().eval()
    expected = model(x, mask).detach()  # with gradients: without, the module may take a fast path that gives NaN
    reference = reference_of(model, x, mask)
    fxq.to_onnx(reference, tmp_path / "net.onnx", dynamic_batch=False)
    (found,) = answers(tmp_path / "net.onnx", x, mask)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any() == (case == "weights")
    bound = 1.01 * largest_scale(reference)
    torch.testing.assert_close(found, reference(x, mask), rtol=0, atol=bound, equal_nan=True)


class Recurrent(nn.Module):
    """A recurrent layer between two linears, that starts from states it is given, or from zeros."""

    def __init__(self, cls: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.fc, self.rnn = nn.Linear(5, 6), cls(6, 4, **options)
        self.out = nn.Linear(8 if self.rnn.bidirectional else 4, 3)

    def forward(self, x: torch.Tensor, h: torch.Tensor | None = None, c: torch.Tensor | None = None) -> Any:
        start = h if c is None else (h, c)
        y, last = self.rnn(self.fc(x), start)
        return self.out(y), y, last


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "batch first": {"batch_first": True}, "both ways": {"bidirectional": True},
    "layers": {"num_layers": 2, "bidirectional": True, "batch_first": True}, "no bias": {"bias": False},
}  # fmt: skip


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent_layers(cls: type[nn.RNNBase], options: str, given: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Recurrent(cls, **OPTIONS[options]).eval()
    x, depth = torch.randn(3, 7, 5), model.rnn.num_layers * (2 if model.rnn.bidirectional else 1)
    batch = 3 if model.rnn.batch_first else 7
    states = [torch.randn(depth, batch, 4) for _ in range(2 if cls is nn.LSTM else 1)] if given else []
    reference = reference_of(model, x, *states)
    fxq.to_onnx(reference, tmp_path / "net.onnx", dynamic_batch=not given)
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    out, *floats = answers(tmp_path / "net.onnx", x, *states)
    expected, *rest = flat(reference(x, *states))
    torch.testing.assert_close(out, expected, rtol=0, atol=1.01 * largest_scale(reference))
    torch.testing.assert_close(floats, rest, rtol=1e-5, atol=1e-5)
    if not given:
        longer = torch.cat([x, x]) if model.rnn.batch_first else torch.cat([x, x], 0)
        assert answers(tmp_path / "net.onnx", longer)[0].shape == reference(longer)[0].shape


def test_states_of_one_lstm_start_another(tmp_path: Path) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        _, state = m.one(m.fc(x))
        return m.other(m.fc(x), state)[0]

    torch.manual_seed(3)
    layers = {name: nn.LSTM(4, 4, batch_first=True) for name in ("one", "other")}
    reference = reference_of(Lambda(forward, fc=nn.Linear(4, 4), **layers).eval(), x := torch.randn(3, 5, 4))
    fxq.to_onnx(reference, tmp_path / "net.onnx")
    torch.testing.assert_close(answers(tmp_path / "net.onnx", x)[0], reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("listed", [False, True])
def test_einsum(listed: bool, tmp_path: Path) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.fc(x)
        return torch.einsum("b i d, b j d -> b i j", [y, y]) if listed else torch.einsum("bid,bjd->bij", y, y)

    reference = reference_of(Lambda(forward, fc=nn.Linear(4, 4)).eval(), x := torch.randn(3, 5, 4))
    fxq.to_onnx(reference, tmp_path / "net.onnx")
    torch.testing.assert_close(answers(tmp_path / "net.onnx", x)[0], reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("version", "sizes"), [(1, (18, 26)), (2, (16, 24))])
def test_shifted_windows(version: int, sizes: tuple[int, int], tmp_path: Path) -> None:
    """Windows that are filled up with odd numbers of patches to merge, and windows that fit."""
    models = import_torchvision().models
    blocks = models.swin_transformer
    v2 = {"block": blocks.SwinTransformerBlockV2, "downsample_layer": blocks.PatchMergingV2} if version == 2 else {}
    torch.manual_seed(3)
    model = models.SwinTransformer([2, 2], 8, [2, 1], [2, 2], [4, 4], num_classes=5, **v2).eval()
    generator = torch.Generator().manual_seed(4)
    x, more = (torch.randn(n, 3, *sizes, generator=generator) for n in (2, 3))
    reference = reference_of(model, x)
    fxq.to_onnx(reference, tmp_path / "net.onnx")
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    with torch.no_grad():
        expected = reference(more)
    for optimized in (False, True):
        (found,) = answers(tmp_path / "net.onnx", more, optimized=optimized)
        # roundings add up over three blocks; a wrong window is as far as another image
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.std(0).mean()) / 4)


def test_output_names(tmp_path: Path) -> None:
    fxq.to_onnx(reference_of(net(CASES["outputs"][0]), X), tmp_path / "net.onnx")
    assert [o.name for o in session_of(tmp_path / "net.onnx").get_outputs()] == ["out", "aux_0", "aux_1_0"]
    fxq.to_onnx(reference_of(net(lambda m, x: (m.a(x), x)), X), tmp_path / "net.onnx")
    assert [o.name for o in session_of(tmp_path / "net.onnx").get_outputs()] == ["output_0", "output_1"]


def test_two_inputs_and_a_default(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, image: torch.Tensor, other: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
            return self.conv(image) + self.conv(other) * scale

    reference = reference_of(Scaled().eval(), X, X + 1)
    fxq.to_onnx(reference, tmp_path / "net.onnx")
    assert [entry.name for entry in session_of(tmp_path / "net.onnx").get_inputs()] == ["image", "other"]
    (found,) = answers(tmp_path / "net.onnx", MORE, MORE * 2)
    torch.testing.assert_close(found, reference(MORE, MORE * 2), rtol=0, atol=1.01 * largest_scale(reference))


def test_lowered_and_loaded_models_write_the_same(tmp_path: Path) -> None:
    reference = reference_of(net(small), X)
    fxq.save(reference, tmp_path / "net.fxq")
    models = [reference, quiet(fxq.lower, reference, "x86"), fxq.load(tmp_path / "net.fxq")]
    for number, model in enumerate(models):
        fxq.to_onnx(model, tmp_path / f"{number}.onnx")
    assert len({(tmp_path / f"{number}.onnx").read_bytes() for number in range(3)}) == 1


def test_clips_instead_of_qdq(tmp_path: Path) -> None:
    """A float graph: no rounding, the weights' real values, and each quantized activation within its range."""
    path = tmp_path / "net.onnx"
    source = net(small)
    reference = reference_of(source, X)
    fxq.to_onnx(reference, path, qdq=False)
    onnx.checker.check_model(str(path), full_check=True)
    kinds = op_types(path)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(kinds)
    quantizes = [node for node in reference.graph.nodes if is_quantize(node)]
    assert kinds["Clip"] == len(quantizes)
    (found,) = answers(path, X)
    with torch.no_grad():
        torch.testing.assert_close(found, source(X), rtol=0, atol=0.05)
    (far,) = answers(path, X * 1000)
    _, scale, zero_point, low, high, _ = quantizes[-1].args
    assert far.min() >= (low - zero_point) * scale - 1e-6 and far.max() <= (high - zero_point) * scale + 1e-6


def test_a_fixed_batch(tmp_path: Path) -> None:
    """A model that only runs with the example's batch is refused with the way out, which then works."""
    batch_is_two = net(lambda m, x: m.a(x).reshape(2, 256))
    reference = reference_of(batch_is_two, X)
    with pytest.raises(InputError, match=r"batches of 2 and 3.*dynamic_batch=False"):
        fxq.to_onnx(reference, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    fxq.to_onnx(reference, tmp_path / "net.onnx", dynamic_batch=False)
    assert session_of(tmp_path / "net.onnx").get_inputs()[0].shape == [2, 3, 8, 8]
    (found,) = answers(tmp_path / "net.onnx", X)
    torch.testing.assert_close(found, reference(X), rtol=0, atol=1.01 * largest_scale(reference))


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if float(x.sum()) != 0 else x


REFUSED: dict[str, tuple[Any, str]] = {
    "function": (lambda m, x: torch.cumsum(m.a(x), 1), r"node 'cumsum' \(cumsum\).*no row"),
    "method": (lambda m, x: m.a(x).sort(1), r"node 'sort' \(sort\).*no row"),
    "module": (lambda m, x: m.b(m.unknown(m.a(x))), r"node 'unknown' \(module 'unknown'\).*not one of the operations"),
    "lstm": (lambda m, x: m.lstm(m.a(x).flatten(2))[0], r"node 'lstm' \(module 'lstm'\).*proj_size"),
    "cell": (lambda m, x: m.cell(m.a(x)[:, 0, 0]), r"node 'cell' \(module 'cell'\).*fxq\.to_torchscript"),
    "unbatched": (lambda m, x: F.max_pool2d(m.a(x)[0], 2), r"node 'max_pool2d'.*no batch"),
    "batch taken apart": (lambda m, x: m.a(x).chunk(2, 0)[0], r"takes the batch apart|no multiple of the batch"),
    "divisor": (lambda m, x: F.avg_pool2d(m.a(x), 2, divisor_override=3), r"avg_pool2d.*divisor"),
    "circular": (lambda m, x: F.pad(m.a(x), (1, 1, 1, 1), "circular"), r"'pad'.*circular"),
    "tensor index": (lambda m, x: m.a(x)[:, torch.tensor([0, 2])], r"node 'getitem'.*indexed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, about its own kernel
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    forward, message = REFUSED[case]
    lstm, cell = nn.LSTM(64, 3, batch_first=True, proj_size=2), nn.GRUCell(8, 3)
    model = Lambda(forward, **parts(), unknown=Unknown(), lstm=lstm, cell=cell)
    with pytest.raises(FxqError, match=message):
        fxq.to_onnx(reference_of(model, X), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_models_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError):
        fxq.to_onnx(fxq.prepare(net(small), X), tmp_path / "net.onnx")
    with pytest.raises(FxqError, match=r"none/net\.onnx: cannot be written"):
        fxq.to_onnx(reference_of(net(small), X), tmp_path / "none" / "net.onnx")
    with pytest.raises(FxqError, match=r"could not be traced as a whole.*regions one by one"):
        fxq.to_onnx(reference_of(Branches().eval(), X), tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"fxq\[onnx\]"):
        fxq.to_onnx(reference_of(net(small), X), tmp_path / "net.onnx")


def test_openvino_reads_it(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    reference = reference_of(net(small), X)
    for qdq in (True, False):
        fxq.to_onnx(reference, tmp_path / "net.onnx", qdq=qdq)
        compiled = openvino.Core().compile_model(str(tmp_path / "net.onnx"), "CPU", {"INFERENCE_NUM_THREADS": 1})
        found = torch.from_numpy(compiled([MORE.numpy()])[0])
        torch.testing.assert_close(found, reference(MORE), rtol=0, atol=2.01 * largest_scale(reference))
