"""One file for a quantized model: its reference graph, integer weights and plan.

Layout: 8 bytes of magic and format version, the SHA-256 of the rest, then an archive of plain tensors and
JSON text as ``torch.save`` writes it, read with ``weights_only=True``. The checksum is verified before anything
is parsed. Weights are packed for the machine at hand when the file is loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxq.api import lower
from fxq.backends import BACKENDS, get_backend
from fxq.errors import BackendError, FileFormatError, FxqError
from fxq.graph_json import check_loaded, decode_graph, decode_plan, encode_graph, encode_plan
from fxq.graph_module import QuantModule, get_attribute, set_tensor
from fxq.op_table import Backend
from fxq.partition import partition_of, regions_of
from fxq.plan import Stage
from fxq.preparation import BACKEND

_MAGIC = b"FXQ\x00"
_VERSION = 1
_NAMES = " or ".join(BACKENDS)
_HEADER = len(_MAGIC) + 4 + hashlib.sha256().digest_size


def save(reference: nn.Module, path: str | Path) -> None:
    """Write a reference graph to one file.

    Args:
        reference: from :func:`fxq.convert_to_reference`.
        path: conventionally ends in ``.fxq``.

    Raises:
        StageError: if ``reference`` is no reference graph.
        FxqError: if it calls float modules, whose code a file cannot hold.

    Example:
        >>> fxq.save(fxq.convert_to_reference(prepared), "model.fxq")                 # doctest: +SKIP
        >>> qmodel = fxq.load("model.fxq")                                            # doctest: +SKIP
    """
    if partition_of(reference) is not None:
        raise FxqError("a model quantized in regions needs its own code; save its state with torch instead")
    regions_of(reference, Stage.REFERENCE)
    assert isinstance(reference, QuantModule)
    paths = {str(node.target) for node in reference.graph.nodes if node.op == "get_attr"}
    tensors = {name: get_attribute(reference, name).detach() for name in sorted(paths)}
    text = json.dumps({"nodes": encode_graph(reference.graph), "plan": encode_plan(reference.plan)})
    buffer = io.BytesIO()
    torch.save({"graph": text, "tensors": tensors}, buffer)
    payload = buffer.getvalue()
    header = _MAGIC + _VERSION.to_bytes(4, "little") + hashlib.sha256(payload).digest()
    Path(path).write_bytes(header + payload)


def load_reference(path: str | Path) -> QuantModule:
    """The reference graph of a file.

    Raises:
        FileFormatError: if the file is missing, no fxq file, of another version, truncated or corrupt.
    """
    content = _verified(path)
    try:
        tensors = content["tensors"]
        graph = decode_graph(content["nodes"], tensors.keys())
        plan = decode_plan(content["plan"])
        root = nn.Module()
        for name, tensor in tensors.items():
            set_tensor(root, name, _plain(name, tensor))
        module = QuantModule(root, graph, plan.model)
        module.graph.lint()
        plan.check(graph)
        check_loaded(plan, graph)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except Exception as error:
        raise FileFormatError(f"{path}: its graph is malformed ({type(error).__name__}: {error})") from error
    module.meta["fxq"] = plan
    return module


def load(path: str | Path, backend: str | Backend | None = None) -> nn.Module:
    """A lowered model from a file, packed for this machine.

    Args:
        backend: a name or a table; by default the backend it was saved for.

    Raises:
        FileFormatError: if the file cannot be read.
        BackendError: for an unknown backend or an engine this torch lacks.
    """
    reference = load_reference(path)
    backend = backend or reference.plan.backend
    if isinstance(backend, str) and backend not in BACKENDS:
        raise BackendError(f"{path}: made for the backend '{backend}'; load it with backend= that table, or {_NAMES}")
    reference.meta[BACKEND] = get_backend(backend) if isinstance(backend, str) else backend
    try:
        return lower(reference, backend)
    except FxqError:
        raise
    except Exception as error:
        raise FileFormatError(f"{path}: its graph cannot be lowered ({type(error).__name__}: {error})") from error


def _plain(name: str, tensor: Any) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise FileFormatError(f"what is stored as '{name}' is no plain tensor")
    return tensor  # type: ignore[no-any-return]


def _verified(path: str | Path) -> dict[str, Any]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if data[: len(_MAGIC)] != _MAGIC:
        raise FileFormatError(f"{path}: not an fxq file")
    version = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 4], "little")
    if version != _VERSION:
        raise FileFormatError(f"{path}: of format version {version}; this fxq reads version {_VERSION}")
    payload = data[_HEADER:]
    if hashlib.sha256(payload).digest() != data[len(_MAGIC) + 4 : _HEADER]:
        raise FileFormatError(f"{path}: truncated or corrupt: its checksum does not match")
    try:
        archive = torch.load(io.BytesIO(payload), weights_only=True)
        return {**json.loads(archive["graph"]), "tensors": archive["tensors"]}
    except Exception as error:
        raise FileFormatError(f"{path}: its content is malformed ({type(error).__name__})") from error
