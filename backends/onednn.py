"""onednn: the engine that adds a residual in the convolution's accumulator."""

from __future__ import annotations

from fxq import ops
from fxq.backends import checks
from fxq.backends.common import LIGHT, TRANSPOSED_BY_FBGEMM, backend, conv_silu_rows, weight_spec, weighted_rows
from fxq.backends.kernels import PackedConvAdd
from fxq.op_table import CLAMPED, Backend, OpRow, Weights

CONV_ADD = OpRow(
    "conv2d_add", ops.CONV2D, PackedConvAdd(), tail=(ops.ADD, CLAMPED), weight=Weights.TENSOR | Weights.CHANNEL,
    check=checks.same_shape, relu_kernel=True, heavy=True,
)  # fmt: skip


def build() -> Backend:
    """The onednn table."""
    weight, why = weight_spec()
    weighted = (CONV_ADD, *conv_silu_rows(), *weighted_rows("onednn"))
    return backend("onednn", weighted + TRANSPOSED_BY_FBGEMM + LIGHT, weight, why)
