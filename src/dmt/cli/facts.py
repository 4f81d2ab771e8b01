"""What the commands about facts share: options that select them, opening a student, output."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmt.cli.arguments import positive_int
from dmt.errors import UserError
from dmt.paths import (
    FACTS_FILE,
    RUNS_DIR,
    list_runs,
    quote_path,
    read_chosen_student,
    resolve_student_folder,
)
from dmt.text import find_closing

if TYPE_CHECKING:
    from dmt.cli.output import Output
    from dmt.editing.edit import WriteResult
    from dmt.editing.fact_store import FactStore
    from dmt.store.facts import FactTable
    from dmt.store.records import FactRecord

MAX_SHOWN = 20  # facts of a long list in the output of one command
NO_MATCH_HINT = "dmt memory list shows the facts"


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that select facts or rows."""
    parser.add_argument("--id", type=int, action="append", metavar="N", help="fact ID; repeatable")
    parser.add_argument("--tag", help="facts with this tag")
    parser.add_argument(
        "--query", metavar="WORDS", help="facts whose sentence or subject has all these words"
    )


def add_rows_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--rows`."""
    parser.add_argument(
        "--rows", action="store_true", help="rows of associative memory instead of facts"
    )


def add_limit_argument(parser: argparse.ArgumentParser, default: int) -> None:
    """Add `--limit` with a default."""
    parser.add_argument(
        "--limit",
        type=positive_int,
        default=default,
        metavar="N",
        help=f"maximum number shown (default: {default})",
    )


def check_row_selection(args: argparse.Namespace) -> None:
    """Raise `UserError` for `--rows` with `--query`, which must not mean all rows."""
    if args.rows and args.query is not None:
        raise UserError(
            "--query selects facts, and rows of associative memory have no text; "
            "use --id or --tag with --rows"
        )


def build_selection(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `--id`, `--tag` and `--query` select as arguments of `FactTable.read`."""
    return {"ids": args.id, "tag": args.tag, "words": args.query or ""}


def check_ids(fact_table: FactTable | None, args: argparse.Namespace) -> None:
    """Raise `UserError` where `--id` names no active fact; None has none."""
    active = [] if fact_table is None else fact_table.read(ids=args.id or ())
    missing = sorted(set(args.id or ()) - {fact.id for fact in active})
    if missing:
        num_facts = 0 if fact_table is None else fact_table.count()
        raise UserError(
            f"fact {missing[0]} is not stored; dmt memory list shows the {num_facts:,} that are"
        )


def select_facts(fact_table: FactTable | None, args: argparse.Namespace) -> list[FactRecord]:
    """Return the active facts that `--id`, `--tag` and `--query` select; all without any.

    Raises:
        UserError: an ID is not stored.
    """
    check_ids(fact_table, args)
    return [] if fact_table is None else fact_table.read(**build_selection(args))


def resolve_student(args: argparse.Namespace, out: Output, *, writes: bool = False) -> Path:
    """Return the folder of the student that `--model` names, or of the default; print which it is.

    Args:
        args: arguments with `model` and `command`.
        out: where the command prints.
        writes: the command changes the student's memory.

    Raises:
        UserError: there is no student, or one is to be changed and it is not clear which.
    """
    folder = resolve_student_folder(args.model)
    if args.model is not None:
        reason = ""
    elif read_chosen_student() is not None:
        reason = "chosen with dmt use"
    else:
        reason = "the newest run"
        if writes:
            _check_newest_is_meant(folder, args.command)
    out.print_student(folder, reason)
    return folder


def _check_newest_is_meant(newest: Path, command: str) -> None:
    """Raise `UserError` if the newest student has no facts or rows, but that of another run has."""
    if _has_memory(newest):
        return
    runs = [run for run in list_runs(Path(RUNS_DIR), "student") if _has_memory(run / "student")]
    if runs:
        raise UserError(
            f"{newest.parent} is the newest run, but {runs[-1]} has the facts; say which is meant: "
            f"{command} --model {quote_path(runs[-1])}, or choose one with dmt use"
        )


def _has_memory(folder: Path) -> bool:
    """Check whether anything was ever written into the memory of a student."""
    from dmt.store import RowStore

    path = folder / FACTS_FILE
    return path.is_file() and bool(RowStore(str(path), read_only=True).list_namespaces())


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--pack` and `--no-pack`."""
    parser.add_argument(
        "--pack",
        action="append",
        metavar="PACK",
        help="use the facts of this pack for this call only, in place of the knowledge that was "
        "taken out of the student; repeatable",
    )
    parser.add_argument(
        "--no-pack",
        action="store_true",
        help="unplug the knowledge that was taken out of the student",
    )


def get_packs(args: argparse.Namespace) -> list[str] | None:
    """Return what `--pack` and `--no-pack` plug in; None is the knowledge of the run.

    Raises:
        UserError: they contradict each other.
    """
    packs: list[str] | None = args.pack
    if packs and args.no_pack:
        raise UserError("--pack plugs facts in and --no-pack none; give one of them")
    return [] if args.no_pack else packs


def open_student(
    args: argparse.Namespace,
    out: Output,
    *,
    writes: bool = False,
    packs: Sequence[str] | None = None,
) -> tuple[FactStore, Path]:
    """Open the facts of a student, read-only unless it `writes`; return them and its folder.

    Args:
        args: arguments with `model` and `command`.
        out: where the command prints.
        writes: the command changes the student's memory.
        packs: packs to plug in; None is the knowledge that a run took out of the student.
    """
    from dmt.editing.fact_store import FactStore

    folder = resolve_student(args, out, writes=writes)
    return FactStore.open(folder, read_only=not writes, packs=packs), folder


def open_fact_table(folder: Path) -> FactTable | None:
    """Open the facts of a student without loading the student; None where it has none."""
    with edit_fact_table(folder, read_only=True) as fact_table:
        return fact_table


@contextmanager
def edit_fact_table(folder: Path, read_only: bool = False) -> Iterator[FactTable | None]:
    """Open the same for writing within the context, as the only writer."""
    from dmt.store import RowStore
    from dmt.store.facts import FactTable

    path = folder / FACTS_FILE
    if not path.is_file():
        yield None
        return
    with RowStore(str(path), read_only=read_only) as store:
        fact_table = FactTable(store)
        yield fact_table if fact_table.exists else None


def load_fact_records(name: str) -> list[FactRecord]:
    """Return the facts of a pack, a student or a run, without loading a model.

    Raises:
        UserError: it is none of them.
    """
    from dmt.editing.packs import is_pack, load_fact_pack

    path = Path(name)
    if is_pack(path):
        return load_fact_pack(path).facts
    fact_table = open_fact_table(resolve_student_folder(path))
    return [] if fact_table is None else fact_table.read()


def fact_to_dict(fact: FactRecord) -> dict[str, Any]:
    """Return a fact as JSON shows it, without what only the matcher needs."""
    excluded = ("answer_ids", "thresholds", "rows")
    return {name: value for name, value in asdict(fact).items() if name not in excluded} | {
        "rows": list(fact.rows)
    }


def facts_to_lines(facts: Iterable[FactRecord], tokenizer_path: Path) -> Iterator[dict[str, str]]:
    """Yield facts as `dmt memory write --file` takes them.

    Args:
        facts: with the token IDs of their answers.
        tokenizer_path: the `tokenizer.json` of the student.

    Raises:
        UserError: there is no tokenizer.
    """
    from tokenizers import Tokenizer

    if not tokenizer_path.is_file():
        raise UserError(
            f"{tokenizer_path} is missing, which reads how answers end; copy it from the model"
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for fact in facts:
        text = tokenizer.decode(list(fact.answer_ids), skip_special_tokens=False)
        line = {name: getattr(fact, name) for name in ("prompt", "answer", "subject")}
        yield line | {
            "closing": find_closing(fact.answer, text),
            "tag": fact.tag,
            "source": fact.source,
        }


def print_omitted(count: int, limit: int, out: Output) -> None:
    """Print how many of a list are not shown."""
    if count > limit:
        out.print_note(f"{count - limit:,} more; --limit {count} shows all")


def print_counts(results: list[WriteResult], out: Output) -> dict[str, int]:
    """Print and return how many facts were written, replaced and unchanged."""
    statuses = Counter(result.status for result in results)
    added = f"{statuses['added']:,} added to a list, " if statuses["added"] else ""
    out.print_line(
        f"{statuses['written']:,} written, {statuses['replaced']:,} written and replacing a "
        f"contradicted fact, {added}{statuses['unchanged']:,} stored already"
    )
    return {f"num_{name}": statuses[name] for name in ("written", "replaced", "added", "unchanged")}
