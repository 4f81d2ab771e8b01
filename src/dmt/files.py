"""Versions of the files that dmt writes: of one that is older or newer than it knows, what is told and what is to be done.

The README lists all of them ("Versions of files").

What is on disk is whole or not there at all; one program holds a folder; what a disk complains about is told in one line.

Text files that a person names: read as UTF-8, or refused in one line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmt.errors import UserError, format_value

ERRNO_ADVICE = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk is full", "make room"),
    errno.EFBIG: ("a file may not grow that large", "raise the limit (ulimit -f)"),
    errno.EROFS: ("it cannot be written to", "make it writable"),
    errno.EIO: ("the disk fails", "look after it"),
    errno.EACCES: ("it may not be opened", "make it readable and writable"),
    errno.EPERM: ("it may not be changed", "make it writable"),
}
"""What a disk complains about, and what helps."""
SQLITE_ERRNOS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""The same, as SQLite says it."""


def disk_error(error: BaseException) -> tuple[str, str] | None:
    """What a disk complains about and what helps, where `error`, or what it came from, is such a complaint; else None."""
    visited: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in visited:
        visited.append(current)
        # Libraries written in Rust say it in words; torch's says only that it failed to write.
        match = re.search(r"os error (\d+)", str(current))
        code = current.errno if isinstance(current, OSError) else int(match[1]) if match else None
        if isinstance(current, sqlite3.Error):
            code = SQLITE_ERRNOS.get(getattr(current, "sqlite_errorcode", 0) & 0xFF)
        if "PytorchStreamWriter failed" in str(current):
            code = errno.ENOSPC
        if code in ERRNO_ADVICE:
            problem, advice = ERRNO_ADVICE[code]
            if code == errno.EACCES and getattr(
                current, "filename", None
            ):  # not what was asked for as a whole: one file of it
                problem = f"{current.filename} may not be opened"  # type: ignore[attr-defined]
            return f"{problem} ({os.strerror(code)})", advice
        current = current.__cause__ or current.__context__
    return None


def describe_disk_error(error: BaseException) -> str | None:
    """The same as a line about the file in question, where there is one."""
    if (problem_and_advice := disk_error(error)) is None:
        return None
    prefix = (
        f"{error.filename}: "
        if isinstance(error, OSError)
        and error.filename
        and str(error.filename) not in problem_and_advice[0]
        else ""
    )
    return f"{prefix}{problem_and_advice[0]}; {problem_and_advice[1]} and try again; what was finished is kept"


def atomic_write(path: Path, text: str) -> None:
    """Write a file, whole: what was there before stays until all is written."""
    partial_path = path.with_name(f"{path.name}.partial")
    try:
        with partial_path.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


@contextmanager
def atomic_directory(
    target: Path, migrate: Callable[[Path, Path], Any] = lambda before, now: None
) -> Iterator[Path]:
    """A folder to write to that is called `place` once all is written, and is gone where something fails.

    Other files of a folder that was there before go on lying in it. What a killed program left is settled by the next.

    Args:
        inherit: told of the folder that was there before and the new one in its place: what is to change its name it moves.
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
            _move_entries(partial_dir, target, replace=True)  # whoever is in it would be nowhere
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
    if not target.exists():  # it was to make room for one that did not come
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
    """Have a file, or the names in a folder, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def acquire_lock(
    lock_path: Path, refusal_message: str, on_wait: Callable[[], None] | None = None
) -> int:
    """Hold `lock` until `let_go`, or until this program ends, however it ends: the system lets go of what the dead held.

    Args:
        refusal: said where somebody else holds it.
        wait: called where somebody else holds it, and then that is waited for.

    Raises:
        UserError: somebody else holds it, or the file cannot be made.
    """
    import fcntl  # not on Windows, and then only there a clear failure

    while True:
        try:
            fd = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise UserError(
                f"{lock_path.parent} cannot be written to ({error.strerror}); make it writable or name another"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if on_wait is None:
                os.close(fd)
                raise UserError(refusal_message) from None
            on_wait()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                raise
        try:
            if os.fstat(fd).st_ino == lock_path.stat().st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # whoever had it took the file away; this one is nobody's


def release_lock(fd: int, lock_path: Path) -> None:
    """Let others hold `lock`, which is taken away."""
    with suppress(OSError):  # of a disk that has become read-only: nobody holds the file that stays
        lock_path.unlink(missing_ok=True)
    os.close(fd)


def read_text_file(path: Path, display_name: str, advice: str) -> str:
    """What a file says, without the mark that some editors begin it with.

    Args:
        name: what a refusal calls it, in the words that were typed.
        advice: what to do instead.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{display_name} is not UTF-8 text; convert it, or {advice}") from None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no such home folder; a NUL byte in a name
        raise UserError(
            f"{display_name} cannot be read ({getattr(error, 'strerror', None) or error}); {advice}"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{display_name} holds NUL bytes, as UTF-16 and programs do; convert it to UTF-8, or {advice}"
        )
    return text


def check_utf8_args(args: Iterable[str]) -> None:
    """Raise `UserError` for a word that was typed in another encoding than UTF-8: nothing could store, show or read it."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{format_value(arg)} is not UTF-8 text; type it in UTF-8, or rename what it names"
            ) from None


def parse_json_line(line: str) -> Any:
    """What a line of JSON says.

    Raises:
        ValueError: it is none, or too deep, or holds half a character, which no tokenizer takes.
    """
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("brackets within brackets") from None
    return value


CONFIG_VERSION = 1
"""Of a run's `config.yaml`, in its first line; a file without one is of version 1."""
RECORD_VERSION = 1
"""Of `run.json`, under `format`, and of the files for people beside it."""
CHECKPOINT_VERSION = 1
"""Of a checkpoint, under `dmt`; one without is of version 1."""
STUDENT_VERSION = 1
"""Of a saved student, in its `config.json` under `dmt`; one without is of version 1."""


def check_version(version: Any, supported: int, label: str, older_advice: str) -> None:
    """Let the version `known` pass, as a number or its digits.

    Args:
        what: begins the line, as in `pack family: version`.
        older: what to do with a file of an older version, or of none.

    Raises:
        UserError: it is another.
    """
    version_number = (
        int(version)
        if isinstance(version, str) and version.isdecimal() and len(version) < 10
        else version
    )
    if type(version_number) is int and version_number == supported:
        return
    is_newer = type(version_number) is int and version_number > supported
    advice = (
        "a newer dmt made it: update dmt, or use the one that made it" if is_newer else older_advice
    )
    raise UserError(f"{label} {format_value(version)}, this dmt knows {supported}; {advice}")
