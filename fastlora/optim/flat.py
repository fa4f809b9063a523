"""Parameters of one device and dtype as one vector, and the moments that belong to it.

Nothing is padded, so that blocks of 256 moments do not depend on how large single tensors are. A
*span* is a part of the vector: all of it, or a page.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

StateBits = Literal[8, 32]
BLOCK = 256  # 8-bit moments that share one scale, as in bitsandbytes


@dataclass(frozen=True)
class Flat:
    """Where each parameter lies.

    Attributes:
        sizes: elements of each parameter, in their order.
        cache: what backends make of it, once.
    """

    sizes: tuple[int, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First element of each parameter, and at last how many there are."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return self.starts[-1]

    def overlapping(self, first: int, last: int) -> range:
        """The parameters with an element in [first, last)."""
        if first >= last:
            return range(0)
        return range(bisect_right(self.starts, first) - 1, bisect_left(self.starts, last))

    def tiles(self, size: int) -> Tensor:
        """Which parameters lie in each tile of `size` elements.

        Args:
            size: elements of a tile; the last one may have fewer.

        Returns:
            int32 [tiles, 2] on the CPU: the first parameter, and the one after the last.
        """
        starts = torch.tensor(self.starts, dtype=torch.int64)
        edges = torch.arange(0, self.numel, size)
        first = torch.searchsorted(starts, edges, right=True) - 1
        last = torch.searchsorted(starts, torch.clamp(edges + size, max=self.numel))
        return torch.stack([first, last], dim=1).int()


@dataclass(frozen=True)
class Step:
    """One step of one vector, as backends take it.

    Attributes:
        flat: where the parameters lie.
        params: of any shape, contiguous, of one device and dtype.
        grads: like params; None where there is no gradient, and nothing is changed.
        rows: which row of `hypers` each parameter is updated by.
        hypers: fp32 [rows, 8] on the CPU, see `adamw_hypers`.
    """

    flat: Flat
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    rows: Sequence[int]
    hypers: Tensor


def adamw_hypers(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    step: int,
) -> tuple[float, ...]:
    """What a kernel needs to know of a step of AdamW; computed here once, in fp64.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.

    Args:
        lr: learning rate.
        betas: decay of the two moments.
        eps: is added to the root of the second moment.
        weight_decay: share of lr by which parameters shrink.
        maximize: whether to go up the gradient.
        step: steps with this one, 1 in the first.

    Returns:
        decay of the parameter, step size, 1 / sqrt(1 - beta2^step), eps, 1 - beta1, beta2,
        1 - beta2, and the sign of the gradient.
    """
    beta1, beta2 = betas
    step_size = lr / (1 - beta1**step)
    correction = (1 - beta2**step) ** -0.5
    sign = -1.0 if maximize else 1.0
    return 1 - lr * weight_decay, step_size, correction, eps, 1 - beta1, beta2, 1 - beta2, sign


@dataclass(frozen=True)
class Moments:
    """Both moments of a span, as views of one buffer.

    Attributes:
        m: the first, [n]: fp32, or uint8 codes of `codebooks.dynamic_map`.
        v: the second, [n]: fp32, or uint8 codes of `codebooks.unsigned_dynamic_map`.
        m_scale: fp32 [ceil(n / 256)], largest magnitude of each block; None with 32 bits.
        v_scale: the same of v.
    """

    m: Tensor
    v: Tensor
    m_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def numel(self) -> int:
        """Elements of the span."""
        return self.m.numel()

    @property
    def bits(self) -> StateBits:
        """Of a moment."""
        return 32 if self.m_scale is None else 8

    def tensors(self) -> tuple[Tensor, ...]:
        """m and v, and with 8 bits m_scale and v_scale."""
        return tuple(t for t in (self.m, self.v, self.m_scale, self.v_scale) if t is not None)

    def part(self, first: int, last: int) -> "Moments":
        """Those of the elements [first, last), as views; with 8 bits in whole blocks from `first`.

        Args:
            first: with 8 bits a multiple of 256.
            last: the one after the last.

        Returns:
            Moments of last - first elements.
        """
        m, v = self.m[first:last], self.v[first:last]
        if self.m_scale is None:
            return Moments(m, v)
        blocks = slice(first // BLOCK, -(-last // BLOCK))
        return Moments(m, v, self.m_scale[blocks], self.v_scale[blocks])

    def copy_(self, other: "Moments") -> None:
        """Take over moments of as many elements and bits, from any device."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


def nbytes(numel: int, bits: StateBits) -> int:
    """Bytes of the moments of `numel` elements: 8 an element, or 2 and 8 a block of 256."""
    return 8 * numel if bits == 32 else 2 * numel + 8 * -(-numel // BLOCK)


def moments(buffer: Tensor, numel: int, bits: StateBits) -> Moments:
    """Moments in a buffer; the scales come first, so that everything is aligned.

    Args:
        buffer: uint8 [at least nbytes(numel, bits)], aligned to 4 bytes.
        numel: elements.
        bits: of a moment.

    Returns:
        Views of the buffer; of zero bytes, moments that are zero.
    """
    if bits == 32:
        m, v = buffer[: 8 * numel].view(torch.float32).view(2, numel)
        return Moments(m, v)
    blocks = -(-numel // BLOCK)
    m_scale, v_scale = buffer[: 8 * blocks].view(torch.float32).view(2, blocks)
    m, v = buffer[8 * blocks : 8 * blocks + 2 * numel].view(2, numel)
    return Moments(m, v, m_scale, v_scale)
