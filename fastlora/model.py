"""What is done to a whole model: quantise it, add adapters, switch, merge and remove them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastlora import causal_lm, siblings, slots, targets
from fastlora.config import LoraConfig
from fastlora.nf4 import quantize_nf4
from fastlora.nn import (
    Linear4bit,
    LoraLinear,
    SavedModule,
    disabled,
    group_layers,
    is_conv1d,
    ungroup,
)

_STATE = "fastlora_state"


@dataclass
class ModelState:
    """What the root model remembers, in its attribute `fastlora_state`.

    Attributes:
        configs: adapter name -> its config, complete: target_modules is never "all-linear".
        active: name of the active adapter, None when there is none.
        trainable: names of the parameters that had a gradient before the first adapter.
        dense: path of each layer that was not quantised -> the reason.
        unadapted: path of each layer that "all-linear" left out -> the reason.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: str | None = None
    trainable: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    unadapted: dict[str, str] = field(default_factory=dict)


def quantize_model(
    model: nn.Module,
    skip_modules: tuple[str, ...] = ("lm_head",),
    blocksize: int = 64,
    double_quant: bool = True,
) -> nn.Module:
    """Replace linear layers by `Linear4bit`, in place.

    Left dense, with reasons in `explain`: the output embedding, layers tied to an embedding, task
    heads (outside the base model), subclasses of `nn.Linear`, and layers whose weights their owner
    reads directly (inside `nn.MultiheadAttention`). bitsandbytes' 4-bit layers are adopted without
    a copy.

    Args:
        model: any module, without adapters.
        skip_modules: name suffixes of layers, or of modules around them, to leave dense.
        blocksize: elements per block scale, a power of two from 32 to 4096.
        double_quant: whether the block scales are quantised as well.

    Returns:
        The model.

    Raises:
        ValueError: nothing to quantise, a name in skip_modules matches nothing, a layer has hooks
            or adapters, or a weight holds NaN or Inf (layers before it are quantised by then).
    """
    root = unwrap(model)
    chosen, skipped = targets.quantizable(root, skip_modules)
    if not chosen:
        _check_quantised(root, blocksize, double_quant, skipped)
    places = slots.find(root)
    for path in list(chosen):
        layer = chosen.pop(path)  # so that its weight is freed once it is replaced
        try:
            new = quantize_layer(layer, blocksize, double_quant)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        slots.replace(places, layer, new)
    state_of(root).dense = skipped
    return model


def quantize_layer(layer: nn.Module, blocksize: int, double_quant: bool) -> Linear4bit:
    """What `quantize_model` puts in the place of one layer.

    Args:
        layer: a linear layer, transformers' `Conv1D`, or bitsandbytes' 4-bit layer.
        blocksize: elements per block scale, a power of two from 32 to 4096.
        double_quant: whether the block scales are quantised as well.

    Returns:
        The 4-bit layer, in the same train/eval mode; the bias is shared.

    Raises:
        ValueError: a weight holds NaN or Inf, or cannot be adopted.
    """
    if targets.is_bnb(layer):
        return Linear4bit.from_bnb(layer)
    if not is_conv1d(layer):
        return Linear4bit.from_linear(layer, blocksize, double_quant)
    linear = nn.Linear(layer.nx, layer.nf, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T, requires_grad=False)
    linear.bias = layer.bias
    new = Linear4bit.from_linear(linear, blocksize, double_quant).train(layer.training)
    new.transposed = True  # so that a merge gives a Conv1D back
    return new


def dequantize_model(root: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace all `Linear4bit` layers by dense ones of their values, in place.

    Args:
        root: the model, unwrapped.
        dtype: of the new weights; each layer's compute dtype if None.
    """
    places = slots.find(root)
    for module in list(root.modules()):
        if isinstance(module, Linear4bit):
            slots.replace(places, module, _dense(module, module.dequantize(dtype)))
    state_of(root).dense = {}


def add_lora(model: nn.Module, cfg: LoraConfig, adapter_name: str = "default") -> nn.Module:
    """Add an adapter, in place; everything but adapters and `modules_to_save` is frozen.

    The first adapter becomes active; later ones wait for `set_adapter`, as in PEFT.

    Args:
        model: any module: dense, quantised, or with other adapters.
        cfg: the adapter's settings.
        adapter_name: a new name.

    Returns:
        The model.

    Raises:
        NotImplementedError: a target is of a kind that cannot be adapted yet.
        ValueError: the name is taken, or the config does not fit the model. Nothing is changed.
    """
    root = unwrap(model)
    cfg = targets.with_task_heads(cfg)
    install(root, cfg, targets.make_plan(root, cfg), adapter_name)
    return model


def install(root: nn.Module, cfg: LoraConfig, plan: targets.Plan, name: str) -> None:
    """Carry out a plan.

    Args:
        root: the model, unwrapped.
        cfg: what the plan was made from.
        plan: from `targets.make_plan`.
        name: of the adapter.

    Raises:
        ValueError: the name is taken or cannot be one, or a bitsandbytes layer cannot be adopted.
    """
    state = state_of(root)
    if name in state.configs or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name must be new, without dots, and no attribute of a module, got {name!r} "
            f"beside {[*state.configs]}"
        )
    places = slots.find(root)
    layers = {path: root.get_submodule(path) for path in plan.layers}
    bases = {p: Linear4bit.from_bnb(m) if targets.is_bnb(m) else m for p, m in layers.items()}
    if not state.configs:
        state.trainable = [n for n, p in root.named_parameters() if p.requires_grad]
        root.requires_grad_(False)
    for path, (r, alpha) in plan.layers.items():
        settings = r, alpha, cfg.lora_dropout, cfg.use_rslora
        layer, init = layers[path], cfg.init_lora_weights
        if isinstance(layer, LoraLinear):
            layer.add_adapter(name, *settings, init)
        else:
            new = LoraLinear(bases[path], *settings, init_lora_weights=init, adapter_name=name)
            slots.replace(places, layer, new)
    for path in plan.saved:
        module = root.get_submodule(path)
        if isinstance(module, SavedModule):
            module.add_adapter(name)
        else:
            slots.replace(places, module, SavedModule(module, name))
    state.configs[name] = _complete(root, cfg, plan)
    state.unadapted |= plan.skipped
    set_adapter(root, state.active or name)
    if cfg.inference_mode and state.active == name:
        for _, layer in adapted(root):
            layer.requires_grad_(False)


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make one adapter active and trainable, all others neither.

    Layers that the adapter does not have run their base.

    Args:
        model: with adapters.
        adapter_name: of the adapter.

    Raises:
        ValueError: there is no such adapter.
    """
    root = unwrap(model)
    check_adapter(root, adapter_name)
    state_of(root).active = adapter_name
    for _, layer in adapted(root):
        layer.set_adapter(adapter_name if adapter_name in adapters_of(layer) else None)


def disable_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Run the base model inside a `with` block; for this thread only, may be nested.

    Args:
        model: with adapters.

    Returns:
        The context manager.

    Raises:
        ValueError: the model has no adapters, or those of PEFT, which has a `disable_adapter()`.
    """
    layers = [layer for _, layer in adapted(unwrap(model))]
    if not layers:
        _check_adapted(unwrap(model))
    return disabled(layers)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter; if it was active, the first of those left is, as in PEFT.

    Layers without any adapter left become what they were.

    Args:
        model: with adapters.
        adapter_name: of the adapter.

    Raises:
        ValueError: there is no such adapter.
    """
    root = unwrap(model)
    check_adapter(root, adapter_name)
    state, places = state_of(root), slots.find(root)
    for _, layer in list(adapted(root)):
        if adapter_name in adapters_of(layer):
            layer.delete_adapter(adapter_name)
            if not adapters_of(layer):
                slots.replace(places, layer, original_of(layer))
    del state.configs[adapter_name]
    if not state.configs:
        _forget_adapters(root)
    else:
        left = next(iter(state.configs))
        set_adapter(root, left if state.active == adapter_name else state.active)


def merge_lora(
    model: nn.Module, adapter_name: str | None = None, quantize: bool = False
) -> nn.Module:
    """Add an adapter to the weights and remove all adapters, in place.

    Each weight is summed in fp32 and rounded once, to the base's dtype, into a new parameter: a
    weight that was tied is not any more. `modules_to_save` are replaced by the adapter's copies.

    Args:
        model: with adapters.
        adapter_name: of the adapter; the active one if None.
        quantize: False: all 4-bit layers become dense, adapted or not. True: they are quantised
            again, with the same block size and statistics.

    Returns:
        The model, without adapters.

    Raises:
        NotImplementedError: the merge unties embeddings of an encoder-decoder model.
        ValueError: there is no such adapter, or a merged weight overflows its dtype (layers before
            it are merged by then).
    """
    root = unwrap(model)
    name = adapter_name or state_of(root).active
    check_adapter(root, name)
    untied = _unties_output(root, name)
    places = slots.find(root)
    for path, layer in list(adapted(root)):
        if name not in adapters_of(layer):
            slots.replace(places, layer, original_of(layer))
        elif isinstance(layer, SavedModule):
            slots.replace(places, layer, layer.modules_to_save[name])
        else:
            slots.replace(places, layer, _merged(path, layer, name, quantize))
    if not quantize:
        dequantize_model(root)
    if untied:  # else transformers would tie them again when the model is loaded
        root.config.tie_word_embeddings = False
    _forget_adapters(root)
    return model


def unload_lora(model: nn.Module) -> nn.Module:
    """Remove all adapters without merging, in place; gradients are asked for as before.

    Args:
        model: with adapters.

    Returns:
        The model with its original layers, whose weights were never touched. Layers adopted from
        bitsandbytes stay `Linear4bit`, over the same bytes.

    Raises:
        ValueError: the model has no adapters.
    """
    root = unwrap(model)
    check_adapter(root, state_of(root).active)
    places = slots.find(root)
    for _, layer in list(adapted(root)):
        slots.replace(places, layer, original_of(layer))
    _forget_adapters(root)
    return model


def prepare_for_training(
    model: nn.Module,
    gradient_checkpointing: bool = False,
    group: bool | Sequence[Sequence[str]] = True,
    chunked_loss: bool = True,
) -> nn.Module:
    """Make a model ready for training, in place; before or after `add_lora`.

    Args:
        model: with or without adapters.
        gradient_checkpointing: recompute activations in the backward: transformers' checkpointing,
            non-reentrant. Whether it is turned on here or was on before, of either kind: inputs
            ask for gradients, so that no layer stays without.
        group: whether layers that read the same input (q, k, v; gate, up) compute together, found
            by their usual names (`siblings.SIBLINGS`); or tuples of names. Replaces earlier groups.
        chunked_loss: whether a causal language model of transformers computes its loss a chunk of
            tokens at a time, in training with labels: the same loss, and None for `logits`, which
            are never made. Where a model cannot, `explain` says why, and it does as before.

    Returns:
        The model.

    Raises:
        ValueError: checkpointing is asked for on a model that has no method for it, or `group`
            names layers that there are not. Nothing is changed.
    """
    root = unwrap(model)
    groups = siblings.find(root, group)
    # transformers renamed the method and warns about the old name
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    enable = getattr(root, new, None) or getattr(root, old, None)
    if gradient_checkpointing and not (enable and hasattr(root, "enable_input_require_grads")):
        raise ValueError(
            f"gradient_checkpointing=True needs a transformers model, got {type(root).__name__}: "
            "call torch.utils.checkpoint in its forward instead"
        )
    for module in root.modules():
        ungroup(module)
    for parent, names in groups:
        group_layers(parent, names)
    if chunked_loss:
        causal_lm.chunk_loss(root)
    else:
        causal_lm.unchunk_loss(root)
    config = getattr(root, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    if gradient_checkpointing:
        enable({"use_reentrant": False})
    # a model may come with checkpointing on; the reentrant kind has no gradients without those of
    # its inputs, and transformers turns these on for text models only
    is_on = any(getattr(m, "gradient_checkpointing", False) for m in root.modules())
    if is_on and not hasattr(root, "_require_grads_hook"):
        root.enable_input_require_grads()
    return model


def adapted(root: nn.Module) -> Iterator[tuple[str, LoraLinear | SavedModule]]:
    """Each layer that has adapters, with its path."""
    for path, module in root.named_modules():
        if isinstance(module, LoraLinear | SavedModule):
            yield path, module


def adapters_of(layer: nn.Module) -> list[str]:
    """Names of the adapters of a layer; none for other modules."""
    if isinstance(layer, LoraLinear):
        return [*layer.lora_A]
    return [*layer.modules_to_save] if isinstance(layer, SavedModule) else []


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data parallel wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def state_of(root: nn.Module) -> ModelState:
    """What the model remembers about its adapters; `root` is unwrapped."""
    if _STATE not in vars(root):
        setattr(root, _STATE, ModelState())
    return vars(root)[_STATE]


def check_adapter(root: nn.Module, name: str | None) -> None:
    """Check that a model has an adapter of this name.

    Args:
        root: the model, unwrapped.
        name: of the adapter.

    Raises:
        ValueError: it has none.
    """
    _check_adapted(root)
    configs = state_of(root).configs
    if name not in configs:
        raise ValueError(f"adapter_name must be one of {[*configs]}, got {name!r}")


def original_of(layer: LoraLinear | SavedModule) -> nn.Module:
    """The module that a layer with adapters stands for."""
    return layer.base_layer if isinstance(layer, LoraLinear) else layer.original_module


def _check_adapted(root: nn.Module) -> None:
    if not state_of(root).configs:
        targets.check_no_peft(root)
        raise ValueError(f"the model must have adapters, got a {type(root).__name__} without any")


def _forget_adapters(root: nn.Module) -> None:
    """Once no adapter is left: ask for gradients where they were asked for before."""
    state = state_of(root)
    parameters = dict(root.named_parameters())
    for name in state.trainable:
        if name in parameters:
            parameters[name].requires_grad_(True)
    state.configs, state.active, state.trainable, state.unadapted = {}, None, [], {}


def _complete(root: nn.Module, cfg: LoraConfig, plan: targets.Plan) -> LoraConfig:
    """The config as it is saved: explicit names, and what PEFT would fill in."""
    bases = [original_of(root.get_submodule(path)) for path in plan.layers]
    names = cfg.target_modules
    if targets.is_all_linear(cfg):
        names = targets.minimal_names(plan.layers, root)
    origin = cfg.base_model_name_or_path or getattr(root, "name_or_path", None) or None
    return replace(
        cfg,
        target_modules=names,
        fan_in_fan_out=any(_is_transposed(base) for base in bases),
        base_model_name_or_path=origin,
    )


def _is_transposed(base: nn.Module) -> bool:
    return is_conv1d(base) or getattr(base, "transposed", False)


def _check_quantised(
    root: nn.Module, blocksize: int, double_quant: bool, skipped: dict[str, str]
) -> None:
    """With nothing left to quantise, what there is must be as asked for."""
    done = [(p, m) for p, m in root.named_modules() if isinstance(m, Linear4bit)]
    if not done:
        raise ValueError(f"the model must have linear layers to quantise, got {skipped or 'none'}")
    for path, layer in done:
        got = layer.blocksize, layer.nf4.nested
        if got != (blocksize, double_quant):
            raise ValueError(
                f"a quantised model must keep its blocksize and double_quant, got {got} in {path} "
                f"and {(blocksize, double_quant)} asked for"
            )


def _merged(path: str, layer: LoraLinear, name: str, quantize: bool) -> nn.Module:
    base, weight = layer.base_layer, layer.merged_weight(name)
    if not (quantize and isinstance(base, Linear4bit)):
        dtype = base.compute_dtype if isinstance(base, Linear4bit) else base.weight.dtype
        weight = weight.to(dtype)
        # one pass, where isfinite() takes several; NaN comes through
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"the merged weight of {path} must fit in {dtype}, got Inf or NaN")
        return _dense(base, weight)
    q = quantize_nf4(weight, base.blocksize, double_quant=base.nf4.nested)
    new = Linear4bit.from_nf4(replace(q, dtype=base.compute_dtype), base.bias)
    if _is_transposed(base):
        new.transposed = True
    return new.train(base.training)


def _dense(base: nn.Module, weight: Tensor) -> nn.Module:
    """A dense layer of the base's original class over `weight` [N, K], with the base's bias."""
    N, K = weight.shape
    with torch.device("meta"):
        if _is_transposed(base):
            from transformers.pytorch_utils import Conv1D

            new, weight = Conv1D(N, K), weight.T.contiguous()
        else:
            new = nn.Linear(K, N, bias=base.bias is not None)
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return new.train(base.training)


def _unties_output(root: nn.Module, name: str) -> bool:
    """Whether a merge gives the output embedding another weight than the input embedding's."""
    config = getattr(root, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return False
    ends = (targets.output_embedding(root), root.get_input_embeddings())
    if not any(name in adapters_of(end) for end in ends):
        return False
    if getattr(config, "is_encoder_decoder", False):
        # some scale their output by whether the embeddings are tied
        raise NotImplementedError(
            f"a merge into tied embeddings is not supported for {type(root).__name__}, an "
            "encoder-decoder model, keep the adapter"
        )
    return True
