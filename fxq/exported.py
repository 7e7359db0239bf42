"""torch.export: a reference graph as an ExportedProgram, and back to packed kernels after it was loaded.

The program calls the ``fxq::`` operators of :mod:`fxq.qdq`, and carries graph and plan as JSON in a buffer, because the
operations of an exported program are no longer the ones that rows describe. Its tensors are its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export

from fxq.api import lower
from fxq.backends import get_backend
from fxq.batch_sizes import example_inputs as inputs_of
from fxq.errors import FxqError, InputError
from fxq.graph_module import QuantModule
from fxq.op_table import Backend
from fxq.partition import partition_of, reference_of
from fxq.qdq import is_quantize
from fxq.serialization import Tensors, decode_region, encode_region

_CONTENT = "fxq_content"  # the buffer with the JSON


def to_exported_program(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = True,
) -> ExportedProgram:
    """The model's reference graph as an exported program: float operations between quantize and dequantize.

    ``torch.export.save`` and ``load`` keep it; import fxq before loading, or call ``program.run_decompositions()``
    before saving, which writes the ``fxq::`` operators as plain arithmetic. :func:`from_exported_program` makes packed
    kernels of it again.

    Args:
        model: from :func:`fxq.quantize`, :func:`fxq.convert`, :func:`fxq.convert_to_reference` or :func:`fxq.load`.
        example_inputs: a tensor or a tuple of inputs; by default zeros of the shapes the model was prepared with.
        dynamic_shapes: as ``torch.export.export`` takes them, for a sequence with one entry for each input.
        dynamic_batch: without ``dynamic_shapes``, make the first dimension of every input a batch of any size.

    Raises:
        StageError: if the model is not quantized.
        InputError: for example inputs that are neither a tensor nor a tuple.
        FxqError: for a model in regions, or one that ``torch.export`` refuses.

    Example:
        >>> program = fxq.to_exported_program(qmodel)                                 # doctest: +SKIP
        >>> torch.export.save(program, "model.pt2")                                   # doctest: +SKIP
        >>> qmodel = fxq.from_exported_program(torch.export.load("model.pt2"))        # doctest: +SKIP
    """
    reference = reference_of(model)
    if partition_of(reference) is not None or not isinstance(reference, QuantModule):
        raise FxqError(
            f"{type(reference).__name__} could not be traced as a whole; export its regions one by one, "
            f"e.g. fxq.to_exported_program(model.backbone, ...)"
        )
    inputs = _as_tuple(inputs_of(reference) if example_inputs is None else example_inputs)
    if dynamic_shapes is None and dynamic_batch:
        inputs = tuple(_two(x) for x in inputs)
        batch = Dim("batch", min=1)
        dynamic_shapes = tuple({0: batch} if isinstance(x, torch.Tensor) and x.dim() else None for x in inputs)
    module = fx.GraphModule(reference, reference.graph)
    module.register_buffer(_CONTENT, _to_tensor(json.dumps(encode_region("", reference, {}))))
    try:
        with torch.no_grad():
            return export(module, inputs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise FxqError(
            f"torch.export refuses the model ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); "
            f"where its batch size is fixed, pass dynamic_batch=False"
        ) from error


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    if not isinstance(inputs, (torch.Tensor, tuple, list)):
        raise InputError(f"the example inputs are a {type(inputs).__name__}; give a tensor or a tuple of inputs")
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)


def _two(x: Any) -> Any:
    """A batch of one doubled: torch.export takes sizes of 1 for constants."""
    return torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 1 else x


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_exported_program(program: ExportedProgram, backend: str | Backend | None = None) -> nn.Module:
    """Packed kernels for a program of :func:`to_exported_program`, as if it had never been exported.

    Args:
        program: as it was made, e.g. from ``torch.export.load``; unchanged.
        backend: a name or a table; by default the one it was quantized for.

    Raises:
        InputError: if fxq did not make the program, or it was changed since.
        BackendError: for an unknown backend or an engine this torch lacks.
    """
    state = program.state_dict
    if _CONTENT not in state:
        raise InputError("the program has no fxq content: it is not one that fxq.to_exported_program made")
    try:
        record = json.loads(bytes(state[_CONTENT].tolist()))
        reference = decode_region("", record, _sections(record, state), None)
    except FxqError as error:
        raise InputError(f"the program's fxq content is not usable: {error}") from error
    except Exception as error:
        raise InputError(f"the program's fxq content is malformed ({type(error).__name__}: {error})") from error
    if _quantizes(program.graph) != _quantizes(reference.graph):
        raise InputError("the program was changed after fxq made it: it does not quantize what its fxq content says")
    return lower(reference, get_backend(reference.plan.backend) if backend is None else backend)


def _sections(record: dict[str, Any], state: Mapping[str, torch.Tensor]) -> Tensors:
    read = {node["target"] for node in record["nodes"] if node["op"] == "get_attr"}
    sections: Tensors = {"tensors ": {name: state[name] for name in read}}
    for path in record["modules"]:
        inside = f"{path}."
        sections[f"module  {path}"] = {n[len(inside) :]: t for n, t in state.items() if n.startswith(inside)}
    return sections


def _quantizes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [node.args[1:] for node in graph.nodes if is_quantize(node)]
