"""What a row of :mod:`fxq.onnx_rows` is given: the node to write, its arguments and the ONNX graph it goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxq.batch_sizes import Batch, Shaped, Size
from fxq.errors import FxqError
from fxq.graph_module import QuantModule, get_attribute
from fxq.onnx_graph import OnnxGraph
from fxq.ops import VOCABULARY, Dictionary

OPS = Dictionary(VOCABULARY)


class OnnxWriter:
    """One node on its way into an ONNX graph.

    Attributes:
        graph: where rows add nodes.
        node: the node to write.
        values: what was written so far: a name, or a list of names for a node of several tensors.
        sizes: of every node, from :func:`fxq.batch_sizes.sizes`.
        qdq: write QuantizeLinear and DequantizeLinear; else a float graph with clips.
    """

    def __init__(self, module: QuantModule, graph: OnnxGraph, sizes: Mapping[Node, Any], qdq: bool) -> None:
        self.module, self.graph, self.sizes, self.qdq = module, graph, sizes, qdq
        self.values: dict[Node, Any] = {}
        self.node: Node = next(iter(module.graph.nodes))

    # -- the node's arguments

    def get(self, parameter: str) -> Any:
        """A parameter of a canonical node; sizes computed in the graph are numbers or :class:`Batch`."""
        op = OPS.op_of(self.node)
        assert op is not None
        return self.number(op.get(self.node, parameter))

    def number(self, value: Any) -> Any:
        """An argument with nodes that hold sizes replaced by what they hold."""
        if isinstance(value, Node):
            known = self.sizes[value]
            return value if self.holds_tensors(known) else known
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.number, value)) if type(value) in (list, tuple) else [*map(self.number, value)]
        if isinstance(value, slice):
            return slice(*map(self.number, (value.start, value.stop, value.step)))
        return value

    def shape(self, value: Any = None) -> tuple[Size, ...]:
        """The shape of a tensor node, by default of the one that is written."""
        return self.shaped(value).shape

    def shaped(self, value: Any = None) -> Shaped:
        """Shape and dtype of a tensor node, by default of the one that is written."""
        known = self.sizes[self.node if value is None else value]
        if not isinstance(known, Shaped):
            raise self.refusal("it is no tensor")
        return known

    def fixed(self, value: Node, axis: int) -> int:
        """A size that does not follow the batch."""
        size = self.shape(value)[axis]
        if isinstance(size, Batch):
            raise self.refusal(f"it works along dimension {axis}, which is the batch")
        return size

    def batched(self, parameter: str, dims: int) -> Node:
        """A tensor parameter with batch, channels and ``dims`` more dimensions."""
        value = self.get(parameter)
        if len(self.shape(value)) != dims + 2:
            raise self.refusal("its input has no batch")
        return value  # type: ignore[no-any-return]

    def name(self, value: Any) -> str:
        """The ONNX value of a tensor argument; a number becomes a constant of the result's dtype."""
        if isinstance(value, Node):
            written = self.values[value]
            if not isinstance(written, str):
                raise self.refusal("it reads several tensors as one")
            return written
        if isinstance(value, (bool, int, float)):
            return self.graph.constant(value, self.shaped().dtype)
        raise self.refusal(f"it has an argument {value!r}")

    def parameter(self, value: Any, default: float | None = None, like: int = 0) -> str:
        """A constant tensor argument; ``default`` for one of ``like`` values if it is ``None``."""
        if value is None:
            return "" if default is None else self.graph.constant([default] * like, torch.float32)
        return self.name(value)

    def constant_tensor(self, value: Any) -> torch.Tensor | None:
        """The tensor that a node reads from the module, ``None`` if it does not read one."""
        if isinstance(value, Node) and value.op == "get_attr":
            found = get_attribute(self.module, str(value.target))
            return found.detach() if isinstance(found, torch.Tensor) else None
        return None

    def module_tensor(self) -> torch.Tensor:
        """The tensor that the node reads from the module."""
        found = self.constant_tensor(self.node)
        if found is None:
            raise self.refusal("it is no tensor")
        return found

    def holds_tensors(self, known: Any) -> bool:
        """Whether a value of :attr:`sizes` is a tensor or a container of tensors."""
        items = known.values() if isinstance(known, dict) else known if isinstance(known, list) else ()
        return isinstance(known, Shaped) or any(map(self.holds_tensors, items))

    # -- the node's result

    def add(self, op: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """An ONNX node, named after the node that is written."""
        return self.graph.add(op, inputs, name or self.node.name, outputs, **attributes)

    def ints(self, values: Sequence[int]) -> str:
        """A constant of int64, as ONNX takes shapes and axes."""
        return self.graph.constant([*values], torch.int64)

    def reshape(self, name: str, shape: Sequence[Size]) -> str:
        """Reshape; one size may follow the batch."""
        following = sum(isinstance(size, Batch) for size in shape)
        if following > 1:
            raise self.refusal("more than one dimension of its result follows the batch")
        return str(self.add("Reshape", name, self.ints([-1 if isinstance(size, Batch) else size for size in shape])))

    def shape_tensor(self, shape: Sequence[Size]) -> str:
        """A shape as a tensor of int64, with the batch read from the first input."""
        if not any(isinstance(size, Batch) for size in shape):
            return self.ints(shape)  # type: ignore[arg-type]
        batch = self.add("Shape", self.graph.inputs[0].name, start=0, end=1, name="batch_size")
        parts = [
            self.add("Mul", batch, self.ints([size.multiple])) if isinstance(size, Batch) else self.ints([size])
            for size in shape
        ]
        return str(self.add("Concat", *parts, axis=0, name="shape"))

    def refusal(self, why: str) -> FxqError:
        """The error for a node that ONNX cannot hold."""
        what = getattr(self.node.target, "__name__", self.node.target)
        return FxqError(f"{self.module.plan.where(self.node.name)} ({what}) cannot be written as ONNX: {why}")


def pairs(value: Any, dims: int) -> list[int]:
    """One integer for each spatial dimension."""
    values = [value] if isinstance(value, int) else [*value]
    return values * dims if len(values) == 1 else values
