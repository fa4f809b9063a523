"""Models of transformers whose layers are a few whole blocks wide, for tests of 4-bit files."""

import pytest

transformers = pytest.importorskip("transformers")

# rows of whole blocks: elsewhere bitsandbytes' CPU dequantisation is wrong (test_nf4)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}


def llama(**settings):
    config = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1, "attention_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | settings)).eval()


def gpt2():
    config = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 97}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **ids)).eval()


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=128, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()
