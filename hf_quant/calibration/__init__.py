"""Calibration data for any model: sampled from itself, from texts, chats, datasets, images or sound."""

from __future__ import annotations

from hf_quant.calibration.data import CalibrationData
from hf_quant.calibration.load import from_batches, from_texts, load_calibration

__all__ = ["CalibrationData", "from_batches", "from_texts", "load_calibration"]
