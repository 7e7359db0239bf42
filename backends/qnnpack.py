"""qnnpack: the ARM engine, also built for x86, where it is slow and good for checking numbers only."""

from __future__ import annotations

from fxq import ops
from fxq.backends import checks
from fxq.backends.common import BOTH, LIGHT, WEIGHT, backend, fbgemm_transposed, transposed_row, weighted_rows
from fxq.op_table import Backend, OpRow, Weights


def _transposed(op: ops.Op, dims: int) -> tuple[OpRow, ...]:
    """Per-channel weights with one group; with more the kernel reads scales that are not there."""
    return (
        transposed_row(op, dims, BOTH, checks.one_group(dims + 2), "qnnpack"),
        transposed_row(op, dims, Weights.TENSOR | Weights.AFFINE, checks.rank(dims + 2), "qnnpack",
                       f"{op.name} grouped"),
    )  # fmt: skip


TRANSPOSED = (
    *_transposed(ops.CONV_TRANSPOSE1D, 1),
    *_transposed(ops.CONV_TRANSPOSE2D, 2),
    fbgemm_transposed(ops.CONV_TRANSPOSE3D, 3),
)


def build() -> Backend:
    """The qnnpack table: alone in running per-channel transposed convolutions."""
    why = "8-bit weights and activations: qnnpack widens to 16 bits before multiplying, so nothing saturates"
    return backend("qnnpack", weighted_rows("qnnpack") + TRANSPOSED + LIGHT, WEIGHT, why)
