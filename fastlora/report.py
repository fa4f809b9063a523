"""What a model looks like: parameters that train, and per layer which path runs and why."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from torch import nn

from fastlora import backend, targets
from fastlora.model import adapters_of, original_of, state_of, unwrap
from fastlora.nn import Linear4bit, LoraLinear


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


def explain(model: nn.Module) -> None:
    """Print a table: for each linear layer its kind, adapters, backend, and why it was left out.

    Args:
        model: any module.
    """
    table = Table(title=type(unwrap(model)).__name__)
    rows = [*explain_rows(model)]
    longest = max((len(path) for path, *_ in rows), default=0)
    table.add_column("layer", overflow="fold", min_width=min(longest, 48))
    for heading in ("weight", "adapters", "backend", "reason"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def explain_rows(model: nn.Module) -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of `explain`.

    Args:
        model: any module.

    Yields:
        Path, kind of weight, adapters (the active one has a star), backend, reasons.
    """
    root = unwrap(model)
    state = state_of(root)
    for site in targets.walk(root):
        if not targets.is_linear(site.module):
            continue
        layer, names = site.module, adapters_of(site.module)
        base = original_of(layer) if names else layer
        ours = isinstance(layer, LoraLinear | Linear4bit)
        device = next(base.parameters()).device
        runs = backend.name_for(device) if ours else "torch"
        active = layer.active_adapter if names else None
        reasons = []
        if not isinstance(base, Linear4bit) and site.path in state.dense:
            reasons.append(f"not quantised: {state.dense[site.path]}")
        if state.configs and not names:
            why = state.unadapted.get(site.path, site.obstacle or "no target of any adapter")
            reasons.append(f"no adapter: {why}")
        shown = ", ".join(f"{name}*" if name == active else name for name in names)
        yield site.path, _kind(base), shown, runs, "; ".join(reasons)


def _kind(base: nn.Module) -> str:
    if isinstance(base, Linear4bit):
        nested = "nested" if base.nf4.nested else "flat"
        return f"nf4 {base.blocksize} {nested}"
    if targets.is_bnb(base):
        return "bitsandbytes 4-bit"
    return str(base.weight.dtype).removeprefix("torch.")
