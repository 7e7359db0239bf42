"""``nn.LSTM`` and ``nn.GRU`` in ONNX: one node a layer, with both directions, in float."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from fxq.onnx_writer import OnnxWriter


class Cell(NamedTuple):
    """The ONNX operator of a module, its outputs, and where its gates stand in torch's weights."""

    op: str
    outputs: int
    gates: tuple[int, ...]
    attributes: dict[str, Any]


_LSTM = Cell("LSTM", 3, (0, 3, 1, 2), {})  # i o f c, which torch has as i f g o
_GRU = Cell("GRU", 2, (1, 0, 2), {"linear_before_reset": 1})  # z r h, which torch has as r z n


def write_lstm(w: OnnxWriter) -> list[Any]:
    """``nn.LSTM``: the output, and the last hidden and cell states."""
    y, last = _recurrent(w, _LSTM)
    return [y, last]


def write_gru(w: OnnxWriter) -> list[Any]:
    """``nn.GRU``: the output and the last hidden states."""
    y, (last,) = _recurrent(w, _GRU)
    return [y, last]


def _recurrent(w: OnnxWriter, cell: Cell) -> tuple[str, list[str]]:
    module = w.module.get_submodule(str(w.node.target))
    assert isinstance(module, nn.RNNBase)
    bound = inspect.signature(module.forward).bind(*w.node.args, **w.node.kwargs).arguments
    x, directions = bound["input"], 2 if module.bidirectional else 1
    if module.proj_size:
        raise w.refusal("ONNX has no projections of hidden states (proj_size)")
    if len(w.shape(x)) != 3:
        raise w.refusal("its input has no batch; give it one")
    first = _states(w, bound.get("hx"))
    order = [1, 0, 2] if module.batch_first else [0, 1, 2]
    sizes = [w.shape(x)[axis] for axis in order[:2]]
    value = str(w.add("Transpose", w.name(x), perm=order)) if module.batch_first else w.name(x)
    last = []
    for layer in range(module.num_layers):
        rows = w.ints([layer * directions]), w.ints([(layer + 1) * directions]), w.ints([0])
        y, *states = w.add(
            cell.op, value, *_weights(w, module, layer, cell), "", *(w.add("Slice", state, *rows) for state in first),
            outputs=cell.outputs, hidden_size=module.hidden_size,
            direction="bidirectional" if module.bidirectional else "forward", **cell.attributes,
        )  # fmt: skip
        value = w.reshape(w.add("Transpose", y, perm=[0, 2, 1, 3]), (*sizes, directions * module.hidden_size))
        last.append(states)
    if module.batch_first:
        value = str(w.add("Transpose", value, perm=order))
    return value, [str(w.add("Concat", *states, axis=0)) for states in zip(*last, strict=True)]


def _states(w: OnnxWriter, given: Any) -> Sequence[str]:
    """The states it starts from, none for zeros."""
    if given is None:
        return ()
    if not isinstance(given, Node):
        return [w.name(state) for state in given]
    written = w.values[given]
    return [written] if isinstance(written, str) else written


def _weights(w: OnnxWriter, module: nn.RNNBase, layer: int, cell: Cell) -> list[str]:
    """Weights of the input, of the states and both biases of a layer, one direction after the other."""

    def gates(name: str) -> torch.Tensor:
        found: torch.Tensor = getattr(module, name)
        return torch.cat([found.detach().chunk(len(cell.gates))[gate] for gate in cell.gates])

    ends = [f"l{layer}", f"l{layer}_reverse"][: 2 if module.bidirectional else 1]
    kinds = [["weight_ih"], ["weight_hh"], *([["bias_ih", "bias_hh"]] if module.bias else [])]
    tensors = [torch.stack([torch.cat([gates(f"{part}_{end}") for part in kind]) for end in ends]) for kind in kinds]
    names = [f"{w.node.target}.{kind[0]}_{ends[0]}" for kind in kinds]
    return [w.graph.tensor(t, name) for t, name in zip(tensors, names, strict=True)] + [""] * (not module.bias)
