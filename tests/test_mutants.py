"""A test of the tests: each way to break an op makes the suite's own checks fail."""

import pytest
import test_nf4
import test_ops
import torch

from fastlora import reference

dequantize_blocks = reference.dequantize_blocks  # whatever a test puts in its place


def dequantize_low_nibble_first(packed, *args):
    return dequantize_blocks(packed >> 4 | packed << 4, *args)


def dequantize_fused(packed, absmax, absmax2, code2, offset, *args):
    """One rounding less: as a fused multiply-add computes the block scale."""
    scale = code2[absmax.int()].double() * absmax2.double().repeat_interleave(256)[: absmax.numel()]
    return dequantize_blocks(packed, (scale + offset.double()).float(), None, None, None, *args)


def dropout_of_another_row(x, state, p):
    return reference.dropout(x.roll(1, 0), state, p).roll(-1, 0) if p else x


MUTANTS = {
    "scale": ("lora_term", lambda s, b, scale, bias: s @ b.T + bias),
    "dx": ("linear_dx", lambda dy, w, dx=None: dy @ w * 1.1),
    "dx of the adapter": ("linear_dx", lambda dy, w, dx=None: dy @ w),
    "da": ("lora_bwd_da", lambda x, ds, state, p: ds.T @ x * 1.1),
    "db": (
        "lora_bwd_ds_db",
        lambda dy, b, s, scale, ds: [ds.copy_(dy @ b * scale), dy.T @ s][1],
    ),
    "ds": (
        "lora_bwd_ds_db",
        lambda dy, b, s, scale, ds: [ds.copy_(dy @ b), (dy.T @ s) * scale][1],
    ),
    "dw": ("linear_dw", lambda dy, x: torch.zeros_like(dy.T @ x)),
    "bias": ("lora_term", lambda s, b, scale, bias: scale * s @ b.T),
    "mask in da": (
        "lora_bwd_da",
        lambda x, ds, state, p: ds.T @ dropout_of_another_row(x, state, p),
    ),
    "mask in dx": (
        "lora_bwd_dx",
        lambda dx, ds, a, state, p: dx + dropout_of_another_row(ds @ a, state, p),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_linear_op_is_seen(name, monkeypatch):
    op, broken = MUTANTS[name]
    p = 0.5 if "mask" in name else 0.0
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")

    def check():
        if p:
            test_ops.test_lora_linear_with_dropout((63, 130, 50, 16), torch.float32, p)
        else:
            test_ops.test_lora_linear((63, 130, 50, 16), torch.float32, "dense")

    check()
    monkeypatch.setattr(reference, op, broken)
    with pytest.raises(AssertionError, match="max error"):
        check()


@pytest.mark.parametrize("broken", [dequantize_low_nibble_first, dequantize_fused])
def test_a_broken_dequantisation_is_seen(broken, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")

    def check():
        test_nf4.test_bytes_and_values_are_bitsandbytes(
            (64, 256), 64, True, torch.float32, "reference"
        )

    check()
    monkeypatch.setattr(reference, "dequantize_blocks", broken)
    with pytest.raises(AssertionError):
        check()


def test_a_broken_quantisation_is_seen(monkeypatch):
    """A threshold that is not strict changes bytes only on ties."""
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    test_nf4.test_thresholds_are_strict("reference")
    bucketize = torch.bucketize
    monkeypatch.setattr(torch, "bucketize", lambda *a, **k: bucketize(*a, **k, right=True))
    with pytest.raises(AssertionError):
        test_nf4.test_thresholds_are_strict("reference")
