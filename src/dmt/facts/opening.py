"""From what a person names, a run's folder or a saved student, to a model with its book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.facts.book import Book
from dmt.models.books import BOOK
from dmt.models.fingerprint import fingerprint
from dmt.models.loading import load
from dmt.models.surgery import associative_of
from dmt.runs import RUNS, runs_in
from dmt.store import Store


def student_folder(place: str | Path | None) -> Path:
    """The folder of a saved student: `place` itself, the `student` of a run, or that of the newest run where `place` is None.

    Raises:
        UserError: there is none.
    """
    if place is None:
        runs = runs_in(Path(RUNS), holding="student")
        if not runs:
            raise UserError(f"no student is in {RUNS}/ here; run python distill.py first, or name one: --student FOLDER")
        return runs[-1] / "student"
    folder = Path(place).expanduser()
    for there in (folder / "student", folder):
        if (there / "config.json").is_file():
            return there
    what = "nothing is there" if not folder.exists() else "it holds no saved student (no config.json)"
    raise UserError(f"--student {place}: {what}; give a run's folder, such as {RUNS}/version_0, or one made by save_pretrained")


def load_student(folder: Path, called: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A saved student, or a plain GPT-2 or Llama, in eval mode and full precision, and its tokenizer.

    Args:
        called: what a refusal calls it, `--student` and the folder where nothing else is said.

    Raises:
        UserError: what is there cannot be loaded, or is of a family that is not supported.
    """
    model, tokenizer = load(str(folder), called or f"--student {folder}")
    return model.eval().requires_grad_(False), tokenizer


def open_book(folder: Path, read_only: bool = False) -> Book:
    """A student with its book, which is made where there is none.

    Raises:
        UserError: the student cannot be loaded, its book is another model's or in use, or there is none to be read.
    """
    model, tokenizer = load_student(folder)
    store = Store(str(folder / BOOK), fingerprint(model), read_only=read_only)
    taken = [number for memory in associative_of(model).values() for number in memory.rows.place_of]
    store.next_id = max([store.next_id, *(number + 1 for number in taken)])  # rows that came with the weights keep theirs
    return Book(model, tokenizer, store)


def has_book(folder: Path) -> bool:
    """Whether a student has ever been told a fact, or remembered anything."""
    return (folder / BOOK).is_file()
