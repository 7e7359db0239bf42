"""The tensors that kernels take on trust: scales of weights, zero points and biases, as they come from a file."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx import Node

from fxq.errors import FileFormatError
from fxq.graph_module import get_attribute
from fxq.ops import VOCABULARY, Dictionary
from fxq.qdq import DEQUANTIZE_CHANNEL, is_dequantize

_OPS = Dictionary(VOCABULARY)
_SMALLEST = torch.finfo(torch.float32).tiny  # some kernels take smaller scales for zero


def check_tensors(module: fx.GraphModule) -> None:
    """Verify the tensors of a reference graph that kernels read without a look at their types and numbers.

    Raises:
        FileFormatError: naming the node that reads one.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is DEQUANTIZE_CHANNEL:
            _check_channels(module, node)
        op = _OPS.op_of(node)
        if op is None or op.weight is None or op.bias is None or not is_dequantize(op.get(node, op.weight)):
            continue
        bias = op.get(node, op.bias)
        if isinstance(bias, Node) and bias.op == "get_attr" and not _is_real(_tensor(module, bias)):
            raise FileFormatError(f"the bias of node '{node.name}' is not of finite float32 numbers")


def _check_channels(module: fx.GraphModule, node: Node) -> None:
    if len(node.args) != 4 or node.kwargs or type(node.args[3]) is not int:
        raise FileFormatError(f"node '{node.name}' has other arguments than a weight, scales, zero points and an axis")
    weight, scale, zero_point = (_tensor(module, value) for value in node.args[:3])
    axis = node.args[3]
    if weight.dtype != torch.int8 or not 0 <= axis < weight.dim():
        raise FileFormatError(f"node '{node.name}' reads a weight that is not of int8 or has no axis {axis}")
    channels = weight.shape[axis : axis + 1]
    if scale.shape != channels or not _is_real(scale) or bool((scale < _SMALLEST).any()):
        raise FileFormatError(f"node '{node.name}' has no valid scale for each channel")
    integers = not (zero_point.is_floating_point() or zero_point.is_complex()) and zero_point.shape == channels
    if not integers or bool(((zero_point < -128) | (zero_point > 127)).any()):
        raise FileFormatError(f"node '{node.name}' has no valid zero point for each channel")


def _tensor(module: fx.GraphModule, value: object) -> torch.Tensor:
    if not isinstance(value, Node) or value.op != "get_attr":
        raise FileFormatError(f"'{value}' stands where a tensor of the file is due")
    found: torch.Tensor = get_attribute(module, str(value.target)).detach()
    return found


def _is_real(values: torch.Tensor) -> bool:
    return values.dtype == torch.float32 and bool(values.isfinite().all())
