"""A model's graph as a networkx DiGraph with the facts of the tables on its nodes, written as DOT or GraphML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from fxq.errors import FxqError, MissingDependencyError
from fxq.graph_module import QuantModule
from fxq.partition import regions_of
from fxq.records import graph_records


def to_networkx(model: nn.Module) -> nx.DiGraph[str]:
    """A DiGraph of a prepared, reference or lowered model.

    Nodes are named as in the graph and carry ``op``, ``type``, ``kernel``, ``scale``, ``zero_point``, ``shape``,
    ``reason`` and ``module``; inputs and outputs have the types ``"input"`` and ``"output"``. Values are plain
    strings and numbers, absent where unknown, so that every format can hold them. Where a model has several regions,
    names begin with the region's path and a slash.

    Raises:
        StageError: if the model was not made by fxq.

    Example:
        >>> graph = fxq.to_networkx(qmodel)                                           # doctest: +SKIP
        >>> nx.descendants(graph, "x_quantize")                                       # doctest: +SKIP
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    records = graph_records(model)
    for path, region in regions_of(model).items():
        plan = region.plan
        graph.graph.update(model=plan.model, backend=plan.backend, stage=plan.stage.value)
        _add_region(graph, path, region, {r["node"]: r for r in records if r["region"] == path})
    return graph


def _add_region(graph: nx.DiGraph[str], path: str, region: QuantModule, records: dict[str, dict[str, Any]]) -> None:
    prefix = f"{path}/" if path else ""
    for node in region.graph.nodes:
        if node.op == "get_attr":
            continue
        facts = dict(records.get(node.name, {"type": {"placeholder": "input"}.get(node.op, node.op)}))
        facts.pop("node", None)
        facts.pop("inputs", None)
        if facts.get("shape") is not None:
            facts["shape"] = "x".join(map(str, facts["shape"]))
        graph.add_node(prefix + node.name, **{key: value for key, value in facts.items() if value not in (None, "")})
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        graph.add_edges_from((prefix + source.name, prefix + node.name) for source in sources)


def write_graph(graph: nx.DiGraph[str], path: str | Path) -> None:
    """Write a graph to ``path``, in the format that its suffix names: ``.dot`` or ``.graphml``.

    Raises:
        FxqError: for another suffix.
        MissingDependencyError: if pydot, which writes DOT, is not installed.
    """
    suffix = Path(path).suffix
    if suffix == ".graphml":
        nx.write_graphml(graph, path)
    elif suffix == ".dot":
        try:
            import pydot  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("writing DOT needs pydot: pip install 'fxq[dot]'") from error
        nx.nx_pydot.write_dot(graph, path)
    else:
        raise FxqError(f"cannot write a graph as '{suffix}'; use a path that ends in .dot or .graphml")
