"""What the tests of the command line share: a tiny model folder, and how a command is run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner, Result

from fastlora.cli import app

CORPUS = ["one two three four five six seven eight nine ten\n", '{"a":"b","at":"17:30"}', "done"]


def invoke(*words: str | Path) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="fastlora")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


FASTLORA = Path(sys.executable).with_name("fastlora")


def run(*words: str | Path, **extra: Any) -> subprocess.CompletedProcess:
    """Run the installed command in a process of its own."""
    command = [FASTLORA, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **extra)


def records(output: Path, of: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell of steps; of="eval_loss": those of evaluations."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if of in record]


def one_line(result: Result | subprocess.CompletedProcess) -> str:
    """The error line of a failed command, which must be all that is on stderr."""
    assert result.stderr.startswith("fastlora: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose padding is the end-of-sequence token, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_tiny_model(folder: Path, **config: Any) -> Path:
    """A random two-layer Llama with its tokenizer, as transformers saves them."""
    tokenizer = tiny_tokenizer()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    # large weights, so that the frozen output head can say something
    values = dict(num_key_value_heads=2, initializer_range=0.3, **sizes) | config
    values |= dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_classifier(folder: Path) -> Path:
    """A random two-layer BERT without a head, with its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
