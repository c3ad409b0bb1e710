"""What quantization cost: accuracy with confidence intervals and a noise floor, size, speed; recorded in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_quant.evaluation.results import RESULTS_FILE, EvaluationResult

if TYPE_CHECKING:
    from hf_quant.evaluation.run import evaluate, evaluate_directory, write_results
    from hf_quant.evaluation.text import Text, load_text

__all__ = ["RESULTS_FILE", "EvaluationResult", "Text", "evaluate", "evaluate_directory", "load_text", "write_results"]

_HOMES = {"evaluate": "run", "evaluate_directory": "run", "write_results": "run", "Text": "text", "load_text": "text"}


def __getattr__(name: str) -> Any:
    # A card is made from a results file alone: reading one must not import torch and transformers.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"hf_quant.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
