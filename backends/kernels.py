"""How rows emit torch's int8 kernels.

The only module that names the ``quantized::*`` operators and the quantized dtypes, so that it can be exchanged
when torch removes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxq.op_table import Emission, IntWeight
from fxq.ops import Op

EngineChoice = Callable[[IntWeight, int], str | None]


def _operator(name: str) -> Any:
    return getattr(torch.ops.quantized, name)


def quantized_weight(weight: IntWeight) -> torch.Tensor:
    """A qint8 tensor, as torch's prepacking functions take it."""
    if weight.ch_axis is None:
        scale, zero_point = weight.qparams.item()
        return torch._make_per_tensor_quantized_tensor(weight.values, scale, zero_point)
    return torch._make_per_channel_quantized_tensor(
        weight.values, weight.qparams.scale.double(), weight.qparams.zero_point.long(), weight.ch_axis
    )


def expand(value: Any, dims: int) -> list[int]:
    """One integer for each spatial dimension."""
    return list(value) if isinstance(value, (tuple, list)) else [value] * dims


@dataclass(frozen=True)
class PackedConv:
    """``quantized::convNd`` and ``quantized::conv_transposeNd``, bias included, relu if it is not free.

    ``engine`` may choose another engine than the backend's from the weight and the number of groups.
    """

    dims: int
    transposed: bool = False
    engine: EngineChoice | None = None

    @property
    def kernel(self) -> str:
        return f"quantized::conv{'_transpose' if self.transposed else ''}{self.dims}d"

    def __call__(self, e: Emission) -> Node:
        name = self.kernel.removeprefix("quantized::")
        geometry = [expand(e.get("stride"), self.dims), expand(e.get("padding"), self.dims)]
        if self.transposed:
            geometry.append(expand(e.get("output_padding"), self.dims))
        geometry.append(expand(e.get("dilation"), self.dims))
        weight, groups = e.weight(), e.get("groups")
        engine = self.engine(weight, groups) if self.engine else None
        packed = e.pack(
            _operator(f"{name}_prepack"), quantized_weight(weight), e.tensor("bias"), *geometry, groups, engine=engine
        )
        target = _operator(f"{name}_relu" if e.relu else name)
        return e.call(target, e.input("input"), e.constant("packed", packed), e.out.scale, e.out.zero_point)


@dataclass(frozen=True)
class PackedConvAdd:
    """``quantized::conv2d_add``: the conv is added to the second operand, in that operand's own memory."""

    kernel: str = "quantized::conv2d_add"

    def __call__(self, e: Emission) -> Node:
        geometry = [expand(e.get(name), 2) for name in ("stride", "padding", "dilation")]
        weight = quantized_weight(e.weight())
        packed = e.pack(torch.ops.quantized.conv2d_prepack, weight, e.tensor("bias"), *geometry, e.get("groups"))
        target = torch.ops.quantized.conv2d_add_relu if e.relu else torch.ops.quantized.conv2d_add
        accumulated = e.tail_input(1)
        e.overwrites(accumulated)
        return e.call(
            target, e.input("input"), accumulated, e.constant("packed", packed), e.out.scale, e.out.zero_point
        )


@dataclass(frozen=True)
class PackedLinear:
    """``quantized::linear``, bias included, relu if it is not free."""

    kernel: str = "quantized::linear"
    engine: EngineChoice | None = None

    def __call__(self, e: Emission) -> Node:
        weight = e.weight()
        engine = self.engine(weight, 1) if self.engine else None
        packed = e.pack(
            torch.ops.quantized.linear_prepack, quantized_weight(weight), e.tensor("bias"), engine=engine
        )
        target = torch.ops.quantized.linear_relu if e.relu else torch.ops.quantized.linear
        return e.call(target, e.input("input"), e.constant("packed", packed), e.out.scale, e.out.zero_point)


@dataclass(frozen=True)
class Binary:
    """``quantized::add`` and ``quantized::mul``; a scalar becomes a one-element int8 tensor that holds it exactly."""

    name: str

    @property
    def kernel(self) -> str:
        return f"quantized::{self.name}"

    def __call__(self, e: Emission) -> Node:
        other = e.input("other")
        if not isinstance(other, Node):
            other = e.constant("scalar", _one_element(float(other)))
        target = _operator(f"{self.name}_relu" if e.relu else self.name)
        return e.call(target, e.input("input"), other, e.out.scale, e.out.zero_point)


def _one_element(value: float) -> torch.Tensor:
    scale = abs(value) / 255 or 1.0
    zero_point = 255 if value < 0 else 0
    return torch.quantize_per_tensor(torch.tensor([value]), scale, zero_point, torch.quint8)


@dataclass(frozen=True)
class WithOutput:
    """A ``quantized::*`` operator called as ``op(input, *parameters, scale, zero_point)``.

    ``tensors`` names parameters that are constant float tensors; ``inputs`` the activations.
    """

    name: str
    parameters: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("input",)
    qparams_after: int | None = None

    @property
    def kernel(self) -> str:
        return f"quantized::{self.name}"

    def __call__(self, e: Emission) -> Node:
        arguments: list[Any] = []
        for name in self.parameters:
            if name in self.tensors:
                tensor = e.tensor(name)
                arguments.append(None if tensor is None else e.constant(name, tensor))
            else:
                arguments.append(e.get(name))
        at = len(arguments) if self.qparams_after is None else self.qparams_after
        arguments[at:at] = [e.out.scale, e.out.zero_point]
        return e.call(_operator(self.name), *(e.input(name) for name in self.inputs), *arguments)


@dataclass(frozen=True)
class BatchNorm:
    """``quantized::batch_norm``, which insists on a weight and a bias."""

    kernel: str = "quantized::batch_norm"

    def __call__(self, e: Emission) -> Node:
        mean, var = e.tensor("running_mean"), e.tensor("running_var")
        assert mean is not None and var is not None
        weight, bias = e.tensor("weight"), e.tensor("bias")
        values = {
            "weight": torch.ones_like(mean) if weight is None else weight,
            "bias": torch.zeros_like(mean) if bias is None else bias,
            "mean": mean,
            "var": var,
        }
        constants = [e.constant(name, value) for name, value in values.items()]
        return e.call(
            torch.ops.quantized.batch_norm, e.input("input"), *constants, e.get("eps"), e.out.scale, e.out.zero_point
        )


@dataclass(frozen=True)
class Keep:
    """The op's own function on the int8 tensor, which keeps or dictates the qparams itself."""

    op: Op

    @property
    def kernel(self) -> str:
        return f"aten::{self.op.name}"

    def __call__(self, e: Emission) -> Node:
        values = {name: e.input(name) if name in self.op.tensors else e.get(name) for name in self._parameters()}
        args, kwargs = self.op.arguments(values)
        return e.call(self.op.target, *args, **kwargs)

    def _parameters(self) -> list[str]:
        rest = self.op.signature.rest
        return [*self.op.signature.defaults, *([rest] if rest else [])]


@dataclass(frozen=True)
class Concatenate:
    """``quantized::cat``, which requantizes inputs whose qparams differ from the output's."""

    kernel: str = "quantized::cat"

    def __call__(self, e: Emission) -> Node:
        return e.call(torch.ops.quantized.cat, e.input("tensors"), e.get("dim"), e.out.scale, e.out.zero_point)


@dataclass(frozen=True)
class Prelu:
    """One slope for all channels is ``quantized::leaky_relu``.

    ``quantized::prelu`` is of no use: it rounds the slopes to 8 bits, which puts small ones several integers off,
    and multiplies positive values by a quantized 1.0, so it is wrong where the slopes' range has no 1.0.
    """

    kernel: str = "quantized::leaky_relu"

    def __call__(self, e: Emission) -> Node:
        slope = e.tensor("weight")
        assert slope is not None
        target = torch.ops.quantized.leaky_relu
        return e.call(target, e.input("input"), slope.item(), False, e.out.scale, e.out.zero_point)
