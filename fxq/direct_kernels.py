"""A lowered graph that calls oneDNN itself where it can, made beforehand for one shape; see :mod:`fxq.onednn`.

:mod:`fxq.direct_plan` finds what a primitive computes; everything else runs as in the lowered graph. Primitives write
to places in one block of memory, so one copy of the graph serves one caller at a time; as many are made as callers
come at once, and share the primitives and weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fxq.backends.kernels import conv_pointwise, multiply, narrow_max_pool2d
from fxq.buffer_plan import ALIGNMENT, Span, place
from fxq.direct_plan import PACKED_ADD, Planner, Step, integers
from fxq.engine import running
from fxq.errors import BackendError
from fxq.graph_module import QuantModule
from fxq.int_views import as_quantized, as_uint8
from fxq.interpreter import plain
from fxq.onednn import library
from fxq.onednn_primitives import Convolution, dense_strides

# Kernels whose result is memory of its own. What any other function returns may be a view of what it got.
_FRESH = {
    *(getattr(torch.ops.quantized, name) for name in ("linear", "linear_relu", "add", "add_relu", "mul", "cat",
                                                      "hardswish", "conv2d", "conv2d_relu")),
    torch.max_pool2d, torch.quantize_per_tensor, torch.Tensor.dequantize, torch.clone, conv_pointwise, multiply,
    narrow_max_pool2d, as_uint8,
}  # fmt: skip
_VIEWS = (torch.chunk, torch.split, operator.getitem, torch.flatten, torch.Tensor.reshape)
_READ_STRIDES = (torch.as_strided, "as_strided", "stride", "is_contiguous")


class DirectModel:
    """A lowered model as a function of inputs like those it was made with; any number of threads may call it.

    Each primitive was compared with torch's kernels on the example inputs: integers differ by one at most, where
    the two add in another order and the sum lies next to a tie, and by half a step of the convolution's own output
    where a residual sum or an activation was taken in. What differs by more is not replaced.

    Attributes:
        convolutions: how many were replaced, linears among them.

    Raises:
        MissingDependencyError: without oneDNN's C API.
        BackendError: if there is nothing to replace, or the model reads strides.
    """

    def __init__(self, model: QuantModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        library()
        if any(node.target in _READ_STRIDES for node in model.graph.nodes):
            raise BackendError("this model depends on how tensors lie in memory, which would be otherwise here")
        planner = Planner(model)
        with running():
            planner.run_call(args, kwargs)
        self.convolutions = sum(isinstance(step.kernel, Convolution) for step in planner.steps.values())
        if not self.convolutions:
            raise BackendError("this model has no convolution or linear that oneDNN can run as it is")
        self._model, self._steps, self._numbers = model, planner.steps, planner.numbers
        self._idle = [self._copy()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            run = self._idle.pop()  # one of a list's operations that no other thread can interrupt
        except IndexError:
            run = self._copy()
        try:
            return run(*args, **kwargs)
        finally:
            self._idle.append(run)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> DirectModel:
        return self  # it never changes, and primitives cannot be copied

    def _copy(self) -> Callable[..., Any]:
        graph = fx.Graph(tracer_cls=self._model.graph._tracer_cls)
        copies: dict[Node, Node] = {}
        graph.output(graph.graph_copy(self._model.graph, copies))
        named = {node.name: copy for node, copy in copies.items()}
        for name, number in self._numbers.items():
            _replace_number(named[name], number)
        steps = {named[name]: step for name, step in self._steps.items()}
        for node, step in steps.items():
            sources = [_memory_source(named[name]) for name in step.sources]
            residual = [] if step.residual is None else [_memory_source(named[step.residual])]
            node.target = step  # type: ignore[assignment]  # until it has a place in memory
            node.args, node.kwargs = (*sources, *residual), {}
        for node, step in steps.items():
            steps[node] = _typed(node, step)
        _keep_scales(graph)
        # torch would ask the graph's module of modules that are called, and this graph has none yet
        graph.eliminate_dead_code(lambda node: node.op != "call_module" and node.is_impure())
        _place_calls(graph, {node: steps[node] for node in graph.nodes if node in steps})
        return fx.GraphModule(self._model, graph).forward


def _replace_number(node: Node, number: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda source: _or(number, node, source))


def _or(number: float, node: Node, source: Node) -> Node | float:
    return number if source is node else source


def _memory_source(node: Node) -> Any:
    """The node whose memory holds the integers: a primitive reads them of whatever kind the tensor is."""
    return node.args[0] if node.target is as_uint8 else node


def _typed(node: Node, step: Step) -> Step:
    """The same step, with a quantized tensor as its output if that is how all its readers want it."""
    views = [user for user in node.users if user.target is as_quantized]
    if not views or any(user not in views and not isinstance(user.target, Step) for user in node.users):
        return step
    for view in views:
        view.replace_all_uses_with(node)
    _, scale, zero_point = views[0].args
    return step._replace(qparams=(scale, zero_point))  # type: ignore[arg-type]


def _keep_scales(graph: fx.Graph) -> None:
    """Let torch's own sums in place write to copies: they give the tensor their scale, and those here are made once."""
    for node in [node for node in graph.nodes if node.target in PACKED_ADD]:
        with graph.inserting_before(node):
            node.update_arg(1, graph.call_function(torch.clone, (node.args[1],)))


def _place_calls(graph: fx.Graph, steps: Mapping[Node, Step]) -> None:
    """Give every step its place in memory and make it a call; ``steps`` are in the order of the graph."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    last = _last_reads(graph, order)
    homes = _homes(steps, order, last)
    spans = {home: Span(*span, math.prod(steps[home].shape)) for home, span in _lifetimes(homes, order, last).items()}
    offsets, size = place(list(spans.values()))
    arena = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -arena.data_ptr() % ALIGNMENT
    places = dict(zip(spans, offsets, strict=True))
    scratchpad = torch.empty(max(step.kernel.scratchpad for step in steps.values()), dtype=torch.uint8)
    outputs: dict[Node, Any] = {}
    stream = library().stream()
    for node in graph.nodes:
        step = steps.get(node)
        if step is None:
            _make_view(node, outputs, arena)
            continue
        outputs[node] = out = _view(arena, start + places[homes[node]], step)
        sources: tuple[Any, ...] = node.args[: len(step.sources)]
        fixed = [outputs.get(source) for source in sources]
        call = step.kernel.call(out, stream, fixed, scratchpad)
        moved = step.residual is not None and homes[node] is node
        node.target = _AddTo(call, _view(arena, start + places[node], step._replace(qparams=None))) if moved else call


def _make_view(node: Node, outputs: dict[Node, Any], arena: torch.Tensor) -> None:
    """Make a view of what always lies at the same place beforehand; the node still says what it depends on."""
    if node.target not in _VIEWS or node.kwargs or not all(source in outputs for source in node.all_input_nodes):
        return
    args = plain(node.args, outputs.__getitem__)
    value = node.target(*args)
    tensors = value if isinstance(value, (tuple, list)) else [value]
    memory = arena.untyped_storage().data_ptr()
    if all(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == memory for x in tensors):
        outputs[node] = value
        node.args = tuple(node.all_input_nodes)
        node.target = _Made(value)


class _Made:
    """A function whose value is known."""

    __name__ = "made"

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, *sources: Any) -> Any:
        return self._value


def _view(arena: torch.Tensor, offset: int, step: Step) -> torch.Tensor:
    """A part of the memory as the output of a step."""
    strides = dense_strides(step.shape)
    if step.qparams is None:
        return arena.as_strided(step.shape, strides, offset)
    scale, zero_point = step.qparams
    empty = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=torch.quint8)
    return empty.set_(arena.untyped_storage(), offset, step.shape, strides)


class _AddTo:
    """A convolution that adds to what lies in its output, where the residual lies somewhere else: it is copied."""

    def __init__(self, call: Callable[..., torch.Tensor], memory: torch.Tensor) -> None:
        self.__name__ = call.__name__
        self._call, self._memory = call, memory

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        *inputs, residual = sources
        self._memory.copy_(integers(residual))
        return self._call(*inputs)


def _homes(steps: Mapping[Node, Step], order: Mapping[Node, int], last: Mapping[Node, int]) -> dict[Node, Node]:
    """For each step the one whose place it takes: its own, or that of the residual it is the last to read."""
    homes: dict[Node, Node] = {}
    for node, step in steps.items():
        arguments: tuple[Any, ...] = node.args
        *sources, residual = arguments
        takes_over = step.residual is not None and residual in steps and residual not in _viewed(sources)
        homes[node] = homes[residual] if takes_over and last[residual] == order[node] else node
    return homes


def _lifetimes(
    homes: Mapping[Node, Node], order: Mapping[Node, int], last: Mapping[Node, int]
) -> dict[Node, tuple[int, int]]:
    """First and last step at which each place is in use."""
    found: dict[Node, tuple[int, int]] = {}
    for node, home in homes.items():
        start, end = found.get(home, (order[node], last[node]))
        found[home] = min(start, order[node]), max(end, last[node])
    return found


def _last_reads(graph: fx.Graph, order: Mapping[Node, int]) -> dict[Node, int]:
    """When each node's memory is read for the last time, through views of it too; results are read after the end."""
    last: dict[Node, int] = {}
    for node in reversed(graph.nodes):
        reads = [order[node]]
        for user in node.users:
            reads.append(order[user] if _is_fresh(user) else last[user])
        last[node] = max(reads)
    return last


def _viewed(nodes: Iterable[Node]) -> set[Node]:
    """Some nodes and all whose memory they may be views of."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if _is_fresh(node) else node.all_input_nodes
    return found


def _is_fresh(node: Node) -> bool:
    return node.op == "call_function" and (isinstance(node.target, Step) or node.target in _FRESH)
