"""The exceptions and the one warning class of fxq.

Every message names the node and module path it is about, says what is wrong and what to do next.
"""

from __future__ import annotations


class FxqError(Exception):
    """Base class of every error fxq raises on purpose."""


class TraceError(FxqError):
    """Nothing of the model could be traced with ``torch.fx``; ``statement`` is what blocks, with file and line."""

    def __init__(self, message: str, statement: str = "") -> None:
        super().__init__(message)
        self.statement = statement or message


class ConfigError(FxqError):
    """A qconfig, an exclusion or an option that is malformed or matches nothing."""


class BackendError(FxqError):
    """An unknown backend, a malformed table, or an engine this build of torch lacks."""


class CalibrationError(FxqError):
    """Calibration data that is empty, malformed or not finite."""


class StageError(FxqError):
    """A step called on a model of the wrong stage, e.g. ``convert`` before ``prepare``."""


class InputError(FxqError):
    """Inputs whose number, dtype or shape the model cannot take."""


class PlanError(FxqError):
    """A graph and its quantization plan disagree: a bug in a pass, never a user's mistake."""


class FileFormatError(FxqError):
    """A file that is not a readable fxq file: truncated, corrupt, or of another version."""


class MissingDependencyError(FxqError):
    """An optional package is needed; the message names the extra to install."""


class FxqWarning(UserWarning):
    """Something a user should know and can act on; each is printed once."""
