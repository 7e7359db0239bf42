"""The graph as a DiGraph, and as the files that other tools read."""

from __future__ import annotations

import sys
from pathlib import Path

import networkx as nx
import pytest
import torch
from models_for_tests import Lambda, conv
from torch import nn

import fxq
from fxq.errors import FxqError, MissingDependencyError, StageError
from fxq.networkx_export import write_graph

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def qmodel() -> nn.Module:
    torch.manual_seed(0)
    net = Lambda(lambda m, x: m.b(torch.relu(m.a(x))).abs(), a=conv(), b=conv(4, 4))
    return fxq.quantize(net, [X], exclude="b")


def test_the_facts_are_those_of_the_tables(qmodel: nn.Module) -> None:
    graph = fxq.to_networkx(qmodel)
    assert graph.graph == {"model": "Lambda", "backend": "x86", "stage": "lowered"}
    assert nx.is_directed_acyclic_graph(graph)
    records = {r["node"]: r for r in fxq.graph_records(qmodel)}
    assert set(graph) == {n.name for n in qmodel.graph.nodes if n.op != "get_attr"}
    for name, record in records.items():
        facts = graph.nodes[name]
        for key in ("op", "type", "kernel", "scale", "zero_point", "reason", "module"):
            assert facts.get(key) == (record[key] if record[key] not in (None, "") else None), (name, key)
        assert list(graph.predecessors(name)) == record["inputs"]
        assert facts["shape"] == "x".join(map(str, record["shape"]))
    assert graph.nodes["x"] == {"type": "input"} and graph.nodes["output"] == {"type": "output"}
    assert graph.nodes["b"]["reason"].startswith("excluded")
    assert "output" in nx.descendants(graph, "x")


@pytest.mark.parametrize("suffix", [".graphml", ".dot"])
def test_round_trip(suffix: str, qmodel: nn.Module, tmp_path: Path) -> None:
    graph, path = fxq.to_networkx(qmodel), tmp_path / f"net{suffix}"
    write_graph(graph, path)
    if suffix == ".graphml":
        again = nx.read_graphml(path)
        assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    else:
        again = nx.DiGraph(nx.nx_pydot.read_dot(path))
        for name, facts in graph.nodes(data=True):
            assert {k: v.strip('"') for k, v in again.nodes[name].items()} == {k: str(v) for k, v in facts.items()}
    assert set(again.edges) == set(graph.edges)


@pytest.mark.parametrize("name", ["net.png", "net", "net.DOT.txt"])
def test_another_suffix(name: str, qmodel: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FxqError, match=r"\.dot or \.graphml"):
        write_graph(fxq.to_networkx(qmodel), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_pydot_is_missing(qmodel: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxq\[dot\]'"):
        write_graph(fxq.to_networkx(qmodel), tmp_path / "net.dot")


def test_only_models_of_fxq() -> None:
    with pytest.raises(StageError, match=r"not made by fxq"):
        fxq.to_networkx(nn.ReLU())
