"""What the plugins for training stacks share."""

import logging

from torch import nn

from fastlora.integrations.peft import PatchReport, patch_peft

_log = logging.getLogger(__name__)


def patch_and_log(model: nn.Module) -> PatchReport:
    """Patch a model of PEFT, and tell the log what runs and why the rest does not.

    Args:
        model: as `patch_peft` takes it.

    Returns:
        The report.
    """
    report = patch_peft(model)
    _log.info("%s", report)
    if report.fallbacks:
        _log.warning(
            "%d of %d layers run PEFT's own forward: %s",
            len(report.fallbacks),
            len(report.rows),
            "; ".join(sorted(set(report.fallbacks.values()))),
        )
    return report
