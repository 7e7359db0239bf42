"""The layers of a reference graph that have an integer weight, and their constants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from fxq.graph_module import BACKEND, QuantModule, free_path, get_attribute, set_tensor
from fxq.numerics import dequantize
from fxq.op_table import Backend
from fxq.ops import Op
from fxq.passes.find_kernels import int_weight
from fxq.passes.layer_weights import count_readers, is_shared
from fxq.qdq import DEQUANTIZE_CHANNEL, is_dequantize


@dataclass(frozen=True)
class QuantLayer:
    """A layer of a reference graph with a constant integer weight.

    Attributes:
        node: calls it; ``op`` is what it calls.
        weight_path: of the integers in the module.
        shape: of the weight.
        channels: outputs.
        bias_path: of its bias, or of where one that it alone reads will be.
    """

    node: Node
    op: Op
    weight_path: str
    shape: tuple[int, ...]
    channels: int
    bias_path: str

    @property
    def dequantize(self) -> Node:
        """The node that dequantizes the weight."""
        found = self.op.get(self.node, "weight")
        assert isinstance(found, Node)
        return found

    def integers(self, reference: QuantModule) -> torch.Tensor:
        """The weight's int8 values."""
        found: torch.Tensor = get_attribute(reference, self.weight_path)
        return found

    def qparams(self, reference: QuantModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero_point in float32, shaped so that they broadcast with the integers."""
        _, scale, zero_point, *axis = self.dequantize.args
        if self.dequantize.target is not DEQUANTIZE_CHANNEL:
            return torch.tensor(scale), torch.tensor(float(zero_point))  # type: ignore[arg-type]
        shape = [1] * len(self.shape)
        shape[axis[0]] = -1  # type: ignore[index]
        tensors = (get_attribute(reference, str(node.target)) for node in (scale, zero_point))  # type: ignore[union-attr]
        first, second = (tensor.float().reshape(shape) for tensor in tensors)
        return first, second

    def dequantized(self, reference: QuantModule) -> torch.Tensor:
        """The real values of the weight."""
        weight = int_weight(reference, self.dequantize)
        return dequantize(weight.values, weight.qparams, weight.ch_axis)

    def bias(self, reference: QuantModule) -> torch.Tensor:
        """The float bias; zeros if there is none."""
        node = self.op.get(self.node, "bias")
        if not isinstance(node, Node):
            return torch.zeros(self.channels)
        found: torch.Tensor = get_attribute(reference, str(node.target))
        return found.detach()

    def set_bias(self, value: torch.Tensor, reference: QuantModule) -> None:
        """Let the layer read this tensor, at ``bias_path``."""
        set_tensor(reference, self.bias_path, nn.Parameter(value, requires_grad=False))
        node = self.op.get(self.node, "bias")
        if not isinstance(node, Node) or str(node.target) != self.bias_path:
            with reference.graph.inserting_before(self.node):
                self.node.update_arg(self.op.index("bias"), reference.graph.get_attr(self.bias_path))

    def float_weight(self, prepared: QuantModule) -> torch.Tensor:
        """The weight before it was quantized."""
        twin = next(node for node in prepared.graph.nodes if node.name == self.node.name)
        source = self.op.get(twin, "weight")
        while source.op != "get_attr":  # past its observer
            source = source.args[0]
        found: torch.Tensor = get_attribute(prepared, str(source.target))
        return found.detach()


def quant_layers(reference: QuantModule) -> list[QuantLayer]:
    """Layers with an integer weight and a bias that is constant or absent, in the order they run."""
    table: Backend = reference.meta[BACKEND]
    ops = table.dictionary
    readers = count_readers(reference)
    taken: set[str] = set()
    found = []
    for node in reference.graph.nodes:
        op = ops.op_of(node)
        if op is None or op.weight is None or op.bias is None:
            continue
        weight, bias = op.get(node, op.weight), op.get(node, op.bias)
        if not is_dequantize(weight) or weight.args[0].op != "get_attr":
            continue
        if bias is None or (isinstance(bias, Node) and bias.op == "get_attr"):
            found.append(_layer(node, op, weight, bias, reference, readers, taken))
    return found


def _layer(
    node: Node,
    op: Op,
    weight: Node,
    bias: Node | None,
    reference: QuantModule,
    readers: Counter[int],
    taken: set[str],
) -> QuantLayer:
    path = str(weight.args[0].target)  # type: ignore[union-attr]
    values = get_attribute(reference, path)
    bias_path = f"{path.rpartition('.')[0]}.bias".removeprefix(".") if bias is None else str(bias.target)
    if bias is None or is_shared(bias, reference, readers):
        bias_path = _free(reference, bias_path, taken)
    taken.add(bias_path)
    groups = op.get(node, "groups") if "groups" in op.signature.defaults else 1
    channels = values.shape[op.weight_axis] * (groups if op.weight_axis else 1)
    return QuantLayer(node, op, path, tuple(values.shape), channels, bias_path)


def _free(reference: QuantModule, path: str, taken: set[str]) -> str:
    candidate, number = free_path(reference, path), 0
    while candidate in taken:
        number += 1
        candidate = free_path(reference, f"{path}_{number}")
    return candidate
