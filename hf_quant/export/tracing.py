"""What exporters that trace a model share: libraries that report errors only, and no experts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_quant.errors import FormatError
from hf_quant.nn.experts import SplitExperts


def refuse_experts(model: nn.Module) -> None:
    """Raises FormatError for a model with quantized experts, naming the first of them."""
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            raise FormatError(
                f"{name} cannot be converted: which of its experts compute depends on the tokens, and a graph has no "
                "such choice.",
                "choose another --to.",
            )


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Inside, the loggers of these names report errors only, and nothing warns: it is about the libraries' own code."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
