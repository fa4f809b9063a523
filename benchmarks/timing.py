"""Times of several calls, interleaved, so that what slows the machine for a while slows all."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles

import torch

MIN_SAMPLE_MS = 2.0  # a shorter call is repeated within one sample
MAX_ROUNDS = 1000
JUNK_BYTES = 256 << 20  # more than any cache holds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, in the sample's unit."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Quartiles of the values, linearly interpolated; one value is its own quartiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


class CpuClock:
    """Wall time on the CPU.

    Args:
        cold: write 256 MiB before each sample, so that nothing of the last call is in a cache.
    """

    def __init__(self, cold: bool) -> None:
        self.cold = cold
        self.junk = torch.empty(JUNK_BYTES if cold else 0, dtype=torch.uint8)

    def ms(self, call: Callable[[], object], repeats: int) -> float:
        """Mean time of one call in ms."""
        self.junk.zero_()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return (time.perf_counter_ns() - start) / repeats / 1e6


class CudaClock:
    """Time on the GPU between two events; the L2 is emptied before every call.

    The write that empties the L2 also keeps the GPU busy while Python prepares the launches, so
    that they are not part of the time as long as they take less than that write.

    Args:
        device: a CUDA or ROCm device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold = False  # every repeat is cold, so they may follow each other
        self.junk = torch.empty(JUNK_BYTES, dtype=torch.uint8, device=device)

    def ms(self, call: Callable[[], object], repeats: int) -> float:
        """Mean time of one call in ms."""
        events = []
        with torch.cuda.device(self.device):
            for _ in range(repeats):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.junk.zero_()
                start.record()
                call()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / repeats


def clock_for(device: torch.device, cold: bool) -> CpuClock | CudaClock:
    """The clock of a device; `cold` is a choice on the CPU only."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(cold)


def interleaved(
    calls: Sequence[Callable[[], object]],
    clock: CpuClock | CudaClock,
    rounds: int,
    seconds: float,
) -> list[list[float]]:
    """Time the calls in turn, each once a round, every round beginning with the next one.

    Args:
        calls: what to time.
        clock: of their device.
        rounds: at least so many rounds.
        seconds: go on until so much time has passed, or 1000 rounds.

    Returns:
        times in ms, one list per call, one entry per round.
    """
    repeats = [_repeats(call, clock) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    with _no_garbage_collection():
        deadline = time.monotonic() + seconds
        for turn in range(MAX_ROUNDS):
            if turn >= rounds and time.monotonic() >= deadline:
                break
            for i in _rotated(len(calls), turn):
                times[i].append(clock.ms(calls[i], repeats[i]))
    return times


def _repeats(call: Callable[[], object], clock: CpuClock | CudaClock) -> int:
    """Warm up and find out how many calls make a sample long enough."""
    ms = clock.ms(call, 1)
    if ms >= MIN_SAMPLE_MS or clock.cold:
        return 1  # cold: the second call in a row would be warm
    return math.ceil(MIN_SAMPLE_MS / min(clock.ms(call, 10), MIN_SAMPLE_MS))


def _rotated(n: int, turn: int) -> list[int]:
    return [(i + turn) % n for i in range(n)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
