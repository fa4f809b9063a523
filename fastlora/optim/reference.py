"""What a step of an optimizer must compute: plain PyTorch. The truth of the tests."""

import torch
from torch import Tensor

from fastlora.codebooks import dynamic_map, midpoints, unsigned_dynamic_map
from fastlora.optim.flat import BLOCK, Moments, Step


def prepare(step: Step) -> Step:
    """What `adamw` wants to know of a step: the step itself."""
    return step


def adamw(step: Step, first: int, moments: Moments) -> None:
    """Update a span of the parameters and its moments.

    In fp32, every operation rounded, never a fused one:

        m = m + (1 - beta1) (g - m)
        v = beta2 v + ((1 - beta2) g) g
        w = w decay - step_size (m / (sqrt(v) correction + eps))

    8-bit moments are decoded first and encoded at the end, w is updated by what lies between. A
    block without any gradient stays as it is: encoded again, moments may change.

    Args:
        step: from `prepare`; its parameters are overwritten.
        first: where the span begins.
        moments: those of the span; overwritten.
    """
    last = first + moments.numel
    full = decode(moments) if moments.bits == 8 else moments
    updated = torch.zeros(moments.numel, dtype=torch.bool, device=moments.m.device)
    for i in step.flat.overlapping(first, last):
        if step.grads[i] is None:
            continue
        start = step.flat.starts[i]
        low, high = max(first, start), min(last, start + step.flat.sizes[i])
        inside, here = slice(low - start, high - start), slice(low - first, high - first)
        w, g = step.params[i].view(-1)[inside], step.grads[i].view(-1)[inside]
        _update(w, g, full.m[here], full.v[here], step.hypers[step.rows[i]].tolist())
        updated[here] = True
    if full is not moments:
        _encode_blocks(full, moments, updated)


def _update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hypers: list[float]) -> None:
    decay, step_size, correction, eps, rest1, beta2, rest2, sign = hypers
    g = g.float() * sign
    m.copy_(m + rest1 * (g - m))
    v.copy_(beta2 * v + (rest2 * g) * g)
    root = v.double().sqrt().float()  # torch's fp32 root on CPUs is not always the nearest one
    w.copy_(w.float() * decay - step_size * (m / (root * correction + eps)))


def decode(moments: Moments) -> Moments:
    """8-bit moments in fp32."""
    m, v = dynamic_map(moments.m.device), unsigned_dynamic_map(moments.v.device)
    return Moments(
        m[moments.m.int()] * _spread(moments.m_scale, moments.numel),
        v[moments.v.int()] * _spread(moments.v_scale, moments.numel),
    )


def _encode_blocks(full: Moments, moments: Moments, updated: Tensor) -> None:
    new = Moments(*(t.clone() for t in moments.tensors()))
    encode(full, new)
    blocks = _blocks(updated).any(dim=1)
    elements = _spread(blocks, moments.numel)
    masks = (elements, elements, blocks, blocks)
    for old, t, mask in zip(moments.tensors(), new.tensors(), masks, strict=True):
        old.copy_(torch.where(mask, t, old))


def encode(full: Moments, moments: Moments) -> None:
    """Write fp32 moments as 8-bit ones.

    A second moment above zero never becomes zero: the first one, divided by it, would explode.

    Args:
        full: fp32.
        moments: 8-bit; overwritten.
    """
    _encode(full.m, dynamic_map(full.m.device), moments.m, moments.m_scale)
    _encode(full.v, unsigned_dynamic_map(full.v.device), moments.v, moments.v_scale)
    moments.v.clamp_(min=(full.v > 0).to(torch.uint8))


def _encode(x: Tensor, codes: Tensor, out: Tensor, scale: Tensor) -> None:
    scale.copy_(_blocks(x).abs().amax(dim=1))
    reciprocal = 1 / scale
    reciprocal = torch.where(reciprocal.isfinite(), reciprocal, 0.0)  # a block of zeros
    found = torch.bucketize(x * _spread(reciprocal, x.numel()), midpoints(codes), out_int32=True)
    out.copy_(found)


def _blocks(x: Tensor) -> Tensor:
    """[blocks, 256], the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _spread(scale: Tensor, numel: int) -> Tensor:
    return scale.repeat_interleave(BLOCK)[:numel]
