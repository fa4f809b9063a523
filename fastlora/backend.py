"""Which implementation runs: the only place that knows devices and FASTLORA_BACKEND."""

import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

import torch

from fastlora import native
from fastlora.kernels.common import INTERPRET

F = TypeVar("F", bound=Callable)

NAMES = ("triton", "cpu", "reference")  # fastest first


def name_for(names: Mapping[str, object], device: torch.device) -> str:
    """Name of the backend that runs on `device`.

    Args:
        names: the backends an op has; only keys are read.
        device: where the op's tensors live.

    Returns:
        The one FASTLORA_BACKEND names, if set, else the first of `NAMES` that is there and runs.

    Raises:
        RuntimeError: FASTLORA_BACKEND names a backend that is unknown, missing or cannot run here.
    """
    able = [name for name in NAMES if name in names and _runs_on(name, device)]
    forced = os.environ.get("FASTLORA_BACKEND")
    if not forced:
        if device.type == "cpu" and "cpu" in names and not native.available():
            _warn_once(native.unavailable_reason())
        return able[0]
    if forced not in able:
        raise RuntimeError(
            f"FASTLORA_BACKEND={forced} cannot run this op on {device.type}"
            f"{_why_not(forced, names, device)}, use one of {able}"
        )
    return forced


def pick(implementations: Mapping[str, F], device: torch.device) -> F:
    """The implementation that runs on `device`: see `name_for`."""
    return implementations[name_for(implementations, device)]


def _runs_on(name: str, device: torch.device) -> bool:
    if name == "triton":  # ROCm devices have type "cuda" too
        return device.type == "cuda" or INTERPRET
    if name == "cpu":
        return device.type == "cpu" and native.available()
    return True


def _why_not(name: str, names: Mapping[str, object], device: torch.device) -> str:
    if name not in names:
        return " (there is no such implementation)"
    if name == "cpu" and device.type == "cpu" and not native.available():
        return f" ({native.unavailable_reason()})"
    if name == "triton" and not _runs_on(name, device):
        return " (Triton on CPU tensors needs TRITON_INTERPRET=1)"
    return ""


@cache
def _warn_once(reason: str) -> None:
    message = f"{reason}; the slower PyTorch reference runs instead"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
