"""What a device does for a pool of pages: memory, and work in three queues."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastlora.optim.budget import auto_budget

Queue = Literal["in", "compute", "out"]
QUEUES: tuple[Queue, ...] = ("in", "compute", "out")
MAX_EVENTS = 4096  # pairs that are kept before they are read, which waits for the last one


@dataclass(frozen=True)
class Times:
    """How long a device was at work for a pool.

    Attributes:
        copy_in: seconds of copies to the device.
        compute: seconds of visits.
        copy_out: seconds of copies from the device.
        together: seconds in which at least one of them ran; what this is less than their sum,
            they ran at the same time.
    """

    copy_in: float
    compute: float
    copy_out: float
    together: float


class Device(Protocol):
    """Memory and three queues of work: copies in, compute, copies out.

    Work of a queue runs in order; queues run beside each other but where one waits for another.
    Memory changes hands in the order of "compute": another queue may use it once it has waited for
    what "compute" was given before `alloc`, and "compute" has to wait for that use before `free`.

    Attributes:
        pins: whether copies are faster from locked host memory.
        out_of_memory: what `alloc` raises.
    """

    pins: bool
    out_of_memory: type[Exception]

    def auto_budget(self, state_bytes: int) -> int:
        """Bytes that pages may take where nobody says how many: see `budget.auto_budget`."""

    def alloc(self, nbytes: int) -> Tensor:
        """Memory, uint8 [nbytes] of any values."""

    def free(self, memory: Tensor) -> None:
        """Give memory back; the caller drops it."""

    def empty_cache(self) -> None:
        """Give free memory back to whoever else uses the device."""

    def launch(self, queue: Queue, work: Callable[[], object]) -> None:
        """Call `work`, or let the queue call it; what it starts on the device is in the queue."""

    def record(self, queue: Queue) -> Any:
        """An event: the queue has done what it was given so far."""

    def wait(self, queue: Queue, event: Any) -> None:
        """Let what the queue is given from now on wait for an event."""

    def synchronize(self) -> None:
        """Wait on the host until all queues have done all work."""

    def times(self) -> Times | None:
        """How long the queues were at work, where that is measured; waits for them."""


class HostDevice(Device):
    """The processor: work is done at once, so that no queue ever waits."""

    pins = False
    # an allocation that fails is a plain RuntimeError of torch here, and nothing else is in `alloc`
    out_of_memory = RuntimeError

    def auto_budget(self, state_bytes: int) -> int:
        """128 MiB or all moments."""
        return auto_budget(state_bytes)

    def alloc(self, nbytes: int) -> Tensor:
        """Memory beside the pages."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def free(self, memory: Tensor) -> None:
        """The caller drops it."""

    def empty_cache(self) -> None:
        """There is none."""

    def launch(self, queue: Queue, work: Callable[[], object]) -> None:
        """Call `work`."""
        work()

    def record(self, queue: Queue) -> None:
        """Nothing is left to wait for."""

    def wait(self, queue: Queue, event: None) -> None:
        """Nothing is left to wait for."""

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def times(self) -> None:
        """Not measured."""


class CudaDevice(Device):
    """A GPU: two streams for copies beside the stream that is current when work is launched.

    Memory is that of torch's caching allocator. It belongs to the stream that is current in
    `alloc`, which therefore has to be that of the visits. Work is timed: two events a launch.

    Attributes:
        pins: copies are faster from locked host memory.
        out_of_memory: what `alloc` raises.

    Args:
        device: of type "cuda".
    """

    pins = True
    out_of_memory = torch.OutOfMemoryError

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self._copies = {queue: torch.cuda.Stream(self.device) for queue in ("in", "out")}
        self._times = Times(0.0, 0.0, 0.0, 0.0)
        self._start()

    def auto_budget(self, state_bytes: int) -> int:
        """At most a quarter of what is free, with what torch holds and does not use."""
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return auto_budget(state_bytes, free + reserved - torch.cuda.memory_allocated(self.device))

    def alloc(self, nbytes: int) -> Tensor:
        """Memory of the current stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free(self, memory: Tensor) -> None:
        """The caller drops it, and torch has it back."""

    def empty_cache(self) -> None:
        """Give what torch holds and does not use back to the driver."""
        torch.cuda.empty_cache()

    def launch(self, queue: Queue, work: Callable[[], object]) -> None:
        """Call `work` while the queue's stream is the current one, between two events."""
        with torch.cuda.stream(self._stream(queue)):
            begin = _timing_event()
            work()
            self._events.append((queue, begin, _timing_event()))
        if len(self._events) == MAX_EVENTS:
            self.times()

    def record(self, queue: Queue) -> torch.cuda.Event:
        """A new event: one that is recorded again would move under those who wait for it."""
        return self._stream(queue).record_event()

    def wait(self, queue: Queue, event: torch.cuda.Event) -> None:
        """The stream waits, the host does not."""
        self._stream(queue).wait_event(event)

    def synchronize(self) -> None:
        """Wait for the three streams and no other."""
        for queue in QUEUES:
            self._stream(queue).synchronize()

    def times(self) -> Times:
        """Seconds since the device was made."""
        spans: dict[str, list[tuple[float, float]]] = {queue: [] for queue in QUEUES}
        for queue, begin, end in self._events:
            end.synchronize()
            spans[queue].append((self._origin.elapsed_time(begin), self._origin.elapsed_time(end)))
        now = [_covered(spans[queue]) for queue in QUEUES]
        now.append(_covered([*chain(*spans.values())]))
        self._start()
        before = self._times
        values = (before.copy_in, before.compute, before.copy_out, before.together)
        self._times = Times(*(old + new / 1e3 for old, new in zip(values, now, strict=True)))
        return self._times

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        if queue == "compute":
            return torch.cuda.current_stream(self.device)
        return self._copies[queue]

    def _start(self) -> None:
        """Times are fp32 ms since an event, so it is made anew before they lose digits."""
        self._events: list[tuple[Queue, torch.cuda.Event, torch.cuda.Event]] = []
        with torch.cuda.device(self.device):
            self._origin = _timing_event()
        self._origin.synchronize()


def _timing_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _covered(spans: list[tuple[float, float]]) -> float:
    """How much of the time line spans cover, which may overlap."""
    total, covered_to = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, covered_to))
        covered_to = max(covered_to, end)
    return total


def unified(device: torch.device) -> bool:
    """Whether a GPU shares its memory with the host, so that a page would only be copied beside.

    Args:
        device: of type "cuda".

    Returns:
        True for GPUs that are part of the processor.
    """
    return bool(torch.cuda.get_device_properties(device).is_integrated)
