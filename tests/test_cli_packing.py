"""Packed examples are what they are alone, in logits and gradients; other models are refused."""

import itertools
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

import fastlora
from fastlora.cli import packing
from fastlora.cli.console import UserError
from fastlora.cli.encoding import IGNORED, Collator

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    ),
    # its window is shorter than the examples
    "mistral": MistralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, sliding_window=4
    ),
}
# none looks at the borders, in these versions of transformers at least
LEAKING = {
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
}


def tiny(config, attention=None, dtype=torch.float32):
    """A random model whose tokens mind what they attend to, without a cache, as in training."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.config.use_cache = False
    return model.to(dtype).eval()


def examples(lengths):
    """Random ids, of which the first part is masked as a prompt is."""
    rows = [torch.randint(1, 64, (length,)).tolist() for length in lengths]
    return [
        {"input_ids": ids, "labels": [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]}
        for ids in rows
    ]


# eager attention takes its softmax in fp32, whatever the model's dtype
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def unpacked(rows):
    """The examples of packed rows, by where position ids restart."""
    found = []
    for row in rows:
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in itertools.pairwise([*starts, len(row["input_ids"])]):
            assert row["position_ids"][start:end] == [*range(end - start)]
            found.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    return found


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([5], [[0]]),
        ([10, 10], [[0], [1]]),  # full rows
        ([3, 4, 3], [[0, 1, 2]]),  # exactly full
        ([6, 6, 4, 4], [[0, 3], [1, 2]]),
        ([7, 6, 3], [[0, 2], [1]]),  # where it fits closest
        ([6, 7, 3], [[0], [1, 2]]),
        ([4, 9, 1, 6], [[0, 3], [1, 2]]),
        ([1] * 25, [[*range(10)], [*range(10, 20)], [*range(20, 25)]]),
    ],
)
def test_rows_are_filled_by_best_fit(lengths, rows):
    data = examples(lengths)
    got = packing.pack(data, 10)
    assert [row["input_ids"] for row in got] == [
        [token for index in row for token in data[index]["input_ids"]] for row in rows
    ]


def test_every_example_is_in_one_row_and_none_is_split():
    lengths = [random.randint(2, 60) for _ in range(500)]
    data = examples(lengths)
    rows = packing.pack(data, 64)
    assert max(len(row["input_ids"]) for row in rows) <= 64
    assert len(rows) <= 1.05 * sum(lengths) / 64
    expected = [e | {"labels": [IGNORED, *e["labels"][1:]]} for e in data]
    got = unpacked(rows)
    assert sorted(got, key=str) == sorted(expected, key=str)
    # in the order of their first examples in the file
    ids = [example["input_ids"] for example in data]
    places = [ids.index(unpacked([row])[0]["input_ids"]) for row in rows]
    assert places == sorted(places)
    assert packing.pack(data, 64) == rows
    with pytest.raises(ValueError, match="at most 59 tokens, got 60"):
        packing.pack(data, 59)


def test_nothing_predicts_the_first_token_of_an_example():
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    (row,) = packing.pack(data, 6)
    assert row == {
        "input_ids": [1, 2, 3, 1, 2, 3],
        "labels": [IGNORED, 2, 3, IGNORED, 2, 3],
        "position_ids": [0, 1, 2, 0, 1, 2],
    }
    assert data[0]["labels"] == [1, 2, 3]


def test_batches_have_no_mask_and_padding_is_an_example_of_its_own():
    rows = packing.pack(examples([6, 4, 7]), 10)
    batch = packing.PackedCollator(9)(rows)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), ((2, 10), torch.int64)
    )
    assert batch["input_ids"][1, 7:].tolist() == [9, 9, 9]
    assert batch["labels"][1, 7:].tolist() == [IGNORED] * 3
    assert batch["position_ids"].tolist() == [[*range(6), *range(4)], [*range(7), *range(3)]]


# --- models ----------------------------------------------------------------------------------


def gradients(model, batches, count):
    """Gradients of the mean loss over `count` labels."""
    model.zero_grad()
    for batch in batches:
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (loss / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_examples_are_what_they_are_alone(name, attention):
    model = tiny(CONFIGS[name], attention, torch.float64)
    data = examples([9, 5, 3, 12, 2])
    rows = packing.pack(data, 16)
    assert len(rows) == 2
    batch = packing.PackedCollator(0)(rows)
    assert (batch["labels"][:, -1] == IGNORED).any(), "a row with padding"
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for row, logits in zip(rows, packed, strict=True):
        start = 0
        for example in unpacked([row]):
            ids = torch.tensor([example["input_ids"]])
            torch.testing.assert_close(
                logits[start : start + ids.shape[1]], model(ids).logits[0], **CLOSE
            )
            start += ids.shape[1]
    count = sum(label != IGNORED for row in rows for label in row["labels"])
    alone = gradients(model, [Collator(0)([example]) for example in unpacked(rows)], count)
    together = gradients(model, [batch], count)
    assert together.keys() == alone.keys()
    for parameter, gradient in together.items():
        torch.testing.assert_close(gradient, alone[parameter], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_keep_examples_apart_pass(name, attention, dtype):
    packing.check(tiny(CONFIGS[name], attention, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAKING)
def test_models_that_let_examples_leak_are_refused(name, dtype):
    # as they come, so that little leaks
    model = AutoModelForCausalLM.from_config(LEAKING[name]).to(dtype)
    model.config.use_cache = False
    with pytest.raises(UserError, match=f"got {type(model).__name__}, which does not; use --group"):
        packing.check(model)


def test_a_cache_hides_the_borders():
    model = tiny(CONFIGS["llama"])
    model.config.use_cache = True
    with pytest.raises(UserError, match="packing must be of a model that keeps"):
        packing.check(model)
    fastlora.add_lora(model, fastlora.LoraConfig(r=2))
    packing.check(fastlora.prepare_for_training(model))


def test_a_layer_that_leaks_is_enough():
    model = tiny(CONFIGS["llama"])
    right = model.model.layers[1].forward

    def leaking(hidden, **kwargs):
        return right(hidden + 0.05 * hidden.cumsum(1), **kwargs)

    model.model.layers[1].forward = leaking
    with pytest.raises(UserError, match="which does not"):
        packing.check(model)


def test_models_without_position_ids_or_with_nan_are_refused(monkeypatch):
    model = tiny(CONFIGS["llama"])
    right = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids: right(input_ids))
    with pytest.raises(UserError, match=r"takes position_ids, got .*unexpected keyword"):
        packing.check(model)
    monkeypatch.undo()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match="which does not"):
        packing.check(model)


@pytest.mark.parametrize("refused", [False, True])
def test_the_check_leaves_no_trace(refused):
    model = tiny(LEAKING["opt"] if refused else CONFIGS["gpt2"]).train()
    inner = (
        next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
        if not refused
        else model.lm_head
    )
    inner.eval()  # as a part that somebody froze

    def draw(*_):
        """As some models do in any mode."""
        torch.rand(1)

    model.register_forward_pre_hook(draw)
    state = torch.get_rng_state()
    if refused:
        with pytest.raises(UserError):
            packing.check(model)
    else:
        packing.check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module for module in model.modules() if not module.training] == [inner]
    assert all(parameter.grad is None for parameter in model.parameters())
