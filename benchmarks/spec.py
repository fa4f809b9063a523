"""What a benchmark is made of: an op, its providers, its least work, the check of its results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]  # name of a dimension -> its size
Call = Callable[[], dict[str, Tensor]]  # what is timed; its results, by name, are what is checked


@dataclass(frozen=True)
class Work:
    """What one call has to do at least; rates are this divided by the measured time.

    Attributes:
        bytes: bytes read and written once each.
        flops: floating-point operations, a multiply-add is two.
        weights: weights quantised or decoded.
        tokens: tokens trained on.
    """

    bytes: int = 0
    flops: int = 0
    weights: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Deviation:
    """How far one result lies from the truth, and how far it may.

    Attributes:
        name: the result: y, dx, packed ...
        error: measured error, without unit; NaN if the result is not finite.
        bound: largest error that counts as right.
    """

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the result is right; a NaN never is."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        name: what is measured, such as "peft+bitsandbytes"; `--provider` selects by it.
        build: problem and mode -> the call to time. Everything a user does once happens in here.
        variant: what sets it apart from entries of the same name, such as "lora+dropout".
        packages: what must be installed; an absent one is reported.
    """

    name: str
    build: Callable[[Any, str], Call]
    variant: str = ""
    packages: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name and variant in one."""
        return f"{self.name} {self.variant}".strip()

    def absent(self) -> list[str]:
        """Packages that are needed and not installed."""
        return [p for p in self.packages if find_spec(p) is None]


@dataclass(frozen=True)
class Benchmark:
    """One op at many shapes, by many providers.

    Attributes:
        name: as in `fastlora bench NAME`.
        summary: one line: what is timed.
        shapes: name -> sizes, from real models; "model.layer" or "model.layer@tokens".
        small: as `shapes`, for tests: milliseconds a case.
        problem: sizes, device, dtype -> inputs and truth, shared by all providers and modes.
        providers: who is measured; the first is the baseline of the ratios.
        check: problem, mode, provider, call -> how far each result of the call is from the truth.
        work: sizes, bytes of an element, mode -> least work of one call.
        rates: columns of the table: "GB/s", "Gw/s" (1e9 weights a second), "GFLOP/s" or
            "tok/s" (tokens a second).
        modes: what a call does where there is a choice.
        whole_memory: whether peak memory is that of a process of its own, with what stays between
            calls, such as weights; `peak` measures it.
        parts: call -> ms of each part of it, where it has parts.
    """

    name: str
    summary: str
    shapes: Mapping[str, Sizes]
    small: Mapping[str, Sizes]
    problem: Callable[[Sizes, torch.device, torch.dtype], Any]
    providers: tuple[Provider, ...]
    check: Callable[[Any, str, Provider, Call], list[Deviation]]
    work: Callable[[Sizes, int, str], Work]
    rates: tuple[str, ...]
    modes: tuple[str, ...] = field(default=("call",))
    whole_memory: bool = False
    parts: Callable[[Any], dict[str, float]] | None = None

    @property
    def baseline(self) -> Provider:
        """The provider that all ratios are relative to."""
        return self.providers[0]
