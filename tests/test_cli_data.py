"""Data files: every form, what is refused and where, prompts, held-out rows, names of fields."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.cli.console import UserError
from fastlora.cli.data import (
    Chat,
    Data,
    Labelled,
    Pair,
    Text,
    parse_fields,
    read,
    read_prompts,
    split,
    write_jsonl,
)

USER = {"role": "user", "content": "one?"}
ASSISTANT = {"role": "assistant", "content": "two"}


@pytest.fixture
def file(tmp_path):
    """Write a file and return its path; text is written as it is, with its line breaks."""

    def write(text, name="x.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(call, *args):
    """The message of an error, which must be one line that begins with what is required."""
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def test_reading_data_imports_nothing_heavy():
    code = "import sys, fastlora.cli.data; print({'torch', 'transformers'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "transformers" not in run.stdout


# --- JSONL -----------------------------------------------------------------------------------


def test_every_form(file):
    chat = [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT]
    cases = {
        "text": ({"text": "t"}, Text("", "t")),
        "prompt": ({"prompt": "", "completion": "c"}, Pair("", "", "c")),
        "messages": ({"messages": chat}, Chat("", chat)),
        "label": ({"text": "t", "label": "good"}, Labelled("", "t", "good")),
    }
    for form, (row, example) in cases.items():
        path = file(lines(row, row | {"id": 7, "extra": None}))
        data = read(path)
        assert (data.path, data.form) == (path, form)
        assert [row.where for row in data.rows] == [f"{path}, line 1", f"{path}, line 2"]
        for row in data.rows:
            assert row == type(example)(row.where, *list(vars(example).values())[1:])


def test_labels_are_text_and_whole_numbers(file):
    labels = ["good", "1", 1, 0, -3, "é"]
    data = read(file(lines(*({"text": "t", "label": label} for label in labels))))
    assert [row.label for row in data.rows] == ["good", "1", "1", "0", "-3", "é"]


def test_messages_keep_role_and_content_alone(file):
    turns = [USER | {"name": "x"}, ASSISTANT | {"weight": 1, "tool_calls": None}]
    (row,) = read(file(lines({"messages": turns, "tools": []}))).rows
    assert row.messages == [USER, ASSISTANT]
    tool = [USER, {"role": "tool", "content": "5"}, ASSISTANT]
    assert read(file(lines({"messages": tool}))).rows[0].messages == tool


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [Pair(f"{path}, line 1", "a b", "c"), Pair(f"{path}, line 2", "", 'd "e"\n\u2028 é')]
    write_jsonl(path, rows)
    assert read(path) == Data(path, "prompt", rows)


def test_byte_order_mark_line_ends_blank_lines_and_separators_in_strings(file):
    path = file('\ufeff{"text": "t"}\r\n\n \r\n{"id": 1, "text": "\u2028\u0085\x7f"}')
    assert read(path).rows == [
        Text(f"{path}, line 1", "t"),
        Text(f"{path}, line 4", "\u2028\u0085\x7f"),
    ]


GOOD = '{"prompt": "p", "completion": "c"}\n'
LABEL = '{"text": "t", "label": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "{", "line 2: must be JSON, got Expecting property name"),
        (GOOD + "prompt,completion\n", "line 2: must be JSON"),
        (GOOD + "\n[1]\n", "line 3: must be a JSON object, got list"),
        (GOOD + "[" * 100_000, "line 2: must be JSON, got maximum recursion depth"),
        (GOOD + '{"text": ' + "1" * 5000 + "}", "line 2: must be JSON, got Exceeds the limit"),
        ('{"prompt": "p"}', "line 1: must have the fields of one of messages; prompt and"),
        ('{"question": "q", "answer": "a"}', "label; text, got question, answer"),
        ("{}", "line 1: must have the fields of one of messages"),
        ('{"prompt": "p", "completion": "c", "text": "t"}', "got prompt, completion, text"),
        ('{"messages": [], "text": "t"}', "got messages, text"),
        ('{"text": "t", "label": "a", "completion": "c"}', "got text, label, completion"),
        (GOOD + '{"text": "t"}', "line 2: must have prompt and completion as the first row has"),
        (GOOD + '{"prompt": "p"}', "line 2: must have prompt and completion as the first row"),
        ('{"text": "t"}\n' + LABEL, "line 2: must have text as the first row has, got text, lab"),
        (
            LABEL + '{"text": "t"}',
            "line 2: must have text and label as the first row has, got text",
        ),
        (GOOD + GOOD.replace("}", ', "text": "t"}'), "line 2: must have the fields of one of"),
        ('{"prompt": "p", "completion": 3}', "line 1: completion must be a string, got int"),
        ('{"prompt": null, "completion": "c"}', "line 1: prompt must be a string, got NoneType"),
        ('{"prompt": "p", "completion": ""}', "line 1: completion must not be empty"),
        (GOOD + GOOD.replace('"c"', '""'), "line 2: completion must not be empty"),
        ('{"text": ""}', "line 1: text must not be empty"),
        ('\n{"text": "\\ud800 x"}', "line 2: text must be text that UTF-8 can encode, got"),
        ('{"prompt": "\\udc00", "completion": "c"}', "line 1: prompt must be text that UTF-8"),
        ('{"prompt": "p", "completion": "c\\udfff"}', "line 1: completion must be text that UTF-8"),
        (
            LABEL + LABEL.replace('"a"', "true"),
            "2: label must be a string or a whole number, got b",
        ),
        (LABEL + LABEL.replace('"a"', "1.0"), "line 2: label must be a string or a whole number"),
        (LABEL + LABEL.replace('"a"', "null"), "line 2: label must be a string or a whole number"),
        (LABEL + LABEL.replace('"a"', '""'), "line 2: label must not be empty"),
        (LABEL + LABEL.replace('"t"', '""'), "line 2: text must not be empty"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_bad_jsonl_names_the_line(file, text, message):
    path = file(text)
    error = refused(read, path)
    assert message in error
    assert error.startswith(f"{path}, line ")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hi", "line 2: messages must be a list, got str"),
        ([], "line 2: messages must have a turn of the assistant, got 0 turns"),
        ([USER], "line 2: messages must have a turn of the assistant, got 1 turns"),
        ([USER, "hi"], "line 2, turn 2: must be an object, got str"),
        ([USER, {"role": "assistant"}], "turn 2: must have role and content, got no content"),
        ([{"content": "x"}, ASSISTANT], "line 2, turn 1: must have role and content, got no role"),
        ([USER, ASSISTANT | {"role": "gpt"}], "2: role must be one of system, user, assistant, to"),
        ([USER | {"role": ["user"]}], "line 2, turn 1: role must be one of"),
        ([USER, ASSISTANT | {"content": ""}], "line 2, turn 2: content must not be empty"),
        ([USER, ASSISTANT | {"content": None}], "turn 2: content must be a string, got NoneType"),
        ([USER, ASSISTANT | {"content": [{}]}], "line 2, turn 2: content must be a string, got li"),
        ([USER | {"content": "\ud800"}, ASSISTANT], "line 2, turn 1: content must be text that"),
        ([USER, ASSISTANT | {"tool_calls": [{}]}], "2: must be role and content alone, got tool_c"),
        ([USER, ASSISTANT | {"weight": 0}], "turn 2: must be role and content alone, got weight"),
    ],
    ids=lambda value: ascii(value)[-40:],
)
def test_bad_turns_name_line_and_turn(file, turns, message):
    path = file(lines({"messages": [USER, ASSISTANT]}, {"messages": turns}))
    error = refused(read, path)
    assert message in error
    assert error.startswith(f"{path}, line 2")


def test_tools_are_not_left_out_in_silence(file):
    path = file(lines({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}))
    assert "line 1: must be a conversation without tools" in refused(read, path)


def test_files_that_hold_nothing_or_cannot_be_read(file, tmp_path):
    for text, name in (("", "a.jsonl"), ("\n \n", "a.jsonl"), ("", "a.csv"), ("text\n", "a.csv")):
        path = file(text, name)
        assert refused(read, path) == f"data must hold at least one example, got none in {path}"
    missing = tmp_path / "none.jsonl"
    assert f"data must be a readable file, got {missing} (No such file" in refused(read, missing)
    assert "(Is a directory)" in refused(read, tmp_path)
    for name in ("x.jsonl", "x.csv"):
        path = file(b'{"text": "t"}\n\n{"text": "\xff"}', name)
        assert refused(read, path) == f"{path}, line 3: must be UTF-8, got the byte 0xff"
    assert "line 1: must be UTF-8" in refused(read, file('{"text": "t"}'.encode("utf-16")))


# --- CSV -------------------------------------------------------------------------------------


def test_every_form_of_csv(file):
    chat = json.dumps([USER, ASSISTANT]).replace('"', '""')
    cases = {
        "text": ("id,text\n1,t\n", Text("", "t")),
        "prompt": ("completion,prompt\nc,\n", Pair("", "", "c")),
        "messages": (f'messages\n"{chat}"\n', Chat("", [USER, ASSISTANT])),
        "label": ("text,label\nt,1\n", Labelled("", "t", "1")),
    }
    for form, (text, example) in cases.items():
        path = file(text, "x.CSV")
        data = read(path)
        assert data.form == form
        (row,) = data.rows
        assert row == type(example)(f"{path}, line 2", *list(vars(example).values())[1:])


def test_csv_counts_lines_as_an_editor_does(file):
    long = "x" * 200_000  # over the default limit of Python's reader
    text = f'\ufefftext,id\r\n"a\r\nb",1\r\n\r\n"say ""hi"", \u2028é",2\r\n{long},3\r\n'
    path = file(text, "x.csv")
    before = csv.field_size_limit(1000)
    try:
        rows = read(path).rows
        assert csv.field_size_limit() == 1000, "it is everybody's"
    finally:
        csv.field_size_limit(before)
    assert [(row.where, row.text) for row in rows] == [
        (f"{path}, line 2", "a\r\nb"),
        (f"{path}, line 5", 'say "hi", \u2028é'),
        (f"{path}, line 6", long),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,text\na,b\n", "line 1: must name each column once, got 'text'"),
        ("question,answer\nq,a\n", "line 1: must have the fields of one of messages; prompt and"),
        ("prompt;completion\np;c\n", "got prompt;completion"),
        ("prompt,completion,text\np,c,t\n", "line 1: must have the fields of one of"),
        ("text,id\na,1\nb\n", "line 3: must have a cell for each of the 2 columns, got 1"),
        ('text,id\n"a\nb",1\nc,2,3\n', "line 4: must have a cell for each of the 2 columns, got 3"),
        ('text,id\n"a\n\nb" ,1\n', "line 2: must be CSV, got ',' expected after"),
        ('text\na\n"b\nc\n', "line 3: must be CSV, got unexpected end of data"),
        ("text,label\na,x\n\n,y\n", "line 4: text must not be empty"),
        ("text,label\na,x\nb,\n", "line 3: label must not be empty"),
        ("prompt,completion\np,\n", "line 2: completion must not be empty"),
        ("messages\nhi\n", "line 2: messages: must be JSON, got Expecting value at column 1"),
        ("messages\n{}\n", "line 2: messages must be a list, got dict"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_bad_csv_names_the_line(file, text, message):
    path = file(text, "x.csv")
    error = refused(read, path)
    assert message in error
    assert error.startswith(f"{path}, line ")


# --- names of fields -------------------------------------------------------------------------


def test_fields_of_other_names(file):
    fields = parse_fields("prompt=question, completion = the answer")
    assert fields == {"prompt": "question", "completion": "the answer"}
    for path in (
        file(lines({"question": "q", "the answer": "a", "prompt": 3})),
        file("question,the answer\nq,a\n", "x.csv"),
    ):
        (row,) = read(path, fields).rows
        assert (row.prompt, row.completion) == ("q", "a")
    # one that is called otherwise, one by its own name
    (row,) = read(file(lines({"review": "t", "label": 1})), {"text": "review"}).rows
    assert (row.text, row.label) == ("t", "1")
    # what stands for another of our names does not count under its own
    swapped = file(lines({"text": "p", "label": "c"}))
    assert read(swapped, {"prompt": "text", "completion": "label"}).form == "prompt"
    half = file(lines({"text": "p", "completion": "c"}))
    assert read(half, {"prompt": "text"}).rows == [Pair(f"{half}, line 1", "p", "c")]
    # fields that are named decide where a row could be two things
    both = file(lines({"prompt": "p", "messages": [USER, ASSISTANT]}))
    assert "got prompt, messages" in refused(read, both)
    assert read(both, {"messages": "messages"}).form == "messages"


def test_errors_call_fields_as_the_file_does(file):
    path = file(lines({"question": "q", "answer": "a"}, {"question": "q", "answer": 5}))
    fields = {"prompt": "question", "completion": "answer"}
    assert f"{path}, line 2: answer must be a string, got int" in refused(read, path, fields)
    path = file(lines({"question": "q", "answer": "a"}, {"question": "q"}))
    assert "line 2: must have question and answer as the first" in refused(read, path, fields)
    assert refused(read, path, {"prompt": "questoin"}) == (
        f"fields must name what is in {path}, got 'questoin', and there is question, answer"
    )
    assert "got 'prompt'" in refused(read_prompts, path, {"prompt": "prompt"})


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "''"),
        ("prompt", "'prompt'"),
        ("prompt=", "'prompt='"),
        ("prompt=q,answer=a", "'answer=a'"),
        ("prompt=q,", "''"),
        ("=q", "'=q'"),
        ("prompt=q,prompt=r", "'prompt=r' as well"),
        ("prompt=q,text=q", "'text=q' as well"),
    ],
)
def test_bad_names_of_fields(text, piece):
    message = refused(parse_fields, text)
    assert message.startswith("fields must ")
    assert message.endswith(f"got {piece}")


# --- prompts ---------------------------------------------------------------------------------


def test_prompts(file):
    chat = [USER, ASSISTANT, USER]
    path = file(
        lines(
            {"prompt": "p", "completion": "c"},
            {"prompt": ""},
            {"messages": chat},
            {"messages": [*chat, ASSISTANT]},
        )
    )
    assert read_prompts(path) == ["p", "", chat, chat]
    assert read_prompts(file("prompt,id\np,1\n", "x.csv")) == ["p"]
    assert read_prompts(file(lines({"q": "p", "text": "t"})), {"prompt": "q"}) == ["p"]
    text = "\ufeffone two\r\n\n  three\u2028 \n{\n"
    assert read_prompts(file(text, "x.TXT")) == ["one two", "  three\u2028 ", "{"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "t"}', "line 1: must have either prompt or messages, got text"),
        ('\n{"prompt": "p", "messages": []}', "line 2: must have either prompt or messages, got"),
        ('{"prompt": 3}', "line 1: prompt must be a string, got int"),
        ('{"messages": []}', "line 1: messages must have a turn to answer, got none"),
        (lines({"messages": [ASSISTANT]}), "line 1: messages must have a turn to answer, got none"),
        (lines({"messages": [{"role": "x", "content": "y"}]}), "line 1, turn 1: role must be one"),
    ],
)
def test_bad_prompts(file, text, message):
    assert message in refused(read_prompts, file(text))


def test_prompts_that_are_not_there(file):
    for name in ("x.jsonl", "x.csv", "x.txt"):
        assert "must hold at least one" in refused(
            read_prompts, file(" \n" * (name[2] != "c"), name)
        )
    path = file("a\n", "x.txt")
    assert "fields must be those of a JSONL" in refused(read_prompts, path, {"prompt": "q"})


# --- held-out rows ---------------------------------------------------------------------------


def test_split_is_by_seed_and_keeps_the_order():
    data = Data(Path("x"), "text", [Text(str(number), "t") for number in range(40)])
    kept, held = split(data, 0.25, 3)
    assert (kept.path, kept.form, len(kept.rows), len(held.rows)) == (data.path, "text", 30, 10)
    numbers = [[int(row.where) for row in part.rows] for part in (kept, held)]
    assert all(part == sorted(part) for part in numbers)
    assert sorted(numbers[0] + numbers[1]) == [*range(40)]
    assert split(data, 0.25, 3) == (kept, held)
    assert split(data, 0.25, 4) != (kept, held)
    assert held.rows != data.rows[:10]
    assert held.rows != data.rows[-10:]


@pytest.mark.parametrize(("rows", "share"), [(1, 0.5), (4, 0.1), (4, 0.9), (4, 0.0), (4, 1.0)])
def test_split_leaves_no_side_empty(rows, share):
    data = Data(Path("x.csv"), "text", [Text("", "t")] * rows)
    message = refused(split, data, share, 0)
    assert message.endswith(f"at least one row on each side, got {share:g} of the {rows} in x.csv")
