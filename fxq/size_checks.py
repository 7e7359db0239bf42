"""Sizes that float ops refuse, and that some of torch's int8 kernels compute something of.

Int8 convolutions and average pools with windows that do not fit into an image give empty tensors, and so in the end
NaN; qnnpack's convolutions and linears read past the end of inputs of too few channels; a convolution that adds takes
operands of other sizes. A lowered model with such kernels runs its reference graph first, whose ops are the float ones,
where sizes are not known to be taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from fxq.copying import copy_inputs
from fxq.plan import QuantPlan

if TYPE_CHECKING:
    from fxq.graph_module import QuantModule

# Properties of a plan: there is a kernel that computes something of sizes that its float op refuses, or of such sizes
# that are smaller than others that it takes.
UNCHECKED = "sizes unchecked"
UNCHECKED_SMALLER = "smaller sizes unchecked"

Shape = tuple[int, ...]


def are_unchecked(plan: QuantPlan) -> bool:
    """Whether a lowered graph may take sizes that its reference graph refuses; what is recorded of it does not ask."""
    found = UNCHECKED in plan.properties or UNCHECKED_SMALLER in plan.properties
    return found and not torch.jit.is_tracing() and not torch.compiler.is_compiling()  # type: ignore[attr-defined]


class KnownSizes:
    """The sizes that a lowered model takes, as far as is known: those of the example inputs, and those that it had."""

    def __init__(self, reference: QuantModule, plan: QuantPlan) -> None:
        """``plan`` is the lowered model's."""
        self._reference = reference
        self._exactly = UNCHECKED in plan.properties  # that it takes some sizes does not tell of larger ones
        facts = (reference.plan.facts.get(node.name) for node in reference.graph.find_nodes(op="placeholder"))
        self._taken = {tuple(fact.shape for fact in facts if fact is not None)}

    def require(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise what the reference graph raises of inputs, unless their sizes are known."""
        plain = not kwargs and all(type(value) is torch.Tensor for value in args)  # pytree would take 10 us
        leaves = args if plain else tree_leaves((args, kwargs))
        sizes = tuple([leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)])
        if sizes in self._taken or any(self._follow(sizes, taken) for taken in self._taken.copy()):
            return
        with torch.no_grad():
            own_args, own_kwargs = copy_inputs((args, kwargs), own=True)
            self._reference(*own_args, **own_kwargs)
        self._taken.add(sizes)

    def _follow(self, sizes: tuple[Shape, ...], taken: tuple[Shape, ...]) -> bool:
        return len(sizes) == len(taken) and all(map(self._follows, sizes, taken))

    def _follows(self, shape: Shape, taken: Shape) -> bool:
        """Whether a tensor is taken because another is: a window that fits into an image fits into a larger one."""
        if self._exactly or shape[1:2] != taken[1:2] or len(shape) != len(taken):
            return shape[1:] == taken[1:]
        return all(size >= least for size, least in zip(shape[2:], taken[2:], strict=True))
