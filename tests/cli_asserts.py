"""Checks of a refused command: exit code 2, one line on stderr, nothing on stdout or on disk."""

import hashlib
from pathlib import Path

# Starts of lines on stderr that are no error.
NOTES = ("loading torch and transformers ...", "tokenizing ", "student ")
# Ends of names beside an SQLite file that carry no content while they are empty; -shm never does.
IGNORED_ENDINGS = ("-wal", ".lock")


def snapshot(*roots: Path) -> dict[str, tuple]:
    """Return every file, folder and link below `roots`: its mode, size, time and content."""
    entries = {}
    for root in roots:
        for path in [root, *sorted(root.rglob("*"))]:
            stat = path.lstat()
            is_empty = path.name.endswith(IGNORED_ENDINGS) and not stat.st_size
            if path.name.endswith("-shm") or is_empty:
                continue
            content = (
                hashlib.sha256(path.read_bytes()).hexdigest()
                if path.is_file() and not path.is_symlink()
                else ""
            )
            # The time of a folder changes with a probe file that tests whether it is writable.
            is_dir = path.is_dir()
            entries[str(path)] = (
                stat.st_mode,
                0 if is_dir else stat.st_size,
                0 if is_dir else stat.st_mtime_ns,
                content,
            )
    return entries


def line_of(code: int, out: str, err: str) -> str:
    """Return the error line without its prefix; fail if the command printed anything else."""
    assert code == 2, f"exit code {code}\n{out}\n{err}"
    assert out == "", f"output beside an error: {out!r}"
    lines = [line for line in err.splitlines() if not line.startswith(NOTES)]
    assert len(lines) == 1, f"not one line: {err!r}"
    assert lines[0].startswith("error: "), lines[0]
    message = lines[0].removeprefix("error: ")
    assert message.isprintable(), f"it has characters that cannot be printed: {message!r}"
    assert len(message) < 500, f"too long, {len(message)} characters: {message}"
    assert "Traceback" not in message
    return message
