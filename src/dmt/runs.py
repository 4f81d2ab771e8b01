"""Where runs are: from the word by which a person names one to its folder, and which is the newest."""

from __future__ import annotations

import re
from pathlib import Path

from dmt.errors import UserError
from dmt.wording import shown

RUNS = "lightning_logs"
"""Where runs are unless `trainer.log_dir` says something else."""
SHOWN = 8
"""Runs that are named to somebody who asked for another."""


def number_of(run: Path) -> int | None:
    """That of a folder `version_N`; None of one that has a name."""
    digits = run.name.removeprefix("version_")
    return int(digits) if run.name.startswith("version_") and digits.isdecimal() else None


def runs_in(place: Path, holding: str = "config.yaml") -> list[Path]:
    """The runs of a log folder that have a file or folder `holding`, the newest last.

    Numbered runs go by their number; a named one stands where its config was written among theirs.
    """
    there = [run.parent for run in place.glob(f"*/{holding}")] if place.is_dir() else []
    numbered = sorted((run for run in there if number_of(run) is not None), key=lambda run: number_of(run) or 0)
    named = sorted((run for run in there if number_of(run) is None and (run / "config.yaml").is_file()), key=_begun)
    found: list[Path] = []
    for nth, run in enumerate(numbered):
        begun = min(_begun(each) for each in numbered[nth:])  # of a file touched since the number knows better
        while named and _begun(named[0]) < begun:
            found.append(named.pop(0))
        found.append(run)
    return found + named


def check_name(name: str) -> None:
    """Raise `UserError` where a run cannot be called that: it is one folder, and told from those that have numbers."""
    if not re.fullmatch(r"\w[\w.+=@,-]{0,99}", name):
        what = "letters, digits, _ . + = @ , and - (the first a letter, digit or _), 100 at most"
        raise UserError(f"trainer.name must be the name of one folder: {what}, got {shown(name)}")
    if re.fullmatch(r"(version_)?\d+", name):
        raise UserError(f"trainer.name={name} is what a run without a name is called; give another, or leave it empty")


def run_folder(word: str) -> Path:
    """The run that `word` names: its folder or the student in it, or a name or number among those in `lightning_logs`.

    Raises:
        UserError: there is none.
    """
    given = at_home(word)
    places = (given, given.parent if given.name == "student" else given, Path(RUNS) / word, Path(RUNS) / f"version_{word}")
    try:
        for place in places:
            if (place / "config.yaml").is_file() or (place / "run.json").is_file():
                return place
        what = "it is no run (no config.yaml, no run.json)" if given.exists() else "no run is there"
    except OSError as error:
        what = f"it cannot be looked into ({error.strerror})"
    there = [run.name for run in runs_in(Path(RUNS))][-SHOWN:]
    raise UserError(f"{word}: {what}; give a run's folder" + (f", or one in {RUNS}: {', '.join(there)}" if there else ""))


def at_home(word: str) -> Path:
    """A path as typed, with `~` filled in; as it is where there is no such home."""
    try:
        return Path(word).expanduser()
    except RuntimeError:
        return Path(word)


def _begun(run: Path) -> float:
    """When a run was begun: its config is written then and never again."""
    for file in ("config.yaml", "student"):
        if (run / file).exists():
            return (run / file).stat().st_mtime
    return run.stat().st_mtime
