"""Launches that are prepared once and started often: what a kernel costs the host.

Triton finds the compiled kernel anew at every start, from all arguments, which takes 15 to 30 µs;
a layer has some ten starts, more work for the host than many of them are for the device.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

# for functions from a `Chip` and sizes to a `Launch`: tokens differ from batch to batch, so that
# some are forgotten
prepared = lru_cache(maxsize=4096)


class Launch:
    """A kernel with its grid and all arguments but the first ones, which are tensors.

    Which compiled kernel runs depends on the tensors' dtypes and on whether they begin at multiples
    of 16 bytes, and on nothing else: numbers are fixed here.

    Args:
        kernel: what `triton.jit` made.
        grid: one to three numbers of programs.
        numbers: its arguments after the tensors, in their order.
        constants: its other arguments, all of them, and options of the compiler.
    """

    def __init__(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], *numbers: Any, **constants: Any
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        named = (constants[name] for name in kernel.arg_names if name in constants)
        self.rest = *numbers, *named
        self.found: dict[tuple, Callable[..., None]] = {}

    def __call__(self, *tensors: Any) -> None:
        """Start on the current device, which is the one of the first start.

        Args:
            tensors: the first arguments: tensors, descriptors or None, and tuples of those, which
                may hold numbers too.
        """
        kinds = []
        _add_kinds(tensors, kinds)
        key = tuple(kinds)
        start = self.found.get(key)
        if start is not None:
            start(*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        # the interpreter has none; Triton for AMD's chips looks at the size of tensors too
        if compiled is not None and not torch.version.hip:
            self.found[key] = compiled[(*self.grid, 1, 1)[:3]]


def _add_kinds(values: tuple, kinds: list[Any]) -> None:
    """What the choice of a compiled kernel depends on."""
    for value in values:
        if value is None or isinstance(value, int):
            kinds.append(value)
        elif isinstance(value, tuple):
            kinds.append(len(value))
            _add_kinds(value, kinds)
        elif isinstance(value, Tensor):
            kinds.append(value.dtype)
            kinds.append(value.data_ptr() % 16 == 0)
        else:
            kinds.append(type(value))
