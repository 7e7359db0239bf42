"""torchvision must import beside any torch build; its Python operators must be right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fxq.errors import MissingDependencyError
from fxq.torchvision_ops import import_torchvision, nms


def brute_force_nms(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    """The definition, on Python numbers: a box stays unless a better kept one overlaps it too much."""
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area_a + area_b - width * height)


@pytest.mark.parametrize("count", [1, 2, 17, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_nms_is_the_definition(count: int, threshold: float) -> None:
    torch.manual_seed(count)
    corner = torch.rand(count, 2, dtype=torch.float64) * 5
    boxes = torch.cat([corner, corner + 0.5 + 3 * torch.rand(count, 2, dtype=torch.float64)], dim=1)
    scores = torch.rand(count, dtype=torch.float64)
    expected = brute_force_nms(boxes.tolist(), scores.tolist(), threshold)
    assert nms(boxes, scores, threshold).tolist() == expected


def test_nms_drops_and_keeps_something() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist() == [1, 2]
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.99).tolist() == [1, 2, 0]


def test_nms_of_nothing_is_nothing() -> None:
    kept = nms(torch.empty(0, 4), torch.empty(0), 0.5)
    assert kept.dtype == torch.int64
    assert kept.shape == (0,)


def test_nms_keeps_empty_boxes() -> None:
    assert nms(torch.zeros(2, 4), torch.tensor([0.1, 0.2]), 0.5).tolist() == [1, 0]


def test_nms_of_equal_scores_keeps_the_first() -> None:
    assert nms(torch.tensor([[0.0, 0, 1, 1]]).repeat(3, 1), torch.ones(3), 0.5).tolist() == [0]


def test_torchvision_nms_runs() -> None:
    import_torchvision()
    from torchvision.ops import batched_nms

    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [0, 0, 2, 2]])
    kept = batched_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1]), 0.5)
    assert kept.tolist() == [1, 2]


def test_roi_align_of_a_ramp_is_the_ramp() -> None:
    """Bilinear sampling is exact on a linear image, so each bin's mean is the value at its centre."""
    import_torchvision()
    from torchvision.ops import roi_align

    ramp = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    rois = torch.tensor([[0.0, 2.0, 2.0, 10.0, 10.0]]).repeat(130, 1)
    pooled = roi_align(ramp, rois, (2, 2), sampling_ratio=2, aligned=True)
    assert pooled.shape == (130, 1, 2, 2)
    assert torch.allclose(pooled, torch.tensor([3.5, 7.5]).expand(130, 1, 2, 2))


@pytest.mark.parametrize("first", ["", "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"])
def test_import_in_a_fresh_process_is_silent(first: str) -> None:
    """Also after a plain import of torchvision has failed half-way."""
    code = (
        f"{first}from fxq.torchvision_ops import import_torchvision\n"
        "assert import_torchvision() is import_torchvision()\n"
        "import torchvision\n"
        "assert 'resnet18' in torchvision.models.list_models()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_where_the_library_loads_nothing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxq.torchvision_ops

    import_torchvision()  # from here on a plain import works, as where the C++ library loads
    import_torchvision.cache_clear()
    monkeypatch.setattr(fxq.torchvision_ops, "_declare_operators", lambda: pytest.fail("declared operators"))
    monkeypatch.setattr(fxq.torchvision_ops, "_run_without_library", lambda: pytest.fail("patched torchvision"))
    assert import_torchvision() is sys.modules["torchvision"]


def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision.cache_clear()

    def broken(name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()


def test_missing_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what makes an import fail as if not installed
    with pytest.raises(MissingDependencyError, match=r"fxq\[vision\]"):
        import_torchvision()


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detection_model_runs(name: str) -> None:
    models = import_torchvision().models
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, weights_backbone=None).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 96, 96)])
    assert found["boxes"].shape[1:] == (4,)
    assert len(found["boxes"]) == len(found["scores"])
