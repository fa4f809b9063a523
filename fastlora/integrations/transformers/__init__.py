"""transformers: 4-bit models loaded and saved by it, and our optimizers for its Trainer."""

from fastlora.integrations.transformers.formats import check_quantization as check_quantization
from fastlora.integrations.transformers.loading import (
    give_back_bitsandbytes as give_back_bitsandbytes,
)
from fastlora.integrations.transformers.loading import load_bnb_4bit as load_bnb_4bit
from fastlora.integrations.transformers.loading import (
    take_over_bitsandbytes as take_over_bitsandbytes,
)
from fastlora.integrations.transformers.quantizer import NF4Quantizer as NF4Quantizer
from fastlora.integrations.transformers.saving import save_nf4 as save_nf4
from fastlora.integrations.transformers.saving import write_nf4 as write_nf4
from fastlora.integrations.transformers.streaming import FastLoraConfig as FastLoraConfig
from fastlora.integrations.transformers.trainer import OPTIMIZERS as OPTIMIZERS
from fastlora.integrations.transformers.trainer import (
    optimizer_cls_and_kwargs as optimizer_cls_and_kwargs,
)
