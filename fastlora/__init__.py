"""fastlora: kernel-level LoRA and QLoRA with drop-in linear layers."""

from fastlora import nn, ops
from fastlora.nf4 import NF4Weight, dequantize_nf4, quantize_nf4

__all__ = ["NF4Weight", "dequantize_nf4", "nn", "ops", "quantize_nf4"]
