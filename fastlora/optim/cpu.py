"""Steps of an optimizer by the C++ kernels of csrc/; same names and meaning as in `reference`."""

import ctypes
from array import array
from collections.abc import Iterable
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache

from fastlora.codebooks import code_guess, dynamic_map, midpoints, unsigned_dynamic_map
from fastlora.native import DTYPES, library, threads
from fastlora.optim.flat import Flat, Moments, Step


class _Step(ctypes.Structure):
    """fastlora_step of csrc/fastlora.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("params", "grads", "starts", "rows", "hypers")),
        ("count", c_int64),
        ("dtype", c_int),
    )


class _Codes(ctypes.Structure):
    """fastlora_codes of csrc/fastlora.h."""

    _fields_ = tuple((name, c_void_p) for name in ("values", "midpoints", "guess"))


@dataclass(frozen=True)
class Prepared:
    """A step as the library takes it.

    Attributes:
        step: the tensors that pointers point into.
        arrays: those pointers, and the other arrays.
        struct: points into both.
    """

    step: Step
    arrays: tuple[array, ...]
    struct: _Step


def prepare(step: Step) -> Prepared:
    """What `adamw` wants to know of a step, for all its spans."""
    params = _numbers(p.data_ptr() for p in step.params)
    grads = _numbers(0 if g is None else g.data_ptr() for g in step.grads)
    arrays = (params, grads, _starts(step.flat), _numbers(step.rows))
    addresses = [numbers.buffer_info()[0] for numbers in arrays]
    count, dtype = len(step.params), DTYPES[step.params[0].dtype]
    return Prepared(step, arrays, _Step(*addresses, step.hypers.data_ptr(), count, dtype))


def adamw(prepared: Prepared, first: int, moments: Moments) -> None:
    """Update a span of the parameters and its moments.

    Args:
        prepared: from `prepare`; the parameters of its step are overwritten.
        first: where the span begins, with 8-bit moments a multiple of 256.
        moments: those of the span; overwritten.
    """
    arguments = (ctypes.byref(prepared.struct), first, moments.numel)
    pointers = [t.data_ptr() for t in moments.tensors()]
    if moments.bits == 32:
        library().fastlora_adamw32(*arguments, *pointers, threads())
    else:
        codes = map(ctypes.byref, (_codes(True)[0], _codes(False)[0]))
        library().fastlora_adamw8(*arguments, *pointers, *codes, threads())


@lru_cache(maxsize=16)
def _starts(flat: Flat) -> array:
    return _numbers(flat.starts)


def _numbers(numbers: Iterable[int]) -> array:
    """int64, or addresses: an array is made several times as fast as one of ctypes."""
    return array("q", numbers)


@cache
def _codes(signed: bool) -> tuple[_Codes, tuple]:
    """The tables of a type, and the tensors that the pointers point into."""
    values = dynamic_map() if signed else unsigned_dynamic_map()
    tables = (values, midpoints(values), code_guess(signed))
    return _Codes(*(t.data_ptr() for t in tables)), tables
