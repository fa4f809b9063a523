"""A step of an optimizer by our Triton kernels: one launch for a span, whatever it holds."""

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.codebooks import code_sums, dynamic_map, unsigned_dynamic_map
from fastlora.kernels import adamw as kernels
from fastlora.kernels.adamw import TABLE_TILE, Table
from fastlora.optim.flat import Flat, Moments, Step


@dataclass(frozen=True)
class Prepared:
    """What a step needs on the device.

    Attributes:
        table: addresses and hyperparameters.
        step: keeps the tensors that they belong to.
    """

    table: Table
    step: Step = field(repr=False)


def prepare(step: Step) -> Prepared:
    """Bring addresses and hyperparameters of a step to the device, in one copy.

    Args:
        step: of parameters on one device.

    Returns:
        What `adamw` takes.
    """
    device = step.params[0].device
    weights = [w.data_ptr() for w in step.params]
    grads = [0 if g is None else g.data_ptr() for g in step.grads]
    P, rows = len(weights), len(step.hypers)
    # an array is made several times as fast as a tensor
    numbers = array("q", [*weights, *grads, *step.rows])
    numbers.frombytes(step.hypers.numpy().tobytes())
    numbers = torch.frombuffer(numbers, dtype=torch.int64)
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    starts, tiles, aligned = _layout(step.flat, device)
    table = Table(
        pointers=numbers[: 3 * P].view(3, P),
        starts=starts,
        tiles=tiles,
        hypers=numbers[3 * P :].view(torch.float32).view(rows, 8),
        dtype=step.params[0].dtype,
        aligned=aligned and not any(address % 16 for address in (*weights, *grads)),
    )
    return Prepared(table, step)


def adamw(prepared: Prepared, first: int, moments: Moments) -> None:
    """Update a span of the parameters and its moments: see `reference.adamw`.

    Args:
        prepared: from `prepare`; its parameters are overwritten.
        first: where the span begins; with 8-bit moments a multiple of 256.
        moments: those of the span; overwritten.
    """
    if moments.numel == 0:
        return
    if moments.bits == 32:
        kernels.adamw32(prepared.table, first, moments.m, moments.v)
    else:
        kernels.adamw8(prepared.table, first, moments.tensors(), maps(moments.m.device))


def _layout(flat: Flat, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Starts and tiles of a vector on a device, made once, and whether all starts are aligned."""
    if device not in flat.cache:
        starts = torch.tensor(flat.starts, dtype=torch.int64, device=device)
        aligned = not any(start % 16 for start in flat.starts)
        flat.cache[device] = starts, flat.tiles(TABLE_TILE).to(device), aligned
    return flat.cache[device]


def maps(device: torch.device) -> tuple[Tensor, ...]:
    """The tables of both 8-bit types on a device, as `kernels.adamw8` takes them."""
    values = dynamic_map(device), unsigned_dynamic_map(device)
    return *values, code_sums(True, device), code_sums(False, device)
