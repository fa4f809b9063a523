"""The tests of the tests: what every other file leans on can fail."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import FLOOR, ROOT, assert_as_accurate

EXACT = torch.linspace(-3, 3, 101, dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_as_accurate_accepts_rounding(dtype):
    got = EXACT.to(dtype)
    assert_as_accurate(got, got, EXACT)
    assert_as_accurate(got + 0.5 * FLOOR[dtype], got, EXACT)
    assert_as_accurate(got + 0.02, got + 0.01, EXACT)  # eager's own error is doubled


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_as_accurate_rejects_an_error(dtype):
    eager = EXACT.to(dtype)
    with pytest.raises(AssertionError, match="max error"):
        assert_as_accurate(eager + 8 * FLOOR[dtype], eager, EXACT)
    with pytest.raises(AssertionError, match="max error"):
        assert_as_accurate(eager.flip(0), eager, EXACT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_as_accurate_rejects_what_is_not_finite(value):
    good, bad = EXACT.float(), EXACT.float()
    bad[7] = value
    exact = EXACT.clone()
    exact[7] = value
    for got, eager, truth in ((bad, good, EXACT), (good, bad, EXACT), (bad, bad, exact)):
        with pytest.raises(AssertionError):
            assert_as_accurate(got, eager, truth)


def test_as_accurate_rejects_other_shapes_and_dtypes():
    good = EXACT.float()
    for got, eager, truth in (
        (good[:1], good[:1], EXACT),  # would broadcast
        (good.half(), good, EXACT),
        (good, good, EXACT.float()),
    ):
        with pytest.raises(AssertionError):
            assert_as_accurate(got, eager, truth)


def test_as_accurate_takes_empty_tensors():
    empty = torch.zeros(0, 4)
    assert_as_accurate(empty, empty, empty.double())


def test_unwritten_memory_is_nan():
    assert torch.empty(5).isnan().all()


def test_the_repository_is_not_imported_from():
    assert ROOT not in {Path(p or ".").resolve() for p in sys.path}
