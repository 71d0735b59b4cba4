from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from trtseg import files
from trtseg.errors import OutputError

PUBLISHED = Path(__file__).parent / "data" / "published"


@pytest.fixture
def umask():
    """Sets the umask; put back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def write_half(path: Path, error: type[BaseException]) -> None:
    """Start to write, then fail."""
    with files.atomic_write(path) as stream:
        stream.write(b"half of the n")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, content: bytes) -> None:
    with files.atomic_write(path) as stream:
        stream.write(content)


def test_a_new_file(tmp_path):
    write(tmp_path / "new", b"content")
    assert (tmp_path / "new").read_bytes() == b"content"
    assert names(tmp_path) == ["new"]


def test_a_file_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old and longer")
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_an_empty_file(tmp_path):
    write(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""


def test_the_name_shows_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files.atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_the_name_shows_nothing_until_the_end(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path) as stream:
        stream.write(b"new")
        assert not path.exists()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_any_exception_leaves_the_old_file_alone(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(kind):
        write_half(path, kind)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_any_exception_leaves_nothing_where_nothing_was(tmp_path, kind):
    with pytest.raises(kind):
        write_half(tmp_path / "file", kind)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file_alone(tmp_path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=r"file: No space left on device.*room on the disk"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk(tmp_path):
    """The limit on file size stands for the disk's: the write fails in the middle."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = f"""
import resource
from pathlib import Path
from trtseg.errors import OutputError
from trtseg.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with atomic_write(Path({str(path)!r})) as stream:
        for _ in range(64):
            stream.write(bytes(4096))
except OutputError as error:
    print(error.exit_code, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(files.__file__).parents[1],
    )
    assert done.stdout.startswith(f"5 {path}: File too large; expected a folder")
    assert done.stderr == ""
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert umask(mask) == mask  # and the umask is as it was


def test_a_missing_folder(tmp_path):
    path = tmp_path / "missing" / "file"
    with pytest.raises(OutputError, match=r"missing/file: No such file.*-o") as caught:
        write(path, b"content")
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "folder").write_bytes(b"a file")
    with pytest.raises(OutputError, match="folder/file: Not a directory"):
        write(tmp_path / "folder" / "file", b"content")
    assert (tmp_path / "folder").read_bytes() == b"a file"


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OutputError, match="file: Is a directory"):
        write(tmp_path / "file", b"content")
    assert names(tmp_path) == ["file"]
    assert names(tmp_path / "file") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        write(folder / "file", b"content")


def test_the_longest_name(tmp_path):
    name = "n" * 248 + ".nii.gz"
    write(tmp_path / name, b"content")
    assert names(tmp_path) == [name]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"


# What killed writers leave behind

LEFT = ".file.0123456789abcdef.part"


def age(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def leave(folder: Path, name: str = LEFT, seconds: float = 2 * files.ABANDONED_AFTER) -> Path:
    """A temporary file as old as that."""
    path = folder / name
    path.write_bytes(b"half")
    return age(path, seconds)


def test_what_a_killed_writer_left_goes_with_the_next_write_after_a_day(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from trtseg.files import atomic_write
with atomic_write(Path({str(tmp_path / "file")!r})) as stream:
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(files.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == [left.name, "file"]
    age(left, 23 * 3600)
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == [left.name, "file"]
    age(left, 25 * 3600)
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "name",
    [
        ".other.0123456789abcdef.part",
        ".file.nii.0123456789abcdef.part",
        ".file.0123456789abcde.part",
        ".file.0123456789abcdeF.part",
        ".file.0123456789abcdef.part2",
        "file.0123456789abcdef.part",
        "Xfile.0123456789abcdef.part",
    ],
)
def test_files_of_other_names_stay(tmp_path, name):
    leave(tmp_path, name)
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == sorted(["file", name])


def test_leftovers_of_a_long_name(tmp_path):
    leave(tmp_path, f".{'n' * 32}.0123456789abcdef.part")
    write(tmp_path / ("n" * 248 + ".nii.gz"), b"new")
    assert names(tmp_path) == ["n" * 248 + ".nii.gz"]


def test_links_pipes_and_folders_stay(tmp_path):
    (tmp_path / "target").write_bytes(b"target")
    kinds = [tmp_path / f".file.{digit * 16}.part" for digit in "abc"]
    kinds[0].symlink_to("target")
    os.mkfifo(kinds[1])
    kinds[2].mkdir()
    for path in [*kinds, tmp_path / "target"]:
        age(path, 2 * files.ABANDONED_AFTER)
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == sorted(["file", "target", *(path.name for path in kinds)])


def test_a_leftover_of_another_user_stays(tmp_path, monkeypatch):
    leave(tmp_path)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == [LEFT, "file"]


def test_two_writers_at_once(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path) as slow:
        slow.write(b"slow")
        slow.flush()
        (temporary,) = tmp_path.iterdir()
        age(temporary, 2 * files.ABANDONED_AFTER)
        write(path, b"quick")
        assert path.read_bytes() == b"quick"
        assert temporary.exists()
    assert path.read_bytes() == b"slow"
    assert names(tmp_path) == ["file"]


def test_the_lock_is_held_until_the_file_has_its_name(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def look(source, target):
        with source.open("rb") as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write(tmp_path / "file", b"new")
    assert seen == ["file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    leave(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == [LEFT, "file"]


# JSON, folders, digests


def test_json(tmp_path):
    files.atomic_write_json(tmp_path / "data.json", {"b": [1, 2.5], "a": None})
    assert (tmp_path / "data.json").read_bytes() == (
        b'{\n  "a": null,\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    )


def test_data_that_is_no_json_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "data.json").write_bytes(b"old")
    with pytest.raises(TypeError):
        files.atomic_write_json(tmp_path / "data.json", {"a": object()})
    assert (tmp_path / "data.json").read_bytes() == b"old"
    assert names(tmp_path) == ["data.json"]


def test_make_folder(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_make_folder_where_a_file_is(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"{name}: .*choose another folder"):
        files.make_folder(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "old.csv", "new/folder/a.csv"])
def test_what_can_be_written_leaves_no_trace(tmp_path, monkeypatch, name):
    (tmp_path / "old.csv").touch()
    monkeypatch.chdir(tmp_path)
    files.check_writable(Path(name), "--stats")
    files.check_writable(tmp_path / name, "--stats")
    assert names(tmp_path) == ["old.csv"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file/a.csv", "file: Not a directory; expected a folder in which a.csv can be written"),
        ("file/below/a.csv", "file: Not a directory"),
        ("link/a.csv", "link: No such file or directory"),
        ("folder", "folder: Is a directory"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, said):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError, match=f"{said}.*; choose another --stats$"):
        files.check_writable(tmp_path / name, "--stats")


def test_a_folder_in_which_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(*, dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=f"{tmp_path}: Permission denied"):
        files.check_writable(tmp_path / "a.csv", "--stats")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "another output folder with -o"),
        ({"action": "choose another --json"}, "another --json"),
    ],
)
def test_what_to_do_where_it_cannot_be_written(tmp_path, options, said):
    with pytest.raises(OutputError, match=said):
        files.atomic_write_json(tmp_path / "gone" / "a.json", {}, **options)


def test_sha256(tmp_path):
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc") == abc
    assert files.sha256_bytes(b"abc") == abc


def test_digests_of_a_file_read_in_several_pieces(tmp_path):
    path = tmp_path / "zeros"
    path.write_bytes(bytes(3 << 20))
    # from sha256sum and git hash-object
    assert files.sha256_file(path) == (
        "bbd05cf6097ac9b1f89ea29d2542c1b7b67ee46848393895f5a9e43fa1f621e5"
    )
    assert files.git_blob_sha1(path) == "b7f1f882873aaf18ecf6104b88fd1a7bfee58d7b"


def test_git_blob_of_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    assert files.git_blob_sha1(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("bdn.model.ckpt.index", "e5309211caa0cbe1ebba411c46c790aa414106a0"),
        ("cgm.model.ckpt.index", "f40f58a11816f5ddecd0dd879a5175d3e48bd3fb"),
    ],
)
def test_git_blobs_of_the_published_files(name, digest):
    assert files.git_blob_sha1(PUBLISHED / name) == digest
