"""Put one fake-quantize module for each group of slots where an observer would be, for training.

Beside that, values that an op computes anew inside its input's grid, such as averages, are rounded to it, and
activations whose grid a kernel dictates get that grid.
"""

from __future__ import annotations

from typing import Any

from fxq.fake_quantize import FakeQuantize, fake_quantize
from fxq.graph_module import QuantModule
from fxq.observers import Observer
from fxq.op_table import Backend, Out
from fxq.ops import CLAMP
from fxq.passes.insert_observers import InsertObservers
from fxq.plan import Decision, QuantPlan, Slot, Status
from fxq.spec import QuantSpec


class InsertFakeQuantize(InsertObservers):
    """Modules that observe and round, called on the edges of the graph."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        if plan.observers:
            return 0
        inserted = super().run(module, plan)
        for region in plan.regions:
            row = self.backend.row(region.row)
            slot = Slot(region.end)
            new_values = row.averages or row.mixed_inputs or row.op is CLAMP
            if row.out is Out.SHARE and new_values and slot in plan.groups:
                self._round_again(slot, module, plan)
        return inserted

    def observes(self, group: int, plan: QuantPlan) -> bool:
        return True

    def observer(self, spec: QuantSpec, group: int, sources: list[Any], plan: QuantPlan) -> FakeQuantize:
        channels = 1 if spec.ch_axis is None else sources[0].shape[spec.ch_axis]
        return FakeQuantize(spec, channels, weight=bool(sources), fixed=plan.fixed.get(group))

    def settle(self, observer: Observer, tensors: list[Any]) -> None:
        """Weights change in training, so they are observed whenever the model runs."""

    def _round_again(self, slot: Slot, module: QuantModule, plan: QuantPlan) -> None:
        node = next(node for node in module.graph.nodes if node.name == slot.node)
        with module.graph.inserting_after(node):
            grid = module.graph.get_attr(plan.observers[plan.groups[slot]])
        with module.graph.inserting_after(grid):
            rounded = module.graph.create_node(
                "call_function", fake_quantize, (node, grid), name=f"{node.name}_fake_quantize"
            )
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
        plan.decisions[rounded.name] = Decision(Status.SHAPE_ONLY)
