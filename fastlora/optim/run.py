"""Parameters of one device and their moments."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from fastlora import backend
from fastlora.optim.flat import Flat, Step
from fastlora.optim.store import Span, Store


@dataclass(eq=False)
class Run:
    """Parameters of one device and dtype, one after another.

    Attributes:
        names: for state dicts and errors.
        params: in the order of the vector.
        device: of all.
        dtype: of all.
        steps: how many each has made.
        flat: where they lie.
    """

    names: list[str]
    params: list[nn.Parameter]
    device: torch.device
    dtype: torch.dtype
    steps: list[int]
    flat: Flat

    @cached_property
    def index(self) -> int:
        """Number of the device, -1 on a CPU."""
        return self.params[0].get_device()


@dataclass(eq=False)
class DeviceState:
    """All that an optimizer keeps for one device.

    Attributes:
        device: of the parameters and where they are updated.
        runs: at least one, each of another dtype.
        store: the moments of the runs.
    """

    device: torch.device
    runs: list[Run]
    store: Store

    def update(self, steps: Sequence[Step]) -> None:
        """Update parameters and moments.

        Args:
            steps: one a run.
        """
        impl = backend.optimizer(self.device)

        def visit(span: Span) -> None:
            impl.adamw(prepared[span.run], span.first, span.moments)

        with backend.on(self.device):
            prepared = [impl.prepare(step) for step in steps]
            self.store.scan(visit)
        for run, step in zip(self.runs, steps, strict=True):
            moved = zip(run.steps, step.grads, strict=True)
            run.steps = [count + (grad is not None) for count, grad in moved]
