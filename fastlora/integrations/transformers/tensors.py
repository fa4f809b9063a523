"""4-bit layers of a model in bitsandbytes' terms: tensors and config.

Source: https://huggingface.co/docs/transformers/quantization/bitsandbytes for `config.json`.
"""

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizers_utils import should_convert_module

from fastlora.model import adapted
from fastlora.nn import Linear4bit
from fastlora.targets import is_linear


def four_bit(root: nn.Module) -> dict[str, Linear4bit]:
    """The 4-bit layers of a model by path."""
    return {path: m for path, m in root.named_modules() if isinstance(m, Linear4bit)}


def has_adapters(root: nn.Module) -> bool:
    """Whether a model of transformers has adapters, ours or PEFT's."""
    return any(adapted(root)) or getattr(root, "_hf_peft_config_loaded", False)


def dense_stacks(root: nn.Module) -> dict[str, str]:
    """Weights of experts that are one 3-D parameter, and so no linear layers.

    Args:
        root: the model.

    Returns:
        name of each parameter -> why it is dense.
    """
    return {
        f"{path}.{name}": "a stack of matrices, not a linear layer"
        for path, module in root.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and parameter.ndim == 3 and min(parameter.shape) > 1
    }


def bnb_state(root: PreTrainedModel, layers: dict[str, Linear4bit]) -> dict[str, Tensor]:
    """The state dict with bitsandbytes' keys for the 4-bit layers.

    Args:
        root: without adapters.
        layers: from `four_bit`.

    Returns:
        name -> tensor, ready for `save_pretrained`.

    Raises:
        NotImplementedError: the files of the model hold several weights as one, which 4-bit weights
            cannot be.
    """
    _check_names(root, layers)
    state = root.state_dict()
    for path, layer in layers.items():
        for part, _ in layer.named_parameters():
            if part != "bias":
                del state[f"{path}.{part}"]
        state |= layer.nf4.state_dict(f"{path}.weight")
    # adopted layers may share the table, safetensors takes no tensor twice
    return {
        _written(k): t.clone() if k.endswith("nested_quant_map") else t for k, t in state.items()
    }


def bnb_config(root: PreTrainedModel, layers: dict[str, Linear4bit]) -> dict[str, Any]:
    """`quantization_config` by which bitsandbytes reads what `bnb_state` gives.

    Args:
        root: without adapters.
        layers: from `four_bit`.

    Returns:
        Ready for config.json.

    Raises:
        NotImplementedError: bitsandbytes would not read a layer in 4 bits.
    """
    first = next(iter(layers.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(first.compute_dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": any(layer.nf4.nested for layer in layers.values()),
        "llm_int8_skip_modules": _skip_modules(root, layers),
    }


def _skip_modules(root: PreTrainedModel, layers: dict[str, Linear4bit]) -> list[str]:
    """Names by which bitsandbytes leaves the dense layers alone, and none of the others."""
    names = [_written(path) for path in layers]
    kept = sorted(root._keep_in_fp32_modules or ())
    for name in names:
        if not should_convert_module(name, kept):
            raise NotImplementedError(
                f"a layer that transformers keeps in fp32 ({kept}) must be dense for bitsandbytes, "
                f"got 4 bits in {name}: name it in skip_modules of quantize_model"
            )
    modules = root.named_modules()
    dense = [_written(path) for path, m in modules if is_linear(m) and path not in layers]
    # a plain name also stands for all names that end with it; older readers know no other
    return [
        name if all(should_convert_module(n, [name]) for n in names) else f"^{re.escape(name)}$"
        for name in dense
    ]


def _check_names(root: PreTrainedModel, layers: dict[str, Linear4bit]) -> None:
    for conversion in getattr(root, "_weight_conversions", None) or ():
        if not isinstance(conversion, WeightConverter):
            continue
        back = conversion.reverse_transform()
        for path in layers:
            if back.rename_source_key(f"{_written(path)}.weight")[1] is not None:
                raise NotImplementedError(
                    f"a 4-bit weight must have a name of its own in the files, got {path}, which "
                    f"{type(root).__name__} saves in {conversion.source_patterns}"
                )


def _written(path: str) -> str:
    """A name without what torch.compile adds to the paths of blocks."""
    return path.replace("_orig_mod.", "")
