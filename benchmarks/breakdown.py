"""Where the time of a training step goes, by the parts of the model, forward and backward together.

Every forward of a part is a range of torch's profiler; what autograd runs belongs to the part whose
forward made the node, which the profiler knows by the node's number.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import EventList, FunctionEvent

from fastlora.benchmarks.step import TrainingStep

PARTS = ("linear layers", "attention", "rotary", "norms", "activation", "loss", "optimizer", "rest")

STEPS = 3

_RANGE = "part: "
_NODE = "autograd::engine::evaluate_function"
# ranges and operators that are parts without a module of their own
_NAMED = {"aten::scaled_dot_product_attention": "attention", "Optimizer.": "optimizer"}


def parts(step: TrainingStep) -> dict[str, float]:
    """Time some steps by their parts.

    Args:
        step: is run once to warm up, and `STEPS` times.

    Returns:
        name of a part -> median of the steps, ms on the device; "rest" is embedding, residuals and
        what lies between.
    """
    step()
    steps = [_times(trace(step), step.tokens.is_cuda) for _ in range(STEPS)]
    return {part: median(times[part] for times in steps) for part in PARTS}


def trace(step: TrainingStep) -> list[tuple[FunctionEvent, str]]:
    """Run one step under the profiler.

    Args:
        step: the step.

    Returns:
        Every event and the part it belongs to.
    """
    gpu = step.tokens.is_cuda
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it reports its starts and stops on stderr
    with (
        _ranges(step.model),
        profile(use_device="cuda" if gpu else None) as found,
    ):
        step()
    events = found.function_events
    forward = _parts_of_nodes(events)
    return [(event, _part(event, forward)) for event in events]


def _times(events: list[tuple[FunctionEvent, str]], gpu: bool) -> dict[str, float]:
    """ms of each part."""
    times = dict.fromkeys(PARTS, 0.0)
    for event, part in events:
        us = event.self_device_time_total if gpu else event.self_cpu_time_total
        times[part] += us / 1e3
    return times


def _label(name: str, module: nn.Module, root: nn.Module) -> str | None:
    """The part that a module is, where it is one."""
    kind = type(module).__name__
    if hasattr(module, "lora_A"):
        return "linear layers"
    if "Norm" in kind:
        return "norms"
    # what is left in these once their own parts are taken out
    by_end = {"self_attn": "rotary", "rotary_emb": "rotary", "mlp": "activation", "model": "rest"}
    return "loss" if module is root else by_end.get(name.rpartition(".")[2])


@contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Make every forward of a part a range.

    Classes are changed and not modules: layers with hooks, or a forward of their own, would not be
    computed in groups, nor a loss in chunks.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = {m: label for n, m in root.named_modules() if (label := _label(n, m, root))}
    owners = {next(c for c in type(m).__mro__ if "forward" in vars(c)) for m in labels}
    plain = {owner: vars(owner)["forward"] for owner in owners}
    for owner, forward in plain.items():
        owner.forward = _recorded(forward, labels)
    try:
        yield
    finally:
        for owner, forward in plain.items():
            owner.forward = forward


def _recorded(forward: Callable[..., Any], labels: dict[nn.Module, str]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self not in labels:
            return forward(self, *args, **kwargs)
        with record_function(_RANGE + labels[self]):
            return forward(self, *args, **kwargs)

    return run


def _parts_of_nodes(events: EventList) -> dict[int, str]:
    """Number of a node of autograd -> the part whose forward made it."""
    found = {}
    for event in events:
        if event.sequence_nr >= 0 and not _node(event):
            found[event.sequence_nr] = _part(event, {})  # the last of a number made the node
    return found


def _part(event: FunctionEvent, forward: dict[int, str]) -> str:
    node = _node(event)
    if node is not None and node.sequence_nr in forward:
        return forward[node.sequence_nr]
    for at in _upwards(event):
        if at.name.startswith(_RANGE):
            return at.name.removeprefix(_RANGE)
        for start, part in _NAMED.items():
            if at.name.startswith(start):
                return part
    return "rest"


def _node(event: FunctionEvent) -> FunctionEvent | None:
    """The node of autograd that an event is part of."""
    return next((at for at in _upwards(event) if at.name.startswith(_NODE)), None)


def _upwards(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent
