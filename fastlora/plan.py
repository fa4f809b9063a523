"""Which of several equal ways a layer is computed: one table per device, or the roofline.

On a GPU the big GEMM belongs to the vendor's library; what the ways differ in is how the LoRA term
joins it. Forward, y = x w^T + scale * s b^T:

    addmm    y = scale * s b^T, and the GEMM adds to it: y is written and, while the GEMM computes,
             read once more, 4MN bytes.
    augment  one GEMM over K + R columns: the weight is decoded beside scale * b, and the pass that
             computes s also copies x beside s, 2MK bytes. NF4 weights only. In a group an Inf in
             the s of one layer is a NaN in the others, since it meets the zeros of their columns.
    gemm     a Triton GEMM that adds s b^T after its loop: no extra bytes, another GEMM.

Backward, dx = dy w + mask * (ds a):

    tail     the GEMM, then one pass over dx, 4MK bytes. Without dropout that pass comes first and
             only writes, as in addmm.
    gemm     a Triton GEMM that adds the term after its loop. One layer, not a group.

`benchmarks gpu` measures a device; what it found is shipped in `fastlora/plans/`, one JSON file per
device. Where nothing was measured, the roofline below decides. Other backends have one way: the
reference those of the first lines, the CPU its own for NF4 weights:

    packed   our GEMM, which decodes a panel of the weight into the cache where it needs it and adds
             the LoRA term before it writes a tile, in the forward and for dx. Dense weights go the
             first way.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import torch

from fastlora.member import Member

Forward = Literal["addmm", "augment", "gemm", "packed"]
Backward = Literal["tail", "gemm", "packed"]


@dataclass(frozen=True)
class Path:
    """How one call is computed, and why so.

    Attributes:
        forward: how the LoRA term joins y.
        dx: how it joins dx.
        reason: for a reader of `explain`.
    """

    forward: Forward
    dx: Backward
    reason: str


@dataclass(frozen=True)
class Problem:
    """What a path is chosen by; M is rounded up to a power of two.

    Attributes:
        M: tokens.
        N: out_features of each layer of the group.
        K: in_features.
        R: rank of each layer of the group, 0 without LoRA.
        dropout: whether there is dropout.
        stackable: whether all weights are NF4 of one block size and kind of statistics.
        itemsize: bytes of an element of x.
        row_major: whether the elements of each row of every weight are neighbours; not in a Conv1D.
    """

    M: int
    N: tuple[int, ...]
    K: int
    R: tuple[int, ...]
    dropout: bool
    stackable: bool
    itemsize: int = 2
    row_major: bool = True


@dataclass(frozen=True)
class Device:
    """What the roofline needs to know of a device.

    Attributes:
        flops: 16-bit matrix products a second that the vendor's GEMM reaches.
        bandwidth: bytes a second that a streaming kernel reaches.
        gemm: speed of the Triton GEMM relative to the vendor's.
        mask: elements a second that get a dropout mask where a GEMM writes them.
    """

    flops: float
    bandwidth: float
    gemm: float = 0.75
    mask: float = 1.1e12

    def gemm_seconds(self, problem: Problem) -> float:
        """The vendor's GEMMs of the frozen layers alone, one direction."""
        return 2 * problem.M * sum(problem.N) * problem.K / self.flops


# what kernels reach, not the data sheet's peaks. On an H200 (benchmarks/results/h200-gpu.md) GEMMs
# reach 0.7e15 to 0.8e15, copies as large as a wide layer's passes 3.1e12 to 4.2e12, and the Triton
# GEMM 0.9 of cuBLAS at 8192 tokens, but 0.6 where it has few tiles, k,v at 2048: 0.75 lies between.
# Those of the others are assumed: 0.8 of the matrix units' peak and 0.75 of the memory's
DEVICES = {
    "A100": Device(flops=250e12, bandwidth=1.5e12),
    "H100": Device(flops=800e12, bandwidth=2.5e12),
    "H200": Device(flops=800e12, bandwidth=3.6e12),
}
_OTHER = DEVICES["A100"]

PLAIN = Path("addmm", "tail", "the one path of this backend")
PACKED = Path("packed", "packed", "the one path of this backend")
ONLY = {"cpu": PACKED, "reference": PLAIN}  # backends with one path, whatever the problem


def choose(backend: str, device: torch.device, problem: Problem) -> Path:
    """The path of one call.

    Args:
        backend: name of the backend that runs it.
        device: where x lives.
        problem: its sizes.

    Returns:
        The path; always the same for the same arguments, unless inside `forced`.
    """
    if backend in ONLY:
        return ONLY[backend]
    return _forced.get(problem) or _choose(device_kind(device), problem)


@contextmanager
def forced(table: Mapping[Problem, Path]) -> Iterator[None]:
    """A context in which the Triton backend takes these ways, whatever was measured or predicted.

    It holds for all threads, since a backward chooses in a thread of autograd.

    Args:
        table: problem -> path; other problems are chosen for as outside.

    Yields:
        Nothing.
    """
    global _forced
    before, _forced = _forced, table
    try:
        yield
    finally:
        _forced = before


_forced: Mapping[Problem, Path] = {}


def problem(M: int, members: Sequence[Member], p: float, itemsize: int) -> Problem:
    """What the path of a call is chosen by.

    Args:
        M: tokens.
        members: the layers.
        p: dropout probability.
        itemsize: bytes of an element of x.

    Returns:
        The problem, with M rounded up.
    """
    kinds = {(m.weight.blocksize, m.weight.nested) if m.quantised else None for m in members}
    return Problem(
        M=bucket(M),
        N=tuple(m.N for m in members),
        K=members[0].K,
        R=tuple(m.R for m in members),
        dropout=p > 0,
        stackable=len(kinds) == 1 and None not in kinds,
        itemsize=itemsize,
        row_major=all(m.quantised or m.weight.stride(1) == 1 for m in members),
    )


def bucket(M: int) -> int:
    """The power of two at or above M, and 1 for none: paths are chosen per bucket."""
    return 1 << max(M - 1, 0).bit_length()


@cache
def device_kind(device: torch.device) -> str:
    """The vendor's name of a device, such as "NVIDIA H200"; "interpreter" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def file_name(kind: str) -> str:
    """Of the table of a device, such as "nvidia-h200.json"."""
    return kind.lower().replace(" ", "-") + ".json"


@cache
def measured(kind: str) -> dict[Problem, Path]:
    """What was measured on a device.

    Args:
        kind: from `device_kind`.

    Returns:
        problem -> path; empty where nothing was measured.
    """
    file = resources.files("fastlora").joinpath("plans", file_name(kind))
    if not file.is_file():
        return {}
    table = {}
    for row in json.loads(file.read_text()):
        problem = Problem(
            row["M"], tuple(row["N"]), row["K"], tuple(row["R"]), row["dropout"], row["stackable"]
        )
        table[problem] = Path(row["forward"], row["dx"], f"measured on {kind}")
    return table


@cache
def _choose(kind: str, problem: Problem) -> Path:
    if not any(problem.R):
        return Path("addmm", "tail", "no adapter: the GEMM alone")
    found = measured(kind).get(problem)
    if found is not None:
        return found
    facts = next((facts for name, facts in DEVICES.items() if name in kind), _OTHER)
    forward, dx = forward_seconds(facts, problem), dx_seconds(facts, problem)
    return Path(
        min(forward, key=forward.get),
        min(dx, key=dx.get),
        f"roofline: {_in_words(forward)} forward, {_in_words(dx)} for dx; these sizes are "
        f"not measured on {kind}",
    )


def forward_seconds(device: Device, problem: Problem) -> dict[Forward, float]:
    """Roofline of each way to compute y, without what all ways share.

    Args:
        device: what it runs on.
        problem: its sizes.

    Returns:
        path -> seconds; a path that cannot run is absent.
    """
    M, N, K, R, size = problem.M, sum(problem.N), problem.K, sum(problem.R), problem.itemsize
    gemm = device.gemm_seconds(problem)
    term = 2 * M * sum(n * r for n, r in zip(problem.N, problem.R, strict=True)) / device.flops
    seconds = {"addmm": gemm + max(2 * M * N * size / device.bandwidth, term)}
    if problem.stackable and all(problem.R) and not (K + R) % 8:  # rows of 16 bytes, as GEMMs want
        # the copy of x is written once; the wider GEMM computes zeros for the group's other members
        copies = (M * (K + R) + N * R) * size / device.bandwidth
        seconds["augment"] = gemm + 2 * M * N * R / device.flops + copies
    if _fits(problem):
        seconds["gemm"] = gemm / device.gemm + term
    return seconds


def dx_seconds(device: Device, problem: Problem) -> dict[Backward, float]:
    """Roofline of each way to compute dx, without what all ways share.

    Args:
        device: what it runs on.
        problem: its sizes.

    Returns:
        path -> seconds; a path that cannot run is absent.
    """
    M, K, R, size = problem.M, problem.K, sum(problem.R), problem.itemsize
    gemm = device.gemm_seconds(problem)
    seconds = {"tail": gemm + 2 * M * K * size / device.bandwidth}
    if len(problem.N) == 1 and _fits(problem):
        seconds["gemm"] = gemm / device.gemm + 2 * M * K * R / device.flops
        if problem.dropout:  # made in the pass of da too, which the tail shares
            seconds["gemm"] += M * K / device.mask
    return seconds


def _fits(problem: Problem) -> bool:
    """Whether the Triton GEMM takes these sizes: 16 bit, rows that are multiples of 16 bytes."""
    sizes = (*problem.N, problem.K, *problem.R)
    wanted = problem.itemsize == 2 and problem.row_major
    return wanted and max(problem.R) <= 256 and not any(n % 8 for n in sizes)


def _in_words(seconds: dict[str, float]) -> str:
    parts = (f"{path} {value * 1e6:,.0f} us" for path, value in seconds.items())
    return ", ".join(parts)
