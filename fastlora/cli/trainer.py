"""transformers' Trainer, told how this project saves, evaluates and watches a run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import fastlora
from fastlora.atomic import replaced_folder
from fastlora.cli import checkpoints
from fastlora.cli.console import UserError, reported
from fastlora.cli.encoding import Dataset
from fastlora.cli.evaluation import score
from fastlora.cli.guards import Interrupts, NonFinite, SilentAdapters, silence
from fastlora.cli.models import Base
from fastlora.nn import LoraLinear


class AdapterTrainer(Trainer):
    """Trains the active adapter of a model.

    A checkpoint holds the adapter instead of the model, is written under another name and renamed
    when it is complete. Evaluation is that of `fastlora eval`.

    Args:
        base: a model with an adapter.
        scored: what is evaluated on.
        keep: checkpoints to keep.
        grouped: whether batches are of examples of about the same length.
        interrupts: held off while a checkpoint is written.
        digest: of the training examples, kept with each checkpoint.
        callbacks: further ones.
        **kwargs: Trainer's own.
    """

    def __init__(
        self,
        base: Base,
        scored: Dataset,
        keep: int,
        grouped: bool,
        interrupts: Interrupts,
        digest: str,
        callbacks: list[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        self.non_finite = NonFinite(scaled=kwargs["args"].fp16)
        guards = [self.non_finite, SilentAdapters(self.non_finite), interrupts]
        super().__init__(model=base.model, callbacks=[*guards, *callbacks], **kwargs)
        # prints a dictionary per log
        self.remove_callback(PrinterCallback)
        self._base, self._scored = base, scored
        self._keep, self._grouped = keep, grouped
        self._interrupts, self._digest = interrupts, digest
        self._run_folder = self._save_to = Path(self.args.output_dir)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one batch; see `Trainer.training_step`."""
        return self.non_finite.see(super().training_step(model, inputs, num_items_in_batch))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
        """The loss of one batch; see `Trainer.compute_loss`."""
        loss = super().compute_loss(model, inputs, **kwargs)
        if not (loss[0] if isinstance(loss, tuple) else loss).requires_grad:
            layers = [n for n, m in model.named_modules() if isinstance(m, LoraLinear)]
            raise UserError(silence(layers), exit_code=1)
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score examples as `evaluation.score`; see `Trainer.evaluate`."""
        scores = score(self._base, self._scored, self.args.eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log({**metrics})  # adds to what it is given
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def load_best(self) -> int | None:
        """Take the adapter of the best evaluation.

        Returns:
            Its step; None where nothing was evaluated.
        """
        step = self.state.best_global_step
        if step is not None:
            self._load_from_checkpoint(str(checkpoints.folder_of(self._run_folder, step)))
        return step

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        # the best adapter is kept, whatever the cadence of checkpoints
        self.control.should_save |= better
        return better

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self._grouped:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        return _GroupedByLength(size, lengths=lengths, seed=self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        fastlora.save_adapter(self.model, output_dir or self._run_folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        fastlora.load_adapter(self.model, resume_from_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = checkpoints.folder_of(self._run_folder, self.state.global_step)
        if target.exists():  # the last step of a run is saved once
            return
        # full disks, and weights that are not finite
        failures = reported(OSError, RuntimeError, ValueError, about=f"{target}: ", exit_code=1)
        with self._interrupts.writing(), failures:
            with replaced_folder(target) as folder:
                self._save_to = folder
                super()._save_checkpoint(model, trial)
                self._save_to = self._run_folder
                # Trainer makes a folder of that name in the one that it is told
                for file in (folder / target.name).iterdir():
                    file.rename(folder / file.name)
                (folder / target.name).rmdir()
                checkpoints.seal(folder, self._digest)
            checkpoints.prune(self._run_folder, self._keep, self.state.best_global_step)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_to)


class _GroupedByLength(LengthGroupedSampler):
    """Draws by seed and epoch, so that a run that goes on sees the rest of the very same order."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.generator = torch.Generator().manual_seed(self._seed + epoch)
