"""Typed errors: each names the offender and the fix."""

from __future__ import annotations


class HfQuantError(Exception):
    """Base of every error that hf-quant raises on purpose.

    Args:
        problem: one sentence that names the offender (a key, a module, a file) and what is wrong with it.
        fix: one sentence that says what the user can do about it.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem} Fix: {fix}" if fix else problem)


class ConfigError(HfQuantError, ValueError):
    """An unknown, contradictory or out-of-range request in a config, recipe or command line."""


class PlanError(HfQuantError, ValueError):
    """A valid request that this model cannot satisfy (a pattern without a match, a group that does not divide)."""


class WeightError(HfQuantError, ValueError):
    """A weight that cannot be quantized: NaN, Inf, or an unsupported dtype."""


class FormatError(HfQuantError, ValueError):
    """Tensors that do not follow their on-disk format, or that a format cannot hold."""


class CheckpointError(HfQuantError, ValueError):
    """A checkpoint that is incomplete, damaged, unsafe or not ours."""


class OutputExistsError(HfQuantError, FileExistsError):
    """The output directory exists and overwriting it was not asked for."""


class OutputError(HfQuantError, OSError):
    """The output could not be written (full disk, permissions); nothing was left behind."""


class KernelError(HfQuantError, RuntimeError):
    """A kernel that was asked for cannot run here, or not for this layer."""


class EvaluationError(HfQuantError, ValueError):
    """A measurement that cannot be made (no text, text too short, models that do not match)."""


class CalibrationError(HfQuantError, ValueError):
    """Calibration data that cannot be had or used (no text, text too short, a source that does not fit the model)."""


class TextError(EvaluationError, CalibrationError):
    """A text that cannot be read; both who measures on texts and who calibrates on them catch it as their own."""


class CardError(HfQuantError, ValueError):
    """A model card that cannot be written truthfully or does not validate."""


class HubError(HfQuantError, RuntimeError):
    """A push that was refused or could not be verified."""


class DependencyError(HfQuantError, ImportError):
    """An optional package that this request needs is not installed."""


class BudgetError(HfQuantError, ValueError):
    """A budget of bits, bytes or accuracy that cannot be read, or that no allocation satisfies."""


class SensitivityError(HfQuantError, ValueError):
    """Sensitivities that cannot be estimated, or saved ones that belong to another model, data or set of schemes."""
