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
from fastlora.nf4 import NF4Weight
from fastlora.plan import Backward, Forward, Path


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
    weights = _weights(impl, members, dtype, packed=path.forward == "packed")
    ys = []
    for m, w, bias, ranks in zip(members, weights, biases, _ranks(members), strict=True):
        lora = (s[:, ranks], m.b.to(dtype), m.scale) if m.R else None
        ys.append(_output(impl, path.forward, x, w, bias, lora))
    return ys, s


def _output(
    impl: ModuleType,
    way: Forward,
    x: Tensor,
    w: Tensor | NF4Weight,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """y [M, N] of one member; `lora` is s [M, R], b [N, R] and the scale."""
    if isinstance(w, NF4Weight):
        return impl.linear_packed(x, w, bias, *(lora or (None, None, 1.0)))
    if lora is None:
        return impl.linear(x, w, bias)
    if way == "gemm":
        return impl.linear_lora(x, w, bias, *lora)
    if way == "addmm":
        # the GEMM reads the term while it computes; added later, y would be a pass of its own
        return impl.linear_added(x, w, impl.lora_term(*lora, bias))
    return impl.lora_up(impl.linear(x, w, bias), *lora)


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
        tail = (ds, a, state, p) if needs_tail else None
        dx, has_tail = _dx(impl, path.dx, [dys[i] for i in used], [members[i] for i in used], tail)
        needs_tail = needs_tail and not has_tail
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


def _dx(
    impl: ModuleType,
    way: Backward,
    dys: Sequence[Tensor],
    members: Sequence[Member],
    tail: tuple[Tensor, Tensor, Tensor | None, float] | None,
) -> tuple[Tensor, bool]:
    """The sum of dy w [M, K], and whether the LoRA part is in it; `tail` is ds, a, state and p."""
    weights = _weights(impl, members, dys[0].dtype, packed=way == "packed")
    if way == "gemm" and tail is not None and len(members) == 1:
        return impl.linear_dx_lora(dys[0], next(weights), *tail), True
    dx, has_tail, packed = None, False, []
    if way != "packed" and tail is not None and tail[-1] == 0:
        ds, a, *_ = tail
        dx, has_tail = impl.linear_dx(ds, a), True  # first, as in `_output`; a mask comes last
    for dy, w in zip(dys, weights, strict=True):
        if isinstance(w, NF4Weight):
            packed.append((dy, w))
        else:
            dx = impl.linear_dx(dy, w, dx)
    if not packed:
        return dx, has_tail
    dx = impl.linear_dx_packed(*zip(*packed, strict=True), dx, *(tail or (None, None, None, 0.0)))
    return dx, tail is not None


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


def _weights(
    impl: ModuleType, members: Sequence[Member], dtype: torch.dtype, packed: bool
) -> Iterator[Tensor | NF4Weight]:
    """[N, K] of each member; the 4-bit ones are decoded at once, unless they stay packed."""
    if packed:
        return (m.weight for m in members)
    quantised = [m.weight for m in members if m.quantised]
    decoded = iter(impl.dequantize(quantised, dtype) if quantised else ())
    return (next(decoded) if m.quantised else m.weight for m in members)
