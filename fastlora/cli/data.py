"""Training data as the user has it: JSONL with `prompt` and `completion`, or with `text`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.cli.console import UserError, check_text


@dataclass(frozen=True)
class Example:
    """One line of data.

    Attributes:
        prompt: what the model is given and not trained on; None for plain text.
        completion: what is trained on.
    """

    prompt: str | None
    completion: str


def read_jsonl(path: Path) -> list[Example]:
    """Read a data file; blank lines are skipped.

    Args:
        path: UTF-8, one JSON object a line, with `prompt` and `completion` or with `text`; other
            fields are ignored.

    Returns:
        The examples, at least one.

    Raises:
        UserError: the file, or a line of it (named by its number), is not that.
    """
    try:
        # splitlines() would also break at the separators that JSON strings may contain
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data must be a readable JSONL file, got {path} ({error})") from error
    examples = [
        _example(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not examples:
        raise UserError(f"data must hold at least one example, got the empty file {path}")
    return examples


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """Write prompt and completion examples, as `read_jsonl` reads them."""
    rows = ({"prompt": e.prompt, "completion": e.completion} for e in examples)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: must be JSON, got {error.msg} at column {error.colno}"
        ) from error
    # digits or nesting beyond what Python reads
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: must be JSON, got {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, got {type(row).__name__}")
    if "text" in row and not {"prompt", "completion"} & row.keys():
        return Example(None, _string(row, "text", where))
    if "text" not in row and {"prompt", "completion"} <= row.keys():
        return Example(_string(row, "prompt", where), _string(row, "completion", where))
    raise UserError(
        f"{where}: must have the fields prompt and completion, or text, got {sorted(row)}"
    )


def _string(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} must be a string, got {type(value).__name__}")
    if not value and field != "prompt":
        raise UserError(f"{where}: {field} must not be empty")
    check_text(value, f"{where}: {field}")
    return value
