"""LLaMA-Factory's v1 trainers: the kernel "fastlora", there once this module is imported.

Its other trainers need no plugin, only `fastlora.enable()` before them.

Source: https://github.com/hiyouga/LLaMA-Factory, `v1/plugins/model_plugins/kernels` of 0.9.5.
"""

from typing import Any

from llamafactory.v1.accelerator.helper import DeviceType
from llamafactory.v1.plugins.model_plugins.kernels.base import BaseKernel
from llamafactory.v1.plugins.model_plugins.kernels.registry import register_kernel
from torch import nn

from fastlora.integrations.stacks import patch_and_log


@register_kernel
class FastLoraKernel(BaseKernel):
    """Patches the adapters of a model; LLaMA-Factory applies kernels after it added those."""

    _kernel_id = "fastlora"
    # where fastlora has no kernels of its own, plain PyTorch runs
    _device = [*DeviceType]  # noqa: RUF012

    @classmethod
    def apply(cls, **kwargs: Any) -> nn.Module:
        """Patch a model, and tell the log what runs.

        Args:
            **kwargs: `model`, with LoRA layers of PEFT, and what other kernels take.

        Returns:
            The model.
        """
        model = kwargs["model"]
        patch_and_log(model)
        return model
