"""What stops or skips in a training that goes wrong: gradients, adapters that do not learn."""

import json

import pytest
import torch
from cli_helpers import invoke, one_line, records, save_tiny_classifier, save_tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState

import fastlora
from fastlora.cli import checkpoints, training
from fastlora.cli.console import UserError
from fastlora.cli.guards import MOST_SKIPPED, NonFinite, SilentAdapters
from fastlora.cli.trainer import AdapterTrainer
from fastlora.nn import LoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("--lr", "1e-2", "--rank", "4", "--dtype", "fp32", "--warmup", "0", "--batch-size", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text('{"prompt": "one", "completion": "two"}\n' * 4)
    return path


@pytest.fixture
def spoiled(monkeypatch):
    """Change the loss of the steps that a test names."""

    def spoil(change, steps):
        right = AdapterTrainer.compute_loss

        def loss(trainer, *args, **kwargs):
            value = right(trainer, *args, **kwargs)
            return change(value) if trainer.state.global_step + 1 in steps else value

        monkeypatch.setattr(AdapterTrainer, "compute_loss", loss)

    return spoil


# --- steps that are not finite ---------------------------------------------------------------


def nan_loss(loss):
    return loss * torch.nan


def inf_loss(loss):
    return loss * torch.inf


def nan_gradient(loss):
    """The same loss; the root of zero has no finite slope."""
    return loss + (loss * 0).sqrt()


@pytest.mark.parametrize("change", [nan_loss, inf_loss, nan_gradient])
def test_a_step_that_is_not_finite_is_skipped_and_counted(change, spoiled, model, data, tmp_path):
    spoiled(change, {2, 3, 6})
    words = ("--steps", "7", "--clip", "0", "--save-steps", "1", "--keep", "9")
    result = invoke("train", model, data, "-o", tmp_path, *OPTIONS, *words)
    assert result.exit_code == 0, result.stderr
    steps = records(tmp_path)
    assert [r["skipped"] for r in steps] == [0, 1, 1, 0, 0, 1, 0]
    assert "3 steps skipped" in result.stdout
    what = "a gradient" if change is nan_gradient else "the loss"
    assert f"step 2: {what} is not finite" in result.stdout
    assert [r["loss"] is None for r in steps] == [bool(r["skipped"]) for r in steps]
    states = [torch.load(tmp_path / f"checkpoint-{n}" / "optimizer.pt") for n in range(1, 8)]
    # neither weights nor moments nor Adam's count moved in a skipped step
    for before, after in ((0, 1), (1, 2), (4, 5)):
        (one,), (other,) = (states[i]["state"]["runs"] for i in (before, after))
        assert one["steps"] == other["steps"]
        assert all(torch.equal(one[name], other[name]) for name in ("exp_avg", "exp_avg_sq"))
        assert weights(tmp_path, before + 1) == weights(tmp_path, after + 1)
    assert {*states[-1]["state"]["runs"][0]["steps"]} == {4}
    assert weights(tmp_path, 3) != weights(tmp_path, 4)


def weights(output, step):
    tensors = load_file(checkpoints.folder_of(output, step) / "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_losses_of_skipped_steps_are_not_in_the_mean(spoiled, model, data, tmp_path):
    words = ("--steps", "4", "--logging-steps", "4", "--lr", "0", *OPTIONS[2:])
    assert invoke("train", model, data, "-o", tmp_path / "a", *words).exit_code == 0
    spoiled(nan_loss, {2})
    assert invoke("train", model, data, "-o", tmp_path / "b", *words).exit_code == 0
    (whole,), (holed,) = records(tmp_path / "a"), records(tmp_path / "b")
    assert holed["skipped"] == 1
    assert holed["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_eight_skipped_steps_in_a_row_stop_the_run(spoiled, model, data, tmp_path):
    spoiled(nan_loss, {2, *range(4, 20)})
    words = ("--steps", "30", "--save-steps", "1")
    result = invoke("train", model, data, "-o", tmp_path, *OPTIONS, *words)
    assert result.exit_code == 1
    last = 3 + MOST_SKIPPED
    assert f"got 8 steps in a row that are not, up to step {last}" in one_line(result)
    # the last good adapter is there
    newest = checkpoints.newest(tmp_path)
    assert checkpoints.step_of(newest) == last - 1
    base = fastlora.cli.models.load(
        fastlora.cli.models.find(str(model)), training.TrainSettings(dtype="fp32")
    )
    fastlora.load_adapter(base.model, newest)


def test_weights_that_are_not_finite_are_not_saved(model, data, tmp_path, monkeypatch):
    right = training._arguments

    def infinite(*args):
        arguments = right(*args)
        arguments.learning_rate = float("inf")
        return arguments

    monkeypatch.setattr(training, "_arguments", infinite)
    result = invoke("train", model, data, "-o", tmp_path, "--steps", "5", *OPTIONS)
    assert result.exit_code == 1
    assert "must be finite, got" in one_line(result)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_loss_scaler_skips_by_itself():
    """It looks at the gradients in its own step, so they stay."""
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), torch.inf)
    guard = NonFinite(scaled=True)
    guard.on_pre_optimizer_step(None, TrainerState(), TrainerControl(), model=layer)
    assert guard.steps == [1]
    assert layer.weight.grad is not None


# --- adapters that do not learn --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointing_that_cuts_the_graph_stops_the_run(tmp_path, monkeypatch):
    """The head of a classifier trains, so that nothing else would tell."""
    folder = save_tiny_classifier(tmp_path / "model")
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"one {i}", "label": i % 2} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def cut(model, **kwargs):
        model.activation_checkpointing_enable({"use_reentrant": True})
        # what this version of transformers does by itself, and others did not
        model.disable_input_require_grads()

    monkeypatch.setattr(fastlora, "prepare_for_training", cut)
    result = invoke("train", folder, path, "-o", tmp_path / "out", *OPTIONS, "--steps", "3")
    assert result.exit_code == 1
    message = one_line(result)
    assert "every adapted layer must learn, got no gradient of B in bert.encoder.layer.0" in message
    assert "and 7 more" in message
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_loss_without_gradient_stops_the_run(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        fastlora, "prepare_for_training", lambda model, **_: model.requires_grad_(False)
    )
    result = invoke("train", model, data, "-o", tmp_path, *OPTIONS, "--steps", "3")
    assert result.exit_code == 1
    assert "every adapted layer must learn" in one_line(result)


def test_one_silent_layer_is_named(model, data, tmp_path, monkeypatch):
    right = fastlora.prepare_for_training

    def silenced(model, **kwargs):
        right(model, **kwargs)
        weight = model.model.layers[1].mlp.up_proj.lora_B["default"].weight
        weight.register_hook(torch.zeros_like)

    monkeypatch.setattr(fastlora, "prepare_for_training", silenced)
    result = invoke("train", model, data, "-o", tmp_path, *OPTIONS, "--steps", "3")
    assert result.exit_code == 1
    assert "got no gradient of B in model.layers.1.mlp.up_proj;" in one_line(result)
    assert len(records(tmp_path)) == 0


class Routed(nn.Module):
    """Two experts, of which one may not be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(LoraLinear(nn.Linear(4, 4), r=2) for _ in range(2))

    def forward(self, x, expert):
        return self.experts[expert](x)


@pytest.fixture
def watch():
    """Train a step of a module under the guard."""

    def step(module, *args, skip=False, silent=None, begin=True):
        guard = NonFinite(scaled=False)
        silent = silent or SilentAdapters(guard)
        state, control = TrainerState(), TrainerControl()
        if begin:
            silent.on_train_begin(None, state, control, model=module)
        module(*args).sum().backward()
        silent._non_finite.in_a_row = int(skip)
        silent.on_optimizer_step(None, state, control, model=module)
        return silent

    return step


def test_a_layer_that_did_not_run_is_not_silent(watch):
    module = Routed()
    watch(module, torch.randn(3, 4), 0)
    assert not module.experts[0]._forward_pre_hooks, "groups are off where a layer has hooks"
    assert module.experts[1].lora_B["default"].weight.grad is None


def test_evaluation_before_the_first_step_is_no_training(watch):
    module = Routed()
    guard = SilentAdapters(NonFinite(scaled=False))
    guard.on_train_begin(None, TrainerState(), TrainerControl(), model=module)
    module.eval()(torch.randn(3, 4), 1)
    watch(module.train(), torch.randn(3, 4), 0, silent=guard, begin=False)


def test_a_skipped_first_step_is_not_judged(watch):
    module = Routed()
    guard = watch(module, torch.randn(3, 4), 0, skip=True)
    assert module.experts[0]._forward_pre_hooks
    module.zero_grad()
    with pytest.raises(UserError, match=r"got no gradient of B in experts\.0"):
        watch(module, torch.zeros(3, 4), 0, silent=guard, begin=False)
