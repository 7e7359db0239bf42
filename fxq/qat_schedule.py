"""The usual order of a quantization-aware training: train all, then freeze the ranges, then the statistics."""

from __future__ import annotations

from torch import nn

from fxq.errors import ConfigError
from fxq.qat import freeze_batchnorm, freeze_observers


class QATSchedule:
    """Freezes a model's observers and BatchNorm statistics at given steps.

    Ranges and statistics that move to the end are other ones in int8 than those the last steps trained with. Two
    thirds of the way is a good time for the observers, a little later for BatchNorm (Krishnamoorthi,
    arXiv:1806.08342, section 3.2.2).

    Args:
        freeze_observers_at, freeze_batchnorm_at: numbers of steps after which; ``None`` for never.

    Attributes:
        steps: how often :meth:`step` was called.

    Raises:
        ConfigError: for a number of steps that is not positive.

    Example:
        >>> schedule = fxq.QATSchedule(freeze_observers_at=600, freeze_batchnorm_at=800)
        >>> for images, labels in loader:                                             # doctest: +SKIP
        ...     ...
        ...     optimizer.step()
        ...     schedule.step(prepared)
    """

    def __init__(self, *, freeze_observers_at: int | None = None, freeze_batchnorm_at: int | None = None) -> None:
        for name, at in (("freeze_observers_at", freeze_observers_at), ("freeze_batchnorm_at", freeze_batchnorm_at)):
            if at is not None and at < 1:
                raise ConfigError(f"QATSchedule: {name}={at}; give a positive number of steps, or None for never")
        self.freeze_observers_at, self.freeze_batchnorm_at = freeze_observers_at, freeze_batchnorm_at
        self.steps = 0

    def step(self, model: nn.Module) -> None:
        """Count a step, and freeze what is due. Call it after ``optimizer.step()``.

        Args:
            model: from :func:`fxq.prepare_qat`, or a module around it such as ``DistributedDataParallel``.

        Raises:
            StageError: if nothing in the model is prepared for training.
        """
        self.steps += 1
        if self.steps == self.freeze_observers_at:
            freeze_observers(model)
        if self.steps == self.freeze_batchnorm_at:
            freeze_batchnorm(model)

    def state_dict(self) -> dict[str, int]:
        """The number of steps; what is frozen is in the model's ``state_dict``."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`'s result."""
        self.steps = state["steps"]
