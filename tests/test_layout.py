"""The structure of the sources: who may import whom, what nobody may import, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("fxq", "passes", "backends", "examples")
# what passes and backends are written in terms of
TYPE_MODULES = (
    "errors",
    "matcher",
    "numerics",
    "observers",
    "op_table",
    "ops",
    "plan",
    "qdq",
    "ranges",
    "spec",
    "statistics",
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, inside functions too: ``from a import b`` is ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def offending(path: Path, *forbidden: str) -> list[str]:
    return [name for name in imports(path) if any(f"{name}.".startswith(f"{root}.") for root in forbidden)]


def reached(start: Path, *forbidden: str) -> list[str]:
    """What of ``forbidden`` a file imports, itself or through other files of fxq, each with the path to it."""
    found, trails = [], {start: start.stem}
    queue = [start]
    for path in queue:
        found += [f"{trails[path]} -> {name}" for name in offending(path, *forbidden)]
        for target in filter(None, map(source_of, imports(path))):
            if target not in trails:
                trails[target] = f"{trails[path]} -> {target.stem}"
                queue.append(target)
    return found


def source_of(module: str) -> Path | None:
    """The file of ``fxq.x``, ``fxq.passes.x`` or ``fxq.backends.x``."""
    parts = module.split(".")
    if parts[0] != "fxq" or len(parts) < 2:
        return None
    path = ROOT.joinpath(*(parts[1:] if parts[1] in ("passes", "backends") else parts))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def attribute_chains(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_the_scan_sees_every_spelling(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import passes.lower, passes_of\n"
        "from torch import ao\n"
        "def f():\n"
        "    from torch.ao.quantization import observer\n"
    )
    assert offending(source, "passes", "torch.ao") == [
        "passes.lower",
        "torch.ao",
        "torch.ao.quantization",
        "torch.ao.quantization.observer",
    ]
    source.write_text("import torch\nx = torch.ao.nn\n")
    assert "torch.ao" in attribute_chains(source)


def test_the_scan_follows_imports() -> None:
    assert reached(ROOT / "fxq" / "cli.py", "fxq.errors")
    assert any(trail.count(" -> ") > 1 for trail in reached(ROOT / "fxq" / "api.py", "fxq.numerics"))
    assert reached(ROOT / "fxq" / "api.py", "fxq.backends")


def test_there_is_something_to_scan() -> None:
    assert all(sources(folder) for folder in FOLDERS)
    assert {path.stem for path in sources("fxq")} >= set(TYPE_MODULES)


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_import(path: Path) -> None:
    """``import passes`` would load every class a second time; torch.ao is deprecated; relative imports hide both."""
    assert not offending(path, "passes", "backends", "torch.ao")
    assert "torch.ao" not in attribute_chains(path)
    assert not [name for name in imports(path) if name.startswith(".")]


@pytest.mark.parametrize("name", TYPE_MODULES)
def test_types_know_neither_passes_nor_backends(name: str) -> None:
    assert not reached(ROOT / "fxq" / f"{name}.py", "fxq.passes", "fxq.backends", "fxq.api")


@pytest.mark.parametrize("path", sources("passes"), ids=lambda path: path.stem)
def test_passes_are_given_their_backend(path: Path) -> None:
    assert not reached(path, "fxq.backends", "fxq.api")


@pytest.mark.parametrize("path", sources("backends"), ids=lambda path: path.stem)
def test_backends_know_no_pass(path: Path) -> None:
    assert not reached(path, "fxq.passes", "fxq.api")


def test_import_is_silent_and_leaves_optional_packages_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fxq\n"
        "optional = {'torchvision', 'PIL', 'sklearn', 'onnx', 'onnxruntime'}\n"
        "assert not optional & (set(sys.modules) - before), optional & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
