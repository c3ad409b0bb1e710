"""Other forwards for some modules, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, each module runs the function given with it; afterwards its own forward again.

    A forward that sat on the instance (a hook of accelerate) is put back, too.
    """
    kept = []
    for module, forward in pairs:
        kept.append((module, module.__dict__.get("forward")))
        module.forward = forward
    try:
        yield
    finally:
        for module, before in reversed(kept):
            del module.forward
            if before is not None:
                module.forward = before
