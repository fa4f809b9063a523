"""Switching adapters off for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run the base of `LoraLinear` and `SavedModule` layers; re-entrant, for all threads.

    A forward that gradient checkpointing recomputes after the block runs with adapters: run such a
    forward and its backward without checkpointing.

    Args:
        layers: the layers to switch off.

    Yields:
        None
    """
    layers = list(layers)
    for layer in layers:
        layer.disabled_depth += 1
    try:
        yield
    finally:
        for layer in layers:
            layer.disabled_depth -= 1
