"""The contract of a pass, and the pipeline that runs passes and checks each one's work."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from fxq.errors import PlanError
from fxq.graph_module import QuantModule
from fxq.plan import QuantPlan


class Pass(abc.ABC):
    """One transformation of a graph and its plan.

    ``requires`` and ``ensures`` name properties of the plan (``QuantPlan.properties``); a pass run on a graph
    that lacks what it requires is a bug, reported as PlanError. Running a pass twice changes nothing more.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        return type(self).__name__

    @abc.abstractmethod
    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        """Transform in place; returns the number of changes."""


class Pipeline:
    """A flat list of passes; prints as one line a pass."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)

    def __call__(self, module: QuantModule) -> dict[str, int]:
        """Run all passes; after each, the plan is checked and a changed graph linted. Returns changes by pass."""
        plan = module.plan
        changes: dict[str, int] = {}
        for step in self.passes:
            missing = step.requires - plan.properties
            if missing:
                raise PlanError(f"pass {step.name} requires {sorted(missing)}; have {sorted(plan.properties)}")
            changes[step.name] = step.run(module, plan)
            plan.properties |= step.ensures
            if changes[step.name]:
                module.graph.lint()
            plan.check(module.graph)
        _release_erased(module.graph)
        module.recompile()
        return changes

    def __str__(self) -> str:
        return " -> ".join(step.name for step in self.passes)


def _release_erased(graph: fx.Graph) -> None:
    """Let nodes go that passes erased; torch.fx keeps them in its table of names. Their names stay taken."""
    names = graph._graph_namespace._obj_to_name
    for node in [named for named in names if isinstance(named, fx.Node) and named._erased]:
        del names[node]
