"""`fastlora generate` on a tiny model: what is asked, what is chosen, what is written."""

import json
import signal

import pytest
import torch
from cli_helpers import invoke, one_line, run, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

from fastlora.cli import encoding, generation, runs
from fastlora.cli.settings import TrainSettings

OPTIONS = ("--lr", "1e-2", "--batch-size", "4", "--rank", "8", "--warmup", "0", "--dtype", "fp32")
PAIRS = {"one": "two three", "four": "five six", "seven": "eight nine", "ten": "done"}
CHAT = (
    "{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def model(folder):
    torch.manual_seed(0)
    return save_tiny_model(folder / "tiny")


@pytest.fixture(scope="module")
def adapter(model, folder):
    """A run that learns four lines by heart."""
    rows = [{"prompt": p, "completion": c} for p, c in PAIRS.items()]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("train", model, data, "-o", folder / "run", "--steps", "50", *OPTIONS)
    assert result.exit_code == 0, result.stdout + result.stderr
    return folder / "run"


@pytest.fixture
def base(model, adapter):
    """Loaded anew, as tests change it."""
    return runs.load(TrainSettings.load(adapter), adapter)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- prompts ---------------------------------------------------------------------------------


def test_a_prompt_is_answered_on_stdout_alone(adapter, model):
    for words in ((), (model,)):
        result = invoke("generate", *words, "--adapter", adapter, "--prompt", "one")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == "two three\n"
        assert result.stderr == ""
    short = invoke("generate", "--adapter", adapter, "--prompt", "one", "--max-new-tokens", "1")
    assert "two three\n".startswith(short.stdout.strip())
    assert len(short.stdout) < len("two three\n")


def test_a_file_of_prompts(adapter, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nseven\n")
    words = ("generate", "--adapter", adapter, "--prompts", prompts)
    result = invoke(*words, "-o", tmp_path / "x.jsonl")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "one\ntwo three\nseven\neight nine\n"
    assert rows_of(tmp_path / "x.jsonl") == [
        {"prompt": "one", "completion": "two three"},
        {"prompt": "seven", "completion": "eight nine"},
    ]
    again = invoke(*words, "-o", tmp_path / "x.jsonl")
    assert again.exit_code == 2
    assert "output must be a new file" in one_line(again)
    assert len(rows_of(tmp_path / "x.jsonl")) == 2
    assert invoke(*words).exit_code == 0


def test_fields_of_a_file_are_those_of_the_run_or_given(adapter, tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("question,x\nten,1\n")
    words = ("generate", "--adapter", adapter, "--prompts", prompts)
    assert "must have either prompt or messages" in one_line(invoke(*words))
    assert invoke(*words, "--fields", "prompt=question").stdout == "ten\ndone\n"
    # a run on files with other columns, of which prompts have only the first
    settings = TrainSettings.load(adapter, fields="prompt=question,completion=answer")
    for file in adapter.glob("adapter_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings.save(tmp_path)
    assert invoke("generate", "--adapter", tmp_path, "--prompts", prompts).exit_code == 0
    text = tmp_path / "prompts.txt"
    text.write_text("ten")
    assert invoke("generate", "--adapter", tmp_path, "--prompts", text).stdout == "ten\ndone\n"


@pytest.fixture(scope="module")
def chatty(model, folder):
    """A model whose chat template ends a turn with a token that does not end a text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    target = folder / "chatty"
    bigger = AutoModelForCausalLM.from_pretrained(model)
    bigger.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # the head is frozen, and must be able to say the new tokens
    torch.nn.init.normal_(bigger.lm_head.weight[-2:].data, std=0.3)
    bigger.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_a_conversation_ends_where_the_template_ends_a_turn(chatty, tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps({"messages": turns}))
    output = tmp_path / "run"
    result = invoke("train", chatty, data, "-o", output, "--steps", "40", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    base = runs.load(TrainSettings.load(output), output)
    end = base.tokenizer.convert_tokens_to_ids("<end>")
    assert end not in generation._stops(base, "{prompt}", "one")
    for template, prompt in (("chat", "one"), ("{prompt}", turns[:1])):
        assert end in generation._stops(base, template, prompt)
    # what the file says the assistant answered is not shown to it
    answered = invoke("generate", "--adapter", output, "--prompts", data, "-o", tmp_path / "y")
    assert answered.exit_code == 0, answered.stderr
    assert answered.stdout == "user: one\ntwo three\n"
    assert rows_of(tmp_path / "y") == [{"messages": turns[:1], "completion": "two three"}]
    same = invoke("generate", "--adapter", output, "--prompt", "one", "--template", "chat")
    assert same.stdout == "two three\n"


def test_a_template_without_a_token_for_the_end_of_a_turn(base):
    base.tokenizer.chat_template = CHAT.replace("<end>", "").replace("<turn>", "")
    assert generation._end_of_turn(base) is None
    assert generation._stops(base, "chat", "one") == [base.tokenizer.eos_token_id]
    base.tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert generation._end_of_turn(base) is None


# --- choice of tokens ------------------------------------------------------------------------


def test_many_prompts_at_once_are_answered_as_each_alone(base):
    prompts = [*PAIRS, "one two three four"]
    alone = [generation.complete(base, [p], r"{prompt}\n", 6, 1)[0] for p in prompts]
    done = []
    assert generation.complete(base, prompts, r"{prompt}\n", 6, 3, done.append) == alone
    assert done == [3, 2]
    assert alone[:4] == [*PAIRS.values()]


def test_greedy_is_greedy_whatever_the_model_says(base, capsys):
    """Many a model comes with a repetition penalty, a temperature and more tokens that end."""
    ids = torch.tensor([encoding.prompt_ids(base.tokenizer, "{prompt}", "one two")])
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            best = base.model(expected).logits[0, -1].argmax()
            if best == base.tokenizer.eos_token_id:
                break
            expected = torch.cat([expected, best.reshape(1, 1)], 1)
    text = base.tokenizer.decode(expected[0, ids.shape[1] :])
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=3, max_length=4)
    base.model.generation_config = own
    base.model.config.use_cache = False
    assert generation.complete(base, ["one two"], "{prompt}", 12, 1) == [text]
    assert generation.stream(base, "one two", "{prompt}", 12) == text
    assert capsys.readouterr().out == text + "\n"
    assert base.model.generation_config is own
    # but for where it ends: the sixth token, from now on
    sixth = expected[0, ids.shape[1] + 1].item()
    own.eos_token_id = [sixth]
    assert generation.complete(base, ["one two"], "{prompt}", 12, 1)[0] != text


def test_what_is_drawn(model):
    def answer(*words):
        result = invoke(
            *("generate", model, "--prompt", "one", "--max-new-tokens", "8", "--dtype", "fp32"),
            *words,
        )
        assert result.exit_code == 0, result.stderr
        return result.stdout

    greedy = answer()
    hot = ("--temperature", "3")
    assert answer(*hot) == answer(*hot) != answer(*hot, "--seed", "1")
    assert answer(*hot) != greedy
    assert answer(*hot, "--top-p", "1e-6") == greedy == answer("--temperature", "1e-4")


# --- when something goes wrong ---------------------------------------------------------------


def test_an_interruption_keeps_what_was_answered(adapter, tmp_path, monkeypatch):
    texts, written = [], []
    output = tmp_path / "x.jsonl"

    class Interrupted(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            super().on_finalized_text(text, stream_end)
            texts.append(text)
            if "".join(texts).startswith("two threefive"):
                written.extend(rows_of(output))
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generation, "TextStreamer", Interrupted)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\nfour\nseven\n")
    result = invoke("generate", "--adapter", adapter, "--prompts", prompts, "-o", output)
    assert result.exit_code == 130
    assert result.stderr.count("\n") <= 1
    # and is there before the next answer begins, should the process die in it
    assert written == rows_of(output) == [{"prompt": "one", "completion": "two three"}]
    assert result.stdout.startswith("one\ntwo three\nfour\nfive")
    assert result.stdout.endswith("\n")


def test_what_is_missing_or_does_not_fit(model, adapter, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    ask = ("--prompt", "one")
    for words, message in (
        ((model,), "either --prompt or --prompts must be given, got neither"),
        ((model, *ask, "--prompts", bad), "either --prompt or --prompts must be given, got both"),
        (ask, "model must be given where there is no adapter that names it"),
        (("none", *ask), "model must be a folder with config.json"),
        ((model, "--prompts", "none.txt"), "got none.txt (No such file or directory)"),
        ((model, "--prompts", empty), "data must hold at least one example"),
        ((model, "--prompts", bad), "bad.jsonl, line 2: must have either prompt or messages"),
        ((model, *ask, "--top-p", "0.9"), "top-p must have a temperature above 0, got 0"),
        ((model, *ask, "--temperature", "1", "--top-p", "0"), "top-p must be above 0, got 0"),
        ((model, *ask, "--temperature", "inf"), "temperature must be finite, got inf"),
        ((model, *ask, "--temperature", "-1"), "Invalid value for '--temperature'"),
        ((model, *ask, "-o", tmp_path / "no" / "x"), "output must be in a folder that exists"),
        ((model, "--prompt", "", "--template", "{prompt}"), "must have at least one token"),
        ((model, *ask, "--template", "chat"), "tokenizer must have a chat template"),
        ((*ask, "--adapter", "none"), "adapter must be a folder with adapter_config.json"),
    ):
        result = invoke("generate", *words)
        assert result.exit_code == 2, words
        assert message in one_line(result), words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "empty.txt"]


def test_classifiers_are_pointed_to_eval(adapter, tmp_path):
    for file in adapter.glob("adapter_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    TrainSettings.load(adapter, labels="low,high").save(tmp_path)
    result = invoke("generate", "--adapter", tmp_path, "--prompt", "one")
    assert result.exit_code == 2
    assert "which classifies: fastlora eval has its predictions" in one_line(result)
    # one from elsewhere says so in its configuration alone
    (tmp_path / "settings.yaml").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    result = invoke("generate", "m", "--adapter", tmp_path, "--prompt", "one")
    assert "adapter must be one of a language model" in one_line(result)


def test_the_installed_command(adapter, tmp_path):
    words = ("generate", "--adapter", adapter, "--prompt", "seven")
    good = run(*words, "-o", "x.jsonl", cwd=tmp_path)
    assert (good.returncode, good.stdout, good.stderr) == (0, "eight nine\n", "")
    assert rows_of(tmp_path / "x.jsonl") == [{"prompt": "seven", "completion": "eight nine"}]
    again = run(*words, "-o", "x.jsonl", cwd=tmp_path)
    assert again.returncode == 2
    assert "output must be a new file, got x.jsonl" in one_line(again)
    drawn = run(*words, "--top-p", "0.5", cwd=tmp_path)
    assert drawn.returncode == 2
    assert "top-p must have a temperature" in one_line(drawn)
