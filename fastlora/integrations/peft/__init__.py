"""PEFT: its LoRA layers run on `fastlora.ops`, by another class of the same modules.

Nothing is added to a layer: parameters, keys, files and PEFT's own methods stay what they are.
"""

from fastlora.integrations.peft.patch import patch_peft as patch_peft
from fastlora.integrations.peft.patch import unpatch_peft as unpatch_peft
from fastlora.integrations.peft.report import PatchReport as PatchReport
from fastlora.integrations.peft.switch import disable as disable
from fastlora.integrations.peft.switch import enable as enable
