"""Which rule of a config decides about a module: overrides, skips, and what stays in float by default."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from hf_quant.config import HfQuantConfig, LayerRequest
from hf_quant.errors import PlanError
from hf_quant.nn.embedding import is_embedding

REGEX = "re:"


def is_linear(module: nn.Module) -> bool:
    """Layers whose weight is only ever used by calling them.

    These are ``nn.Linear`` itself, GPT-2's transposed ``Conv1D``, and subclasses of transformers that change nothing
    but how the product is written (Falcon's). A subclass of torch is read without being called.
    """
    return type(module) is nn.Linear or type(module) is Conv1D or _is_renamed_linear(type(module))  # type: ignore[arg-type]


@cache
def _is_renamed_linear(kind: type[nn.Module]) -> bool:
    """Whether a class is an ``nn.Linear`` with a forward that gives the same, which is tried."""
    between = kind.__mro__[: kind.__mro__.index(nn.Linear)] if issubclass(kind, nn.Linear) else ()
    own = {name for each in between for name in vars(each) if not name.startswith("__")}
    if (
        not own <= {"forward"}
        or not all(each.__module__.startswith("transformers.") for each in between)
        or not between
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(3, 2, device="cpu", dtype=torch.float32)
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((4, 3), (2, 3), (2,)))
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    object.__setattr__(plain, "__class__", kind)
    try:
        with torch.no_grad():
            found = plain(x)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, linear(x, weight, bias), atol=1e-5)


def matches(pattern: str, name: str) -> bool:
    """Whether an override or skip pattern names this module (see :class:`HfQuantConfig`)."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern[len(REGEX) :], name) is not None
    return name == pattern or name.startswith(pattern + ".") or name.endswith("." + pattern)


def names_table(pattern: str, name: str) -> bool:
    """Whether a pattern names this embedding: as :func:`matches`, but the name of a subtree around it does not."""
    return matches(pattern, name) and not name.startswith(f"{pattern}.")


class Rules:
    """Exact override, then skip, then other overrides in order, then the default skips, then the default."""

    def __init__(
        self, model: nn.Module, config: HfQuantConfig, modules: Mapping[str, nn.Module], names: list[str]
    ) -> None:
        self.config = config
        self.default_skips = _default_skips(model, modules)
        tables = [name for name, module in modules.items() if is_embedding(module)]
        for option, patterns in (("overrides", config.overrides), ("skip", config.skip)):
            for pattern in patterns:
                self._check(option, pattern, names, tables)
        both = set(config.skip) & {p for p, v in config.overrides.items() if not isinstance(v, str)}
        if both:
            raise PlanError(f"{sorted(both)[0]!r} is in skip and in overrides.", "keep it in one of them.")

    @staticmethod
    def _check(option: str, pattern: str, names: list[str], tables: list[str]) -> None:
        try:
            if any(matches(pattern, name) for name in names) or any(names_table(pattern, name) for name in tables):
                return
        except re.error as error:
            raise PlanError(
                f"{option} pattern {pattern!r} is not a regular expression: {error}.", "mend it."
            ) from error
        bare = pattern.removeprefix(REGEX)
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = difflib.get_close_matches(bare, names + leaves + tables, n=3, cutoff=0.4) or leaves[:5]
        raise PlanError(
            f"{option} pattern {pattern!r} matches no linear layer or embedding of this model.",
            f"nearest names: {', '.join(near)}.",
        )

    def decide(self, name: str) -> tuple[LayerRequest | None, str, str]:
        """(request or None, rule, note) for a linear layer."""
        if name in self.config.overrides:
            return self._override(name)
        for pattern in self.config.skip:
            if matches(pattern, name):
                return None, f"skip {pattern!r}", "left in float on request"
        for pattern in self.config.overrides:
            if matches(pattern, name):
                return self._override(pattern)
        if name in self.default_skips:
            return None, "default skip", self.default_skips[name]
        return self.config.default, "default", ""

    def decide_table(self, name: str) -> tuple[LayerRequest | None, str, str] | None:
        """The same for an embedding, which nothing but an override quantizes; None when no rule names it."""
        if name in self.config.overrides:
            return self._override(name)
        for pattern in self.config.skip:
            if names_table(pattern, name):
                return None, f"skip {pattern!r}", "left in float on request"
        for pattern in self.config.overrides:
            if names_table(pattern, name):
                return self._override(pattern)
        return None

    def _override(self, pattern: str) -> tuple[LayerRequest | None, str, str]:
        request = self.config.override(pattern)
        return request, f"override {pattern!r}", "" if request else "left in float on request"


def _default_skips(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Modules that stay in float unless an override names them, with the reason."""
    skips: dict[str, str] = {}
    output_head = getattr(model, "get_output_embeddings", None)
    head = output_head() if callable(output_head) else None
    keep: set[str] = set()
    for owner in modules.values():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            keep |= set(getattr(owner, attribute, None) or ())
    last = next(reversed([name for name, module in modules.items() if any(True for _ in module.parameters(False))]))
    for name, module in modules.items():
        if not is_linear(module):
            continue
        if module is head:
            skips[name] = "output head"
        elif any(pattern in name.split(".") or matches(pattern, name) for pattern in keep):
            skips[name] = "the model keeps it in float32"
        elif name == last:
            skips[name] = "last layer of the model (its head)"
    return skips
