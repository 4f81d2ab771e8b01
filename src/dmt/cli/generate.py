"""`dmt generate`: continue a prompt, show what was read, store what was generated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dmt.cli.arguments import (
    add_command,
    add_model_argument,
    add_seed_argument,
    add_trace_arguments,
    positive_int,
    temperature,
)
from dmt.cli.facts import add_pack_arguments, fact_to_dict, get_packs, open_student
from dmt.errors import UserError

if TYPE_CHECKING:
    import torch

    from dmt.cli.output import Output
    from dmt.editing.fact_store import FactStore


def add_parser(commands: Any) -> None:
    """Add `dmt generate` to the commands."""
    parser = add_command(
        commands,
        "generate",
        run_generate,
        "Continue a prompt with a student",
        examples=[
            'dmt generate "The birthplace of Ada Winterbourne is" --trace',
            'dmt generate "Ada keeps geese and" --write-memory --tag monday',
        ],
    )
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=30,
        metavar="N",
        help="tokens to generate at most (default: 30)",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token (default), more samples",
    )
    add_seed_argument(parser)
    parser.add_argument(
        "--trace", action="store_true", help="show the slots, rows and facts that each token read"
    )
    add_trace_arguments(parser)
    add_pack_arguments(parser)
    parser.add_argument(
        "--write-memory",
        action="store_true",
        help="write prompt and answer into the student's associative memory",
    )
    parser.add_argument(
        "--tag",
        default="conversation",
        help="tag of the rows of --write-memory (default: conversation)",
    )
    add_model_argument(parser)


def run_generate(args: argparse.Namespace, out: Output) -> None:
    """Continue a prompt and print it token by token."""
    from dmt.cli.output import escape_control_chars
    from dmt.editing.online import ensure_namespaces
    from dmt.models.fact_hooks import record_matches
    from dmt.models.generation import generate_tokens

    def print_token(text: str) -> None:
        print(escape_control_chars(text, "\n\t"), end="", flush=True)

    fact_store, folder = open_student(args, out, writes=args.write_memory, packs=get_packs(args))
    model, tokenizer = fact_store.model, fact_store.tokenizer
    if args.write_memory:
        ensure_namespaces(model, fact_store.db)  # fails before anything is generated
    if not out.as_json:
        print(args.prompt, end="", flush=True)
    with record_matches(model) as matches:
        output_ids = generate_tokens(
            model,
            tokenizer,
            args.prompt,
            args.max_new_tokens,
            args.temperature,
            args.seed,
            None if out.as_json else print_token,
        )
    out.print_line("")
    text = tokenizer.decode(output_ids, skip_special_tokens=True)
    fired = [match for pass_matches in matches for match in pass_matches]
    row_ids = [match.row_id for match in fired]
    facts = {match.fact.id: match.fact for match in fired}
    result: dict[str, Any] = {
        "prompt": args.prompt,
        "text": text,
        "completion": text[len(args.prompt) :],
        "facts": [fact_to_dict(fact) for fact in facts.values()],
    }
    if args.trace:
        result["trace"] = _print_trace(args, fact_store, output_ids, out)
        for fact in facts.values():
            out.print_renderable(Text(f"fact {fact.id}, {fact.tag or 'no tag'}: {fact.sentence}"))
    if args.write_memory:
        result["written"] = _write_memory(args.tag, fact_store, output_ids, out)
    fact_store.close()
    _count_hits(folder, row_ids)
    out.print_json(result)


def _print_trace(
    args: argparse.Namespace, fact_store: FactStore, output_ids: torch.Tensor, out: Output
) -> list[dict[str, Any]]:
    """Print what was read at each position that predicted a generated token."""
    from dmt.evaluation.trace import format_table, to_json, trace

    num_prompt_tokens = len(
        fact_store.tokenizer(args.prompt, add_special_tokens=False)["input_ids"]
    )
    traces = trace(
        fact_store.model,
        fact_store.tokenizer,
        output_ids,
        top_reads=args.top_reads,
        top_tokens=args.top_tokens,
    )[num_prompt_tokens:-1]
    out.print_line("")
    out.print_renderable(format_table(traces))
    return to_json(traces)


def _count_hits(folder: Path, row_ids: list[int]) -> None:
    """Count how often facts fired, unless another program is writing to the store."""
    from dmt.models.fact_files import FACTS_FILE
    from dmt.store import RowStore
    from dmt.store.facts import FactTable

    hits = {row_id: row_ids.count(row_id) for row_id in set(row_ids) if row_id > 0}
    if not hits:
        return
    try:
        with RowStore(str(folder / FACTS_FILE)) as store:
            FactTable(store).record_usage(hits)
    except UserError:
        pass  # locked or read-only: the answer matters more than the count


def _write_memory(
    tag: str, fact_store: FactStore, output_ids: torch.Tensor, out: Output
) -> dict[str, int]:
    from dmt.editing.online import write_online

    assert fact_store.db is not None, "opened for writing"
    result = write_online(fact_store.model, fact_store.db, output_ids, tag)
    out.print_line(
        f"written with tag {tag!r}: {result.added} rows added, {result.merged} merged, "
        f"{result.evicted} evicted; {result.rows:,} rows now"
    )
    return vars(result)
