"""4-bit weights of a checkpoint, as bitsandbytes names their tensors, put into a model.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes for the tensors
(`QuantState.as_dict`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.pytorch_utils import Conv1D

from fastlora import slots
from fastlora.nf4 import NF4Weight
from fastlora.nn import Linear4bit

# bitsandbytes' names, the whole name last: older regular expressions take the first that matches
PARTS = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
]


@dataclass
class Loading:
    """What a quantizer and its operations know while a model is loaded.

    Attributes:
        places: of the model's modules, before the first of them is replaced.
        problems: what is wrong with single weights, since transformers logs the errors of its
            operations and then raises one that names nothing.
    """

    places: slots.Slots = field(default_factory=dict)
    problems: list[Exception] = field(default_factory=list)

    def place(self, old: nn.Module, new: Linear4bit) -> None:
        """Put a 4-bit layer into the model; transformers will not initialise it.

        Args:
            old: the dense layer, whose bias may still be read.
            new: over its weight.
        """
        for name, part in new.named_parameters():
            if name != "bias":
                part._is_hf_initialized = True
        slots.replace(self.places, old, new)


class Adopt(ConversionOps):
    """Puts a `Linear4bit` over the tensors of a weight in the place of its linear layer.

    Args:
        loading: of the model.
    """

    def __init__(self, loading: Loading) -> None:
        self.loading = loading
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict) -> "Adopt":
        # transformers copies the operation for each weight
        return Adopt(self.loading)

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *args: Any,
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Replace the layer of one weight.

        Args:
            input_dict: name of each part -> its tensor, in a list.
            args: for transformers.
            model: that is loaded.
            full_layer_name: of the weight in the model.
            missing_keys: what the files are not known to hold yet; the weight is taken out.
            kwargs: for transformers.

        Returns:
            What transformers has to place: a dense weight as it is, nothing for a 4-bit one, and
            for one of another shape an empty tensor of its shape.
        """
        key, parts = full_layer_name, {name: part[0] for name, part in input_dict.items()}
        if parts.keys() == {"weight"} and parts["weight"].dtype != torch.uint8:
            weight = parts["weight"]
            return {key: weight.to(self.dtype) if weight.is_floating_point() else weight}
        try:
            old, q = _layer_of(model, key), _weight_of(parts, key)
        except (KeyError, ValueError) as error:
            self.loading.problems.append(error)
            return {}
        transposed = isinstance(old, Conv1D)
        if q.shape != (*old.weight.shape,)[:: -1 if transposed else 1]:
            # transformers decides what becomes of it, as of a dense weight of another shape
            shape = q.shape[::-1] if transposed else q.shape
            return {key: torch.empty(shape, device="meta")}
        new = Linear4bit.from_nf4(replace(q, dtype=self.dtype), old.bias).train(old.training)
        if transposed:
            new.transposed = True  # so that a merge gives a Conv1D back
        self.loading.place(old, new)
        missing_keys.discard(key)
        return {}


def reversible(conversions: list[WeightTransform]) -> list[WeightTransform]:
    """Those that are undone when a model is saved: all but what a quantizer added.

    Args:
        conversions: what transformers remembers of loading.

    Returns:
        A new list.
    """
    return [
        conversion
        for conversion in conversions
        if not any(
            isinstance(operation, Adopt) or hasattr(operation, "hf_quantizer")
            for operation in getattr(conversion, "operations", ())
        )
    ]


def _layer_of(model: PreTrainedModel, key: str) -> nn.Module:
    """The layer that a 4-bit weight belongs to."""
    path, _, name = key.rpartition(".")
    layer, tied = model.get_submodule(path), model.all_tied_weights_keys
    if type(layer) not in (nn.Linear, Conv1D) or name != "weight":
        raise ValueError(f"{key} must be dense in {type(layer).__name__}, got 4 bits")
    if key in {*tied, *tied.values()}:
        raise ValueError(f"{key} must be dense as it is tied to another weight, got 4 bits")
    return layer


def _weight_of(parts: dict[str, Tensor], key: str) -> NF4Weight:
    """A weight from its parts, which transformers names without the path of the layer."""
    return NF4Weight.from_state_dict(
        {key + name.removeprefix("weight"): part for name, part in parts.items()}, key
    )
