"""Tiny models with random weights, in folders by the names that PEFT's tests have for the hub's.

transformers takes a folder before it looks at the hub.
"""

import sys
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1]))

from cli_helpers import tiny_tokenizer

VOCAB = 1024  # tests name tokens up to 1000
# by the names of each family of configs: width, inner width, layers, heads
_LLAMA = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
_KV = dict(num_key_value_heads=2)
_OPT = dict(hidden_size=64, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=64)
_GPT = dict(n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
_T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
_BART = dict(
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
)
_GEMMA = dict(head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
MODELS = {  # name on the hub -> class, settings
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        _OPT | dict(num_hidden_layers=5),
    ),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", _OPT | dict(num_hidden_layers=12)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        _GPT | dict(rotary_dim=4),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        dict(hidden_size=32, n_layer=2, n_head=4),
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        _LLAMA | _KV | dict(pad_token_id=0),
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA | _KV),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA | _KV),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        _LLAMA | _KV | _GEMMA,
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        _LLAMA | _KV | dict(num_local_experts=2, intermediate_size_mlp=32, head_dim=8),
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        _LLAMA | _KV | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _LLAMA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        _LLAMA,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _LLAMA),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _LLAMA,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        _LLAMA | dict(relative_attention=True, pos_att_type="c2p|p2c"),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        _LLAMA | dict(relative_attention=True, pos_att_type="c2p|p2c"),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        _BART,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        _T5,
    ),
}


def main() -> None:
    """Write all models into the current folder."""
    tokenizer = tiny_tokenizer()
    for name, (kind, settings) in MODELS.items():
        torch.manual_seed(0)
        cls = getattr(transformers, kind)
        cls(cls.config_class(vocab_size=VOCAB, **settings)).save_pretrained(name)
        tokenizer.save_pretrained(name)


if __name__ == "__main__":
    main()
