"""Calibration batches for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch


class Batches(NamedTuple):
    """The part of CalibrationData that sensitivities read."""

    batches: tuple[dict[str, torch.Tensor], ...]
    sha256: str


def _tokens(count: int = 4, length: int = 32, size: int = 2, seed: int = 0, vocabulary: int = 384) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {"input_ids": torch.randint(3, vocabulary, (size, length), generator=generator)} for _ in range(count // size)
    ]
    return Batches(tuple(batches), f"{seed:064d}")


@pytest.fixture(scope="session")
def token_batches() -> Callable[..., Batches]:
    """``token_batches(count=4, length=32, size=2, seed=0)``: random token ids in batches of ``size``."""
    return _tokens
