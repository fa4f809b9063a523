"""The optimizer's C++ kernels against the reference, bit for bit, in every instruction set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastlora.codebooks import dynamic_map, midpoints, unsigned_dynamic_map
from fastlora.optim import cpu, reference
from fastlora.optim.flat import BLOCK, Flat, Moments, StateBits, Step, adamw_hypers, moments, nbytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [32, 8]
# blocks of one parameter and of many, whole and not; none that is a multiple of a vector, none at
# all, one that is long; blocks that begin and end in the middle of a parameter
SIZES = (1, 3, 252, 256, 257, 0, 1000, 7, 1, 5, 4129)
HYPERS = torch.tensor(
    [
        adamw_hypers(1e-2, (0.9, 0.999), 1e-8, 0.01, False, 3),
        adamw_hypers(1e-3, (0.8, 0.99), 1e-6, 0.1, True, 40),
    ]
)
# m becomes the gradient, v becomes 0, and w stays finite
ONLY_M = torch.tensor([[1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]])


@dataclass
class Vector:
    """Parameters and moments of a span, each between guards if `torch.empty` makes some."""

    flat: Flat
    params: list[Tensor]
    moments: Moments
    first: int

    @classmethod
    def like(cls, params: Sequence[Tensor], bits: StateBits, span: range) -> "Vector":
        """Copies of the parameters, and moments that are zero."""
        flat = Flat(tuple(p.numel() for p in params))
        copies = [torch.empty(p.shape, dtype=p.dtype).copy_(p) for p in params]
        whole = moments(torch.zeros(nbytes(len(span), bits), dtype=torch.uint8), len(span), bits)
        parts = [torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in whole.tensors()]
        return cls(flat, copies, Moments(*parts), span.start)

    def step(
        self,
        module: ModuleType,
        grads: Sequence[Tensor | None],
        hypers: Tensor = HYPERS,
        rows: Sequence[int] | None = None,
    ) -> None:
        """A step of the span by one of the backends."""
        rows = rows or [i % len(hypers) for i in range(len(self.params))]
        step = Step(self.flat, self.params, grads, rows, hypers)
        module.adamw(module.prepare(step), self.first, self.moments)


def gradients(sizes: Sequence[int], dtype: torch.dtype, missing: Sequence[int] = ()) -> list:
    """Of eight orders of magnitude, and stretches of zeros; None for those that are missing."""
    grads = [torch.randn(n) * 10.0 ** torch.randint(-8, 1, (n,)) for n in sizes]
    grads = [g.where(torch.rand(g.shape) < 0.9, 0.0).to(dtype) for g in grads]
    return [None if i in missing else g for i, g in enumerate(grads)]


def bits_of(t: Tensor) -> Tensor:
    """The bytes of t, so that 0 and -0 differ."""
    return t.reshape(-1).view(torch.uint8)


def same(got: Vector, expected: Vector) -> bool:
    """Whether all parameters and moments have the same bytes."""
    pairs = [*zip(got.params, expected.params, strict=True)]
    pairs += zip(got.moments.tensors(), expected.moments.tensors(), strict=True)
    return all(torch.equal(bits_of(a), bits_of(b)) for a, b in pairs)


# --- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("missing", [(), (0, 3, 7), (6, 10)], ids=["all", "some", "blocks"])
def test_steps(isa, guards: Callable[[], int], dtype, bits, missing):
    params = [torch.randn(n).to(dtype) for n in SIZES]
    got, expected = (Vector.like(params, bits, range(sum(SIZES))) for _ in range(2))
    for _ in range(4):
        grads = gradients(SIZES, dtype, missing)
        got.step(cpu, grads)
        expected.step(reference, grads)
        assert same(got, expected)
    assert guards() > 2 * len(SIZES)
    for i, (before, after) in enumerate(zip(params, got.params, strict=True)):
        assert torch.equal(before, after) == (i in missing or before.numel() == 0)


# in the middle of parameters; within one; one element; none
SPANS = [range(256, 5632), range(1024, 1280), range(512, 513), range(768, 768), range(5888, 5912)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_spans(isa, guards: Callable[[], int], span, bits):
    params = [torch.randn(n) for n in SIZES]
    # with 32 bits a span may begin anywhere
    span = range(span.start + 3 * (bits == 32), span.stop + 3 * (bits == 32 and len(span) > 0))
    span = range(span.start, min(span.stop, sum(SIZES)))
    got, expected = (Vector.like(params, bits, span) for _ in range(2))
    for _ in range(2):
        grads = gradients(SIZES, torch.float32, missing=(4,))
        got.step(cpu, grads)
        expected.step(reference, grads)
        assert same(got, expected)
    assert guards()


@pytest.mark.parametrize("bits", BITS)
def test_threads(isa, threads, bits):
    sizes = (70_001, 3, 100_000)
    params, grads = [torch.randn(n) for n in sizes], gradients(sizes, torch.float32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(Vector.like(params, bits, range(sum(sizes))))
        results[-1].step(cpu, grads)
    expected = Vector.like(params, bits, range(sum(sizes)))
    expected.step(reference, grads)
    assert all(same(got, expected) for got in results)


def test_many_rows(isa):
    sizes = tuple(range(1, 60))
    hypers = torch.rand(len(sizes), 8) + 0.1
    params, grads = [torch.randn(n) for n in sizes], gradients(sizes, torch.float32)
    rows = torch.randperm(len(sizes)).tolist()
    got, expected = (Vector.like(params, 8, range(sum(sizes))) for _ in range(2))
    got.step(cpu, grads, hypers, rows)
    expected.step(reference, grads, hypers, rows)
    assert same(got, expected)


# --- 8-bit codes -----------------------------------------------------------------------------


def around(x: Tensor) -> Tensor:
    """Numbers and those within four units in the last place of them."""
    return torch.cat([x.view(torch.int32) + i for i in range(-4, 5)]).view(torch.float32)


def both_stepped(params: list[Tensor], grads: list[Tensor], hypers: Tensor, rows: list[int]):
    """A first step with 8 bits, of the kernels and of the reference."""
    pair = [Vector.like(params, 8, range(sum(p.numel() for p in params))) for _ in range(2)]
    pair[0].step(cpu, grads, hypers, rows)
    pair[1].step(reference, grads, hypers, rows)
    return pair


def apart(x: Tensor, largest: float) -> Tensor:
    """Numbers with 63 zeros between them, in blocks that have the scale `largest`."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 4)).view(-1, 4, 1)
    blocks = torch.nn.functional.pad(blocks, (1, 62))
    blocks[:, 0, 0] = largest
    return blocks.view(-1)


@pytest.mark.parametrize("scale", [1.0, 0.7, 3e-4])
def test_first_moments_at_midpoints(isa, scale):
    edges = around(midpoints(dynamic_map()))
    x = torch.cat([edges, -edges, torch.linspace(-1, 1, 2000), torch.logspace(-9, 0, 1000)])
    # alone, and among others that are as close to a midpoint
    for g in (apart(x.clamp(-1, 1) * scale, scale), x.clamp(-1, 1) * scale):
        got, expected = both_stepped([torch.zeros_like(g)], [g], ONLY_M, [0])
        assert len(got.moments.m.unique()) == 256
        assert same(got, expected)


@pytest.mark.parametrize("scale", [1.0, 0.7, 3e20])
def test_second_moments_at_midpoints(isa, scale):
    hypers = ONLY_M.clone()
    hypers[:, 6] = scale  # v becomes that times the square of the gradient
    roots = around(midpoints(unsigned_dynamic_map()).sqrt())
    tiny = torch.tensor([1e-9, 1e-15, 1e-25])  # the last one, divided by a large scale, vanishes
    x = torch.cat([roots, tiny, torch.linspace(0, 1, 2000), torch.logspace(-9, 0, 1000)])
    for g in (apart(x.clamp(max=1), 1.0), x.clamp(max=1)):
        got, expected = both_stepped([torch.zeros_like(g)], [g], hypers, [0])
        assert len(got.moments.v.unique()) == 256
        assert same(got, expected)


def test_rest_of_a_block_with_an_infinite_scale(isa):
    params = [torch.randn(BLOCK + 3)]
    got, expected = (Vector.like(params, 8, range(BLOCK + 3)) for _ in range(2))
    for vector, module in ((got, cpu), (expected, reference)):
        for t in (vector.moments.m, vector.moments.v):
            t.fill_(255)
        for t in (vector.moments.m_scale, vector.moments.v_scale):
            t.fill_(torch.inf)
        vector.step(module, [None])
    assert expected.moments.m_scale.tolist() == [torch.inf, torch.inf]
    assert same(got, expected)


def test_blocks_without_a_scale(isa):
    g = torch.randn(4 * BLOCK + 7)
    g[:BLOCK] = 0
    g[BLOCK : 2 * BLOCK] *= 1e-40  # the scale has no reciprocal, and squares vanish
    g[2 * BLOCK : 3 * BLOCK] *= 1e-21  # squares are subnormal
    g[3 * BLOCK :: 3] = torch.inf
    hypers = HYPERS[:1].clone()
    hypers[0, 3] = 1e-3
    got, expected = both_stepped([torch.zeros_like(g)], [g], hypers, [0])
    assert torch.equal(got.params[0].isnan(), expected.params[0].isnan())
    for mine, theirs in zip(got.moments.tensors(), expected.moments.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(got.moments.v[: 3 * BLOCK] > 0, g[: 3 * BLOCK] * g[: 3 * BLOCK] * 1e-3 > 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(isa, dtype, bits):
    g = torch.randn(3 * BLOCK + 5).to(dtype)
    g[BLOCK + 7] = torch.nan
    g[-1] = torch.nan
    got, expected = (Vector.like([torch.zeros_like(g)], bits, range(len(g))) for _ in range(2))
    for _ in range(2):
        got.step(cpu, [g])
        expected.step(reference, [g])
        assert torch.equal(got.params[0].isnan(), expected.params[0].isnan())
        assert torch.equal(got.params[0].nan_to_num(), expected.params[0].nan_to_num())
    mine, theirs = got.moments, expected.moments
    if bits == 8:
        assert mine.m_scale.isnan().tolist() == mine.v_scale.isnan().tolist() == [0, 1, 0, 1]
        mine, theirs = reference.decode(mine), reference.decode(theirs)
    for a, b in ((mine.m, theirs.m), (mine.v, theirs.v)):
        assert a.isnan().any()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
