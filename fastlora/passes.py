"""Forward and backward of linear layers that share their input, put together from a backend's ops.

The one place that knows the order of the passes; `plan` says which of the equal ways is taken.
Names: M tokens, K in_features, N out_features, R the sum of the layers' ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastlora.member import Member
from fastlora.plan import Path


@dataclass(frozen=True)
class Needs:
    """Which gradients of one member are asked for.

    Attributes:
        dw: of a dense weight.
        dbias: of the bias.
        da: of the down-projection.
        db: of the up-projection.
    """

    dw: bool
    dbias: bool
    da: bool
    db: bool


@dataclass
class Grads:
    """Gradients of one member, each in the dtype of what it is the gradient of.

    Attributes:
        dw: [N, K], dense weights only.
        dbias: [N].
        da: [R, K].
        db: [N, R].
    """

    dw: Tensor | None = None
    dbias: Tensor | None = None
    da: Tensor | None = None
    db: Tensor | None = None


def forward(
    impl: ModuleType,
    path: Path,
    x: Tensor,
    members: Sequence[Member],
    state: Tensor | None,
    p: float,
) -> tuple[list[Tensor], Tensor | None]:
    """Outputs of all members.

    Args:
        impl: the backend, a module with the ops of `reference`.
        path: which way, from `plan.choose`.
        x: [M, K], last dimension with stride 1.
        members: at least one; all have K columns.
        state: int64 [2], the dropout state; None where p is 0.
        p: dropout probability, one mask for all members.

    Returns:
        y [M, N] of each member, and s [M, R] = drop(x) a^T of all, None without LoRA.
    """
    dtype = x.dtype
    biases = [None if m.bias is None else m.bias.to(dtype) for m in members]
    a = _stacked_a(members, dtype)
    if a is not None and path.forward == "augment":
        x, s = impl.lora_down_augmented(x, a, state, p)
        weights = impl.dequantize_augmented(
            [m.weight for m in members], [m.b for m in members], [m.scale for m in members], dtype
        )
        ys = [impl.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
        return ys, s
    s = None if a is None else impl.lora_down(x, a, state, p)
    ys = []
    for m, w, bias, ranks in zip(
        members, _weights(impl, members, dtype), biases, _ranks(members), strict=True
    ):
        if not m.R:
            ys.append(impl.linear(x, w, bias))
        elif path.forward == "gemm":
            ys.append(impl.linear_lora(x, w, bias, s[:, ranks], m.b.to(dtype), m.scale))
        else:
            y = impl.linear(x, w, bias)
            ys.append(impl.lora_up(y, s[:, ranks], m.b.to(dtype), m.scale))
    return ys, s


def backward(
    impl: ModuleType,
    path: Path,
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    members: Sequence[Member],
    state: Tensor | None,
    p: float,
    needs_dx: bool,
    needs: Sequence[Needs],
) -> tuple[Tensor | None, list[Grads]]:
    """Gradients of the input and of all members.

    Args:
        impl: the backend, a module with the ops of `reference`.
        path: which way, from `plan.choose`.
        dys: [M, N] of each member, last dimension with stride 1; None where an output was not used,
            but not everywhere.
        x: [M, K]; None where neither da nor dw is needed.
        s: [M, R] from the forward; None without LoRA.
        members: those of the forward.
        state: that of the forward.
        p: that of the forward.
        needs_dx: whether dx is asked for.
        needs: what else is asked for, of each member.

    Returns:
        dx [M, K], accumulated over the members, or None; the gradients of each member.
    """
    used = [i for i, dy in enumerate(dys) if dy is not None]
    grads = [Grads() for _ in members]
    dtype = dys[used[0]].dtype
    ranks = list(_ranks(members))

    ds = None
    if s is not None:  # columns that belong to an unused output stay zero
        ds = torch.empty_like(s) if len(used) == len(members) else torch.zeros_like(s)
    for i in used:
        m, dy = members[i], dys[i]
        if m.R:
            db = impl.lora_bwd_ds_db(dy, m.b.to(dtype), s[:, ranks[i]], m.scale, ds[:, ranks[i]])
            grads[i].db = db.to(m.b.dtype) if needs[i].db else None
        if needs[i].dw:
            grads[i].dw = impl.linear_dw(dy, x)
        if needs[i].dbias:
            grads[i].dbias = dy.sum(0).to(m.bias.dtype)

    a = _stacked_a(members, dtype)
    needs_da = any(n.da for n in needs)
    needs_tail = needs_dx and a is not None  # the LoRA part of dx
    dx = da = None
    if needs_dx:
        weights = _weights(impl, [members[i] for i in used], dtype)
        if needs_tail and path.dx == "gemm" and len(used) == 1:
            dx = impl.linear_dx_lora(dys[used[0]], next(weights), ds, a, state, p)
            needs_tail = False
        else:
            for i, w in zip(used, weights, strict=True):
                dx = impl.linear_dx(dys[i], w, dx)
    if needs_tail and needs_da:
        da, dx = impl.lora_bwd_da_dx(x, dx, ds, a, state, p)
    elif needs_tail:
        dx = impl.lora_bwd_dx(dx, ds, a, state, p)
    elif needs_da:
        da = impl.lora_bwd_da(x, ds, state, p)
    for i in used:
        if needs[i].da:
            grads[i].da = da[ranks[i]].to(members[i].a.dtype)
    return dx, grads


def _stacked_a(members: Sequence[Member], dtype: torch.dtype) -> Tensor | None:
    """[R, K], the down-projections under one another; None without LoRA."""
    parts = [m.a for m in members if m.R]
    if not parts:
        return None
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _ranks(members: Sequence[Member]) -> Iterator[slice]:
    """Where each member stands in R."""
    start = 0
    for m in members:
        yield slice(start, start + m.R)
        start += m.R


def _weights(impl: ModuleType, members: Sequence[Member], dtype: torch.dtype) -> Iterator[Tensor]:
    """Dense [N, K] of each member; the 4-bit ones are decoded at once."""
    packed = [m.weight for m in members if m.quantised]
    decoded = iter(impl.dequantize(packed, dtype) if packed else ())
    return (next(decoded) if m.quantised else m.weight for m in members)
