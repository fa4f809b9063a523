"""LoRA layers of PEFT with another forward, and with 4-bit weights merged right."""

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor

from fastlora.integrations.peft import bases, fast, merging
from fastlora.integrations.peft.features import check_config


class FastLora:
    """What a LoRA layer of PEFT becomes; it has no state of its own.

    Whether it can run on `fastlora.ops` is asked at every forward, so that whatever PEFT or anybody
    else does to the layer counts from the next forward on.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., N] for x [..., K]; by PEFT's own forward where there is a reason."""
        if not isinstance(self, FastLora):  # unpatched, but a hook of accelerate kept this method
            return type(self).forward(self, x, *args, **kwargs)
        if fast.is_plain_call(self, x, args, kwargs) and not fast.why_not(self):
            return fast.forward(self, x)
        return super().forward(x, *args, **kwargs)

    def update_layer(
        self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, unless the layer would train something else than its config says."""
        check_config(config, self.get_base_layer())
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, see PEFT."""
        merging.check_biases(self, adapter_names)
        if bases.is_4bit(self.get_base_layer()):
            merging.merge(self, safe_merge, adapter_names)
        else:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight, see PEFT."""
        if bases.is_4bit(self.get_base_layer()):
            merging.unmerge(self)
        else:
            super().unmerge()


class FastLoraLinear(FastLora, lora.Linear):
    """`peft.tuners.lora.Linear` that runs on `fastlora.ops` where it can."""
