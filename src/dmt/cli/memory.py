"""`dmt memory ...`: inspect the memory of a student, write facts, delete and restore them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmt.cli import packs
from dmt.cli.arguments import (
    Parser,
    add_command,
    add_model_argument,
    add_trace_arguments,
    false_positive_rate,
    import_torch,
    non_negative_int,
)
from dmt.cli.facts import (
    MAX_SHOWN,
    NO_MATCH_HINT,
    add_limit_argument,
    add_pack_arguments,
    add_rows_argument,
    add_selection_arguments,
    build_selection,
    check_ids,
    check_row_selection,
    edit_fact_table,
    fact_to_dict,
    facts_to_lines,
    get_packs,
    open_fact_table,
    open_student,
    print_counts,
    print_omitted,
    resolve_student,
    select_facts,
)
from dmt.config_io import select_layers
from dmt.errors import UserError
from dmt.files import read_text_file
from dmt.paths import FACTS_FILE

if TYPE_CHECKING:
    import torch

    from dmt.cli.output import Output
    from dmt.editing.edit import WriteResult
    from dmt.editing.fact import Fact
    from dmt.editing.fact_store import FactStore
    from dmt.store.facts import FactTable
    from dmt.store.records import FactRecord

MIN_CONFIDENT_PROB = 0.5  # a less likely answer may not be generated; the user is warned
DEFAULT_LIMIT = 50  # facts or rows in a table
TOKENIZER_FILE = "tokenizer.json"  # of a student
MIN_CALIBRATION_CHARS, MAX_CALIBRATION_CHARS = 2_000, 100_000
NO_FACTS_MESSAGE = (
    'no facts yet; dmt memory write "The capital of France is Paris." writes the first'
)


def add_parser(commands: Any) -> None:
    """Add `dmt memory` and its subcommands to the commands."""
    parser: Parser = commands.add_parser(
        "memory",
        help="inspect and edit the memory of a student",
        description="Inspect and edit the memory of a student. Facts are stored in memory.db\n"
        "beside the student's weights, which stay as they are.",
        epilog="dmt memory COMMAND --help describes a command.",
    )
    parser.set_defaults(parser=parser)
    subcommands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for add in (
        _add_stats,
        _add_list,
        _add_show,
        _add_search,
        _add_trace,
        _add_write,
        _add_forget,
        _add_restore,
        _add_prune,
        _add_rebind,
    ):
        add(subcommands)
    packs.add_parsers(subcommands)


# Inspecting


def _add_stats(commands: Any) -> None:
    add_model_argument(
        add_command(
            commands,
            "stats",
            run_stats,
            "Count layers, slots, rows and facts, and their size",
            examples=["dmt memory stats --model lightning_logs/version_0"],
        )
    )


def run_stats(args: argparse.Namespace, out: Output) -> None:
    """Print what the memory of a student consists of."""
    from dmt.models.architectures import get_architecture

    fact_store, folder = open_student(args, out)
    model = fact_store.model
    model_type = model.config.model_type
    blocks = get_architecture(model_type).blocks(model)
    layers = [_summarize_layer(index, block) for index, block in enumerate(blocks)]
    num_bytes = sum(
        file.stat().st_size
        for file in folder.glob(f"{FACTS_FILE}*")
        if not file.name.endswith(".lock")
    )
    facts: dict[str, Any] = {
        "num_facts": len(fact_store.records),
        "num_rows": fact_store.fact_table.count_rows() if fact_store.records else 0,
        "bytes": num_bytes,
    }
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    out.print_line(f"{folder}: {model_type}, {num_weights:,} weights")
    columns = {
        "layer": "layer",
        "kind": "memory",
        "num_slots": "slots",
        "active_per_token": "active per token",
        "num_rows": "rows",
        "capacity": "capacity",
        "bytes": "bytes",
    }
    cells = [[layer.get(key, "") for key in columns] for layer in layers]
    out.print_table(list(columns.values()), cells, "no layers")
    if facts["num_facts"]:
        tags = fact_store.fact_table.count_by_tag()
        key_layer, value_layer = fact_store.hooks.key_layer, fact_store.hooks.value_layer
        facts |= {"key_layer": key_layer, "value_layer": value_layer, "tags": tags}
        out.print_line(
            f"{facts['num_facts']:,} facts in {facts['num_rows']:,} rows, matched at layer "
            f"{key_layer}, added at layer {value_layer}; {num_bytes:,} bytes on disk"
        )
        out.print_table(
            ("tag", "facts"), [(tag or "(none)", count) for tag, count in sorted(tags.items())], ""
        )
    else:
        out.print_line(NO_FACTS_MESSAGE)
    out.print_json({"student": str(folder), "model_type": model_type, "layers": layers} | facts)


def _summarize_layer(index: int, block: torch.nn.Module) -> dict[str, Any]:
    from dmt.memory import AssociativeMemory, FeaturalMemory, SumMemory
    from dmt.memory.base import MemoryLayer
    from dmt.models.external_tensors import find_external_modules
    from dmt.models.memories import find_slot_memory

    num_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in (*block.parameters(), *block.buffers())
    )
    kind = block.kind if isinstance(block, MemoryLayer) else "dense"
    summary: dict[str, Any] = {"layer": index, "kind": kind, "bytes": num_bytes}
    if isinstance(block, AssociativeMemory):
        summary |= {
            "num_rows": len(block.rows),
            "capacity": block.insert_policy.capacity,
        }
        if isinstance(block.base, MemoryLayer):
            summary["kind"] = f"{kind}+{block.base.kind}"
    if isinstance(block, SumMemory):
        summary["kind"] = "+".join(part.kind for part in block.list_parts())
    external_sizes = [module.external_sizes() for module in find_external_modules(block).values()]
    summary["bytes"] += sum(sizes["ram"] for sizes in external_sizes)
    if disk_bytes := sum(sizes["disk"] for sizes in external_sizes):
        summary["bytes_on_disk"] = disk_bytes
    slot_memory = find_slot_memory(block)
    if isinstance(slot_memory, FeaturalMemory):
        on_average = " on average" if slot_memory.k_mode == "threshold" else ""
        summary |= {
            "num_slots": slot_memory.num_slots,
            "active_per_token": f"{slot_memory.k}{on_average}",
        }
    elif slot_memory is not None:
        summary |= {
            "num_slots": slot_memory.num_slots,
            "active_per_token": f"{slot_memory.k}",
        }
    return summary


def _add_list(commands: Any) -> None:
    parser = add_command(
        commands,
        "list",
        run_list,
        "List facts, or with --rows the rows of associative memory",
        examples=[
            "dmt memory list --tag family",
            "dmt memory list --all --json",
            "dmt memory list --jsonl > facts.jsonl",
        ],
        needs_torch=lambda args: args.rows,
    )
    add_selection_arguments(parser)
    add_rows_argument(parser)
    parser.add_argument("--all", action="store_true", help="list deleted facts too")
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help="print all facts as lines that dmt memory write --file takes",
    )
    add_limit_argument(parser, DEFAULT_LIMIT)
    parser.set_defaults(limit=None)
    add_model_argument(parser)


def run_list(args: argparse.Namespace, out: Output) -> None:
    """Print the facts of a student, or the rows of its associative memory."""
    check_row_selection(args)
    if args.jsonl and (args.rows or args.all or args.json):
        raise UserError(
            "--jsonl prints active facts, one a line; leave --rows, --all and --json out"
        )
    if args.rows:
        _list_rows(open_student(args, out)[0], args, out)
        return
    folder = resolve_student(args, out)
    fact_table = open_fact_table(folder)
    if args.jsonl:
        facts = select_facts(fact_table, args) if fact_table is not None else []
        if not facts:
            out.print_note(NO_FACTS_MESSAGE if fact_table is None else "no matching facts")
        out.print_json_lines(facts_to_lines(facts[: args.limit], folder / TOKENIZER_FILE))
        return
    if fact_table is None:
        out.print_line(NO_FACTS_MESSAGE)
        out.print_json([])
        return
    if not args.all:
        check_ids(fact_table, args)
    selection, limit = build_selection(args), args.limit or DEFAULT_LIMIT
    facts = fact_table.read(args.all, **selection, limit=limit)
    usage = fact_table.read_usage([row for fact in facts for row in fact.rows])
    hits = {
        fact.id: max((usage.get(row, (0, 0.0))[0] for row in fact.rows), default=0)
        for fact in facts
    }
    columns = ("fact", "tag", "subject", "prompt", "answer", "created", "hits", "")
    cells = [
        (
            fact.id,
            fact.tag,
            fact.subject,
            fact.prompt,
            fact.answer.strip(),
            _format_time(fact.created),
            hits[fact.id],
            _format_deletion(fact),
        )
        for fact in facts
    ]
    has_facts = facts or fact_table.count(args.all)
    out.print_table(columns, cells, "no matching facts" if has_facts else NO_FACTS_MESSAGE)
    if len(facts) == limit:
        print_omitted(fact_table.count(args.all, **selection), limit, out)
    out.print_json([fact_to_dict(fact) | {"hits": hits[fact.id]} for fact in facts])


def _list_rows(fact_store: FactStore, args: argparse.Namespace, out: Output) -> None:
    from dmt.editing.online import describe_rows

    rows = [
        row
        for row in describe_rows(fact_store.model)
        if (not args.id or row["id"] in args.id)
        and (args.tag is None or args.tag in row["tag"].split("\n"))
    ]
    limit = args.limit or DEFAULT_LIMIT
    shown = rows[:limit]
    cells = [
        (
            row["id"],
            row["layer"],
            row["tag"].replace("\n", ", "),
            row["entries"],
            row["reads"],
            _format_time(row["created"]),
        )
        for row in shown
    ]
    out.print_table(("row", "layer", "tag", "entries", "reads", "created"), cells, "no rows")
    print_omitted(len(rows), limit, out)
    out.print_json(shown)


def _format_deletion(fact: FactRecord) -> str:
    if fact.deleted_reason is None:
        return ""
    replacement = f" by {fact.replaced_by}" if fact.replaced_by else ""
    return f"{fact.deleted_reason}{replacement} {_format_time(fact.deleted_at or 0)}"


def _format_time(seconds: float) -> str:
    """Format a time for people; empty for never."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _add_show(commands: Any) -> None:
    parser = add_command(
        commands,
        "show",
        run_show,
        "Show one fact, or with --slot one slot",
        examples=["dmt memory show 1 --promoted", "dmt memory show --slot 3:17"],
        needs_torch=lambda args: args.promoted or args.slot is not None,
    )
    parser.add_argument("fact_id", nargs="?", type=int, metavar="ID", help="a fact's ID")
    parser.add_argument("--slot", metavar="LAYER:INDEX", help="show a slot instead of a fact")
    parser.add_argument(
        "--promoted",
        action="store_true",
        help="show the tokens that each row promotes, too, as always for a slot; loads the model",
    )
    add_model_argument(parser)


def run_show(args: argparse.Namespace, out: Output) -> None:
    """Print one fact in full, or one slot."""
    if args.slot is None and args.fact_id is None:
        raise UserError("show needs the ID of a fact, or --slot LAYER:INDEX")
    if args.slot is not None:
        _show_slot(open_student(args, out)[0], args.slot, out)
        return
    folder = resolve_student(args, out)
    fact_table = open_fact_table(folder)
    facts = [] if fact_table is None else fact_table.read(True, ids=[args.fact_id])
    if fact_table is None or not facts:
        raise UserError(f"fact {args.fact_id} was never stored; dmt memory list --all shows all")
    (fact,) = facts
    rows = [] if fact.deleted_reason else _describe_fact_rows(folder, fact_table, fact)
    out.print_line(f"fact {fact.id}: {fact.prompt!r} is answered {fact.answer!r}")
    scope = (
        f"fires for {fact.subject!r}" if fact.subject else "fires for every prompt much like this"
    )
    out.print_line(
        f"{scope}; tag {fact.tag or '(none)'}, source {fact.source or '(none)'}, "
        f"created {_format_time(fact.created)}"
    )
    if fact.deleted_reason:
        out.print_line(_format_deletion(fact))
    columns = {
        "id": "row",
        "token": "token",
        "threshold": "min decades",
        "value_norm": "value norm",
    }
    if args.promoted:
        columns["top_tokens"] = "promotes"
        _add_promoted_tokens(folder, fact, rows)
    cells = [
        [_quote(row[key]) if key in ("token", "top_tokens") else row[key] for key in columns]
        for row in rows
    ]
    out.print_table(
        list(columns.values()),
        cells,
        f"its rows are deleted; dmt memory restore {fact.id} restores them",
    )
    replaced = fact_table.find_replaced([fact.id])
    for other in replaced:
        out.print_line(f"it replaced fact {other.id}: {other.sentence!r}")
    out.print_json(
        fact_to_dict(fact)
        | {"rows": rows, "replaced_facts": [fact_to_dict(other) for other in replaced]}
    )


def _describe_fact_rows(
    folder: Path, fact_table: FactTable, fact: FactRecord
) -> list[dict[str, Any]]:
    from tokenizers import Tokenizer

    tokenizer_path = folder / TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(str(tokenizer_path)) if tokenizer_path.is_file() else None
    batch = fact_table.store.get(fact_table.namespace, fact.rows)
    norms = dict(zip(batch.ids.tolist(), np.linalg.norm(batch.values, axis=1), strict=True))
    return [
        {
            "id": row_id,
            "token": str(token) if tokenizer is None else tokenizer.decode([token], False),
            "threshold": round(threshold, 3),
            "value_norm": round(float(norms[row_id]), 2),
        }
        for row_id, token, threshold in zip(
            fact.rows, fact.answer_ids, fact.thresholds, strict=False
        )
    ]


def _add_promoted_tokens(folder: Path, fact: FactRecord, rows: Sequence[dict[str, Any]]) -> None:
    import torch

    from dmt.editing.fact_store import FactStore
    from dmt.evaluation.trace import logit_lens

    fact_store = FactStore.open(folder, read_only=True)
    for row, stored in zip(rows, fact_store.load_fact(fact.id).values if rows else [], strict=True):
        value = torch.from_numpy(stored).unsqueeze(0)
        promoted = logit_lens(fact_store.model, fact_store.tokenizer, value)[0]
        row["top_tokens"] = [text for text, _ in promoted]


def _show_slot(fact_store: FactStore, slot: str, out: Output) -> None:
    import torch

    from dmt.evaluation.trace import logit_lens
    from dmt.models.architectures import get_architecture
    from dmt.models.memories import find_slot_memory

    layer, _, index = slot.partition(":")
    blocks = get_architecture(fact_store.model.config.model_type).blocks(fact_store.model)
    if not (layer.isdecimal() and index.isdecimal() and int(layer) < len(blocks)):
        raise UserError(
            f"--slot must be LAYER:INDEX with layers in [0, {len(blocks) - 1}], such as 3:17, "
            f"got {slot!r}"
        )
    memory = find_slot_memory(blocks[int(layer)])
    if memory is None:
        raise UserError(f"--slot {slot}: layer {layer} has no slots")
    if int(index) >= memory.num_slots:
        raise UserError(f"--slot {slot}: layer {layer} has slots 0 to {memory.num_slots - 1}")
    value = memory.gather_values(torch.tensor([int(index)]))[0]
    value = value if memory.output is None else memory.output @ value
    top, bottom = logit_lens(
        fact_store.model, fact_store.tokenizer, torch.stack([value, -value]), 10
    )
    summary: dict[str, Any] = {
        "slot": int(index),
        "layer": int(layer),
        "value_norm": round(float(value.norm()), 3),
        "top_tokens": [text for text, _ in top],
        "bottom_tokens": [text for text, _ in bottom],
    }
    for name, value in summary.items():
        out.print_line(f"{name.replace('_', ' ')}: {_quote(value)}")
    out.print_json(summary)


def _quote(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(repr(item) for item in value)
    return repr(value) if isinstance(value, str) else str(value)


def _add_search(commands: Any) -> None:
    parser = add_command(
        commands,
        "search",
        run_search,
        "Search facts by their text, or else by the hidden state at the end of the text",
        "The hidden state, for which the model is loaded, finds facts where no fact has the words.",
        ['dmt memory search "Ada"', 'dmt memory search "The birthplace of Ada is"'],
        needs_torch=False,  # imported where no fact has the words
    )
    parser.add_argument("text", help="words of the fact, or a prompt without its answer")
    add_limit_argument(parser, 5)
    add_model_argument(parser)


def run_search(args: argparse.Namespace, out: Output) -> None:
    """Print facts that contain the text, or else those with a similar hidden state."""
    folder = resolve_student(args, out)
    fact_table = open_fact_table(folder)
    has_facts = fact_table is not None and fact_table.count() > 0
    matches = [] if fact_table is None else fact_table.read(words=args.text, limit=args.limit)
    neighbors = _search_hidden_states(folder, args) if has_facts and not matches else []
    cells = [(fact.id, fact.tag, fact.prompt, fact.answer.strip(), "text") for fact in matches]
    cells += [
        (fact.id, fact.tag, fact.prompt, fact.answer.strip(), f"hidden state, cosine {cosine:.2f}")
        for fact, cosine in neighbors
    ]
    out.print_table(
        ("fact", "tag", "prompt", "answer", "matched by"),
        cells,
        "no matching facts" if has_facts else NO_FACTS_MESSAGE,
    )
    payload: list[dict[str, Any]] = [
        fact_to_dict(fact) | {"matched_by": "text"} for fact in matches
    ]
    payload += [
        fact_to_dict(fact) | {"matched_by": "hidden_state", "cosine": cosine}
        for fact, cosine in neighbors
    ]
    out.print_json(payload)


def _search_hidden_states(folder: Path, args: argparse.Namespace) -> list[tuple[FactRecord, float]]:
    import_torch()
    from dmt.editing.fact_store import FactStore, find_nearest_facts

    return find_nearest_facts(FactStore.open(folder, read_only=True), args.text, args.limit)


def _add_trace(commands: Any) -> None:
    parser = add_command(
        commands,
        "trace",
        run_trace,
        "Show which slots, rows and facts each token of a text reads",
        "Each comes with its weight and the tokens that it promotes.",
        ['dmt memory trace "The birthplace of Ada Winterbourne is" --layers last'],
    )
    parser.add_argument("text", help="the text to read")
    parser.add_argument(
        "--layers", metavar="LAYERS", help="layers such as last, 3 or 0-2 (default: all)"
    )
    add_trace_arguments(parser)
    add_pack_arguments(parser)
    add_model_argument(parser)


def run_trace(args: argparse.Namespace, out: Output) -> None:
    """Print what each token reads in each layer."""
    from dmt.evaluation.trace import format_table, to_json, trace

    fact_store, _ = open_student(args, out, packs=get_packs(args))
    layers = (
        None
        if args.layers is None
        else select_layers(args.layers, fact_store.model.config.num_hidden_layers, "--layers")
    )
    traces = trace(
        fact_store.model,
        fact_store.tokenizer,
        args.text,
        layers,
        args.top_reads,
        top_tokens=args.top_tokens,
    )
    out.print_renderable(format_table(traces))
    out.print_json(to_json(traces))


# Editing


def _add_write(commands: Any) -> None:
    parser = add_command(
        commands,
        "write",
        run_write,
        "Write a fact from a sentence, or many from a file",
        examples=[
            'dmt memory write "Ada Winterbourne was born in Ravenhill." --tag family',
            'dmt memory write --prompt "Ada Winterbourne was born in" --answer Ravenhill',
            'dmt memory write "Ada Winterbourne speaks Latin." --add',
            "dmt memory write --file facts.jsonl",
        ],
    )
    parser.add_argument(
        "sentence",
        nargs="?",
        help="a sentence that states the fact; its last name, number or word is the answer",
    )
    parser.add_argument("--prompt", help="the prompt, if the automatic split is wrong")
    parser.add_argument("--answer", help="what the model generates after the prompt")
    parser.add_argument("--subject", help="the subject as it is in the prompt; '' for none")
    parser.add_argument(
        "--file",
        metavar="FACTS.jsonl",
        help='one {"sentence": ...} or {"prompt": ..., "answer": ...} per line',
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="add the answer to that of the stored fact, one more value of a list",
    )
    parser.add_argument("--tag", default="", help="tag to select the facts by")
    parser.add_argument("--source", default="", help="where the facts come from")
    parser.add_argument(
        "--false-positive-rate",
        type=false_positive_rate,
        default=0.004,
        metavar="RATE",
        help="share of other questions about its subject that a fact may answer (default: 0.004)",
    )
    _add_calibration_text_argument(parser)
    add_model_argument(parser)


def _add_calibration_text_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration-text",
        metavar="FILE",
        help="held-out text for the calibration before the first fact (default: speeches)",
    )


def run_write(args: argparse.Namespace, out: Output) -> None:
    """Write facts from a sentence, from its parts, or from a file."""
    facts = [replace(fact, add=args.add or fact.add) for fact in _parse_facts(args)]
    prose = _read_calibration_text(args.calibration_text)
    fact_store, folder = open_student(args, out, writes=True)
    with fact_store:
        start = time.perf_counter()
        fact_store.initialize(facts, prose=prose)
        write_start = time.perf_counter()
        with out.progress_bar("writing", len(facts)) as progress:
            results = fact_store.write_many(facts, args.false_positive_rate, progress)
        seconds = time.perf_counter() - write_start
    _print_results(results, out)
    out.print_note(
        f"{len(facts) / max(seconds, 1e-9):,.0f} facts per second, after "
        f"{write_start - start:.1f} s of preparation; saved in {folder}/memory.db"
    )
    out.print_json(
        [
            {
                "status": result.status,
                "prob_before": result.prob_before,
                "prob_after": result.prob_after,
                "fact": fact_to_dict(result.fact),
                "replaced_fact": None
                if result.replaced_fact is None
                else fact_to_dict(result.replaced_fact),
            }
            for result in results
        ]
    )


def _parse_facts(args: argparse.Namespace) -> list[Fact]:
    from dmt.editing.fact import parse_fact, read_facts

    if args.file is None:
        return [
            parse_fact(args.sentence, args.prompt, args.answer, args.subject, args.tag, args.source)
        ]
    if any(text is not None for text in (args.sentence, args.prompt, args.answer, args.subject)):
        raise UserError(
            "--file contains the sentences; leave out the sentence, --prompt, --answer and "
            "--subject"
        )
    facts = list(read_facts(Path(args.file), args.tag, args.source))
    if not facts:
        raise UserError(
            f"{args.file} has no facts; a line is an object such as "
            '{"sentence": "Paris is in France."}'
        )
    return facts


def _read_calibration_text(path: str | None) -> list[str] | None:
    if path is None:
        return None
    text = read_text_file(Path(path), f"--calibration-text {path}", "name a text file")
    if len(text) < MIN_CALIBRATION_CHARS:
        raise UserError(
            f"--calibration-text {path} has {len(text):,} characters; give "
            f"{MIN_CALIBRATION_CHARS:,} or more of text that the facts are not about"
        )
    return [text[:MAX_CALIBRATION_CHARS]]


def _print_results(results: list[WriteResult], out: Output) -> None:
    if len(results) == 1:
        _print_result(results[0], out)
        return
    print_counts(results, out)
    uncertain = [result.fact for result in results if _is_uncertain(result)]
    if uncertain:
        out.print_line(
            f"{len(uncertain):,} may not be generated even for their own prompts, because the "
            "model gives some part a low probability:"
        )
    for fact in uncertain[:MAX_SHOWN]:
        out.print_line(f"  fact {fact.id}: {fact.sentence!r}")


def _print_result(result: WriteResult, out: Output) -> None:
    fact = result.fact
    subject = f", for {fact.subject!r}" if fact.subject else ""
    out.print_line(f"fact {fact.id}: {fact.prompt!r} is answered {fact.answer!r}{subject}")
    if not fact.subject:
        out.print_line(
            "it has no subject, so it fires for every prompt much like this one; --subject sets one"
        )
    if result.status != "unchanged":
        out.print_line(
            f"probability of the answer {result.prob_before:.2g} -> {result.prob_after:.2g}, "
            f"{len(fact.rows)} rows"
        )
    else:
        out.print_line("it was stored already; nothing was written")
    if _is_uncertain(result):
        out.print_line(
            "the model may not generate it, because it gives some part a low probability; "
            f"dmt memory show {fact.id} shows the parts"
        )
    if result.replaced_fact is not None:
        old = result.replaced_fact
        relation = "adds to" if result.status == "added" else "contradicts and replaces"
        out.print_line(
            f"it {relation} fact {old.id} ({old.sentence!r}); "
            f"dmt memory restore {old.id} reverts that"
        )


def _is_uncertain(result: WriteResult) -> bool:
    return result.status != "unchanged" and result.prob_after < MIN_CONFIDENT_PROB


def _add_forget(commands: Any) -> None:
    parser = add_command(
        commands,
        "forget",
        run_forget,
        "Delete facts by ID, tag or words",
        "dmt memory restore reverts it, unless --purge erased them for good.",
        [
            "dmt memory forget --tag family",
            "dmt memory forget --id 3 --id 4",
            "dmt memory forget --id 3 --value Latin",
            "dmt memory forget --purge --tag family",
        ],
        needs_torch=lambda args: args.rows or args.value is not None,
    )
    parser.add_argument(
        "--purge",
        action="store_true",
        help="erase them from the history and the file too, with the facts that they replaced; "
        "alone: erase all facts that were deleted before",
    )
    parser.add_argument(
        "--value", help="take only this value out of the answer of the fact, which is a list"
    )
    add_selection_arguments(parser)
    add_rows_argument(parser)
    add_model_argument(parser)


def run_forget(args: argparse.Namespace, out: Output) -> None:
    """Delete facts, or rows of associative memory."""
    if not (args.id or args.tag is not None or args.query or args.purge):
        raise UserError(f"forget needs --id, --tag or --query; {NO_MATCH_HINT}")
    check_row_selection(args)
    if args.value is not None and (args.purge or args.rows):
        raise UserError("--value is in the answer of a fact; leave --purge and --rows out")
    if args.purge:
        _purge_facts(args, out)
        return
    if args.rows or args.value is not None:
        with open_student(args, out, writes=True)[0] as fact_store:
            forget = _forget_rows if args.rows else _forget_value
            forget(fact_store, args, out)
        return
    with edit_fact_table(resolve_student(args, out, writes=True)) as fact_table:
        ids = [fact.id for fact in select_facts(fact_table, args)]
        if fact_table is None or not ids:
            raise UserError(f"no matching facts, nothing was deleted; {NO_MATCH_HINT}")
        fact_table.soft_delete(ids, "forgotten")
        deleted = fact_table.read(include_deleted=True, ids=ids)
    for fact in deleted[:MAX_SHOWN]:
        out.print_line(f"deleted fact {fact.id}: {fact.sentence!r}")
    if len(deleted) > MAX_SHOWN:
        out.print_line(f"... and {len(deleted) - MAX_SHOWN:,} more")
    out.print_line(f"{len(deleted):,} deleted; dmt memory restore ID restores one")
    out.print_json([fact_to_dict(fact) for fact in deleted])


def _forget_value(fact_store: FactStore, args: argparse.Namespace, out: Output) -> None:
    table = fact_store.fact_table
    facts = select_facts(table if table.exists else None, args)
    if not facts:
        raise UserError(f"no matching facts, nothing was deleted; {NO_MATCH_HINT}")
    if len(facts) > 1:
        raise UserError(f"--value is for one fact, and {len(facts):,} match; choose one with --id")
    result = fact_store.remove_value(facts[0].id, args.value)
    if result is None:
        out.print_line(f"deleted fact {facts[0].id}, which had no other value")
    else:
        out.print_line(f"fact {result.id}: {result.fact.sentence!r}")
    out.print_line(f"dmt memory restore {facts[0].id} restores what it was")
    out.print_json(None if result is None else fact_to_dict(result.fact))


def _purge_facts(args: argparse.Namespace, out: Output) -> None:
    if args.rows:
        raise UserError("--purge erases facts; leave --rows out")
    folder = resolve_student(args, out, writes=True)
    has_selection = args.id or args.tag is not None or args.query
    with edit_fact_table(folder) as fact_table:
        selected, purged = _select_history(fact_table, args, bool(has_selection)), dict[int, Any]()
        if has_selection and not selected:
            raise UserError(f"no matching facts, nothing was erased; {NO_MATCH_HINT}")
        if fact_table is not None:
            purged = fact_table.add_replaced(selected)
            fact_table.purge(sorted(purged))
    # Not by their words: what is erased should not stand in a terminal or a log either.
    out.print_line(f"{len(purged):,} facts erased; nothing restores them")
    backups = sorted(folder.glob(f"{Path(FACTS_FILE).stem}.before-*.db"))
    if backups:
        out.print_line(
            "earlier stores are kept beside it and may hold them; delete those: "
            + ", ".join(str(backup) for backup in backups)
        )
    out.print_json({"ids": sorted(purged), "backups": [str(backup) for backup in backups]})


def _select_history(
    fact_table: FactTable | None, args: argparse.Namespace, has_selection: bool
) -> list[FactRecord]:
    """Return the facts that the options select, active or deleted; all deleted facts without any.

    Raises:
        UserError: an ID never existed.
    """
    facts = [] if fact_table is None else fact_table.read(True, ids=args.id or ())
    missing = sorted(set(args.id or ()) - {fact.id for fact in facts})
    if missing:
        raise UserError(f"fact {missing[0]} never existed; dmt memory list --all shows all facts")
    if fact_table is None:
        return []
    if not has_selection:
        return fact_table.read_deleted()
    return fact_table.read(True, **build_selection(args))


def _forget_rows(fact_store: FactStore, args: argparse.Namespace, out: Output) -> None:
    from dmt.editing.online import describe_rows, drop_rows

    row_ids = set(args.id) if args.id else None
    num_rows = drop_rows(fact_store.model, fact_store.db, row_ids, args.tag)
    num_shared = sum(args.tag in row["tag"].split("\n") for row in describe_rows(fact_store.model))
    shared = f"; {num_shared:,} with other tags too were kept" if num_shared else ""
    out.print_line(f"{num_rows:,} rows deleted{shared}")
    out.print_json({"num_rows": num_rows, "num_shared": num_shared})


def _add_restore(commands: Any) -> None:
    parser = add_command(
        commands,
        "restore",
        run_restore,
        "Restore a fact that was deleted, replaced or pruned",
        examples=["dmt memory restore 3"],
    )
    parser.add_argument("fact_id", type=int, metavar="ID", help="the fact's ID")
    add_model_argument(parser)


def run_restore(args: argparse.Namespace, out: Output) -> None:
    """Restore a deleted fact."""
    with open_student(args, out, writes=True)[0] as fact_store:
        fact, replaced = fact_store.restore(args.fact_id)
    out.print_line(f"restored fact {fact.id}: {fact.sentence!r}")
    for other in replaced:
        out.print_line(f"it replaces fact {other.id}: {other.sentence!r}")
    out.print_json(
        {"fact": fact_to_dict(fact), "replaces": [fact_to_dict(other) for other in replaced]}
    )


def _add_prune(commands: Any) -> None:
    parser = add_command(
        commands,
        "prune",
        run_prune,
        "Keep the most used facts and delete the others",
        "Of facts those stay that fired last. Use of rows is counted with LRFU, which weights\n"
        "recent use more.",
        ["dmt memory prune --keep 1000", "dmt memory prune --rows --keep 10000"],
    )
    parser.add_argument(
        "--keep",
        type=non_negative_int,
        required=True,
        metavar="N",
        help="number of facts to keep; with --rows, of rows per layer",
    )
    add_rows_argument(parser)
    add_model_argument(parser)


def run_prune(args: argparse.Namespace, out: Output) -> None:
    """Delete all but the most used facts, or rows."""
    from dmt.editing.online import drop_rows
    from dmt.models.memories import get_associative_memories

    with open_student(args, out, writes=True)[0] as fact_store:
        if args.rows:
            if not get_associative_memories(fact_store.model):
                raise UserError(
                    "this student has no associative memory, so it has no rows to delete; "
                    "leave --rows out"
                )
            num_rows = drop_rows(fact_store.model, fact_store.db, keep=lambda _: args.keep)
            out.print_line(f"{num_rows:,} rows deleted")
            out.print_json({"num_rows": num_rows})
            return
        pruned = fact_store.prune(args.keep)
        num_remaining = len(fact_store.records)
    out.print_line(
        f"{len(pruned):,} facts deleted, {num_remaining:,} kept; dmt memory restore ID restores one"
    )
    out.print_json([fact_to_dict(fact) for fact in pruned])


def _add_rebind(commands: Any) -> None:
    parser = add_command(
        commands,
        "rebind",
        run_rebind,
        "Write all facts again for the present weights",
        "Of use after fine-tuning, merging an adapter, or copying memory.db to another student.\n"
        "Facts keep their IDs, tags and history.",
        ["dmt memory rebind --model finetuned"],
    )
    _add_calibration_text_argument(parser)
    add_model_argument(parser)


def run_rebind(args: argparse.Namespace, out: Output) -> None:
    """Calibrate anew, and write the facts from their sentences."""
    from dmt.editing.fact_store import FactStore

    prose = _read_calibration_text(args.calibration_text)
    with FactStore.rebind(resolve_student(args, out, writes=True), prose=prose) as fact_store:
        num_facts, hooks = len(fact_store.records), fact_store.hooks
    layers = {"key_layer": hooks.key_layer, "value_layer": hooks.value_layer}
    out.print_line(
        f"{num_facts:,} facts written for the present weights, matched at layer "
        f"{hooks.key_layer}, added at layer {hooks.value_layer}"
    )
    out.print_json({"num_facts": num_facts} | layers)
