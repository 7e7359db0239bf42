"""What a model takes on disk, in memory once it is loaded, and at most while it runs: float beside int8.

Each model is loaded from its file in a process of its own, which has imported everything and run something else
beforehand; what is counted is the resident memory on top of that.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from latency_peers import calibration_data, channels_last
from model_matrix import live_model
from tabulate import tabulate
from torch import nn

import fxq
from fxq.torchvision_ops import import_torchvision

FORMS = ("float", "fxq", "fxq frozen")
_MIB = 2**20


def memory_table(names: list[str], batch: int) -> str:
    """One line a model: MiB of float, of int8 and of int8 frozen, on disk, loaded and at the peak of a call."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            files = _write(name, batch, Path(folder))
            found = {form: _in_process_of_its_own(form, files[form], batch) for form in FORMS}
            disk = {form: files[form].stat().st_size for form in FORMS[:2]}
        cells: list[Any] = [name, *(f"{disk[form] / _MIB:.1f}" for form in FORMS[:2])]
        for key in ("loaded", "peak"):
            cells += [f"{found[form][key] / _MIB:.0f}" for form in FORMS]
        rows.append([*cells, f"{found['fxq']['peak'] / found['float']['peak']:.2f}"])
    headers = ["", *(f"disk: {form}" for form in FORMS[:2])]
    headers += [f"{key}: {form}" for key in ("loaded", "peak") for form in FORMS]
    return tabulate(rows, [*headers, "peak, fxq / float"], disable_numparse=True, stralign="right", colalign=("left",))


def _write(name: str, batch: int, folder: Path) -> dict[str, Path]:
    """The files of a float model and of its int8 one."""
    model, x = live_model(name, 224), torch.randn(batch, 3, 224, 224)
    torch.save(model, folder / "float.pt")
    fxq.save(fxq.quantize(model, calibration_data(x), progress=False), folder / "int8.fxq")
    return {form: folder / ("float.pt" if form == "float" else "int8.fxq") for form in FORMS}


def _in_process_of_its_own(form: str, file: Path, batch: int) -> dict[str, int]:
    command = [sys.executable, __file__, form, str(file), str(batch)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return found


def measure(form: str, file: Path, batch: int) -> dict[str, int]:
    """Bytes on top of what a process with torch and fxq has, once the model is loaded and while it runs."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    x = channels_last(torch.randn(batch, 3, 224, 224))
    warm = fxq.quantize(small, [x], progress=False)
    with torch.no_grad():
        for model in (small, warm, fxq.freeze(warm, x)):
            model(x)
    del small, warm, model
    import_torchvision()  # which the float file names
    before = _settled()
    call = _load(form, file, x)
    loaded = _settled() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with torch.no_grad():
        for _ in range(3):
            call(x)
    return {"loaded": loaded, "peak": _status("VmHWM") - before}


def _load(form: str, file: Path, x: torch.Tensor) -> nn.Module:
    if form == "float":
        model: nn.Module = torch.load(file, weights_only=False)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    loaded = fxq.load(file)
    return loaded if form == "fxq" else fxq.freeze(loaded, x)


def _settled() -> int:
    """Resident bytes after everything that is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
