"""Find runs and students on the disk: by the name a user types, the chosen or the newest one."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from dmt.errors import UserError, format_value
from dmt.files import atomic_write

RUNS_DIR = "lightning_logs"  # where runs are unless `trainer.log_dir` says otherwise
MAX_LISTED_RUNS = 8  # runs that an error message lists
FACTS_FILE = "memory.db"  # holds facts and rows written online, beside a saved model's weights
KNOWLEDGE_FILE = "knowledge.safetensors"  # pack of the facts that a run took out of its student
CHOICE_FILE = ".student"  # in `RUNS_DIR`: the student that `dmt use` chose


def parse_run_number(run_dir: Path) -> int | None:
    """Return N of a folder `version_N`, or None for a run with a name."""
    digits = run_dir.name.removeprefix("version_")
    return int(digits) if run_dir.name.startswith("version_") and digits.isdecimal() else None


def list_runs(log_dir: Path, required_name: str = "config.yaml") -> list[Path]:
    """List the runs of a log folder that have a file or folder `required_name`, the newest last.

    Numbered runs are ordered by number; a named run is placed by the time its config was written.
    """
    if not log_dir.is_dir():
        return []
    run_dirs = [path.parent for path in log_dir.glob(f"*/{required_name}")]
    numbered = sorted(
        (run_dir for run_dir in run_dirs if parse_run_number(run_dir) is not None),
        key=lambda run_dir: parse_run_number(run_dir) or 0,
    )
    named = sorted(
        (
            run_dir
            for run_dir in run_dirs
            if parse_run_number(run_dir) is None and (run_dir / "config.yaml").is_file()
        ),
        key=_get_start_time,
    )
    ordered: list[Path] = []
    for index, run_dir in enumerate(numbered):
        # A file may have been touched later; the number then bounds the time from above.
        start_time = min(_get_start_time(later_run) for later_run in numbered[index:])
        while named and _get_start_time(named[0]) < start_time:
            ordered.append(named.pop(0))
        ordered.append(run_dir)
    return ordered + named


def check_run_name(name: str) -> None:
    """Raise `UserError` unless `name` is one folder's name and not one of a numbered run."""
    if not re.fullmatch(r"\w[\w.+=@,-]{0,99}", name):
        allowed = "letters, digits, _ . + = @ , and - (the first a letter, digit or _), 100 at most"
        raise UserError(
            f"trainer.run_name must be the name of one folder: {allowed}, got {format_value(name)}"
        )
    if re.fullmatch(r"(version_)?\d+", name):
        raise UserError(
            f"trainer.run_name={name} is what a run without a name is called;"
            " give another, or leave it empty"
        )


def find_run(name_or_path: str) -> Path:
    """Find a run by its folder, by the student in it, or by its name or number in `RUNS_DIR`.

    Raises:
        UserError: There is no such run.
    """
    path = expand_home(name_or_path)
    candidates = (
        path,
        path.parent if path.name == "student" else path,
        Path(RUNS_DIR) / name_or_path,
        Path(RUNS_DIR) / f"version_{name_or_path}",
    )
    try:
        for candidate in candidates:
            if (candidate / "config.yaml").is_file() or (candidate / "run.json").is_file():
                return candidate
        problem = (
            "it is no run (no config.yaml, no run.json)" if path.exists() else "no run is there"
        )
    except OSError as error:
        problem = f"it cannot be looked into ({error.strerror})"
    recent_names = [run_dir.name for run_dir in list_runs(Path(RUNS_DIR))][-MAX_LISTED_RUNS:]
    raise UserError(
        f"{name_or_path}: {problem}; give a run's folder"
        + (f", or one in {RUNS_DIR}: {', '.join(recent_names)}" if recent_names else "")
    )


def resolve_student_folder(path: str | Path | None = None) -> Path:
    """Return the folder of a saved student.

    Args:
        path: the folder itself, or a run's folder, which holds it as `student`, or the name of a
            run in `lightning_logs`; None is the one that `dmt use` chose, or the newest run there.

    Raises:
        UserError: there is no saved student.
    """
    if path is None:
        if (chosen := read_chosen_student()) is not None:
            return chosen
        runs = list_runs(Path(RUNS_DIR), required_name="student")
        if not runs:
            raise UserError(
                f"no student is in {RUNS_DIR}/ here; run dmt distill first, or name a model"
            )
        return runs[-1] / "student"
    folder = expand_home(path)
    for candidate in (folder / "student", folder, Path(RUNS_DIR) / folder / "student"):
        if (candidate / "config.json").is_file():
            return candidate
    problem = (
        "it holds no saved student (no config.json)" if folder.exists() else "nothing is there"
    )
    raise UserError(
        f"model {path}: {problem}; give a run's folder, such as {RUNS_DIR}/version_0, or one made "
        "by save_pretrained"
    )


def find_knowledge_pack(student: Path) -> Path | None:
    """Return the pack of the facts that a run took out of its student; None where there is none.

    Args:
        student: folder of the student; the pack is in it or beside it.
    """
    candidates = [student / KNOWLEDGE_FILE]
    if student.name == "student":
        candidates.append(student.parent / KNOWLEDGE_FILE)
    return next((path for path in candidates if path.is_file()), None)


def read_chosen_student() -> Path | None:
    """Return the folder of the student that `dmt use` chose, or None.

    Raises:
        UserError: it is not there any more.
    """
    try:
        text = (Path(RUNS_DIR) / CHOICE_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not (Path(text) / "config.json").is_file():
        raise UserError(
            f"{text}, which dmt use chose, holds no saved student any more; choose another with "
            "dmt use RUN, or the newest run with dmt use --newest"
        )
    return Path(text)


def choose_student(folder: Path | None) -> None:
    """Let commands without `--model` use the student in a folder; None is the newest run's.

    Raises:
        OSError: the choice cannot be stored.
    """
    choice = Path(RUNS_DIR) / CHOICE_FILE
    if folder is None:
        choice.unlink(missing_ok=True)
        return
    if not folder.resolve().is_relative_to(Path.cwd()):
        folder = folder.resolve()
    choice.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(choice, f"{folder}\n")


def quote_path(path: str | Path) -> str:
    """Quote a path for a command that a user copies into a shell."""
    return shlex.quote(str(path))


def expand_home(path: str | Path) -> Path:
    """Expand `~` in a path, or return it as it is if there is no such home."""
    return Path(os.path.expanduser(path))


def _get_start_time(run_dir: Path) -> float:
    """Return when a run started: its config is written then and never again."""
    for name in ("config.yaml", "student"):
        if (run_dir / name).exists():
            return (run_dir / name).stat().st_mtime
    return run_dir.stat().st_mtime
