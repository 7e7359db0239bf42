"""TorchScript: the packed model in a file that torch alone runs, from Python or C++.

TorchScript packs all weights again when a file is loaded, all of them for the engine that is set then. A lowered model
has kernels of several engines, so it is lowered anew for one: rows are wrapped in :class:`_ForOneEngine`.
"""

from __future__ import annotations

import dataclasses
import io
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx import Node

from fxq.aliases import reads_values
from fxq.api import lower
from fxq.backends import get_backend
from fxq.backends.kernels import PackedConv
from fxq.batch_sizes import example_inputs as inputs_of
from fxq.containers import plain_containers
from fxq.engine import running
from fxq.errors import FxqError
from fxq.graph_module import BACKEND, QuantModule
from fxq.int_views import as_quantized
from fxq.op_table import Backend, Emission, Emit, IntWeight
from fxq.partition import partition_of, reference_of
from fxq.spec import QParams
from fxq.whole_files import File, write_file

_X86_GROUPS = 96  # the x86 engine hands convs of up to 100 groups to onednn, others to fbgemm


def to_torchscript(model: nn.Module, example_inputs: Any = None, path: File | None = None) -> Any:
    """The model with its int8 kernels as TorchScript.

    The file runs where fxq is not installed, to the last bit as the model does; only transposed convolutions, which
    torch reads back wrong, run in float there. Weights are packed when it is loaded, for the engine that torch is set
    to: set it to the model's backend before, unless that is "x86", the default of x86 builds:
    ``torch.backends.quantized.engine = "qnnpack"``.

    Args:
        model: from :func:`fxq.quantize`, :func:`fxq.convert`, :func:`fxq.convert_to_reference` or :func:`fxq.load`.
        example_inputs: a tensor or a tuple of tensors to trace with; by default zeros of the shapes the model was
            prepared with. Other batch sizes run as well.
        path: written to, if given; conventionally ends in ``.pt``, or a binary file object.

    Returns:
        A ``torch.jit.ScriptModule``.

    Raises:
        StageError: if the model is not quantized.
        FxqError: for a model in regions or one that takes numbers from values (``item``), a layer that needs a second
            engine, what ``torch.jit.trace`` refuses, or a file that cannot be written.

    Example:
        >>> fxq.to_torchscript(qmodel, path="model.pt")                               # doctest: +SKIP
        >>> logits = torch.jit.load("model.pt")(images)                               # doctest: +SKIP
    """
    reference = reference_of(model)
    if partition_of(reference) is not None or not isinstance(reference, QuantModule):
        raise FxqError(
            f"{type(reference).__name__} could not be traced as a whole; write its regions one by one, "
            f"e.g. fxq.to_torchscript(model.backbone, ...)"
        )
    table = model.meta.get(BACKEND) if isinstance(model, QuantModule) else None
    lowered = lower(reference, for_one_engine(table or get_backend(reference.plan.backend)))
    assert isinstance(lowered, QuantModule)
    for node in lowered.graph.nodes:
        if reads_values(node):
            raise FxqError(
                f"'{node.name}' takes numbers from the values of a tensor, which would be constants in TorchScript; "
                f"use fxq.to_exported_program, or fxq.save"
            )
        if node.target is as_quantized:  # a view, in which tracing would record the example's sizes
            node.target = torch._make_per_tensor_quantized_tensor
    plain_containers(lowered.graph)
    inputs = inputs_of(reference) if example_inputs is None else example_inputs
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(x for x in inputs if isinstance(x, torch.Tensor))
    needed = [node.target for node in reference.graph.find_nodes(op="placeholder") if not node.args]
    if len(inputs) < len(needed):
        raise FxqError(
            f"{reference.plan.model} takes {len(needed)} inputs ({', '.join(map(str, needed))}), of which "
            f"{len(inputs)} are tensors, and TorchScript is traced with tensors alone; write the regions inside one by "
            f"one"
        )
    with warnings.catch_warnings(), torch.no_grad(), running():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and says so for every trace
        try:
            traced = torch.jit.trace(fx.GraphModule(lowered, lowered.graph), inputs, strict=False, check_trace=False)
        except FxqError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise FxqError(f"torch.jit.trace refuses the model ({type(error).__name__}: {reason})") from error
        torch._C._jit_pass_inline(traced.graph)  # a file cannot hold calls of functions of their own
        if path is not None:
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
            write_file(path, buffer.getvalue())
    return traced


def for_one_engine(table: Backend) -> Backend:
    """A table whose packed weights all are of its own engine.

    Transposed convolutions run in float: torch reads their packed weights back wrong from TorchScript files.
    """
    rows = [
        dataclasses.replace(row, emit=_ForOneEngine(row.emit, table.engine)) if row.weight else row
        for row in table.rows
        if not (isinstance(row.emit, PackedConv) and row.emit.transposed)
    ]
    return dataclasses.replace(table, rows=tuple(rows))


@dataclasses.dataclass(frozen=True)
class _ForOneEngine:
    """Emits what ``emit`` does with weights packed for ``engine`` alone.

    The x86 engine would run convolutions of many groups on fbgemm, where their kernel may be slow or saturate; in
    parts of fewer groups it runs them on onednn.
    """

    emit: Emit
    engine: str

    @property
    def kernel(self) -> str:
        return self.emit.kernel

    def __call__(self, e: Emission) -> Node:
        whole = _WithEngine(e, self.engine)
        if self.engine != "x86" or not isinstance(self.emit, PackedConv):
            return self.emit(whole)
        weight, groups = e.weight(), e.get("groups")
        best = self.emit.engines(weight, groups)[0] if self.emit.engines else None
        if best != "onednn":
            return self.emit(whole)
        starts = range(0, groups, _X86_GROUPS)
        parts = [range(start, min(start + _X86_GROUPS, groups)) for start in starts]
        if len(parts) == 1:
            return self.emit(_Part(e, e.input("input"), parts[0], groups))
        width = weight.values.shape[1]
        pieces = e.call(torch.split, e.input("input"), [len(part) * width for part in parts], 1)
        made = [
            self.emit(_Part(e, e.call(operator.getitem, pieces, number), part, groups))
            for number, part in enumerate(parts)
        ]
        return e.call(torch.ops.quantized.cat, made, 1, e.out.scale, e.out.zero_point)


class _PackedWhenRun(NamedTuple):
    """Arguments of ``onednn::qconv_prepack``, whose result no file can hold."""

    arguments: tuple[Any, ...]


class _WithEngine:
    """An emission that packs under one engine; plain oneDNN weights, which know none, are packed in the graph."""

    def __init__(self, emission: Emission, engine: str) -> None:
        self._emission, self._engine = emission, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._emission, name)

    def constant(self, suffix: str, value: Any) -> Node:
        if not isinstance(value, _PackedWhenRun):
            return self._emission.constant(suffix, value)
        weight, scales, *rest = value.arguments
        tensors = self._emission.constant("weight", weight), self._emission.constant("weight_scales", scales.clone())
        return self._emission.call(torch.ops.onednn.qconv_prepack, *tensors, *rest)

    def pack(self, function: Callable[..., Any], *args: Any, engines: tuple[str, ...] = ()) -> Any:
        if function is torch.ops.onednn.qconv_prepack:
            return _PackedWhenRun(args)
        if engines and self._engine not in engines:
            name = self._emission.nodes[0].name
            raise FxqError(
                f"node '{name}' needs a kernel of {engines[0]} beside those of {self._engine}, and TorchScript packs "
                f"all weights for one engine; use backend='x86', or exclude the layer"
            )
        return self._emission.pack(function, *args)


class _Part(_WithEngine):
    """An emission of some groups of a convolution."""

    def __init__(self, emission: Emission, source: Node, groups: range, total: int) -> None:
        super().__init__(emission, "onednn")
        self._source, self._groups = source, groups
        rows = emission.weight().values.shape[0] // total
        self._rows = slice(groups.start * rows, groups.stop * rows)

    def get(self, parameter: str) -> Any:
        return len(self._groups) if parameter == "groups" else self._emission.get(parameter)

    def input(self, parameter: str) -> Any:
        return self._source

    def weight(self) -> IntWeight:
        whole = self._emission.weight()
        qparams = whole.qparams
        if whole.ch_axis is not None:
            qparams = QParams(qparams.scale[self._rows], qparams.zero_point[self._rows])
        return IntWeight(whole.values[self._rows], qparams, whole.ch_axis)

    def tensor(self, parameter: str) -> torch.Tensor | None:
        whole = self._emission.tensor(parameter)
        return None if whole is None else whole[self._rows]
