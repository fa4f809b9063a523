"""Switching adapters off for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_DISABLED: ContextVar[frozenset[int]] = ContextVar("fastlora_disabled", default=frozenset())


@contextmanager
def disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run the base of `LoraLinear` and `SavedModule` layers; re-entrant, for this thread only.

    A forward that gradient checkpointing recomputes after the block, or in a thread of autograd,
    runs with adapters: run such a forward and its backward without checkpointing.

    Args:
        layers: the layers to switch off.

    Yields:
        None
    """
    layers = list(layers)  # kept alive, so that no other object gets one of the ids
    token = _DISABLED.set(_DISABLED.get() | {id(layer) for layer in layers})
    try:
        yield
    finally:
        _DISABLED.reset(token)


def is_disabled(layer: nn.Module) -> bool:
    """Whether `disabled` switches this layer off in this thread."""
    return id(layer) in _DISABLED.get()
