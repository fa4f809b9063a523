"""PEFT's tuners that make fast layers, and know when merging would be wrong."""

from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from fastlora.integrations.peft import swap
from fastlora.integrations.peft.features import check_config
from fastlora.integrations.peft.layers import FastLora


class FastLoraModel(LoraModel):
    """What the `LoraModel` of a patched model becomes; it has no state of its own."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; 4-bit layers of bitsandbytes are taken over, also those without one."""
        # LoRA layers that are there already are somebody else's decision
        swap.take_over_bases(model)
        super().inject_adapter(model, *args, **kwargs)

    def _create_and_replace(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kw: Any
    ) -> None:
        _check(lora_config, target)
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kw)

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        new = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        swap.swap(new, swap.classes())
        return new

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # PEFT looks for layer_replication in a dict of adapters, where it never is; layers share
        # their weights even when the adapter that asked for it is gone, and some always did
        owners: dict[int, str] = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, FastLora):
                # a base without parameters shares none
                weight = id(next(layer.get_base_layer().parameters(), layer))
                if weight in owners:
                    raise ValueError(
                        "merging needs layers with weights of their own, without layer_replication "
                        f"or tied weights, got {owners[weight]} and {path}, which share theirs"
                    )
                owners[weight] = path


class FastMixedModel(MixedModel):
    """What the `MixedModel` becomes, whose adapters are of several kinds; LoRA's are fast."""

    def _create_and_replace(
        self, config: PeftConfig, adapter_name: str, target: nn.Module, *args: Any, **kw: Any
    ) -> None:
        if type(config) is LoraConfig:
            _check(config, target)
        super()._create_and_replace(config, adapter_name, target, *args, **kw)

    @staticmethod
    def _create_new_module(
        config: PeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        new = MixedModel._create_new_module(config, adapter_name, target, **kwargs)
        # layers of other adapters inside are somebody else's decision
        new.__class__ = swap.classes().get(type(new), type(new))
        return new


def _check(config: LoraConfig, target: nn.Module) -> None:
    """Check a config also for layers that are there already, made before `enable`."""
    nested = isinstance(target, BaseTunerLayer)
    check_config(config, target.get_base_layer() if nested else target)


FAST_TUNERS: dict[type[BaseTuner], type[BaseTuner]] = {
    LoraModel: FastLoraModel,
    MixedModel: FastMixedModel,
}
