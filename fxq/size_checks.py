"""Sizes that float ops refuse, and that some of torch's int8 kernels compute something of.

Int8 convolutions and average pools with windows that do not fit into an image give empty tensors, and so in the end
NaN; qnnpack's convolutions and linears read past the end of inputs of too few channels; a convolution that adds takes
operands of other sizes. A lowered model with such kernels runs its reference graph first, whose ops are the float ones,
where sizes are not known to be taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxq.copying import copy_inputs
from fxq.errors import InputError
from fxq.interpreter import Interpreter
from fxq.ops import ADD
from fxq.plan import QuantPlan

if TYPE_CHECKING:
    from fxq.graph_module import QuantModule

# Properties of a plan: there is a kernel that computes something of sizes that its float op refuses, or of such sizes
# that are smaller than others that it takes.
UNCHECKED = "sizes unchecked"
UNCHECKED_SMALLER = "smaller sizes unchecked"

Shape = tuple[int, ...]
Sizes = tuple[Shape, ...]


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
        self._sums = _fused_sums(reference)
        facts = (reference.plan.facts.get(node.name) for node in reference.graph.find_nodes(op="placeholder"))
        self._taken = {tuple(fact.shape for fact in facts if fact is not None)}

    def require(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise what the reference graph raises of inputs, unless their sizes are known."""
        plain = not kwargs and all(type(value) is torch.Tensor for value in args)  # pytree would take 10 us
        leaves = args if plain else tree_leaves((args, kwargs))
        sizes = tuple([leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)])
        if sizes in self._taken or self._follow(sizes, self._taken.copy()):
            return
        with torch.no_grad():
            Trial(self._reference, self._sums).run_call(*copy_inputs((args, kwargs), own=True))
        self._taken.add(sizes)

    def _follow(self, sizes: Sizes, taken: Iterable[Sizes]) -> bool:
        """Whether sizes are taken because others are."""
        if not self._exactly:
            return any(len(sizes) == len(known) and all(map(_covers, sizes, known)) for known in taken)
        alike = [known for known in taken if [shape[1:] for shape in known] == [shape[1:] for shape in sizes]]
        return any(_between(sizes, low, high) for low, high in itertools.product(alike, repeat=2))


def _covers(shape: Shape, least: Shape) -> bool:
    """Whether a tensor is taken because another is: a window that fits into an image fits into a larger one."""
    if shape[1:2] != least[1:2] or len(shape) != len(least):
        return shape[1:] == least[1:] and shape[:1] >= least[:1]
    return all(size >= smallest for size, smallest in zip(shape, least, strict=True))


def _between(sizes: Sizes, low: Sizes, high: Sizes) -> bool:
    """Whether sizes differ from two others, between which they are, by one number only: that of the first axes.

    It need not be a batch. What layers get of it, they get of what is in between.
    """
    firsts = {(a[:1], size[:1], b[:1]) for size, a, b in zip(sizes, low, high, strict=True)}
    growing = [first for first in firsts if first[0] != first[2]]
    return len(growing) <= 1 and all(a <= size <= b for a, size, b in firsts)


def _fused_sums(reference: QuantModule) -> dict[str, str]:
    """The sums that kernels of other ops compute, and the names of these kernels' rows."""
    nodes = {node.name: node for node in reference.graph.nodes}
    tails = {name: region.row for region in reference.plan.regions for name in region.nodes[1:]}
    return {name: row for name, row in tails.items() if name in nodes and nodes[name].target is ADD.target}


class Trial(Interpreter):
    """Runs a reference graph for what it raises, without its code, which would take more memory to compile.

    Args:
        sums: that must have operands of one size: in float others are broadcast, in the memory of one of them there is
            no room for it.
    """

    def __init__(self, module: QuantModule, sums: Mapping[str, str]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._plan, self._sums = module.plan, sums

    def run_node(self, n: Node) -> Any:
        if n.name in self._sums:
            shapes = [list(operand.shape) for operand in self.fetch_args_kwargs_from_env(n)[0][:2]]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{self._plan.where(n.name)} adds tensors of sizes {shapes[0]} and {shapes[1]}, which "
                    f"{self._sums[n.name]} cannot; quantize with example inputs of these sizes"
                )
        return super().run_node(n)
