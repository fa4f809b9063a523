"""A call as a CUDA graph: the time of the device alone, without that of preparing launches."""

from dataclasses import replace
from typing import Any

import torch

from fastlora.benchmarks.spec import Call, Provider

WARM_UP = 3  # calls that compile and allocate before one is captured


def as_graph(call: Call) -> Call:
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

    def replay() -> dict[str, torch.Tensor]:
        graph.replay()
        return results

    return replay


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
