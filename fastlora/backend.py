"""Which implementation runs: the only place that knows devices and FASTLORA_BACKEND.

A backend is a module with the ops of `reference`, under the same names.
"""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from fastlora import native
from fastlora.kernels.common import INTERPRET

# fastest first; a module is imported when it is first needed, so that Triton may be absent
MODULES = {"triton": "fastlora.gpu", "cpu": "fastlora.cpu", "reference": "fastlora.reference"}
OPTIMIZERS = {
    "triton": "fastlora.optim.gpu",
    "cpu": "fastlora.optim.cpu",
    "reference": "fastlora.optim.reference",
}

# AMD's CDNA chips; the kernels are compiled and checked for gfx942
_AMD = ("gfx90a", "gfx942", "gfx950")


def name_for(device: torch.device) -> str:
    """Name of the backend that runs on `device`.

    Args:
        device: where the tensors live.

    Returns:
        The one FASTLORA_BACKEND names, if set, else the first of `MODULES` that runs.

    Raises:
        RuntimeError: FASTLORA_BACKEND names a backend that is unknown or cannot run here.
    """
    forced = os.environ.get("FASTLORA_BACKEND")
    if not forced:
        name = next(name for name in MODULES if not why_not(name, device))
        if name == "reference" and device.type == "cpu":
            _warn_once(native.unavailable_reason())
        return name
    reason = why_not(forced, device)
    if reason:
        able = [name for name in MODULES if not why_not(name, device)]
        raise RuntimeError(
            f"FASTLORA_BACKEND={forced} cannot run on {device.type} ({reason}), use one of {able}"
        )
    return forced


def load(name: str) -> ModuleType:
    """The module of a backend, by its name in `MODULES`."""
    return import_module(MODULES[name])


def implementation(device: torch.device) -> ModuleType:
    """The module of the backend that runs on `device`: see `name_for`."""
    return load(name_for(device))


def optimizer(device: torch.device) -> ModuleType:
    """The module that makes steps of optimizers on `device`: see `name_for`."""
    return import_module(OPTIMIZERS[name_for(device)])


def why_not(name: str, device: torch.device) -> str:
    """Why a backend cannot run on a device; empty if it can.

    Args:
        name: of the backend.
        device: where the tensors would live.

    Returns:
        The reason in a few words.
    """
    if name not in MODULES:
        return "there is no such backend"
    if name == "triton":
        return _why_not_triton(device)
    if name == "cpu":
        return native.unavailable_reason() if device.type == "cpu" else "its kernels are C++"
    return ""


def on(device: torch.device) -> AbstractContextManager[None]:
    """Launch on `device`: Triton launches on the current one, wherever the tensors are."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _why_not_triton(device: torch.device) -> str:
    if not find_spec("triton"):
        return "Triton is not installed"
    if INTERPRET:
        return "" if device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors"
    if device.type != "cuda":  # ROCm devices have this type too
        return "Triton on CPU tensors needs TRITON_INTERPRET=1"
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        chip = facts.gcnArchName.split(":")[0]
        return "" if chip in _AMD else f"the chip must be one of {_AMD}, got {chip}"
    if facts.major < 8:
        return f"compute capability must be 8.0 or more, got {facts.major}.{facts.minor}"
    return ""


@cache
def _warn_once(reason: str) -> None:
    message = f"{reason}; the slower PyTorch reference runs instead"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
