"""One file for a quantized model: its reference graph, integer weights and plan.

Layout: 8 bytes of magic and format version, the SHA-256 of the rest, then an archive of plain tensors and
JSON text as ``torch.save`` writes it, read with ``weights_only=True``. The checksum is verified before anything
is parsed; a second one in the archive binds every tensor to its name. Weights are packed for the machine at hand
when the file is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxq.api import lower
from fxq.backends import BACKENDS, get_backend
from fxq.errors import BackendError, ConfigError, FileFormatError, FxqError
from fxq.float_model import without_compile
from fxq.graph_json import decode_graph, encode_graph
from fxq.graph_module import QuantModule, get_attribute, make_module
from fxq.leaves import decode_leaf, encode_leaf, without_code
from fxq.op_table import Backend
from fxq.partition import (
    Partition,
    join,
    partition_of,
    reference_of,
    regions_of,
    replace_regions,
    set_partition,
    state_outside,
)
from fxq.plan_json import check_loaded, decode_plan, encode_plan
from fxq.record_classes import class_without_code, classes_of
from fxq.schema import wrong_field
from fxq.tensor_checks import check_tensors
from fxq.whole_files import File, file_name, read_file, write_file
from fxq.zip_check import check_members

_MAGIC = b"FXQ\x00"
_VERSION = 2
_MAX_UNUSED_BYTES = 1 << 20
_MAX_SHARED = 64  # times that all tensors may be the size of the file, where many names stand for one
_NAMES = " or ".join(BACKENDS)
_HEADER = len(_MAGIC) + 4 + hashlib.sha256().digest_size

Tensors = dict[str, dict[str, torch.Tensor]]  # by section, then by name


def save(model: nn.Module, path: File) -> None:
    """Write a quantized model to one file.

    What is written is the reference graph, with integer weights; packed weights are made again by :func:`load`.

    Args:
        model: from :func:`fxq.quantize`, :func:`fxq.convert` or :func:`fxq.convert_to_reference`.
        path: conventionally ends in ``.fxq``; or a binary file object.

    Raises:
        StageError: if the model is not quantized.
        FxqError: if it calls functions of your own, which a file cannot hold, or the file cannot be written.

    Example:
        >>> fxq.save(fxq.quantize(model, data), "model.fxq")                          # doctest: +SKIP
        >>> qmodel = fxq.load("model.fxq")                                            # doctest: +SKIP
    """
    reference = reference_of(model)
    partition = partition_of(reference)
    tensors: Tensors = {}
    content: dict[str, Any] = {"partition": None, "regions": {}}
    for place, region in regions_of(reference).items():
        content["regions"][place] = encode_region(place, region, tensors)
    if partition is not None:
        content["partition"] = [partition.reason, partition.left, partition.left_macs]
        content["model"] = type(reference).__name__
        tensors["outside"] = _compact(state_outside(reference), content["model"])
    text = json.dumps(content)
    buffer = io.BytesIO()
    torch.save({"content": text, "tensors": tensors, "digest": digest(text, tensors)}, buffer)
    write_file(path, with_header(buffer.getvalue()))


def encode_region(place: str, region: QuantModule, tensors: Tensors) -> dict[str, Any]:
    """What the JSON says of a region; its tensors go to their sections."""
    nodes = region.graph.nodes
    read = sorted({str(node.target) for node in nodes if node.op == "get_attr"})
    tensors[f"tensors {place}"] = _compact({name: get_attribute(region, name) for name in read}, place)
    leaves = {}
    for path in sorted({str(node.target) for node in nodes if node.op == "call_module"}):
        module = region.get_submodule(path)
        leaves[path] = encode_leaf(module)
        tensors[f"module {place} {path}"] = _compact(state_outside(module), path)
    return {"nodes": encode_graph(region.graph), "plan": encode_plan(region.plan), "modules": leaves}


def _compact(state: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """Tensors, without what else their storages hold if that is much.

    A copy has other strides, with which a float kernel may round the last bit otherwise.

    Raises:
        FxqError: if there is anything but tensors in the state.
    """
    found = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FxqError(f"'{where}' has state other than tensors ('{name}'), which a file cannot hold")
        keep = 0 <= value.untyped_storage().nbytes() - value.nbytes <= _MAX_UNUSED_BYTES
        found[name] = value.detach() if keep else value.detach().clone(memory_format=torch.contiguous_format)
    return found


def with_header(payload: bytes) -> bytes:
    """The content of a file with this archive."""
    return _MAGIC + _VERSION.to_bytes(4, "little") + hashlib.sha256(payload).digest() + payload


def digest(text: str, tensors: Tensors) -> str:
    """SHA-256 of the JSON and of every tensor with its name, so that tensors cannot change places unseen."""
    total = hashlib.sha256(text.encode())
    for section, named in sorted(tensors.items()):
        for name, tensor in sorted(named.items()):
            values = tensor.contiguous().reshape(-1).view(torch.uint8)
            total.update(json.dumps([section, name, str(tensor.dtype), list(tensor.shape)]).encode())
            total.update(ctypes.string_at(values.data_ptr(), values.numel()))
    return total.hexdigest()


def load_reference(path: File, *, model: nn.Module | None = None) -> nn.Module:
    """The reference graph of a file.

    Args:
        path: a file that :func:`save` wrote, or a binary file object.
        model: the float model, for a file that needs its code: a model quantized in regions, one that calls modules
            which are not of torch, or one that returns a class (a dataclass, a named tuple, a ``ModelOutput``). Only
            its code is used, and it is left as it is; every parameter and buffer comes from the file.

    Raises:
        FileFormatError: if the file is missing, no fxq file, of another version, truncated or corrupt.
        ConfigError: if it needs a model and ``model`` is not it.
    """
    content, tensors = _verified(path)
    with _named(path):
        return _decode(content, tensors, model if model is None else without_compile(model))


def load_regions(path: File) -> dict[str, QuantModule]:
    """The reference graphs of a file by module path, without the code around them; a whole model is at path ``""``.

    One that calls modules which are not of torch, or returns a class, cannot be run.

    Raises:
        FileFormatError: as :func:`load_reference`.
    """
    content, tensors = _verified(path)
    with _named(path):
        return _decode_regions(content, tensors, None, stand_ins=True)


def load_for_tables(path: File, backend: str | None = None) -> nn.Module:
    """A lowered model to print tables of, from the file alone.

    A model that was quantized in regions has them at their places, without the code around them, and modules whose code
    a file does not hold are empty: it cannot be called.

    Args:
        path: a file that :func:`save` wrote.
        backend: by default the one it was saved for.

    Raises:
        FileFormatError, BackendError: as :func:`load`.
    """
    content, tensors = _verified(path)
    with _named(path):
        regions = _decode_regions(content, tensors, None, stand_ins=True)
        if content["partition"] is None:
            return _lowered(path, regions[""], backend)
        model = without_code(content["model"], regions)
        set_partition(model, _partition(content))
    return _lowered(path, model, backend)


@contextlib.contextmanager
def _named(path: File) -> Iterator[None]:
    """Errors of decoding name the file."""
    try:
        yield
    except (FileFormatError, ConfigError) as error:
        raise type(error)(f"{file_name(path)}: {error}") from error
    except Exception as error:
        raise FileFormatError(f"{file_name(path)}: its graph is malformed ({type(error).__name__}: {error})") from error


def _decode_regions(
    content: dict[str, Any], tensors: Tensors, model: nn.Module | None, stand_ins: bool = False
) -> dict[str, QuantModule]:
    """The outermost regions, with those inside in their leaves."""
    regions: dict[str, QuantModule] = {}
    for place in sorted(content["regions"], key=len, reverse=True):  # the inner ones first
        prefix = f"{place}." if place else ""
        inside = {inner: regions.pop(inner) for inner in list(regions) if inner.startswith(prefix)}
        regions[place] = decode_region(place, content["regions"][place], tensors, model, inside, stand_ins)
    return regions


def _decode(content: dict[str, Any], tensors: Tensors, model: nn.Module | None) -> nn.Module:
    regions = _decode_regions(content, tensors, model)
    if content["partition"] is None:
        (region,) = regions.values()
        return region
    partition = _partition(content)
    if model is None:
        raise ConfigError(
            f"a {content['model']} could not be traced as a whole, so the file holds parts of it and needs the code "
            f"around them; load it with model= the float model"
        )
    if type(model).__name__ != content["model"]:
        raise ConfigError(f"the given model is a {type(model).__name__}; the file is of a {content['model']}")
    clone = replace_regions(model, regions, tensors["outside"])
    set_partition(clone, partition)
    return clone


def _partition(content: dict[str, Any]) -> Partition:
    partition = Partition(*content["partition"])
    if wrong_field(partition) is not None:
        raise FileFormatError("the partition has a value of the wrong type")
    return partition


def decode_region(
    place: str,
    record: dict[str, Any],
    tensors: Tensors,
    model: nn.Module | None,
    inside: Mapping[str, QuantModule] | None = None,
    stand_ins: bool = False,
) -> QuantModule:
    """A region from what :func:`encode_region` made.

    Args:
        inside: regions in its leaf modules, by their place in the whole model.
        stand_ins: let empty modules and classes stand for those whose code is missing.

    Raises:
        Exception: of any kind, for anything else.
    """
    parts: dict[str, Any] = dict(tensors[f"tensors {place}"])
    modules = {}
    for path, leaf in record["modules"].items():
        where = join(place, path)
        prefix = f"{where}."
        inner = {name.removeprefix(prefix): r for name, r in (inside or {}).items() if name.startswith(prefix)}
        modules[path] = decode_leaf(leaf, where, tensors[f"module {place} {path}"], model, inner, stand_ins)
    classes = class_without_code if stand_ins else classes_of(model)
    graph = decode_graph(record["nodes"], parts.keys(), modules.keys(), classes)
    plan = decode_plan(record["plan"])
    plan.check(graph)
    check_loaded(plan, graph)
    module = make_module(plan.model, graph, parts | modules)
    module.graph.lint()
    check_tensors(module)
    module.write_code()  # what cannot be written shows here, and not when it first runs
    module.meta["fxq"] = plan
    module.offer_descriptions()
    return module


def load(path: File, backend: str | Backend | None = None, *, model: nn.Module | None = None) -> nn.Module:
    """A lowered model from a file, packed for this machine.

    Args:
        path: a file that :func:`save` wrote, or a binary file object.
        backend: a name or a table; by default the backend it was saved for.
        model: as for :func:`load_reference`.

    Raises:
        FileFormatError: if the file cannot be read.
        ConfigError: if it needs a model and ``model`` is not it.
        BackendError: for an unknown backend or an engine this torch lacks.

    Example:
        >>> qmodel = fxq.load("model.fxq", backend="qnnpack")                         # doctest: +SKIP
        >>> detector = fxq.load("detector.fxq", model=fasterrcnn_resnet50_fpn())      # doctest: +SKIP
    """
    return _lowered(path, load_reference(path, model=model), backend)


def _lowered(path: File, reference: nn.Module, backend: str | Backend | None) -> nn.Module:
    """What a file holds, packed for this machine."""
    name, regions = file_name(path), list(regions_of(reference).values())
    backend = backend or regions[0].plan.backend
    if isinstance(backend, str) and backend not in BACKENDS:
        raise BackendError(f"{name}: made for the backend '{backend}'; load it with backend= that table, or {_NAMES}")
    table = get_backend(backend) if isinstance(backend, str) else backend
    try:
        return lower(reference, table)
    except FxqError:
        raise
    except Exception as error:
        raise FileFormatError(f"{name}: its graph cannot be lowered ({type(error).__name__}: {error})") from error


def _verified(path: File) -> tuple[dict[str, Any], Tensors]:
    name, data = file_name(path), read_file(path)
    if data[: len(_MAGIC)] != _MAGIC:
        raise FileFormatError(f"{name}: not an fxq file")
    version = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 4], "little")
    if version != _VERSION:
        raise FileFormatError(f"{name}: of format version {version}; this fxq reads version {_VERSION}")
    payload = data[_HEADER:]
    if hashlib.sha256(payload).digest() != data[len(_MAGIC) + 4 : _HEADER]:
        raise FileFormatError(f"{name}: truncated or corrupt: its checksum does not match")
    try:
        return _unpacked(payload)
    except FileFormatError as error:
        raise FileFormatError(f"{name}: {error}") from error
    except Exception as error:
        raise FileFormatError(f"{name}: its content is malformed ({type(error).__name__})") from error


def _unpacked(payload: bytes) -> tuple[dict[str, Any], Tensors]:
    """The JSON and the tensors of an archive.

    Raises:
        Exception: of any kind, if it is not what :func:`save` wrote.
    """
    check_members(payload)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has some about tensors that are refused anyway
        archive = torch.load(io.BytesIO(payload), weights_only=True)
        sections = archive["tensors"]
        if len({id(named) for named in sections.values()}) < len(sections):
            raise FileFormatError("its content is malformed: two sections of tensors are one")
        tensors = {section: {n: _plain(n, t) for n, t in named.items()} for section, named in sections.items()}
    if sum(t.nbytes for named in tensors.values() for t in named.values()) > _MAX_SHARED * len(payload):
        raise FileFormatError("its content is malformed: its tensors are many times larger than the file")
    content = json.loads(archive["content"])
    if digest(archive["content"], tensors) != archive["digest"] or not isinstance(content, dict):
        raise FileFormatError("its content is malformed: it is not what was saved")
    _check_regions(content)
    return content, tensors


def _check_regions(content: dict[str, Any]) -> None:
    """A whole model is one graph at the path "", with others in its leaves; a model in regions has none there."""
    regions, partition = content.get("regions"), content.get("partition", ())
    if not (isinstance(regions, dict) and regions and all(isinstance(region, dict) for region in regions.values())):
        raise FileFormatError("its content is malformed: it has no graphs")
    parts = isinstance(partition, list) and isinstance(content.get("model"), str)
    if not (parts and "" not in regions) and not (partition is None and "" in regions):
        raise FileFormatError("its content is malformed: its graphs are not at the places where they belong")


def _plain(name: str, tensor: Any) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise FileFormatError(f"what is stored as '{name}' is no plain tensor")
    if not isinstance(name, str) or tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise FileFormatError(f"what is stored as '{name}' is no tensor with all its values")
    return tensor  # type: ignore[no-any-return]
