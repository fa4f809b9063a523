"""Where the moments are: resident on the device of the parameters, or in pages on the host.

A store serves the *runs* of one device: parameters of one dtype, each run a flat vector.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastlora.optim.arena import StateArena
from fastlora.optim.budget import page_elements
from fastlora.optim.devices import CudaDevice, Device, HostDevice, unified
from fastlora.optim.flat import Moments, StateBits, moments, nbytes
from fastlora.optim.pool import PagePool

PageBudget = int | Literal["auto"]


@dataclass(frozen=True)
class Paging:
    """How to page.

    Attributes:
        budget: bytes of a device that frames may take, or "auto".
        folder: of the file that pages are in; None: they are in memory.
        keep: leave frames on the device between steps.
    """

    budget: PageBudget
    folder: Path | None
    keep: bool


@dataclass(frozen=True)
class Span:
    """Moments of a part of a run.

    Attributes:
        run: which run.
        first: where in the run they begin.
        moments: views; what is written to them is kept.
    """

    run: int
    first: int
    moments: Moments


class Store(Protocol):
    """The moments of the runs of one device."""

    def open(self) -> None:
        """Take all memory that `scan` needs, or raise; nothing else is changed."""

    def close(self) -> None:
        """Give back what `open` took."""

    def scan(self, visit: Callable[[Span], None]) -> None:
        """Call `visit`, which launches work on the device, for spans that together are the runs."""

    def read(self) -> Sequence[Span]:
        """All moments as they are after the last step, wherever they lie."""

    def wrote(self) -> None:
        """Take note that the spans of `read` were written to."""


class Resident:
    """Moments on the device.

    Args:
        sizes: elements of each run.
        bits: of a moment.
        device: where.
    """

    def __init__(self, sizes: Sequence[int], bits: StateBits, device: torch.device) -> None:
        self.spans = []
        for run, size in enumerate(sizes):
            buffer = torch.zeros(nbytes(size, bits), dtype=torch.uint8, device=device)
            self.spans.append(Span(run, 0, moments(buffer, size, bits)))

    def open(self) -> None:
        """The memory is there."""

    def close(self) -> None:
        """It stays."""

    def scan(self, visit: Callable[[Span], None]) -> None:
        """One span a run."""
        for span in self.spans:
            visit(span)

    def read(self) -> Sequence[Span]:
        """One span a run."""
        return self.spans

    def wrote(self) -> None:
        """There is no copy."""


class Paged:
    """Moments in pages on the host, a few of which are on the device during a step.

    Args:
        sizes: elements of each run; a page holds elements of one run.
        bits: of a moment.
        device: visits pages.
        paging: how.
    """

    def __init__(
        self, sizes: Sequence[int], bits: StateBits, device: Device, paging: Paging
    ) -> None:
        self.bits: StateBits = bits
        total = sum(nbytes(size, bits) for size in sizes)
        budget = device.auto_budget(total) if paging.budget == "auto" else paging.budget
        elements = page_elements(max(sizes), bits, budget)
        self.pages = [
            (run, first, min(elements, size - first))
            for run, size in enumerate(sizes)
            for first in range(0, size, elements)
        ]
        page_bytes = [nbytes(count, bits) for _, _, count in self.pages]
        pin = device.pins and paging.folder is None
        self.arena = StateArena(page_bytes, pin, paging.folder)
        self.pool = PagePool(self.arena, device, budget, keep=paging.keep)

    def open(self) -> None:
        """Take the frames."""
        self.pool.open()

    def close(self) -> None:
        """Give the frames back."""
        self.pool.release()

    def scan(self, visit: Callable[[Span], None]) -> None:
        """One span a page."""
        self.pool.scan(lambda page, frame: visit(self._span(page, frame)))

    def read(self) -> Sequence[Span]:
        """The pages on the host, after everything came back to them."""
        self.pool.flush()
        return [self._span(page, self.arena[page]) for page in range(len(self.pages))]

    def wrote(self) -> None:
        """What is on the device is older."""
        self.pool.discard()

    def _span(self, page: int, buffer: Tensor) -> Span:
        run, first, count = self.pages[page]
        return Span(run, first, moments(buffer, count, self.bits))


def make_store(
    sizes: Sequence[int], bits: StateBits, device: torch.device, paging: Paging | None
) -> Store:
    """A store whose moments are zero.

    Args:
        sizes: elements of each run.
        bits: of a moment.
        device: of the parameters.
        paging: how to page; None: do not.

    Returns:
        The store. On a GPU whose memory is the host's a resident one, with a warning: its pages
        would only be copied from memory to the same memory.

    Raises:
        MemoryBudgetError: the budget holds fewer than two of the smallest pages.
    """
    if paging is None or not any(sizes):
        return Resident(sizes, bits, device)
    if device.type == "cuda" and unified(device):
        name = torch.cuda.get_device_name(device)
        message = f"{name} shares its memory with the host, so paging is off: it would only copy"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return Resident(sizes, bits, device)
    return Paged(sizes, bits, CudaDevice(device) if device.type == "cuda" else HostDevice(), paging)
