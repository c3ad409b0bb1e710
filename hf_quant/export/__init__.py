"""Quantized models in the files of other runtimes: what is written there, and what has to be refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
