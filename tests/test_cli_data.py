"""Data files, read and split, and what of them is trained on."""

from pathlib import Path

import pytest
from cli_helpers import tiny_tokenizer

from fastlora.cli import encoding
from fastlora.cli.console import UserError
from fastlora.cli.data import Data, Pair, Text, read, write_jsonl

IGNORED = encoding.IGNORED
PATH = Path("x.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def pairs(*rows):
    return Data(PATH, "prompt", [Pair(f"{PATH}, line {i}", *row) for i, row in enumerate(rows, 1)])


# --- data ------------------------------------------------------------------------------------


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [Pair(f"{path}, line 1", "a b", "c"), Pair(f"{path}, line 2", "", 'd "e"\n\u2028 é')]
    write_jsonl(path, rows)
    assert read(path) == Data(path, "prompt", rows)


def test_jsonl_fields_and_blank_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"text": "t"}\r\n\n{"id": 1, "text": "\u2028"}')
    rows = [Text(f"{path}, line 1", "t"), Text(f"{path}, line 3", "\u2028")]
    assert read(path) == Data(path, "text", rows)


GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold at least one example"),
        ("\n \n", "must hold at least one example"),
        (GOOD + "{", "line 2: must be JSON"),
        (GOOD + "prompt,completion\n", "line 2: must be JSON"),
        (GOOD + "\n[1]\n", "line 3: must be a JSON object, got list"),
        ('{"prompt": "p"}', "line 1: must have the fields of one of messages; prompt and"),
        ('{"question": "q", "answer": "a"}', "got question, answer"),
        ('{"prompt": "p", "completion": "c", "text": "t"}', "line 1: must have the fields"),
        ('{"prompt": "p", "completion": 3}', "line 1: completion must be a string, got int"),
        ('{"prompt": null, "completion": "c"}', "line 1: prompt must be a string, got NoneType"),
        ('{"prompt": "p", "completion": ""}', "line 1: completion must not be empty"),
        ('{"text": ""}', "line 1: text must not be empty"),
        ('\n{"text": "\\ud800 x"}', "line 2: text must be text that UTF-8 can encode, got"),
        ('{"prompt": "\\udc00", "completion": "c"}', "line 1: prompt must be text that UTF-8"),
        ('{"prompt": "p", "completion": "c\\udfff"}', "line 1: completion must be text that UTF-8"),
        (GOOD + "[" * 100_000, "line 2: must be JSON, got maximum recursion depth"),
        (GOOD + '{"text": ' + "1" * 5000 + "}", "line 2: must be JSON, got Exceeds the limit"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_unreadable_data(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="line 1: must be UTF-8, got the byte 0xff"):
        read(tmp_path / "x.jsonl")


# --- what is trained on ----------------------------------------------------------------------


def test_labels_cover_the_completion_and_its_end(tokenizer):
    data = encoding.encode(pairs(("one two", "three")), tokenizer, r"{prompt}\n", 64)
    (example,) = data.examples
    prompt = tokenizer("one two\n").input_ids
    completion = [*tokenizer("three").input_ids, tokenizer.eos_token_id]
    assert example["input_ids"] == prompt + completion
    assert example["labels"] == [IGNORED] * len(prompt) + completion
    assert (data.cut, data.dropped, data.tokens) == (0, 0, len(prompt + completion))


def test_labels_of_plain_text_start_at_the_second_token(tokenizer):
    data = Data(PATH, "text", [Text("", "one two")])
    (example,) = encoding.encode(data, tokenizer, "{prompt}", 64).examples
    ids = [*tokenizer("one two").input_ids, tokenizer.eos_token_id]
    assert example["input_ids"] == ids
    assert example["labels"] == [IGNORED, *ids[1:]]


def test_padding_is_masked_by_position_where_it_is_the_end_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    eos = tokenizer.eos_token_id
    # an end token inside a completion is trained on like any other
    rows = pairs(("one", "two" + tokenizer.eos_token + "three"), ("one", "two"))
    data = encoding.encode(rows, tokenizer, "{prompt} ", 64)
    batch = encoding.Collator(eos)(data.examples)
    for row, example in enumerate(data.examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["labels"][row, :length].tolist() == example["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["labels"].shape[1] - length
        )
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert (batch["input_ids"][row, length:] == eos).all()
    assert [(batch["labels"][row] == eos).sum().item() for row in (0, 1)] == [2, 1]


def test_what_is_too_long_is_counted_and_never_empty(tokenizer):
    rows = pairs(("one", "two " * 9), ("one " * 9, "two"), ("one", "two"))
    prompt = len(encoding.prompt_ids(tokenizer, r"{prompt}\n", "one"))
    data = encoding.encode(rows, tokenizer, r"{prompt}\n", prompt + 4)
    assert (data.cut, data.dropped, len(data.examples)) == (1, 1, 2)
    assert all(len(e["input_ids"]) <= prompt + 4 for e in data.examples)
    assert all(any(label != IGNORED for label in e["labels"]) for e in data.examples)
    # what is cut does not end
    assert data.examples[0]["labels"][-1] != tokenizer.eos_token_id
    with pytest.raises(
        UserError, match=f"max-length must leave room for completions, got {prompt}"
    ):
        encoding.encode(rows, tokenizer, r"{prompt}\n", prompt)


def test_prompts_are_closed_by_no_end_token(tokenizer):
    class Closing:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text)
            if add_special_tokens:
                ids["input_ids"].append(self.eos_token_id)
            return ids

    for data in (pairs(("one", "two")), Data(PATH, "text", [Text("", "one two")])):
        got = encoding.encode(data, Closing(), "{prompt} ", 64).examples
        assert got == encoding.encode(data, tokenizer, "{prompt} ", 64).examples
