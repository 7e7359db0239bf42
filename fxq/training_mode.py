"""How a traced model follows ``model.train()`` and ``model.eval()``.

A trace runs a forward once, so ``F.dropout(x, training=self.training)`` would keep the mode of that moment. While a
model is traced for training, each module's ``training`` is a :class:`ModeFlag`, which arrives in the graph as an
argument and says whose mode it is. A pass replaces it by a call of a :class:`Mode` module at that module's path, whose
own ``training`` follows ``train()`` and ``eval()`` like any module's.
"""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fxq.errors import FxqWarning


class ModeFlag(int):
    """Stands for ``training`` of the module at ``path``; as a condition it is false, and remembers who asked."""

    path: str
    asked: list[str]

    def __new__(cls, path: str, asked: list[str]) -> ModeFlag:
        flag = super().__new__(cls, 0)
        flag.path, flag.asked = path, asked
        return flag

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        self.asked.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {line}")
        return False

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: object) -> ModeFlag:
        return self


class Mode(nn.Module):
    """Takes the place of a module that behaved by its mode, with that module's tensors; called, it tells the mode.

    Attributes:
        frozen: batches are not counted and statistics are not updated, in training mode too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    def forward(self) -> bool:
        """Whether to behave as in training."""
        return self.training and not self.frozen


class NormMode(Mode):
    """The mode of a BatchNorm; also counts its batches."""

    def forward(self) -> bool:
        """Whether to normalise with the batch's statistics and update the running ones."""
        batch = super().forward()
        counter = self._buffers.get("num_batches_tracked")
        if batch and counter is not None:
            counter += 1
        return batch

    def get_extra_state(self) -> torch.Tensor:
        """Whether it is frozen, as a tensor like all else in a ``state_dict``."""
        return torch.tensor(float(self.frozen))

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore :meth:`get_extra_state`'s result."""
        self.frozen = bool(state > 0.5)


def weight_of_batch(counter: torch.Tensor) -> float:
    """The weight of a BatchNorm's present batch in an average of all, from the number of batches."""
    return 1.0 / max(int(counter), 1)


@contextmanager
def mode_flags(model: nn.Module) -> Iterator[None]:
    """While open, each module's ``training`` is a flag; afterwards warns of branches that asked for one.

    The caller puts the modules' attributes back.
    """
    asked: list[str] = []
    for path, module in model.named_modules():
        module.__dict__["training"] = ModeFlag(path, asked)
    yield
    if asked:
        warnings.warn(
            f"{type(model).__name__} branches on its mode, and a traced model keeps one branch, that of eval mode: "
            f"{'; '.join(dict.fromkeys(asked))}. What it does in training mode only, such as auxiliary outputs, is "
            f"not trained",
            FxqWarning,
            stacklevel=2,
        )
