"""x86: fbgemm and onednn behind one engine; the default on Intel and AMD CPUs."""

from __future__ import annotations

from fxq.backends.common import LIGHT, backend, weight_spec, weighted_rows
from fxq.engine import available_engines, cpu_has_vnni
from fxq.op_table import Backend, IntWeight


def conv_engine(weight: IntWeight, groups: int) -> str | None:
    """onednn for convs with many groups.

    The x86 engine hands those to fbgemm, whose depthwise kernel is many times slower where the channels are no
    multiple of 8 or the kernel is dilated (shufflenet, mobile nets at odd widths).
    """
    symmetric = not bool(weight.qparams.zero_point.any())
    return "onednn" if groups > 100 and symmetric and cpu_has_vnni() and "onednn" in available_engines() else None


def build() -> Backend:
    """The x86 table."""
    weight, why = weight_spec()
    return backend("x86", weighted_rows(engine=conv_engine) + LIGHT, weight, why)
