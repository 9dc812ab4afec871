"""The errors of this package. Each message names the argument, the value it had, and the remedy.

All derive from `ResetError`, a `ValueError`, so that one `except` catches what this package refuses.
"""

from __future__ import annotations


class ResetError(ValueError):
    """Base of every error that this package raises on purpose."""


class ConfigError(ResetError):
    """A field of a configuration has a value it cannot have, or two fields contradict each other."""


class ScopeError(ResetError):
    """A scope selects nothing, everything by accident, or parameters that must not be reset apart."""


class AnchorError(ResetError, RuntimeError):
    """An anchor was used in the wrong order: restored before any snapshot, or moved while swapped in."""


class AnchorFileError(ResetError, OSError):
    """An anchor file is missing, truncated, or belongs to another model, scope or world size."""


class MetricError(ResetError):
    """The metric that chooses anchors cannot be had: no evaluation runs, or its results lack the name."""


class UnsupportedError(ResetError, RuntimeError):
    """The set-up is one this package refuses to run in, because it could not be exact there."""


class DataError(ResetError):
    """A data set, a column or a label cannot be used as asked."""


class NoEffectWarning(UserWarning):
    """Something was asked for that had no effect in this run."""


class WeakEvidenceWarning(UserWarning):
    """A figure says less than it seems: it rests on too few rows, or on rows of one class."""


def refuse_below_one(**counts: int) -> None:
    """Refuse counts that are below 1, by the names they are given under.

    Raises:
        ConfigError: the first of them that is.
    """
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1, got {value}.")
