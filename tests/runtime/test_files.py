import errno
import fcntl
import os
import time

import pytest

from ant_jax.runtime.files import locked, words_of, write_bytes, write_new, writing


def test_two_that_write_one_file_at_once_leave_that_of_the_last(tmp_path):
    path = tmp_path / "new" / "a [b]"
    with writing(path) as one:
        one.write(b"on")
        with writing(path) as other:
            other.write(b"other")
            assert not path.exists()
        assert path.read_bytes() == b"other"
        one.write(b"e")
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"before")
    with pytest.raises(KeyboardInterrupt), writing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").mkdir()
    places = {
        "a/b/c": "the folder .*/a/b can't be made: .*/a is not a folder; choose another path",
        "a/b": "the folder .*/a can't be made: .*/a is not a folder; choose another path",
        "b": "/b is a folder; choose the path of a file",
        "x" * 250: "xxx can't be written: File name too long; choose another path",
        "x" * 300 + "/b": "xxx can't be made: File name too long; choose another path",
    }
    for place, message in places.items():
        with pytest.raises(OSError, match=message):
            write_bytes(tmp_path / place, b"")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and not os.listdir(tmp_path / "b")


@pytest.mark.parametrize("links", [True, False])
def test_what_is_there_is_not_written_anew(links, tmp_path, monkeypatch):
    def refuse(source, _):
        # The file that a killed writer leaves is removed after a day.
        assert source.name.startswith("a.") and source.name.endswith(".partial")
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "new" / "a"
    assert write_new(path, b"first") and not write_new(path, b"second")
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_an_error_of_the_system_is_told_without_its_number(tmp_path):
    def words(use):
        with pytest.raises(OSError) as error:
            use()
        return words_of(error.value)

    assert words((tmp_path / "a").read_bytes) == f"there is no file or folder {tmp_path / 'a'}"
    assert words(tmp_path.read_bytes) == f"{tmp_path}: Is a directory"
    assert words_of(OSError(28, "No space left on device")) == "No space left on device"
    assert words_of(OSError("ours")) == "ours"


def test_what_killed_writers_have_left_is_removed_after_a_day(tmp_path):
    path = tmp_path / "a"
    names = ("a.1-00.partial", "a.2-00.partial", "ab.1-00.partial", "a.txt")
    for name in names:
        (tmp_path / name).touch()
    for name in (names[0], *names[2:]):
        os.utime(tmp_path / name, 2 * (time.time() - 25 * 3600,))
    # Another writer may remove it first.
    write_bytes(path, b"")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", *names[1:]])


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "new" / ".lock"
    with locked(path):
        with pytest.raises(BlockingIOError, match=f"^process {os.getpid()} on "), locked(path):
            pass
        # The holder may remove the file at the end; the next file is a new lock.
        path.unlink()
        with locked(path):
            pass
    with locked(path):
        pass


def test_a_lock_that_is_removed_before_it_is_held_is_none(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    flock, removed = fcntl.flock, []

    def late(file, how):
        if not removed:
            # The last holder removed its file after it was opened here.
            path.unlink()
            removed.append(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    refused = pytest.raises(BlockingIOError, match=f"^process {os.getpid()} on ")
    with locked(path), refused, locked(path):
        pass


def test_an_error_under_a_lock_is_not_that_of_the_lock(tmp_path):
    with pytest.raises(OSError) as raised, locked(tmp_path / ".lock"):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert raised.value.filename is None
