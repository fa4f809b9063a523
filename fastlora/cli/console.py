"""What a person sees: where text goes, how an error looks, how numbers are written."""

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console
from rich.text import Text

# by version typer imports click or carries its own; in both this is the class of usage errors
UsageError = typer.BadParameter.__bases__[0]

_POWERS = {"k": 1, "m": 2, "g": 3}  # letters of units of bytes


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """A reader that goes away, as `head` does, ends no training: what follows is not shown."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Screen(highlight=False)
# on import, which transformers does, it warns of a package that nobody needs here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class UserError(Exception):
    """A mistake of the user or a failure to report: one line on stderr, no traceback."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def error_line(message: str) -> None:
    """Write a message to stderr as one line."""
    print("fastlora:", " ".join(message.split()), file=sys.stderr)


@contextmanager
def reported(*kinds: type[Exception], about: str = "", exit_code: int = 2) -> Iterator[None]:
    """Turn errors of these kinds, raised below the command line, into a UserError.

    Args:
        *kinds: what may happen here through a mistake of the user.
        about: what the message begins with, where the error itself does not name the culprit.
        exit_code: 2 for bad input, 1 for what fails later.

    Yields:
        Nothing.

    Raises:
        UserError: one of them happened.
    """
    try:
        yield
    except kinds as error:
        text = str(error) or type(error).__name__
        # the text of a KeyError is the key alone
        text = f"no {text}" if isinstance(error, KeyError) else text
        raise UserError(about + text, exit_code) from error


def check_text(text: str, name: str) -> None:
    """Check that a text can be tokenised: tokenizers take what UTF-8 can encode.

    Args:
        text: from a file or the command line.
        name: what the message calls it.

    Raises:
        UserError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} must be text that UTF-8 can encode, "
            f"got {text[error.start]!r} at character {error.start + 1}"
        ) from error


def check_output(output: Path, reuse: bool = False, hint: str = "") -> None:
    """Check that a folder may be written; it is made when there is something to write.

    Args:
        output: may be missing, with its parents.
        reuse: take a folder that has files.
        hint: what to do about a folder with files, for the message.

    Raises:
        UserError: it has files and may not be reused, or it cannot be made or written to.
    """
    with reported(OSError):
        there = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
        if there == output.absolute() and not there.is_dir():
            raise UserError(f"output must be a folder, got the file {output}")
        try:  # os.access would know permissions only
            TemporaryDirectory(prefix=".fastlora-", dir=there).cleanup()
        except OSError as error:
            raise UserError(
                f"output must be in a folder that can be written to, got {there} ({error.strerror})"
            ) from error
        if not reuse and output.exists() and any(output.iterdir()):
            raise UserError(f"output must be a new or empty folder, got {output}{hint}")


def require(*modules: str) -> None:
    """Check that optional packages are there, before work begins.

    Args:
        modules: import names.

    Raises:
        UserError: one is missing.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} must be installed, install the extra fastlora-engine[hf]")


def note(label: str, text: str) -> None:
    """Print one line of a run's account."""
    console.print(Text.assemble((f"{label:>8}", "bold cyan"), "  ", text), soft_wrap=True)


def size(count: float) -> str:
    """Bytes for reading: 71 MB, 2.0 GB (powers of ten)."""
    units = ["B", "kB", "MB", "GB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.{int(count < 10 and units[0] != 'B')}f} {units[0]}"


def parse_size(text: str) -> int:
    """A number of bytes, as people write it.

    Args:
        text: a number, alone or with B, kB, MB, GB (powers of ten), KiB, MiB or GiB (of two), in
            any case.

    Returns:
        Bytes.

    Raises:
        ValueError: it is something else.
    """
    powers = "|".join(_POWERS)
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?(?:({powers})?(i)?b)?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"a size must be bytes, or a number with kB, MiB and such, got {text!r}")
    factor = 1024 if match[3] else 1000
    return int(float(match[1]) * factor ** _POWERS.get(match[2], 0))


def duration(seconds: float) -> str:
    """A time for reading: 8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )
