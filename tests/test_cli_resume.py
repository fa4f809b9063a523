"""Checkpoints of `fastlora train`: interruption, resuming, damage, and death while saving."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import FASTLORA, invoke, one_line, records, run, save_tiny_model
from safetensors.torch import load_file

import fastlora
from fastlora.cli import checkpoints
from fastlora.cli.guards import Interrupts
from fastlora.cli.trainer import AdapterTrainer

# dropout draws random numbers at every step, and few examples make many epochs
OPTIONS = ("--lr", "1e-2", "--rank", "4", "--dropout", "0.3", "--dtype", "fp32", "--warmup", "0")
GROUPED = ("--group-by-length", "--accumulation", "2", "--scheduler", "cosine")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": "one " * (i % 4 + 1), "completion": f"two {i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def start(model, data, environment):
    """Start the installed command on the tiny model, and wait until it has trained some steps."""

    def started(output, *words, after):
        command = [FASTLORA, "train", model, data, "-o", output, *OPTIONS, *words]
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        metrics = output / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > after):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        return process

    return started


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(output):
    return [record["loss"] for record in records(output)]


def assert_same_run(one, other):
    """Losses to the bit, and the adapter's tensors."""
    assert losses(one) == losses(other)
    assert [r["tokens"] for r in records(one)] == [r["tokens"] for r in records(other)]
    ours, theirs = (load_file(output / "adapter_model.safetensors") for output in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- interruption ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, ("--batch-size", "3")), (signal.SIGTERM, GROUPED)]
)
def test_interrupted_run_goes_on_with_the_very_same_losses(
    number, words, model, data, start, environment, tmp_path
):
    """Through the installed command, each in a process of its own."""
    words = ("--batch-size", "2", *words, "--steps", "120")
    whole = invoke("train", model, data, "-o", tmp_path / "whole", *OPTIONS, *words)
    assert whole.exit_code == 0, whole.stderr
    process = start(tmp_path / "parts", *words, after=25)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    notice, message = errors.splitlines()
    assert notice == "fastlora: ending this step; once more stops at once"
    step = checkpoints.step_of(checkpoints.newest(tmp_path / "parts"))
    assert 25 <= step < 120
    resume = f"fastlora train --resume --output {tmp_path / 'parts'}"
    assert message == f"fastlora: interrupted, saved at step {step}; to go on: {resume}"
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[:step]

    resumed = run(*resume.split()[1:], env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr == ""
    assert f"checkpoint-{step}" in resumed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    before, after = records(tmp_path / "parts", "eval_loss")
    assert (before["step"], after["step"]) == (0, 120)


def test_more_signals_stop_at_once_and_corrupt_nothing(start, tmp_path):
    process = start(tmp_path, "--steps", "3000", "--save-steps", "1", after=30)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    _, errors = process.communicate(timeout=60)
    newest = checkpoints.newest(tmp_path)
    assert checkpoints.step_of(newest) >= 30
    assert f"saved at step {checkpoints.step_of(newest)}; to go on: fastlora train" in errors
    # the last ones may hit the exit itself, between two of Python's own instructions
    assert process.returncode in (130, -signal.SIGINT)


def test_killed_while_saving_goes_on_with_the_very_same_losses(model, data, start, tmp_path):
    """SIGKILL at a random moment of a run that does hardly anything but save."""
    words = ("--batch-size", "4", "--steps", "60")
    whole = invoke("train", model, data, "-o", tmp_path / "whole", *OPTIONS, *words)
    assert whole.exit_code == 0, whole.stderr
    killed = tmp_path / "killed"
    process = start(killed, *words, "--save-steps", "1", after=12)
    process.kill()
    process.communicate()
    resumed = invoke("train", "--resume", "-o", killed)
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_run(tmp_path / "whole", killed)
    assert not [*killed.glob(".*")], "what the killed process left is gone"


def test_killing_at_any_moment_of_saving_leaves_a_loadable_checkpoint(tmp_path):
    """50 processes that save without end, killed at random moments."""
    script = Path(__file__).with_name("kill_while_checkpointing.py")
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 kills, 0 unloadable" in done.stdout


def test_every_optimizer_goes_on_to_the_bit(tmp_path):
    """Killed and resumed; in a process of its own, as it forks."""
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same to the bit") == 4


# --- resuming --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A run of 11 steps, in the middle of an epoch, with checkpoints at 4, 8 and 11."""
    output = tmp_path_factory.mktemp("run") / "out"
    words = ("--steps", "11", "--save-steps", "4", "--keep", "3", "--batch-size", "4")
    result = invoke("train", model, data, "-o", output, *OPTIONS, *words)
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_checkpoints_are_sealed_and_kept_by_number(finished, model, data, tmp_path):
    names = sorted(p.name for p in finished.glob("checkpoint-*"))
    assert names == ["checkpoint-11", "checkpoint-4", "checkpoint-8"]
    for name in names:
        assert not checkpoints.damage(finished / name)
    sums = json.loads((finished / "checkpoint-11" / checkpoints.MANIFEST).read_text())
    there = {p.name for p in (finished / "checkpoint-11").iterdir()}
    assert there == {*sums["files"], checkpoints.MANIFEST}
    assert there >= {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"}
    words = ("--steps", "11", "--save-steps", "2", "--keep", "1", "--batch-size", "4")
    assert invoke("train", model, data, "-o", tmp_path, *OPTIONS, *words).exit_code == 0
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-11"]


def damage_nothing(folder):
    folder.with_name("checkpoint-99").mkdir()


def flip_a_bit(folder):
    file = folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def lose_a_file(folder):
    (folder / "scheduler.pt").unlink()


def lose_the_manifest(folder):
    (folder / checkpoints.MANIFEST).unlink()


def garble_the_manifest(folder):
    (folder / checkpoints.MANIFEST).write_text('{"optimizer.pt": 3}')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage_nothing, f"checkpoint-99 over: no {checkpoints.MANIFEST}"),
        (flip_a_bit, "checkpoint-11 over: optimizer.pt is not what was written"),
        (cut_short, "checkpoint-11 over: adapter_model.safetensors must be"),
        (lose_a_file, "checkpoint-11 over: no scheduler.pt"),
        (lose_the_manifest, f"checkpoint-11 over: no {checkpoints.MANIFEST}"),
        (garble_the_manifest, f"checkpoint-11 over: {checkpoints.MANIFEST} is damaged"),
    ],
)
def test_incomplete_checkpoints_are_passed_over(harm, reason, finished, copied):
    harm(copied / "checkpoint-11")
    result = invoke("train", "--resume", "-o", copied)
    assert result.exit_code == 0, result.stderr
    assert reason in result.stdout
    from_step = 11 if harm is damage_nothing else 8
    assert f"from {copied / f'checkpoint-{from_step}'}" in result.stdout
    assert_same_run(finished, copied)


def test_a_run_of_which_all_is_done_may_be_finished_again(finished, copied):
    (copied / "adapter_model.safetensors").unlink()
    (copied / "loss.png").unlink()
    # as a process leaves it that dies in the middle of a line
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    assert invoke("train", "--resume", "-o", copied).exit_code == 0
    assert_same_run(finished, copied)
    assert (copied / "loss.png").stat().st_size > 10_000


def test_a_run_may_be_made_longer(copied):
    result = invoke("train", "--resume", "-o", copied, "--steps", "15")
    assert result.exit_code == 0, result.stderr
    assert [r["step"] for r in records(copied)] == [*range(1, 16)]
    shorter = invoke("train", "--resume", "-o", copied, "--steps", "3")
    assert shorter.exit_code == 2
    assert "steps must be at least those that are done, 15, got 3" in one_line(shorter)


def test_a_run_may_go_on_paged_and_back(finished, copied, tmp_path):
    """As after running out of memory; the results are the same to the bit."""
    checkpoints.clear(copied, after=4)
    words = ("--optim", "paged_adamw", "--page-budget", "128KiB", "--page-folder", tmp_path)
    paged = invoke("train", "--resume", "-o", copied, *words)
    assert paged.exit_code == 0, paged.stderr
    assert "66 kB in pages, 8 bytes a trained weight" in paged.stdout
    assert "1 frames for 1 pages" in paged.stdout
    assert_same_run(finished, copied)
    checkpoints.clear(copied, after=8)
    back = invoke("train", "--resume", "-o", copied, "--optim", "adamw")
    assert back.exit_code == 0, back.stderr
    assert "66 kB resident, 8 bytes a trained weight" in back.stdout
    assert_same_run(finished, copied)
    other = invoke("train", "--resume", "-o", copied, "--optim", "adamw8bit")
    assert other.exit_code == 2
    assert "optim must be that of the run to resume, adamw, got adamw8bit" in one_line(other)


def test_early_stopping_counts_on_and_the_best_adapter_is_kept(model, data, tmp_path):
    """Without a learning rate nothing gets better than the first evaluation."""
    words = ("--eval-share", "0.3", "--eval-steps", "2", "--early-stopping", "3")
    words += ("--save-steps", "2", "--keep", "9", "--steps", "40", *OPTIONS, "--lr", "0")
    assert invoke("train", model, data, "-o", tmp_path, *words).exit_code == 0
    assert [r["step"] for r in records(tmp_path, "eval_loss")] == [0, 2, 4, 6, 8]
    checkpoints.clear(tmp_path, after=6)
    result = invoke("train", "--resume", "-o", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert [r["step"] for r in records(tmp_path)] == [*range(1, 9)]
    assert "the adapter of step 2 is kept" in result.stdout


def test_records_between_two_logs_are_the_same(model, data, tmp_path):
    words = ("--steps", "10", "--logging-steps", "4", "--save-steps", "3", "--keep", "9")
    assert invoke("train", model, data, "-o", tmp_path, *OPTIONS, *words).exit_code == 0
    before = losses(tmp_path)
    assert [r["step"] for r in records(tmp_path)] == [3, 4, 6, 8, 9, 10]
    checkpoints.clear(tmp_path, after=6)
    assert invoke("train", "--resume", "-o", tmp_path).exit_code == 0
    assert losses(tmp_path) == before


def test_other_examples_are_refused(copied, tmp_path):
    settings = copied / "settings.yaml"
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(json.dumps({"prompt": "one", "completion": "two"}))
    lines = [
        f"data: {fewer}" if "data:" in line else line for line in settings.read_text().split("\n")
    ]
    settings.write_text("\n".join(lines))
    result = invoke("train", "--resume", "-o", copied, "--steps", "20")
    assert result.exit_code == 2
    assert "data must have the examples that the run began with" in one_line(result)


@pytest.mark.parametrize(
    "moment", ["scoring first", "an evaluation", "the last save", "scoring last"]
)
def test_interrupts_at_other_moments(moment, model, data, tmp_path, monkeypatch):
    """The same process; what a signal may hit is made to raise it."""
    words = ("--steps", "6", "--eval-share", "0.2", "--eval-steps", "3", "--early-stopping", "9")
    calls = {"evaluate": 0}
    evaluate, save = AdapterTrainer.evaluate, fastlora.save_adapter
    # the best adapter is another than the last, so that it is loaded; its score is on record
    at = {"scoring first": 1, "an evaluation": 2, "scoring last": 4}.get(moment)

    def evaluating(trainer, *args, **kwargs):
        calls["evaluate"] += 1
        if calls["evaluate"] == at:
            signal.raise_signal(signal.SIGINT)
        return evaluate(trainer, *args, **kwargs)

    def saving(root, folder, *args):
        if moment == "the last save" and Path(folder) == tmp_path:
            signal.raise_signal(signal.SIGINT)
        return save(root, folder, *args)

    monkeypatch.setattr(AdapterTrainer, "evaluate", evaluating)
    monkeypatch.setattr(fastlora, "save_adapter", saving)
    if moment == "scoring last":
        words = ("--steps", "6")  # the training examples are scored after the last step
        at = 2
    result = invoke("train", model, data, "-o", tmp_path, *OPTIONS, *words)
    assert result.exit_code == 130
    if moment == "scoring first":
        assert one_line(result) == "fastlora: interrupted before the first checkpoint\n"
        return
    step = 3 if moment == "an evaluation" else 6
    assert f"interrupted, saved at step {step}; to go on: fastlora train" in one_line(result)
    if moment != "an evaluation":
        assert (tmp_path / "adapter_config.json").exists()
    monkeypatch.undo()
    resumed = invoke("train", "--resume", "-o", tmp_path)
    assert resumed.exit_code == 0, resumed.stderr
    assert [r["step"] for r in records(tmp_path)] == [*range(1, 7)]
    assert not [*tmp_path.glob(".*")]


def test_a_reader_that_goes_away_ends_no_training(model, data, environment, tmp_path):
    """As `fastlora train ... 2>&1 | head -1` leaves it, and tee at Ctrl-C."""
    command = [FASTLORA, "train", model, data, "-o", tmp_path, *OPTIONS, "--steps", "4"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "loss.png").exists()


def test_a_signal_whose_notice_nobody_reads(monkeypatch):
    def gone(*args):
        raise BrokenPipeError

    guard = Interrupts()
    monkeypatch.setattr("os.write", gone)
    with guard.caught(), guard.training():
        signal.raise_signal(signal.SIGINT)
    assert guard.signal == signal.SIGINT


def test_what_cannot_be_resumed_is_refused(copied, model, tmp_path):
    nothing = invoke("train", "--resume", "-o", tmp_path / "none")
    assert nothing.exit_code == 2
    assert "resume must have a complete checkpoint, got none in" in one_line(nothing)
    other = invoke("train", "--resume", "-o", copied, "--lr", "1")
    assert other.exit_code == 2
    assert "lr must be that of the run to resume, 0.01, got 1.0" in one_line(other)
    both = invoke("train", "--resume", "--overwrite", "-o", copied)
    assert "resume and overwrite must not both be given" in one_line(both)
    shorter = invoke("train", "--resume", "-o", copied, "--epochs", "0.5")
    assert "epochs must be at least those that are done" in one_line(shorter)
    same = invoke("train", model, "--resume", "-o", copied, "--lr", "1e-2")
    assert same.exit_code == 0


def test_a_new_run_leaves_nothing_of_an_old_one_behind(copied, model, data):
    words = ("--steps", "2", "--batch-size", "4", *OPTIONS)
    refused = invoke("train", model, data, "-o", copied, *words)
    assert refused.exit_code == 2
    assert "--overwrite replaces what is in it, --resume goes on with it" in one_line(refused)
    assert (copied / "checkpoint-11").exists()
    assert invoke("train", model, data, "-o", copied, *words, "--overwrite").exit_code == 0
    assert [p.name for p in copied.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(losses(copied)) == 2


def test_a_failed_save_is_one_line_and_keeps_what_there_is(copied, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    result = invoke("train", "--resume", "-o", copied, "--steps", "20")
    assert result.exit_code == 1
    assert "No space left on device" in one_line(result)
    assert checkpoints.newest(copied).name == "checkpoint-11"
    assert not [*copied.glob(".*")]


def test_without_its_settings_a_run_is_not_resumed(copied):
    (copied / "settings.yaml").unlink()
    result = invoke("train", "--resume", "-o", copied)
    assert result.exit_code == 2
    assert "resume must have the settings of the run" in one_line(result)


def test_the_best_adapter_is_kept(model, data, tmp_path):
    """A learning rate that soon ruins what was learnt."""
    words = (
        "--eval-share",
        "0.3",
        "--eval-steps",
        "2",
        "--early-stopping",
        "1",
        "--save-steps",
        "9",
    )
    words += ("--steps", "60", "--keep", "1", *OPTIONS, "--lr", "1")
    result = invoke("train", model, data, "-o", tmp_path, *words)
    assert result.exit_code == 0, result.stderr
    scores = {r["step"]: r["eval_loss"] for r in records(tmp_path, "eval_loss")}
    assert all(step % 2 == 0 for step in scores), "the best is not scored again as the last"
    step = min(scores, key=scores.get)
    assert step == max(scores) - 2
    ours, best = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / f"checkpoint-{step}")
    )
    assert all(torch.equal(ours[key], best[key]) for key in ours)
    assert f"{scores[step]:.4f}" in result.stdout
    assert f"the adapter of step {step} is kept" in result.stdout
