"""Quantized models in the files of other runtimes: what is written there, and what has to be refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Written:
    """What a writer left in the directory.

    Attributes:
        file: the one that the runtime is given.
        notes: what a user should know, in words.
        exact: whether every quantized weight has the value that it had.
    """

    file: Path
    notes: tuple[str, ...]
    exact: bool = True


def float_config(model: PreTrainedModel) -> Any:
    """A copy of the model's config that says nothing of how hf-quant stored it."""
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
