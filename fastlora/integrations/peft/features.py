"""What PEFT would train as something else, or read wrong values for, and is refused by name."""

from dataclasses import fields

from peft import LoraConfig
from torch import nn

from fastlora.integrations.peft.bases import is_4bit
from fastlora.nn import Linear4bit
from fastlora.targets import is_bnb

# variants of PEFT that neither read the base weight nor need a layer class of their own
_VARIANTS = {"alora_invocation_tokens", "arrow_config"}
# initialisations that do not read the base weight
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def check_config(config: LoraConfig, base: nn.Module) -> None:
    """Check that PEFT trains over a 4-bit layer what a config asks for.

    Its class for bitsandbytes knows few variants, and takes plain LoRA for the others without a
    word; over `fastlora.nn.Linear4bit` it would read a placeholder for the weight.

    Args:
        config: of the adapter.
        base: the layer under it; a dense one passes, PEFT looks after it.

    Raises:
        NotImplementedError: it would not; the message names the field.
    """
    if not is_4bit(base) and not is_bnb(base):
        return
    ours = isinstance(base, Linear4bit)
    layers = "fastlora.nn.Linear4bit" if ours else "bitsandbytes' 4-bit layers"
    refused = _variants(config) - (_VARIANTS if ours else _VARIANTS | {"use_dora"})
    if refused:
        raise NotImplementedError(
            f"an adapter on {layers} must be plain LoRA, got {', '.join(sorted(refused))}"
        )
    init = config.init_lora_weights
    if ours and (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise NotImplementedError(
            f"init_lora_weights on {layers} must be one of {_INITS}, got {init!r}"
        )


def _variants(config: LoraConfig) -> set[str]:
    """The fields of a config that ask for more than plain LoRA."""
    asked = {f.name for f in fields(config) if f.metadata.get("is_lora_variant")}
    asked = {name for name in asked if getattr(config, name)}
    if getattr(config, "use_qalora", False):  # which PEFT knows over GPTQ only
        asked.add("use_qalora")
    for field in fields(config):
        if config.init_lora_weights in field.metadata.get("lora_variants", ()):
            asked.add(f"init_lora_weights={config.init_lora_weights!r}")
    return asked
