"""What the tests of training curves share: a real model, real text, and adapters on the model."""

import json

import torch
from helpers import data_dir, smollm2_gguf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastlora
from fastlora.cli import models
from fastlora.cli.settings import TrainSettings

BATCH, LENGTH = 1, 64  # tokens a step are what such a test costs


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32 and training mode, and its tokenizer, or skip the test."""
    settings = TrainSettings(quantize="none", dtype="fp32")
    loaded = models.load(models.find(str(smollm2_gguf())), settings)
    return loaded.model.train(), loaded.tokenizer


def batches(tokenizer: PreTrainedTokenizerBase, steps: int) -> Tensor:
    """Token ids [steps, BATCH, LENGTH] of gsm8k, one after the other, or skip the test."""
    with open(data_dir() / "gsm8k" / "train.jsonl") as lines:
        text = "\n".join(
            "{question}\n{answer}\n".format(**json.loads(next(lines))) for _ in range(4 * steps)
        )
    ids = torch.tensor(tokenizer(text).input_ids)
    return ids[: steps * BATCH * LENGTH].view(steps, BATCH, LENGTH)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """The model in 4 bit and with adapters on all layers, in place."""
    fastlora.quantize_model(model)
    config = fastlora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return fastlora.prepare_for_training(fastlora.add_lora(model, config))


def losses(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """Loss of every step of training, fp64 [steps]."""
    trained = [p for p in model.parameters() if p.requires_grad]
    curve = []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)
