"""Training stacks as their plugins see them, for where they are not installed.

A stand-in is the part of the published interface that a plugin of ours touches, and no more.
"""

import sys
from abc import ABC, abstractmethod
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


class BasePlugin:
    """Axolotl 0.19, `axolotl/integrations/base.py`: every hook does nothing."""

    def register(self, cfg):
        pass

    def pre_model_load(self, cfg):
        pass

    def post_lora_load(self, cfg, model):
        pass


class DeviceType(str, Enum):
    """LLaMA-Factory 0.9.5, `v1/accelerator/helper.py`."""

    CPU = "cpu"
    CUDA = "cuda"
    META = "meta"
    MPS = "mps"
    NPU = "npu"
    XPU = "xpu"


class BaseKernel(ABC):
    """LLaMA-Factory 0.9.5, `v1/plugins/model_plugins/kernels/base.py`."""

    _kernel_id: Any = ""
    _device: tuple = (DeviceType.CPU,)

    @classmethod
    @abstractmethod
    def apply(cls, **kwargs):
        raise NotImplementedError


class Registry:
    """LLaMA-Factory 0.9.5, `v1/plugins/model_plugins/kernels/registry.py`."""

    _kernels: dict = {}  # noqa: RUF012

    @classmethod
    def register(cls, kernel):
        assert issubclass(kernel, BaseKernel)
        assert "cpu" in kernel._device
        cls._kernels[kernel._kernel_id] = kernel
        return kernel

    @classmethod
    def get(cls, kernel_id):
        return cls._kernels.get(kernel_id)


class Callback:
    """Lightning 2.6, `lightning/pytorch/callbacks/callback.py`."""

    def on_fit_start(self, trainer, pl_module):
        pass


_KERNELS = "llamafactory.v1.plugins.model_plugins.kernels"
_LIGHTNING = {"Callback": Callback, "LightningModule": object, "Trainer": object}
# package -> module -> what is in it
STAND_INS = {
    "axolotl": {"axolotl.integrations.base": {"BasePlugin": BasePlugin}},
    "llamafactory": {
        "llamafactory.v1.accelerator.helper": {"DeviceType": DeviceType},
        f"{_KERNELS}.base": {"BaseKernel": BaseKernel},
        f"{_KERNELS}.registry": {"Registry": Registry, "register_kernel": Registry.register},
    },
    "lightning": {"lightning.pytorch": _LIGHTNING},
    "pytorch_lightning": {"pytorch_lightning": _LIGHTNING},
}


def needs(stack: str) -> pytest.MarkDecorator:
    """The mark of a test of the package itself, whose own warnings are its own affair."""

    def mark(test):
        test = pytest.mark.skipif(not find_spec(stack), reason=f"needs {stack}")(test)
        return pytest.mark.filterwarnings("ignore")(test)

    return mark


def plugin(stack: str, monkeypatch: pytest.MonkeyPatch, package: str | None = None) -> ModuleType:
    """Our module for a stack, over the package itself, or over its stand-in where there is none."""
    package = package or stack
    if not find_spec(package):
        for path, content in STAND_INS[package].items():
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                if sys.modules.get(part) is None:
                    monkeypatch.setitem(sys.modules, part, ModuleType(part))
            vars(sys.modules[path]).update(content)
    elif package == stack:
        return import_module(f"fastlora.integrations.{stack}")
    # what is imported over a stand-in, or under another name, is forgotten after the test
    name = f"fastlora.integrations.{stack}"
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    return import_module(name)
