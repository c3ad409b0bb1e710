"""Several checkpoints of one float model side by side: what each costs in bytes, accuracy and speed."""

from __future__ import annotations

from hf_quant.comparison.result import Comparison, Entry
from hf_quant.comparison.run import Measure, compare

__all__ = ["Comparison", "Entry", "Measure", "compare"]
