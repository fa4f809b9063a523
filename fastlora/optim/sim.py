"""A device whose queues run in any order that their waits allow, to find waits that are missing."""

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.optim.budget import auto_budget
from fastlora.optim.devices import QUEUES, Device, Queue

POISON = 0x7F  # bytes of it are a large fp32 number and codes that are not zero


class SimOutOfMemory(RuntimeError):
    """The budget of a `SimDevice` is spent."""


class SimEvent:
    """A place in a queue.

    Attributes:
        done: whether the queue has come to it.
    """

    done = False


class SimDevice(Device):
    """Runs nothing before `synchronize`, and then whatever queue's turn a random number says it is.

    Memory is written full of 0x7F at its place in "compute" when it is taken and when it is given
    back, as by another owner before and after. So work without a wait it needs finds or leaves
    wrong bytes, with some probability in each seed. Launched work that fails raises in
    `synchronize`.

    Attributes:
        pins: False.
        out_of_memory: what `alloc` raises.
        used: bytes that are taken.
        peak: the most that were.

    Args:
        budget: bytes.
        seed: of the order.
    """

    pins = False
    out_of_memory = SimOutOfMemory
    used: int
    peak: int

    def __init__(self, budget: int, seed: int = 0) -> None:
        self._budget = budget
        self.used = self.peak = 0
        self._random = random.Random(seed)
        # an event in a queue is waited for, a function is called
        self._queues: dict[Queue, deque[Callable[[], object] | SimEvent]] = {
            queue: deque() for queue in QUEUES
        }

    def auto_budget(self, state_bytes: int) -> int:
        """At most a quarter of what is not taken."""
        return auto_budget(state_bytes, self._budget - self.used)

    def alloc(self, nbytes: int) -> Tensor:
        """Memory full of 0x7F.

        Args:
            nbytes: how much.

        Returns:
            uint8 [nbytes].

        Raises:
            SimOutOfMemory: there is less.
        """
        if self.used + nbytes > self._budget:
            free = self._budget - self.used
            raise SimOutOfMemory(f"{nbytes} bytes must be free, got {free} of {self._budget}")
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._queues["compute"].append(lambda: memory.fill_(POISON))
        return memory

    def free(self, memory: Tensor) -> None:
        """Overwrite memory with 0x7F."""
        self.used -= memory.numel()
        self._queues["compute"].append(lambda: memory.fill_(POISON))

    def empty_cache(self) -> None:
        """There is none."""

    def launch(self, queue: Queue, work: Callable[[], object]) -> None:
        """Append to a queue."""
        self._queues[queue].append(work)

    def record(self, queue: Queue) -> SimEvent:
        """An event that is done when the queue comes to it."""
        event = SimEvent()
        self._queues[queue].append(lambda: setattr(event, "done", True))
        return event

    def wait(self, queue: Queue, event: SimEvent) -> None:
        """The queue stops there until the event is done."""
        self._queues[queue].append(event)

    def synchronize(self) -> None:
        """Run all queues empty.

        Raises:
            RuntimeError: all that is left waits.
        """
        while any(self._queues.values()):
            ready = [queue for queue in QUEUES if self._ready(queue)]
            if not ready:
                left = {queue: len(items) for queue, items in self._queues.items()}
                raise RuntimeError(f"a queue must be able to go on, got a deadlock with {left}")
            item = self._queues[self._random.choice(ready)].popleft()
            if not isinstance(item, SimEvent):
                item()

    def times(self) -> None:
        """There is no time."""

    def _ready(self, queue: Queue) -> bool:
        items = self._queues[queue]
        return bool(items) and (not isinstance(items[0], SimEvent) or items[0].done)
