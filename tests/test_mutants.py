"""A test of the tests: each way to break an op makes the suite's own checks fail."""

import pytest
import test_nf4
import test_ops
import torch

from fastlora import nf4, ops, reference


def dequantize_low_nibble_first(packed, *args):
    return reference.dequantize_blocks(packed >> 4 | packed << 4, *args)


def dequantize_fused(packed, absmax, absmax2, code2, offset, *args):
    """One rounding less: as a fused multiply-add computes the block scale."""
    scale = code2[absmax.int()].double() * absmax2.double().repeat_interleave(256)[: absmax.numel()]
    return reference.dequantize_blocks(
        packed, (scale + offset.double()).float(), None, None, None, *args
    )


def dropout_of_another_row(x, state, p):
    return reference.dropout(x.roll(1, 0), state, p).roll(-1, 0) if p else x


MUTANTS = {
    "scale": (ops._LORA_UP, lambda y, s, b, scale: y.addmm_(s, b.T)),
    "dx": (ops._LINEAR_DX, lambda dy, w: dy @ w * 1.1),
    "dx of the adapter": (ops._LORA_BWD_DX, lambda dx, ds, a, state, p: dx),
    "da": (ops._LORA_BWD_DA, lambda x, ds, state, p: ds.T @ x * 1.1),
    "db": (
        ops._LORA_BWD_DS_DB,
        lambda dy, b, s, scale: ((dy @ b) * scale, dy.T @ s),
    ),
    "ds": (
        ops._LORA_BWD_DS_DB,
        lambda dy, b, s, scale: (dy @ b, (dy.T @ s) * scale),
    ),
    "dw": (ops._LINEAR_DW, lambda dy, x: torch.zeros_like(dy.T @ x)),
    "bias": (ops._LINEAR, lambda x, w, bias: x @ w.T),
    "mask in da": (
        ops._LORA_BWD_DA,
        lambda x, ds, state, p: ds.T @ dropout_of_another_row(x, state, p),
    ),
    "mask in dx": (
        ops._LORA_BWD_DX,
        lambda dx, ds, a, state, p: dx + dropout_of_another_row(ds @ a, state, p),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_linear_op_is_seen(name, monkeypatch):
    table, broken = MUTANTS[name]
    p = 0.5 if "mask" in name else 0.0
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")

    def check():
        if p:
            test_ops.test_lora_linear_with_dropout((63, 130, 50, 16), torch.float32, p)
        else:
            test_ops.test_lora_linear((63, 130, 50, 16), torch.float32, "dense")

    check()
    monkeypatch.setitem(table, "reference", broken)
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
    monkeypatch.setitem(nf4._DEQUANTIZE, "reference", broken)
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
