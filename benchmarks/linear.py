"""`linear`: one frozen layer, dense or 4-bit, without and with LoRA and its dropout, in training.

The dense layer has the decoded 4-bit weight, so that all providers compute the same function.
Adapters are fp32. "fwd" records the graph, as in training; "fwd+bwd" adds dx, da and db.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from fastlora.benchmarks.nf4 import WeightProblem
from fastlora.benchmarks.parity import TOLERANCE, deviation
from fastlora.benchmarks.shapes import LAYERS, TOKENS, with_tokens
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work
from fastlora.nn import Linear4bit, LoraLinear

R = 16
ALPHA = 32
SCALE = ALPHA / R  # no unit; other benchmarks have it for every rank
DROPOUT = 0.05
SEED = 1234

# rows of y and dx that are compared, evenly spread; da and db are compared whole
CHECKED_ROWS = 64


@dataclass(frozen=True)
class LinearProblem:
    """Inputs of one layer and the truth about its results.

    Attributes:
        x: [M, K], compute dtype, requires grad.
        dy: [M, N], compute dtype. The upstream gradient.
        w: [N, K], compute dtype. The weight before quantising.
        a: [R, K], fp32.
        b: [N, R], fp32.
    """

    x: Tensor
    dy: Tensor
    w: Tensor
    a: Tensor
    b: Tensor

    @cached_property
    def weight(self) -> WeightProblem:
        """The weight quantised and decoded by the reference: all providers have these bytes."""
        return WeightProblem(self.w)

    @cached_property
    def rows(self) -> Tensor:
        """The rows of y and dx that are compared, first and last among them."""
        M = self.x.shape[0]
        return torch.linspace(0, M - 1, min(M, CHECKED_ROWS), device=self.x.device).round().long()

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """fp64 truth of the layer without LoRA, in the compared rows."""
        rows, decoded = self.rows, self.weight.decoded
        x, dy, w = (t.detach().double() for t in (self.x[rows], self.dy[rows], decoded))
        return {"y": x @ w.T, "dx": dy @ w}

    def truth(self, mask: Tensor | None, lora: bool) -> dict[str, Tensor]:
        """fp64 truth of all results.

        Args:
            mask: fp64 [M, K]. What dropout multiplies x with; None without dropout.
            lora: whether the layer has adapters.

        Returns:
            name -> tensor; y and dx have the compared rows only.
        """
        if not lora:
            return self.base
        rows = self.rows
        x, dy, a, b = (t.detach().double() for t in (self.x, self.dy, self.a, self.b))
        dropped = x if mask is None else x * mask
        s, ds = dropped @ a.T, SCALE * dy @ b
        back = ds[rows] @ a if mask is None else ds[rows] @ a * mask[rows]
        return {
            "y": self.base["y"] + SCALE * s[rows] @ b.T,
            "dx": self.base["dx"] + back,
            "da": ds.T @ dropped,
            "db": SCALE * dy.T @ s,
        }


def random_layer(x: Tensor, N: int, r: int) -> LinearProblem:
    """A layer over x with random weight, adapter and upstream gradient.

    Args:
        x: [M, K], compute dtype, requires grad.
        N: out_features.
        r: rank.

    Returns:
        The problem, on the device of x.
    """
    (M, K), device, dtype = x.shape, x.device, x.dtype
    return LinearProblem(
        x=x,
        dy=torch.randn(M, N, device=device, dtype=dtype),
        w=(torch.randn(N, K, device=device) * K**-0.5).to(dtype),
        a=torch.randn(r, K, device=device) * K**-0.5,
        b=torch.randn(N, r, device=device) * 0.1,
    )


def _problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LinearProblem:
    x = torch.randn(sizes["M"], sizes["K"], device=device, dtype=dtype).requires_grad_()
    return random_layer(x, sizes["N"], R)


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    """Of the dense layer: the LoRA term is what a provider adds."""
    M, N, K = sizes["M"], sizes["N"], sizes["K"]
    passes = 2 if mode == "fwd+bwd" else 1  # a frozen weight has no gradient
    return Work(bytes=passes * (M * K + N * K + M * N) * itemsize, flops=passes * 2 * M * N * K)


def _training(
    layer: nn.Module, problem: LinearProblem, mode: str, parameters: dict[str, Tensor]
) -> Call:
    """The call that every provider is timed by."""
    layer.train()
    inputs = {"dx": problem.x, **parameters}

    def forward() -> dict[str, Tensor]:
        return {"y": layer(problem.x)}

    def forward_backward() -> dict[str, Tensor]:
        y = layer(problem.x)
        grads = torch.autograd.grad(y, [*inputs.values()], problem.dy)
        return {"y": y, **dict(zip(inputs, grads, strict=True))}

    return {"fwd": forward, "fwd+bwd": forward_backward}[mode]


def frozen(w: Tensor) -> nn.Linear:
    """A linear layer without bias over w [N, K], which has no gradient."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def set_adapter(layer: nn.Module, problem: LinearProblem) -> dict[str, Tensor]:
    """Give a LoRA layer the problem's adapter, in its own dtype.

    Args:
        layer: ours or PEFT's, with an adapter "default" of the problem's rank.
        problem: whose a and b are copied.

    Returns:
        The layer's parameters by the names of their gradients, "da" and "db".
    """
    parameters = {"da": layer.lora_A["default"].weight, "db": layer.lora_B["default"].weight}
    with torch.no_grad():
        parameters["da"].copy_(problem.a)
        parameters["db"].copy_(problem.b)
    return parameters


def _dense(problem: LinearProblem, mode: str) -> Call:
    return _training(frozen(problem.weight.decoded), problem, mode, {})


def _fastlora(problem: LinearProblem, mode: str) -> Call:
    return _training(Linear4bit.from_nf4(problem.weight.quantized), problem, mode, {})


def _fastlora_lora(problem: LinearProblem, mode: str, dropout: float) -> Call:
    base = Linear4bit.from_nf4(problem.weight.quantized)
    layer = LoraLinear(base, r=R, lora_alpha=ALPHA, lora_dropout=dropout)
    return _training(layer, problem, mode, set_adapter(layer, problem))


def bitsandbytes_layer(problem: LinearProblem) -> nn.Module:
    """bitsandbytes' layer over the problem's NF4 bytes."""
    from bitsandbytes.nn import Linear4bit as BnbLinear4bit
    from bitsandbytes.nn import Params4bit

    (N, K), (packed, quant_state) = problem.w.shape, problem.weight.quantized.to_bnb()
    layer = BnbLinear4bit(K, N, bias=False, compute_dtype=problem.w.dtype, device="meta")
    layer.weight = Params4bit(
        packed, requires_grad=False, quant_state=quant_state, bnb_quantized=True, module=layer
    )
    return layer


def _bitsandbytes(problem: LinearProblem, mode: str) -> Call:
    return _training(bitsandbytes_layer(problem), problem, mode, {})


def peft_layers(
    problems: Sequence[LinearProblem], dropout: float, dtype: torch.dtype
) -> list[nn.Module]:
    """PEFT's LoRA layers over bitsandbytes' with the problems' NF4 bytes, in training.

    Args:
        problems: the layers, of one rank.
        dropout: probability.
        dtype: of the adapters.

    Returns:
        The layers; their adapters are random.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(*map(bitsandbytes_layer, problems))
    # transformers says so of its models; without it PEFT takes its class for dense layers
    model.is_loaded_in_4bit = True
    r, names = len(problems[0].a), [name for name, _ in model.named_children()]
    config = LoraConfig(r=r, lora_alpha=SCALE * r, lora_dropout=dropout, target_modules=names)
    layers = [*inject_adapter_in_model(config, model).train()]
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            part.to(dtype)  # PEFT made them in the compute dtype
    return layers


def _peft_lora(problem: LinearProblem, mode: str, dropout: float) -> Call:
    (layer,) = peft_layers([problem], dropout, torch.float32)
    return _training(layer, problem, mode, set_adapter(layer, problem))


def _patched_lora(problem: LinearProblem, mode: str, dropout: float) -> Call:
    from fastlora import patch_peft

    (layer,) = peft_layers([problem], dropout, torch.float32)
    patch_peft(nn.Sequential(layer))
    return _training(layer, problem, mode, set_adapter(layer, problem))


def _check(problem: LinearProblem, mode: str, provider: Provider, call: Call) -> list[Deviation]:
    """Compare all results to fp64; under dropout to what the layer's own mask gives."""
    lora = provider.variant.startswith("lora")
    mask, found = None, []
    if provider.variant.endswith("dropout"):
        mask = _dropout_mask(problem, provider)
        found.append(_dropped_share(mask))
    torch.manual_seed(SEED)
    results = call()
    truth = problem.truth(mask, lora)
    for name, got in results.items():
        got = got[problem.rows] if name in ("y", "dx") else got
        found.append(deviation(name, got, truth[name], TOLERANCE[problem.x.dtype]))
    return found


def _dropout_mask(problem: LinearProblem, provider: Provider) -> Tensor:
    """What dropout multiplies x with at `SEED`, fp64 [M, K].

    It is read off dx of a layer with all adapter weights 1 and almost no base weight, so nothing
    has to be known about how it is drawn; only that it depends on the seed and the shape of x.
    """
    N = 64
    probe = replace(
        problem,
        dy=torch.ones_like(problem.dy[:, :1]).expand(-1, N).contiguous(),
        w=problem.w[:N] * 1e-3,
        a=torch.ones_like(problem.a),
        b=torch.ones_like(problem.b[:N]),
    )
    call = provider.build(probe, "fwd+bwd")
    torch.manual_seed(SEED)
    kept = call()["dx"] > SCALE * N * R / 2
    return kept.double() / (1 - DROPOUT)


def _dropped_share(mask: Tensor) -> Deviation:
    """A layer that drops nothing is not a layer with dropout: at most 5 standard deviations off."""
    share = (mask == 0).double().mean().item()
    bound = 5 * (DROPOUT * (1 - DROPOUT) / mask.numel()) ** 0.5
    return Deviation("dropped share", abs(share - DROPOUT), bound)


def _lora_variants(
    name: str, build: Callable[..., Call], packages: tuple[str, ...] = ()
) -> list[Provider]:
    return [
        Provider(name, partial(build, dropout=0.0), "lora", packages),
        Provider(name, partial(build, dropout=DROPOUT), "lora+dropout", packages),
    ]


LINEAR = Benchmark(
    name="linear",
    summary=f"one frozen layer in training; LoRA r={R}, dropout {DROPOUT}",
    shapes=with_tokens(LAYERS, TOKENS),
    small=with_tokens({"small": {"N": 64, "K": 128}}, (5,)),
    problem=_problem,
    providers=(
        Provider("dense", _dense),
        Provider("fastlora", _fastlora),
        *_lora_variants("fastlora", _fastlora_lora),
        Provider("bitsandbytes", _bitsandbytes, packages=("bitsandbytes",)),
        *_lora_variants("peft+bitsandbytes", _peft_lora, ("peft", "bitsandbytes")),
        *_lora_variants("peft, patched", _patched_lora, ("peft", "bitsandbytes")),
    ),
    check=_check,
    work=_work,
    rates=("GFLOP/s",),
    modes=("fwd", "fwd+bwd"),
)
