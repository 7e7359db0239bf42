"""x86: fbgemm and onednn behind one engine; the default on Intel and AMD CPUs."""

from __future__ import annotations

from fxq.backends.common import LIGHT, TRANSPOSED_BY_FBGEMM, backend, conv_silu_rows, weight_spec, weighted_rows
from fxq.op_table import Backend


def build() -> Backend:
    """The x86 table."""
    weight, why = weight_spec()
    return backend("x86", conv_silu_rows() + weighted_rows("x86") + TRANSPOSED_BY_FBGEMM + LIGHT, weight, why)
