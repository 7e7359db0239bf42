"""The command line: what it prints, what it writes, and that a mistake is one line and status 1."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graph_json import closed, node, opened

import fxq
from fxq.cli import main
from fxq.errors import FxqError, FxqWarning
from fxq.image_folder import ImageFolder
from fxq.models import load_model, preprocessing

Image = pytest.importorskip("PIL.Image")

TINY_NET = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))
"""
TINY = "tiny_net_of_cli_tests:Tiny"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, as the current directory: a model's source and seven photos in two subfolders."""
    monkeypatch.chdir(tmp_path)
    Path("tiny_net_of_cli_tests.py").write_text(TINY_NET)
    generator = torch.Generator().manual_seed(0)
    for index in range(7):
        path = Path("photos", "ab"[index % 2], f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path


def quantize(*options: str) -> int:
    return main(["quantize", TINY, "--calibrate", "photos", "--out", "tiny.fxq", "--size", "32", *options])


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As a user does, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "fxq", *arguments], capture_output=True, text=True, cwd=cwd)


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.err.startswith("fxq: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# --- quantize ---


def test_quantize_then_inspect(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--batch-size", "3") == 0
    printed = capsys.readouterr().out
    assert "x86" in printed
    assert "saved tiny.fxq" in printed

    tables = {}
    for table in ("summary", "graph", "fusion", "all"):
        assert main(["inspect", "tiny.fxq", "--table", table]) == 0
        tables[table] = capsys.readouterr().out
    assert "conv1" in tables["graph"]
    assert "conv1" in tables["fusion"]
    assert tables["all"] == tables["summary"] + "\n" + tables["graph"] + "\n" + tables["fusion"]
    assert main(["inspect", "tiny.fxq"]) == 0
    assert capsys.readouterr().out == tables["summary"]


def test_the_saved_file_is_the_model(project: Path) -> None:
    assert quantize("--quiet") == 0
    model = load_model(TINY)
    (images,) = ImageFolder("photos", preprocessing(TINY, size=32))
    with torch.no_grad():
        expected, found = model(images), fxq.load("tiny.fxq")(images)
    noise = ((found - expected).square().mean() / expected.square().mean()).item()
    assert 0 < noise < 1e-3


def test_it_equals_the_one_call(project: Path) -> None:
    assert quantize("--quiet", "--batch-size", "4") == 0
    images = ImageFolder("photos", preprocessing(TINY, size=32), batch_size=4)
    expected = fxq.quantize(load_model(TINY), images, backend="x86", progress=False)
    batch = next(iter(images))
    assert torch.equal(fxq.load("tiny.fxq")(batch), expected(batch))


def test_quiet_is_quiet(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quantize("--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_options_reach_the_compiler(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--backend", "qnnpack", "--qconfig", "per_tensor", "--exclude", "fc", "--exclude", "conv1") == 0
    assert "qnnpack" in capsys.readouterr().out
    main(["inspect", "tiny.fxq", "--table", "graph"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    excluded = [line for line in rows.values() if "exclu" in line]
    assert len(excluded) >= 2


def test_presets_and_powers_of_two(project: Path) -> None:
    assert quantize("--quiet", "--preset", "advanced", "--qconfig", "per_tensor", "--pow2-scales") == 0
    model = fxq.load("tiny.fxq")
    assert any(note.startswith("biases corrected") for note in model.plan.notes)
    scales = [record["scale"] for record in fxq.graph_records(model) if record["scale"] is not None]
    assert scales
    assert all(math.frexp(scale)[0] == 0.5 for scale in scales)


def test_num_batches_limits_the_images(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    call = fxq.quantize

    def watched(model: torch.nn.Module, data: ImageFolder, **options: Any) -> torch.nn.Module:
        seen.extend(data)
        return call(model, data, **options)

    monkeypatch.setattr(fxq, "quantize", watched)
    assert quantize("--quiet", "--batch-size", "2", "--num-batches", "2") == 0
    assert [len(batch) for batch in seen] == [2, 2]


def test_random_weights_are_mentioned(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["squeezenet1_1", "--calibrate", "photos", "--out", "net.fxq", "--size", "32", "--quiet"]
    assert main(["quantize", *arguments]) == 0
    assert "fxq: note: squeezenet1_1 has random weights" in capsys.readouterr().err
    torch.save(load_model("squeezenet1_1").state_dict(), "weights.pt")
    assert main(["quantize", *arguments, "--weights", "weights.pt"]) == 0
    assert capsys.readouterr().err == ""


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet81", "--calibrate", "photos", "--out", "x.fxq"], "resnet18"),
        (["no_module_here:f", "--calibrate", "photos", "--out", "x.fxq"], "no_module_here"),
        ([TINY, "--calibrate", "nowhere", "--out", "x.fxq"], "no folder 'nowhere'"),
        ([TINY, "--calibrate", "empty", "--out", "x.fxq"], "no image"),
        ([TINY, "--calibrate", "broken", "--out", "x.fxq"], "bad.png"),
        ([TINY, "--calibrate", "photos", "--out", "no/where.fxq"], "no folder 'no'"),
        ([TINY, "--calibrate", "photos", "--out", "empty"], "empty"),
        ([TINY, "--calibrate", "photos", "--out", "x.fxq", "--weights", "no.pt"], "no such file"),
        ([TINY, "--calibrate", "photos", "--out", "x.fxq", "--backend", "x68"], "x86"),
        ([TINY, "--calibrate", "photos", "--out", "x.fxq", "--exclude", "conv9"], "conv9"),
    ],
)
def test_quantize_mistakes(
    arguments: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken", "bad.png").write_bytes(b"not an image")
    assert main(["quantize", *arguments]) == 1
    assert message in the_error(capsys)
    assert not Path("x.fxq").exists()


@pytest.mark.parametrize("name", ["missing.fxq", "garbage.fxq", "photos"])
def test_inspect_what_is_not_a_model(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("garbage.fxq").write_bytes(b"\x00garbage")
    assert main(["inspect", name]) == 1
    assert name in the_error(capsys)


def test_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "x68"]) == 1
    assert "x68" in the_error(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["quantize"],
        ["quantize", "resnet18", "--out", "x"],
        ["quantize", "resnet18", "--calibrate", "d", "--out", "x", "--qconfig", "per_row"],
        ["quantize", "resnet18", "--calibrate", "d", "--out", "x", "--batch-size", "0"],
        ["quantize", "resnet18", "--calibrate", "d", "--out", "x", "--num-batches", "many"],
        ["inspect"],
        ["inspect", "x", "--table", "pie"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: fxq" in capsys.readouterr().err


# --- backends, help, warnings ---


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("fbgemm", "qnnpack", "x86", "onednn"))
    assert main(["backends", "qnnpack"]) == 0
    assert "conv2d" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["quantize"], ["inspect"], ["backends"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"\n  fxq {' '.join(command)}" in printed, "an example"
    assert max(map(len, printed.splitlines())) <= 120


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> str:
        warnings.warn("mind\nthis", FxqWarning, stacklevel=2)
        return "table"

    monkeypatch.setattr(fxq, "backends", warn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert main(["backends"]) == 0
    assert capsys.readouterr() == ("table\n", "fxq: warning: mind this\n")


def test_processes_exit_with_the_status(project: Path) -> None:
    done = run("backends")
    assert (done.returncode, done.stderr) == (0, "")
    failed = run("quantize", "resnet81", "--calibrate", "photos", "--out", "x.fxq", cwd=project)
    assert failed.returncode == 1
    assert failed.stderr.startswith("fxq: error: ")
    assert "Traceback" not in failed.stderr
    assert run("quantize").returncode == 2


def test_a_reader_that_stops_early() -> None:
    command = f"'{sys.executable}' -m fxq backends x86 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout


@pytest.mark.parametrize("to", ["onnx", "torchscript", "exported"])
def test_convert(to: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if to == "onnx":
        pytest.importorskip("onnx")
    assert quantize("--quiet") == 0
    assert main(["convert", "tiny.fxq", "--to", to]) == 0
    written = project / {"onnx": "tiny.onnx", "torchscript": "tiny.pt", "exported": "tiny.pt2"}[to]
    assert f"saved {written.name} (" in capsys.readouterr().out and written.stat().st_size > 1000
    assert main(["convert", "tiny.fxq", "--to", to, "--out", "none/net"]) == 1
    assert "none/net: cannot be written" in capsys.readouterr().err


def test_convert_into_what_is_no_new_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--quiet") == 0
    capsys.readouterr()
    for to in ("torchscript", "exported"):
        assert main(["convert", "tiny.fxq", "--to", to, "--out", "photos"]) == 1
        assert "photos: cannot be written (Is a directory)" in the_error(capsys)
    assert main(["convert", ".", "--to", "torchscript"]) == 1
    assert ".: cannot be read (Is a directory)" in the_error(capsys)
    Path("tiny.pt").write_bytes(before := Path("tiny.fxq").read_bytes())
    assert main(["convert", "tiny.pt", "--to", "torchscript"]) == 1
    assert "tiny.pt: this is the model itself; name another file with --out" in the_error(capsys)
    assert Path("tiny.pt").read_bytes() == before


@pytest.mark.parametrize(
    "options", [["onnx", "--backend", "x86"], ["torchscript", "--clips"], ["torchscript", "--fixed-batch"]]
)
def test_options_of_another_format(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "tiny.fxq", "--to", *options])
    assert exit_.value.code == 2
    assert "is for --to" in capsys.readouterr().err


def test_a_forged_file_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of no graph, or of one that no kernel takes: nothing is done, and that is said."""
    assert quantize("--quiet") == 0
    capsys.readouterr()
    content, tensors = opened(Path("tiny.fxq").read_bytes())
    args = node(content["regions"][""], "call_function", "op:conv2d")["args"]["tuple"]
    args[3:] = ["one", {"tuple": [1, 1]}, 1, "groups"]
    Path("kernel.fxq").write_bytes(closed(content, tensors))
    Path("empty.fxq").write_bytes(closed({}, {}))
    Path("parts.fxq").write_bytes(closed({"partition": ["", {}, 0, False], "regions": {}, "model": "Net"}, {}))
    for name in ("kernel.fxq", "empty.fxq", "parts.fxq"):
        for command in (["inspect"], ["bench"], ["convert", "--to", "torchscript"], ["convert", "--to", "exported"]):
            assert main([command[0], name, *command[1:]]) == 1
            assert name in (error := the_error(capsys)) or "torch.export refuses the model" in error


def test_convert_runs_the_same_numbers(project: Path) -> None:
    assert quantize("--quiet") == 0
    assert main(["convert", "tiny.fxq", "--to", "torchscript", "--backend", "qnnpack", "--out", "q.pt"]) == 0
    torch.backends.quantized.engine, before = "qnnpack", torch.backends.quantized.engine
    try:
        x = torch.rand(3, 3, 32, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(torch.jit.load("q.pt")(x), fxq.load("tiny.fxq", "qnnpack")(x))
    finally:
        torch.backends.quantized.engine = before


def test_convert_to_clips(project: Path) -> None:
    onnx = pytest.importorskip("onnx")
    assert quantize("--quiet") == 0
    assert main(["convert", "tiny.fxq", "--to", "onnx", "--clips", "--fixed-batch"]) == 0
    model = onnx.load("tiny.onnx")
    assert "Clip" in {node.op_type for node in model.graph.node}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 7


TWO_PARTS = """
import torch
from torch import nn

class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = Head()

    def forward(self, x):
        y = self.backbone(x)
        return self.head([y, y + 1]) if float(x.sum()) != 0 else y

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, levels):
        return [torch.relu(self.conv(level)) for level in (levels[0], levels[1])]
"""


def test_part_by_part(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part is a file that gives its part's numbers, and is timed; one with a list for an input is named."""
    Path("two_parts_of_cli_tests.py").write_text(TWO_PARTS)
    options = ["--calibrate", "photos", "--out", "parts.fxq", "--size", "32", "--quiet"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["quantize", "two_parts_of_cli_tests:Parts", *options]) == 0
        capsys.readouterr()
        assert main(["convert", "parts.fxq", "--to", "torchscript"]) == 1
        out, err = capsys.readouterr()
        assert "saved parts.backbone.pt (" in out and "1 of its parts" in err and "'head'" in err
        model = fxq.load("parts.fxq", model=load_model("two_parts_of_cli_tests:Parts"))
        x = torch.rand(3, 3, 32, 32)
        assert torch.equal(torch.jit.load("parts.backbone.pt")(x), model.backbone(x))
    assert main(["inspect", "parts.fxq", "--table", "all"]) == 0
    out = capsys.readouterr().out
    assert "Parts" in out and "backbone" in out and "head" in out and "quantized::conv2d" in out
    assert main(["bench", "parts.fxq", "--threads", "1", "--seconds", "1"]) == 0
    out = capsys.readouterr().out
    assert "backbone: Sequential, backend x86, input [7, 3, 32, 32], 1 threads" in out
    assert "head: Head: not timed" in out


FOREIGN = """
import torch
from torch import nn

class Branch(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) != 0 else -x

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.branch, self.last = nn.Conv2d(8, 4, 1), Branch(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.branch(self.conv(x)))

class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), Head()

    def forward(self, x):
        y = self.backbone(x)
        return self.head(y) if float(x.sum()) != 0 else y
"""


def test_a_part_whose_code_a_file_does_not_hold(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tables are printed, and the others are converted and timed."""
    Path("foreign_of_cli_tests.py").write_text(FOREIGN)
    options = ["--calibrate", "photos", "--out", "net.fxq", "--size", "32", "--quiet"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["quantize", "foreign_of_cli_tests:Foreign", *options]) == 0
        with pytest.raises(FxqError, match=r"'head\.branch'"):
            fxq.load("net.fxq")
        capsys.readouterr()
        assert main(["inspect", "net.fxq", "--table", "all"]) == 0
        assert "head" in capsys.readouterr().out
        assert main(["convert", "net.fxq", "--to", "torchscript"]) == 1
        out, err = capsys.readouterr()
        assert "saved net.backbone.pt (" in out and "1 of its parts" in err and "'head'" in err
        assert main(["bench", "net.fxq", "--threads", "1", "--seconds", "1"]) == 0
    out = capsys.readouterr().out
    assert "backbone: Sequential, backend" in out
    assert "head: Head: not timed; the code of 'foreign_of_cli_tests.Branch' is missing" in out


def test_bench(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--quiet") == 0
    capsys.readouterr()
    before = torch.get_num_threads()
    assert main(["bench", "tiny.fxq", "--batch", "2", "--threads", "1", "--seconds", "1"]) == 0
    out = capsys.readouterr().out
    assert "Tiny, backend x86, input [2, 3, 32, 32], 1 threads" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["float", "int8"]
    assert torch.get_num_threads() == before
    assert main(["bench", "none.fxq"]) == 1
    capsys.readouterr()
    assert main(["bench", "tiny.fxq", "--threads", "1000000"]) == 1
    assert "--threads 1000000: this machine has" in the_error(capsys)
