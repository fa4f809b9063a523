"""Folders that appear complete or not at all."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastlora.atomic import replaced_folder, write_file


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.bin").write_bytes(b"a" * 100)
    (folder / "b.txt").write_text("b")


def save(target: Path, at_end: Callable[[], object] = lambda: None) -> None:
    with replaced_folder(target) as folder:
        fill(folder)
        at_end()


def test_the_folder_appears_at_the_end_with_all_its_files(tmp_path):
    target = tmp_path / "new" / "out"
    with replaced_folder(target) as folder:
        assert folder.parent == target.parent
        fill(folder)
        assert not target.exists()
    assert (target / "inner" / "a.bin").read_bytes() == b"a" * 100
    assert [*target.parent.iterdir()] == [target]
    # readable by whom the user's umask lets read
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_nothing(tmp_path, error):
    def fail():
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        save(tmp_path / "out", fail)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fail_at", ["fsync", "rename"])
def test_a_failing_system_call_leaves_nothing(tmp_path, monkeypatch, fail_at):
    def full(*args):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "out", lambda: monkeypatch.setattr(os, fail_at, full))
    assert not [*tmp_path.iterdir()]


def test_every_file_and_folder_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename

    def counted(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(os, "rename", lambda *args: (done.append("rename"), rename(*args)))
    target = tmp_path / "out"
    save(target)
    assert done[-2:] == ["rename", tmp_path.stat().st_ino]
    assert sorted(done[:-2]) == sorted(p.stat().st_ino for p in [target, *target.rglob("*")])


@pytest.mark.parametrize("kind", ["empty", "full", "file", "broken link"])
def test_what_exists_is_refused(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.touch()
    elif kind == "broken link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if kind == "full":
            (target / "old").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"must be new, got .*out"):
        save(target, lambda: pytest.fail("the block must not run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_appears_meanwhile_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="must be new"):
        save(tmp_path / "out", (tmp_path / "out").mkdir)
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_no_target(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from fastlora.atomic import replaced_folder\n"
        "with replaced_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('a'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()


def test_write_file_never_overwrites(tmp_path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
