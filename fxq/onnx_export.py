"""A quantized model as an ONNX file, written from its reference graph node by node."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node

from fxq.batch_sizes import Shaped, sizes
from fxq.containers import held_by, makes_container
from fxq.errors import FxqError
from fxq.graph_module import QuantModule
from fxq.onnx_graph import OnnxGraph
from fxq.onnx_rows import FUNCTIONS, METHODS, MODULES, ROWS, Row
from fxq.onnx_writer import OPS, OnnxWriter
from fxq.partition import partition_of, reference_of
from fxq.whole_files import File, write_file

_REMEDY = "fxq.save, fxq.to_torchscript and fxq.to_exported_program keep it"


def to_onnx(model: nn.Module, path: File, *, dynamic_batch: bool = True, qdq: bool = True) -> None:
    """Write a quantized model as ONNX (opset 18).

    Weights are int8 initializers, per channel where they are; activations pass QuantizeLinear and DequantizeLinear,
    which onnxruntime, OpenVINO and TensorRT fuse into int8 kernels. Inputs and outputs are float32, named as in the
    model's ``forward`` and as the keys of the dict it returns.

    Args:
        model: from :func:`fxq.quantize`, :func:`fxq.convert`, :func:`fxq.convert_to_reference` or :func:`fxq.load`.
        path: conventionally ends in ``.onnx``; or a binary file object.
        dynamic_batch: the first dimension of every input and output is a batch of any size; if false, sizes are those
            of the example inputs the model was prepared with. Other sizes always are.
        qdq: if false, a float graph with the integer weights' real values, and a Clip to the calibrated range where an
            activation was quantized: for importers that choose their own fixed point.

    Raises:
        StageError: if the model is not quantized.
        FxqError: for a node that ONNX cannot hold, naming it, a model in regions, or a file that cannot be written.
        MissingDependencyError: if the ``onnx`` package is not installed.

    Example:
        >>> fxq.to_onnx(qmodel, "model.onnx")                                         # doctest: +SKIP
        >>> session = onnxruntime.InferenceSession("model.onnx")                      # doctest: +SKIP
        >>> logits, = session.run(None, {"x": images.numpy()})                        # doctest: +SKIP
    """
    reference = reference_of(model)
    if partition_of(reference) is not None or not isinstance(reference, QuantModule):
        raise FxqError(
            f"{type(reference).__name__} could not be traced as a whole, so there is no graph of all of it to write; "
            f"write its regions one by one, e.g. fxq.to_onnx(model.backbone, ...)"
        )
    write_file(path, onnx_model(reference, dynamic_batch, qdq).SerializeToString())


def onnx_model(reference: QuantModule, dynamic_batch: bool, qdq: bool) -> Any:
    """The ONNX model of a reference graph, as :func:`to_onnx` writes it."""
    graph = OnnxGraph()
    for node in reference.graph.nodes:
        if node.op == "call_module" and type(reference.get_submodule(str(node.target))) not in MODULES:
            where = reference.plan.where(node.name)
            raise FxqError(
                f"{where} cannot be written as ONNX: its module is not one of the operations fxq knows; {_REMEDY}"
            )
    writer = OnnxWriter(reference, graph, sizes(reference, dynamic_batch), qdq)
    for node in reference.graph.nodes:
        writer.node = node
        _write(writer)
    plan = reference.plan
    return graph.model(plan.model, {"backend": plan.backend, "quantization": "QDQ" if qdq else "clips"})


def _write(w: OnnxWriter) -> None:
    node, known = w.node, w.sizes[w.node]
    if node.op == "output":
        _write_outputs(w)
    elif node.op == "placeholder":
        if isinstance(known, Shaped):
            w.values[node] = w.graph.free_name(str(node.target))
            w.graph.inputs.append(w.graph.describe(w.values[node], known))
    elif node.op == "get_attr":
        w.values[node] = w.graph.tensor(w.module_tensor(), str(node.target))
    elif w.holds_tensors(known) and not makes_container(node):
        w.values[node] = _row(w)(w)


def _row(w: OnnxWriter) -> Row:
    node, op = w.node, OPS.op_of(w.node)
    if node.op == "call_module":
        return MODULES[type(w.module.get_submodule(str(node.target)))]
    if op in ROWS:
        return ROWS[op]
    row = METHODS.get(node.target) if isinstance(node.target, str) else FUNCTIONS.get(node.target)
    if row is None:
        raise w.refusal(f"fxq.onnx_rows has no row for it; {_REMEDY}")
    return row


def _write_outputs(w: OnnxWriter) -> None:
    """One output a tensor, named by the keys and positions that lead to it."""
    for keys, written, shaped in _tensors(w, (), w.node.args[0]):
        label = "_".join(map(str, ["output", *keys] if not keys or isinstance(keys[0], int) else keys))
        name = w.graph.free_name(label)
        w.graph.nodes.append(w.graph.onnx.helper.make_node("Identity", [written], [name], name=name))
        w.graph.outputs.append(w.graph.describe(name, shaped))


Output = tuple[tuple[Any, ...], str, Shaped]


def _tensors(w: OnnxWriter, keys: tuple[Any, ...], value: Any) -> list[Output]:
    """The tensors in what the graph returns, with the keys and positions that lead to them."""
    if isinstance(value, Node) and makes_container(value):
        value = held_by(value)
    if isinstance(value, Node):
        return _parts(keys, w.values.get(value), w.sizes[value])
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [found for key, item in items for found in _tensors(w, (*keys, key), item)]


def _parts(keys: tuple[Any, ...], written: Any, known: Any) -> list[Output]:
    """The same of what one node was written as."""
    if isinstance(known, Shaped):
        return [(keys, written, known)]
    items = known.items() if isinstance(known, dict) else enumerate(known) if isinstance(known, list) else ()
    return [found for key, item in items for found in _parts((*keys, key), written[key], item)]
