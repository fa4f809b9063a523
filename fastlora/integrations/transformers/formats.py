"""Which quantised weights of transformers' models become `Linear4bit`, and which do not."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.quantizers import HfQuantizer

METHOD = "fastlora"  # quant_method of what FastLoraConfig quantised


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse quantised weights that cannot be read, before they are loaded.

    Args:
        config: `quantization_config` from a model's config.json.

    Raises:
        NotImplementedError: the weights are neither bitsandbytes' NF4 nor ours; the message names
            what they are.
    """
    method = config.get("quant_method")
    if config.get("load_in_8bit"):
        found = "bitsandbytes int8 (load_in_8bit)"
    elif config.get("load_in_4bit"):
        # bitsandbytes' default, where the type is not written
        kind = config.get("bnb_4bit_quant_type", "fp4")
        found = "" if kind == "nf4" else f"bitsandbytes {str(kind).upper()} (bnb_4bit_quant_type)"
    elif method == METHOD:
        found = ""
    else:
        found = f"quant_method {method!r} without load_in_4bit"
        found = found if method == "bitsandbytes" else f"quant_method {method!r}"
    if found:
        raise NotImplementedError(
            f"the weights of a model must be dense, bitsandbytes NF4 or fastlora's, got {found}"
        )


def check_version() -> None:
    """Refuse versions of transformers whose quantizers cannot say how a tensor is cast.

    Raises:
        RuntimeError: transformers is too old.
    """
    if not hasattr(HfQuantizer, "get_new_dtype"):
        raise RuntimeError(
            f"transformers must be 5.21 or newer for 4-bit files, got {transformers.__version__}"
        )
