"""Groups of parameters, chosen by the names that they have in a model."""

from typing import Any

from torch import nn

_B = {"lora_B", "lora_embedding_B"}  # in our names and in PEFT's


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for LoRA+: B is trained at a higher learning rate than A and all else.

    A schedule changes both rates alike. With a high ratio `lr` is chosen lower than without.

    Source: Hayou et al. 2024, arXiv:2402.12354.

    Args:
        model: with adapters of fastlora or PEFT.
        lr: learning rate of what is not B.
        ratio: learning rate of B relative to `lr`, no unit.
        weight_decay: share of the learning rate by which parameters shrink a step.

    Returns:
        Groups of (name, parameter) for an optimizer: what else is trained, if anything is, then B.

    Raises:
        ValueError: no B is trained, or the ratio is not above 0.
    """
    if not ratio > 0:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    named = trained(model)
    up = [(name, p) for name, p in named if _B & {*name.split(".")}]
    rest = [(name, p) for name, p in named if not _B & {*name.split(".")}]
    if not up:
        names = " or ".join(sorted(_B))
        raise ValueError(f"model must train parameters of {names}, got none among {len(named)}")
    groups = ({"params": rest, "lr": lr}, {"params": up, "lr": lr * ratio})
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that ask for gradients, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
