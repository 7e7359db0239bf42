"""An ONNX graph under construction: names, initializers and nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxq.batch_sizes import Batch, Shaped, Size
from fxq.errors import MissingDependencyError

OPSET = 18
IR_VERSION = 9
BATCH = "batch"  # the name of the dynamic dimension


def import_onnx() -> Any:
    """The onnx package.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingDependencyError("writing ONNX needs the onnx package: pip install 'fxq[onnx]'") from error
    return onnx


class OnnxGraph:
    """Collects nodes and initializers; values are names."""

    def __init__(self) -> None:
        self.onnx = import_onnx()
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._names: set[str] = set()
        self._constants: dict[Any, str] = {}

    def free_name(self, wish: str) -> str:
        """``wish``, or ``wish_1``, ``wish_2``, ... where that is taken."""
        name, number = wish, 0
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name

    def add(self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; returns the name of its output, or a list of them if there are several.

        Args:
            inputs: names of values, ``""`` for an optional input left out.
            name: wished for the node and its output.
        """
        made = [self.free_name(name if outputs == 1 else f"{name}_{i}") for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), made, name=made[0], **attributes))
        return made[0] if outputs == 1 else made

    def tensor(self, tensor: torch.Tensor, name: str) -> str:
        """An initializer."""
        tensor = tensor.detach().contiguous()
        kind = self.kind(tensor.dtype)
        content = tuple(tensor.flatten().tolist()) if tensor.numel() <= 4 else (tensor.data_ptr(),)
        key = (kind, tuple(tensor.shape), content)
        if key not in self._constants:
            self._constants[key] = self.free_name(name)
            raw = tensor.numpy().tobytes()
            self.initializers[self._constants[key]] = (
                self.onnx.helper.make_tensor(self._constants[key], kind, tensor.shape, raw, raw=True),
                tensor,  # kept, so that its address stays its own
            )
        return self._constants[key]

    def constant(self, values: Any, dtype: torch.dtype, name: str = "constant") -> str:
        """An initializer of Python numbers."""
        return self.tensor(torch.tensor(values, dtype=dtype), name)

    def kind(self, dtype: torch.dtype) -> int:
        """The number ONNX has for a dtype."""
        names = {
            torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16",
            torch.int8: "INT8", torch.uint8: "UINT8", torch.int16: "INT16", torch.int32: "INT32",
            torch.int64: "INT64", torch.bool: "BOOL",
        }  # fmt: skip
        return int(getattr(self.onnx.TensorProto, names[dtype]))

    def describe(self, name: str, shaped: Shaped) -> Any:
        """Type and shape of an input or output."""
        return self.onnx.helper.make_tensor_value_info(name, self.kind(shaped.dtype), [*map(dimension, shaped.shape)])

    def model(self, name: str, notes: dict[str, str]) -> Any:
        """The finished model, without what its outputs do not need."""
        helper = self.onnx.helper
        needed = {output.name for output in self.outputs}
        nodes = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        initializers = [proto for key, (proto, _) in self.initializers.items() if key in needed]
        graph = helper.make_graph(nodes[::-1], name, self.inputs, self.outputs, initializers)
        model = helper.make_model(
            graph, producer_name="fxq", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        helper.set_model_props(model, notes)
        return model


def dimension(size: Size) -> int | str:
    """A size as ONNX writes it: a number or a name."""
    if not isinstance(size, Batch):
        return size
    return BATCH if size.multiple == 1 else f"{size.multiple}*{BATCH}"
