"""What test files share: device, dtypes, the one tolerance table, where data and models lie."""

import math
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.cli.demo_model import MEMBER, cache_dir
from fastlora.kernels.common import INTERPRET
from fastlora.nf4 import NF4Weight

ROOT = Path(__file__).resolve().parent.parent

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
# the interpreter keeps bf16 as uint16 and multiplies the bits (triton issue 11584)
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
if INTERPRET:
    BACKENDS = ["triton"]  # the others run in a process of their own
else:
    BACKENDS = ["triton", "reference"] if DEVICE == "cuda" else ["cpu", "reference"]
# the only tolerance table, relative to max|exact|: rounding that eager is spared by luck
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_as_accurate(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Assert that `got` is at most twice as far from the truth as eager PyTorch, plus a floor.

    Args:
        got: the result under test.
        eager: same shape and dtype as `got`. The same op in plain PyTorch.
        exact: same shape, fp64. The truth.

    Raises:
        AssertionError: shape or dtype differ, `exact` is not fp64, something is not finite, or
            max|got - exact| > 2 max|eager - exact| + FLOOR[dtype] max|exact|.
    """
    assert got.dtype == eager.dtype, f"dtype {got.dtype}, eager has {eager.dtype}"
    assert got.shape == eager.shape == exact.shape, (
        f"shape {[*got.shape]}, eager {[*eager.shape]}, exact {[*exact.shape]}"
    )
    assert exact.dtype == torch.float64, f"exact must be fp64, got {exact.dtype}"
    if exact.numel() == 0:
        return
    error, eager_error = ((t.detach().to(exact) - exact).abs().max().item() for t in (got, eager))
    bound = 2 * eager_error + FLOOR[got.dtype] * exact.abs().max().item()
    assert math.isfinite(bound), f"eager and exact must be finite, got a bound of {bound}"
    # a NaN in got makes this comparison false, so it fails
    assert error <= bound, f"max error {error:.3e} > {bound:.3e} (eager: {eager_error:.3e})"


def crossed(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Values of `parametrize`: all combinations of the axes, in the interpreter a part of them.

    There a test takes about a second, and every combination of all axes but the last meets only one
    value of the last, each in turn.
    """
    places = product(*(range(len(axis)) for axis in axes))
    return [
        tuple(axis[i] for axis, i in zip(axes, place, strict=True))
        for place in places
        if not INTERPRET or sum(place) % len(axes[-1]) == 0
    ]


def quantized(w: Tensor, **settings: bool | int) -> tuple[NF4Weight, Tensor]:
    """A 4-bit weight and what it holds, both by the reference.

    The backends make the same bytes, which test_nf4.py and tests/kernel show, but Triton's
    interpreter takes longer for these two than for most of what the weight is made for.

    Args:
        w: [N, K], any dtype. The weight.
        settings: of `quantize_nf4`.

    Returns:
        The quantised weight; [N, K], dtype of `w`: its values.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_BACKEND", "reference")
        q = fastlora.quantize_nf4(w, **settings)
        return q, fastlora.dequantize_nf4(q)


def data_dir() -> Path:
    """Folder with real text, one data set a subfolder (`gsm8k/train.jsonl`), or skip the test.

    FASTLORA_TEST_DATA names it; a checkout may have a folder shared/data beside it.
    """
    named = os.environ.get("FASTLORA_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "gsm8k" / "train.jsonl").is_file():
        pytest.skip(f"no gsm8k/train.jsonl in {folder}, set FASTLORA_TEST_DATA")
    return folder


def smollm2_gguf() -> Path:
    """GGUF file of SmolLM2-135M-Instruct where `fastlora demo` keeps it, or skip the test."""
    path = cache_dir() / Path(MEMBER).name
    if not path.is_file():
        pytest.skip(f"no {path}, `make model` downloads it")
    return path
