"""A lowered graph whose convolutions are calls of oneDNN itself, made beforehand for one shape; see :mod:`fxq.onednn`.

Everything else runs as in the lowered graph. A convolution writes to memory that is its own for good, so one copy of
the graph serves one caller at a time; as many are made as callers come at once, and share the primitives and weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fxq.backends.kernels import conv_pointwise
from fxq.engine import running
from fxq.errors import BackendError
from fxq.graph_module import REFERENCE, QuantModule
from fxq.int_views import as_quantized, as_uint8
from fxq.interpreter import Interpreter
from fxq.lockstep import bound_arguments
from fxq.onednn import Convolution, ConvolutionCall, ConvSpec, library
from fxq.passes.find_kernels import int_weight

_PACKED = {"conv2d": None, "conv2d_relu": "relu"}  # quantized::..., and what follows


class DirectModel:
    """A lowered model as a function of inputs like those it was made with; any number of threads may call it.

    Each convolution was compared with torch's kernel on the example inputs: integers differ by one at most, where
    the two add in another order and the sum lies next to a tie. A kernel that differs by more is not replaced.

    Attributes:
        convolutions: how many were replaced.

    Raises:
        MissingDependencyError: without oneDNN's C API.
        BackendError: if there is nothing to replace.
    """

    def __init__(self, model: QuantModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        library()
        planner = _Planner(model)
        with running():
            planner.run(*bound_arguments(model, args, kwargs).values())
        if not planner.found:
            raise BackendError("this model has no convolution that oneDNN can run as it is")
        self._model, self._planner = model, planner
        self.convolutions = len(planner.found)
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

    def _copy(self) -> Any:
        graph = fx.Graph(tracer_cls=self._model.graph._tracer_cls)
        copies: dict[Node, Node] = {}
        graph.output(graph.graph_copy(self._model.graph, copies))
        _replace(self._planner, copies, library().stream())
        graph.eliminate_dead_code()
        return fx.GraphModule(self._model, graph).forward


class _Planner(Interpreter):
    """Runs a lowered graph once, makes a primitive of each convolution and compares the two.

    Attributes:
        found: primitives, by the name of the node.
        outputs: an output of each.
        numbers: values of nodes that are no tensors but numbers, which inputs of one shape fix.
    """

    def __init__(self, model: QuantModule) -> None:
        super().__init__(model)
        self.extra_traceback = False
        self.model = model
        self.stream = library().stream()
        self.found: dict[str, Convolution] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, int | float | bool] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op.startswith("call_") and isinstance(value, (int, float, bool)):
            self.numbers[n.name] = value
        spec = self._spec(n) if isinstance(value, torch.Tensor) and value.dim() == 4 else None
        if spec is not None:
            self._try(n, spec, value)
        return value

    def _spec(self, n: Node) -> ConvSpec | None:
        """What a node computes, if it is a convolution of symmetric weights."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target is conv_pointwise:
            return self._pointwise(n, args)
        name = next((name for name in _PACKED if n.target is getattr(torch.ops.quantized, name)), None)
        if name is None:
            return None
        x, packed, scale, zero_point = args
        weight, bias = packed.unpack()
        per_channel = weight.qscheme() is not torch.per_tensor_affine
        zero_points = weight.q_per_channel_zero_points() if per_channel else torch.tensor(weight.q_zero_point())
        if zero_points.any() or not x.numel():
            return None
        scales = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
        geometry = packed.stride(), packed.padding(), packed.dilation(), packed.groups()
        own = x.q_scale(), x.q_zero_point()
        return ConvSpec(weight.int_repr(), scales, bias, *geometry, own, (scale, zero_point), _PACKED[name])

    def _pointwise(self, n: Node, args: tuple[Any, ...]) -> ConvSpec | None:
        _, scale, zero_point, _, scales, _, bias, stride, padding, dilation, groups, *out, activation = args
        region = next(r for r in self.reference.plan.regions if n.name in (*r.nodes, *r.absorbed))
        root = next(node for node in self.reference.graph.nodes if node.name == region.nodes[0])
        weight = int_weight(self.reference, root.args[1])
        geometry = stride, padding, dilation, groups
        return ConvSpec(weight.values, scales, bias, *geometry, (scale, zero_point), (out[0], out[1]), activation)

    @property
    def reference(self) -> QuantModule:
        found: QuantModule = self.model.meta[REFERENCE]
        return found

    def _try(self, n: Node, spec: ConvSpec, expected: torch.Tensor) -> None:
        (x, *_), _ = self.fetch_args_kwargs_from_env(n)
        convolution = Convolution(spec, (x.shape, expected.shape))
        actual = ConvolutionCall(convolution, _memory_like(expected), self.stream)(x)
        difference = (_integers(actual).int() - _integers(expected).int()).abs().max()
        if difference <= 1:
            self.found[n.name], self.outputs[n.name] = convolution, expected


def _integers(x: torch.Tensor) -> torch.Tensor:
    return x.int_repr() if x.is_quantized else x


def _memory_like(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the kind of ``x``, in channels_last."""
    if not x.is_quantized:
        return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    scale, zero_point, order = x.q_scale(), x.q_zero_point(), torch.channels_last
    return torch._empty_affine_quantized(
        x.shape, scale=scale, zero_point=zero_point, dtype=x.dtype, memory_format=order
    )


def _replace(planner: _Planner, copies: Mapping[Node, Node], stream: Any) -> None:
    """Let a copy of the graph call the primitives, each with memory of its own."""
    fixed: dict[Node, torch.Tensor] = {}  # outputs that are the same tensor at each call
    for node, copy in copies.items():
        if node.name in planner.found:
            fixed[copy] = _replace_convolution(copy, node.name, planner, fixed, stream)
        elif node.name in planner.numbers:
            _replace_number(copy, planner.numbers[node.name])


def _replace_convolution(
    node: Node, name: str, planner: _Planner, fixed: Mapping[Node, torch.Tensor], stream: Any
) -> torch.Tensor:
    source: Any = node.args[0]
    if source.target is as_uint8:  # a primitive reads the memory, of whatever kind the tensor is
        source = source.args[0]
    wrapped = [user for user in node.users if user.target is as_quantized]
    like = planner.outputs[name]
    if wrapped:  # the same memory as a quantized tensor, made once
        like = as_quantized(like, *wrapped[0].args[1:])  # type: ignore[arg-type]
        for user in wrapped:
            user.replace_all_uses_with(node)
    call = ConvolutionCall(planner.found[name], _memory_like(like), stream, fixed.get(source))
    node.target, node.args, node.kwargs = call, (source,), {}
    return call.out


def _replace_number(node: Node, number: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda source: _or(number, node, source))


def _or(number: float, node: Node, source: Node) -> Node | float:
    return number if source is node else source
