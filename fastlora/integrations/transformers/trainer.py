"""Our optimizers for transformers' Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastlora.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from fastlora.optim.groups import lora_plus_groups, trained
from fastlora.optim.store import PageBudget

if TYPE_CHECKING:  # they import PEFT and bitsandbytes, where these are installed
    from transformers import TrainingArguments

OPTIMIZERS = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw8bit": PagedAdamW8bit,
}


def optimizer_cls_and_kwargs(
    args: "TrainingArguments",
    name: str = "paged_adamw8bit",
    model: nn.Module | None = None,
    *,
    page_budget: PageBudget | None = None,
    page_folder: str | Path | None = None,
    lora_plus_ratio: float | None = None,
) -> tuple[type[AdamW], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for one of our optimizers.

    Learning rate, betas, eps and weight decay are those of `args`; what Trainer decays decays.

    Args:
        args: of the Trainer.
        name: adamw, adamw8bit, paged_adamw or paged_adamw8bit; `args.optim` has no say.
        model: that of the Trainer, with its adapters. Checkpoints then know moments by the names of
            parameters, else by group and place.
        page_budget: bytes of each device that pages may take; None: up to 128 MiB.
        page_folder: keep the pages in a file there; None: in memory.
        lora_plus_ratio: lr of B, relative to that of all else, see `lora_plus_groups`; needs the
            model. None: the same.

    Returns:
        The class, and its arguments; Trainer takes the parameters out of them, so that another
        Trainer needs another pair.

    Raises:
        ValueError: the name is unknown, or there is a ratio but no model, or no B in it.
        NotImplementedError: `args` are for FSDP or DeepSpeed, which exchange parameters.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    sharded = [kind for kind in ("fsdp", "deepspeed") if getattr(args, kind, None)]
    if sharded:
        raise NotImplementedError(f"args must be without fsdp and deepspeed, got {sharded[0]}")
    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    paging = {"page_budget": page_budget, "page_folder": page_folder}
    kwargs |= {key: value for key, value in paging.items() if value is not None}
    if model is not None:
        kwargs["params"] = _groups(model, args, lora_plus_ratio)
    elif lora_plus_ratio is not None:
        raise ValueError(f"model must be given for lora_plus_ratio {lora_plus_ratio}, got none")
    return OPTIMIZERS[name], kwargs


def _groups(
    model: nn.Module, args: "TrainingArguments", ratio: float | None
) -> list[dict[str, Any]]:
    """Parameters by name, of one learning rate and one decay each."""
    groups: Sequence[dict[str, Any]] = [{"params": trained(model)}]
    if ratio is not None:
        groups = lora_plus_groups(model, args.learning_rate, ratio)
    from transformers import Trainer

    # reads nothing of the trainer, and there is none yet
    decayed = {*Trainer.get_decay_parameter_names(None, model)}
    found = []
    for group in groups:
        for decays in (True, False):
            named = [(name, p) for name, p in group["params"] if (name in decayed) == decays]
            weight_decay = args.weight_decay if decays else 0.0
            found.append({**group, "params": named, "weight_decay": weight_decay})
    # with nothing to train whoever watches the training says so, and better than an optimizer
    return [group for group in found if group["params"]] or found[:1]
