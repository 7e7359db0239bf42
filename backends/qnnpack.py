"""qnnpack: the ARM engine, also built for x86, where it is slow and good for checking numbers only."""

from __future__ import annotations

from fxq.backends.common import LIGHT, WEIGHT, backend, weighted_rows
from fxq.op_table import Backend, Weights


def build() -> Backend:
    """The qnnpack table: alone in running per-channel transposed convolutions."""
    why = "8-bit weights and activations: qnnpack widens to 16 bits before multiplying, so nothing saturates"
    return backend("qnnpack", weighted_rows(Weights.TENSOR | Weights.CHANNEL) + LIGHT, WEIGHT, why)
