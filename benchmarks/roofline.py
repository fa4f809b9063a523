"""`python -m benchmarks roofline`: what every way to compute a layer must move and launch.

A model of bytes and launches, not a measurement. A step is one pass beside the GEMMs of the frozen
layers, whose own bytes nobody can save. What ours does is counted from `passes` and `gpu`, and a
test holds the counts against the launches that are really made; PEFT's are those of its source
with bitsandbytes under bf16 autocast, Unsloth's those of its `LoRA_W` and `LoRA_QKV`. All are for
16-bit x and fp32 adapters. A time is what the steps take one after the other at the speeds of
`plan.DEVICES`, without gaps between launches.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from fastlora import plan
from fastlora.benchmarks.report import write_text
from fastlora.benchmarks.shapes import MODELS
from fastlora.benchmarks.sheet import Sheet
from fastlora.gpu import FUSED_RANK
from fastlora.kernels import lora_bwd_da, lora_bwd_ds_db, lora_down
from fastlora.kernels.nf4_dequant import MAX_WEIGHTS
from fastlora.kernels.reduce import split
from fastlora.plan import Path as Way
from fastlora.plan import Problem

TITLE = "Bytes and launches of a LoRA layer"
CAVEAT = "Figures of a model, not measurements: nothing here was timed."
NOTES = (
    "- The least that ours could do is 2MK forward in 3 launches (K0, K1, a GEMM that adds the "
    "LoRA term) and 2MN + 2MK backward in 4 to 6. The rest of its rows is:",
    "- fp32 adapters: a and b are cast to 16 bit, one launch each, forward and again backward "
    "(augment: b within K0); a group also stacks its a.",
    "- dropout: one launch draws the state of the generator.",
    "- addmm: y is read and written once more, 4MN. augment: x is copied beside s, 2MK.",
    "- K5 and K6 each end with a launch that adds up fp32 parts. Those of ds are written and read "
    "once for every block of columns of dy, which grows with the rank: what is above 2MN. Where "
    "that is more than dy itself, dy is read twice.",
    "- tail: dx is read and written once more, 4MK: in the pass of K6 with dropout up to rank "
    f"{FUSED_RANK}, else in a launch of its own.",
    "- A group adds each further layer's GEMM to dx, which is read: 2MK a layer; PEFT's autograd "
    "adds tensors, 6MK a layer.",
    "- Every product of the frozen layers is counted as a launch, and only what it reads beside "
    "x, w and dy counts as bytes. Times hold no gaps between launches.",
)
TOKENS = 8192
RANKS = (16, 64)

# bytes a weight: half a byte of code, a scale per 64 weights, one more per 256 scales, 2 out;
# bitsandbytes writes fp32 scales, adds the offset and reads them again
DECODE = 0.5 + 1 / 64 + 4 / (64 * 256) + 2
BNB_DECODE = DECODE + 4 * 4 / 64


@dataclass(frozen=True)
class Gpu:
    """A device of the tables: `plan.DEVICES` has its speed.

    Attributes:
        arch: family of the kernels' configurations.
        multiprocessors: how many there are; they decide how often a reduction is split.
    """

    arch: str
    multiprocessors: int


GPUS = {"A100": Gpu("sm_80", 108), "H100": Gpu("sm_90", 132), "H200": Gpu("sm_90", 132)}


@dataclass(frozen=True)
class Step:
    """One pass, or several alike.

    Attributes:
        what: it does.
        launches: of kernels.
        MN: bytes for each of the M * N elements of y, N summed over the group.
        MK: bytes for each of the M * K elements of x.
        NK: bytes for each of the N * K weights.
        rest: other bytes: factors, their casts, partial sums.
        own: whether only this way has it, so that `plan` times it.
    """

    what: str
    launches: int
    MN: float = 0
    MK: float = 0
    NK: float = 0
    rest: float = 0
    own: bool = False


@dataclass(frozen=True)
class Ledger:
    """All steps of one direction, the GEMMs of the frozen layers among them.

    Attributes:
        steps: in their order.
    """

    steps: tuple[Step, ...]

    @property
    def launches(self) -> int:
        """Of all steps."""
        return sum(step.launches for step in self.steps)

    def per(self, dims: str) -> float:
        """Bytes for each element of "MN", "MK" or "NK", or all of "rest"."""
        return sum(getattr(step, dims) for step in self.steps)

    def bytes(self, problem: Problem) -> float:
        """Bytes beside those of the GEMMs."""
        return sum(_bytes(step, problem) for step in self.steps)

    def formula(self) -> str:
        """Bytes without `rest`, such as "16MN + 7MK + 2.77NK"."""
        parts = ((self.per(dims), dims) for dims in ("MN", "MK", "NK"))
        return " + ".join(f"{round(n, 2):g}{dims}" for n, dims in parts if n)


def _bytes(step: Step, problem: Problem) -> float:
    M, N, K = problem.M, sum(problem.N), problem.K
    return step.MN * M * N + step.MK * M * K + step.NK * N * K + step.rest


# --- what others do --------------------------------------------------------------------------


def peft(problem: Problem) -> tuple[Ledger, Ledger]:
    """PEFT's `Linear4bit` over bitsandbytes, each layer on its own.

    Source: peft 0.21 tuners/lora/bnb.py, bitsandbytes 0.50 autograd/_functions.py.

    Args:
        problem: sizes.

    Returns:
        Forward and backward.
    """
    n, casts = len(problem.N), 6 * _factors(problem)
    base = (Step("decode", 3 * n, NK=BNB_DECODE), Step("GEMM", n))
    forward = [
        *base,
        Step("clone of y", n, MN=4),
        Step("a and b to 16 bit", 2 * n, rest=casts),
        *[Step("dropout, its mask", n, MK=5 * n)] * problem.dropout,
        Step("x a^T", n, MK=2 * n),
        Step("s b^T", n, MN=2),
        Step("times scale", n, MN=4),
        Step("y + update", n, MN=6),
    ]
    backward = [
        Step("dy times scale", n, MN=4),
        Step("db", n, MN=2),
        Step("ds", n, MN=2),
        Step("da", n, MK=2 * n),
        Step("ds a", n, MK=2 * n),
        *[Step("dropout", n, MK=5 * n)] * problem.dropout,
        *base,
        Step("dx + update", n, MK=6 * n),
        Step("da and db to fp32", 2 * n, rest=casts),
        *_if(n > 1, Step("dx of the layers", n - 1, MK=6 * (n - 1))),
    ]
    return Ledger(tuple(forward)), Ledger(tuple(backward))


def unsloth(problem: Problem) -> tuple[Ledger, Ledger]:
    """Unsloth's ops; with dropout it leaves the layer to PEFT.

    Source: unsloth 2026 kernels/fast_lora.py, kernels/nf4.py.

    Args:
        problem: sizes.

    Returns:
        Forward and backward.
    """
    if problem.dropout:
        return peft(problem)
    n, casts = (
        len(problem.N),
        Step("a and b to 16 bit", 2 * len(problem.N), rest=6 * _factors(problem)),
    )
    decode = Step("decode", n, NK=DECODE)
    forward = (
        decode,
        Step("GEMM", n),
        casts,
        Step("x a^T", n, MK=2 * n),
        Step("y + s b^T", n, MN=4),
    )
    backward = (
        casts,
        Step("dy b, twice", 2 * n, MN=4),
        Step("x a^T again", n, MK=2 * n),
        Step("da", n, MK=2 * n),
        Step("db", n, MN=2),
        decode,
        Step("GEMM, added to dx", n, MK=2 * (n - 1)),
        Step("dx + ds a", n, MK=4 * n),
    )
    return Ledger(forward), Ledger(backward)


# --- what ours does --------------------------------------------------------------------------


def ours(problem: Problem, way: Way, gpu: Gpu) -> tuple[Ledger, Ledger]:
    """One way through `passes` with the kernels of the Triton backend.

    Args:
        problem: sizes.
        way: how the LoRA term joins y and dx.
        gpu: whose configurations the kernels have.

    Returns:
        Forward and backward.
    """
    return Ledger(tuple(_forward(problem, way, gpu))), Ledger(tuple(_backward(problem, way, gpu)))


def _forward(problem: Problem, way: Way, gpu: Gpu) -> Iterator[Step]:
    M, K, R, n = problem.M, problem.K, sum(problem.R), len(problem.N)
    up = sum(N * r for N, r in zip(problem.N, problem.R, strict=True))
    augment = way.forward == "augment"
    if problem.dropout:
        yield Step("dropout state", 1)
    yield _stacked_a(problem)
    block = lora_down.configs(gpu.arch, R, 2, problem.dropout)[0].kwargs
    blocks = ceil(M / block["BLOCK_M"]) * ceil(R / block["BLOCK_R"])
    splits, _ = split(blocks, ceil(K / block["BLOCK_K"]), 1, gpu.multiprocessors)
    yield Step("K1 s", 1, MK=2, rest=2 * R * K + 2 * M * R * ceil(R / block["BLOCK_R"]))
    if splits > 1:
        yield Step("K1 sum", 1, rest=8 * splits * M * R)
    if augment:
        yield Step("x beside s", 0, MK=2, rest=2 * M * R, own=True)
        yield Step("b beside w", 0, rest=2 * sum(problem.N) * R, own=True)
        yield Step("b read", 0, rest=4 * up)
    else:
        yield Step("b to 16 bit", n, rest=6 * up)
    yield Step("K0 decode", ceil(n / MAX_WEIGHTS), NK=DECODE)
    yield Step("GEMM", n)
    if not augment:
        yield Step("s and b read", 0, rest=2 * M * R + 2 * up)
    if way.forward == "addmm":
        yield Step("y + s b^T", n, MN=4, own=True)


def _backward(problem: Problem, way: Way, gpu: Gpu) -> Iterator[Step]:
    M, K, R, n = problem.M, problem.K, sum(problem.R), len(problem.N)
    fused = way.dx == "tail" and problem.dropout and R <= FUSED_RANK
    for N, r in zip(problem.N, problem.R, strict=True):
        yield Step("b to 16 bit", 1, rest=6 * N * r)
        yield from _ds_db(problem, N, r, gpu)
    yield _stacked_a(problem)
    yield Step("K0 decode", ceil(n / MAX_WEIGHTS), NK=DECODE)
    yield Step("GEMM, added to dx", n, MK=2 * (n - 1))
    block = lora_bwd_da.configs(gpu.arch, R, 2, problem.dropout, fused)[0].kwargs
    blocks = ceil(K / block["BLOCK_K"]) * ceil(R / block["BLOCK_R"])
    splits, _ = split(blocks, ceil(M / block["BLOCK_M"]), 2, gpu.multiprocessors)
    yield Step("K6 da", 1, MK=2, rest=2 * M * R)
    yield Step("ds and a read", 0, rest=2 * M * R * (not fused) + 2 * R * K)
    yield Step("K6 sum", 1, rest=8 * splits * R * K + 4 * R * K)
    if way.dx == "tail":
        what = "with K6" if fused else "K7" if problem.dropout else "addmm"
        yield Step(f"dx + ds a ({what})", int(not fused), MK=4, own=True)


def _ds_db(problem: Problem, N: int, r: int, gpu: Gpu) -> Iterator[Step]:
    """K5 of one layer. Parts of ds are M * r fp32 numbers for every block of columns of dy."""
    M, share = problem.M, N / sum(problem.N)
    config = lora_bwd_ds_db.configs(gpu.arch, r)[0].kwargs
    if config["FORM"] == "apart":
        yield Step("K5 ds and db apart", 2, MN=4 * share, rest=4 * M * r)
        block = lora_bwd_da.configs(gpu.arch, r)[0].kwargs
        blocks = ceil(N / block["BLOCK_K"]) * ceil(r / block["BLOCK_R"])
        splits, _ = split(blocks, ceil(M / block["BLOCK_M"]), 2, gpu.multiprocessors)
        yield Step("K5 sum", 1, rest=8 * splits * N * r + 4 * N * r)
        return
    blocks, waves = ceil(N / config["BLOCK_N"]), config["WAVES"]
    splits, _ = split(blocks, ceil(M / config["BLOCK_M"]), waves, gpu.multiprocessors)
    parts = 8 * blocks * r / N * share
    yield Step("K5 ds and db", 1, MN=2 * share, rest=2 * M * r)
    yield Step("K5 sum", 1, MN=parts, rest=8 * splits * N * r + 2 * M * r + 4 * N * r)


def _stacked_a(problem: Problem) -> Step:
    n, down = len(problem.R), sum(problem.R) * problem.K
    return Step("a stacked, to 16 bit", 1 + (n > 1), rest=(6 + 8 * (n > 1)) * down)


def _factors(problem: Problem) -> int:
    """Elements of all a and b."""
    return sum((N + problem.K) * r for N, r in zip(problem.N, problem.R, strict=True))


def _if(condition: bool, step: Step) -> list[Step]:
    return [step] if condition else []


# --- times -----------------------------------------------------------------------------------


def seconds(
    device: plan.Device, problem: Problem, ledger: Ledger, own: float | None = None
) -> float:
    """One direction.

    Args:
        device: its speed.
        problem: sizes.
        ledger: its steps.
        own: seconds of the GEMM and of the steps that only this way has, from `plan`; None where
            `plan` knows nothing about it.

    Returns:
        Seconds.
    """
    if own is None:
        return device.gemm_seconds(problem) + ledger.bytes(problem) / device.bandwidth
    others = Ledger(tuple(step for step in ledger.steps if not step.own))
    return own + others.bytes(problem) / device.bandwidth


# --- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """One layer or group on one device.

    Attributes:
        model: key of `MODELS`.
        layer: key of the model's layers.
        gpu: key of `GPUS`.
        problem: sizes.
        dense: seconds forward and backward of the frozen dense layer, both the GEMM alone.
        peft: of PEFT over bitsandbytes.
        unsloth: of Unsloth.
        forward: seconds of each of our ways forward.
        dx: seconds backward of each of our ways.
    """

    model: str
    layer: str
    gpu: str
    problem: Problem
    dense: float
    peft: tuple[float, float]
    unsloth: tuple[float, float]
    forward: dict[str, float]
    dx: dict[str, float]

    @property
    def way(self) -> tuple[str, str]:
        """The ways that take least, forward and backward."""
        return min(self.forward, key=self.forward.get), min(self.dx, key=self.dx.get)

    @property
    def ours(self) -> float:
        """Seconds forward and backward of the ways that take least."""
        return min(self.forward.values()) + min(self.dx.values())


def predict(model: str, layer: str, gpu: str, problem: Problem) -> Prediction:
    """Times of one layer or group.

    Args:
        model: its name.
        layer: its name.
        gpu: key of `GPUS`.
        problem: sizes.

    Returns:
        The prediction.
    """
    device, facts = plan.DEVICES[gpu], GPUS[gpu]
    peft_both, unsloth_both = peft(problem), unsloth(problem)
    forward = {
        way: seconds(device, problem, ours(problem, Way(way, "tail", ""), facts)[0], own)
        for way, own in plan.forward_seconds(device, problem).items()
    }
    dx = {
        way: seconds(device, problem, ours(problem, Way("addmm", way, ""), facts)[1], own)
        for way, own in plan.dx_seconds(device, problem).items()
    }
    return Prediction(
        model,
        layer,
        gpu,
        problem,
        2 * device.gemm_seconds(problem),
        tuple(seconds(device, problem, ledger) for ledger in peft_both),
        tuple(seconds(device, problem, ledger) for ledger in unsloth_both),
        forward,
        dx,
    )


def problems(rank: int, dropout: bool) -> Iterator[tuple[str, str, Problem]]:
    """Every layer and group of `MODELS` at `TOKENS`.

    Args:
        rank: of every layer.
        dropout: whether there is any.

    Yields:
        Model, layer and sizes.
    """
    for model, layers in MODELS.items():
        for layer, sizes in layers.items():
            N, K = sizes["N"], sizes["K"]
            yield model, layer, Problem(TOKENS, N, K, (rank,) * len(N), dropout, stackable=True)


def closed_forms() -> Sheet:
    """Bytes and launches of everyone, for one layer and for three that share x."""
    rows = []
    for name, N in (("one layer", (4096,)), ("q+k+v", (4096, 1024, 1024))):
        for rank in RANKS:
            for dropout in (False, True):
                problem = Problem(TOKENS, N, 4096, (rank,) * len(N), dropout, stackable=True)
                drop = "0.05" if dropout else "0"
                for who, (forward, backward) in _everyone(problem, GPUS["H200"]).items():
                    row = (who, name, str(rank), drop)
                    pair = (forward.formula(), str(forward.launches))
                    rows.append((*row, *pair, backward.formula(), str(backward.launches)))
    columns = ("", "layers", "r", "dropout", "forward", "launches", "backward", "launches")
    return Sheet(f"Bytes beside the GEMMs, M={TOKENS}, 16 bit", columns, tuple(rows))


def _everyone(problem: Problem, gpu: Gpu) -> dict[str, tuple[Ledger, Ledger]]:
    found = {"PEFT+bitsandbytes": peft(problem)}
    if not problem.dropout:
        found["Unsloth"] = unsloth(problem)
    pairs = [("addmm", "tail"), ("augment", "tail")]
    if len(problem.N) == 1:
        pairs.append(("gemm", "gemm"))
    for pair in pairs:
        found["ours, " + ", ".join(pair)] = ours(problem, Way(*pair, ""), gpu)
    return found


def time_sheets(predictions: Iterable[Prediction]) -> list[Sheet]:
    """Times against the others, and of each of our ways: two tables per device and rank."""
    found: dict[tuple[str, int], list[Prediction]] = {}
    for p in predictions:
        found.setdefault((p.gpu, p.problem.R[0]), []).append(p)
    sheets = []
    for (gpu, rank), some in found.items():
        where = f"{gpu}, r={rank}, M={TOKENS}, predicted us"
        sheets.append(Sheet(f"forward + backward, {where}", _AGAINST, tuple(map(_against, some))))
        sheets.append(Sheet(f"each of our ways, {where}", _WAYS, tuple(map(_ways, some))))
    return sheets


_LAYER = ("layer", "dropout")
_AGAINST = (*_LAYER, "dense", "PEFT", "Unsloth", "ours", "way", "x dense", "PEFT x", "Unsloth x")
_WAYS = (*_LAYER, "addmm", "augment", "gemm", "backward: tail", "gemm")


def _against(p: Prediction) -> tuple[str, ...]:
    others = [sum(p.peft), None if p.problem.dropout else sum(p.unsloth)]
    times = map(_us, (p.dense, *others, p.ours))
    ratios = (p.ours / p.dense, *(other and other / p.ours for other in others))
    return (
        *_named(p),
        *times,
        "/".join(p.way),
        *("-" if r is None else f"{r:.2f}" for r in ratios),
    )


def _ways(p: Prediction) -> tuple[str, ...]:
    forward = (p.forward.get(way) for way in ("addmm", "augment", "gemm"))
    dx = (p.dx.get(way) for way in ("tail", "gemm"))
    return (*_named(p), *map(_us, (*forward, *dx)))


def _steps(p: Prediction) -> dict[str, Any]:
    """Launches and bytes of everyone, forward and backward."""
    return {
        who: [{"launches": side.launches, "bytes": round(side.bytes(p.problem))} for side in sides]
        for who, sides in _everyone(p.problem, GPUS[p.gpu]).items()
    }


def _named(p: Prediction) -> tuple[str, str]:
    return f"{p.model} {p.layer}", "0.05" if p.problem.dropout else "0"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e6:.0f}"


def report(out: Path | None) -> Iterable[Sheet]:
    """All tables; with a folder also its `roofline.md` and `roofline.json`.

    Args:
        out: a folder that exists, or None.

    Returns:
        The tables in their order.
    """
    predictions = [
        predict(model, layer, gpu, problem)
        for gpu in GPUS
        for rank in RANKS
        for dropout in (False, True)
        for model, layer, problem in problems(rank, dropout)
    ]
    sheets = [closed_forms(), *time_sheets(predictions)]
    if out is not None:
        text = [f"# {TITLE}", "", CAVEAT, "", *NOTES, "", *(sheet.markdown() for sheet in sheets)]
        write_text(out / "roofline.md", "\n".join(text))
        devices = {name: asdict(plan.DEVICES[name]) | asdict(gpu) for name, gpu in GPUS.items()}
        rows = [asdict(p) | {"steps": _steps(p)} for p in predictions]
        content = {"caveat": CAVEAT, "devices": devices, "predictions": rows}
        write_text(out / "roofline.json", json.dumps(content, indent=1) + "\n")
    return sheets
