"""What a model looks like: parameters that train, and per layer which path runs and why."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastlora import backend, causal_lm, plan, targets
from fastlora.model import adapters_of, original_of, state_of, unwrap
from fastlora.nn import Linear4bit, LoraLinear, group_of


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable and of all parameters; a 4-bit weight counts as N * K.

    Args:
        model: any module.

    Returns:
        (trainable, all), shared parameters once.
    """
    trainable = total = 0
    seen: set[int] = set()
    for module in unwrap(model).modules():
        packed = isinstance(module, Linear4bit) or targets.is_bnb(module)
        total += module.in_features * module.out_features if packed else 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or (packed and parameter is not module.bias):
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print one line, in PEFT's words; see `count_parameters`.

    Args:
        model: any module.
    """
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


@dataclass(frozen=True)
class Row:
    """What `explain` says of one linear layer, ready to print.

    Attributes:
        layer: its path in the model.
        weight: kind of weight, such as "nf4 64 nested".
        adapters: names; the active one has a star.
        group: names of the layers it computes together with, itself among them.
        backend: what runs it; "torch" where we do not.
        path: how the LoRA term joins forward and dx, as `plan` names it; empty where we do not run.
        reason: why no faster path runs, and why it was not quantised or has no adapter.
    """

    layer: str
    weight: str
    adapters: str
    group: str
    backend: str
    path: str
    reason: str


def explain(model: nn.Module, tokens: int = 8192) -> None:
    """Print a table: for each linear layer what it holds, which path runs, and why no faster one.

    Below it stands how the loss is computed in training, and why not in chunks.

    Args:
        model: any module.
        tokens: batch size times sequence length, which the path depends on.
    """
    root = unwrap(model)
    table = Table(title=f"{type(root).__name__}, {tokens} tokens")
    rows = [*explain_rows(model, tokens)]
    longest = max((len(row.layer) for row in rows), default=0)
    table.add_column("layer", overflow="fold", min_width=min(longest, 48))
    for field in fields(Row)[1:]:
        table.add_column(field.name)
    for row in rows:
        table.add_row(*astuple(row))
    console = Console()
    console.print(table)
    console.print(explain_loss(root), soft_wrap=True)


def explain_loss(model: nn.Module) -> str:
    """How `prepare_for_training` made the model compute its loss.

    Args:
        model: any module.

    Returns:
        "loss: in chunks", or "loss: as the model computes it, because ...".
    """
    reason = causal_lm.why_not(unwrap(model))
    return f"loss: as the model computes it, because {reason}" if reason else "loss: in chunks"


def explain_rows(model: nn.Module, tokens: int = 8192) -> Iterator[Row]:
    """The rows of `explain`.

    Args:
        model: any module.
        tokens: batch size times sequence length.

    Yields:
        One row for each linear layer, in the order of the model, then one for each weight that is
        no linear layer and was left dense for that, such as the experts of a model in one tensor.
    """
    root = unwrap(model)
    state = state_of(root)
    for site in targets.walk(root):
        if not targets.is_linear(site.module):
            continue
        layer, names = site.module, adapters_of(site.module)
        base = original_of(layer) if names else layer
        active = layer.active_adapter if names else None
        runs, path, reasons = "torch", "", []
        if isinstance(layer, LoraLinear | Linear4bit):
            device = next(base.parameters()).device
            runs = backend.name_for(device)
            chosen = _path(layer, runs, device, tokens)
            path = f"{chosen.forward}, {chosen.dx}"
            reasons.append(_why_no_faster(runs, device) or chosen.reason)
        if not isinstance(base, Linear4bit) and site.path in state.dense:
            reasons.append(f"not quantised: {state.dense[site.path]}")
        if state.configs and not names:
            why = state.unadapted.get(site.path, site.obstacle or "no target of any adapter")
            reasons.append(f"no adapter: {why}")
        yield Row(
            layer=site.path,
            weight=_kind(base),
            adapters=", ".join(f"{name}*" if name == active else name for name in names),
            group=", ".join(_siblings(layer)),
            backend=runs,
            path=path,
            reason="; ".join(reasons),
        )
    parameters = dict(root.named_parameters())
    for path in (path for path in state.dense if path in parameters):
        kind = str(parameters[path].dtype).removeprefix("torch.")
        yield Row(path, kind, "", "", "torch", "", f"not quantised: {state.dense[path]}")


def _siblings(layer: nn.Module) -> tuple[str, ...]:
    group = group_of(layer) if isinstance(layer, LoraLinear | Linear4bit) else None
    return group.names if group is not None and layer in group.children().values() else ()


def _path(layer: nn.Module, runs: str, device: torch.device, tokens: int) -> plan.Path:
    """What `plan` chooses for a training step of the layer, with those that it computes for."""
    layers = group_of(layer).children().values() if _siblings(layer) else [layer]
    ours = [part for part in layers if isinstance(part, LoraLinear | Linear4bit)]
    dropout = max((p.lora_dropout[p.active_adapter] for p in ours if _adapter(p)), default=0.0)
    itemsize = 2 if device.type == "cuda" else layer.weight.element_size()
    problem = plan.problem(tokens, [part.member() for part in ours], dropout, itemsize)
    return plan.choose(runs, device, problem)


def _adapter(layer: nn.Module) -> str | None:
    return layer.active_adapter if isinstance(layer, LoraLinear) else None


def _why_no_faster(runs: str, device: torch.device) -> str:
    """Why the backend is not the one before it; empty if it is the first that a device can have."""
    wanted = "cpu" if device.type == "cpu" else "triton"
    if runs in (wanted, "triton"):
        return ""
    why = backend.why_not(wanted, device) or "FASTLORA_BACKEND says so"
    return f"not {wanted}: {why}"


def _kind(base: nn.Module) -> str:
    if isinstance(base, Linear4bit):
        nested = "nested" if base.nf4.nested else "flat"
        return f"nf4 {base.blocksize} {nested}"
    if targets.is_bnb(base):
        return "bitsandbytes 4-bit"
    return str(base.weight.dtype).removeprefix("torch.")
