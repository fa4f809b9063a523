"""Optimizers for adapters: fused, with 8-bit and with paged moments."""

from fastlora.optim.arena import StateArena as StateArena
from fastlora.optim.budget import MemoryBudgetError as MemoryBudgetError
from fastlora.optim.devices import Device as Device
from fastlora.optim.groups import lora_plus_groups as lora_plus_groups
from fastlora.optim.optimizer import AdamW as AdamW
from fastlora.optim.optimizer import AdamW8bit as AdamW8bit
from fastlora.optim.optimizer import PagedAdamW as PagedAdamW
from fastlora.optim.optimizer import PagedAdamW8bit as PagedAdamW8bit
from fastlora.optim.optimizer import StateMemory as StateMemory
from fastlora.optim.optimizer import to_bitsandbytes as to_bitsandbytes
from fastlora.optim.pool import PagePool as PagePool
from fastlora.optim.pool import PoolStats as PoolStats
