"""Public functional ops: checks, autograd, and the choice of implementation.

Names: M tokens, K in_features, N out_features, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastlora import backend, cpu, reference
from fastlora.nf4 import FLOATS, NF4Weight, dequantize_nf4

_LINEAR = {"cpu": cpu.linear, "reference": reference.linear}
_LINEAR_DX = {"cpu": cpu.linear_dx, "reference": reference.linear_dx}
_LINEAR_DW = {"cpu": cpu.linear_dw, "reference": reference.linear_dw}
_LORA_DOWN = {"cpu": cpu.lora_down, "reference": reference.lora_down}
_LORA_UP = {"cpu": cpu.lora_up, "reference": reference.lora_up}
_LORA_BWD_DS_DB = {"cpu": cpu.lora_bwd_ds_db, "reference": reference.lora_bwd_ds_db}
_LORA_BWD_DA = {"cpu": cpu.lora_bwd_da, "reference": reference.lora_bwd_da}
_LORA_BWD_DX = {"cpu": cpu.lora_bwd_dx, "reference": reference.lora_bwd_dx}


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
    x = _autocast(x)
    _check_linear(x, q, bias)
    return _apply(x, q, bias)


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
    x = _autocast(x)
    if isinstance(w_or_q, Tensor):
        w_or_q = _autocast(w_or_q)
    _check_linear(x, w_or_q, bias)
    _check_lora(x, w_or_q, a, b)
    if not 0 <= dropout_p < 1 or reference.dropout_threshold(dropout_p) == 65536:
        raise ValueError(f"dropout_p must be in [0, 1) and round below 1, got {dropout_p}")
    p = dropout_p if training else 0.0
    # drawn here, not inside the Function: what is recomputed restores the generator and draws again
    state = torch.randint(2**63 - 1, (2,), device=x.device) if p else None
    return _apply(x, w_or_q, bias, a, b, scale, state, p)


def backend_name(device: torch.device) -> str:
    """Name of the backend that runs these ops on a device; see `backend.name_for`.

    Args:
        device: where the tensors live.

    Returns:
        "cpu" or "reference".

    Raises:
        RuntimeError: FASTLORA_BACKEND names one that cannot run there.
    """
    return backend.name_for(_LINEAR, device)


@torch.compiler.disable  # traced into, the C++ calls would give garbage
def _apply(
    x: Tensor,
    w_or_q: Tensor | NF4Weight,
    bias: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 0.0,
    state: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    q, w = (w_or_q, None) if isinstance(w_or_q, NF4Weight) else (None, w_or_q)
    args = x, w, bias, a, b, q, scale, state, p
    if _autocast_dtype(x.device) is None:
        return _Linear.apply(*args)
    with torch.autocast(x.device.type, enabled=False):  # the operands are cast already
        return _Linear.apply(*args)


class _Linear(torch.autograd.Function):
    """y = x w^T + bias, with or without LoRA (a, b), over a dense (w) or an NF4 (q) weight."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        w: Tensor | None,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        q: NF4Weight | None,
        scale: float,
        state: Tensor | None,
        p: float,
    ) -> Tensor:
        pick, dtype = _picker(x.device), x.dtype
        tokens = x.reshape(-1, x.shape[-1])
        weight = w if q is None else dequantize_nf4(q, dtype)
        y = pick(_LINEAR)(tokens, weight, None if bias is None else bias.to(dtype))
        s = None
        if a is not None:
            s = pick(_LORA_DOWN)(tokens, a.to(dtype), state, p)
            y = pick(_LORA_UP)(y, s, b.to(dtype), scale)

        _, needs_dw, _, needs_da, *_ = ctx.needs_input_grad
        saved_x = x if needs_dw or needs_da else None
        ctx.save_for_backward(saved_x, s, state, w, a, b, *(q.tensors() if q else ()))
        ctx.facts = None if q is None else q.facts
        ctx.scale, ctx.p, ctx.x_shape, ctx.dtype = scale, p, x.shape, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, state, w, a, b, *packed = ctx.saved_tensors
        needs_dx, needs_dw, needs_dbias, needs_da, *_ = ctx.needs_input_grad
        pick, dtype, scale, p = _picker(dy.device), ctx.dtype, ctx.scale, ctx.p
        dy = dy.reshape(-1, dy.shape[-1])
        x = None if x is None else x.reshape(-1, x.shape[-1])
        dx = dw = dbias = da = db = ds = None
        if a is not None:
            ds, db = pick(_LORA_BWD_DS_DB)(dy, b.to(dtype), s, scale)
            db = db.to(b.dtype)
        if needs_da:
            da = pick(_LORA_BWD_DA)(x, ds, state, p).to(a.dtype)
        if needs_dx:
            if packed:
                w = dequantize_nf4(NF4Weight.unchecked(ctx.facts, packed), dtype)
            dx = pick(_LINEAR_DX)(dy, w)
            if a is not None:
                dx = pick(_LORA_BWD_DX)(dx, ds, a.to(dtype), state, p)
            dx = dx.view(ctx.x_shape)
        if needs_dw:
            dw = pick(_LINEAR_DW)(dy, x)
        if needs_dbias:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, dbias, da, db, None, None, None, None


def _picker(device: torch.device) -> Callable:
    return lambda implementations: backend.pick(implementations, device)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast wants a linear layer to compute in; None when it is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _autocast(t: Tensor) -> Tensor:
    dtype = _autocast_dtype(t.device)
    return t if dtype is None else t.to(dtype)


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


def _check_lora(x: Tensor, w: Tensor | NF4Weight, a: Tensor, b: Tensor) -> None:
    N, K = w.shape
    if a.ndim != 2 or a.shape[0] < 1 or a.shape[1] != K or b.shape != (N, a.shape[0]):
        raise ValueError(
            f"a must be [R, {K}] and b [{N}, R] with R >= 1, got {[*a.shape]} and {[*b.shape]}"
        )
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"a and b must have a float dtype, got {a.dtype} and {b.dtype}")
    _check_devices(x, a=a, b=b)


def _check_devices(x: Tensor, **others: Tensor | NF4Weight | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {other.device}")
