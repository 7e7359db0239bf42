"""Import torchvision beside a CPU build of torch.

The torchvision wheel most people have is built for CUDA. Beside a CPU build of torch its C++ library does not
load, and ``import torchvision`` then stops at "operator torchvision::nms does not exist", though the models
and the transforms need none of those operators. Declaring the operators' schemas is all the import needs; a
``nms`` in plain torch and torchvision's own Python ``roi_align`` make the detection models run too.

On an installation whose C++ operators load, :func:`import_torchvision` is ``import torchvision``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from fxq.errors import MissingDependencyError

# torchvision registers a fake implementation for each of these without asking whether the operator exists.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_ROIS_AT_ONCE = 64


@functools.cache
def import_torchvision() -> ModuleType:
    """Import torchvision, with or without its C++ operators.

    Returns:
        The ``torchvision`` module; after the first call a plain ``import torchvision`` works as well.

    Raises:
        MissingDependencyError: if torchvision is not installed.

    Example:
        >>> torchvision = import_torchvision()
        >>> model = torchvision.models.resnet18().eval()
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise MissingDependencyError(
            "torchvision is not installed; install it with: pip install 'fxq[vision]'"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _declare_operators()
    torchvision = importlib.import_module("torchvision")
    _run_without_library()
    return torchvision


@functools.cache  # keeps the library alive: torch drops the operators together with it
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("nms", nms, "CPU")
    return library


def _run_without_library() -> None:
    """Let torchvision call what is available without its C++ library: ``nms`` and ``roi_align``."""
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    # The name torchvision.ops.roi_align is the function, so the module is looked up by its full name. Its Python
    # version compiles itself at the first call, which needs a C++ compiler and more time than it saves here.
    roi_align: Any = importlib.import_module("torchvision.ops.roi_align")
    eager = getattr(roi_align._roi_align, "__wrapped__", roi_align._roi_align)
    roi_align._roi_align = functools.partial(_roi_align_in_chunks, eager)


def _roi_align_in_chunks(eager: Any, features: torch.Tensor, rois: torch.Tensor, *args: Any) -> torch.Tensor:
    """A few regions at a time: the eager version holds some ten copies of all the sampled points."""
    return torch.cat([eager(features, chunk, *args) for chunk in rois.split(_ROIS_AT_ONCE)])


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression: keep the best box, drop those that overlap it, repeat.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``.
        scores: ``[N]``; equal scores keep their order.
        iou_threshold: a box is dropped if its intersection over union with a kept box is larger.

    Returns:
        Indices of the kept boxes, best score first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5)
        tensor([1, 2])
    """
    remaining = scores.argsort(descending=True, stable=True)
    kept = []
    while remaining.numel():
        best, rest = remaining[0], remaining[1:]
        kept.append(best)
        # not "<=": two empty boxes have an intersection over union of 0/0, and both stay
        remaining = rest[~(_iou(boxes[best], boxes[rest]) > iou_threshold)]
    return torch.stack(kept) if kept else remaining


def _iou(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    top_left = torch.maximum(box[:2], others[:, :2])
    bottom_right = torch.minimum(box[2:], others[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    areas = (others[:, 2:] - others[:, :2]).prod(dim=1)
    return intersection / ((box[2:] - box[:2]).prod() + areas - intersection)
