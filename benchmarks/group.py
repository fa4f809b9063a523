"""One layer or a group that shares its input, forward and backward, as in training with bf16=True.

All providers have the same NF4 bytes and adapters and run under autocast of x's dtype, except that
the dense baseline has the decoded weight and no adapter. "dropout 0.05" is a mode.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import ops, reference
from fastlora.benchmarks.graphs import graphed
from fastlora.benchmarks.linear import (
    SCALE,
    SEED,
    LinearProblem,
    bitsandbytes_layer,
    frozen,
    peft_layers,
    random_layer,
    set_adapter,
)
from fastlora.benchmarks.parity import TOLERANCE, deviation
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work
from fastlora.member import Member
from fastlora.nn import Linear4bit, LoraLinear

DROPOUT = 0.05
MODES = ("dropout 0", f"dropout {DROPOUT}")


@dataclass(frozen=True)
class GroupProblem:
    """Layers that read the same x, which is the x of each.

    Attributes:
        layers: with their adapters and upstream gradients.
        state: int64 [2]. A dropout state for ops that are given one.
    """

    layers: tuple[LinearProblem, ...]
    state: Tensor

    @property
    def x(self) -> Tensor:
        """[M, K], compute dtype, requires grad."""
        return self.layers[0].x

    @cached_property
    def dx(self) -> Tensor:
        """[M, K], dtype of x. What ops that add to dx in place add to."""
        return torch.zeros_like(self.x, requires_grad=False)

    @property
    def members(self) -> list[Member]:
        """The layers as `passes` takes them."""
        return [Member(p.weight.quantized, None, p.a, p.b, SCALE) for p in self.layers]

    @cached_property
    def mask(self) -> Tensor:
        """fp64 [M, K]. What dropout multiplies x with under `state`."""
        ones = torch.ones(self.x.shape, dtype=torch.float64, device=self.x.device)
        return reference.dropout(ones, self.state, DROPOUT)

    def truth(self, masks: Sequence[Tensor | None], lora: bool) -> dict[str, Tensor]:
        """fp64 truth: y0, y1, ..., da0, ..., db0, ..., and dx, the sum over the layers.

        Args:
            masks: fp64 [M, K] of each layer, None without dropout.
            lora: whether the layers have adapters.

        Returns:
            name -> tensor; y and dx have the compared rows only.
        """
        found: dict[str, Tensor] = {}
        for i, (layer, mask) in enumerate(zip(self.layers, masks, strict=True)):
            truth = layer.truth(mask, lora)
            dx = truth["dx"]
            found |= {f"{name}{i}": t for name, t in truth.items() if name != "dx"}
            found["dx"] = found["dx"] + dx if i else dx
        return found


def widths(sizes: Sizes) -> list[int]:
    """out_features of each layer: N, or N0, N1, ..."""
    return [size for name, size in sizes.items() if name.startswith("N")]


def sizes_of(M: int, N: Sequence[int], K: int, R: int) -> dict[str, int]:
    """Sizes of a layer or a group, as `widths` reads them."""
    names = ["N"] if len(N) == 1 else [f"N{i}" for i in range(len(N))]
    return {"M": M, **dict(zip(names, N, strict=True)), "K": K, "R": R}


def dropout_of(mode: str) -> float:
    """Probability that a mode stands for."""
    return float(mode.split()[1])


def make_problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> GroupProblem:
    """Random inputs of a layer or a group.

    Args:
        sizes: see `sizes_of`.
        device: where.
        dtype: of x and the decoded weights; adapters are fp32.

    Returns:
        The problem.
    """
    x = torch.randn(sizes["M"], sizes["K"], device=device, dtype=dtype).requires_grad_()
    layers = tuple(random_layer(x, N, sizes["R"]) for N in widths(sizes))
    return GroupProblem(layers, torch.randint(2**63 - 1, (2,), device=device))


def compare(
    results: Mapping[str, Tensor], truth: Mapping[str, Tensor], problem: GroupProblem
) -> list[Deviation]:
    """Deviation of every result; of y and dx in the compared rows."""
    rows, bound = problem.layers[0].rows, TOLERANCE[problem.x.dtype]
    picked = {n: t[rows] if n[0] == "y" or n == "dx" else t for n, t in results.items()}
    return [deviation(name, got, truth[name], bound) for name, got in picked.items()]


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    """Of the dense layers, forward and dx: the LoRA term is what a provider adds."""
    M, K = sizes["M"], sizes["K"]
    elements = sum(M * K + N * K + M * N for N in widths(sizes))
    return Work(bytes=2 * itemsize * elements, flops=4 * M * K * sum(widths(sizes)))


def _check(problem: GroupProblem, mode: str, provider: Provider, call: Call) -> list[Deviation]:
    """Compare all results to fp64; under dropout to what the layers' own masks give."""
    lora, masks = provider.name != "dense", [None] * len(problem.layers)
    if lora and dropout_of(mode):
        masks = [_probe(problem, mode, provider, i) for i in range(len(masks))]
    torch.manual_seed(SEED)
    return compare(call(), problem.truth(masks, lora), problem)


def _probe(problem: GroupProblem, mode: str, provider: Provider, index: int) -> Tensor:
    """What dropout multiplies x with for one layer at `SEED`, fp64 [M, K].

    Read off dx where all adapter weights of this layer are 1, those of the others 0, and there is
    almost no base weight: so nothing has to be known about how the mask is drawn.
    """
    N = 64
    layers = tuple(
        replace(
            layer,
            dy=torch.ones_like(layer.dy[:, :1]).expand(-1, N).contiguous(),
            w=layer.w[:1].expand(N, -1) * 1e-3,
            a=torch.ones_like(layer.a),
            b=torch.full_like(layer.b[:1], float(i == index)).expand(N, -1).contiguous(),
        )
        for i, layer in enumerate(problem.layers)
    )
    call = provider.build(replace(problem, layers=layers), mode)
    torch.manual_seed(SEED)
    kept = call()["dx"] > SCALE * N * problem.layers[0].a.shape[0] / 2
    return kept.double() / (1 - DROPOUT)


# --- providers -------------------------------------------------------------------------------


def _training(
    forward: Callable[[Tensor], Sequence[Tensor]],
    problem: GroupProblem,
    parameters: Mapping[str, Tensor],
) -> Call:
    """The call that every provider is timed by."""
    x, dys = problem.x, [layer.dy for layer in problem.layers]
    inputs = {"dx": x, **parameters}

    def call() -> dict[str, Tensor]:
        with torch.autocast(x.device.type, x.dtype):
            ys = forward(x)
        grads = torch.autograd.grad(ys, [*inputs.values()], dys)
        return {f"y{i}": y for i, y in enumerate(ys)} | dict(zip(inputs, grads, strict=True))

    return call


def _adapters(layers: Sequence[nn.Module], problem: GroupProblem) -> dict[str, Tensor]:
    """Give LoRA layers the problem's adapters, in their own dtype; returns them by gradient."""
    found = {}
    for i, (layer, given) in enumerate(zip(layers, problem.layers, strict=True)):
        found |= {f"{name}{i}": t for name, t in set_adapter(layer, given).items()}
    return found


def _dense(problem: GroupProblem, mode: str) -> Call:
    layers = [frozen(layer.weight.decoded) for layer in problem.layers]
    return _training(lambda x: [layer(x) for layer in layers], problem, {})


def _fastlora(problem: GroupProblem, mode: str) -> Call:
    p, R = dropout_of(mode), len(problem.layers[0].a)
    layers = [
        LoraLinear(Linear4bit.from_nf4(layer.weight.quantized), R, SCALE * R, p)
        for layer in problem.layers
    ]
    parameters = _adapters(layers, problem)

    def forward(x: Tensor) -> Sequence[Tensor]:
        return ops.linear_group(x, [layer.member() for layer in layers], p)

    return _training(forward, problem, parameters)


def _peft(problem: GroupProblem, mode: str, dtype: torch.dtype | None) -> Call:
    layers = peft_layers(problem.layers, dropout_of(mode), dtype or problem.x.dtype)
    return _training(lambda x: [layer(x) for layer in layers], problem, _adapters(layers, problem))


def _plain(problem: GroupProblem, mode: str) -> Call:
    """The passes of PEFT's layer in plain torch, over our decoding: a stand-in for bitsandbytes."""
    p = dropout_of(mode)
    members = [
        replace(m, a=m.a.clone().requires_grad_(), b=m.b.clone().requires_grad_())
        for m in problem.members
    ]

    def layer(x: Tensor, m: Member) -> Tensor:
        y = ops.nf4_linear(x, m.weight).clone()
        return y + F.linear(F.linear(F.dropout(x, p), m.a), m.b) * m.scale

    parameters = {f"d{n}{i}": getattr(m, n) for i, m in enumerate(members) for n in "ab"}
    return _training(lambda x: [layer(x, m) for m in members], problem, parameters)


def _unsloth(problem: GroupProblem, mode: str) -> Call:
    if dropout_of(mode) or len(problem.layers) > 1:
        raise ValueError("unsloth must have one layer and no dropout, leaves others to PEFT")
    from unsloth.kernels.fast_lora import LoRA_W

    layer = problem.layers[0]
    weight = bitsandbytes_layer(layer).weight
    a, b = (t.clone().requires_grad_() for t in (layer.a, layer.b))

    def forward(x: Tensor) -> Sequence[Tensor]:
        y = LoRA_W.apply(x[None], weight.data, weight.quant_state, a, b, SCALE)
        return [y[0]]

    return _training(forward, problem, {"da0": a, "db0": b})


def group_benchmark(shapes: Mapping[str, Sizes], device: torch.device) -> Benchmark:
    """Forward and backward of layers and groups, by everyone; on a GPU also as CUDA graphs.

    Args:
        shapes: name -> sizes, see `sizes_of`.
        device: where.

    Returns:
        The benchmark.
    """
    bnb = ("peft", "bitsandbytes")
    eager = [
        Provider("dense", _dense),
        Provider("fastlora", _fastlora),
        Provider("peft+bitsandbytes", partial(_peft, dtype=torch.float32), "fp32", bnb),
        Provider("peft+bitsandbytes", partial(_peft, dtype=None), "16 bit", bnb),
        Provider("plain torch", _plain),
        Provider("unsloth", _unsloth, packages=("unsloth", "bitsandbytes")),
    ]
    graphs = [graphed(p, device, f"{p.variant} graph".strip()) for p in eager]
    return Benchmark(
        name="layer",
        summary="layers that share x, forward and backward",
        shapes=shapes,
        small=shapes,
        problem=make_problem,
        providers=(*eager, *(graphs if device.type == "cuda" else ())),
        check=_check,
        work=_work,
        rates=("GFLOP/s",),
        modes=MODES,
    )
