"""What `torch.utils.flop_counter.FlopCounterMode` counts for our ops: the matrix products."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastlora.member import sizes, split

Shape = Sequence[int]


def count() -> None:
    """Tell the counters that run in this thread of our ops.

    A registration beforehand would have to import their module, which imports Triton.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    kind = getattr(module, "FlopCounterMode", ())  # of a module that is still read there is none
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, kind):
            formulas = {"linear": _forward, "linear_backward": _backward}
            for name, formula in formulas.items():
                op = getattr(torch.ops.fastlora, name)
                counter.flop_registry.setdefault(op, module.shape_wrapper(formula))


# tensors are given as their shapes


def _forward(x: Shape, tensors: Sequence[Shape], facts: Sequence[int], *_: Any, **__: Any) -> int:
    M = math.prod(x[:-1])
    return sum(2 * M * (N * K + R * (N + K)) for N, K, R in _sizes(tensors, facts))


def _backward(
    dys: Sequence[Shape],
    used: Sequence[int],
    x: Shape | None,
    s: Shape | None,
    tensors: Sequence[Shape],
    facts: Sequence[int],
    scales: Sequence[float],
    state: Shape | None,
    p: float,
    x_shape: Shape,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    M, needs_dx, members = math.prod(x_shape[:-1]), needs[0], [*_sizes(tensors, facts)]
    parts, total = split(needs[1:], facts), 0
    for i in used:
        (N, K, R), part = members[i], parts[i]
        total += 2 * M * N * K * (needs_dx + part["weight"][0])
        # ds and db are made in one pass, whoever needs them
        total += 2 * M * R * (2 * N + K * (needs_dx + part.get("a", False)))
    return total


def _sizes(tensors: Sequence[Shape], facts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """N, K and R of each member."""
    for (N, K), part in zip(sizes(facts), split(tensors, facts), strict=True):
        yield N, K, part["a"][0] if "a" in part else 0
