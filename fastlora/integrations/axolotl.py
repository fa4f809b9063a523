"""Axolotl: a plugin after which the LoRA layers of a run are fast.

`plugins: [fastlora.integrations.axolotl.FastLoraPlugin]` in the YAML file of the run.

Source: https://docs.axolotl.ai/docs/custom_integrations.html for the hooks.
"""

from collections.abc import MutableMapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from peft.tuners.lora import LoraLayer
from torch import nn

from fastlora.integrations.peft import enable
from fastlora.integrations.stacks import patch_and_log

# Axolotl's own, which go past the layers that they find
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class FastLoraPlugin(BasePlugin):
    """Patches the adapters of a run, in the place of Axolotl's own LoRA kernels."""

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Turn Axolotl's LoRA kernels off, which it turns on itself where the file says nothing.

        Args:
            cfg: the file as it was read, before Axolotl checks it.

        Raises:
            ValueError: the run trains no LoRA, or the file turns such a kernel on.
        """
        if cfg.get("adapter") not in ("lora", "qlora"):
            raise ValueError(f"adapter must be lora or qlora, got {cfg.get('adapter')!r}")
        _check_kernels(cfg)
        cfg.update(dict.fromkeys(KERNELS, False))

    def pre_model_load(self, cfg: MutableMapping[str, Any]) -> None:
        """Let PEFT make fast layers, also for the trainers that add the adapter themselves.

        Args:
            cfg: the config of the run.

        Raises:
            ValueError: one of Axolotl's LoRA kernels is on.
        """
        # another plugin, or a version of Axolotl that has no `register`, may have turned them on
        _check_kernels(cfg)
        enable()

    def post_lora_load(self, cfg: MutableMapping[str, Any], model: nn.Module) -> None:
        """Patch the model, and tell the log what runs.

        Args:
            cfg: the config of the run.
            model: with its adapters; without them in DPO, IPO and KTO, whose trainer adds them.
        """
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            patch_and_log(model)


def _check_kernels(cfg: MutableMapping[str, Any]) -> None:
    on = [name for name in KERNELS if cfg.get(name)]
    if on:
        raise ValueError(f"Axolotl's LoRA kernels must be off beside fastlora, got {on[0]}: true")
