"""Take out of each layer's bias what rounding its weight adds to the mean of its output.

``(W - W_int8) * E[input]``: section 4.2 of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv:1906.04721), with means recorded while calibrating. It costs next to nothing, at run time nothing.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.fx import Node

from fxq.graph_module import QuantModule, free_path, get_attribute, set_tensor
from fxq.input_means import InputMeans
from fxq.numerics import dequantize, quantize
from fxq.ops import Dictionary
from fxq.pass_base import Pass
from fxq.passes.layer_weights import constant_response, count_readers, is_shared
from fxq.plan import QuantPlan, Slot


class CorrectBias(Pass):
    """Biases of layers whose input means were recorded; the recorders go."""

    requires = frozenset({"observed"})

    def __init__(self, ops: Dictionary) -> None:
        self.ops = ops

    def run(self, module: QuantModule, plan: QuantPlan) -> int:
        readers = count_readers(module)
        nodes = {node.name: node for node in module.graph.nodes}
        corrected = 0
        for name, path in plan.input_means.items():
            means = module.get_submodule(path)
            assert isinstance(means, InputMeans)
            corrected += self._correct(nodes[name], means.shrunken(), module, plan, readers)
        _drop_recorders(module, plan)
        if corrected:
            plan.notes = [*plan.notes, f"biases corrected: {corrected} layers, for the rounding of their weights"]
        return corrected

    def _correct(
        self, layer: Node, mean: torch.Tensor, module: QuantModule, plan: QuantPlan, readers: Counter[int]
    ) -> bool:
        op = self.ops.op_of(layer)
        assert op is not None
        bias = op.get(layer, "bias")
        constant = bias is None or (isinstance(bias, Node) and bias.op == "get_attr")
        slot = Slot(layer.name, (op.index("weight"),))
        if slot not in plan.groups or not constant or not mean.any():
            return False
        weight = op.get(layer, "weight").args[0]  # behind its observer
        error = _rounding(weight, slot, module, plan)
        value = constant_response(error, mean.float(), op, layer)
        path = f"{str(weight.target).rpartition('.')[0]}.bias".removeprefix(".")
        if bias is not None:
            value += get_attribute(module, str(bias.target)).detach()
            path = str(bias.target)
        if bias is None or is_shared(bias, module, readers):
            path = free_path(module, path)
        set_tensor(module, path, nn.Parameter(value, requires_grad=False))  # a new one: the old may be the user's
        with layer.graph.inserting_before(layer):
            layer.update_arg(op.index("bias"), layer.graph.get_attr(path))
        return True


def _rounding(weight: Node, slot: Slot, module: QuantModule, plan: QuantPlan) -> torch.Tensor:
    """What a weight loses when it is quantized: ``W - W_int8``."""
    values, spec = get_attribute(module, str(weight.target)).detach(), plan.specs[slot]
    observer = module.get_submodule(plan.observers[plan.groups[slot]])
    qparams = observer.qparams()  # type: ignore[operator]
    rounded = dequantize(quantize(values, qparams, spec), qparams, spec.ch_axis)
    return torch.sub(values, rounded, out=rounded)


def _drop_recorders(module: QuantModule, plan: QuantPlan) -> None:
    paths = set(plan.input_means.values())
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target in paths:
            module.graph.erase_node(node)
    for path in paths:
        module.delete_submodule(path)
    plan.input_means.clear()
