"""Pages of host memory visit a device through a few frames, copied beside the compute."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from fastlora.optim.arena import StateArena
from fastlora.optim.budget import MemoryBudgetError, frame_count
from fastlora.optim.devices import Device, Queue, Times

Visit = Callable[[int, Tensor], object]

PREFETCH = 2  # pages that are on their way while one is visited
_log = logging.getLogger(__name__)


@dataclass
class PoolStats:
    """What a pool is and did so far.

    Attributes:
        pages: pages of the arena.
        frames: pages that the device has room for.
        page_bytes: of the largest page.
        pinned: whether the arena is locked in memory.
        scans: scans that came to their end.
        hits: visits of pages that were on the device.
        misses: visits of pages that had to be copied.
        evictions: pages that made room for another.
        bytes_in: copied to the device.
        bytes_out: copied from it.
        stall_seconds: seconds of the host in copies and waits; a copy that the device does by
            itself counts only until it is started.
        times: of the device, where it measures them.
    """

    pages: int
    frames: int
    page_bytes: int
    pinned: bool
    scans: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0
    times: Times | None = None

    @property
    def hit_rate(self) -> float:
        """Share of the visits that needed no copy."""
        return self.hits / max(self.hits + self.misses, 1)

    def __str__(self) -> str:
        """A line for people."""
        kind = "pinned" if self.pinned else "pageable"
        text = (
            f"{self.frames} frames for {self.pages} pages of {_size(self.page_bytes)} ({kind}); "
            f"{self.scans} scans, {self.hit_rate:.0%} hits, {_size(self.bytes_in)} in, "
            f"{_size(self.bytes_out)} out, host waited {self.stall_seconds * 1e3:.0f} ms"
        )
        if (t := self.times) is None:
            return text
        return (
            f"{text}; device: {t.copy_in * 1e3:.1f} ms in, {t.compute * 1e3:.1f} ms compute, "
            f"{t.copy_out * 1e3:.1f} ms out, {t.together * 1e3:.1f} ms together"
        )


def _size(count: float) -> str:
    """Bytes for reading, such as 16.8 MB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


@dataclass
class _Frame:
    """Memory for one page.

    `last` is the event of what used the memory last, and all the next user waits for: a copy in
    for the copy out of the page before or for the owner before, a visit for the copy in, a copy
    out for the visit, the owner after for the copy out.

    That a page may come back only after its own copy out follows. While frames are held, that copy
    was queued before the one of the page it replaces, which was used later. After that "compute"
    has waited for it, and copies into memory that is taken anew wait for "compute".
    """

    memory: Tensor
    last: Any
    dirty: bool = False


class PagePool:
    """Shows all pages of an arena to functions that run on a device, through a few frames.

    Scans go through the pages forward and backward in turn, so that frames which are kept are
    hit first. The least recently used page makes room. Use a pool from one thread. Work of two
    scans on different streams is ordered by whoever changes the stream, as for any tensor.

    Args:
        arena: the pages.
        device: where they are visited.
        budget: bytes of the device that frames may take.
        keep: leave the frames on the device between scans, with pages in them that are newer than
            those of the arena until `flush` or `release`.

    Raises:
        MemoryBudgetError: the budget holds fewer than two pages.
    """

    def __init__(self, arena: StateArena, device: Device, budget: int, keep: bool = False) -> None:
        self._arena, self._device, self._keep = arena, device, keep
        page_bytes = max(arena.sizes, default=0)
        frames = frame_count(budget, page_bytes, len(arena))
        self._stats = PoolStats(len(arena), frames, page_bytes, arena.pinned)
        self._frames: list[_Frame] = []
        self._empty: list[_Frame] = []
        self._loaded: dict[int, _Frame] = {}  # by page, the least recently used one first

    def open(self) -> None:
        """Take the memory of all frames if that is not done; `scan` would.

        Where the device has too little, half the frames are tried, once, and remain.

        Raises:
            MemoryBudgetError: it has too little for those too; nothing is taken.
        """
        if self._frames:
            return
        count, page_bytes = self._stats.frames, self._stats.page_bytes
        memory = self._take(count)
        if memory is None:
            fewer = max(count // 2, min(count, 2))
            message = "out of memory with %d frames of %d bytes, trying %d"
            _log.warning(message, count, page_bytes, fewer)
            self._device.empty_cache()
            memory, count = self._take(fewer), fewer
        if memory is None:
            needed = f"{count} pages of {page_bytes} bytes"
            raise MemoryBudgetError(f"the device must have room for {needed}, got out of memory")
        self._stats.frames = count
        mine = self._device.record("compute")
        self._frames = [_Frame(part, mine) for part in memory]
        self._empty = list(self._frames)

    def scan(self, visit: Visit) -> None:
        """Visit every page once.

        Without `keep` the frames are given back at the end. The device may still be at work then,
        but whatever "compute" does next comes after it; read the arena after `flush`. If `visit`
        raises, everything that was done is brought to the arena and the frames are given back.

        Args:
            visit: launches work on what it is given, page and content: uint8 [size of the page],
                the page on the device, to be changed in place.

        Raises:
            MemoryBudgetError: the device has no room for frames; no page was visited.
        """
        self.open()
        pages = range(len(self._arena))
        ahead = min(PREFETCH, self._stats.frames - 1)
        fetched: deque[int] = deque()
        try:
            for page in reversed(pages) if self._stats.scans % 2 else pages:
                self._fetch(page)
                fetched.append(page)
                if len(fetched) > ahead:
                    self._visit(visit, fetched.popleft())
            while fetched:
                self._visit(visit, fetched.popleft())
        except BaseException:
            self.release()
            raise
        self._stats.scans += 1
        if not self._keep:
            self._drop()

    def flush(self) -> None:
        """Bring the arena up to date, and wait until it is."""
        for page in self._loaded:
            self._write_back(page)
        start = perf_counter()
        self._device.synchronize()
        self._stats.stall_seconds += perf_counter() - start

    def release(self) -> None:
        """Bring the arena up to date and give the frames back."""
        try:
            self.flush()
        finally:
            self._drop()

    def discard(self) -> None:
        """Give the frames back and forget what is in them, since the arena is newer.

        Whoever writes to the arena calls `flush` or this before, and this before the next scan.
        """
        try:
            self._device.synchronize()
        finally:
            self._drop()

    @property
    def held_bytes(self) -> int:
        """Bytes of the device that frames take now."""
        return (len(self._empty) + len(self._loaded)) * self._stats.page_bytes

    def stats(self) -> PoolStats:
        """What the pool is and did so far; waits for a device that measures times."""
        return replace(self._stats, times=self._device.times())

    def _take(self, count: int) -> list[Tensor] | None:
        """Memory of so many frames, or none at all."""
        taken: list[Tensor] = []
        try:
            for _ in range(count):
                taken.append(self._device.alloc(self._stats.page_bytes))
        except self._device.out_of_memory:
            for memory in taken:
                self._device.free(memory)
            return None
        return taken

    def _drop(self) -> None:
        # forgotten first, so that a device that fails is left with nothing
        frames, self._frames = self._frames, []
        self._empty.clear()
        self._loaded.clear()
        for frame in frames:
            self._device.wait("compute", frame.last)
            self._device.free(frame.memory)

    def _fetch(self, page: int) -> None:
        """Let a page be in a frame, as the most recently used one."""
        frame = self._loaded.pop(page, None)
        if frame is not None:
            self._stats.hits += 1
        else:
            frame = self._empty.pop() if self._empty else self._evict()
            host = self._arena[page]
            self._copy("in", frame, _content(frame, host), host)
            self._stats.misses += 1
            self._stats.bytes_in += host.numel()
        self._loaded[page] = frame

    def _evict(self) -> _Frame:
        page = next(iter(self._loaded))
        self._write_back(page)
        self._stats.evictions += 1
        return self._loaded.pop(page)

    def _visit(self, visit: Visit, page: int) -> None:
        frame = self._loaded[page]
        frame.dirty = True  # also if the visit fails in its middle
        content = _content(frame, self._arena[page])
        self._run("compute", frame, lambda: visit(page, content))
        if not self._keep:
            # sooner than the frame is needed, so that little is left to do at the end
            self._write_back(page)

    def _write_back(self, page: int) -> None:
        frame, host = self._loaded[page], self._arena[page]
        if frame.dirty:
            self._copy("out", frame, host, _content(frame, host))
            frame.dirty = False
            self._stats.bytes_out += host.numel()

    def _copy(self, queue: Queue, frame: _Frame, target: Tensor, source: Tensor) -> None:
        start = perf_counter()
        # the host takes part in copies of memory that is not locked, which could be gone otherwise
        pinned = self._arena.pinned
        self._run(queue, frame, lambda: target.copy_(source, non_blocking=pinned))
        self._stats.stall_seconds += perf_counter() - start

    def _run(self, queue: Queue, frame: _Frame, work: Callable[[], object]) -> None:
        self._device.wait(queue, frame.last)
        try:
            self._device.launch(queue, work)
        finally:
            frame.last = self._device.record(queue)


def _content(frame: _Frame, host: Tensor) -> Tensor:
    return frame.memory[: host.numel()]
