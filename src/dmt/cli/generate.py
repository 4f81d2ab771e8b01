"""`dmt ask`: let a student speak, say which rows answered, let it remember what was said."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from dmt.cli.memory import fact_to_dict, make_fact_lookup, open_student
from dmt.cli.output import Output, check_seed, escape_control_chars
from dmt.editing.fact_store import FactStore
from dmt.editing.fact_store import generate_tokens as said_by
from dmt.editing.online import ensure_namespaces, write_online
from dmt.editing.packs import load_fact_pack as load_pack
from dmt.editing.packs import load_packs
from dmt.errors import UserError
from dmt.evaluation import trace
from dmt.models.fact_hooks import FACTS_FILE, record_matches
from dmt.models.fingerprint import hash_model
from dmt.store import RowStore
from dmt.store.facts import FactTable


def run_generate(args: argparse.Namespace, out: Output) -> None:
    """Let a student go on from a prompt; with `--trace` say what answered each token, with `--remember` keep it."""
    if args.tokens < 1 or not 0 <= args.temperature < math.inf:
        raise UserError(
            f"--tokens must be at least 1 and --temperature at least 0, got {args.tokens} and {args.temperature:g}"
        )
    check_seed(args.seed)
    fact_store, folder = open_student(args, writable=args.remember)
    if args.remember:
        ensure_namespaces(
            fact_store.model, fact_store.db
        )  # refused, where it cannot be, before anything is said
    if args.pack:
        load_packs(
            fact_store, [load_pack(Path(path)) for path in args.pack], hash_model(fact_store.model)
        )
    if not out.as_json:
        print(args.prompt, end="", flush=True)
    with record_matches(fact_store.model) as matches:
        on_text = (
            None
            if out.as_json
            else (lambda text: print(escape_control_chars(text, "\n\t"), end="", flush=True))
        )
        output_ids = said_by(
            fact_store.model,
            fact_store.tokenizer,
            args.prompt,
            args.tokens,
            args.temperature,
            args.seed,
            on_text,
        )
    out.print_line("")
    text = fact_store.tokenizer.decode(output_ids, skip_special_tokens=True)
    payload: dict[str, Any] = {
        "prompt": args.prompt,
        "text": text,
        "answer": text[len(args.prompt) :],
    }
    row_ids = [
        int(fact_store.hooks.memory.rows.ids[row_id]) for match in matches for row_id in match.rows
    ]
    facts = {fact.id: fact for fact in map(fact_store.find_fact_by_row, row_ids)}
    payload["facts"] = [fact_to_dict(fact) for fact in facts.values()]
    if args.trace:
        start = len(fact_store.tokenizer(args.prompt, add_special_tokens=False)["input_ids"])
        activations = trace.trace_activations(
            fact_store.model,
            fact_store.tokenizer,
            output_ids,
            args.most,
            args.lens,
            resolve_row=make_fact_lookup(fact_store),
        )
        activations = activations[
            max(0, start) : -1
        ]  # what was read where each token of the answer was chosen
        out.print_line("")
        out.print_renderable(trace.format_table(activations))
        for fact in facts.values():
            out.print_renderable(Text(f"fact {fact.id}, {fact.tag or 'no tag'}: {fact.sentence}"))
        payload["trace"] = trace.to_json(activations)
    if args.remember:
        payload["remembered"] = _write_memory(args, fact_store, output_ids, out)
    fact_store.close()
    _count_uses(folder, row_ids)
    out.print_json(payload)


def _count_uses(folder: Path, row_ids: list[int]) -> None:
    """Count the answers of facts, where nobody else is writing."""
    use_counts = {row_id: row_ids.count(row_id) for row_id in set(row_ids) if row_id > 0}
    if not use_counts:
        return
    try:
        with RowStore(str(folder / FACTS_FILE)) as store:
            FactTable(store).record_usage(use_counts)
    except UserError:
        pass  # somebody writes, or the place is read-only: an answer is not refused for a count


def _write_memory(
    args: argparse.Namespace, fact_store: FactStore, output_ids: torch.Tensor, out: Output
) -> dict[str, int]:
    assert fact_store.db is not None, "opened for writing"
    result = write_online(fact_store.model, fact_store.db, output_ids, args.tag)
    counts = f"{result.added} rows more, {result.merged} merged, {result.evicted} evicted; {result.rows:,} rows"
    out.print_line(f"remembered: {counts}, tag {args.tag!r}")
    return vars(result)
