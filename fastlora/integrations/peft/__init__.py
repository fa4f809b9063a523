"""PEFT: its LoRA layers run on `fastlora.ops`, by another class of the same modules.

Nothing is added to a layer: parameters, keys, files and PEFT's own methods stay what they are.
"""

import peft

# before it a config did not say what is more than plain LoRA
if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20):
    raise RuntimeError(f"patching PEFT needs version 0.20 or newer, got {peft.__version__}")

from fastlora.integrations.peft.patch import patch_peft as patch_peft
from fastlora.integrations.peft.patch import unpatch_peft as unpatch_peft
from fastlora.integrations.peft.report import PatchReport as PatchReport
from fastlora.integrations.peft.switch import disable as disable
from fastlora.integrations.peft.switch import enable as enable
