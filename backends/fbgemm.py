"""fbgemm: the x86 server engine that torch has had longest."""

from __future__ import annotations

from fxq.backends.common import LIGHT, TRANSPOSED_BY_FBGEMM, backend, weight_spec, weighted_rows
from fxq.op_table import Backend


def build() -> Backend:
    """The fbgemm table."""
    weight, why = weight_spec()
    return backend("fbgemm", weighted_rows("fbgemm") + TRANSPOSED_BY_FBGEMM + LIGHT, weight, why)
