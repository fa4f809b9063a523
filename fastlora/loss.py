"""Cross entropy over a linear output head, a chunk of tokens at a time: the logits never all exist.

Each chunk's logits are overwritten by their gradient (unless the backward of the head reads them)
and consumed before the next chunk, in the forward; what is kept for the backward is the gradient of
the hidden states and of what is trained in the head. The head's product is computed once, and
tokens without a label not at all.

Source: Hsu et al. 2024, arXiv:2410.10989, section 3.2 (gradients in the forward, by chunks of
tokens); Wijmans et al. 2024, arXiv:2411.09009, section 3 (why logits dominate the memory).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports all of dynamo
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from fastlora.nf4 import FLOATS

# logits of a chunk as fp32: on a CPU a GEMM needs some 256 tokens to pay for reading the head
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# those of the tokens whose softmax is computed at once, for each thread: its share of the cache
_TILE_BYTES = 1 << 20
# bound of sums in fp16, whose largest number is 65504: half of it is for rounding
_FP16_SUM = 2.0**15
# columns of a 16-bit head that are widened at once
_WIDE_COLUMNS = 4096


@_disable_dynamo  # how many tokens have a label is data, which a graph cannot depend on
def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module | Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """The loss of `F.cross_entropy(head(hidden).float(), labels)`, without its memory.

    Softmax and sums are fp32. Without gradients to compute, or with a frozen head, nothing is
    computed for them. Gradients cannot be differentiated again.

    Args:
        hidden: [..., K], fp32, fp16 or bf16; any number of tokens, also none.
        head: the weight [V, K], or a module from [m, K] to [m, V] that has `out_features`, such as
            `nn.Linear`, `Linear4bit` or `LoraLinear`; it is called once a chunk.
        labels: [...], integers in [0, V) or ignore_index.
        bias: [V], only beside a weight.
        shift: whether token t is to predict label t + 1 of the last dimension, as in transformers;
            the last token predicts none.
        ignore_index: label of tokens that do not count.
        num_items: what the sum is divided by, such as the labels of all batches of a step; None:
            the number of labels, which gives the mean, NaN without any.

    Returns:
        fp32 scalar. Gradients flow to hidden, weight and bias, or the parameters of the module.

    Raises:
        ValueError: shapes, dtypes or kinds do not fit together.
    """
    _check(hidden, head, labels, bias)
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = labels.to(hidden.device, torch.int64).reshape(-1)
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    work = _head(hidden, head, bias)
    total = _LinearCrossEntropy.apply(
        hidden, rows, targets[rows], work, torch.is_grad_enabled(), *work.trained
    )
    if num_items is not None:
        return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)
    count = rows.numel()
    # as in torch: a mean of nothing is NaN, its gradients are 0
    return total / count if count else total + math.nan


@dataclass(frozen=True)
class _Head:
    """What computes logits.

    Attributes:
        logits: (h [m, K], *trained) -> [m, V].
        trained: tensors that may need gradients.
        V: number of columns.
    """

    logits: Callable[..., Tensor]
    trained: tuple[Tensor, ...]
    V: int


def _head(hidden: Tensor, head: nn.Module | Tensor, bias: Tensor | None) -> _Head:
    parts = _parts(head, bias)
    if parts and _is_widened(hidden, parts):
        return _Head(lambda h: _WideLinear.apply(h, *parts), (), len(parts[0]))
    if isinstance(head, Tensor):
        return _Head(F.linear, parts, len(head))
    named = {name: p for name, p in head.named_parameters() if p.requires_grad}

    def logits(h: Tensor, *values: Tensor) -> Tensor:
        return functional_call(head, dict(zip(named, values, strict=True)), (h,))

    return _Head(logits, tuple(named.values()), head.out_features)


def _parts(head: nn.Module | Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Weight and bias; none of a module that may compute something else with them."""
    if isinstance(head, Tensor):
        return (head,) if bias is None else (head, bias)
    if type(head) is not nn.Linear or is_hooked(head):
        return ()
    return _parts(head.weight, head.bias)


def is_hooked(module: nn.Module) -> bool:
    """Whether others run before or after the forward of a module, or instead of it."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or not vars(module).keys().isdisjoint(("forward", "_hf_hook"))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients of a sum of 1 are made beside it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: _Head,
        grad: bool,
        *trained: Tensor,
    ) -> Tensor:
        h = hidden.reshape(-1, hidden.shape[-1])[rows]
        needs = [grad and ctx.needs_input_grad[i] for i in (0, *range(5, 5 + len(trained)))]
        total, grads = _sweep(h, targets, head, needs)
        ctx.like = [(t.shape, t.dtype) for t in (hidden, *trained)]
        ctx.save_for_backward(rows, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, *grads = ctx.saved_tensors
        dh, *others = (
            None if g is None else (g.float() * dy).to(dtype)
            for g, (_, dtype) in zip(grads, ctx.like, strict=True)
        )
        if dh is not None:
            shape = ctx.like[0][0]
            spread = dh.new_zeros(shape[:-1].numel(), shape[-1])
            dh = spread.index_copy_(0, rows, dh).view(shape)
        return dh, None, None, None, None, *others


def _sweep(
    h: Tensor, targets: Tensor, head: _Head, needs: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Sum of the losses of h [n, K], and the gradients of h and head.trained that are needed."""
    total = torch.zeros((), dtype=torch.float32, device=h.device)
    sums: list[Tensor | None] = [None] * len(head.trained)
    dh = torch.empty_like(h) if needs[0] else None
    trained = [t.detach().requires_grad_(n) for t, n in zip(head.trained, needs[1:], strict=True)]
    # pieces of one size, so that none is too small for a GEMM
    most = max(1, _CHUNK_BYTES[_kind(h)] // (4 * head.V))
    size = max(1, math.ceil(len(h) / max(1, math.ceil(len(h) / most))))
    scale = _scale(h, size, trained)
    kept: list[Tensor] = []  # what the backward of the head will read

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    # hooks of the caller, such as those of checkpointing, are for what outlives this function
    with saved_tensors_hooks(keep, _same):
        for at, (part, target) in enumerate(zip(h.split(size), targets.split(size), strict=True)):
            leaves = [part.detach().requires_grad_(needs[0]), *trained]
            with torch.set_grad_enabled(any(needs)):
                z = head.logits(*leaves)
            dz = _room(z.detach(), kept) if any(needs) else None
            kept.clear()
            total += _losses(z.detach(), target, dz, scale)
            if dz is None:
                continue
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(z, inputs, dz, allow_unused=True))
            if dh is not None:
                dh[at * size : at * size + len(part)] = next(found)
            for i, leaf in enumerate(trained):
                if leaf.requires_grad:
                    sums[i] = _add(sums[i], next(found))
    return total, [g if g is None or scale is None else g.div_(scale) for g in (dh, *sums)]


def _scale(h: Tensor, size: int, trained: Sequence[Tensor]) -> Tensor | None:
    """What all gradients are computed times, as large as fp16 allows; None: 1.

    The gradient of a linear head's weight is summed over the tokens of a chunk in its dtype, and a
    loss scale that is divided out afterwards cannot undo an overflow. No logit's gradient is above
    1, so that no such sum is above the number of tokens times the largest hidden state.
    """
    kinds = {h.dtype, *(t.dtype for t in trained)}
    if torch.is_autocast_enabled(h.device.type):
        kinds.add(torch.get_autocast_dtype(h.device.type))
    if torch.float16 not in kinds or not len(h) or not any(t.requires_grad for t in trained):
        return None
    most = torch.linalg.vector_norm(h, math.inf, dtype=torch.float32).clamp_min(1)  # 1: the bias
    scale = (_FP16_SUM / (size * most)).clamp_max(1)
    return scale.log2().floor().exp2()  # a power of two rounds nothing


def _room(z: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Where the gradient of z goes: over z, unless that is among what is kept (as of a sigmoid)."""
    return torch.empty_like(z) if any(torch._C._is_alias_of(t, z) for t in kept) else z


def _losses(z: Tensor, targets: Tensor, dz: Tensor | None, scale: Tensor | None) -> Tensor:
    """Sum of the losses of logits z [m, V]; scale * gradient goes to dz, which may be z."""
    total = torch.zeros((), dtype=torch.float32, device=z.device)
    cached = _TILE_BYTES * torch.get_num_threads() // (4 * z.shape[-1])
    tile = max(1, cached if z.device.type == "cpu" else len(z))
    for at in range(0, len(z), tile):
        part = slice(at, at + tile)
        logp = torch.log_softmax(z[part], -1, dtype=torch.float32)
        index = targets[part].unsqueeze(-1)
        own = logp.gather(-1, index)
        total -= own.sum()
        if dz is not None:  # p - 1 from its own logarithm: near 1 nothing is left of p in bf16
            grad = logp.exp_().scatter_(-1, index, own.expm1())
            dz[part] = grad if scale is None else grad.mul_(scale)
    return total


class _WideLinear(torch.autograd.Function):
    """fp32 logits of a frozen 16-bit head, widened some columns at a time."""

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(w)
        ctx.dtype, h = h.dtype, h.float()
        z = h.new_empty(len(h), len(w))
        for part, columns in zip(_columns(z), w.split(_WIDE_COLUMNS), strict=True):
            torch.mm(h, columns.float().T, out=part)
        return z if bias is None else z.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dz: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        dh = dz.new_zeros(len(dz), w.shape[1])
        for part, columns in zip(_columns(dz), w.split(_WIDE_COLUMNS), strict=True):
            dh.addmm_(part, columns.float())
        return dh.to(ctx.dtype), None, None


def _columns(z: Tensor) -> Sequence[Tensor]:
    return z.split(_WIDE_COLUMNS, dim=1)


def _is_widened(hidden: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether torch's own GEMM is the slower way: 16 bits on a CPU that has no such products."""
    if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    slow = hidden.dtype == torch.float16 or not _cpu_bf16()
    same = all(t.dtype == hidden.dtype and not t.requires_grad for t in parts)
    return hidden.dtype != torch.float32 and slow and same


def _cpu_bf16() -> bool:
    # torch.cpu.get_capabilities() is public but younger than the oldest torch that is supported
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum in fp32; None is nothing yet."""
    if part is None:
        return total
    # a copy: autograd's own tensor can be the gradient of several, or expanded from one number
    return part.to(torch.float32, copy=True) if total is None else total.add_(part)


def _kind(t: Tensor) -> str:
    return "cpu" if t.device.type == "cpu" else "cuda"


def _same(t: Tensor) -> Tensor:
    return t


def _check(hidden: Tensor, head: nn.Module | Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if isinstance(head, Tensor):
        shapes = [[*t.shape] for t in (hidden, head, *(() if bias is None else (bias,)))]
        if (
            hidden.ndim < 1
            or head.ndim != 2
            or hidden.shape[-1:] != head.shape[1:]
            or (bias is not None and bias.shape != head.shape[:1])
        ):
            raise ValueError(f"hidden must be [..., K], head [V, K], bias [V], got {shapes}")
    elif not (isinstance(head, nn.Module) and hasattr(head, "out_features")) or bias is not None:
        raise ValueError(
            "head must be a weight [V, K], with a bias or without, or a module that has "
            f"out_features, got {type(head).__name__}{' and a bias' if bias is not None else ''}"
        )
    if hidden.dtype not in FLOATS or labels.dtype.is_floating_point:
        raise ValueError(
            f"hidden must be one of {[*FLOATS]} and labels integers, "
            f"got {hidden.dtype} and {labels.dtype}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be [...] for hidden [..., K], got {[*labels.shape]} for {[*hidden.shape]}"
        )
