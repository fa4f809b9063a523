"""A call as a CUDA graph: the time of the device alone, without that of preparing launches."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastlora.benchmarks.spec import Call, Provider

WARM_UP = 3  # calls that compile and allocate before one is captured


@dataclass(frozen=True)
class Replay:
    """A captured call.

    Attributes:
        graph: of the device's work.
        results: what every replay overwrites.
        call: what was captured; it holds the inputs, which the graph reads by their addresses.
    """

    graph: torch.cuda.CUDAGraph
    results: dict[str, torch.Tensor]
    call: Call

    def __call__(self) -> dict[str, torch.Tensor]:
        """Replay the graph."""
        self.graph.replay()
        return self.results


def as_graph(call: Call) -> Replay:
    """Capture one call; what it returns is overwritten by every replay.

    Random numbers are drawn anew in every replay, as the generator has them then.

    Args:
        call: on the current CUDA device; it may not wait for the device.

    Returns:
        A call that replays the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return Replay(graph, results, call)


def graphed(provider: Provider, device: torch.device, variant: str | None = None) -> Provider:
    """The same provider as a graph where there are graphs.

    Args:
        provider: any.
        device: on a CPU nothing changes.
        variant: its new variant; None keeps the old one.

    Returns:
        A provider whose calls are replays.
    """

    def build(problem: Any, mode: str) -> Call:
        call = provider.build(problem, mode)
        return as_graph(call) if device.type == "cuda" else call

    return replace(provider, build=build, variant=provider.variant if variant is None else variant)
