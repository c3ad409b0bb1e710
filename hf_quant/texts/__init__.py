"""Texts that calibration and evaluation share, in disjoint parts."""

from __future__ import annotations

from hf_quant.texts.hub import HUB_PREFIX
from hf_quant.texts.sources import BUILT_IN, Part, Text, load_text

__all__ = ["BUILT_IN", "HUB_PREFIX", "Part", "Text", "load_text"]
