"""Other forwards for some modules: for a while, or for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import nn


class StandIn:
    """A ``forward`` that sits on one instance of a module and knows the one that it stands in for.

    The module owns it, so it refers to the module weakly; copies and pickles of the module get one of their own.

    Args:
        module: whose forward this is.
        before: a forward that the instance had of its own (a hook of accelerate), or None.
    """

    def __init__(self, module: Any, before: Any = None) -> None:
        self.module: Callable[[], Any] = ref(module)
        self.before = before

    @property
    def __wrapped__(self) -> Any:
        """The original forward, whose signature this one has."""
        module = self.module()
        assert module is not None
        return self.before if self.before is not None else type(module).forward.__get__(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        module = self.module()
        return type(self)(memo.get(id(module), module), self.before)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module(), self.before)

    @classmethod
    def put(cls, module: Any) -> None:
        """Give a module a forward of this kind, unless it has one."""
        before = module.__dict__.get("forward")
        if not isinstance(before, cls):
            module.forward = cls(module, before)

    @classmethod
    def take(cls, module: Any) -> None:
        """Give a module back the forward that it had."""
        forward = module.__dict__.get("forward")
        if isinstance(forward, cls):
            del module.forward
            if forward.before is not None:
                module.forward = forward.before


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


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """The bias ``[out]`` of a layer, or of what stands in its place."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


@contextmanager
def multiplying(model: nn.Module, products: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Inside, the named layers compute their output without bias by the given functions; biases are added here."""

    def forward(module: nn.Module, product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            bias = bias_of(module)
            return product(x) if bias is None else product(x) + bias

        return run

    modules = ((model.get_submodule(name), product) for name, product in products.items())
    with replaced_forwards((module, forward(module, product)) for module, product in modules):
        yield
