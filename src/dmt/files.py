"""Files and folders: atomic writes, locks, disk errors in one line, text input, format versions.

A file or folder written here is complete or not there at all, also after a crash or a power cut.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmt.errors import FailureError, UserError, format_value

if TYPE_CHECKING:
    from filelock import BaseFileLock

# Versions of the files that dmt writes; docs/reference lists all of them. A checkpoint or a student
# without a version is of version 1. A config file without one is written by hand, and is read.
CONFIG_VERSION = 2  # of a run's config.yaml, in its first line
RECORD_VERSION = 2  # of run.json, under `format`, and of the report files beside it
CHECKPOINT_VERSION = 2  # of a checkpoint, under `dmt`
STUDENT_VERSION = 2  # of a saved student, in its config.json under `dmt`

# errno -> what is wrong and what helps.
ERRNO_ADVICE = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk is full", "make room"),
    errno.EFBIG: ("a file may not grow that large", "raise the limit (ulimit -f)"),
    errno.EROFS: ("it cannot be written to", "make it writable"),
    errno.EIO: ("the disk reports an error", "check the disk"),
    errno.EACCES: ("it may not be opened", "make it readable and writable"),
    errno.EPERM: ("it may not be changed", "make it writable"),
}
# The disk fails although the path is right. Other errors mean that the path is wrong.
FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# SQLite's primary result code -> errno.
SQLITE_ERRNOS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EPERM,  # the file or its disk, see `disk_error_class`
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}


def disk_error(error: BaseException) -> tuple[str, str] | None:
    """Return what is wrong with the disk and what helps, or None if the disk is not the cause.

    Args:
        error: Any exception; its causes and contexts are searched too.
    """
    if (cause := _find_disk_error(error)) is None:
        return None
    code, filename = cause
    problem, advice = ERRNO_ADVICE[code]
    if code == errno.EACCES and filename:  # one file of a folder, so name it
        problem = f"{filename} may not be opened"
    return f"{problem} ({os.strerror(code)})", advice


def disk_error_class(error: BaseException, path: Path | None = None) -> type[UserError]:
    """Return `FailureError` if the disk failed (is full or read-only, say), else `UserError`.

    Args:
        error: An exception of reading or writing; its causes and contexts are searched too.
        path: A file or folder on the disk. SQLite reports a read-only disk as it does a forbidden
            file, so this tells them apart.
    """
    if (cause := _find_disk_error(error)) is None:
        return UserError
    code, _ = cause
    is_forbidden = code in (errno.EACCES, errno.EPERM)
    if code in FAILURES or (is_forbidden and path is not None and _is_on_read_only_disk(path)):
        return FailureError
    return UserError


def _is_on_read_only_disk(path: Path) -> bool:
    if not hasattr(os, "statvfs"):  # Windows
        return False
    path = Path(os.path.expanduser(path)).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return bool(os.statvfs(existing).f_flag & os.ST_RDONLY)


def _find_disk_error(error: BaseException) -> tuple[int, Any] | None:
    """Return a key of `ERRNO_ADVICE` and the file, if it is known; None for another error."""
    visited: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in visited:
        visited.append(current)
        # Libraries written in Rust put the code into the message; torch only says that it failed.
        match = re.search(r"os error (\d+)", str(current))
        code = current.errno if isinstance(current, OSError) else int(match[1]) if match else None
        if isinstance(current, sqlite3.Error):
            code = SQLITE_ERRNOS.get(getattr(current, "sqlite_errorcode", 0) & 0xFF)
        if "PytorchStreamWriter failed" in str(current):
            code = errno.ENOSPC
        if code in ERRNO_ADVICE:
            return code, getattr(current, "filename", None)
        current = current.__cause__ or current.__context__
    return None


def describe_disk_error(error: BaseException) -> str | None:
    """Return `disk_error` as one line that names the file if it is known, or None."""
    if (problem_and_advice := disk_error(error)) is None:
        return None
    problem, advice = problem_and_advice
    filename = error.filename if isinstance(error, OSError) else None
    prefix = f"{filename}: " if filename and str(filename) not in problem else ""
    return f"{prefix}{problem}; {advice} and try again; what was finished is kept"


@contextmanager
def atomic_path(target: Path, *, as_folder: bool = False, fsync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `target`; move what was written there to `target` on success.

    Until then whatever was at `target` stays. On an error the temporary file is removed.

    Args:
        target: File to replace, or folder to create.
        as_folder: Create the temporary path as a folder, which can only replace an empty one.
        fsync: Flush to the disk before the move, so that the file survives a power cut.
    """
    partial_path = target.with_name(f"{target.name}.partial")
    if as_folder:
        if partial_path.is_dir():  # of a process that was killed
            shutil.rmtree(partial_path)
        partial_path.mkdir()
    try:
        yield partial_path
        if fsync:
            fsync_path(partial_path)
        partial_path.replace(target)
        if fsync:
            fsync_path(target.parent)
    finally:
        if as_folder:
            shutil.rmtree(partial_path, ignore_errors=True)
        elif not partial_path.is_dir():
            partial_path.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`; an existing file is replaced only once all is written."""
    with atomic_path(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(
    target: Path, migrate: Callable[[Path, Path], Any] = lambda before, now: None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` on success and is removed on an error.

    Files of an existing `target` that the new folder does not have are kept. What a killed process
    left behind is cleaned up first.

    Args:
        target: Folder to create or replace.
        migrate: Called with the old folder and the new one at `target`, before the old one's other
            files are moved over; it moves what has to change its name.
    """
    target = target.absolute()
    partial_dir, backup = (
        target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "before")
    )
    _finish_replacement(target, backup, migrate)
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    try:
        yield partial_dir
        for path in (*partial_dir.rglob("*"), partial_dir):
            fsync_path(path)
        if target.exists() and (Path.cwd().is_relative_to(target) or os.path.ismount(target)):
            # A rename would leave the working directory of this process without a path.
            _move_entries(partial_dir, target, replace=True)
            partial_dir.rmdir()
        else:
            if target.exists():
                target.rename(backup)
            partial_dir.rename(target)
        fsync_path(target.parent)
    except BaseException:
        shutil.rmtree(partial_dir, ignore_errors=True)
        raise
    finally:
        _finish_replacement(target, backup, migrate)


def _finish_replacement(target: Path, backup: Path, migrate: Callable[[Path, Path], Any]) -> None:
    if not backup.exists():
        return
    if not target.exists():  # the replacement never arrived
        backup.rename(target)
        return
    migrate(backup, target)
    _move_entries(backup, target, replace=False)
    shutil.rmtree(backup, ignore_errors=True)


def _move_entries(source: Path, target: Path, replace: bool) -> None:
    for entry in source.iterdir():
        if replace or not (target / entry.name).exists():
            entry.replace(target / entry.name)


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; on Windows folders need no flush."""
    if os.name == "nt" and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def acquire_lock(
    lock_path: Path, refusal_message: str, on_wait: Callable[[], None] | None = None
) -> BaseFileLock:
    """Take an exclusive lock until `release_lock` or the end of the process, however it ends.

    Args:
        lock_path: File of the lock; it is created if needed.
        refusal_message: Message of the error if another process holds the lock.
        on_wait: Called once if another process holds the lock; then wait for it instead.

    Returns:
        The lock, for `release_lock`.

    Raises:
        UserError: Another process holds the lock, or its file cannot be created.
    """
    from filelock import FileLock, Timeout  # here, because most commands need no lock

    lock = FileLock(lock_path, thread_local=False, fallback_to_soft=False)
    try:
        lock_path.parent.stat()  # FileLock would create the folder
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if on_wait is None:
                raise UserError(refusal_message) from None
            on_wait()
            lock.acquire()
    except OSError as error:
        raise disk_error_class(error)(
            f"{lock_path.parent} cannot be written to ({error.strerror});"
            " make it writable or name another"
        ) from None
    return lock


def release_lock(lock: BaseFileLock, lock_path: Path) -> None:
    """Release a lock and remove its file."""
    with suppress(OSError):  # a read-only disk, or Windows: the file stays and nobody holds it
        lock_path.unlink(missing_ok=True)
    lock.release(force=True)


def read_text_file(path: Path, display_name: str, advice: str) -> str:
    """Read a UTF-8 text file, without its byte order mark; every line ends with a line feed.

    Args:
        path: File to read; `~` is expanded, and what ends in `.gz` is decompressed.
        display_name: How error messages name the file, as the user typed it.
        advice: What error messages advise instead.

    Raises:
        UserError: The file cannot be read or is not UTF-8 text.
    """
    open_file: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(os.path.expanduser(path), "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{display_name} is not a complete gzip file; {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{display_name} is not UTF-8 text; convert it, or {advice}") from None
    except (OSError, RuntimeError, ValueError) as error:  # no such home folder; a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{display_name} cannot be read ({reason}); {advice}") from None
    if "\0" in text:
        raise UserError(
            f"{display_name} holds NUL bytes, as UTF-16 and programs do;"
            f" convert it to UTF-8, or {advice}"
        )
    return text


def check_utf8_args(args: Iterable[str]) -> None:
    """Raise `UserError` for a command-line argument that is not UTF-8: it cannot be stored."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{format_value(arg)} is not UTF-8 text; type it in UTF-8, or rename what it names"
            ) from None


def read_json_lines(
    path: Path, display_name: str, advice: str, example: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each JSON object of a file of JSON lines, with where it stands, as in `a.jsonl line 3`.

    Only line feeds end a line, after a carriage return or not: a JSON string may hold the other
    line separators of Unicode. Blank lines are skipped.

    Args:
        path: File to read.
        display_name: How error messages name the file, as the user typed it.
        advice: What error messages advise where the file cannot be read.
        example: A line as it should be.

    Raises:
        UserError: The file cannot be read, or a line is not an object.
    """
    text = read_text_file(path, display_name, advice)
    for number, line in enumerate(iterate_lines(text), 1):
        if not line.strip():
            continue
        location = f"{display_name} line {number}"
        value, reason = parse_json(line)
        if not isinstance(value, dict):
            raise UserError(f"{location} is not a JSON object{reason}; a line is {example}")
        yield location, value


def iterate_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text with their line feeds, which alone end a line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def parse_json(text: str) -> tuple[Any, str]:
    """Return what a JSON text says, or None and why it cannot be read, in brackets."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, f" ({error.msg})"
    except RecursionError:
        return None, " (too many brackets within brackets)"
    except UnicodeEncodeError:  # no tokenizer accepts it
        return None, " (half of a surrogate pair)"
    except ValueError as error:  # a number of thousands of digits
        return None, f" ({error})"
    return value, ""


def format_fields(record: Mapping[str, Any]) -> str:
    """Return the names of an object's fields for an error message."""
    names = ", ".join(map(format_value, record))
    return f"its fields are {names}" if names else "it has no fields"


def check_version(version: Any, supported: int, label: str, older_advice: str) -> None:
    """Raise `UserError` unless `version` is the supported one, as a number or as its digits.

    Args:
        version: What the file says.
        supported: The version that this dmt reads.
        label: Start of the message, as in `pack family: version`.
        older_advice: What to do with a file of an older version, or of none.
    """
    is_digits = isinstance(version, str) and version.isdecimal() and len(version) < 10
    version_number = int(version) if is_digits else version
    if type(version_number) is int and version_number == supported:
        return
    is_newer = type(version_number) is int and version_number > supported
    advice = (
        "a newer dmt made it: update dmt, or use the one that made it" if is_newer else older_advice
    )
    raise UserError(f"{label} {format_value(version)}, this dmt knows {supported}; {advice}")
