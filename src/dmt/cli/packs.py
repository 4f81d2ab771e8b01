"""`dmt memory export | import | merge | diff`: exchange facts and rows between students."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmt.cli.arguments import add_command, add_model_argument
from dmt.cli.facts import (
    MAX_SHOWN,
    NO_MATCH_HINT,
    add_limit_argument,
    add_rows_argument,
    add_selection_arguments,
    check_row_selection,
    fact_to_dict,
    load_fact_records,
    open_fact_table,
    open_student,
    print_counts,
    print_omitted,
    resolve_student,
    select_facts,
)
from dmt.errors import UserError
from dmt.paths import KNOWLEDGE_FILE, find_knowledge_pack

if TYPE_CHECKING:
    from dmt.cli.output import Output
    from dmt.editing.packs import FactPack


def add_parsers(commands: Any) -> None:
    """Add the commands that work on packs to those of `dmt memory`."""
    _add_export(commands)
    _add_import(commands)
    _add_merge(commands)
    _add_diff(commands)


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        run_export,
        "Export facts, or with --rows associative memory, to a pack",
        examples=[
            "dmt memory export family.safetensors --tag family --license CC0-1.0",
            "dmt memory export people.safetensors --knowledge",
        ],
    )
    parser.add_argument("pack", metavar="PACK", help="the .safetensors file or folder to create")
    parser.add_argument(
        "--knowledge",
        action="store_true",
        help="the facts that the run took out of its student, instead of those written later",
    )
    add_selection_arguments(parser)
    add_rows_argument(parser)
    parser.add_argument("--license", default="", help="license of the content")
    _add_name_argument(parser)
    add_model_argument(parser)


def run_export(args: argparse.Namespace, out: Output) -> None:
    """Write facts or rows into a pack."""
    from dmt.editing import packs

    path = Path(args.pack)
    _check_pack_is_new(path)
    check_row_selection(args)
    if args.knowledge:
        _export_knowledge(args, path, out)
        return
    fact_store, folder = open_student(args, out)
    name = args.name or path.stem
    if args.rows:
        row_pack = packs.make_row_pack(
            fact_store.model, name, args.license, set(args.id or ()), args.tag
        )
        row_pack.save(path)
        num_rows = sum(row_pack.manifest["counts"].values())
        out.print_line(f"{path}: {num_rows:,} rows of associative memory")
        out.print_json(row_pack.manifest)
        return
    facts = select_facts(open_fact_table(folder), args)
    if not facts:
        raise UserError(f"no matching facts, nothing to export; {NO_MATCH_HINT}")
    pack = packs.make_fact_pack(fact_store, facts, name, args.license)
    pack.save(path)
    _print_exported(pack, path, out)


def _export_knowledge(args: argparse.Namespace, path: Path, out: Output) -> None:
    """Write the knowledge of a run into a pack of another name, or as a folder."""
    from dmt.editing import packs

    if args.rows or args.id or args.tag is not None or args.query is not None:
        raise UserError(
            "--knowledge exports all facts that the run took out of its student; leave --rows, "
            "--id, --tag and --query out"
        )
    folder = resolve_student(args, out)
    source = find_knowledge_pack(folder)
    if source is None:
        raise UserError(
            f"no facts were taken out of {folder}: no {KNOWLEDGE_FILE} is beside it; set "
            "knowledge.facts in the config of a distillation"
        )
    pack = packs.load_fact_pack(source)
    changes = {"name": args.name or path.stem, "license": args.license or pack.manifest["license"]}
    pack = replace(pack, manifest=pack.manifest | changes)
    pack.save(path)
    _print_exported(pack, path, out)


def _print_exported(pack: FactPack, path: Path, out: Output) -> None:
    num_bytes = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    counts = pack.manifest["counts"]
    out.print_line(
        f"{path}: {counts['facts']:,} facts in {counts['rows']:,} rows, {num_bytes:,} bytes"
    )
    out.print_json(pack.manifest | {"bytes": num_bytes})


def _check_pack_is_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already; give a new name, or remove it first")


def _add_import(commands: Any) -> None:
    parser = add_command(
        commands,
        "import",
        run_import,
        "Import the facts or rows of a pack",
        examples=[
            "dmt memory import family.safetensors",
            "dmt memory import family.safetensors --rewrite",
        ],
    )
    parser.add_argument("pack", metavar="PACK", help="a .safetensors file or a folder")
    parser.add_argument(
        "--rewrite",
        action="store_true",
        help="write the facts again from their sentences, as a pack of another model needs",
    )
    add_model_argument(parser)


def run_import(args: argparse.Namespace, out: Output) -> None:
    """Write the facts or rows of a pack into a student's memory."""
    from dmt.editing import packs

    path = Path(args.pack)
    pack = packs.load_pack(path)
    if args.rewrite and isinstance(pack, packs.RowPack):
        raise UserError(f"pack {path} holds rows, which have no sentences; leave --rewrite out")
    fact_store, _ = open_student(args, out, writes=True)
    if isinstance(pack, packs.RowPack):
        with fact_store:
            assert fact_store.db is not None, "opened for writing"
            num_rows, num_evicted = packs.import_rows(fact_store.model, fact_store.db, pack)
        out.print_line(f"{num_rows:,} rows imported, {num_evicted:,} evicted")
        out.print_json({"num_rows": num_rows, "num_evicted": num_evicted})
        return
    with fact_store:
        if args.rewrite:
            results = packs.rewrite_pack(fact_store, pack)
        else:
            packs.check_fact_pack_fits(pack, fact_store, path=path)
            results = packs.import_pack(fact_store, pack)
    counts = print_counts(results, out)
    for result in [result for result in results if result.replaced_fact is not None][:MAX_SHOWN]:
        fact, old = result.fact, result.replaced_fact
        assert old is not None, "selected above"
        out.print_line(f"fact {fact.id} {fact.sentence!r} replaces {old.id} {old.sentence!r}")
    out.print_json(counts | {"facts": [fact_to_dict(result.fact) for result in results]})


def _add_merge(commands: Any) -> None:
    parser = add_command(
        commands,
        "merge",
        run_merge,
        "Merge packs into one and report contradictions",
        examples=["dmt memory merge a.safetensors b.safetensors -o both.safetensors"],
    )
    parser.add_argument("packs", nargs="+", metavar="PACK", help="packs to merge")
    parser.add_argument("-o", "--output", required=True, metavar="PACK", help="the pack to create")
    parser.add_argument(
        "--prefer",
        choices=("newest", "first"),
        default="newest",
        help="which of two contradicting facts to keep (default: newest)",
    )
    _add_name_argument(parser)


def run_merge(args: argparse.Namespace, out: Output) -> None:
    """Merge packs and print the facts that contradict each other."""
    from dmt.editing import packs

    path = Path(args.output)
    _check_pack_is_new(path)
    pack, conflicts = packs.merge_packs(
        [packs.load_fact_pack(Path(name)) for name in args.packs],
        args.name or path.stem,
        args.prefer,
    )
    pack.save(path)
    num_facts = pack.manifest["counts"]["facts"]
    out.print_line(f"{path}: {num_facts:,} facts, {len(conflicts):,} contradictions")
    if conflicts:
        cells = [
            (chosen.prompt, chosen.answer.strip(), dropped.answer.strip())
            for chosen, dropped in conflicts[:MAX_SHOWN]
        ]
        out.print_table(("prompt", "kept", "dropped"), cells, "")
    out.print_json(
        pack.manifest
        | {
            "conflicts": [
                {"kept": fact_to_dict(chosen), "dropped": fact_to_dict(dropped)}
                for chosen, dropped in conflicts
            ]
        }
    )


def _add_diff(commands: Any) -> None:
    parser = add_command(
        commands,
        "diff",
        run_diff,
        "Compare the facts of two packs, students or runs",
        examples=["dmt memory diff family.safetensors lightning_logs/version_0"],
    )
    parser.add_argument("first", metavar="A", help="a pack, student or run")
    parser.add_argument("second", metavar="B", help="another")
    add_limit_argument(parser, 50)


def run_diff(args: argparse.Namespace, out: Output) -> None:
    """Print which facts differ."""
    from dmt.editing.packs import diff_facts

    difference = diff_facts(load_fact_records(args.first), load_fact_records(args.second))
    out.print_line(
        f"{difference.num_same:,} the same, {len(difference.different):,} with different answers, "
        f"{len(difference.only_first):,} only in {args.first}, "
        f"{len(difference.only_second):,} only in {args.second}"
    )
    cells = [
        (first.prompt, first.answer.strip(), second.answer.strip())
        for first, second in difference.different
    ]
    cells += [(fact.prompt, fact.answer.strip(), "") for fact in difference.only_first]
    cells += [(fact.prompt, "", fact.answer.strip()) for fact in difference.only_second]
    if cells:
        out.print_table(("prompt", "first", "second"), cells[: args.limit], "")
    print_omitted(len(cells), args.limit, out)
    out.print_json(
        {
            "num_same": difference.num_same,
            "different": [
                [fact_to_dict(first), fact_to_dict(second)]
                for first, second in difference.different
            ],
            "only_first": [fact_to_dict(fact) for fact in difference.only_first],
            "only_second": [fact_to_dict(fact) for fact in difference.only_second],
        }
    )


def _add_name_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="pack name (default: the file's)")
