"""A backend's table with what exists in training only: ops that do nothing in eval mode.

They select their input's values as far as int8 is concerned, so they share its qparams, and they are gone when
training is finished.
"""

from __future__ import annotations

import dataclasses
import sys

from torch.fx import Node

from fxq.errors import PlanError
from fxq.op_table import Backend, Emission, OpRow, Out
from fxq.ops import DROPOUT, Op


class _Nothing:
    kernel = ""

    def __call__(self, emission: Emission, /) -> Node:
        raise PlanError(f"'{emission.nodes[0].name}' exists in training only, and is lowered")


def training_table(backend: Backend) -> Backend:
    """The table that a model is annotated with to be trained."""
    own = {row.op for row in backend.rows}
    rows = [OpRow(op.name, op, _Nothing(), out=Out.SHARE) for op in _training_ops() if op not in own]
    return dataclasses.replace(backend, rows=(*backend.rows, *rows))


def training_rows() -> frozenset[str]:
    """Names of the rows that exist in training only."""
    return frozenset(op.name for op in _training_ops())


def _training_ops() -> list[Op]:
    # A model that calls it has imported it; torchvision need not be installed.
    module = sys.modules.get("torchvision.ops.stochastic_depth")
    if module is None:
        return [DROPOUT]
    return [DROPOUT, Op("stochastic_depth", module.stochastic_depth, "input, p, mode, training=True")]
