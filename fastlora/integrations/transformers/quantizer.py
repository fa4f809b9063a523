"""How transformers loads and saves models whose weights are in 4 bits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastlora import slots
from fastlora.integrations.transformers.adopt import PARTS, Adopt, Loading, reversible
from fastlora.integrations.transformers.formats import check_quantization, check_version
from fastlora.integrations.transformers.tensors import (
    bnb_config,
    bnb_state,
    dense_stacks,
    four_bit,
    has_adapters,
)
from fastlora.model import dequantize_model, state_of
from fastlora.nn import Linear4bit
from fastlora.targets import is_linear


class NF4Quantizer(HfQuantizer):
    """Reads what bitsandbytes wrote into `Linear4bit`; transformers makes and asks it.

    The loaded model keeps it as `hf_quantizer`, by which `save_pretrained` writes the format that
    was read. Else the model looks like one that was never quantised, so that `Trainer` takes it
    with adapters of any kind.

    Args:
        quantization_config: from config.json.
        kwargs: for transformers.
    """

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        check_version()
        super().__init__(quantization_config, **kwargs)
        self.loading = Loading()
        self._four_bit: set[str] = set()
        self._check()

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained over the layers."""
        return True

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes the layers."""
        return True

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the tensors of one weight come together: all of its parts go to `Adopt`."""
        return [WeightConverter(PARTS, "weight", [Adopt(self.loading)])]

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """What to cast a tensor of the files to while it is read.

        Args:
            converter: of transformers, for the tensor.
            param: the tensor, or a slice of its file.
            dtype: what transformers would cast it to.

        Returns:
            None where `Adopt` casts: only with all its parts is a weight known to be dense.

        Raises:
            NotImplementedError: transformers merges or splits a 4-bit weight.
        """
        operations = getattr(converter, "operations", ())
        for operation in operations:
            if isinstance(operation, Adopt):
                operation.dtype = dtype
                return None
        kind = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
        if operations and kind in ("U8", torch.uint8):
            raise NotImplementedError(
                "a 4-bit weight must be a linear layer of its own, got "
                f"{converter.source_patterns} for {converter.target_patterns}"
            )
        return super().get_new_dtype(converter, param, dtype)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of one element, by which transformers plans and reserves memory.

        Args:
            model: on the meta device.
            param_name: of the parameter.
            param: dense, as the model was made.

        Returns:
            Half a byte for what is likely to be in 4 bits; statistics come on top.
        """
        if param_name in self._four_bit:
            return 0.5
        return super().param_element_size(model, param_name, param)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what the layers cannot do yet; asked before and after the map is made.

        Args:
            args: for transformers.
            device_map: as given, or module -> device.
            kwargs: for transformers.

        Raises:
            NotImplementedError: layers would be kept on disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise NotImplementedError(
                f"device_map must keep 4-bit layers in memory, got 'disk' in {device_map}"
            )

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes, with bitsandbytes' names for the 4-bit weights.

        Args:
            model: the one that was loaded, perhaps changed since.

        Returns:
            The state dict, and no metadata. None where there is nothing to rename, and for a model
            with adapters, whose checkpoint is for the Trainer that goes on with it.
        """
        layers = four_bit(model)
        if not layers:  # merged or dequantised
            self.remove_quantization_config(model)
        if not layers or has_adapters(model):
            return None, {}
        model.config.quantization_config = self._written_config(model, layers)
        return bnb_state(model, layers), {}

    def _check(self) -> None:
        """Refuse what cannot be read, before any file is."""
        check_quantization(self.quantization_config.to_dict())
        if not self.pre_quantized:
            raise NotImplementedError(
                "a dense model must be loaded with FastLoraConfig to be quantised, got "
                f"{type(self.quantization_config).__name__}"
            )

    def _skip_modules(self) -> list[str] | None:
        return self.quantization_config.llm_int8_skip_modules

    def _written_config(self, model: PreTrainedModel, layers: dict[str, Linear4bit]) -> Any:
        return bnb_config(model, layers)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        skipped = self.get_modules_to_not_convert(
            model, self._skip_modules(), model._keep_in_fp32_modules
        )
        self._four_bit = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if type(module) in (nn.Linear, Conv1D) and should_convert_module(path, skipped)
        }
        self.loading = Loading(slots.find(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        problems, self.loading = self.loading.problems, Loading()
        if problems:
            raise problems[0]
        _forget_quantised(model)
        model.config.quantization_config = self.quantization_config
        model._weight_conversions = reversible(model._weight_conversions)
        self._finish(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_model(model, dtype)
        return model

    def _finish(self, model: PreTrainedModel) -> None:
        """What is left to do to a model that is loaded, once it looks like any other."""
        if not four_bit(model):
            raise ValueError(
                "a 4-bit checkpoint must hold packed weights under the names of the model's "
                "layers, got none: one with adapters in it is for the Trainer that wrote it, load "
                "the files of its adapters instead"
            )
        dense = {
            path: "dense in the checkpoint"
            for path, module in model.named_modules()
            if is_linear(module) and not isinstance(module, Linear4bit)
        }
        state_of(model).dense = dense | dense_stacks(model)


def _forget_quantised(model: PreTrainedModel) -> None:
    """Undo by what transformers, Trainer and PEFT tell such a model from others.

    They would refuse adapters that are not PEFT's and forbid casts, and PEFT would leave it to its
    user that inputs have gradients where checkpointing needs them. `config._is_quantized` stays: by
    it some models know that they must call a layer and not read its weight.
    """
    for name in ("is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("quantization_config", None)
