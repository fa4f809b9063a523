"""What the tests of patched PEFT models share: tiny models, dense and 4-bit, and what they do."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, FLOOR
from model_helpers import VOCAB, tokens
from torch import Tensor, nn

import fastlora

peft = pytest.importorskip("peft")

IGNORED = [
    # what PEFT says on purpose, about what these tests do on purpose
    "ignore:.*get different generations due to rounding errors",
    "ignore:an adapter is merged into, or taken out of, a 4-bit weight",
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute in the model",
    "ignore:lora with eva initialization used with low_cpu_mem_usage=False",
    "ignore:Could not find a config file in",
    "ignore:Already following adapters were merged",
    "ignore:`lora_bias=True` was passed",
    "ignore:Adapter .* was active which is now deleted",
    # PEFT 0.21 does not expect the vector of lora_bias=True in its own files
    "ignore:Adapter .* have invalid shape",
]
MARKS = [pytest.mark.filterwarnings(text) for text in IGNORED]
MARKS.append(pytest.mark.usefixtures("one_thread"))


def dense(**settings: Any) -> nn.Module:
    """A two-layer Llama in fp32, with biases in attention and rows of whole blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    settings = dict(num_hidden_layers=2, num_key_value_heads=2, attention_bias=True) | settings
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **settings))
    return model.to(DEVICE).train()


def bnb(quant_type: str = "nf4", **settings: Any) -> nn.Module:
    """The same with bitsandbytes' layers, marked as transformers marks it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = dense(**settings)
    for path, layer in [*model.named_modules()]:
        if type(layer) is not nn.Linear or path == "lm_head":
            continue
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            quant_type=quant_type,
        )
        new.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
        model.set_submodule(path, new.to(DEVICE).train())
    model.is_loaded_in_4bit = True
    return model


def ours(**settings: Any) -> nn.Module:
    """The same with our 4-bit layers."""
    return fastlora.quantize_model(dense(**settings))


BASES: dict[str, Callable[..., nn.Module]] = {"dense": dense, "bnb": bnb, "ours": ours}
EVERY = pytest.mark.parametrize("base", BASES)


def config(**settings: Any) -> Any:
    """An adapter of rank 4 on every layer, with a B that is not zero."""
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
        | settings
    )


def adapted(base: str, **settings: Any) -> nn.Module:
    """A model of PEFT, in training mode."""
    return peft.get_peft_model(BASES[base](), config(**settings)).train()


def twins(base: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same model as PEFT runs it, and patched."""
    plain = adapted(base, **settings)
    return without_repacking(plain), patched(copy.deepcopy(plain))


def patched(model: nn.Module) -> nn.Module:
    """The model, in which every LoRA layer must be fast."""
    report = fastlora.patch_peft(model)
    assert report.fast, report
    assert not report.fallbacks, report
    return model


def without_repacking(model: nn.Module) -> nn.Module:
    """The model without what makes bitsandbytes wrong after an eval forward on some CPUs."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def output(model: nn.Module, **kwargs: Any) -> Tensor:
    """Logits in whatever mode the model is in."""
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


def step(model: nn.Module) -> dict[str, Tensor]:
    """Loss and gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_same(got: Any, expected: Any) -> None:
    """Loss, logits and gradients are equal to 1e-6, or where they are large, to the last digits."""
    if isinstance(expected, Tensor):
        got, expected = {"output": got}, {"output": expected}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        error = (got[name] - value).abs().max().item()
        # sums in another order
        limit = max(1e-6, FLOOR[torch.float32] * value.abs().max().item())
        assert error <= limit, f"{name}: {error:.2e}"


def quiet(function: Callable[[], Any]) -> Any:
    """What a function returns, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()
