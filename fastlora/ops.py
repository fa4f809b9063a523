"""Public functional ops: checks, autograd, and what a graph or a dispatch mode sees of them.

Names: M tokens, K in_features, N out_features, R rank.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastlora import backend, flops, passes, plan, reference
from fastlora.loss import linear_cross_entropy as linear_cross_entropy
from fastlora.member import Flat, Member, flatten, owners, split, unflatten
from fastlora.nf4 import FLOATS, NF4Weight, has_memory


def nf4_linear(x: Tensor, q: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """A linear layer over a frozen NF4 weight: y = x w^T + bias.

    The weight is decoded to x's dtype (autocast's when on) and never kept: the backward decodes it
    again, and saves no activation at all.

    Args:
        x: [..., K], fp32, fp16 or bf16; any strides, any number of tokens, also none.
        q: the weight [N, K].
        bias: [N], any float dtype, or None.

    Returns:
        [..., N], dtype of x (autocast's when on). Gradients flow to x and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return linear_group(x, [Member(q, bias)])[0]


def lora_linear(
    x: Tensor,
    w_or_q: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with a LoRA update: y = x w^T + scale * drop(x) a^T b^T + bias.

    Kept for the backward: x, s = drop(x) a^T, and 16 bytes of dropout state, from which the mask is
    computed again. With fp32 adapters over 16-bit x, operands are rounded to x's dtype, sums are
    fp32, and gradients come back in the adapters' dtype.

    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; Dettmers et al. 2023, arXiv:2305.14314,
    equation 5.

    Args:
        x: [..., K], fp32, fp16 or bf16; any strides, any number of tokens, also none.
        w_or_q: the base weight [N, K]: NF4, or a tensor of x's dtype (cast under autocast).
        a: [R, K], any float dtype. The down-projection.
        b: [N, R], any float dtype. The up-projection.
        scale: alpha / R, or alpha / sqrt(R) with rsLoRA.
        bias: [N], any float dtype, or None.
        dropout_p: probability of dropping an element of x on its way to `a`, in [0, 1), rounded
            to a multiple of 1/65536.
        training: whether to drop at all.

    Returns:
        [..., N], dtype of x (autocast's when on). Gradients flow to x, a, b, bias and a dense w.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or dropout_p is out of range.
    """
    return linear_group(x, [Member(w_or_q, bias, a, b, scale)], dropout_p, training)[0]


def linear_group(
    x: Tensor, members: Sequence[Member], dropout_p: float = 0.0, training: bool = True
) -> tuple[Tensor, ...]:
    """Linear layers that read the same input, as one step: q, k, v, or gate and up.

    x is read once for all projections to rank R, one dropout mask serves all members, 4-bit weights
    are decoded in one launch, and dx is accumulated once. Otherwise as `lora_linear` of each.

    Args:
        x: [..., K], fp32, fp16 or bf16; any strides, any number of tokens, also none.
        members: the layers, at least one; any mixture of kinds and ranks.
        dropout_p: probability of dropping an element of x on its way to the adapters, in [0, 1),
            rounded to a multiple of 1/65536.
        training: whether to drop at all; without adapters there is nothing to drop.

    Returns:
        [..., N] of each member, dtype of x (autocast's when on). Gradients flow to x and to every
        a, b, bias and dense weight.

    Raises:
        ValueError: no members, shapes, dtypes or devices do not fit together, or dropout_p is out
            of range.
    """
    if not members or not all(isinstance(m, Member) for m in members):
        kinds = [type(m).__name__ for m in members]
        raise ValueError(f"members must hold at least one Member and nothing else, got {kinds}")
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, members = x.to(dtype), [_cast(m, dtype) for m in members]
    for m in members:
        _check_linear(x, m.weight, m.bias)
        if m.a is not None or m.b is not None:
            _check_lora(x, m.weight, m.a, m.b)
    if not 0 <= dropout_p < 1 or reference.dropout_threshold(dropout_p) == 65536:
        raise ValueError(f"dropout_p must be in [0, 1) and round below 1, got {dropout_p}")
    p = dropout_p if training and any(m.R for m in members) else 0.0
    # drawn here, not inside the op: what is recomputed restores the generator and draws again
    state = torch.randint(2**63 - 1, (2,), device=x.device) if p else None
    if dtype is None:
        return _apply(x, members, state, p)
    with torch.autocast(x.device.type, enabled=False):  # the operands are cast already
        return _apply(x, members, state, p)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast wants a linear layer on a device to compute in; None when it is off."""
    kind = device.type
    # meta tensors have no autocast; asking `is_autocast_available` breaks a graph of torch 2.11
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _apply(
    x: Tensor, members: Sequence[Member], state: Tensor | None, p: float
) -> tuple[Tensor, ...]:
    flat = flatten(members)
    if not torch.compiler.is_compiling():
        if not _is_watched(x, *flat.tensors):
            return _Linear.apply(x, members, flat, state, p, *flat.tensors)
        flops.count()
    *ys, _ = _linear_op(x, flat.tensors, flat.facts, flat.scales, state, p)
    return tuple(ys)


def _is_watched(*tensors: Tensor) -> bool:
    """Whether somebody is told of every operation, or computes it.

    They get one op instead of its steps. Selective checkpointing would keep a tensor that a later
    step overwrites, a tracer would miss what a kernel does, and fake tensors or subclasses that
    wrap others have no memory that a kernel could read.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or not all(map(has_memory, tensors))


# --- what is computed, whoever asks ----------------------------------------------------------


class _Way(NamedTuple):
    """How a call is computed, forward and backward."""

    impl: ModuleType
    path: plan.Path


def _choose(x: Tensor, members: Sequence[Member], p: float) -> _Way:
    name = backend.name_for(x.device)
    if name in plan.ONLY:  # a small layer on a CPU takes less time than its problem
        return _Way(backend.load(name), plan.ONLY[name])
    sizes = plan.problem(math.prod(x.shape[:-1]), members, p, x.element_size())
    return _Way(backend.load(name), plan.choose(name, x.device, sizes))


def _forward(
    way: _Way, x: Tensor, members: Sequence[Member], state: Tensor | None, p: float
) -> tuple[list[Tensor], Tensor | None]:
    """y [..., N] of each member and s [M, R], None without LoRA."""
    with backend.on(x.device):
        ys, s = passes.forward(*way, _rows(x), members, state, p)
    # no views, or an operation in place on an output would be an error
    unfold = torch.ops.aten._unsafe_view.default
    return [unfold(y, [*x.shape[:-1], y.shape[-1]]) for y in ys], s


def _backward(
    way: _Way | None,  # None: as the forward chose
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    flat: Flat,
    state: Tensor | None,
    p: float,
    x_shape: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x and of each of `flat.tensors`, None where `needs` is False."""
    members = unflatten(flat)
    needs_dx, *needs = needs
    parts = split(needs, flat.facts)
    dys = [None if dy is None else _rows(_strided(dy)) for dy in dys]
    dy = next(dy for dy in dys if dy is not None)
    with backend.on(dy.device):
        dx, grads = passes.backward(
            *(way or _choose(dy, members, p)),
            dys,
            None if x is None else _rows(x),
            s,
            members,
            state,
            p,
            needs_dx,
            [passes.Needs(d["weight"][0], *(d.get(n, False) for n in _NAMES)) for d in parts],
        )
    flat_grads = [None if dx is None else dx.view(*x_shape)]
    for part, grad in zip(parts, grads, strict=True):
        flat_grads += [grad.dw, *[None] * (len(part["weight"]) - 1)]
        flat_grads += [getattr(grad, f"d{name}") for name in _NAMES if name in part]
    return flat_grads


_NAMES = ("bias", "a", "b")


def _strided(dy: Tensor) -> Tensor:
    """A gradient that may be sparse, as of an embedding or `gather`."""
    return dy if dy.layout == torch.strided else dy.to_dense()


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] whose last dimension has stride 1; a view where it can be one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _save(
    ctx: Any,
    x: Tensor,
    s: Tensor | None,
    flat: Flat,
    state: Tensor | None,
    p: float,
    needs: Sequence[bool],
) -> None:
    """Keep s and 16 bytes of dropout state, and x where the gradient of a or a dense w needs it."""
    parts = split(needs[1:], flat.facts)
    needs_x = any(part["weight"][0] or part.get("a") for part in parts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if needs_x else None, s, state, *flat.tensors)
    ctx.facts, ctx.scales, ctx.p, ctx.x_shape = flat.facts, flat.scales, p, x.shape


# --- eager mode ------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        members: Sequence[Member],
        flat: Flat,
        state: Tensor | None,
        p: float,
        *_: Tensor,  # flat.tensors, where autograd sees them
    ) -> tuple[Tensor, ...]:
        ctx.way = _choose(x, members, p)
        ys, s = _forward(ctx.way, x, members, state, p)
        _save(ctx, x, s, flat, state, p, _needed(ctx))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        needs = _needed(ctx)
        if _is_watched(*(dy for dy in dys if dy is not None)):
            dx, *grads = _backward_by_op(ctx, dys, needs)
        else:
            x, s, state, *tensors = ctx.saved_tensors
            flat = Flat(tensors, ctx.facts, ctx.scales)
            dx, *grads = _backward(ctx.way, dys, x, s, flat, state, ctx.p, ctx.x_shape, needs)
        return dx, None, None, None, None, *grads


def _needed(ctx: Any) -> list[bool]:
    """Which gradients are asked for: of x, and of each tensor."""
    needs_dx, _, _, _, _, *needs = ctx.needs_input_grad
    return [needs_dx, *needs]


# --- where it is watched: the same as ops that nobody looks into ------------------------------


@torch.library.custom_op("fastlora::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    tensors: Sequence[Tensor],
    facts: Sequence[int],
    scales: Sequence[float],
    state: Tensor | None,
    p: float,
) -> list[Tensor]:
    members = unflatten(Flat([*tensors], [*facts], [*scales]))
    ys, s = _forward(_choose(x, members, p), x, members, state, p)
    return [*ys, x.new_empty(0, 0) if s is None else s]


@_linear_op.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    facts: Sequence[int],
    scales: Sequence[float],
    state: Tensor | None,
    p: float,
) -> list[Tensor]:
    members = unflatten(Flat([*tensors], [*facts], [*scales]))
    R = sum(m.R for m in members)
    M = math.prod(x.shape[:-1]) if R else 0
    return [*(x.new_empty(*x.shape[:-1], m.N) for m in members), x.new_empty(M, R)]


@torch.library.custom_op("fastlora::linear_backward", mutates_args=())
def _linear_backward_op(
    dys: Sequence[Tensor],
    used: Sequence[int],
    x: Tensor | None,
    s: Tensor | None,
    tensors: Sequence[Tensor],
    facts: Sequence[int],
    scales: Sequence[float],
    state: Tensor | None,
    p: float,
    x_shape: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    given = dict(zip(used, dys, strict=True))
    flat = Flat([*tensors], [*facts], [*scales])
    all_dys = [given.get(i) for i in range(len(scales))]
    grads = _backward(None, all_dys, x, s, flat, state, p, x_shape, needs)
    grads = [g for g, need in zip(grads, needs, strict=True) if need]
    # outputs of an op may not share memory, as the rows of da do
    return [g.clone() if g.untyped_storage().nbytes() > g.nbytes else g for g in grads]


@_linear_backward_op.register_fake
def _(
    dys: Sequence[Tensor],
    used: Sequence[int],
    x: Tensor | None,
    s: Tensor | None,
    tensors: Sequence[Tensor],
    facts: Sequence[int],
    scales: Sequence[float],
    state: Tensor | None,
    p: float,
    x_shape: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    needs_dx, *needs = needs
    dx = [dys[0].new_empty(x_shape)] if needs_dx else []
    return [*dx, *(t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need)]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, tensors, facts, scales, state, p = inputs
    s = output[-1] if output[-1].shape[1] else None
    needs_dx, *needs = ctx.needs_input_grad  # flat here, nested in the backward
    flat = Flat([*tensors], [*facts], [*scales])
    _save(ctx, x, s, flat, state, p, [needs_dx, *needs[: len(tensors)]])


def _op_backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple:
    needs_dx, needs, *_ = ctx.needs_input_grad
    *dys, _ = dys  # nothing is behind s
    if all(dy is None for dy in dys):
        return None, [None] * len(needs), None, None, None, None
    dx, *grads = _backward_by_op(ctx, dys, [needs_dx, *needs])
    return dx, grads, None, None, None, None


def _backward_by_op(
    ctx: Any, dys: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """As `_backward`."""
    flops.count()
    x, s, state, *tensors = ctx.saved_tensors
    used = [i for i, dy in enumerate(dys) if dy is not None]
    # an unused member has no gradients, and an op cannot return None
    owned = zip(needs[1:], owners(ctx.facts), strict=True)
    needs = [needs[0], *(need and owner in used for need, owner in owned)]
    found = iter(
        _linear_backward_op(
            [dys[i] for i in used],
            used,
            x,
            s,
            tensors,
            ctx.facts,
            ctx.scales,
            state,
            ctx.p,
            ctx.x_shape,
            needs,
        )
    )
    return [next(found) if need else None for need in needs]


_linear_op.register_autograd(_op_backward, setup_context=_setup_context)


# --- checks ----------------------------------------------------------------------------------


def _cast(m: Member, dtype: torch.dtype) -> Member:
    return m if m.quantised else replace(m, weight=m.weight.to(dtype))


def _check_linear(x: Tensor, w: Tensor | NF4Weight, bias: Tensor | None) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be fp32, fp16 or bf16, got {x.dtype}")
    if isinstance(w, Tensor) and w.dtype != x.dtype:
        raise ValueError(f"w must have the dtype of x ({x.dtype}), got {w.dtype}")
    if len(w.shape) != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x must be [..., K] and w [N, K], got {[*x.shape]} and {[*w.shape]}")
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"bias must be [N] = [{w.shape[0]}], got {[*bias.shape]}")
    _check_devices(x, w=w, bias=bias)


def _check_lora(x: Tensor, w: Tensor | NF4Weight, a: Tensor | None, b: Tensor | None) -> None:
    N, K = w.shape
    if a is None or b is None:
        raise ValueError(f"a and b must be given together, got a {_given(a)} and b {_given(b)}")
    if a.ndim != 2 or a.shape[0] < 1 or a.shape[1] != K or b.shape != (N, a.shape[0]):
        raise ValueError(
            f"a must be [R, {K}] and b [{N}, R] with R >= 1, got {[*a.shape]} and {[*b.shape]}"
        )
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"a and b must have a float dtype, got {a.dtype} and {b.dtype}")
    _check_devices(x, a=a, b=b)


def _given(t: Tensor | None) -> str:
    return "missing" if t is None else f"{[*t.shape]}"


def _check_devices(x: Tensor, **others: Tensor | NF4Weight | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {other.device}")
