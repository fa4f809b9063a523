"""transformers: 4-bit checkpoints of its models, and our optimizers for its Trainer."""

from fastlora.integrations.transformers.bnb import NF4Quantizer as NF4Quantizer
from fastlora.integrations.transformers.bnb import check_quantization as check_quantization
from fastlora.integrations.transformers.bnb import load_bnb_4bit as load_bnb_4bit
from fastlora.integrations.transformers.bnb import save_nf4 as save_nf4
from fastlora.integrations.transformers.bnb import write_nf4 as write_nf4
from fastlora.integrations.transformers.trainer import OPTIMIZERS as OPTIMIZERS
from fastlora.integrations.transformers.trainer import (
    optimizer_cls_and_kwargs as optimizer_cls_and_kwargs,
)
