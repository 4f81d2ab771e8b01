"""What a refusal is: exit code 2, one line that names the thing and the next step, nothing on standard output, nothing written."""

import hashlib
from pathlib import Path

NOTES = ("loading torch and transformers ...",)
"""Lines on standard error that are no complaint."""
PASSING = ("-wal", ".lock")
"""Ends of names beside an SQLite file where readers and writers meet: empty, they say nothing; nor does what ends in -shm."""


def snapshot(*places: Path) -> dict[str, tuple]:
    """Every file, folder and link below `places`: its kind, size, time of change and content."""
    found = {}
    for place in places:
        for path in [place, *sorted(place.rglob("*"))]:
            about = path.lstat()
            if path.name.endswith("-shm") or (path.name.endswith(PASSING) and not about.st_size):
                continue
            content = (
                hashlib.sha256(path.read_bytes()).hexdigest()
                if path.is_file() and not path.is_symlink()
                else ""
            )
            # The time of a folder changes where a file was made in it, and gone again: a probe whether it can be written to.
            when = about.st_mtime_ns if not path.is_dir() else 0
            found[str(path)] = (
                about.st_mode,
                about.st_size if not path.is_dir() else 0,
                when,
                content,
            )
    return found


def line_of(code: int, out: str, err: str) -> str:
    """The one line that was said, its prefix left out; whoever said something else fails."""
    assert code == 2, f"exit code {code}\n{out}\n{err}"
    assert out == "", f"half a result: {out!r}"
    lines = [line for line in err.splitlines() if line not in NOTES]
    assert len(lines) == 1, f"not one line: {err!r}"
    assert lines[0].startswith("error: "), lines[0]
    said = lines[0].removeprefix("error: ")
    assert said.isprintable(), f"something in it is not printed: {said!r}"
    assert len(said) < 500, f"nobody reads {len(said)} characters: {said}"
    assert "Traceback" not in said
    return said
