"""Dense weights of a checkpoint quantised while transformers reads them, one at a time."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastlora import targets
from fastlora.codebooks import check_blocksize
from fastlora.integrations.transformers.formats import METHOD
from fastlora.integrations.transformers.quantizer import NF4Quantizer
from fastlora.integrations.transformers.tensors import dense_stacks
from fastlora.model import quantize_layer, quantize_model, state_of
from fastlora.nn import Linear4bit
from fastlora.report import count_parameters


@register_quantization_config(METHOD)
class FastLoraConfig(QuantizationConfigMixin):
    """Quantise a model as `quantize_model` does while `from_pretrained` loads it.

    Each weight is read, quantised and dropped before the next one is read, so that the host never
    holds more of the dense model than one weight, beside what stays dense. `save_pretrained` writes
    the bytes and this config, and `from_pretrained` reads them without an argument once
    `fastlora.integrations.transformers` is imported.

    Args:
        blocksize: elements per block scale, a power of two from 32 to 4096.
        double_quant: whether the block scales are quantised as well.
        skip_modules: name suffixes of layers, or of modules around them, to leave dense.
        quant_method: how config.json names it; nothing else is taken.

    Raises:
        ValueError: one of them is something else.
    """

    def __init__(
        self,
        blocksize: int = 64,
        double_quant: bool = True,
        skip_modules: Sequence[str] = ("lm_head",),
        quant_method: str = METHOD,
    ) -> None:
        check_blocksize(blocksize)
        if type(double_quant) is not bool:
            raise ValueError(f"double_quant must be True or False, got {double_quant!r}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.blocksize, self.double_quant = blocksize, double_quant
        self.skip_modules = targets.name_list(skip_modules, "skip_modules")
        self.quant_method = quant_method


@register_quantizer(METHOD)
class FastLoraQuantizer(NF4Quantizer):
    """Quantises dense checkpoints by a `FastLoraConfig`, and reads what came of it.

    Args:
        quantization_config: of the model.
        kwargs: for transformers.
    """

    def __init__(self, quantization_config: FastLoraConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._chosen: dict[str, nn.Module] = {}  # path -> layer that waits for its weight

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How tensors of the files come together: those of a dense checkpoint are whole."""
        return super().get_weight_conversions() if self.pre_quantized else []

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a parameter is to be quantised when it is read.

        Args:
            model: that is loaded.
            param_name: of the parameter.
            kwargs: for transformers.

        Returns:
            True for the weights that `quantize_model` would choose, until they are quantised.
        """
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self._chosen

    def get_quantize_ops(self) -> ConversionOps:
        """What quantises a weight that was read."""
        return _Quantize(self)

    def quantize(self, path: str, weight: Tensor) -> bool:
        """Put a `Linear4bit` in the place of a layer whose weight was read.

        Args:
            path: of the layer.
            weight: dense, in the layout of the layer's own.

        Returns:
            False for a weight of another shape: transformers decides what becomes of it.
        """
        layer, config = self._chosen.pop(path), self.quantization_config
        if weight.shape != layer.weight.shape:
            return False
        layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            new = quantize_layer(layer, config.blocksize, config.double_quant)
        except ValueError as error:
            self.loading.problems.append(ValueError(f"{path}: {error}"))
        else:
            self.loading.place(layer, new)
        return True

    def _check(self) -> None:
        """Nothing that the config has not checked."""

    def _skip_modules(self) -> list[str]:
        return self.quantization_config.skip_modules

    def _written_config(
        self, model: PreTrainedModel, layers: dict[str, Linear4bit]
    ) -> FastLoraConfig:
        return self.quantization_config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.pre_quantized:
            return
        chosen, _ = targets.quantizable(model, self._skip_modules())
        # what is tied is tied, and told apart, only when all is read
        tied = model.all_tied_weights_keys
        waits = {*tied, *tied.values()}
        self._chosen = {p: layer for p, layer in chosen.items() if f"{p}.weight" not in waits}
        self._four_bit = {f"{path}.weight" for path in chosen}

    def _finish(self, model: PreTrainedModel) -> None:
        if self.pre_quantized:
            super()._finish(model)
            return
        self._chosen = {}
        config = self.quantization_config
        # what came in no tensor of its own: new weights, tied weights, parts of a larger tensor
        quantize_model(model, config.skip_modules, config.blocksize, config.double_quant)
        stacks = dense_stacks(model)
        state_of(model).dense |= stacks
        if stacks:
            share = (
                sum(model.get_parameter(path).numel() for path in stacks)
                / count_parameters(model)[1]
            )
            warnings.warn(
                f"{len(stacks)} weights of experts, {share:.0%} of the model, stay dense: "
                f"{', '.join([*stacks][:3])}{', ...' if len(stacks) > 3 else ''}",
                stacklevel=2,
            )


class _Quantize(ConversionOps):
    """Quantises what a tensor of the files came to, of which some may stay dense."""

    def __init__(self, quantizer: FastLoraQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        *args: Any,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor | list[Tensor]]:
        dense = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            wanted = self.quantizer.param_needs_quantization(model, key)
            if wanted and self.quantizer.quantize(key.removesuffix(".weight"), weight):
                missing_keys.discard(key)
            else:
                dense[key] = value
        return dense
