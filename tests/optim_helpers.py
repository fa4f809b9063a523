"""What tests of the optimizers share: parameters, seeded gradients, steps."""

from collections.abc import Iterable, Sequence

import torch
from helpers import DEVICE
from torch import Tensor, nn

# blocks of 256 that hold one parameter, several, and the end of one and the start of another
SHAPES = ((64, 48), (), (5,), (300,), (1, 7), (33, 65), (16, 256), (0, 4), (1,), (255,))


def make_params(
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    device: str = DEVICE,
) -> list[nn.Parameter]:
    """The same parameters at every call."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [nn.Parameter(t) for t in made]


def set_grads(params: Iterable[nn.Parameter], seed: int) -> None:
    """Gradients of a step, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** (-i % 5)
        p.grad = grad.to(p.device, p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of these seeds."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in steps:
        set_grads(params, seed)
        optimizer.step()


def deviation(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of two lists of tensors, relative to the largest number of each tensor."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(got, expected, strict=True) if a.numel()]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are the same bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
