"""Is a result right? A provider is timed only after this."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.benchmarks.spec import Deviation

# max|got - truth| / max|truth| that counts as right: inputs, weights and results are rounded
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def deviation(name: str, got: Tensor, truth: Tensor, bound: float) -> Deviation:
    """Largest error relative to the largest true value.

    Args:
        name: of the result.
        got: any dtype. The result.
        truth: same shape, fp64.
        bound: largest error that counts as right.

    Returns:
        The deviation; infinite where the shape differs, NaN where `got` holds a NaN.
    """
    if got.shape != truth.shape:
        return Deviation(name, float("inf"), bound)
    error = (got.detach().to(truth) - truth).abs().max() / truth.abs().max()
    return Deviation(name, error.item(), bound)


def differing(
    results: Mapping[str, Tensor], truth: Mapping[str, Tensor], bounds: Mapping[str, float]
) -> list[Deviation]:
    """Compare bytes: the error is the share of elements that differ.

    Args:
        results: name -> tensor, any shape.
        truth: name -> tensor; has every name of `results`.
        bounds: name -> share that may differ; none may where there is no entry.

    Returns:
        One deviation per result; infinite where dtype or number of elements differ.
    """
    return [
        Deviation(name, _share(got, truth[name]), bounds.get(name, 0.0))
        for name, got in results.items()
    ]


def _share(got: Tensor, truth: Tensor) -> float:
    if got.dtype != truth.dtype or got.numel() != truth.numel():
        return float("inf")
    return (got.reshape(-1) != truth.reshape(-1)).double().mean().item()
