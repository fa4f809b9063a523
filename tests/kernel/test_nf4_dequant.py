"""The Triton NF4 decoder: every bit equal to the reference, in every form, nothing else touched."""

import numpy as np
import pytest
import torch
from helpers import DEVICE, DTYPES, crossed
from torch import Tensor
from triton_helpers import needs_triton

from fastlora import reference
from fastlora.codebooks import dynamic_map, nf4_code
from fastlora.kernels.common import arch
from fastlora.kernels.nf4_dequant import NF4_CODE, Packed, Tail, configs, nf4_dequant

pytestmark = needs_triton

# N of each weight, K, blocksize, columns behind K
CASES = [
    ((1,), 64, 64, 0),  # one block
    ((7,), 128, 64, 0),  # tiles that end inside a row; a partial tile
    ((5, 3, 2), 96, 64, 0),  # blocks straddle rows; each weight ends with a partial block
    ((5, 3, 2), 96, 64, 8),  # the same in rows that are apart
    ((3, 1), 320, 32, 16),  # the smallest block
    ((9,), 72, 128, 8),  # rows apart, K a multiple of 8 and no more
    ((3, 2), 512, 256, 3),  # a block as large as the interpreter's tile; rows that are not aligned
    ((3,), 1024, 512, 0),  # blocks larger than a tile
    ((2, 3), 640, 4096, 8),  # the largest block, never full
    ((3,), 4096, 4096, 0),  # the largest block, full
    ((9,), 1024, 32, 0),  # more than 256 blocks: two second-level scales
    ((65,), 130, 32, 2),  # the same where a weight is decoded by itself
    ((3, 2), 130, 64, 0),  # K even but no multiple of 8
    ((3, 2), 130, 64, 6),
    ((3, 5), 33, 32, 0),  # odd K, odd sizes: half a byte is left over
    ((3, 5), 33, 32, 1),
    ((2, 3), 1, 64, 2),  # fewer weights than a block
    ((1, 4, 0, 2, 3, 1), 64, 64, 4),  # two launches; a weight without rows
    ((0,), 64, 64, 0),  # nothing to do
]


def packed(N: int, K: int, blocksize: int, nested: bool) -> Packed:
    w = torch.randn(N * K, device=DEVICE)
    w[::50] = 0
    qweight, absmax, _ = reference.quantize_blocks(w, blocksize)
    if not nested:
        return Packed(qweight, absmax, None, None, None, N)
    absmax, absmax2, offset = reference.quantize_stats(absmax)
    code2 = dynamic_map(DEVICE) * torch.rand(1, device=DEVICE)  # of this weight alone
    return Packed(qweight, absmax, absmax2, code2, offset, N)


def decoded(weights: list[Packed], K: int, blocksize: int, dtype: torch.dtype) -> Tensor:
    rows = [
        reference.dequantize_blocks(*w[:5], blocksize, w.N * K, dtype).view(w.N, K) for w in weights
    ]
    return torch.cat(rows)


def test_the_table_is_that_of_the_format():
    assert torch.equal(torch.tensor(NF4_CODE), nf4_code())


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize(("Ns", "K", "blocksize", "behind"), CASES)
def test_equal_to_the_reference(Ns, K, blocksize, behind, nested):
    weights = [packed(N, K, blocksize, nested) for N in Ns]
    for which, config, dtype in crossed([True, False], configs(arch()), DTYPES):
        if which != nested:
            continue
        out = torch.empty(sum(Ns), K + behind, dtype=dtype, device=DEVICE)
        nf4_dequant(weights, K, blocksize, out[:, :K], config=config)
        assert torch.equal(out[:, :K], decoded(weights, K, blocksize, dtype))
        assert out[:, K:].isnan().all()  # columns of others


def test_equal_to_the_reference_on_unaligned_bytes():
    weight = packed(6, 64, 64, nested=True)
    shifted = torch.cat([weight.qweight[:1], weight.qweight])[1:]
    out = torch.empty(6, 64, device=DEVICE)
    nf4_dequant([weight._replace(qweight=shifted)], 64, 64, out)
    assert torch.equal(out, decoded([weight], 64, 64, torch.float32))


def test_neighbours_with_other_statistics():
    weights = [packed(2, 64, 64, nested) for nested in (True, True, False, True)]
    out = torch.empty(8, 64, device=DEVICE)
    nf4_dequant(weights, 64, 64, out)
    assert torch.equal(out, decoded(weights, 64, 64, torch.float32))


# N of each weight, K, rank of each b, T
TAILS = [
    ((5,), 64, (8,), 8),  # all columns used
    ((40, 3, 9), 64, (8, 1, 16), 32),  # ranks differ, columns are left over, rows end inside a tile
    ((2, 3), 64, (200, 90), 300),  # wider than the interpreter's tile
    ((3, 2), 33, (3, 5), 9),  # nothing is aligned
    ((2, 1, 3, 2, 4, 1), 64, (4, 4, 2, 1, 4, 3), 18),  # two launches
]


@pytest.mark.parametrize(("Ns", "K", "ranks", "T"), TAILS)
def test_tail_holds_the_scaled_b_of_each_weight_and_zeros(Ns, K, ranks, T):
    weights = [packed(N, K, 64, nested=True) for N in Ns]
    scales = tuple(0.7 + i for i in range(len(Ns)))
    for dtype in DTYPES:
        b_dtypes = (torch.float32, dtype, torch.float16)  # adapters may be wider than the output
        b = tuple(
            torch.randn(N, R, device=DEVICE, dtype=b_dtypes[i % 3])
            for i, (N, R) in enumerate(zip(Ns, ranks, strict=True))
        )
        out = torch.empty(sum(Ns), K + T, dtype=dtype, device=DEVICE)
        nf4_dequant(weights, K, 64, out, Tail(b, scales))
        scaled = torch.block_diag(*(b_i.float() * s for b_i, s in zip(b, scales, strict=True)))
        assert torch.equal(out[:, :K], decoded(weights, K, 64, dtype))
        assert torch.equal(out[:, K : K + sum(ranks)], scaled.to(dtype))
        assert (out[:, K + sum(ranks) :] == 0).all()


def test_rows_more_than_2_31_elements_into_the_output():
    # untouched pages of zeros take no memory
    K, stride = 64, 2**30 + 8
    memory = torch.from_numpy(np.zeros(2 * stride + K, dtype=np.float16)).to(DEVICE)
    out = memory.as_strided((3, K), (stride, 1))
    weight = packed(3, K, 64, nested=True)
    nf4_dequant([weight], K, 64, out)
    assert torch.equal(out, decoded([weight], K, 64, torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("behind", [0, 16])
def test_more_than_2_31_weights(behind):
    N, K, blocksize = 2**15 + 3, 2**16, 64
    qweight = torch.randint(256, (N * K // 2,), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(N * K // blocksize, device=DEVICE)
    out = torch.empty(N, K + behind, dtype=torch.bfloat16, device=DEVICE)
    for config in configs(arch()):
        out.fill_(float("nan"))
        nf4_dequant([Packed(qweight, absmax, None, None, None, N)], K, blocksize, out, None, config)
        for n in (0, 2**15 - 1, 2**15, N - 1):
            row = Packed(
                qweight.view(N, -1)[n], absmax.view(N, -1)[n].contiguous(), None, None, None, 1
            )
            assert torch.equal(out[n, :K], decoded([row], K, blocksize, out.dtype)[0])
        assert not out[:, :K].isnan().any()


@pytest.mark.gpu
def test_two_runs_and_a_graph_give_the_same_bits():
    weights = [packed(N, 256, 64, nested=True) for N in (128, 32, 32)]
    eager, captured = (torch.empty(192, 256, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")
    nf4_dequant(weights, 256, 64, eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nf4_dequant(weights, 256, 64, captured)
    captured.zero_()
    graph.replay()
    assert torch.equal(eager, captured)
