"""What the user asks for: :class:`QConfig` for one layer, :class:`QConfigMapping` for a model."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxq.errors import ConfigError
from fxq.op_table import Backend
from fxq.plan import Origin
from fxq.spec import QuantSpec

QCONFIG_NAMES = ("per_channel", "per_tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class QConfig:
    """How a layer's activations and weight are quantized.

    Example:
        >>> import torch
        >>> four_bit = QConfig(
        ...     activation=QuantSpec(dtype=torch.uint8, quant_min=0, quant_max=255, symmetric=False),
        ...     weight=QuantSpec(dtype=torch.int8, quant_min=-8, quant_max=7, symmetric=True, ch_axis=0,
        ...                      observer="minmax"))
        >>> four_bit.weight.bits
        4
    """

    activation: QuantSpec
    weight: QuantSpec

    def __post_init__(self) -> None:
        if self.activation.per_channel:
            raise ConfigError("QConfig: the int8 kernels take per-tensor activations; set activation.ch_axis=None")
        if self.weight.dtype is not torch.int8:
            raise ConfigError("QConfig: the int8 kernels take int8 weights; set weight.dtype=torch.int8")

    def with_pow2_scales(self) -> QConfig:
        """The same with scales that are powers of two, for activations and weights."""
        return QConfig(
            activation=self.activation.replace(pow2_scale=True), weight=self.weight.replace(pow2_scale=True)
        )


def named_qconfig(name: str, backend: Backend) -> QConfig:
    """The QConfig of a name, for a backend.

    ``"per_channel"``: what the backend recommends (histogram activations, one weight scale a channel).
    ``"per_tensor"``: min-max ranges and one scale a weight, the classic starting point.

    Raises:
        ConfigError: for any other name.
    """
    if name == "per_channel":
        return QConfig(activation=backend.activation, weight=backend.weight)
    if name == "per_tensor":
        return QConfig(
            activation=backend.activation.replace(observer="minmax"),
            weight=backend.weight.replace(observer="minmax", ch_axis=None),
        )
    raise ConfigError(f"unknown qconfig '{name}'; the names are {', '.join(QCONFIG_NAMES)}")


class QConfigMapping:
    """QConfigs by module name, regular expression, type or for all; ``None`` means: stay float.

    The most specific entry wins: module name (longest first), then regular expression (last set first),
    then object type, then global. A name that matches nothing in the model is an error when it is used.

    Example:
        >>> mapping = QConfigMapping().set_object_type(nn.Linear, None).set_module_name("features.0", None)
    """

    def __init__(self) -> None:
        self._global: QConfig | str | None = "per_channel"
        self._types: dict[str, QConfig | str | None] = {}
        self._names: dict[str, QConfig | str | None] = {}
        self._regexes: dict[str, QConfig | str | None] = {}

    def __repr__(self) -> str:
        named = {"types": self._types, "names": self._names, "regexes": self._regexes}
        parts = [f"global={self._global}", *(f"{kind}={entries}" for kind, entries in named.items() if entries)]
        return f"QConfigMapping({', '.join(parts)})"

    def set_global(self, qconfig: QConfig | str | None) -> QConfigMapping:
        """For everything no other entry matches."""
        self._global = qconfig
        return self

    def set_object_type(
        self, kind: type[nn.Module] | Callable[..., Any] | str, qconfig: QConfig | str | None
    ) -> QConfigMapping:
        """For a module class, a function, or an op's name in the tables (``"add"``)."""
        self._types[_type_name(kind)] = qconfig
        return self

    def set_module_name(self, name: str, qconfig: QConfig | str | None) -> QConfigMapping:
        """For the module of this path and everything inside it."""
        self._names[name] = qconfig
        return self

    def set_module_name_regex(self, pattern: str, qconfig: QConfig | str | None) -> QConfigMapping:
        """For modules whose whole path matches a regular expression, and everything inside them.

        Raises:
            ConfigError: if the pattern is not a regular expression.
        """
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"'{pattern}' is not a regular expression: {error}") from error
        self._regexes[pattern] = qconfig
        return self

    def resolved(
        self,
        backend: Backend,
        exclude: Iterable[str | type] | str | type = (),
        named: Callable[[str, Backend], QConfig] = named_qconfig,
        pow2_scales: bool = False,
    ) -> ResolvedConfig:
        """The mapping with names replaced by QConfigs, which ``named`` knows, and exclusions on top.

        ``pow2_scales`` makes every scale a power of two.
        """
        entries = [exclude] if isinstance(exclude, str) or callable(exclude) else exclude

        def concrete(qconfig: QConfig | str | None) -> QConfig | None:
            found = named(qconfig, backend) if isinstance(qconfig, str) else qconfig
            if found is not None and not isinstance(found, QConfig):
                raise ConfigError(
                    f"{found!r} is not a qconfig; give a QConfig, a name ({', '.join(QCONFIG_NAMES)}) or None"
                )
            return found.with_pow2_scales() if found is not None and pow2_scales else found

        return ResolvedConfig(
            concrete(self._global),
            {name: concrete(q) for name, q in self._types.items()},
            {name: concrete(q) for name, q in self._names.items()},
            {pattern: concrete(q) for pattern, q in self._regexes.items()},
            tuple(_type_name(entry) for entry in entries),
        )


@dataclass(frozen=True)
class ResolvedConfig:
    """A :class:`QConfigMapping` made concrete for one backend; answers for each node."""

    default: QConfig | None
    types: Mapping[str, QConfig | None]
    names: Mapping[str, QConfig | None]
    regexes: Mapping[str, QConfig | None]
    excluded: tuple[str, ...]

    def lookup(self, origin: Origin, op_name: str) -> QConfig | None:
        """The QConfig of a node; ``None``: it stays float."""
        ancestors = _ancestors(origin.module_path)
        if any(_excludes(entry, origin, op_name) for entry in self.excluded):
            return None
        for path in ancestors:
            if path in self.names:
                return self.names[path]
        for pattern in reversed(list(self.regexes)):
            if any(re.fullmatch(pattern, path) for path in ancestors):
                return self.regexes[pattern]
        for name in (origin.kind, op_name, *origin.around):
            if name in self.types:
                return self.types[name]
        return self.default

    def check_names(self, nodes: Iterable[tuple[Origin, str]]) -> None:
        """Raise ConfigError for any entry that matches none of the nodes, given as (origin, op name)."""
        known = list(nodes)
        paths = {path for origin, _ in known for path in _ancestors(origin.module_path)}
        kinds = {name for origin, op_name in known for name in (op_name, origin.kind, *origin.around)}
        unmatched = [f"module name '{name}'" for name in self.names if name not in paths]
        unmatched += [f"regex '{p}'" for p in self.regexes if not any(re.fullmatch(p, path) for path in paths)]
        unmatched += [f"type '{kind}'" for kind in self.types if kind not in kinds]
        unmatched += [
            f"exclude '{entry}'"
            for entry in self.excluded
            if not any(_excludes(entry, origin, name) for origin, name in known)
        ]
        if unmatched:
            some = ", ".join(sorted(paths - {""})[:8])
            raise ConfigError(
                f"{', '.join(unmatched)} matches nothing in this model; check the spelling "
                f"(module names here begin: {some}, ...)"
            )


def _excludes(entry: str, origin: Origin, op_name: str) -> bool:
    """Whether an exclusion (op name, type, module path or a glob of paths) speaks of a node."""
    return entry in (op_name, origin.kind, *origin.around) or any(
        fnmatch.fnmatchcase(path, entry) for path in _ancestors(origin.module_path) if path
    )


def _ancestors(path: str) -> list[str]:
    """``a.b.c`` and the modules around it, innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)] + [""]


def _type_name(kind: type | Callable[..., Any] | str) -> str:
    return kind if isinstance(kind, str) else qualified_name(kind)


def qualified_name(what: Any) -> str:
    """``module.name`` of a class or function, the way :class:`~fxq.plan.Origin` records it."""
    module = getattr(what, "__module__", None) or "torch"
    name = getattr(what, "__qualname__", getattr(what, "__name__", repr(what)))
    return sys.intern(f"{module}.{name}")  # nodes have few different ones
