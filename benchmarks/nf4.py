"""`quantize` and `dequantize`: a whole weight to NF4 bytes and back, as fast as memory allows.

The baseline copies as many bytes as the op has to move, between buffers that exist: a ratio of 1.0
is the speed of memory. "fill" writes one number into a new weight; where new memory comes from the
system page by page, that is what bounds every dequantisation that returns a new tensor.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastlora import reference
from fastlora.benchmarks.parity import differing
from fastlora.benchmarks.shapes import LAYERS, SMALL_LAYERS
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work
from fastlora.codebooks import STATS_GROUP, dynamic_map
from fastlora.nf4 import NF4Weight, dequantize_nf4, quantize_nf4

BLOCKSIZE = 64

# bitsandbytes' CPU kernel has thresholds that differ in the last bit from those of its CUDA kernel,
# which are ours; so a few weights in ten million get the neighbouring code there
_BOUNDS = {"packed": 1e-6}


@dataclass(frozen=True)
class WeightProblem:
    """One weight [N, K] with nested statistics, blocks of 64.

    Attributes:
        w: [N, K], fp32, fp16 or bf16. The weight before quantising, the dtype after decoding.
    """

    w: Tensor

    @cached_property
    def quantized(self) -> NF4Weight:
        """The weight as the reference quantises it."""
        packed, absmax, _ = reference.quantize_blocks(self.w, BLOCKSIZE)
        codes, absmax2, offset = reference.quantize_stats(absmax)
        N, K = self.w.shape
        stats = {"absmax2": absmax2, "code2": dynamic_map(self.w.device).clone(), "offset": offset}
        return NF4Weight(packed.view(N, K // 2), codes, (N, K), BLOCKSIZE, self.w.dtype, **stats)

    @cached_property
    def decoded(self) -> Tensor:
        """[N, K], dtype of `w`: the weight as the reference decodes it."""
        q = self.quantized
        decoded = reference.dequantize_blocks(*q.tensors(), q.blocksize, q.numel, self.w.dtype)
        return decoded.view_as(self.w)

    @cached_property
    def memory(self) -> Tensor:
        """uint8: half of the bytes that quantising and decoding have to move."""
        half = _work({"N": self.w.shape[0], "K": self.w.shape[1]}, self.w.itemsize, "").bytes // 2
        return torch.randint(256, (half,), dtype=torch.uint8, device=self.w.device)

    @property
    def truth(self) -> dict[str, Tensor]:
        """What results must equal, byte for byte."""
        q = self.quantized
        names = {"packed": q.qweight, "absmax": q.absmax, "absmax2": q.absmax2, "offset": q.offset}
        return {**names, "w": self.decoded, "copy": self.memory}


def _problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> WeightProblem:
    return WeightProblem((torch.randn(sizes["N"], sizes["K"], device=device) * 0.02).to(dtype))


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    """The weight once, 4 bits of code for each of its elements, and the two levels of scales."""
    weights = sizes["N"] * sizes["K"]
    blocks = -(-weights // BLOCKSIZE)
    return Work(
        weights * itemsize + weights // 2 + blocks + 4 * -(-blocks // STATS_GROUP), weights=weights
    )


def _check(problem: WeightProblem, mode: str, provider: Provider, call: Call) -> list[Deviation]:
    return differing(call(), problem.truth, _BOUNDS)


def _copy(problem: WeightProblem, mode: str) -> Call:
    source, target = problem.memory, torch.empty_like(problem.memory)
    return lambda: {"copy": target.copy_(source)}


def _fill(problem: WeightProblem, mode: str) -> Call:
    def call() -> dict[str, Tensor]:
        torch.full_like(problem.w, 0.5)
        return {}  # nothing to check

    return call


def _quantize_fastlora(problem: WeightProblem, mode: str) -> Call:
    def call() -> dict[str, Tensor]:
        q = quantize_nf4(problem.w, BLOCKSIZE)
        return {"packed": q.qweight, "absmax": q.absmax, "absmax2": q.absmax2, "offset": q.offset}

    return call


def _quantize_bitsandbytes(problem: WeightProblem, mode: str) -> Call:
    from bitsandbytes.functional import quantize_4bit

    def call() -> dict[str, Tensor]:
        packed, q = quantize_4bit(
            problem.w, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True
        )
        return {
            "packed": packed,
            "absmax": q.absmax,
            "absmax2": q.state2.absmax,
            "offset": q.offset,
        }

    return call


def _dequantize_fastlora(problem: WeightProblem, mode: str) -> Call:
    return lambda: {"w": dequantize_nf4(problem.quantized)}


def _dequantize_bitsandbytes(problem: WeightProblem, mode: str) -> Call:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = problem.quantized.to_bnb()
    return lambda: {"w": dequantize_4bit(packed, state)}


QUANTIZE = Benchmark(
    name="quantize",
    summary="dense weight -> NF4 bytes, blocks of 64, nested statistics",
    shapes=LAYERS,
    small=SMALL_LAYERS,
    problem=_problem,
    providers=(
        Provider("copy", _copy),
        Provider("fastlora", _quantize_fastlora),
        Provider("bitsandbytes", _quantize_bitsandbytes, packages=("bitsandbytes",)),
    ),
    check=_check,
    work=_work,
    rates=("GB/s", "Gw/s"),
)

DEQUANTIZE = Benchmark(
    name="dequantize",
    summary="NF4 bytes, blocks of 64, nested statistics -> dense weight",
    shapes=LAYERS,
    small=SMALL_LAYERS,
    problem=_problem,
    providers=(
        Provider("copy", _copy),
        Provider("fill", _fill),
        Provider("fastlora", _dequantize_fastlora),
        Provider("bitsandbytes", _dequantize_bitsandbytes, packages=("bitsandbytes",)),
    ),
    check=_check,
    work=_work,
    rates=("GB/s", "Gw/s"),
)
