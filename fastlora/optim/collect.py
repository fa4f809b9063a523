"""From parameter groups to what backends take: runs of parameters, and steps of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nf4 import FLOATS
from fastlora.optim.flat import Flat, Step, adamw_hypers
from fastlora.optim.run import Run


def check_group(group: Mapping[str, Any]) -> None:
    """Check the options and parameters of a group.

    Args:
        group: as in `Optimizer.param_groups`.

    Raises:
        ValueError: an option is out of range, or a parameter cannot be trained here.
    """
    if not float(group["lr"]) >= 0:
        raise ValueError(f"lr must be 0 or more, got {group['lr']}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be 0 or more, got {group[name]}")
    for p in filter(is_trained, group["params"]):
        _check_parameter(p)


def check_saved(group: Mapping[str, Any]) -> None:
    """Check the options of a group that another optimizer may have saved.

    Args:
        group: as in `Optimizer.param_groups`.

    Raises:
        ValueError: an option is out of range, or of another method than AdamW.
    """
    if group.get("amsgrad"):
        raise ValueError("amsgrad must be off, AdamW here keeps no largest second moment")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("weight decay must be decoupled as AdamW's, got the state of Adam")
    check_group(group)


def is_trained(p: nn.Parameter) -> bool:
    """Whether a parameter needs moments; frozen ones, such as 4-bit weights, do not."""
    return p.requires_grad or p.grad is not None


def _check_parameter(p: nn.Parameter) -> None:
    # of a DTensor, whose import takes a second
    if hasattr(p, "device_mesh"):
        raise ValueError("parameters must be whole, got a DTensor (fully_shard is not supported)")
    if p.dtype not in FLOATS:
        raise ValueError(f"parameters must be fp32, fp16 or bf16, got {p.dtype}")


def runs_of(named: Mapping[str, nn.Parameter]) -> dict[torch.device, list[Run]]:
    """Parameters by device, and there by dtype.

    Args:
        named: name -> parameter, in order.

    Returns:
        device -> runs.

    Raises:
        ValueError: a parameter cannot be trained here.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, p in named.items():
        _check_parameter(p)
        alike.setdefault((p.device, p.dtype), []).append(name)
    found: dict[torch.device, list[Run]] = {}
    for (device, dtype), names in alike.items():
        params = [named[name] for name in names]
        flat = Flat(tuple(p.numel() for p in params))
        found.setdefault(device, []).append(
            Run(names, params, device, dtype, [0] * len(names), flat)
        )
    return found


class Collector:
    """Gathers one step: the options of every group, as they are now.

    Args:
        groups: `Optimizer.param_groups`.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.groups = groups
        # by identity: tensors take long to hash
        self.group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}

    def step(self, run: Run) -> Step:
        """The step of a run.

        Args:
            run: whose gradients there are now.

        Returns:
            The step; parameters that are not contiguous are there as copies.

        Raises:
            ValueError: a gradient is sparse, or does not fit its parameter.
        """
        params, groups = run.params, self.group_of
        # what left the groups is not trained any more
        grads = [p.grad if id(p) in groups else None for p in params]
        for name, p, grad, size in zip(run.names, params, grads, run.flat.sizes, strict=True):
            _check(name, p, grad, size, run)
        if not all(p.is_contiguous() for p in params):
            params = [p.contiguous() for p in params]
        if not all(grad is None or grad.is_contiguous() for grad in grads):
            grads = [grad if grad is None else grad.contiguous() for grad in grads]
        kinds = [(groups.get(id(p), 0), n) for p, n in zip(run.params, run.steps, strict=True)]
        rows = {kind: row for row, kind in enumerate(dict.fromkeys(kinds))}
        hypers = torch.tensor([self._hypers(*kind) for kind in rows], dtype=torch.float32)
        return Step(run.flat, params, grads, [rows[kind] for kind in kinds], hypers)

    def _hypers(self, group: int, count: int) -> tuple[float, ...]:
        g = self.groups[group]
        lr, weight_decay = float(g["lr"]), float(g["weight_decay"])
        return adamw_hypers(lr, g["betas"], g["eps"], weight_decay, g["maximize"], count + 1)


def _check(name: str, p: nn.Parameter, grad: Tensor | None, size: int, run: Run) -> None:
    """Raise where something does not fit. The numbers of devices are compared, which is fast."""
    dtype, index = run.dtype, run.index
    if p.dtype is not dtype or p.get_device() != index:
        kept, now = f"{dtype} on {run.device}", f"{p.dtype} on {p.device}"
        raise ValueError(f"{name} must stay {kept}, where its moments are, got {now}")
    if p.numel() != size:
        raise ValueError(
            f"{name} must keep its {size} elements, which have moments, got {p.numel()}"
        )
    if grad is None:
        return
    if grad.shape != p.shape:
        shapes = f"{[*p.shape]}, got {[*grad.shape]}"
        raise ValueError(f"the gradient of {name} must be of the parameter's shape {shapes}")
    if grad.layout is not torch.strided:
        raise ValueError(f"gradients must be dense, got that of {name} in {grad.layout}")
    if grad.dtype is not dtype or grad.get_device() != index:
        got, wanted = f"{grad.dtype} on {grad.device}", f"{dtype} on {run.device}"
        raise ValueError(f"the gradient of {name} must be {wanted}, got {got}")


def copy_back(run: Run, step: Step) -> None:
    """Write the parameters that were copied for a step.

    Args:
        run: of the step.
        step: after its update.
    """
    for p, updated in zip(run.params, step.params, strict=True):
        if updated is not p:
            p.copy_(updated)
