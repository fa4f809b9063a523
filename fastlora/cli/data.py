"""Data as the user has it: JSONL or CSV, with the fields of one of four forms."""

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastlora.cli.console import UserError, check_text

Form = Literal["text", "prompt", "messages", "label"]
Message = dict[str, str]

FORMS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}
NAMES = ("prompt", "completion", "messages", "text", "label")
ROLES = ("system", "user", "assistant", "tool")
# what a turn may say beside its content, and chat templates here are not given
_BEYOND_CONTENT = ("tool_calls", "function_call", "weight")
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class Text:
    """A plain text, all of which is learnt.

    Attributes:
        where: file and line, for errors.
        text: not empty.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and what is to follow it.

    Attributes:
        where: file and line, for errors.
        prompt: what the model is given; may be empty.
        completion: what is learnt; not empty.
    """

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        where: file and line, for errors.
        messages: role and content of each turn; what the assistant says is learnt.
    """

    where: str
    messages: list[Message]


@dataclass(frozen=True)
class Labelled:
    """A text and its class.

    Attributes:
        where: file and line, for errors.
        text: not empty.
        label: name of the class; a whole number as its decimal digits.
    """

    where: str
    text: str
    label: str


Example = Text | Pair | Chat | Labelled


@dataclass(frozen=True)
class Data:
    """A file of examples.

    Attributes:
        path: the file.
        form: what all its rows are.
        rows: at least one, in the file's order.
    """

    path: Path
    form: Form
    rows: list[Example]


@dataclass(frozen=True)
class _Record:
    """A row before its fields are looked at; `names` is the line that names them."""

    line: int
    names: int
    fields: dict[str, Any]


def read(path: Path, fields: Mapping[str, str] | None = None) -> Data:
    """Read training data; blank lines are skipped, and fields of other names ignored.

    Args:
        path: UTF-8; CSV with a header line where the name ends in .csv, else JSONL. The fields are
            `messages`; `prompt` and `completion`; `text` and `label`; or `text`: the same in all
            rows. In a CSV file `messages` are JSON.
        fields: our name of a field -> the file's.

    Returns:
        The examples, at least one.

    Raises:
        UserError: the file, or a line of it (named by its number), is not that.
    """
    fields = fields or {}
    records = _records(path, fields)
    form = _form(records[0], f"{path}, line {records[0].names}", fields)
    rows = [_example(record, form, f"{path}, line {record.line}", fields) for record in records]
    return Data(path, form, rows)


def read_prompts(path: Path, fields: Mapping[str, str] | None = None) -> list[str | list[Message]]:
    """Read what a model is to answer; blank lines are skipped.

    Args:
        path: as for `read`, but only `prompt` or `messages` has to be there; or a file whose name
            ends in .txt, with a prompt on each line.
        fields: our name of a field -> the file's.

    Returns:
        Prompts and conversations, at least one; a last turn of the assistant is left out.

    Raises:
        UserError: the file, or a line of it (named by its number), is not that.
    """
    if path.suffix.lower() == ".txt":
        if fields:
            raise UserError(f"fields must be those of a JSONL or CSV file, got {path}")
        lines = (line.removesuffix("\r") for line in _text(path).split("\n"))
        return _some([line for line in lines if line.strip()], path)
    fields = fields or {}
    return [
        _prompt(record, f"{path}, line {record.line}", fields) for record in _records(path, fields)
    ]


def write_jsonl(path: Path, rows: Sequence[Pair]) -> None:
    """Write prompts and completions, as `read` reads them."""
    lines = ({"prompt": row.prompt, "completion": row.completion} for row in rows)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Hold rows out, drawn at random.

    Args:
        data: at least two rows.
        share: of the rows that are held out, between 0 and 1.
        seed: the same seed holds out the same rows.

    Returns:
        The rows to train on and those held out, both in the file's order.

    Raises:
        UserError: one of the two would be empty.
    """
    rows = len(data.rows)
    count = int(rows * share + 0.5)
    if not 0 < count < rows:
        raise UserError(
            f"the share held out must leave at least one row on each side, got {share:g} of the "
            f"{rows} in {data.path}"
        )
    held = set(random.Random(seed).sample(range(rows), count))
    kept = [row for index, row in enumerate(data.rows) if index not in held]
    return replace(data, rows=kept), replace(data, rows=[data.rows[i] for i in sorted(held)])


def parse_fields(text: str) -> dict[str, str]:
    """The fields that an option names.

    Args:
        text: such as prompt=question,completion=answer.

    Returns:
        Our name of a field -> the file's.

    Raises:
        UserError: a piece is not a name of ours, an equals sign and a name.
    """
    fields: dict[str, str] = {}
    for piece in text.split(","):
        ours, _, theirs = (part.strip() for part in piece.partition("="))
        if ours not in NAMES or not theirs:
            raise UserError(
                f"fields must be like prompt=question, with a name of {', '.join(NAMES)} first, "
                f"got {piece.strip()!r}"
            )
        if ours in fields or theirs in fields.values():
            raise UserError(f"fields must name each field once, got {piece.strip()!r} as well")
        fields[ours] = theirs
    return fields


# --- files -----------------------------------------------------------------------------------


def _records(path: Path, fields: Mapping[str, str]) -> list[_Record]:
    read_rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    records = _some([*read_rows(_text(path), path)], path)
    there = {name: None for record in records for name in record.fields}
    for theirs in fields.values():
        if theirs not in there:
            raise UserError(
                f"fields must name what is in {path}, got {theirs!r}, and there is "
                + ", ".join(there)
            )
    return records


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"data must be a readable file, got {path} ({error.strerror})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise UserError(f"{path}, line {line}: must be UTF-8, got the byte 0x{byte:02x}") from error


def _some(rows: list[Any], path: Path) -> list[Any]:
    if not rows:
        raise UserError(f"data must hold at least one example, got none in {path}")
    return rows


def _json_rows(text: str, path: Path) -> Iterator[_Record]:
    # splitlines() would also break at the separators that JSON strings may contain
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = _json(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: must be a JSON object, got {type(row).__name__}")
            yield _Record(number, number, row)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: must be JSON, got {error.msg} at column {error.colno}"
        ) from error
    # digits or nesting beyond what Python reads
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: must be JSON, got {error}") from error


def _csv_rows(text: str, path: Path) -> Iterator[_Record]:
    lines = _csv_lines(text, path)
    names, header = next(lines, (1, []))
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise UserError(f"{path}, line {names}: must name each column once, got {min(repeated)!r}")
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: must have a cell for each of the {len(header)} columns, "
                f"got {len(cells)}"
            )
        yield _Record(number, names, dict(zip(header, cells, strict=True)))


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of each record that has any, and the line it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # the limit is the module's, and by default shorter than many a text
    before = csv.field_size_limit(_LONGEST_CELL)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: must be CSV, got {error}") from error
    finally:
        csv.field_size_limit(before)


# --- rows ------------------------------------------------------------------------------------


def _form(record: _Record, where: str, fields: Mapping[str, str]) -> Form:
    """What the fields of a record make it; where they could make it two things, those named do."""
    taken = set(fields.values())
    present = {
        name
        for name in NAMES
        if fields.get(name, name) in record.fields and (name in fields or name not in taken)
    }
    for names in (present, present & fields.keys()):
        for form, needed in FORMS.items():
            if names == {*needed}:
                return form
    choices = "; ".join(" and ".join(names) for names in FORMS.values())
    raise UserError(
        f"{where}: must have the fields of one of {choices}, got {_list(record)}; --fields gives "
        "their names here"
    )


def _example(record: _Record, form: Form, where: str, fields: Mapping[str, str]) -> Example:
    names = {name: fields.get(name, name) for name in FORMS[form]}
    if any(name not in record.fields for name in names.values()) or form != _form(
        record, where, fields
    ):
        needed = " and ".join(names.values())
        raise UserError(f"{where}: must have {needed} as the first row has, got {_list(record)}")
    row = {ours: record.fields[theirs] for ours, theirs in names.items()}
    if form == "messages":
        return Chat(where, _conversation(row["messages"], record, where, names["messages"]))
    if form == "prompt":
        prompt = _string(row["prompt"], names["prompt"], where, empty=True)
        return Pair(where, prompt, _string(row["completion"], names["completion"], where))
    text = _string(row["text"], names["text"], where)
    if form == "text":
        return Text(where, text)
    return Labelled(where, text, _label(row["label"], names["label"], where))


def _prompt(record: _Record, where: str, fields: Mapping[str, str]) -> str | list[Message]:
    names = {name: fields.get(name, name) for name in ("prompt", "messages")}
    there = [name for name, theirs in names.items() if theirs in record.fields]
    if len(there) > 1:
        # those that were asked for by name
        there = [name for name in there if name in fields]
    if len(there) != 1:
        raise UserError(
            f"{where}: must have either {names['prompt']} or {names['messages']}, "
            f"got {_list(record)}"
        )
    (name,) = there
    value = record.fields[names[name]]
    if name == "prompt":
        return _string(value, names[name], where, empty=True)
    turns = _turns(value, record, where, names[name])
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise UserError(f"{where}: {names[name]} must have a turn to answer, got none")
    return turns


def _conversation(value: Any, record: _Record, where: str, name: str) -> list[Message]:
    turns = _turns(value, record, where, name)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(
            f"{where}: {name} must have a turn of the assistant, got {len(turns)} turns"
        )
    if record.fields.get("tools"):
        raise UserError(f"{where}: must be a conversation without tools, got tools")
    return turns


def _turns(value: Any, record: _Record, where: str, name: str) -> list[Message]:
    # only in CSV another line names the fields, and a cell is a string
    if record.names != record.line:
        value = _json(value, f"{where}: {name}")
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} must be a list, got {type(value).__name__}")
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: must be an object, got {type(turn).__name__}")
    missing = [name for name in ("role", "content") if name not in turn]
    if missing:
        raise UserError(f"{where}: must have role and content, got no {missing[0]}")
    for name in _BEYOND_CONTENT:
        # a weight of 1 says nothing
        if turn.get(name) not in (None, [], 1):
            raise UserError(f"{where}: must be role and content alone, got {name}")
    if turn["role"] not in ROLES:
        raise UserError(f"{where}: role must be one of {', '.join(ROLES)}, got {turn['role']!r}")
    return {"role": turn["role"], "content": _string(turn["content"], "content", where)}


def _string(value: Any, name: str, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, got {type(value).__name__}")
    if not value and not empty:
        raise UserError(f"{where}: {name} must not be empty")
    check_text(value, f"{where}: {name}")
    return value


def _label(value: Any, name: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {name} must be a string or a whole number, got {type(value).__name__}"
        )
    return _string(value.strip(), name, where)


def _list(record: _Record) -> str:
    return ", ".join(record.fields) or "none"
