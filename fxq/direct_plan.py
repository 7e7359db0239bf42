"""Which nodes of a lowered graph a primitive of oneDNN or a move of bytes computes, found out by running it once.

A convolution takes in the residual sum or activation that follows it, if nothing else reads it: there is then no
rounding, and no clipping to the calibrated range, between the two. Every primitive is compared with torch's kernels
on the example inputs before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node

from fxq.aliases import shape_values
from fxq.backends.kernels import conv_pointwise, multiply, narrow_max_pool2d
from fxq.byte_moves import Join, Move, Shuffle
from fxq.graph_module import REFERENCE, QuantModule
from fxq.interpreter import Interpreter
from fxq.onednn import library
from fxq.onednn_primitives import Convolution, ConvSpec, Gate, GateSpec, Pool, PoolSpec, Primitive, dense
from fxq.passes.find_kernels import int_weight
from fxq.timing import slower

_QUANTIZED = torch.ops.quantized
_Kernels = Mapping[Any, str | None]  # and the activation of each
_PACKED: _Kernels = {_QUANTIZED.conv2d: None, _QUANTIZED.conv2d_relu: "relu"}
_LINEAR: _Kernels = {_QUANTIZED.linear: None, _QUANTIZED.linear_relu: "relu"}
PACKED_ADD: _Kernels = {_QUANTIZED.conv2d_add: None, _QUANTIZED.conv2d_add_relu: "relu"}
_ADD: _Kernels = {_QUANTIZED.add: None, _QUANTIZED.add_relu: "relu"}
# The activation, and how much faster than its input it grows at most.
_ACTIVATIONS: Mapping[Any, tuple[str, float]] = {
    _QUANTIZED.hardswish: ("hardswish", 1.5), torch.sigmoid: ("sigmoid", 0.25), F.hardsigmoid: ("hardsigmoid", 1 / 6),
}  # fmt: skip
_SILU_SLOPE = 1.1
_Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups
_MOVES = (torch.Tensor.reshape, torch.transpose, torch.permute, torch.Tensor.contiguous)
_SHUFFLE_MOVES = 3  # at least


class Step(NamedTuple):
    """A direct kernel and what it stands for.

    Attributes:
        kernel: with one output of uint8.
        sources: names of the nodes it reads.
        residual: name of the node that is added; it is to lie where the output will.
        shape: of the output, channels_last.
        qparams: scale and zero_point of the output as a quint8 tensor; ``None`` for a plain uint8 one.
    """

    kernel: Primitive | Move
    sources: tuple[str, ...]
    residual: str | None
    shape: tuple[int, ...]
    qparams: tuple[float, int] | None


class Planner(Interpreter):
    """Runs a lowered graph once and makes the primitives.

    Attributes:
        steps: by the name of the node whose value a primitive gives.
        numbers: values of nodes that are no tensors but numbers computed from shapes, which inputs of one shape fix.
    """

    def __init__(self, model: QuantModule) -> None:
        super().__init__(model)
        self.extra_traceback = False
        self.model = model
        self.stream = library().stream()
        self.steps: dict[str, Step] = {}
        self.numbers: dict[str, int | float | bool] = {}
        self._of_shapes = shape_values(model.graph)
        self._overwritten: torch.Tensor | None = None
        self._joined: tuple[Node, list[torch.Tensor]] | None = None  # the last join and what it joined
        self._joins: dict[tuple[Node, ...], Node] = {}  # by what they join

    @property
    def reference(self) -> QuantModule:
        found: QuantModule = self.model.meta[REFERENCE]
        return found

    def run_node(self, n: Node) -> Any:
        if n.target in PACKED_ADD:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._overwritten = args[1].clone()
        value = super().run_node(n)
        if n in self._of_shapes and isinstance(value, (int, float, bool)):
            self.numbers[n.name] = value
        elif isinstance(value, torch.Tensor) and value.dim() in (2, 4) and value.numel() and n.name not in self.steps:
            make = _MAKERS.get(n.target)
            args, _ = self.fetch_args_kwargs_from_env(n)
            if make is not None and (n.target is _QUANTIZED.cat or args[0].numel()):
                make(self, n, args, value)
        return value

    # -- one method for each kind of kernel, called with the node, its arguments and its value

    def packed_convolution(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        x, packed, *_ = args
        spec = _packed_spec(x, packed, _qparams(value), _PACKED[n.target])
        if spec is None:
            return
        alone = Convolution(spec, x.shape, value.shape)
        run = alone.call(_room(value), self.stream, [x])
        if _may_lose(spec) and slower(lambda: run(x), lambda: n.target(*args)):  # type: ignore[operator]
            return
        if not self._with_tail(n, args, value, spec):
            self._take(n, alone, (n.args[0],), (x,), _Expected(value))

    def packed_convolution_add(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        x, _, packed, *_ = args
        residual, self._overwritten = self._overwritten, None  # the kernel gave its own scale to the tensor, too
        spec = _packed_spec(x, packed, _qparams(value), PACKED_ADD[n.target])
        if spec is not None and residual is not None and n.args[0] is not n.args[1]:
            spec = spec._replace(residual=_qparams(residual))
            expected = _Expected(value, residual=residual)
            self._take(n, Convolution(spec, x.shape, value.shape), (n.args[0],), (x,), expected, n.args[1])

    def linear(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        """A convolution of images of one pixel."""
        x, packed, *_ = args
        pixel: _Geometry = (1, 1), (0, 0), (1, 1), 1
        spec = _spec(packed, pixel, _qparams(x), _qparams(value), _LINEAR[n.target])
        if spec is not None and x.dim() == 2:
            self._take(n, Convolution(spec, x.shape, value.shape), (n.args[0],), (x,), _Expected(value))

    def plain_convolution(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        x, scale, zero_point, _, scales, _, bias, *geometry, activation = args
        *geometry, out_scale, out_zero_point = geometry
        region = next(r for r in self.reference.plan.regions if n.name in (*r.nodes, *r.absorbed))
        root = next(node for node in self.reference.graph.nodes if node.name == region.nodes[0])
        weight = int_weight(self.reference, root.args[1]).values
        stride, padding, dilation, groups = geometry
        qparams = (scale, zero_point), (out_scale, out_zero_point)
        spec = ConvSpec(weight, scales, bias, stride, padding, dilation, groups, *qparams, activation)
        self._take(n, Convolution(spec, x.shape, value.shape), (n.args[0],), (x,), _Expected(value))

    def max_pool(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        """torch's kernel takes less time, but for images of few channels and for residuals, which should lie here."""
        x, size, stride, padding, dilation, _ = args
        pays = n.target is narrow_max_pool2d or any(user.target in _ADD for user in n.users)
        if pays and x.dtype == torch.quint8 and set(dilation) == {1}:
            self._take_pool(n, x, value, PoolSpec(False, size, stride, padding))

    def average(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        x = args[0]
        if x.dtype == torch.quint8 and value.shape[2:] == (1, 1):
            self._take_pool(n, x, value, PoolSpec(True, x.shape[2:], x.shape[2:], (0, 0)))

    def gate(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        (x, image), (factor, gate) = sorted(zip(args[:2], n.args[:2], strict=True), key=lambda pair: -pair[0].numel())
        if x.dim() == 4 and factor.shape == (*x.shape[:2], 1, 1) and factor.q_zero_point() == 0:
            kernel = Gate(GateSpec(_qparams(x), _qparams(factor), _qparams(value)), x.shape)
            run = kernel.call(_room(value), self.stream, [x, factor])
            if not slower(run, lambda: n.target(*args)):  # type: ignore[operator]
                self._take(n, kernel, (image, gate), (x, factor), _Expected(value))

    def join(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        """What was joined before is taken as it lies there: layers of a dense block join all that came before."""
        parts, dim, *qparams = args
        if dim != 1 or value.dim() != 4 or any(_qparams(x) != tuple(qparams) for x in parts):
            return
        self._joined = n, parts
        sources = _sources(n)
        known = next((end for end in range(len(parts) - 1, 1, -1) if tuple(sources[:end]) in self._joins), 0)
        if known:
            parts = [_QUANTIZED.cat(parts[:known], *args[1:]), *parts[known:]]
            sources = [self._joins[tuple(sources[:known])], *sources[known:]]
        run = Join().call(_room(value), self.stream, parts)
        if not slower(run, lambda: _QUANTIZED.cat(*args)) and self._take(n, Join(), sources, parts, _Expected(value)):
            self._joins[tuple(_sources(n))] = n

    def shuffle(self, n: Node, args: tuple[Any, ...], value: torch.Tensor) -> None:
        """The end of a join whose channels change places: reshaped, transposed and reshaped again."""
        moves = [n]
        while moves[-1].target in _MOVES and isinstance(source := moves[-1].args[0], Node):
            moves.append(source)
        if self._joined is None or moves.pop() is not self._joined[0] or len(moves) < _SHUFFLE_MOVES:
            return
        join, parts = self._joined
        if len(parts) == 2 and parts[0].shape == parts[1].shape and self._interleaves(moves[::-1], value.shape):
            self._take(n, Shuffle(parts[0].shape), _sources(join), parts, _Expected(value))

    def _interleaves(self, moves: list[Node], shape: torch.Size) -> bool:
        """Whether channels are taken by turns from the first and the second half; found out with their numbers."""
        numbers = torch.arange(shape[1]).reshape(1, -1, 1, 1).expand(shape)
        found = numbers
        for node in moves:
            if any(source.name not in self.numbers for source in node.all_input_nodes[1:]):
                return False
            arguments = fx.map_arg(node.args[1:], lambda source: self.numbers[source.name])
            found = node.target(found, *arguments)  # type: ignore[operator]
        halves = numbers.unflatten(1, (2, -1))
        return torch.equal(found, torch.stack([halves[:, 0], halves[:, 1]], 2).flatten(1, 2))

    def _take_pool(self, n: Node, x: torch.Tensor, value: torch.Tensor, spec: PoolSpec) -> None:
        self._take(n, Pool(spec, x.shape, value.shape), (n.args[0],), (x,), _Expected(value))

    # -- what follows a convolution

    def _with_tail(self, n: Node, args: tuple[Any, ...], value: torch.Tensor, spec: ConvSpec) -> bool:
        """Take a convolution together with its only reader, if that can be; returns whether it was."""
        tail = next(iter(n.users))
        kernel = self.model.plan.kernels.get(n.name)
        clips = kernel is None or bool(kernel.fused)  # what it absorbed would be missing between the two
        if len(n.users) > 1 or clips or spec.activation is not None or tail.all_input_nodes.count(n) > 1:
            return False
        if tail.target in _ADD:
            return self._with_residual(n, tail, args[0], value, spec)
        found = _activated(tail, value)
        if found is None:
            return False
        end, activation, expected = found
        whole = spec._replace(output=_qparams(expected.value), activation=activation)
        return self._take(end, Convolution(whole, args[0].shape, value.shape), (n.args[0],), (args[0],), expected)

    def _with_residual(self, n: Node, tail: Node, x: torch.Tensor, value: torch.Tensor, spec: ConvSpec) -> bool:
        first, second, scale, zero_point = tail.args
        other: Any = second if first is n else first
        residual = self.env.get(other)
        if other is n or residual is None or residual.shape != value.shape:
            return False
        out: Any = scale, zero_point
        whole = spec._replace(output=out, activation=_ADD[tail.target], residual=_qparams(residual))
        result = tail.target(value, residual, scale, zero_point)  # type: ignore[operator]
        expected = _Expected(result, residual=residual, between=value)
        return self._take(tail, Convolution(whole, x.shape, value.shape), (n.args[0],), (x,), expected, other)

    def _take(
        self,
        n: Node,
        kernel: Primitive | Move,
        sources: Sequence[Any],
        values: Sequence[torch.Tensor],
        expected: _Expected,
        residual: Any = None,
    ) -> bool:
        """Take a kernel for a node, if its integers are those of torch's kernels."""
        out = _room(expected.value)
        if expected.residual is not None:
            out.copy_(integers(expected.residual))
        found = kernel.call(out, self.stream)(*values)
        if not expected.agrees(found):
            return False
        qparams = _qparams(expected.value) if expected.value.is_quantized else None
        names = tuple(source.name for source in sources)
        shape = tuple(expected.value.shape)
        self.steps[n.name] = Step(kernel, names, None if residual is None else residual.name, shape, qparams)
        return True


class _Expected(NamedTuple):
    """What a primitive has to give.

    Attributes:
        value: of torch's kernels.
        residual: what is added.
        between: the value after the convolution alone, of which the primitive keeps more than 8 bits.
        slope: how much faster than its input what follows grows at most.
    """

    value: torch.Tensor
    residual: torch.Tensor | None = None
    between: torch.Tensor | None = None
    slope: float = 1.0

    def agrees(self, found: torch.Tensor) -> bool:
        """Whether integers differ by one at most, and by what the rounding between amounts to.

        Where the value between is the smallest or largest integer, it may have been clipped: these are left out.
        """
        difference = (found.int() - integers(self.value).int()).abs()
        if self.between is None:
            return bool((difference <= 1).all())
        between = integers(self.between)
        inside = (between > 0) & (between < 255)
        rounding = self.slope * self.between.q_scale() / self.value.q_scale() / 2
        return bool((difference <= 1 + math.floor(rounding))[inside].all())


def _activated(tail: Node, value: torch.Tensor) -> tuple[Node, str, _Expected] | None:
    """The node at which an activation of a convolution's value ends, the activation and its value."""
    if tail.target in _ACTIVATIONS:
        name, slope = _ACTIVATIONS[tail.target]
        result = tail.target(value, *tail.args[1:])  # type: ignore[operator]
        return tail, name, _Expected(result, between=value, slope=slope)
    chain = [tail]
    for target in (F.silu, torch.quantize_per_tensor):  # in float, for want of an int8 kernel
        following = list(chain[-1].users)
        if chain[0].target is not torch.Tensor.dequantize or len(following) > 1 or following[0].target is not target:
            return None
        chain += following
    result = torch.quantize_per_tensor(F.silu(value.dequantize()), *chain[-1].args[1:])  # type: ignore[arg-type]
    return chain[-1], "swish", _Expected(result, between=value, slope=_SILU_SLOPE)


_MAKERS: Mapping[Any, Callable[[Planner, Node, tuple[Any, ...], torch.Tensor], None]] = {
    **dict.fromkeys(_PACKED, Planner.packed_convolution),
    **dict.fromkeys(PACKED_ADD, Planner.packed_convolution_add),
    conv_pointwise: Planner.plain_convolution,
    **dict.fromkeys(_LINEAR, Planner.linear),
    **dict.fromkeys((torch.max_pool2d, narrow_max_pool2d), Planner.max_pool),
    F.adaptive_avg_pool2d: Planner.average,
    multiply: Planner.gate,
    _QUANTIZED.cat: Planner.join,
    torch.Tensor.reshape: Planner.shuffle,
}


def _sources(join: Node) -> Sequence[Any]:
    return join.args[0]  # type: ignore[return-value]


def _room(value: torch.Tensor) -> torch.Tensor:
    """Memory for the integers of a value."""
    return dense(torch.empty(value.shape, dtype=torch.uint8))


def _may_lose(spec: ConvSpec) -> bool:
    """Whether torch, which has fbgemm too, may be faster: at dense kernels of many pixels it is."""
    return spec.groups == 1 and math.prod(spec.weight.shape[2:]) > 1


def integers(x: torch.Tensor) -> torch.Tensor:
    """A quantized tensor's integers, or the tensor."""
    return x.int_repr() if x.is_quantized else x


def _qparams(x: torch.Tensor) -> tuple[float, int]:
    return x.q_scale(), x.q_zero_point()


def _packed_spec(
    x: torch.Tensor, packed: Any, output: tuple[float, int], activation: str | None
) -> ConvSpec | None:
    """What a packed convolution computes."""
    geometry: _Geometry = packed.stride(), packed.padding(), packed.dilation(), packed.groups()
    return _spec(packed, geometry, _qparams(x), output, activation)


def _spec(
    packed: Any,
    geometry: _Geometry,
    source: tuple[float, int],
    output: tuple[float, int],
    activation: str | None,
) -> ConvSpec | None:
    """What a layer of a packed weight computes, if that is symmetric."""
    weight, bias = packed.unpack()
    per_channel = weight.qscheme() is not torch.per_tensor_affine
    zero_points = weight.q_per_channel_zero_points() if per_channel else torch.tensor(weight.q_zero_point())
    if zero_points.any():
        return None
    scales = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
    values = weight.int_repr()
    values = values.reshape(*values.shape, 1, 1) if values.dim() == 2 else values
    return ConvSpec(values, scales, bias, *geometry, source, output, activation)
