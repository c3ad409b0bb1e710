"""What quantization cost: accuracy with confidence intervals and a noise floor, size, speed; recorded in one file."""

from __future__ import annotations

from hf_quant.evaluation.results import RESULTS_FILE, EvaluationResult
from hf_quant.evaluation.run import evaluate, evaluate_directory, write_results
from hf_quant.evaluation.text import Text, load_text

__all__ = ["RESULTS_FILE", "EvaluationResult", "Text", "evaluate", "evaluate_directory", "load_text", "write_results"]
