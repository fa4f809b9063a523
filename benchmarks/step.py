"""`step`: one whole training step of a small language model with LoRA, AdamW included.

A Llama of random weights, since values do not change the speed; all linear layers but the output
head are adapted. 4-bit contenders hold the same NF4 bytes and the dense one what they decode to,
so that all compute the same function. Adapters are fp32.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

import fastlora
from fastlora.benchmarks.parity import deviation
from fastlora.benchmarks.spec import Benchmark, Deviation, Provider, Sizes, Work
from fastlora.nn import LoraLinear

SCALE = 2.0  # alpha / R
DROPOUT = 0.05
LEARNING_RATE = 1e-4
MODES = ("plain", "dropout")

_STEP = {"batch": 2, "length": 256, "R": 16}
_SMOLLM2 = {"layers": 30, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152}
_TINY = {"layers": 2, "hidden": 64, "inner": 128, "heads": 2, "kv_heads": 1, "vocab": 512}
# relative errors of the loss and of all gradients after so many layers of rounding
_BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 0.1), torch.float16: (1e-2, 0.05)}
# the loss may differ by so much where contenders drop other elements
_DROPPED = 0.05


@dataclass(frozen=True)
class StepProblem:
    """A model, a batch and the truth about the first step.

    Attributes:
        model: a causal language model in the compute dtype, untouched.
        tokens: int64 [batch, length].
        adapters: path of each adapted layer -> a [R, K] and b [N, R], fp32.
    """

    model: nn.Module
    tokens: Tensor
    adapters: dict[str, tuple[Tensor, Tensor]]

    @cached_property
    def quantized(self) -> nn.Module:
        """The model over NF4."""
        return fastlora.quantize_model(copy.deepcopy(self.model))

    def dense(self) -> nn.Module:
        """A copy of the model over what NF4 decodes to."""
        model = copy.deepcopy(self.model)
        for path in self.adapters:
            layer, packed = model.get_submodule(path), self.quantized.get_submodule(path)
            with torch.no_grad():
                layer.weight.copy_(packed.dequantize(layer.weight.dtype))
        return model

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Loss and all gradients of the adapters in one vector, in fp32 by plain torch."""
        model = self.dense().float().requires_grad_(False)
        parts = []
        for path, (a, b) in self.adapters.items():
            layer = _PlainLora(model.get_submodule(path), a, b)
            model.set_submodule(path, layer)
            parts += [layer.a, layer.b]
        loss = model(input_ids=self.tokens, labels=self.tokens).loss
        grads = torch.autograd.grad(loss, parts)
        return {"loss": loss.detach(), "gradients": torch.cat([g.flatten() for g in grads])}


class _PlainLora(nn.Module):
    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * (x @ self.a.T @ self.b.T)


@dataclass
class TrainingStep:
    """What is timed: forward, backward, AdamW.

    Attributes:
        model: with adapters, in training.
        tokens: int64 [batch, length], inputs and labels.
        parts: a and b of each layer, in the order of the problem's adapters.
        optimizer: of the parts.
    """

    model: nn.Module
    tokens: Tensor
    parts: list[nn.Parameter]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parts, lr=LEARNING_RATE, weight_decay=0.0)

    def __call__(self) -> dict[str, Tensor]:
        """Loss, and the gradient of each part by its number."""
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        grads = {str(i): part.grad for i, part in enumerate(self.parts)}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.detach(), **grads}


def _problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> StepProblem:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        vocab_size=sizes["vocab"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    tokens = torch.randint(sizes["vocab"], (sizes["batch"], sizes["length"]), device=device)
    adapters = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not model.lm_head:
            N, K, R = layer.out_features, layer.in_features, sizes["R"]
            a = torch.randn(R, K, device=device) * K**-0.5
            adapters[path] = a, torch.randn(N, R, device=device) * 0.02
    return StepProblem(model, tokens, adapters)


def _fastlora(problem: StepProblem, mode: str, chunked_loss: bool) -> TrainingStep:
    model = copy.deepcopy(problem.quantized)
    config = fastlora.LoraConfig(**_lora(problem, mode), target_modules="all-linear")
    fastlora.prepare_for_training(fastlora.add_lora(model, config), chunked_loss=chunked_loss)
    layers = [model.get_submodule(path) for path in problem.adapters]
    assert all(isinstance(layer, LoraLinear) for layer in layers)
    return _step(problem, model, layers)


def _peft(problem: StepProblem, mode: str, **ours: bool) -> TrainingStep:
    return _with_peft(problem, mode, problem.dense(), **ours)


def _peft_bitsandbytes(problem: StepProblem, mode: str, **ours: bool) -> TrainingStep:
    model = copy.deepcopy(problem.model)
    for path in problem.adapters:
        model.set_submodule(path, _bitsandbytes(model.get_submodule(path)))
    # transformers says so of its models; without it PEFT takes its class for dense layers
    model.is_loaded_in_4bit = True
    return _with_peft(problem, mode, model, **ours)


def _bitsandbytes(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    N, K = layer.weight.shape
    new = Linear4bit(K, N, bias=False, compute_dtype=layer.weight.dtype, device="meta")
    settings = {"quant_type": "nf4", "compress_statistics": True, "module": new}
    new.weight = Params4bit(layer.weight.detach(), requires_grad=False, **settings)
    return new.to(layer.weight.device)


def _with_peft(
    problem: StepProblem,
    mode: str,
    model: nn.Module,
    patched: bool = False,
    chunked_loss: bool = False,
) -> TrainingStep:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**_lora(problem, mode), target_modules="all-linear")
    model = get_peft_model(model, config)
    if patched:
        assert not fastlora.patch_peft(model).fallbacks
    if chunked_loss:
        fastlora.prepare_for_training(model)
    layers = [model.base_model.model.get_submodule(path) for path in problem.adapters]
    return _step(problem, model, layers)


def _lora(problem: StepProblem, mode: str) -> dict[str, float]:
    R = len(next(iter(problem.adapters.values()))[0])
    return {"r": R, "lora_alpha": SCALE * R, "lora_dropout": DROPOUT if mode == "dropout" else 0.0}


def _step(problem: StepProblem, model: nn.Module, layers: list[nn.Module]) -> TrainingStep:
    """Give the layers the problem's adapters."""
    parts = []
    for layer, values in zip(layers, problem.adapters.values(), strict=True):
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for part, value in zip(pair, values, strict=True):
            part.data.copy_(value)
            parts.append(part)
    return TrainingStep(model.train(), problem.tokens, parts)


def _check(
    problem: StepProblem, mode: str, provider: Provider, call: TrainingStep
) -> list[Deviation]:
    """The first step's loss and gradients; with dropout only the loss, since each drops others."""
    loss, gradients = _BOUNDS[problem.model.dtype]
    got, truth = call(), problem.truth
    if mode == "dropout":
        return [deviation("loss", got["loss"], truth["loss"], _DROPPED)]
    found = torch.cat([got[str(i)].flatten() for i in range(len(call.parts))]).float()
    error = ((found - truth["gradients"]).norm() / truth["gradients"].norm()).item()
    return [
        deviation("loss", got["loss"], truth["loss"], loss),
        Deviation("gradients", error, gradients),
    ]


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    return Work(tokens=sizes["batch"] * sizes["length"])


def _parts(call: TrainingStep) -> dict[str, float]:
    from fastlora.benchmarks.breakdown import parts  # which is about the steps of this file

    return parts(call)


_PACKAGES = ("transformers", "peft")


def _inside_peft(
    name: str, build: Callable[..., TrainingStep], variant: str, *packages: str
) -> list[Provider]:
    """PEFT alone, with one line of ours, and with two."""
    ways = {"": {}, "patched": {"patched": True}}
    ways["patched, chunked loss"] = {"patched": True, "chunked_loss": True}
    packages = *_PACKAGES, *packages
    return [
        Provider(name, partial(build, **ours), f"{variant} {way}".strip(), packages)
        for way, ours in ways.items()
    ]


STEP = Benchmark(
    name="step",
    summary="a training step: forward, backward, AdamW; LoRA on all linear layers",
    shapes={"smollm2-135m": {**_SMOLLM2, **_STEP}},
    small={"tiny": {**_TINY, **_STEP, "length": 16, "R": 4}},
    problem=_problem,
    providers=(
        *_inside_peft("peft+bitsandbytes", _peft_bitsandbytes, "", "bitsandbytes"),
        *_inside_peft("peft", _peft, "dense"),
        Provider(
            "fastlora", partial(_fastlora, chunked_loss=False), "full logits", ("transformers",)
        ),
        Provider("fastlora", partial(_fastlora, chunked_loss=True), packages=("transformers",)),
    ),
    check=_check,
    work=_work,
    rates=("tok/s",),
    modes=MODES,
    whole_memory=True,
    parts=_parts,
)
