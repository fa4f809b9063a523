"""8-bit moments on a real fine-tune: the loss ends where that of fp32 moments does."""

import copy

import pytest
import torch

from fastlora.optim import AdamW, AdamW8bit

pytest.importorskip("transformers")

from curve_helpers import adapted, batches, losses, smollm2

WINDOW = 20  # steps at the end whose mean is the final loss, at most half of all
LIMIT = 0.005  # relative, of the final loss


@pytest.fixture(scope="module")
def base():
    """The model in fp32 and its tokenizer, loaded once."""
    return smollm2()


def check_curves(base, steps, length):
    model, tokenizer = base
    ids = batches(tokenizer, steps)[..., :length]
    curves = []
    for kind in (AdamW, AdamW8bit):
        torch.manual_seed(0)
        ours = adapted(copy.deepcopy(model))
        trained = [(name, p) for name, p in ours.named_parameters() if p.requires_grad]
        curves.append(losses(ours, kind(trained, lr=1e-3, weight_decay=0.0), ids))
    exact, coded = curves
    window = min(WINDOW, steps // 2)
    first, last, got = (c.mean().item() for c in (exact[:2], exact[-window:], coded[-window:]))
    error = abs(got - last) / last
    print(f"{steps} steps: loss {first:.4f} -> {last:.4f}, in 8 bits {got:.4f}, {error:.2e} off")
    assert last < 0.8 * first, "nothing was learnt"
    assert not torch.equal(exact, coded), "both had moments in 32 bits"
    assert error <= LIMIT


def test_8_bit_moments_learn_as_well(base):
    check_curves(base, 20, 32)


@pytest.mark.slow
def test_8_bit_moments_learn_as_well_over_200_steps(base):
    check_curves(base, 200, 64)
