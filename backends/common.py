"""The rows that all engines run, and the specs they share.

Absent on purpose: silu, mish, sub, div by a tensor, adaptive max pools, roll and bicubic interpolation have no
int8 kernel in torch; gelu's keeps its input's scale, which wastes half the integers on values it never returns.
layer_norm has one that is no faster than float, and its input's channels differ too much for one scale.
"""

from __future__ import annotations

import torch

from fxq import ops
from fxq.backends import checks
from fxq.backends.kernels import (
    BatchNorm,
    Binary,
    Concatenate,
    EngineChoice,
    Keep,
    MaxPool2d,
    Mean,
    PackedConv,
    PackedLinear,
    PlainConv,
    Prelu,
    WithOutput,
)
from fxq.engine import available_engines, cpu_has_vnni
from fxq.op_table import CLAMPED, Backend, Check, Fixed, IntWeight, OpRow, Out, Weights, accept
from fxq.plan import Reason
from fxq.spec import QuantSpec

ACTIVATION = QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False, observer="histogram")
# Symmetric around zero without -128, so that a weight grid of +-127 is kept exactly.
WEIGHT = QuantSpec(dtype=torch.int8, quant_min=-127, quant_max=127, symmetric=True, ch_axis=0, observer="minmax")
# Without VNNI two products are added up in 16 bits: 2 * 255 * 63 = 32130 fits, 2 * 255 * 127 does not.
# Narrow weights cost no time; narrow activations would cost a clamp each, and more accuracy.
WEIGHT_7BIT = WEIGHT.replace(quant_min=-63, quant_max=63)

_NORM = ("weight", "bias")

ABSENT = {
    ops.SILU: Reason("no-kernel", "torch has no int8 silu"),
    ops.MISH: Reason("no-kernel", "torch has no int8 mish"),
    ops.GELU: Reason("no-kernel", "torch's int8 gelu keeps its input's scale, which loses a bit"),
    ops.LAYER_NORM: Reason("residual", "evens out channels that differ too much for 8 bits"),
    ops.SUB: Reason("no-kernel", "torch has no int8 subtraction of tensors"),
    ops.DIV: Reason("no-kernel", "torch has no int8 division by a tensor"),
    ops.DROPOUT: Reason("no-kernel", "dropout that is active in eval mode"),
}


def weight_spec() -> tuple[QuantSpec, str]:
    """The weight spec for engines that multiply with vpmaddubsw or VNNI, and why."""
    if cpu_has_vnni():
        return WEIGHT, "8-bit weights and activations: this CPU has VNNI, which accumulates in 32 bits"
    return WEIGHT_7BIT, (
        "7-bit weights (reduce_range): this CPU has no VNNI, and its 16-bit accumulation would saturate with 8 bits"
    )


BOTH = Weights.TENSOR | Weights.CHANNEL | Weights.AFFINE


def right_engines(own: str) -> EngineChoice:
    """For a weight and its number of groups, the engines whose kernels are right and not absurdly slow, best first.

    onednn takes symmetric weights only. fbgemm, to which the x86 engine hands convs of more than 100 groups and
    asymmetric weights, runs depthwise kernels 60 to 170 times slower where the channels are no multiple of 8 or
    the kernel is dilated, and adds up pairs of products in 16 bits otherwise, VNNI or not.
    """

    def choose(weight: IntWeight, groups: int) -> tuple[str, ...]:
        symmetric = not bool(weight.qparams.zero_point.any())
        depthwise = groups > 1 and weight.values.shape[1] == 1
        many = depthwise or groups > 100
        has_onednn = symmetric and "onednn" in available_engines()
        if has_onednn and (own == "onednn" or (many and cpu_has_vnni())):
            first = "onednn"
        elif depthwise and 2 * 255 * int(weight.values.int().abs().max()) > 32767:
            first = "qnnpack"
        else:
            first = "fbgemm" if own == "onednn" else own
        others = [name for name, right in (("onednn", has_onednn), ("fbgemm", not many)) if right and own != "fbgemm"]
        return tuple(dict.fromkeys((first, *(name for name in others if name in available_engines()))))

    return choose


def only_engine(name: str) -> EngineChoice:
    """One engine for all weights."""
    return lambda weight, groups: (name,)


def weighted_rows(own: str) -> tuple[OpRow, ...]:
    """Conv, conv_transpose and linear for an engine."""
    engines = only_engine(own) if own == "qnnpack" else right_engines(own)

    def conv(op: ops.Op, dims: int) -> OpRow:
        emit, check = PackedConv(dims, engines=engines), checks.rank(dims + 2)
        return OpRow(op.name, op, emit, tail=(CLAMPED,), weight=BOTH, check=check, relu_kernel=True, heavy=True)

    return (
        conv(ops.CONV1D, 1),
        conv(ops.CONV2D, 2),
        conv(ops.CONV3D, 3),
        OpRow("linear", ops.LINEAR, PackedLinear(engines=engines), tail=(CLAMPED,), weight=BOTH,
              check=checks.at_least_2d, relu_kernel=True, heavy=True),
    )  # fmt: skip


def conv_silu_rows() -> tuple[OpRow, ...]:
    """Conv with silu in oneDNN's output loop, on plain uint8 tensors.

    torch has no int8 silu: in float it costs three passes over large tensors, and the conv's output another rounding
    to 8 bits. (hardswish has an int8 kernel, which takes less time than the plain route costs extra: measured on
    mobilenet_v3, 4.40 ms of kernels apart and 4.58 to 4.84 ms fused.)
    """
    if "onednn" not in available_engines():
        return ()
    return (
        OpRow("conv2d_silu", ops.CONV2D, PlainConv("swish"), tail=(ops.SILU,), weight=Weights.TENSOR | Weights.CHANNEL,
              check=checks.larger_than_a_pixel, heavy=True),
    )  # fmt: skip


def transposed_row(op: ops.Op, dims: int, weight: Weights, check: Check, engine: str, name: str = "") -> OpRow:
    """A conv_transpose row whose kernel is ``engine``'s."""
    emit = PackedConv(dims, True, only_engine(engine))
    return OpRow(name or op.name, op, emit, tail=(CLAMPED,), weight=weight, check=check, heavy=True)


def fbgemm_transposed(op: ops.Op, dims: int) -> OpRow:
    """A conv_transpose row with fbgemm's kernel: per-tensor weights.

    onednn's takes the input channels for the output channels, so it is wrong unless they are equally many, and
    qnnpack's is wrong in three dimensions. Where fbgemm is missing the node stays float.
    """
    right = checks.not_direct_in_fbgemm if dims == 2 else checks.rank(dims + 2)
    check = right if "fbgemm" in available_engines() else checks.wrong_transposed
    return transposed_row(op, dims, Weights.TENSOR | Weights.AFFINE, check, "fbgemm")


def transposed_around_fbgemm() -> tuple[OpRow, ...]:
    """A row for the transposed convs, those of U-Nets among them, that fbgemm runs wrong."""
    if "qnnpack" not in available_engines():
        return ()
    check, name = checks.direct_in_fbgemm, "conv_transpose2d of two rows"
    return (transposed_row(ops.CONV_TRANSPOSE2D, 2, BOTH, check, "qnnpack", name),)


TRANSPOSED_BY_FBGEMM = (
    fbgemm_transposed(ops.CONV_TRANSPOSE1D, 1),
    fbgemm_transposed(ops.CONV_TRANSPOSE2D, 2),
    *transposed_around_fbgemm(),
    fbgemm_transposed(ops.CONV_TRANSPOSE3D, 3),
)


ARITHMETIC = (
    OpRow("add", ops.ADD, Binary("add"), tail=(CLAMPED,), relu_kernel=True, check=checks.tensor_and_tensor_or_scalar),
    OpRow("mul", ops.MUL, Binary("mul"), tail=(CLAMPED,), relu_kernel=True, check=checks.tensor_and_tensor_or_scalar),
    OpRow("matmul", ops.MATMUL, WithOutput("matmul", inputs=("input", "other")), tail=(CLAMPED,),
          check=checks.two_tensors),
    OpRow("cat", ops.CAT, Concatenate(), out=Out.SHARE, mixed_inputs=True, check=checks.all_tensors),
)  # fmt: skip

ACTIVATIONS = (
    OpRow("relu", ops.RELU, Keep(ops.RELU), out=Out.SHARE),
    OpRow("clamp", ops.CLAMP, Keep(ops.CLAMP), out=Out.SHARE),
    OpRow("sigmoid", ops.SIGMOID, Keep(ops.SIGMOID), out=Fixed(1 / 256, 0)),
    OpRow("hardsigmoid", ops.HARDSIGMOID, Keep(ops.HARDSIGMOID), out=Fixed(1 / 256, 0)),
    OpRow("tanh", ops.TANH, Keep(ops.TANH), out=Fixed(1 / 128, 128)),
    OpRow("hardswish", ops.HARDSWISH, WithOutput("hardswish")),
    OpRow("leaky_relu", ops.LEAKY_RELU, WithOutput("leaky_relu", ("negative_slope", "inplace"))),
    OpRow("elu", ops.ELU, WithOutput("elu", ("alpha",), qparams_after=0)),
    OpRow("prelu", ops.PRELU, Prelu(), check=checks.one_slope),
    OpRow("softmax", ops.SOFTMAX, WithOutput("softmax", ("dim",))),
)

NORMS = (
    OpRow("batch_norm", ops.BATCH_NORM, BatchNorm(), tail=(CLAMPED,), check=checks.running_statistics),
    OpRow("group_norm", ops.GROUP_NORM, WithOutput("group_norm", ("num_groups", *_NORM, "eps"), _NORM)),
    OpRow("instance_norm", ops.INSTANCE_NORM, WithOutput("instance_norm", (*_NORM, "eps"), _NORM, unchecked=True),
          check=checks.input_statistics),
)  # fmt: skip

SELECTING = (
    *(OpRow(op.name, op, Keep(op), out=Out.SHARE) for op in (
        ops.MAX_POOL1D, ops.MAX_POOL3D,
        ops.FLATTEN, ops.RESHAPE, ops.PERMUTE, ops.TRANSPOSE, ops.SQUEEZE, ops.UNSQUEEZE,
        ops.CHUNK, ops.SPLIT, ops.GETITEM, ops.CONTIGUOUS, ops.PIXEL_SHUFFLE,
    )),
    OpRow("max_pool2d", ops.MAX_POOL2D, MaxPool2d(), out=Out.SHARE),
    OpRow("pad", ops.PAD, Keep(ops.PAD), out=Out.SHARE, check=checks.padding),
)  # fmt: skip


def _average(op: ops.Op, check: Check = accept, unchecked: bool = False) -> OpRow:
    return OpRow(op.name, op, Keep(op, unchecked), out=Out.SHARE, averages=True, check=check)


AVERAGING = (
    _average(ops.AVG_POOL1D),
    _average(ops.AVG_POOL2D, checks.no_divisor, unchecked=True),
    _average(ops.AVG_POOL3D, checks.no_divisor, unchecked=True),
    _average(ops.ADAPTIVE_AVG_POOL1D),
    _average(ops.ADAPTIVE_AVG_POOL2D),
    _average(ops.ADAPTIVE_AVG_POOL3D),
    OpRow("mean", ops.MEAN, Mean(), out=Out.SHARE, averages=True, check=checks.dims_given),
    _average(ops.INTERPOLATE, checks.interpolation),
)

LIGHT = ARITHMETIC + ACTIVATIONS + NORMS + SELECTING + AVERAGING


def backend(name: str, rows: tuple[OpRow, ...], weight: QuantSpec, *notes: str) -> Backend:
    """A backend whose engine has its name, with the common specs."""
    return Backend(name, name, rows, ACTIVATION, weight, notes, ABSENT)
