"""Pages of host memory, where moments are while no step needs them."""

import errno
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes locked at a time; torch rounds each up to a power of two
ALIGN = 64  # bytes, a cache line


class StateArena:
    """Pages of host memory, all bytes zero at first.

    Memory is given back with the last view of it. Locked memory goes back to torch, which keeps
    it for whoever locks memory next.

    Attributes:
        sizes: bytes of each page.
        pinned: whether the pages are locked in memory, so that a GPU copies them by itself.

    Args:
        sizes: bytes of each page.
        pin: lock the pages in memory; where that fails they are not, with a warning.
        folder: keep the pages in a sparse file there, which has no name and so never stays behind.

    Raises:
        ValueError: pages of a file are to be locked.
        OSError: the folder cannot be written to or has too little room.
    """

    sizes: tuple[int, ...]
    pinned: bool

    def __init__(self, sizes: Sequence[int], pin: bool = False, folder: Path | None = None) -> None:
        if pin and folder is not None:
            raise ValueError(f"pin must be False for pages in a file, got folder {str(folder)!r}")
        self.sizes = tuple(sizes)
        pages = _pinned(self.sizes) if pin else None
        self.pinned = pages is not None
        self._pages = _mapped(self.sizes, folder) if pages is None else pages

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, page: int) -> Tensor:
        """A page.

        Args:
            page: its index.

        Returns:
            uint8 [sizes[page]], a view aligned to 64 bytes.
        """
        return self._pages[page]


def _pinned(sizes: Sequence[int]) -> list[Tensor] | None:
    pages: list[Tensor] = []
    try:
        for group in _groups(sizes):
            total = sum(map(_aligned, group))
            pages += _split(torch.zeros(total, dtype=torch.uint8, pin_memory=True), group)
    # what torch raises where the driver refuses, or there is none
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    else:
        return pages
    locked = sum(page.numel() for page in pages)
    pages.clear()
    # else torch keeps what was locked; older versions have no function for it
    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    warnings.warn(
        f"only {locked} of {sum(sizes)} bytes of optimizer state could be locked in memory, "
        f"so none is and paging is slower: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Pages that are locked together."""
    group: list[int] = []
    total = 0
    for size in sizes:
        if group and total + _aligned(size) > CHUNK:
            yield group
            group, total = [], 0
        group.append(size)
        total += _aligned(size)
    if group:
        yield group


def _mapped(sizes: Sequence[int], folder: Path | None) -> list[Tensor]:
    """Pages that cost nothing before they are written to."""
    total = sum(map(_aligned, sizes))
    if total == 0:
        return [torch.zeros(0, dtype=torch.uint8) for _ in sizes]
    if folder is None:
        # where there are forks, a child must not write into its parent's
        own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        mapping = mmap.mmap(-1, total, **own)
    else:
        # a full disk would end the process at the first page that finds no room
        if (free := shutil.disk_usage(folder).free) < total:
            code = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, f"{code}: {total} bytes needed, {free} free", str(folder))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(total)
            mapping = mmap.mmap(file.fileno(), total)
    return _split(torch.frombuffer(mapping, dtype=torch.uint8), sizes)


def _split(memory: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    parts = memory.split([_aligned(size) for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
