"""Files and folders appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import atomic_file, atomic_folder, reserved, write_text


@contextlib.contextmanager
def at_most(size):
    """The operating system refuses to let a file grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_whole_with_the_suffix_of_the_target(tmp_path):
    target = tmp_path / "new" / "data.bin"

    with atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.suffix == ".bin"
        assert temporary.parent == target.parent

    assert target.read_bytes() == b"half"
    assert list(target.parent.iterdir()) == [target]


def test_text_is_utf8_with_the_line_ends_it_has(tmp_path):
    write_text(tmp_path / "t.csv", "ä\r\nb\n")

    assert (tmp_path / "t.csv").read_bytes() == b"\xc3\xa4\r\nb\n"


def test_an_existing_file_is_refused_before_any_work(tmp_path):
    target = tmp_path / "data"
    target.write_text("precious")

    with (
        pytest.raises(OutputError, match=r"data exists already; .* overwrite"),
        atomic_file(target),
    ):
        pytest.fail("the block must not run")

    assert target.read_text() == "precious"


def test_a_file_that_somebody_else_made_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "data"

    def race():
        with atomic_file(target) as temporary:
            temporary.write_text("mine")
            target.write_text("theirs")

    with pytest.raises(OutputError, match="exists already"):
        race()

    assert target.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file_and_is_passed_on(tmp_path, error):
    target = tmp_path / "data"
    target.write_text("old")

    def fail_halfway():
        with atomic_file(target, overwrite=True) as temporary:
            temporary.write_text("new, but not all")
            raise error

    with pytest.raises(error):
        fail_halfway()

    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_overwriting_replaces_the_file(tmp_path):
    target = tmp_path / "data"
    write_text(target, "old and longer")

    write_text(target, "new", overwrite=True)

    assert target.read_bytes() == b"new"


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "data", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)

    write_text(link, "new", overwrite=True)

    assert link.is_symlink()
    assert target.read_text() == "new"


def test_only_regular_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_text(tmp_path / "folder", "text", overwrite=True)

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        write_text(tmp_path / "pipe", "text", overwrite=True)


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(100_000)),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_space_is_one_line_and_leaves_nothing(tmp_path, writer):
    """The system's own refusal, in whatever words the library reports it."""
    target = tmp_path / "data"
    target.write_text("old")

    def fill():
        with atomic_file(target, overwrite=True) as temporary:
            WRITERS[writer](temporary)

    with at_most(10_000), pytest.raises(OutputError) as caught:
        fill()

    assert "no space left" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_found_full_when_synced(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"no space left .*; nothing was written"):
        write_text(tmp_path / "data", "text")

    assert not list(tmp_path.iterdir())


def test_other_failures_say_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"cannot write .*: (File exists|Not a directory)"):
        write_text(tmp_path / "file" / "data", "text")

    def denied(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "write_bytes", denied)
    with pytest.raises(OutputError, match=r"cannot write .*: Permission denied"):
        write_text(tmp_path / "data", "text")


def test_an_error_about_another_file_is_not_mistaken_for_one_of_the_target(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "data") as temporary:
        temporary.write_bytes((tmp_path / "input").read_bytes())


def test_kill_leaves_the_target_untouched(tmp_path):
    target = tmp_path / "data"
    target.write_text("old")
    program = f"""
import os, signal
from vlp_plugins.runtime.files import atomic_file
with atomic_file({str(target)!r}, overwrite=True) as temporary:
    temporary.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", program], check=False)

    assert result.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "out" / "run"

    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text("a")
        assert not target.exists()

    assert (target / "sub" / "a.txt").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_with_something_in_it_is_refused_an_empty_one_is_filled(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("a")

    with pytest.raises(OutputError, match="not empty"), atomic_folder(target):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="is a file"), atomic_folder(target / "a"):
        pytest.fail("the block must not run")
    assert (target / "a").read_text() == "a"


def test_a_folder_with_our_mark_is_replaced_when_the_new_one_is_whole(tmp_path):
    target = tmp_path / "run"

    def write(text, **how):
        with atomic_folder(target, mark="mark.json", **how) as temporary:
            (temporary / "mark.json").write_text(f'{{"made_by": "vlp_plugins 1", "x": {text}}}')
            (temporary / f"{text}.csv").touch()

    write("1")
    with pytest.raises(
        OutputError, match=r"not empty; .*--overwrite \(in Python: overwrite=True\)"
    ):
        write("2")
    with (
        pytest.raises(ZeroDivisionError),
        atomic_folder(target, mark="mark.json", overwrite=True),
    ):
        _ = 1 / 0
    assert sorted(path.name for path in target.iterdir()) == ["1.csv", "mark.json"]

    write("2", overwrite=True)

    assert sorted(path.name for path in target.iterdir()) == ["2.csv", "mark.json"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["none", "foreign", "link", "late"])
def test_a_folder_without_our_mark_is_never_replaced(tmp_path, kind):
    target, ours = tmp_path / "run", tmp_path / "ours.json"
    ours.write_text("vlp_plugins")
    target.mkdir()
    (target / "precious").write_text("precious")
    if kind == "foreign":
        (target / "mark.json").write_text("{}")
    if kind == "link":
        (target / "mark.json").symlink_to(ours)
    if kind == "late":
        (target / "mark.json").write_text(f"{' ' * 5000}vlp_plugins")
    with (
        pytest.raises(OutputError, match=r"has no mark.json of vlp_plugins"),
        atomic_folder(target, mark="mark.json", overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (target / "precious").read_text() == "precious"


def test_no_space_in_a_folder_leaves_nothing(tmp_path):
    def fill():
        with atomic_folder(tmp_path / "run") as temporary:
            (temporary / "small").write_text("fits")
            save_file({"a": torch.zeros(100_000)}, temporary / "model.safetensors")

    with at_most(10_000), pytest.raises(OutputError, match="no space left"):
        fill()

    assert not list(tmp_path.iterdir())


# --- runs at the same time, and runs that were killed ---


def killed(program):
    """Runs a program that kills itself with nothing cleaned up."""
    text = f"import os, signal\nfrom vlp_plugins.runtime.files import *\n{program}\n"
    text += "    os.kill(os.getpid(), signal.SIGKILL)\n"
    result = subprocess.run([sys.executable, "-c", text], check=False)
    assert result.returncode == -signal.SIGKILL


def test_a_target_is_reserved_for_one_run(tmp_path):
    target = tmp_path / "new" / "out"
    with reserved(target):
        again = reserved(tmp_path / "new" / "." / "out")
        with (
            pytest.raises(OutputError, match=r"another run is writing .*out \(it holds .*lock"),
            again,
        ):
            pytest.fail("the block must not run")
        with reserved(target.with_name("other")):
            pass
    assert not list(tmp_path.iterdir())


def test_a_killed_run_frees_its_target_and_the_next_removes_what_it_left(tmp_path):
    target = tmp_path / "out"
    name = repr(str(target))
    killed(f"with reserved({name}), atomic_folder({name}) as t:\n    (t / 'a').touch()")
    killed(f"with atomic_file({str(tmp_path / 'file')!r}) as t:\n    t.touch()")
    left = list(tmp_path.glob(".unfinished-*"))
    assert len(left) == 2
    with atomic_file(tmp_path / "mine") as living:
        living.write_text("of a living process")
        (tmp_path / ".unfinished-ab").mkdir()  # nobody knows whose
        with reserved(target):
            assert {p.name for p in tmp_path.glob(".unfinished-*")} == {
                living.name, ".unfinished-ab",
            }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [".unfinished-ab", "mine"]


@pytest.mark.parametrize("renames", [1, 2])
def test_the_next_run_ends_a_replacement_that_was_killed(tmp_path, monkeypatch, renames):
    """After its first rename the old folder comes back, after the second it is deleted."""
    target, rename = tmp_path / "out", Path.rename
    with atomic_folder(target) as folder:
        (folder / "mark.json").write_text("vlp_plugins, old")
    left = [renames]

    def killed(path: Path, to: Path) -> Path:
        if not left[0]:
            os._exit(9)
        left[0] -= 1
        return rename(path, to)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", killed)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: os._exit(9))
        with atomic_folder(target, mark="mark.json", overwrite=True) as folder:
            (folder / "mark.json").write_text("vlp_plugins, new")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.exists() == (renames == 2)
    with reserved(target):
        assert (target / "mark.json").read_text().endswith("old" if renames == 1 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_file_that_is_not_ours_is_refused_and_links_are_not_followed(tmp_path):
    path = tmp_path / "out.lock"
    path.write_text("precious")
    with pytest.raises(OutputError, match="it is some other file"), reserved(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert path.read_text() == "precious"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot write"), reserved(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "elsewhere").read_text() == "precious"
