"""The documentation: its Python runs, its printed output is what runs print, its names and links exist.

Of each page the fenced blocks run in order, in one namespace and a temporary directory::

    ```python          runs
    ```python no-run   is only compiled
    ```text output     is what the python block before it prints; FXQ_UPDATE_DOCS=1 rewrites it
    ```text            is left alone
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from fxq.api import get_backend
from fxq.observers import OBSERVERS
from fxq.preparation import prepare_passes, prepare_training_passes
from fxq.presets import get_preset

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) if path.is_file())
UPDATE = os.environ.get("FXQ_UPDATE_DOCS") == "1"

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`(fxq(?:\.\w+)+)[`(]")
_FILE = re.compile(r"`((?:fxq|passes|backends|tests|benchmarks|docs|examples)/[\w/]+\.\w+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


class Block(NamedTuple):
    info: str
    text: str
    line: int  # of the first line of text
    span: tuple[int, int]  # of text


def blocks(page: str) -> list[Block]:
    return [
        Block(found["info"].strip(), found["text"], page.count("\n", 0, found.start("text")) + 1, found.span("text"))
        for found in _FENCE.finditer(page)
    ]


@contextlib.contextmanager
def namespace(name: str) -> Iterator[dict[str, object]]:
    """The globals of a module that can be imported, as classes defined in it need; registries are put back."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        with mock.patch.dict(OBSERVERS), torch.random.fork_rng():
            torch.manual_seed(0)
            yield vars(module)
    finally:
        del sys.modules[name]


def run(block: Block, path: Path, names: dict[str, object]) -> str:
    """Execute a block; returns what it prints. Line numbers in a traceback are those of the page."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = path.read_text()
    monkeypatch.chdir(tmp_path)
    printed: str | None = None
    changes: list[tuple[tuple[int, int], str]] = []
    with namespace(f"page_{path.stem}") as names:
        for block in blocks(page):
            if block.info == "python":
                printed = run(block, path, names)
            elif block.info == "python no-run":
                compile(block.text, str(path), "exec")
            elif block.info == "text output":
                assert printed, f"{path.name}:{block.line}: no python block prints anything before this output"
                if UPDATE:
                    changes.append((block.span, stripped(printed) + "\n"))
                else:
                    stale = f"{path.name}:{block.line} prints something else; if that is right, FXQ_UPDATE_DOCS=1"
                    assert stripped(printed) == stripped(block.text), stale
    for (start, end), text in reversed(changes):
        page = page[:start] + text + page[end:]
    if changes:
        path.write_text(page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_info_strings_are_known(path: Path) -> None:
    """A misspelled one would leave a block untested."""
    known = {"", "python", "python no-run", "text", "text output", "sh", "bash", "console", "diff"}
    assert {block.info for block in blocks(path.read_text())} <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_names_files_and_links_exist(path: Path) -> None:
    page = path.read_text()
    missing = [name for name in _NAME.findall(page) if not resolves(name)]
    missing += [name for name in _FILE.findall(page) if not (ROOT / name).exists()]
    missing += [link for link in _LINK.findall(page) if not (path.parent / link).exists()]
    assert not missing


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_the_design_page_lists_every_pass_in_order() -> None:
    common = (get_backend("qnnpack"), None, ((), {}))
    page = blocks((ROOT / "docs" / "design.md").read_text())
    pipelines = (prepare_passes(*common, get_preset("advanced")), prepare_training_passes(*common, None))
    for block, steps in zip(page, pipelines, strict=False):
        passes = [step.name for step in steps]
        listed = [line.split()[0] for line in block.text.splitlines() if line.strip()]
        assert [name for name in listed if name in passes] == passes


def test_the_checks_see_what_is_wrong() -> None:
    assert resolves("fxq.observers.OBSERVERS") and resolves("fxq.passes.lower.lower")
    assert not resolves("fxq.no_such_name") and not resolves("fxq.observers.NO_SUCH_NAME")
    page = "a\n```python\nx = 1\nprint(x)\n```\n\n```text output\n1\n```\n"
    first, second = blocks(page)
    assert (first.info, first.line, second.info) == ("python", 3, "text output")
    with namespace("page_of_a_test") as names:
        assert stripped(run(first, Path("page.md"), names)) == stripped(second.text)
    assert _NAME.findall("`fxq.load` and `fxq.save(x)`") == ["fxq.load", "fxq.save"]
