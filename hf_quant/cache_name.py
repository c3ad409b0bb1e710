"""How transformers calls the cache of keys and values: ``cache`` since 5.24, ``past_key_values`` before."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from transformers.modeling_outputs import BaseModelOutputWithPast

# the argument of a model's forward and of generate, and the field of its output; the older name still works in newer
# releases but for a warning, and not inside of models, which hand the cache on by the newer one
CACHE: Final[str] = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None when there is none of this name (models of states may use others)."""
    return getattr(output, CACHE, None)
