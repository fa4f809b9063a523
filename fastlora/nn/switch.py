"""Switching adapters off for a while, in one thread."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from torch import nn


class Switch(threading.local):
    """How many `disabled` blocks of the running thread a layer is in: `depth`.

    Graphs of `torch.compile` guard the attribute, which each thread reads as its own. A copy, as of
    the layer it belongs to, is in no block.
    """

    def __init__(self) -> None:  # run once in each thread that asks
        self.depth = 0

    def __reduce__(self) -> tuple[type["Switch"], tuple[()]]:
        return Switch, ()


@contextmanager
def disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run the base of `LoraLinear` and `SavedModule` layers; re-entrant, for this thread only.

    A forward that gradient checkpointing recomputes after the block, or inside it but on a GPU, in
    a thread of autograd, runs with adapters: run such a forward and its backward without
    checkpointing. `nn.DataParallel` copies a layer together with what this thread asked of it.

    Args:
        layers: the layers to switch off.

    Yields:
        None
    """
    switches = [layer.switch for layer in layers]
    for switch in switches:
        switch.depth += 1
    try:
        yield
    finally:
        for switch in switches:
            switch.depth -= 1


def replica(layer: nn.Module, copied: nn.Module) -> nn.Module:
    """Give a copy for a thread of `nn.DataParallel` what the thread that copies has asked for.

    Args:
        layer: the layer.
        copied: the copy, whose attributes are those of the layer.

    Returns:
        The copy.
    """
    copied.switch = SimpleNamespace(depth=layer.switch.depth)
    return copied
