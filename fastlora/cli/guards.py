"""What watches over a run: gradients that are not finite, adapters that do not learn, signals."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.cli.console import UserError, note
from fastlora.nn import LoraLinear

MOST_SKIPPED = 8  # steps in a row
_SHOWN = 5  # names in a message


class NonFinite(TrainerCallback):
    """Skips a step whose loss or gradients are not finite, and stops after 8 in a row.

    A skipped step has no gradients, so that weights and moments stay as they are.

    Attributes:
        steps: the skipped ones.
        in_a_row: how many of the last steps were skipped.

    Args:
        scaled: whether a loss scaler is on. It skips the step itself, and needs the gradients.
    """

    steps: list[int]
    in_a_row: int

    def __init__(self, scaled: bool) -> None:
        self.steps = []
        self.in_a_row = 0
        self._scaled = scaled
        self._bad_loss: Tensor | bool = False  # a tensor, so that a GPU is not waited for

    def see(self, loss: Tensor) -> Tensor:
        """Look at the loss of one batch.

        Args:
            loss: scalar.

        Returns:
            The loss, zero where it is not finite: what is logged is the mean of the good ones.
        """
        finite = loss.isfinite()
        self._bad_loss = ~finite | self._bad_loss
        return torch.where(finite, loss, 0.0)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the gradients away from a step that must not happen."""
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        bad_loss, self._bad_loss = bool(self._bad_loss), False
        if not bad_loss and _are_finite([p.grad for p in parameters]):
            self.in_a_row = 0
            return
        step = state.global_step + 1
        self.steps.append(step)
        self.in_a_row += 1
        note("skipped", f"step {step}: {'the loss' if bad_loss else 'a gradient'} is not finite")
        if not self._scaled:
            for parameter in parameters:
                parameter.grad = None
        if self.in_a_row == MOST_SKIPPED:
            raise UserError(
                f"loss and gradients must be finite, got {MOST_SKIPPED} steps in a row that are "
                f"not, up to step {step}; a lower learning rate may help",
                exit_code=1,
            )


class SilentAdapters(TrainerCallback):
    """Stops a run whose adapters do not learn: the commonest silent failure of LoRA training.

    An adapted layer whose forward ran must have a gradient of B after the first step; B starts at
    zero, its gradient does not. Where gradient checkpointing cuts the graph, there is none.

    Args:
        non_finite: tells which steps were skipped.
    """

    def __init__(self, non_finite: NonFinite) -> None:
        self._non_finite = non_finite
        self._ran: set[nn.Module] = set()
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Watch which layers run; a resumed run has shown that it learns."""
        if state.global_step == 0:
            layers = [m for m in kwargs["model"].modules() if isinstance(m, LoraLinear)]
            self._hooks = [layer.register_forward_pre_hook(self._saw) for layer in layers]

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look at the gradients of the first step that was not skipped."""
        if not self._hooks or self._non_finite.in_a_row:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        silent = [name for name, m in kwargs["model"].named_modules() if self._is_silent(m)]
        if silent:
            raise UserError(silence(silent), exit_code=1)

    def _saw(self, layer: nn.Module, _: Any) -> None:
        if layer.training:
            self._ran.add(layer)

    def _is_silent(self, module: nn.Module) -> bool:
        if module not in self._ran or module.active_adapter is None:
            return False
        grad = module.lora_B[module.active_adapter].weight.grad
        return grad is None or not grad.any()


def silence(layers: Sequence[str]) -> str:
    """What is said of a run that trains nothing, or less than was asked for.

    Args:
        layers: names of the adapted layers without a gradient.

    Returns:
        One sentence.
    """
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return (
        f"every adapted layer must learn, got no gradient of B in {', '.join(layers[:_SHOWN])}"
        f"{more}; with gradient checkpointing the model's inputs must ask for gradients"
    )


class Interrupts(TrainerCallback):
    """Ends a run at SIGINT or SIGTERM: while it trains, after the step and with a checkpoint.

    Elsewhere, and at the second signal, it ends at once; but never while something is written.

    Attributes:
        signal: the first that came; None: none did.
    """

    signal: int | None

    def __init__(self) -> None:
        self.signal = None
        self._training = self._writing = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take the signals over for a block, which may raise KeyboardInterrupt."""
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, self._catch) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let a block, in which steps are taken, come to the end of its step."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let a block that writes come to its end."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save and stop, once a signal came."""
        if self.signal is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The same after an evaluation, which comes at the end of a step."""
        self.on_step_end(args, state, control)

    def _catch(self, number: int, _: FrameType | None) -> None:
        first = self.signal is None
        if first:
            self.signal = number
        if self._training and first:
            # a signal may come in the middle of a print, which must not be entered again; and what
            # read stderr may be gone by the same signal
            with suppress(OSError):
                line = b"\n" if os.isatty(2) else b""
                os.write(2, line + b"fastlora: ending this step; once more stops at once\n")
        elif not self._writing:
            raise KeyboardInterrupt


class AllDone(Exception):
    """There is no step left to train."""


class Length(TrainerCallback):
    """Ends a run that goes on at its end: Trainer would train one step more."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Raise `AllDone` where no step is left."""
        if state.global_step >= state.max_steps:
            raise AllDone


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all elements are, with one look at the device."""
    if not tensors:
        return True
    largest = torch._foreach_norm(tensors, torch.inf)
    return bool(torch.stack([norm.float() for norm in largest]).isfinite().all())
