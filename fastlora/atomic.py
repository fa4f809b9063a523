"""Files and folders that are there complete or not at all, also after a crash or power cut."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Fill a new folder that appears under its name only when all of it is on disk.

    Args:
        target: must not exist; its parents are made if missing.

    Yields:
        An empty folder beside the target, with a name of its own (`.<name>.<token>.tmp`). At the
        end of the `with` block its files are synchronised to disk and it is renamed; after any
        exception in the block it is removed. Only a process that is killed leaves it behind.

    Raises:
        FileExistsError: the target exists.
        OSError: a file cannot be written or the folder not renamed.
    """
    target = Path(target)
    _check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # no tempfile.mkdtemp, whose folders nobody else may read
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    folder.mkdir()
    try:
        yield folder
        _sync_tree(folder)
        # once more: a rename would replace an empty folder made meanwhile
        _check_new(target)
        os.rename(folder, target)
    except BaseException:
        # a second error, as on a full disk, must not hide the first
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(target.parent)


def write_file(file: Path, data: bytes) -> None:
    """Write a new file and wait until its bytes are on disk.

    Args:
        file: must not exist.
        data: all of it.

    Raises:
        FileExistsError: the file exists.
        OSError: it cannot be written.
    """
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(file: Path, data: bytes) -> None:
    """Put new content in a file's place when all of it is on disk.

    Args:
        file: may exist; keeps what it has until then.
        data: all of the new content.

    Raises:
        OSError: it cannot be written.
    """
    staged = file.parent / f".{file.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        write_file(staged, data)
        os.replace(staged, file)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk; their files are synchronised on their own.

    Args:
        folder: exists.

    Raises:
        OSError: the folder cannot be read.
    """
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal.

    Args:
        file: read in parts.

    Returns:
        64 digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "r+b") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(parent))


def _check_new(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"the folder must be new, got {target}, which exists")
