"""torchtune: its LoRA adapters as PEFT's and ours, and back.

torchtune names layers as Meta does, and for Llama, Mistral and Gemma it orders the rows of q and k
as Meta does: a pair that is rotated together is two neighbours, where transformers has half a head
between them. torchtune itself is not needed.

Source: https://github.com/pytorch/torchtune, `torchtune/models/convert_weights.py` of 0.6.1.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.adapters import write_adapter
from fastlora.config import LoraConfig

# torchtune's name of a layer in a block -> that of transformers
_LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_BACK = {theirs: ours for ours, theirs in _LAYERS.items()}
# model_type in transformers -> whether torchtune rotates neighbours
_NEIGHBOURS = {"gemma": True, "gemma2": True, "llama": True, "mistral": True, "qwen2": False}

_TUNE = re.compile(r"(?:layers\.(\d+)\.(.+)|output)\.lora_([ab])\.weight")
_PEFT = re.compile(
    r"base_model\.model\.(?:model\.layers\.(\d+)\.(.+)|lm_head)\.lora_([AB])\.weight"
)


def to_peft(state: Mapping[str, Tensor], model_config: Any) -> dict[str, Tensor]:
    """An adapter of torchtune with the keys and the order of rows that PEFT's files have.

    Args:
        state: [R, K] for every `lora_a.weight` and [N, R] for every `lora_b.weight`, any dtype.
            What a recipe of torchtune writes to `adapter_model.pt`.
        model_config: of the model in transformers.

    Returns:
        PEFT's key -> tensor.

    Raises:
        NotImplementedError: torchtune's layers of this kind of model are not known here, or the
            adapter is one of DoRA.
        ValueError: a key is not of a LoRA adapter, or a shape does not fit the model.
    """
    found = {}
    for key, tensor in state.items():
        layer, place, part = _parsed(_TUNE, key, _LAYERS)
        name = "lm_head" if layer is None else f"model.layers.{layer}.{_LAYERS[place]}"
        if part == "b":
            tensor = _reordered(key, tensor, place, model_config, _halved)
        found[f"base_model.model.{name}.lora_{part.upper()}.weight"] = tensor
    return found


def from_peft(state: Mapping[str, Tensor], model_config: Any) -> dict[str, Tensor]:
    """An adapter of PEFT or ours as torchtune has it.

    Args:
        state: [R, K] for every `lora_A.weight` and [N, R] for every `lora_B.weight`, any dtype.
            What is in `adapter_model.safetensors`.
        model_config: of the model in transformers.

    Returns:
        torchtune's key -> tensor, which its recipes read from `adapter_model.pt`.

    Raises:
        NotImplementedError: torchtune's layers of this kind of model are not known here, or the
            adapter is one of DoRA.
        ValueError: a key is not of a LoRA adapter, or a shape does not fit the model.
    """
    found = {}
    for key, tensor in state.items():
        layer, place, part = _parsed(_PEFT, key, _BACK)
        name = "output" if layer is None else f"layers.{layer}.{_BACK[place]}"
        if part == "B":
            tensor = _reordered(key, tensor, _BACK.get(place), model_config, _paired)
        found[f"{name}.lora_{part.lower()}.weight"] = tensor
    return found


def save_as_peft(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    model_config: Any,
    lora_alpha: float,
) -> Path:
    """Write an adapter of torchtune as files that PEFT and `fastlora.load_adapter` read.

    Args:
        state: as in `to_peft`.
        path: a folder, made if missing.
        model_config: of the model in transformers.
        lora_alpha: of the recipe, since the tensors do not tell it.

    Returns:
        The folder.

    Raises:
        NotImplementedError: as in `to_peft`.
        ValueError: as in `to_peft`, or layers have different ranks.
    """
    tensors = to_peft(state, model_config)
    ranks = {len(t) for key, t in tensors.items() if key.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"state must have layers of one rank, got {sorted(ranks)}")
    layers = [key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors]
    config = LoraConfig(r=ranks.pop(), lora_alpha=lora_alpha, target_modules=layers)
    return write_adapter(tensors, config, path)


def _parsed(
    pattern: re.Pattern[str], key: str, known: Mapping[str, str]
) -> tuple[str | None, str, str]:
    """Block, name in it (no block: those of the head) and part of a key."""
    if "magnitude" in key:
        raise NotImplementedError(f"DoRA is not supported, got {key}")
    match = pattern.fullmatch(key)
    if match is None or (match[1] is not None and match[2] not in known):
        raise ValueError(f"state must have keys of a LoRA adapter only, got {key}")
    return match[1], match[2], match[3]


def _reordered(
    key: str, b: Tensor, place: str | None, model_config: Any, order: Callable[..., Tensor]
) -> Tensor:
    """The B of a layer, [N, R], in the order of the other library."""
    kind = model_config.model_type
    if kind not in _NEIGHBOURS:
        raise NotImplementedError(f"model_type must be one of {[*_NEIGHBOURS]}, got {kind!r}")
    if place not in ("attn.q_proj", "attn.k_proj") or not _NEIGHBOURS[kind]:
        return b
    heads = model_config.num_attention_heads
    size = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    if place == "attn.k_proj":
        heads = model_config.num_key_value_heads
    if len(b) != heads * size:
        raise ValueError(f"{key} must be [{heads * size}, R], got {[*b.shape]}")
    return order(b, heads, size)


def _halved(b: Tensor, heads: int, size: int) -> Tensor:
    return b.unflatten(0, (heads, size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _paired(b: Tensor, heads: int, size: int) -> Tensor:
    return b.unflatten(0, (heads, 2, size // 2)).transpose(1, 2).flatten(0, 2)
