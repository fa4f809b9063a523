"""Facts about the device, which all Triton kernels choose their configuration by."""

import os
from functools import cache
from typing import Any, NamedTuple

import torch

# TRITON_INTERPRET=1 runs kernels on CPU tensors; Triton fixes the choice when it is imported
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# shared memory a program may have, in bytes; Triton's compiler does not check it
SHARED_BYTES: dict[str, int] = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
    "interpret": 1 << 40,
}

# of the largest chip of a family, for when none is at hand: a compiler needs no device
_MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_90": 132,
    "sm_100": 148,
    "gfx942": 304,
}


class Chip(NamedTuple):
    """What a launch is prepared for.

    Attributes:
        family: a key of `SHARED_BYTES`.
        multiprocessors: how many programs run side by side, at least.
        index: of the device; a compiled kernel is loaded into one.
    """

    family: str
    multiprocessors: int
    index: int | str = 0


_INTERPRETER = Chip("interpret", 3)


def chip() -> Chip:
    """The current device; what Triton compiles for decides."""
    if INTERPRET:
        return _INTERPRETER
    from triton.runtime import driver

    active = driver.active
    return _chip(active, active.get_current_device())


def arch() -> str:
    """Family of the current device, a key of `SHARED_BYTES`."""
    return chip().family


@cache
def _chip(active: Any, device: int | str) -> Chip:
    target = active.get_current_target()
    name = family(target.backend, target.arch)
    if not torch.cuda.is_available():
        return Chip(name, _MULTIPROCESSORS[name], device)
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Chip(name, facts.multi_processor_count, device)


def family(backend: str, target: int | str) -> str:
    """Family of a compilation target.

    Args:
        backend: "cuda" or "hip".
        target: 10 * major + minor of the compute capability, or AMD's name of the chip.

    Returns:
        A key of `SHARED_BYTES`: devices that run the same configurations well.
    """
    if backend == "hip":
        return "gfx942"
    if target // 10 == 8:
        return "sm_80" if target == 80 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(target // 10, "sm_86")


# Triton's own take microseconds on the host, a layer needs some thirty


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The power of two at or above n, which is 1 or more."""
    return 1 << (n - 1).bit_length()
