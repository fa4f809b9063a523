"""Whole models of PEFT: patched, looked at, and given back."""

from collections.abc import Iterator

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastlora.integrations.peft import bases, fast, swap
from fastlora.integrations.peft.features import check_config
from fastlora.integrations.peft.layers import FastLora
from fastlora.integrations.peft.report import PatchReport, PatchRow
from fastlora.integrations.peft.tuner import FAST_TUNERS
from fastlora.targets import is_bnb


def patch_peft(model: nn.Module) -> PatchReport:
    """Let the LoRA layers of a PEFT model run on `fastlora.ops`, in place.

    Nothing is added or copied: modules, parameters, keys, files and methods stay PEFT's, only
    classes change. What cannot run there runs PEFT's own forward, which every forward decides anew;
    the report gives the reasons as of now. 4-bit layers of bitsandbytes are taken over, also those
    without adapters. Layers that the model gets later are fast too, unless transformers'
    `model.add_adapter` makes them: for that there is `enable`.

    Args:
        model: of PEFT, or of transformers with adapters of PEFT. A patched one is looked at again.

    Returns:
        The report; print it.

    Raises:
        NotImplementedError: PEFT trains something else than an adapter's config asks for.
        ValueError: there are no LoRA layers, or 4-bit weights have another layout than usual.
            Nothing is changed.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError(f"model must have LoRA layers of PEFT, got none in {type(model).__name__}")
    configs = _configs(model)
    for path, layer in layers:
        for name in layer.lora_A:
            if name in configs:
                _check(path, configs[name], layer)
    swap.take_over_bases(model)
    swap.swap(model, {**swap.classes(), **FAST_TUNERS})
    return PatchReport(tuple(_rows(model)))


def unpatch_peft(model: nn.Module) -> None:
    """Give every module of a model the class back that it had before `patch_peft`.

    Args:
        model: patched or not, or made after `enable`.
    """
    found = {**swap.classes(), **FAST_TUNERS}
    swap.swap(model, {new: old for old, new in found.items()})


def _configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The settings of all adapters, which PEFT keeps in one module or another."""
    found = {}
    for module in model.modules():
        kept = vars(module).get("peft_config")
        found |= kept if isinstance(kept, dict) else {}
    return {name: config for name, config in found.items() if isinstance(config, LoraConfig)}


def _check(path: str, config: LoraConfig, layer: LoraLayer) -> None:
    try:
        check_config(config, layer.get_base_layer())
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from error


def _rows(model: nn.Module) -> Iterator[PatchRow]:
    under = set()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            base = module.get_base_layer()
            under.add(base)
            reason = _reason(module)
            kind, names = bases.kind(base), ", ".join(_adapters(module))
            yield PatchRow(path, kind, names, "peft" if reason else "fast", reason)
        elif is_bnb(module) and module not in under:
            own = getattr(module, "why_not", None)
            reason = own() if own else f"{type(module).__name__} is left alone"
            path_ = "peft" if reason else "base"
            yield PatchRow(path, bases.kind(module), "", path_, reason or "no adapter")


def _reason(layer: BaseTunerLayer) -> str:
    if not isinstance(layer, LoraLayer):
        return f"{type(layer).__module__}.{type(layer).__name__} is left alone"
    if not isinstance(layer, FastLora):
        return f"{type(layer).__name__} is left alone"
    if "forward" in vars(layer):
        return "its forward was replaced"
    return fast.why_not(layer)


def _adapters(layer: BaseTunerLayer) -> Iterator[str]:
    for name in sorted(layer._get_available_adapters()):
        yield f"{name}*" if name in layer.active_adapters else name
