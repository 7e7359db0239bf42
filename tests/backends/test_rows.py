"""Every row of every backend against the reference graph, on the integers the kernel is given.

A row without a case fails :func:`test_every_row_has_a_case`. Light ops stand between two convolutions, so that
they are neither dropped as islands nor left to float at the exit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import QConfig
from fxq.agreement import kernel_agreement
from fxq.backends import BACKENDS, get_backend
from fxq.graph_module import QuantModule
from fxq.plan import Status
from fxq.spec import QuantSpec

ACTIVATION = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, observer="minmax")
WEIGHT = QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True, ch_axis=0, observer="minmax")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Between(nn.Module):
    """conv -> op -> conv, 1x1 both."""

    def __init__(self, op: nn.Module, inputs: int = 8, outputs: int = 8, dims: int = 2) -> None:
        super().__init__()
        self.before, self.op, self.after = CONVS[dims](8, inputs, 1), op, CONVS[dims](outputs, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.op(self.before(x)))


class Branches(nn.Module):
    """Two convs whose results ``join`` makes one, then a conv."""

    def __init__(
        self, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], outputs: int = 8, other: int = 8
    ) -> None:
        super().__init__()
        self.left, self.right, self.after = nn.Conv2d(8, 8, 1), nn.Conv2d(8, other, 1), nn.Conv2d(outputs, 4, 1)
        self.join = join
        with torch.no_grad():
            self.right.weight.mul_(3)  # so that the two have different scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.join(self.left(x), self.right(x)))


class Residual(nn.Module):
    """``tail(x + body(x))`` with the operands in either order."""

    def __init__(self, body: nn.Module, tail: nn.Module | None = None, swap: bool = False) -> None:
        super().__init__()
        self.entry, self.body, self.tail, self.swap = nn.Conv2d(8, 8, 1), body, tail or nn.Identity(), swap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        return self.tail(x + self.body(x) if self.swap else self.body(x) + x)


class Shared(nn.Module):
    """``join(x, conv(x))`` for an ``x`` that a conv made, then a conv."""

    def __init__(self, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.entry, self.body, self.after = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        return self.after(self.join(x, self.body(x)))


class SqueezeExcite(nn.Module):
    """``x * sigmoid(conv(silu(conv(pool(x)))))`` after a conv with silu, then a conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.entry, self.after = nn.Sequential(nn.Conv2d(8, channels, 1), nn.SiLU()), nn.Conv2d(channels, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.after(torch.sigmoid(gate) * x)


class WithConstant(nn.Module):
    """A conv to which a buffer of the output's shape is added."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("constant", torch.randn(2, 8, 9, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.constant


@dataclass(frozen=True)
class Case:
    """A model that a row must run; ``other`` are further input shapes than the example's."""

    row: str
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 8, 9, 9)
    other: tuple[tuple[int, ...], ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.row}-{self.name}"


IMAGES = ((1, 8, 9, 9), (3, 8, 9, 9), (1, 8, 1, 1), (2, 8, 12, 7))
LARGE = ((1, 8, 9, 9), (3, 8, 14, 11))


def between(row: str, name: str, op: Callable[[], nn.Module], inputs: int = 8, outputs: int = 8,
            other: tuple[tuple[int, ...], ...] = LARGE) -> Case:  # fmt: skip
    return Case(row, name, lambda: Between(op(), inputs, outputs), other=other)


def conv2d(name: str, *args: Any, tail: nn.Module | None = None, shape: tuple[int, ...] = (2, 8, 9, 9),
           other: tuple[tuple[int, ...], ...] = (), **kwargs: Any) -> Case:  # fmt: skip
    return Case("conv2d", name, lambda: nn.Sequential(nn.Conv2d(*args, **kwargs), tail or nn.Identity()), shape, other)


def images(channels: int, size: int = 9) -> tuple[int, ...]:
    return 2, channels, size, size


CONV_CASES = (
    conv2d("1x1", 8, 16, 1, other=IMAGES),
    conv2d("3x3", 8, 16, 3, padding=1, other=IMAGES),
    conv2d("no bias", 8, 16, 3, bias=False, other=LARGE),
    conv2d("one channel", 1, 1, 3, padding=1, shape=images(1), other=((1, 1, 1, 1), (3, 1, 5, 5))),
    conv2d("odd channels", 5, 7, 3, stride=2, shape=images(5)),
    conv2d("strides", 8, 6, (3, 2), stride=(2, 1), padding=(1, 0), other=LARGE),
    conv2d("dilation", 8, 6, 3, dilation=2, padding=2, other=LARGE),
    conv2d("groups", 8, 12, 3, groups=4, padding=1, other=LARGE),
    conv2d("groups of 3", 9, 9, 3, groups=3, padding=1, shape=images(9)),
    conv2d("depthwise", 16, 16, 3, groups=16, padding=1, shape=images(16)),
    conv2d("depthwise 5", 5, 5, 3, groups=5, padding=1, shape=images(5)),
    conv2d("depthwise 5x5", 16, 16, 5, groups=16, padding=2, stride=2, shape=images(16)),
    conv2d("depthwise dilated", 8, 8, 3, groups=8, padding=2, dilation=2),
    conv2d("depthwise multiplier", 8, 16, 3, groups=8, padding=1),
    conv2d("depthwise 128", 128, 128, 3, groups=128, padding=1, shape=images(128, 5)),
    conv2d("depthwise 116", 116, 116, 3, groups=116, padding=1, shape=images(116, 5)),
    conv2d("depthwise 104 relu6", 104, 104, 3, groups=104, tail=nn.ReLU6(), shape=images(104, 5)),
    conv2d("relu", 8, 8, 3, tail=nn.ReLU(), other=LARGE),
    conv2d("relu6", 8, 8, 3, tail=nn.ReLU6()),
    conv2d("hardtanh", 8, 8, 3, tail=nn.Hardtanh(-0.3, 0.4)),
    conv2d("hardtanh above zero", 8, 8, 3, tail=nn.Hardtanh(0.1, 0.4)),
    conv2d("clamp", 8, 8, 3, tail=Fn(lambda x: x.clamp(max=0.2))),
    conv2d("padding same", 8, 8, 4, padding="same"),
    conv2d("padding reflect", 8, 8, 3, padding=1, padding_mode="reflect"),
    conv2d("padding replicate", 8, 8, 3, padding=1, padding_mode="replicate"),
    conv2d("padding circular", 8, 8, 3, padding=1, padding_mode="circular"),
    Case("conv1d", "plain", lambda: nn.Conv1d(8, 6, 3, padding=1, stride=2), (2, 8, 11), ((1, 8, 7), (3, 8, 1))),
    Case("conv1d", "groups relu", lambda: nn.Sequential(nn.Conv1d(8, 8, 3, groups=8), nn.ReLU()), (2, 8, 11)),
    Case("conv1d", "dilation", lambda: nn.Conv1d(8, 6, 3, dilation=3, padding=2, bias=False), (2, 8, 11)),
    Case("conv3d", "plain", lambda: nn.Conv3d(4, 6, 3, padding=1, stride=(1, 2, 1)), (2, 4, 5, 6, 7)),
    Case("conv3d", "groups relu", lambda: nn.Sequential(nn.Conv3d(4, 8, 2, groups=2), nn.ReLU()), (1, 4, 4, 4, 4)),
    Case("conv3d", "depthwise", lambda: nn.Conv3d(8, 8, 3, groups=8, padding=1), (1, 8, 4, 4, 4), ((3, 8, 3, 5, 4),)),
    Case("conv3d", "dilation", lambda: nn.Conv3d(4, 4, 2, dilation=2, bias=False), (1, 4, 4, 4, 4)),
)

TRANSPOSE_CASES = (
    Case("conv_transpose1d grouped", "stride", lambda: nn.ConvTranspose1d(8, 4, 3, stride=2, groups=2), (2, 8, 5)),
    Case("conv_transpose2d grouped", "padding", lambda: nn.ConvTranspose2d(8, 12, 3, padding=1, groups=4), other=LARGE),
    Case("conv_transpose2d grouped", "depthwise", lambda: nn.ConvTranspose2d(8, 8, 4, stride=2, groups=8, padding=1)),
    Case("conv_transpose1d", "stride", lambda: nn.ConvTranspose1d(8, 6, 3, stride=2, output_padding=1), (2, 8, 5)),
    Case("conv_transpose1d", "relu", lambda: nn.Sequential(nn.ConvTranspose1d(8, 6, 3, padding=1), nn.ReLU()),
         (2, 8, 5), ((1, 8, 1),)),
    Case("conv_transpose2d", "stride", lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), other=LARGE),
    Case("conv_transpose2d", "two rows padded", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, padding=1), other=LARGE),
    Case("conv_transpose2d of two rows", "stride 2", lambda: nn.ConvTranspose2d(8, 16, 2, stride=2), other=LARGE),
    Case("conv_transpose2d of two rows", "no bias relu6",
         lambda: nn.Sequential(nn.ConvTranspose2d(8, 24, (2, 6), bias=False), nn.ReLU6()), other=LARGE),
    Case("conv_transpose2d of two rows", "output padding",
         lambda: nn.ConvTranspose2d(8, 8, (2, 1), stride=(2, 1), output_padding=(1, 0))),
    Case("conv_transpose2d", "output padding",
         lambda: nn.ConvTranspose2d(8, 6, 3, stride=(2, 3), output_padding=(1, 2), bias=False)),
    Case("conv_transpose2d", "groups", lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), other=LARGE),
    Case("conv_transpose2d", "dilation", lambda: nn.ConvTranspose2d(8, 4, 3, dilation=2)),
    Case("conv_transpose2d", "depthwise", lambda: nn.ConvTranspose2d(8, 8, 4, stride=2, groups=8, padding=1)),
    Case("conv_transpose2d", "relu6", lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 3), nn.ReLU6())),
    Case("conv_transpose3d", "stride", lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, output_padding=1),
         (1, 4, 3, 3, 3)),
    Case("conv_transpose3d", "groups relu",
         lambda: nn.Sequential(nn.ConvTranspose3d(4, 8, 3, groups=2, padding=1), nn.ReLU()), (2, 4, 3, 4, 3)),
)  # fmt: skip

LINEAR_CASES = (
    Case("linear", "plain", lambda: nn.Linear(20, 7), (2, 20), ((1, 20), (3, 20))),
    Case("linear", "relu", lambda: nn.Sequential(nn.Linear(20, 7), nn.ReLU()), (2, 20)),
    Case("linear", "no bias relu6", lambda: nn.Sequential(nn.Linear(20, 7, bias=False), nn.ReLU6()), (2, 20)),
    Case("linear", "one feature", lambda: nn.Linear(1, 1), (3, 1), ((1, 1),)),
    Case("linear", "3 dimensions", lambda: nn.Linear(20, 7), (2, 5, 20), ((1, 3, 20),)),
    Case("linear", "4 dimensions", lambda: nn.Linear(20, 7), (2, 3, 5, 20)),
)


def scalar(op: str, value: float) -> Case:
    function = (lambda x: x + value) if op == "add" else (lambda x: x * value)
    return between(op, f"scalar {value}", lambda: Fn(function))


def branches(row: str, name: str, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], outputs: int = 8,
             other: int = 8) -> Case:  # fmt: skip
    return Case(row, name, lambda: Branches(join, outputs, other), other=LARGE)


ARITHMETIC_CASES = (
    *(scalar("add", value) for value in (0.5, -0.75, 0, 100.0, -1000.0, 3)),
    *(scalar("mul", value) for value in (0.5, -0.75, 0, 100.0, -1000.0, 1e-5, 2)),
    between("mul", "divided", lambda: Fn(lambda x: x / 3)),
    between("add", "less", lambda: Fn(lambda x: x - 0.3)),
    branches("add", "two", lambda a, b: a.relu() + b.relu()),
    branches("add", "relu", lambda a, b: (a.sigmoid() + b.tanh()).relu()),
    branches("add", "relu6", lambda a, b: F.relu6(a.sigmoid() + b.sigmoid())),
    between("add", "twice the same", lambda: Fn(lambda x: (lambda y: y + y)(x.relu()))),
    branches("add", "pooled", lambda a, b: a + F.adaptive_avg_pool2d(b, 1)),
    branches("add", "channel", lambda a, b: a.relu() + b.relu()[:, 0:1]),
    branches("add", "one channel", lambda a, b: a.relu() + b.relu(), other=1),
    branches("mul", "two", lambda a, b: a * b),
    branches("mul", "relu", lambda a, b: F.relu(a * b)),
    branches("mul", "squeeze excite", lambda a, b: a * F.adaptive_avg_pool2d(b, 1).sigmoid()),
    branches("mul", "squeeze excite first", lambda a, b: F.hardsigmoid(F.adaptive_avg_pool2d(a, 1)) * b),
    Case("mul", "squeeze excite large", lambda: Branches(lambda a, b: a * F.adaptive_avg_pool2d(b, 1).sigmoid()),
         (2, 8, 12, 12), other=((1, 8, 20, 11), (3, 8, 5, 40))),
    branches("mul", "one channel", lambda a, b: a * b, other=1),
    between("mul", "twice the same", lambda: Fn(lambda x: x * x)),
    branches("matmul", "4 dimensions", lambda a, b: a @ b.transpose(2, 3) @ b),
    branches("matmul", "3 dimensions", lambda a, b: (a.flatten(0, 1) @ b.flatten(0, 1).transpose(1, 2)).unflatten(
        0, (-1, 8))),
    branches("cat", "two scales", lambda a, b: torch.cat([a, b], 1), 16),
    branches("cat", "same twice", lambda a, b: torch.cat([a, b, a], dim=1), 24),
    branches("cat", "height", lambda a, b: torch.cat((a, b), 2)),
    branches("cat", "fixed and free", lambda a, b: torch.cat([a.sigmoid(), b.tanh(), b], 1), 24),
    branches("cat", "relu after", lambda a, b: torch.cat([a, b], 1).relu(), 16),
    branches("cat", "negative dim", lambda a, b: torch.cat([a, b], -1)),
)  # fmt: skip

ACTIVATION_CASES = (
    between("relu", "after pool", lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU())),
    between("clamp", "after pool", lambda: nn.Sequential(nn.MaxPool2d(2), nn.Hardtanh(-0.2, 0.3))),
    between("clamp", "relu6 after pool", lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU6())),
    between("clamp", "one side", lambda: nn.Sequential(nn.MaxPool2d(2), Fn(lambda x: x.clamp(min=-0.1)))),
    between("sigmoid", "plain", nn.Sigmoid, other=IMAGES),
    between("hardsigmoid", "plain", nn.Hardsigmoid, other=IMAGES),
    between("hardsigmoid", "wide", lambda: nn.Sequential(Fn(lambda x: x * 9), nn.Hardsigmoid())),
    between("tanh", "plain", nn.Tanh, other=IMAGES),
    between("hardswish", "plain", nn.Hardswish, other=IMAGES),
    between("hardswish", "wide", lambda: nn.Sequential(Fn(lambda x: x * 9), nn.Hardswish())),
    between("leaky_relu", "plain", nn.LeakyReLU, other=IMAGES),
    between("leaky_relu", "steep", lambda: nn.LeakyReLU(1.5)),
    between("leaky_relu", "negative", lambda: nn.LeakyReLU(-0.5)),
    between("elu", "plain", nn.ELU, other=IMAGES),
    between("elu", "alpha", lambda: nn.ELU(0.3)),
    between("prelu", "one slope", nn.PReLU, other=IMAGES),
    between("prelu", "steep", lambda: nn.PReLU(init=1.7)),
    between("prelu", "negative", lambda: nn.PReLU(init=-0.4)),
    between("softmax", "channels", lambda: nn.Softmax(1), other=IMAGES),
    between("softmax", "last", lambda: nn.Softmax(-1)),
)


def alive(norm: nn.Module) -> nn.Module:
    """Random statistics and affine parameters."""
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return norm


NORM_CASES = (
    # relu before and a pool after, so that no conv can take the norm in
    between("batch_norm", "plain", lambda: nn.Sequential(nn.ReLU(), alive(nn.BatchNorm2d(8)), nn.MaxPool2d(1)),
            other=IMAGES),
    between("batch_norm", "relu", lambda: nn.Sequential(nn.ReLU(), alive(nn.BatchNorm2d(8)), nn.ReLU())),
    between("batch_norm", "no affine",
            lambda: nn.Sequential(nn.ReLU(), alive(nn.BatchNorm2d(8, affine=False)), nn.MaxPool2d(2))),
    Case("batch_norm", "3d",
         lambda: Between(nn.Sequential(nn.ReLU(), alive(nn.BatchNorm3d(8)), nn.MaxPool3d(2)), dims=3),
         (2, 8, 3, 4, 5)),
    between("group_norm", "two groups", lambda: alive(nn.GroupNorm(2, 8)), other=LARGE),
    between("group_norm", "no affine", lambda: nn.GroupNorm(8, 8, affine=False)),
    between("instance_norm", "plain", lambda: nn.InstanceNorm2d(8), other=LARGE),
    between("instance_norm", "affine", lambda: alive(nn.InstanceNorm2d(8, affine=True))),
    Case("instance_norm", "1d", lambda: Between(nn.InstanceNorm1d(8), dims=1), (2, 8, 12)),
)  # fmt: skip


def shuffle(x: torch.Tensor) -> torch.Tensor:
    """shufflenet's channel shuffle."""
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def halves(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([b, a], 1)


def pieces(x: torch.Tensor) -> torch.Tensor:
    a, b, c = torch.split(x, [3, 1, 4], dim=1)
    return torch.cat([c, a, b], 1)


SELECTING_CASES = (
    Case("max_pool1d", "plain", lambda: Between(nn.MaxPool1d(3, 2, 1), dims=1), (2, 8, 11), ((1, 8, 4), (3, 8, 7))),
    Case("max_pool1d", "ceil", lambda: Between(nn.MaxPool1d(2, ceil_mode=True), dims=1), (2, 8, 11)),
    Case("max_pool1d", "dilated", lambda: Between(nn.MaxPool1d(2, 1, dilation=3), dims=1), (2, 8, 11)),
    between("max_pool2d", "plain", lambda: nn.MaxPool2d(2)),
    between("max_pool2d", "padding", lambda: nn.MaxPool2d(3, 2, 1)),
    between("max_pool2d", "ceil", lambda: nn.MaxPool2d(2, 2, ceil_mode=True)),
    between("max_pool2d", "narrow", lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0), ceil_mode=True), 24, 24),
    between("max_pool2d", "wide", lambda: nn.MaxPool2d(3, 2, 1), 64, 64),
    between("max_pool2d", "dilated", lambda: nn.MaxPool2d((2, 3), 1, dilation=2)),
    Case("max_pool3d", "plain", lambda: Between(nn.MaxPool3d(2, 2), dims=3), (2, 8, 4, 5, 6)),
    Case("max_pool3d", "padding", lambda: Between(nn.MaxPool3d(3, 2, 1), dims=3), (1, 8, 4, 5, 6)),
    Case("max_pool3d", "ceil", lambda: Between(nn.MaxPool3d(2, 2, ceil_mode=True), dims=3), (1, 8, 5, 5, 6)),
    between("flatten", "height and width", lambda: Fn(lambda x: x.flatten(2).unsqueeze(3))),
    between("reshape", "shuffle", lambda: Fn(shuffle)),
    between("contiguous", "shuffle", lambda: Fn(shuffle)),
    between("transpose", "shuffle", lambda: Fn(shuffle)),
    between("permute", "there and back", lambda: Fn(lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).permute(0, 2, 1)
                                                    .unsqueeze(2))),
    between("squeeze", "one dim", lambda: Fn(lambda x: F.max_pool2d(x, 9).squeeze(3).unsqueeze(3)), other=()),
    between("squeeze", "all dims", lambda: Fn(lambda x: F.max_pool2d(x, 9).squeeze().unsqueeze(2).unsqueeze(3)),
            other=()),
    between("unsqueeze", "one dim", lambda: Fn(lambda x: x.unsqueeze(1).flatten(0, 1))),
    between("chunk", "swapped", lambda: Fn(halves)),
    between("getitem", "swapped", lambda: Fn(halves)),
    between("getitem", "sliced", lambda: Fn(lambda x: x[:, 2:6, ::2, 1:]), outputs=4),
    between("getitem", "indexed", lambda: Fn(lambda x: x[:, :, 0].unsqueeze(2))),
    between("split", "pieces", lambda: Fn(pieces)),
    between("split", "equal", lambda: Fn(lambda x: torch.cat([x.split(4, 1)[1], x.split(4, 1)[0]], 1))),
    between("split", "one of it", lambda: Fn(lambda x: x.split(4, 1)[1]), outputs=4),
    between("pixel_shuffle", "plain", lambda: nn.PixelShuffle(2), 16, 4),
    between("pad", "zero", lambda: nn.ZeroPad2d((1, 0, 2, 1)), other=IMAGES),
    between("pad", "reflect", lambda: nn.ReflectionPad2d(2)),
    between("pad", "-inf before max_pool", lambda: Fn(
        lambda x: F.max_pool2d(F.pad(x, (0, 1, 1, 2), value=-float("inf")), 3, 2))),
    between("pad", "crop", lambda: Fn(lambda x: F.pad(x, (-1, 2)))),
    Case("pad", "reflect 1d", lambda: Between(Fn(lambda x: F.pad(x, (2, 1), "reflect")), dims=1), (2, 8, 9)),
)  # fmt: skip

AVERAGING_CASES = (
    Case("avg_pool1d", "plain", lambda: Between(nn.AvgPool1d(3, 2, 1), dims=1), (2, 8, 11), ((1, 8, 4), (3, 8, 7))),
    Case("avg_pool1d", "ceil", lambda: Between(nn.AvgPool1d(2, ceil_mode=True), dims=1), (2, 8, 11)),
    Case("avg_pool1d", "exclude pad", lambda: Between(nn.AvgPool1d(3, 2, 1, count_include_pad=False), dims=1),
         (2, 8, 11)),
    between("avg_pool2d", "plain", lambda: nn.AvgPool2d(2)),
    between("avg_pool2d", "padding", lambda: nn.AvgPool2d(3, 2, 1)),
    between("avg_pool2d", "exclude pad", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    between("avg_pool2d", "ceil", lambda: nn.AvgPool2d(2, 2, ceil_mode=True)),
    between("avg_pool2d", "ceil padding", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    between("avg_pool2d", "ceil exclude pad", lambda: nn.AvgPool2d(4, 3, 2, ceil_mode=True, count_include_pad=False)),
    Case("avg_pool3d", "plain", lambda: Between(nn.AvgPool3d(2), dims=3), (2, 8, 4, 5, 6)),
    Case("avg_pool3d", "padding", lambda: Between(nn.AvgPool3d(3, 2, 1), dims=3), (1, 8, 4, 5, 6)),
    Case("avg_pool3d", "ceil exclude pad",
         lambda: Between(nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False), dims=3), (1, 8, 4, 5, 6)),
    Case("adaptive_avg_pool1d", "3", lambda: Between(nn.AdaptiveAvgPool1d(3), dims=1), (2, 8, 11), ((1, 8, 2),)),
    between("adaptive_avg_pool2d", "1", lambda: nn.AdaptiveAvgPool2d(1), other=IMAGES),
    between("adaptive_avg_pool2d", "3x4", lambda: nn.AdaptiveAvgPool2d((3, 4)), other=IMAGES),
    between("adaptive_avg_pool2d", "none", lambda: nn.AdaptiveAvgPool2d((None, 4)), other=LARGE),
    Case("adaptive_avg_pool3d", "2", lambda: Between(nn.AdaptiveAvgPool3d(2), dims=3), (2, 8, 4, 5, 6)),
    between("mean", "keepdim", lambda: Fn(lambda x: x.mean((2, 3), keepdim=True)), other=IMAGES),
    between("mean", "one dim", lambda: Fn(lambda x: x.mean(2).unsqueeze(2)), other=IMAGES),
    between("mean", "channels", lambda: Fn(lambda x: x.mean(1, True)), outputs=1, other=IMAGES),
    between("interpolate", "nearest", lambda: nn.Upsample(scale_factor=2), other=IMAGES),
    between("interpolate", "nearest size", lambda: nn.Upsample(size=(5, 14)), other=IMAGES),
    between("interpolate", "nearest odd factor", lambda: nn.Upsample(scale_factor=(1.7, 0.6)), other=LARGE),
    between("interpolate", "bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), other=IMAGES),
    between("interpolate", "bilinear corners",
            lambda: nn.Upsample(size=(15, 4), mode="bilinear", align_corners=True), other=IMAGES),
    between("interpolate", "bilinear factor", lambda: nn.Upsample(scale_factor=1.7, mode="bilinear"), other=LARGE),
    between("interpolate", "bilinear shape of input", lambda: Fn(
        lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear")), other=LARGE),
    Case("interpolate", "nearest 3d", lambda: Between(nn.Upsample(scale_factor=2), dims=3), (1, 8, 3, 4, 5)),
)  # fmt: skip

CONV_ADD_CASES = (
    Case("conv2d_add", "plain", lambda: Residual(nn.Conv2d(8, 8, 3, padding=1)), other=LARGE),
    Case("conv2d_add", "other order", lambda: Residual(nn.Conv2d(8, 8, 3, padding=1), swap=True), other=IMAGES),
    Case("conv2d_add", "relu", lambda: Residual(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()), other=LARGE),
    Case("conv2d_add", "relu6", lambda: Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6())),
    Case("conv2d_add", "depthwise", lambda: Residual(nn.Conv2d(8, 8, 3, padding=1, groups=8))),
    branches("conv2d_add", "two convs", lambda a, b: (a + b).relu()),
    # the kernel writes over the operand it adds, so these must not lose it
    Case("conv2d_add", "operand read later", lambda: Shared(lambda x, y: torch.cat([y + x, x], 1)), other=LARGE),
    Case("conv2d_add", "operand returned", lambda: Shared(lambda x, y: torch.cat([y + x, x.relu()], 1))),
    Case("conv2d_add", "a view of it read later",
         lambda: Shared(lambda x, y: torch.cat([y + x, x.reshape(-1, 8, 9, 9)], 1))),
    Case("conv2d_add", "operand is a view", lambda: Shared(
        lambda x, y: torch.cat([y + x.transpose(1, 2).contiguous().transpose(1, 2), x], 1))),
    Case("conv2d_add", "operand is a part",
         lambda: Shared(lambda x, y: (lambda both: torch.cat([y + both.chunk(2, 1)[0], both[:, 4:12]], 1))(
             torch.cat([x, x], 1)))),
    Case("conv2d_add", "operand is a constant", WithConstant),
)  # fmt: skip

IMAGES_OF_8 = ((1, 8, 9, 9), (3, 8, 14, 11), (2, 8, 2, 1))
CONV_SILU_CASES = (
    Case("conv2d_silu", "plain", lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU()), other=IMAGES_OF_8),
    Case("conv2d_silu", "no bias", lambda: nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.SiLU()), other=LARGE),
    Case("conv2d_silu", "depthwise", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.SiLU()), other=LARGE),
    Case("conv2d_silu", "geometry", lambda: nn.Sequential(
        nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), nn.SiLU()), other=LARGE),
    Case("conv2d_silu", "one channel", lambda: nn.Sequential(nn.Conv2d(8, 1, 3), nn.SiLU()), other=LARGE),
    Case("conv2d_silu", "chain", lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 16, 1), nn.SiLU(), nn.Conv2d(16, 8, 3), nn.ReLU()), other=LARGE),
    branches("conv2d_silu", "plain and quantized readers", lambda a, b: F.silu(a) * F.max_pool2d(F.silu(b), 3, 1, 1)),
    Case("conv2d_silu", "squeeze excite", lambda: SqueezeExcite(8), (2, 8, 12, 12), other=LARGE),
    Case("conv2d_silu", "operand of an addition", lambda: Residual(nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()))),
)  # fmt: skip

CASES = (
    *CONV_CASES, *TRANSPOSE_CASES, *LINEAR_CASES, *ARITHMETIC_CASES, *ACTIVATION_CASES, *NORM_CASES,
    *SELECTING_CASES, *AVERAGING_CASES, *CONV_ADD_CASES, *CONV_SILU_CASES,
)  # fmt: skip


def reference_of(case: Case, backend: str, qconfig: QConfig | str) -> QuantModule:
    torch.manual_seed(0)
    model = case.make().eval()
    prepared = fxq.prepare(model, torch.randn(case.shape), backend=backend, qconfig=qconfig)
    fxq.calibrate(prepared, [torch.randn(case.shape) for _ in range(2)], progress=False)
    return fxq.convert_to_reference(prepared)


def assert_agrees(case: Case, backend: str, qconfig: QConfig | str = "per_channel") -> None:
    """The row runs, and every kernel is within 1 LSB of the reference graph; all other nodes are explained."""
    reference = reference_of(case, backend, qconfig)
    table = get_backend(backend)
    lowered = fxq.lower(reference, table)
    decisions = lowered.plan.decisions.values()
    rows = {decision.row for decision in decisions if decision.row and decision.status is not Status.FLOAT}
    # "conv_transpose2d" is two rows where an engine runs groups differently
    assert case.row in rows | {row.removesuffix(" grouped") for row in rows}, reasons_of(lowered)
    for shape in (case.shape, *case.other):
        x = torch.randn(shape)
        lines = kernel_agreement(reference, table, x)
        assert [line for line in lines if line.max_lsb > 1] == [], shape
        once = lowered(x)
        assert once.shape == reference(x).shape
        assert torch.equal(lowered(x), once)  # nothing that belongs to the model was overwritten


def cases_of(backend: str) -> list[Case]:
    rows = {row.name for row in get_backend(backend).rows}
    return [case for case in CASES if case.row in rows]


PAIRS = [pytest.param(backend, case, id=f"{backend}-{case}") for backend in BACKENDS for case in cases_of(backend)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_has_a_case(backend: str) -> None:
    rows = {row.name for row in get_backend(backend).rows}
    assert rows - {case.row for case in CASES} == set()


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_row(backend: str, case: Case) -> None:
    assert_agrees(case, backend)


@pytest.mark.parametrize("engine", ["onednn", "fbgemm"])
@pytest.mark.parametrize("backend", ["x86", "onednn"])
@pytest.mark.parametrize("case", [*CONV_CASES, *LINEAR_CASES], ids=str)
def test_other_engines_that_may_run_it(case: Case, backend: str, engine: str) -> None:
    reference, table = reference_of(case, backend, "per_channel"), get_backend(backend)
    engines = {node.name: engine for node in reference.graph.nodes}
    lines = kernel_agreement(reference, table, torch.randn(case.shape) * 2, engines=engines)
    assert [line for line in lines if line.max_lsb > 1] == []


def qconfig(**activation: Any) -> QConfig:
    return QConfig(activation=ACTIVATION.replace(**activation), weight=WEIGHT)


QCONFIGS: dict[str, QConfig | str] = {
    "per_tensor": "per_tensor",
    "symmetric": qconfig(symmetric=True),
    "4-bit weights": QConfig(activation=ACTIVATION, weight=WEIGHT.replace(quant_min=-8, quant_max=7)),
    "affine weights": QConfig(activation=ACTIVATION, weight=WEIGHT.replace(quant_min=-128, symmetric=False)),
    "affine per-tensor weights": QConfig(
        activation=ACTIVATION, weight=WEIGHT.replace(quant_min=-128, symmetric=False, ch_axis=None)
    ),
    "4-bit activations": qconfig(quant_max=15),
    "7-bit activations": qconfig(quant_max=127),
    "middle of the integers": qconfig(quant_min=50, quant_max=201),
    "powers of two": QConfig(
        activation=ACTIVATION.replace(pow2_scale=True), weight=WEIGHT.replace(pow2_scale=True)
    ),
    "signed": qconfig(dtype=torch.int8, quant_min=-128, quant_max=127),
    "signed symmetric": qconfig(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True),
    "histogram": qconfig(observer="histogram"),
}
WEIGHTED = ("conv2d-3x3", "conv2d-relu", "conv2d-relu6", "conv2d-depthwise", "conv2d-depthwise 116", "linear-relu",
            "conv1d-plain", "conv2d_add-relu", "conv2d_add-plain", "conv2d_silu-plain",
            "conv2d_silu-chain", "conv_transpose2d-relu6")  # fmt: skip
UNWEIGHTED = ("add-two", "add-relu", "add-relu6", "add-scalar -0.75", "mul-two", "mul-relu", "cat-two scales",
              "cat-fixed and free", "matmul-4 dimensions", "clamp-after pool", "relu-after pool", "sigmoid-plain",
              "tanh-plain", "hardswish-plain", "leaky_relu-plain", "elu-plain", "prelu-one slope",
              "softmax-channels", "batch_norm-relu", "instance_norm-plain", "max_pool2d-padding",
              "avg_pool2d-exclude pad", "pad-zero", "pad-reflect", "interpolate-bilinear", "mean-keepdim",
              "chunk-swapped", "contiguous-shuffle")  # fmt: skip
BY_NAME = {str(case): case for case in CASES}
# The kernels without weights are the same under every engine.
CONFIGURED = [
    pytest.param(backend, name, config, id=f"{backend}-{name}-{config}")
    for config in QCONFIGS
    for backend in BACKENDS
    for name in (*WEIGHTED, *(UNWEIGHTED if backend == "x86" else ()))
    if BY_NAME[name] in cases_of(backend)
]


FIXED = ("sigmoid-plain", "tanh-plain", "cat-fixed and free", "add-relu", "add-relu6")  # in them, such an op
FULL_RANGE = ("histogram", "signed", "per_tensor", *(name for name in QCONFIGS if name.endswith("weights")))


def reasons_of(lowered: QuantModule) -> set[str]:
    return {decision.reason.code for decision in lowered.plan.decisions.values() if decision.reason}


@pytest.mark.parametrize(("backend", "name", "config"), CONFIGURED)
def test_qconfig(backend: str, name: str, config: str) -> None:
    case = BY_NAME[name]
    reasons: set[str] = set()
    if case.row in ("conv2d_add", "conv2d_silu") and config.startswith("affine"):
        # these kernels take symmetric weights only; the conv alone has another
        case, reasons = dataclasses.replace(case, row="conv2d"), {"no-kernel"} if case.row == "conv2d_silu" else set()
    elif name in FIXED and config not in FULL_RANGE:
        reasons = {"fixed-output"}  # the kernel cannot give what was asked for
    reference = reference_of(case, backend, QCONFIGS[config])
    lowered = fxq.lower(reference, backend)
    if reasons:
        assert reasons_of(lowered) <= reasons
        lines = kernel_agreement(reference, get_backend(backend), torch.randn(case.shape))
        assert [line for line in lines if line.max_lsb > 1] == []
    else:
        assert reasons_of(lowered) == set()
        assert_agrees(case, backend, QCONFIGS[config])


EXTREME = {
    "dense": lambda: nn.Conv2d(32, 32, 3, padding=1),
    "groups of 2": lambda: nn.Conv2d(32, 32, 3, padding=1, groups=16),
    "groups of 4": lambda: nn.Conv2d(32, 32, 3, padding=1, groups=8),
    "depthwise": lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32),
    "depthwise 5x5": lambda: nn.Conv2d(32, 32, 5, padding=1, groups=32),
    "depthwise twice as many": lambda: nn.Conv2d(32, 64, 3, padding=1, groups=32),
    "transposed depthwise": lambda: nn.ConvTranspose2d(32, 32, 4, stride=2, groups=32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EXTREME)
def test_no_accumulator_saturates(backend: str, name: str) -> None:
    """All products large and of one sign: an accumulator of 16 bits would saturate."""
    conv = EXTREME[name]()
    with torch.no_grad():
        conv.weight.uniform_(0.8, 1)
    x = torch.rand(2, 32, 9, 9) * 0.1 + 0.9
    prepared = fxq.prepare(nn.Sequential(conv).eval(), x, backend=backend)
    prepared(x)
    lines = kernel_agreement(fxq.convert_to_reference(prepared), get_backend(backend), x)
    assert [line for line in lines if line.max_lsb > 1] == []


@dataclass(frozen=True)
class Refusal:
    """An op that stays float, and why; everything around it still runs."""

    op: str
    name: str
    make: Callable[[], nn.Module]
    code: str
    shape: tuple[int, ...] = (2, 8, 9, 9)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def refused(op: str, name: str, function: Callable[[torch.Tensor], torch.Tensor], code: str = "options",
            outputs: int = 8) -> Refusal:  # fmt: skip
    return Refusal(op, name, lambda: Between(Fn(function), outputs=outputs), code)


REFUSALS = (
    refused("silu", "not of a conv", lambda x: F.silu(x.relu()), "no-kernel"),
    refused("mish", "plain", F.mish, "no-kernel"),
    refused("gelu", "plain", F.gelu, "no-kernel"),
    refused("sub", "tensors", lambda x: x - x.relu(), "no-kernel"),
    refused("sub", "from a number", lambda x: 1 - x, "no-kernel"),
    refused("div", "tensors", lambda x: x / (x.sigmoid() + 1), "no-kernel"),
    refused("div", "of a number", lambda x: 1 / (x.sigmoid() + 1), "no-kernel"),
    Refusal("prelu", "a slope a channel", lambda: Between(nn.PReLU(8)), "wrong-kernel"),
    refused("pad", "with ones", lambda x: F.pad(x, (1, 1), value=1.0)),
    refused("pad", "with -inf", lambda x: torch.where((y := F.pad(x, (1, 1), value=-float("inf"))) < -9, 0.0, y)),
    refused("pad", "replicate", lambda x: F.pad(x, (1, 1, 1, 1), "replicate")),
    refused("interpolate", "bicubic", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    refused("interpolate", "antialias", lambda x: F.interpolate(x, size=5, mode="bilinear", antialias=True)),
    refused("interpolate", "nearest-exact", lambda x: F.interpolate(x, size=5, mode="nearest-exact")),
    refused("avg_pool2d", "divisor", lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    refused("mean", "of all", lambda x: x * x.mean()),
    refused("matmul", "of different ranks", lambda x: x @ x[0, 0]),
    refused("matmul", "of vectors", lambda x: (x @ x[0, 0, 0]).unsqueeze(3)),
    Refusal("conv2d", "one image", lambda: nn.Conv2d(8, 4, 3), "options", (8, 9, 9)),
    Refusal("conv_transpose2d", "one image", lambda: nn.ConvTranspose2d(8, 4, 3), "options", (8, 9, 9)),
    Refusal("linear", "one vector", lambda: nn.Linear(8, 4), "options", (8,)),
    Refusal("instance_norm", "running statistics",
            lambda: Between(nn.Sequential(nn.ReLU(), alive(nn.InstanceNorm2d(8, track_running_stats=True)))),
            "options"),
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_refused(backend: str, case: Refusal) -> None:
    reference = reference_of(case, backend, "per_channel")  # type: ignore[arg-type]
    lowered = fxq.lower(reference, backend)
    floats = {n: d for n, d in lowered.plan.decisions.items() if d.status is Status.FLOAT}
    assert case.code in {d.reason.code for d in floats.values() if d.reason}, floats
    x = torch.randn(case.shape)
    assert all(line.max_lsb <= 1 for line in kernel_agreement(reference, get_backend(backend), x))
    assert lowered(x).shape == reference(x).shape
