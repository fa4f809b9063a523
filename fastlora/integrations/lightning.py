"""Lightning: a callback that patches the PEFT models in a module before it is fitted.

Adapters of `add_lora` and our optimizers need no callback.

Source: https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html for the hooks.
"""

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    # the same under its older name, which is still published
    from pytorch_lightning import Callback, LightningModule, Trainer

from fastlora.integrations.peft import PatchReport
from fastlora.integrations.stacks import patch_and_log


class FastLora(Callback):
    """Patches the models of PEFT in a module when fitting begins.

    Attributes:
        report: what was patched, and why not the rest; None before the first fit.
    """

    report: PatchReport | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patch the module, and tell the log what runs.

        Args:
            trainer: that fits it.
            pl_module: with a model of PEFT in it.
        """
        self.report = patch_and_log(pl_module)
