"""Atomic files and folders, locks and versions."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from dmt import files
from dmt.errors import FailureError, UserError
from dmt.files import acquire_lock, atomic_path, atomic_write, read_json_lines, release_lock


def test_an_atomic_write_replaces_a_file_only_when_complete(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    with (  # noqa: PT012 - the file is read while it is written
        pytest.raises(KeyboardInterrupt),
        atomic_path(path) as partial_path,
    ):
        partial_path.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    atomic_write(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_an_atomic_folder_is_there_when_complete(tmp_path):
    path = tmp_path / "pack"
    stale = tmp_path / "pack.partial"
    stale.mkdir()
    (stale / "left").write_text("of a process that was killed")
    with atomic_path(path, as_folder=True) as partial_path:
        (partial_path / "tensors").write_text("x")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["tensors"]
    with pytest.raises(OSError, match="disk"), atomic_path(tmp_path / "other", as_folder=True):
        raise OSError(errno.EIO, "disk")
    assert [file.name for file in tmp_path.iterdir()] == ["pack"]


def test_a_lock_refuses_another_process_and_is_released(tmp_path):
    path = tmp_path / ".lock"
    code = f"""
from pathlib import Path
from dmt.errors import FailureError, UserError
from dmt.files import acquire_lock
try:
    acquire_lock(Path({str(path)!r}), "it is in use")
except UserError as error:
    print(error)
else:
    print("locked")
"""

    def try_elsewhere():
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
        )
        return done.stdout.strip()

    lock = acquire_lock(path, "")
    assert try_elsewhere() == "it is in use"
    release_lock(lock, path)
    assert not path.exists()
    assert try_elsewhere() == "locked"
    release_lock(acquire_lock(path, "of an ended process"), path)


def test_a_waiter_gets_the_lock_once_it_is_released(tmp_path):
    path, waiting, order = tmp_path / ".lock", threading.Event(), []
    lock = acquire_lock(path, "")

    def wait():
        other = acquire_lock(path, "", waiting.set)
        order.append("second")
        release_lock(other, path)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(10)
    order.append("first")
    release_lock(lock, path)
    thread.join(10)
    assert order == ["first", "second"]
    assert not path.exists()


def test_a_lock_that_cannot_be_created_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"missing cannot be written to \(No such file"):
        acquire_lock(tmp_path / "missing" / ".lock", "")


def test_no_module_that_windows_lacks_is_imported():
    code = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import dmt.cli.main, dmt.files, dmt.signals, dmt.paths, dmt.training.run_dir
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_a_disk_error_is_named_with_its_remedy():
    error = OSError(errno.ENOSPC, "No space left on device", "logs/run.json")
    assert files.disk_error(error) == (
        f"the disk is full ({os.strerror(errno.ENOSPC)})",
        "make room",
    )
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = error
    assert files.disk_error(wrapped) == files.disk_error(error)
    assert files.describe_disk_error(error).startswith("logs/run.json: the disk is full")
    assert files.disk_error(ValueError("os error")) is None


def test_a_failing_disk_is_a_failure_and_a_forbidden_path_a_mistake():
    failing = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    for code in failing:
        assert files.disk_error_class(OSError(code, os.strerror(code))) is FailureError
    for code in (errno.EACCES, errno.EPERM, errno.ENOENT):
        assert files.disk_error_class(OSError(code, os.strerror(code))) is UserError
    assert files.disk_error_class(ValueError("os error 28")) is FailureError


@pytest.mark.parametrize("read_only", [False, True])
def test_sqlite_errors_are_a_failure_only_on_a_read_only_disk(tmp_path, monkeypatch, read_only):
    flags = SimpleNamespace(f_flag=os.ST_RDONLY if read_only else 0)
    monkeypatch.setattr(os, "statvfs", lambda path: flags)
    with pytest.raises(sqlite3.OperationalError) as caught:
        sqlite3.connect(tmp_path / "missing" / "memory.db")
    error_class = files.disk_error_class(caught.value, tmp_path / "missing" / "memory.db")
    assert error_class is (FailureError if read_only else UserError)


def read_lines(path):
    return list(read_json_lines(path, "a.jsonl", "name another", '{"text": "..."}'))


def test_only_line_feeds_end_a_line_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["a\u2028b", "c\u2029d", "e\x85f", "g\x0bh"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\ufeff" + "\r\n".join(lines[:2]) + "\r\n \r\n" + lines[2] + "\n").encode())
    assert read_lines(path) == [
        (f"a.jsonl line {number}", {"text": text})
        for number, text in zip((1, 2, 4), texts, strict=False)
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ', r" \(Expecting value\)"),
        ("[1]", ""),
        (r'{"text": "\ud800"}', r" \(half of a surrogate pair\)"),
        ("[" * 100_000, r" \(too many brackets within brackets\)"),
        ("9" * 5_000, r" \(Exceeds the limit .*\)"),
    ],
)
def test_a_line_that_is_no_json_object_is_reported_with_its_number(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match=f"^a.jsonl line 3 is not a JSON object{reason}; a line is"):
        read_lines(path)
