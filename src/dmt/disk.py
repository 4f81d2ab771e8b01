"""What is on disk is whole or not there at all; one program holds a folder; what a disk complains about is told in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmt.errors import UserError

ADVICE = {
    errno.ENOSPC: ("the disk is full", "make room"), errno.EDQUOT: ("the disk is full", "make room"),
    errno.EFBIG: ("a file may not grow that large", "raise the limit (ulimit -f)"),
    errno.EROFS: ("it cannot be written to", "make it writable"), errno.EIO: ("the disk fails", "look after it"),
    errno.EACCES: ("it may not be opened", "make it readable and writable"),
    errno.EPERM: ("it may not be changed", "make it writable"),
}  # fmt: skip
"""What a disk complains about, and what helps."""
DATABASES = {
    sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS, sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}  # fmt: skip
"""The same, as SQLite says it."""


def trouble(error: BaseException) -> tuple[str, str] | None:
    """What a disk complains about and what helps, where `error`, or what it came from, is such a complaint; else None."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        # Libraries written in Rust say it in words; torch's says only that it failed to write.
        said = re.search(r"os error (\d+)", str(at))
        number = at.errno if isinstance(at, OSError) else int(said[1]) if said else None
        if isinstance(at, sqlite3.Error):
            number = DATABASES.get(getattr(at, "sqlite_errorcode", 0) & 0xFF)
        if "PytorchStreamWriter failed" in str(at):
            number = errno.ENOSPC
        if number in ADVICE:
            what, helps = ADVICE[number]
            if number == errno.EACCES and getattr(at, "filename", None):  # not what was asked for as a whole: one file of it
                what = f"{at.filename} may not be opened"  # type: ignore[attr-defined]
            return f"{what} ({os.strerror(number)})", helps
        at = at.__cause__ or at.__context__
    return None


def told(error: BaseException) -> str | None:
    """The same as a line about the file in question, where there is one."""
    if (found := trouble(error)) is None:
        return None
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename and str(error.filename) not in found[0] else ""
    return f"{place}{found[0]}; {found[1]} and try again; what was finished is kept"


def write(file: Path, text: str) -> None:
    """Write a file, whole: what was there before stays until all is written."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(place: Path, inherit: Callable[[Path, Path], Any] = lambda before, now: None) -> Iterator[Path]:
    """A folder to write to that is called `place` once all is written, and is gone where something fails.

    Other files of a folder that was there before go on lying in it. What a killed program left is settled by the next.

    Args:
        inherit: told of the folder that was there before and the new one in its place: what is to change its name it moves.
    """
    place = place.absolute()
    partial, before = (place.with_name(f".{place.name}.{what}") for what in ("partial", "before"))
    _settle(place, before, inherit)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.rglob("*"), partial):
            sync(file)
        if place.exists() and (Path.cwd().is_relative_to(place) or os.path.ismount(place)):
            _move(partial, place, replace=True)  # whoever is in it would be nowhere
            partial.rmdir()
        else:
            if place.exists():
                place.rename(before)
            partial.rename(place)
        sync(place.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        _settle(place, before, inherit)


def _settle(place: Path, before: Path, inherit: Callable[[Path, Path], Any]) -> None:
    if not before.exists():
        return
    if not place.exists():  # it was to make room for one that did not come
        before.rename(place)
        return
    inherit(before, place)
    _move(before, place, replace=False)
    shutil.rmtree(before, ignore_errors=True)


def _move(source: Path, target: Path, replace: bool) -> None:
    for part in source.iterdir():
        if replace or not (target / part.name).exists():
            part.replace(target / part.name)


def sync(place: Path) -> None:
    """Have a file, or the names in a folder, survive a power cut."""
    held = os.open(place, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def hold(lock: Path, refusal: str, wait: Callable[[], None] | None = None) -> int:
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
            held = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise UserError(f"{lock.parent} cannot be written to ({error.strerror}); make it writable or name another") from None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if wait is None:
                os.close(held)
                raise UserError(refusal) from None
            wait()
            try:
                fcntl.flock(held, fcntl.LOCK_EX)
            except BaseException:
                os.close(held)
                raise
        try:
            if os.fstat(held).st_ino == lock.stat().st_ino:
                return held
        except FileNotFoundError:
            pass
        os.close(held)  # whoever had it took the file away; this one is nobody's


def let_go(held: int, lock: Path) -> None:
    """Let others hold `lock`, which is taken away."""
    with suppress(OSError):  # of a disk that has become read-only: nobody holds the file that stays
        lock.unlink(missing_ok=True)
    os.close(held)
