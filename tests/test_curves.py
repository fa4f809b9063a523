"""Whole-model parity: the loss curve of a real model follows PEFT over the same weights."""

import copy
import math

import pytest
import torch

from fastlora.nn import Linear4bit, LoraLinear

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from curve_helpers import adapted, batches, losses, smollm2  # noqa: E402  transformers is optional

WINDOW = 20  # steps of one mean, at most
# largest relative difference of a mean over WINDOW steps, and of a single step
LIMITS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (1e-2, 5e-2)}


@pytest.fixture(scope="module")
def base():
    """The model in fp32 and its tokenizer, loaded once."""
    return smollm2()


def peft_model(model, ours):
    """PEFT over the dequantised weights of `ours`, with its initial adapters."""
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, LoraLinear)}
    for name, layer in layers.items():
        assert isinstance(layer.base_layer, Linear4bit), name
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(layer.base_layer.dequantize(model.dtype))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    theirs = {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert {*theirs} == {*layers}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            source = getattr(layer, part)["default"].weight
            getattr(theirs[name], part)["default"].weight.data.copy_(source.data)
    return model


def trained_losses(model, ids):
    """Loss of every step of plain AdamW training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return losses(model, torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0), ids)


def check_curves(base, dtype, steps):
    model, tokenizer = base
    ours = adapted(copy.deepcopy(model).to(dtype))
    theirs = peft_model(copy.deepcopy(model).to(dtype), ours)
    ids = batches(tokenizer, steps)
    got, expected = (trained_losses(model, ids) for model in (ours, theirs))
    assert all(math.isfinite(loss) for loss in expected)
    mean_limit, step_limit = LIMITS[dtype]
    window = min(WINDOW, steps)
    means, expected_means = (c.view(-1, window).mean(1) for c in (got, expected))
    mean_error = ((means - expected_means) / expected_means).abs().max().item()
    step_error = ((got - expected) / expected).abs().max().item()
    print(f"{dtype}, {steps} steps: loss {expected_means[0]:.4f} -> {expected_means[-1]:.4f}, ")
    print(f"largest difference: mean {mean_error:.2e}, single step {step_error:.2e}")
    assert mean_error <= mean_limit, f"{mean_error:.2e} > {mean_limit}"
    assert step_error <= step_limit, f"{step_error:.2e} > {step_limit}"
    return expected_means


# rounding to 16 bits has to average out
@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, 8), (torch.bfloat16, WINDOW)], ids=str
)
def test_first_steps_follow_peft(base, dtype, steps):
    check_curves(base, dtype, steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_200_steps_follow_peft(base, dtype):
    means = check_curves(base, dtype, 200)
    assert means[-3:].mean() < 0.9 * means[0], "nothing was learnt"
