"""Models of transformers whose weights are in bitsandbytes' 4-bit format: read and written.

bitsandbytes is not needed. transformers reads the files, so that shards, renamed keys and tied
weights are its own; a quantizer in place of bitsandbytes' makes `Linear4bit` layers of the bytes.

Source: https://huggingface.co/docs/transformers/quantization/bitsandbytes for `config.json`,
https://github.com/bitsandbytes-foundation/bitsandbytes for the tensors (`QuantState.as_dict`).
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastlora.atomic import replaced_folder
from fastlora.model import adapted, state_of, unwrap
from fastlora.nf4 import NF4Weight
from fastlora.nn import Linear4bit
from fastlora.targets import is_linear

_KEY = "bitsandbytes_4bit"  # of bitsandbytes' quantizer in transformers' mapping
_CONFIG = "config.json"
# bitsandbytes' names, the whole name last: older regular expressions take the first that matches
_PARTS = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
]
_MAPPING_LOCK = threading.RLock()


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse quantised weights that `load_bnb_4bit` cannot read, before they are loaded.

    Args:
        config: `quantization_config` from a model's config.json.

    Raises:
        NotImplementedError: the weights are not bitsandbytes' NF4; the message names what they are.
    """
    method = config.get("quant_method")
    if config.get("load_in_8bit"):
        found = "bitsandbytes int8 (load_in_8bit)"
    elif config.get("load_in_4bit"):
        # bitsandbytes' default, where the type is not written
        kind = config.get("bnb_4bit_quant_type", "fp4")
        found = "" if kind == "nf4" else f"bitsandbytes {str(kind).upper()} (bnb_4bit_quant_type)"
    else:
        found = f"quant_method {method!r} without load_in_4bit"
        found = found if method == "bitsandbytes" else f"quant_method {method!r}"
    if found:
        raise NotImplementedError(
            f"the weights of a model must be dense or bitsandbytes NF4, got {found}"
        )


def load_bnb_4bit(
    folder: str | os.PathLike[str], auto_class: Any, dtype: torch.dtype | str, **kwargs: Any
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model whose linear layers are stored in bitsandbytes' NF4; they become `Linear4bit`.

    The packed bytes and statistics are those of the files, neither decoded nor copied. Layers that
    the files hold dense stay dense, as do layers that the files do not hold, which transformers
    reports as missing. To transformers and its Trainer the model looks like one that was never
    quantised. While it loads, no other thread should load a bitsandbytes model.

    Args:
        folder: as written by `save_pretrained` or `save_nf4`, one safetensors file or shards.
        auto_class: whose `from_pretrained` loads, such as `AutoModelForCausalLM`.
        dtype: of everything else, and of what the 4-bit layers compute in: fp32, fp16, bf16.
        kwargs: for `from_pretrained`, such as `num_labels` or `output_loading_info`.

    Returns:
        What `from_pretrained` returns: the model in eval mode, with `output_loading_info=True` the
        pair of model and information.

    Raises:
        FileNotFoundError: there is no config.json in the folder.
        KeyError: statistics of a weight are missing; the message names them.
        NotImplementedError: the weights are quantised in another format, or transformers merges
            4-bit weights of several layers.
        RuntimeError: transformers is too old, or refuses the files for another reason.
        ValueError: the folder is not quantised, or a 4-bit weight is damaged or does not fit; the
            message names it.
    """
    if not hasattr(HfQuantizer, "get_new_dtype"):
        raise RuntimeError(
            f"transformers must be 5.21 or newer for 4-bit files, got {transformers.__version__}"
        )
    config = json.loads((Path(folder) / _CONFIG).read_bytes())
    found = config.get("quantization_config")
    if found is None:
        found = (config.get("text_config") or {}).get("quantization_config")
    if found is None:
        raise ValueError(f"{_CONFIG} must have quantization_config, got none in {folder}")
    check_quantization(found)
    problems: list[Exception] = []
    try:
        with _taking_over(partial(NF4Quantizer, problems=problems)):
            return auto_class.from_pretrained(folder, dtype=dtype, **kwargs)
    except RuntimeError as error:
        # transformers logs what its conversions raise, and then raises an error that names nothing
        if problems:
            raise problems[0] from error
        raise


def save_nf4(
    model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB"
) -> Path:
    """Write a model with `Linear4bit` layers as transformers and bitsandbytes read it, atomically.

    Args:
        model: of transformers, without adapters.
        folder: must not exist; nothing is there under its name until all is on disk.
        max_shard_size: bytes of one file, or a number with a unit such as "5GB".

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        NotImplementedError: bitsandbytes would not read a layer in 4 bits, or a tensor is sharded.
        OSError: the files cannot be written.
        ValueError: the model is not one of transformers, has adapters, no 4-bit layers, or tensors
            without values.
    """
    parts = _savable(model)
    with replaced_folder(Path(folder)) as new:
        _write(*parts, new, max_shard_size)
    return Path(folder)


def write_nf4(
    model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB"
) -> None:
    """Write the files of `save_nf4` into a folder that is there, beside what else it has.

    Args:
        model: as in `save_nf4`.
        folder: exists; whoever made it sees to it that it is complete or not there.
        max_shard_size: as in `save_nf4`.

    Raises:
        NotImplementedError: as in `save_nf4`.
        OSError: the files cannot be written.
        ValueError: as in `save_nf4`.
    """
    _write(*_savable(model), Path(folder), max_shard_size)


class NF4Quantizer(HfQuantizer):
    """Reads what bitsandbytes wrote into `Linear4bit`; transformers makes and asks it.

    Args:
        quantization_config: from config.json.
        problems: takes what goes wrong with single weights.
        kwargs: for transformers.
    """

    def __init__(
        self,
        quantization_config: QuantizationConfigMixin,
        problems: list[Exception] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise NotImplementedError(
                "a dense model must be loaded without quantization_config, got one: call "
                "quantize_model on it then"
            )
        self.problems = [] if problems is None else problems
        self._skipped: list[str] = []

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained over the layers."""
        return True

    def is_serializable(self) -> bool:
        """Whether transformers may save the layers; they are saved by `save_nf4`."""
        return False

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the tensors of one weight come together: all of its parts go to `_Adopt`."""
        return [WeightConverter(_PARTS, "weight", [_Adopt(self.problems)])]

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """What to cast a tensor of the files to while it is read.

        Args:
            converter: of transformers, for the tensor.
            param: the tensor, or a slice of its file.
            dtype: what transformers would cast it to.

        Returns:
            None where `_Adopt` casts: only with all its parts is a weight known to be dense.

        Raises:
            NotImplementedError: transformers merges or splits a 4-bit weight.
        """
        operations = getattr(converter, "operations", ())
        for operation in operations:
            if isinstance(operation, _Adopt):
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
        path, _, name = param_name.rpartition(".")
        if (
            name == "weight"
            and type(model.get_submodule(path)) in (nn.Linear, Conv1D)
            and should_convert_module(path, self._skipped)
        ):
            return 0.5
        return super().param_element_size(model, param_name, param)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._skipped = self.get_modules_to_not_convert(
            model, self.quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Trainer and save_pretrained refuse what looks quantised. config._is_quantized stays: by it
        # some models know that they must call a layer and not read its weight
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("quantization_config", None)
        model._weight_conversions = _reversible(model._weight_conversions)
        state_of(model).dense = {
            path: "dense in the checkpoint"
            for path, module in model.named_modules()
            if is_linear(module) and not isinstance(module, Linear4bit)
        }


class _Adopt(ConversionOps):
    """Puts a `Linear4bit` over the tensors of a weight in the place of its linear layer."""

    def __init__(self, problems: list[Exception]) -> None:
        self.problems = problems
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict) -> "_Adopt":
        # transformers copies the operation for each weight
        return _Adopt(self.problems)

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *args: Any,
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        key, parts = full_layer_name, {name: part[0] for name, part in input_dict.items()}
        if parts.keys() == {"weight"} and parts["weight"].dtype != torch.uint8:
            weight = parts["weight"]
            return {key: weight.to(self.dtype) if weight.is_floating_point() else weight}
        try:
            old, q = _layer_of(model, key), _weight_of(parts, key)
        except (KeyError, ValueError) as error:
            self.problems.append(error)
            raise
        transposed = isinstance(old, Conv1D)
        wanted = (*old.weight.shape,)[:: -1 if transposed else 1]
        if q.shape != wanted:
            self.problems.append(ValueError(f"{key} must be {[*wanted]}, got {[*q.shape]}"))
            # transformers decides what becomes of it, as of a dense weight of another shape
            return {key: torch.empty(q.shape, device="meta")}
        new = Linear4bit.from_nf4(replace(q, dtype=self.dtype), old.bias).train(old.training)
        if transposed:
            new.transposed = True  # so that a merge gives a Conv1D back
        for part, tensor in new.named_parameters():
            if part != "bias":
                tensor._is_hf_initialized = True
        model.set_submodule(key.removesuffix(".weight"), new)
        missing_keys.discard(key)
        return {}


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


@contextmanager
def _taking_over(quantizer: Callable[..., NF4Quantizer]) -> Iterator[None]:
    """Let transformers use a quantizer for bitsandbytes' 4-bit files."""
    with _MAPPING_LOCK:
        before = AUTO_QUANTIZER_MAPPING[_KEY]
        AUTO_QUANTIZER_MAPPING[_KEY] = quantizer
        try:
            yield
        finally:
            AUTO_QUANTIZER_MAPPING[_KEY] = before


def _reversible(conversions: list[WeightTransform]) -> list[WeightTransform]:
    """Those that are undone when a model is saved: all but what a quantizer added."""
    return [
        conversion
        for conversion in conversions
        if not any(
            isinstance(operation, _Adopt) or hasattr(operation, "hf_quantizer")
            for operation in getattr(conversion, "operations", ())
        )
    ]


@contextmanager
def _never_quantised(root: PreTrainedModel) -> Iterator[None]:
    """Hide what transformers remembers of a quantizer whose layers were adopted since.

    With it save_pretrained would ignore the tensors that it is given.
    """
    names = ("hf_quantizer", "_weight_conversions")
    hidden = {name: vars(root).pop(name) for name in names if name in vars(root)}
    if "_weight_conversions" in hidden:
        root._weight_conversions = _reversible(hidden["_weight_conversions"])
    try:
        yield
    finally:
        vars(root).update(hidden)


def _savable(model: nn.Module) -> tuple[nn.Module, dict[str, Linear4bit], list[str]]:
    """The unwrapped model, its 4-bit layers by path, and the names that bitsandbytes must skip."""
    root = unwrap(model)
    _check_savable(root)
    layers = {path: m for path, m in root.named_modules() if isinstance(m, Linear4bit)}
    if not layers:
        raise ValueError(f"the model must have 4-bit layers, got none in {type(root).__name__}")
    return root, layers, _skip_modules(root, layers)


def _write(
    root: nn.Module,
    layers: dict[str, Linear4bit],
    skipped: list[str],
    folder: Path,
    max_shard_size: int | str,
) -> None:
    with _never_quantised(root):
        root.save_pretrained(
            folder, state_dict=_bnb_state(root, layers), max_shard_size=max_shard_size
        )
    file = folder / _CONFIG
    config = json.loads(file.read_bytes())
    config["quantization_config"] = _quantization_config(layers, skipped)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_savable(root: nn.Module) -> None:
    if not isinstance(root, PreTrainedModel):
        raise ValueError(f"the model must be one of transformers, got {type(root).__name__}")
    some = next((path for path, _ in adapted(root)), None)
    if some is not None or getattr(root, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the model must have no adapters, got some on {some or 'layers of PEFT'}: merge or "
            "unload them first"
        )
    for name, parameter in root.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise NotImplementedError(f"saving sharded tensors is not supported, got {name}")
        if parameter.is_meta:
            raise ValueError(f"{name} must have values, got a tensor on the meta device")


def _skip_modules(root: PreTrainedModel, layers: dict[str, Linear4bit]) -> list[str]:
    """Names by which bitsandbytes leaves the dense layers alone, and none of the others."""
    names = [_key(path) for path in layers]
    kept = sorted(root._keep_in_fp32_modules or ())
    for name in names:
        if not should_convert_module(name, kept):
            raise NotImplementedError(
                f"a layer that transformers keeps in fp32 ({kept}) must be dense for bitsandbytes, "
                f"got 4 bits in {name}: name it in skip_modules of quantize_model"
            )
    dense = [_key(path) for path, m in root.named_modules() if is_linear(m) and path not in layers]
    # a plain name also stands for all names that end with it; older readers know no other
    return [
        name if all(should_convert_module(n, [name]) for n in names) else f"^{re.escape(name)}$"
        for name in dense
    ]


def _bnb_state(root: PreTrainedModel, layers: dict[str, Linear4bit]) -> dict[str, Tensor]:
    """The state dict with bitsandbytes' keys for the 4-bit layers."""
    state = root.state_dict()
    for path, layer in layers.items():
        for part, _ in layer.named_parameters():
            if part != "bias":
                del state[f"{path}.{part}"]
        state |= layer.nf4.state_dict(f"{path}.weight")
    # adopted layers may share the table, safetensors takes no tensor twice
    return {_key(k): t.clone() if k.endswith("nested_quant_map") else t for k, t in state.items()}


def _quantization_config(layers: dict[str, Linear4bit], skipped: list[str]) -> dict[str, Any]:
    first = next(iter(layers.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(first.compute_dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": any(layer.nf4.nested for layer in layers.values()),
        "llm_int8_skip_modules": skipped,
    }


def _key(path: str) -> str:
    """A name without what torch.compile adds to the paths of blocks."""
    return path.replace("_orig_mod.", "")
