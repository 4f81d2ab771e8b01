"""`dmt memory export | import | merge | diff`: what goes from one book to another.

`dmt memory write | forget | restore | evict`: what changes a student's book.

`dmt memory stats | list | show | search | read`: what looks into a student's memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmt.cli.output import Output, format_time
from dmt.config_io import select_layers
from dmt.editing import packs
from dmt.editing.edit import WriteResult
from dmt.editing.fact import Fact, parse_fact, read_facts
from dmt.editing.fact_store import (
    FactStore,
    find_nearest_facts,
    has_fact_store,
    load_student,
    open_fact_store,
    resolve_student_folder,
)
from dmt.editing.online import describe_rows, drop_rows
from dmt.editing.packs import (
    check_fact_pack_fits,
    diff_facts,
    import_pack,
    import_rows,
    is_pack,
    make_fact_pack,
    make_row_pack,
    merge_packs,
)
from dmt.errors import UserError
from dmt.evaluation import trace
from dmt.files import read_text_file
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.models.architectures import get_architecture
from dmt.models.conversion import get_associative_memories
from dmt.models.fact_hooks import FACTS_FILE
from dmt.models.fingerprint import hash_model
from dmt.store import RowStore
from dmt.store.facts import FactTable
from dmt.store.records import FactRecord

MIN_CONFIDENT_PROB = 0.5
"""Probability of an answer below which a person is told that it may not be said."""
MAX_CALIBRATION_CHARS = 100_000
"""Characters of a file of one's own that are read for calibration, at least 2,000."""


def run_write(args: argparse.Namespace, out: Output) -> None:
    """Write facts from a sentence, from its parts, or from a file of them."""
    facts = _parse_facts(args)
    if not 0 < args.rate <= 0.5:
        raise UserError(
            f"--rate must be in (0, 0.5], got {args.rate:g}; it is the share of places that may answer unasked"
        )
    folder = resolve_student_folder(args.student)
    with open_fact_store(folder) as fact_store:
        start_time = time.perf_counter()
        fact_store.initialize(
            facts, prose=_read_calibration_text(args.calibrate_on), log=out.print_note
        )
        write_start_time = time.perf_counter()
        with out.progress_bar("writing", len(facts)) as progress:
            results = fact_store.write(facts, args.rate, progress)
        seconds = time.perf_counter() - write_start_time
    _print_results(results, out)
    out.print_note(
        f"{len(facts) / max(seconds, 1e-9):,.0f} facts a second; {write_start_time - start_time:.1f} s to begin; book: {folder}/memory.db"
    )
    out.print_json(
        [
            {
                "what": result.status,
                "before": result.prob_before,
                "likely": result.prob_after,
                "fact": fact_to_dict(result.fact),
                "old": None if result.replaced_fact is None else fact_to_dict(result.replaced_fact),
            }
            for result in results
        ]
    )


def _parse_facts(args: argparse.Namespace) -> list[Fact]:
    if args.file is not None:
        if (
            args.sentence is not None
            or args.prompt is not None
            or args.answer is not None
            or args.subject is not None
        ):
            raise UserError(
                "--file has its own sentences; leave out the sentence, --prompt, --answer and --subject"
            )
        facts = list(read_facts(Path(args.file), args.tag, args.source))
        if not facts:
            raise UserError(
                f'{args.file} holds no facts; a line is an object such as {{"sentence": "Paris is in France."}}'
            )
        return facts
    return [
        parse_fact(args.sentence, args.prompt, args.answer, args.subject, args.tag, args.source)
    ]


def _read_calibration_text(path: str | None) -> list[str] | None:
    if path is None:
        return None
    text = read_text_file(Path(path), f"--calibrate-on {path}", "name a text file")[
        :MAX_CALIBRATION_CHARS
    ]
    if len(text) < 2_000:
        raise UserError(
            f"--calibrate-on {path} has {len(text):,} characters; give 2,000 or more of text the facts are not about"
        )
    return [text]


def _print_results(results: list[WriteResult], out: Output) -> None:
    if len(results) == 1:
        fact = results[0].fact
        out.print_line(
            f"fact {fact.id}: {fact.prompt!r} is answered {fact.answer!r}"
            + (f", about {fact.subject!r}" if fact.subject else "")
        )
        if not fact.subject:
            out.print_line(
                "it is about nobody in particular, so it answers whoever asks in nearly these words; --subject names somebody"
            )
        if results[0].status == "known":
            out.print_line("it was known already; nothing was written")
        else:
            out.print_line(
                f"probability of the answer {results[0].prob_before:.2g} -> {results[0].prob_after:.2g}, {len(fact.rows)} rows"
            )
            if results[0].prob_after < MIN_CONFIDENT_PROB:
                out.print_line(
                    "that is not enough to be said: the model hardly knows some part of it; dmt memory show tells which"
                )
        if results[0].replaced_fact is not None:
            replaced_fact = results[0].replaced_fact
            out.print_line(
                f"it contradicts fact {replaced_fact.id} ({replaced_fact.sentence!r}), which it replaces; dmt memory restore {replaced_fact.id} brings that back"
            )
        return
    print_counts(results, out)
    unlikely_facts = [
        result.fact
        for result in results
        if result.status != "known" and result.prob_after < MIN_CONFIDENT_PROB
    ]
    if unlikely_facts:
        out.print_line(
            f"{len(unlikely_facts):,} of them will hardly be said even where they were written, since the model hardly knows some part:"
        )
    for fact in unlikely_facts[:20]:
        out.print_line(f"  fact {fact.id}: {fact.sentence!r}")


def print_counts(results: list[WriteResult], out: Output) -> dict[str, int]:
    """Say, and give, what became of many facts."""
    counts = {
        status: sum(result.status == status for result in results)
        for status in ("written", "replaced", "known")
    }
    out.print_line(
        f"{counts['written']:,} written, {counts['replaced']:,} written in place of one that they contradict, {counts['known']:,} "
        "known already"
    )
    return counts


def run_forget(args: argparse.Namespace, out: Output) -> None:
    """Take facts, or rows of associative memory, out of a student."""
    folder = resolve_student_folder(args.student)
    if not (args.id or args.tag is not None or args.query):
        raise UserError(
            "forget what? give --id, --tag or --query; dmt memory list shows what there is"
        )
    check_row_selection(args)
    with open_fact_store(folder) as fact_store:
        if args.rows:
            num_removed = drop_rows(
                fact_store.model, fact_store.db, set(args.id) if args.id else None, args.tag
            )
            num_shared = sum(
                args.tag in row["tag"].split("\n") for row in describe_rows(fact_store.model)
            )
            out.print_line(
                f"{num_removed:,} rows forgotten"
                + (f"; {num_shared:,} stay, in which something else is too" if num_shared else "")
            )
            out.print_json({"rows": num_removed, "shared": num_shared})
            return
        selected = select_facts(fact_store, args)
        if not selected:
            raise UserError(
                "no fact is like that, so nothing was forgotten; dmt memory list shows what there is"
            )
        forgotten = fact_store.forget([fact.id for fact in selected])
    for fact in forgotten[:20]:
        out.print_line(f"forgot fact {fact.id}: {fact.sentence!r}")
    if len(forgotten) > 20:
        out.print_line(f"... and {len(forgotten) - 20:,} more")
    out.print_line(f"{len(forgotten):,} forgotten; dmt memory restore ID brings one back")
    out.print_json([fact_to_dict(fact) for fact in forgotten])


def check_row_selection(args: argparse.Namespace) -> None:
    """Raise `UserError` where rows are asked for by words: they have none, and none asked for must not mean all."""
    if args.rows and args.query is not None:
        raise UserError(
            "rows of associative memory have no words to be found by; leave --query out and give --id or --tag"
        )


def select_facts(fact_store: FactStore, args: argparse.Namespace) -> list[FactRecord]:
    """Facts that are there and have every property asked for: --id, --tag, --query; all where none is."""
    requested_ids = set(args.id or ())
    if missing := sorted(requested_ids - set(fact_store.records)):
        raise UserError(
            f"fact {missing[0]} is not there; dmt memory list shows the {len(fact_store.records):,} that are"
        )
    return filter_facts(fact_store.records.values(), args)


def filter_facts(facts: Iterable[FactRecord], args: argparse.Namespace) -> list[FactRecord]:
    """Of `facts` those that have every property asked for."""
    requested_ids, terms = set(args.id or ()), (args.query or "").lower().split()
    return [
        fact
        for fact in facts
        if (not requested_ids or fact.id in requested_ids)
        and (args.tag is None or fact.tag == args.tag)
        and all(term in f"{fact.sentence} {fact.subject}".lower() for term in terms)
    ]


def run_restore(args: argparse.Namespace, out: Output) -> None:
    """Bring a fact back that was forgotten, replaced or evicted."""
    with open_fact_store(resolve_student_folder(args.student)) as fact_store:
        fact, replaced = fact_store.restore(args.number)
    out.print_line(f"fact {fact.id} is back: {fact.sentence!r}")
    for replaced_fact in replaced:
        out.print_line(f"it replaces fact {replaced_fact.id}: {replaced_fact.sentence!r}")
    out.print_json(
        {
            "fact": fact_to_dict(fact),
            "replaces": [fact_to_dict(replaced_fact) for replaced_fact in replaced],
        }
    )


def run_prune(args: argparse.Namespace, out: Output) -> None:
    """Keep the facts, or rows, that are used most lately; take out the others."""
    if args.keep < 0:
        raise UserError(f"--keep must be 0 or more, got {args.keep}")
    with open_fact_store(resolve_student_folder(args.student)) as fact_store:
        if args.rows:
            if not get_associative_memories(fact_store.model):
                raise UserError(
                    "this student has no associative memory, so there are no rows to evict; leave --rows out"
                )
            num_removed = drop_rows(fact_store.model, fact_store.db, keep=lambda _: args.keep)
            out.print_line(f"{num_removed:,} rows evicted")
            out.print_json({"rows": num_removed})
            return
        pruned = fact_store.prune(args.keep)
        out.print_line(
            f"{len(pruned):,} facts evicted, {len(fact_store.records):,} kept; dmt memory restore ID brings one back"
        )
    out.print_json([fact_to_dict(fact) for fact in pruned])


def fact_to_dict(fact: FactRecord) -> dict[str, Any]:
    """A fact as programs read it."""
    excluded = ("subject_ids", "answer_ids", "reach", "rows")
    return {name: value for name, value in asdict(fact).items() if name not in excluded} | {
        "rows": list(fact.rows)
    }


NO_FACTS_MESSAGE = "no facts yet; dmt memory write 'The capital of France is Paris.' begins"


def open_student(args: argparse.Namespace, writable: bool = False) -> tuple[FactStore, Path]:
    """A student's book to be read, empty where it has none; or to be written to."""
    folder = resolve_student_folder(args.student)
    if writable:
        return open_fact_store(folder), folder
    if has_fact_store(folder):
        return open_fact_store(folder, read_only=True), folder
    return FactStore(*load_student(folder), None), folder


def run_stats(args: argparse.Namespace, out: Output) -> None:
    """What a student's memory consists of."""
    fact_store, folder = open_student(args)
    layers = [
        _summarize_layer(index, block)
        for index, block in enumerate(
            get_architecture(fact_store.model.config.model_type).blocks(fact_store.model)
        )
    ]
    size = sum(
        file.stat().st_size
        for file in folder.glob(f"{FACTS_FILE}*")
        if not file.name.endswith(".lock")
    )
    tags: dict[str, int] = {}
    for fact in fact_store.records.values():
        tags[fact.tag] = tags.get(fact.tag, 0) + 1
    facts: dict[str, Any] = {
        "facts": len(fact_store.records),
        "rows": sum(len(fact.rows) for fact in fact_store.records.values()),
        "bytes": size,
    }
    if fact_store.records:
        facts |= {
            "listens": fact_store.hooks.key_layer,
            "answers": fact_store.hooks.value_layer,
            "tags": tags,
        }
    out.print_line(
        f"{folder}: {fact_store.model.config.model_type}, {sum(p.numel() for p in fact_store.model.parameters()):,} weights"
    )
    columns = ("layer", "memory", "slots", "read per token", "rows", "capacity", "bytes")
    out.print_table(
        columns, [[layer.get(name, "") for name in columns] for layer in layers], "no layers"
    )
    if fact_store.records:
        out.print_line(
            f"{facts['facts']:,} facts in {facts['rows']:,} rows, heard in layer {facts['listens']} and answered in "
            f"{facts['answers']}; {size:,} bytes on disk"
        )
        out.print_table(
            ("tag", "facts"), [(tag or "(none)", count) for tag, count in sorted(tags.items())], ""
        )
    else:
        out.print_line(NO_FACTS_MESSAGE)
    out.print_json(
        {"student": str(folder), "model_type": fact_store.model.config.model_type, "layers": layers}
        | facts
    )


def _summarize_layer(index: int, block: torch.nn.Module) -> dict[str, Any]:
    size = sum(
        tensor.numel() * tensor.element_size() for tensor in (*block.parameters(), *block.buffers())
    )
    summary: dict[str, Any] = {"layer": index, "memory": "dense", "bytes": size}
    if isinstance(block, AssociativeMemory):
        summary |= {
            "memory": "associative",
            "rows": len(block.rows),
            "capacity": block.insert_policy.capacity,
        }
    slot_memory = block.base if isinstance(block, AssociativeMemory) else block
    if isinstance(slot_memory, FeaturalMemory):
        file_sizes = slot_memory.external_sizes()
        summary["bytes"] += file_sizes["ram"]
        summary |= {"on disk": file_sizes["disk"]} if file_sizes["disk"] else {}
        summary |= {
            "slots": slot_memory.num_slots,
            "read per token": f"{slot_memory.k}{' on average' if slot_memory.k_mode == 'threshold' else ''}",
        }
        summary["memory"] = "featural" if slot_memory is block else "associative on featural"
    return summary


def run_list(args: argparse.Namespace, out: Output) -> None:
    """The facts of a student, or the rows of its associative memory."""
    check_row_selection(args)
    fact_store, _ = open_student(args)
    if args.rows:
        rows = [
            row for row in describe_rows(fact_store.model) if not args.id or row["row"] in args.id
        ]
        rows = [row for row in rows if args.tag is None or args.tag in row["tag"].split("\n")]
        cells = [
            (
                r["row"],
                r["layer"],
                r["tag"].replace("\n", ", "),
                r["entries"],
                r["reads"],
                format_time(r["created"]),
            )
            for r in rows
        ]
        out.print_table(
            ("row", "layer", "tag", "made of", "read", "since"), cells[: args.limit], "no rows"
        )
        _print_omitted(len(rows), args.limit, out)
        out.print_json(rows[: args.limit])
        return
    if fact_store.db is None:
        out.print_line(NO_FACTS_MESSAGE)
        out.print_json([])
        return
    facts = (
        filter_facts(fact_store.fact_table.read(include_deleted=True), args)
        if args.all
        else select_facts(fact_store, args)
    )
    uses = fact_store.fact_table.read_usage() if facts else {}
    answer_counts = {
        fact.id: max((uses.get(row, (0, 0.0))[0] for row in fact.rows), default=0) for fact in facts
    }
    table_rows = [
        (
            f.id,
            f.tag,
            f.subject,
            f.prompt,
            f.answer.strip(),
            format_time(f.created),
            answer_counts[f.id],
            _format_status(f),
        )
        for f in facts
    ]
    columns = ("fact", "tag", "about", "asked", "answer", "since", "answered", "")
    out.print_table(
        columns,
        table_rows[: args.limit],
        "no such facts" if fact_store.records else NO_FACTS_MESSAGE,
    )
    _print_omitted(len(facts), args.limit, out)
    out.print_json(
        [fact_to_dict(fact) | {"answered": answer_counts[fact.id]} for fact in facts[: args.limit]]
    )


def _print_omitted(count: int, limit: int, out: Output) -> None:
    if count > limit:
        out.print_note(f"{count - limit:,} more; --limit {count} shows all")


def _format_status(fact: FactRecord) -> str:
    if fact.deleted_reason is None:
        return ""
    suffix = f" by {fact.replaced_by}" if fact.replaced_by else ""
    return f"{fact.deleted_reason}{suffix} {format_time(fact.deleted_at or 0)}"


def run_show(args: argparse.Namespace, out: Output) -> None:
    """One fact in full, or one slot: what it says, and which tokens that pushes up."""
    fact_store, _ = open_student(args)
    if args.slot is not None:
        _print_slot(fact_store, args.slot, out)
        return
    if args.number is None:
        raise UserError("show what? give the number of a fact, or --slot LAYER:NUMBER")
    history = {fact.id: fact for fact in fact_store.fact_table.read(include_deleted=True)}
    if args.number not in history:
        raise UserError(f"fact {args.number} was never there; dmt memory list --all shows what was")
    fact = history[args.number]
    out.print_line(f"fact {fact.id}: {fact.prompt!r} is answered {fact.answer!r}")
    scope = (
        f"answers about {fact.subject!r}"
        if fact.subject
        else "answers whoever asks in nearly these words"
    )
    out.print_line(
        f"{scope}; tag {fact.tag or '(none)'}, source {fact.source or '(none)'}, since {format_time(fact.created)}"
    )
    if fact.deleted_reason:
        out.print_line(_format_status(fact))
    stored_rows = fact_store.get_rows(fact.id) if fact.deleted_reason is None else []
    rows = []
    for stored_row, token, threshold in zip(
        stored_rows, fact.answer_ids, fact.thresholds, strict=False
    ):
        promoted = trace.logit_lens(
            fact_store.model, fact_store.tokenizer, stored_row.value.unsqueeze(0)
        )[0]
        rows.append(
            {
                "row": stored_row.row_id,
                "says": fact_store.tokenizer.decode([token]),
                "from cosine": round(threshold, 3),
                "length": round(float(stored_row.value.norm()), 2),
                "pushes up": [word for word, _ in promoted],
            }
        )
    columns = ("row", "says", "from cosine", "length", "pushes up")
    cells = [
        [
            _format_quoted(row[name]) if name in ("says", "pushes up") else row[name]
            for name in columns
        ]
        for row in rows
    ]
    out.print_table(
        columns, cells, "its rows are not there any more; dmt memory restore brings them back"
    )
    others = [other for other in history.values() if other.replaced_by == fact.id]
    for other in others:
        out.print_line(f"it replaced fact {other.id}: {other.sentence!r}")
    out.print_json(
        fact_to_dict(fact) | {"parts": rows, "replaced": [fact_to_dict(other) for other in others]}
    )


def _print_slot(fact_store: FactStore, slot: str, out: Output) -> None:
    layer, _, slot_number = slot.partition(":")
    blocks = get_architecture(fact_store.model.config.model_type).blocks(fact_store.model)
    if not (layer.isdecimal() and slot_number.isdecimal() and int(layer) < len(blocks)):
        raise UserError(
            f"--slot must be LAYER:NUMBER with layers in [0, {len(blocks) - 1}], as in 3:17, got {slot!r}"
        )
    block = blocks[int(layer)]
    memory = block.base if isinstance(block, AssociativeMemory) else block
    if not isinstance(memory, FeaturalMemory) or int(slot_number) >= memory.num_slots:
        raise UserError(
            f"--slot {slot}: "
            + (
                "that layer has no slots"
                if not isinstance(memory, FeaturalMemory)
                else f"that layer has slots 0 to {memory.num_slots - 1}"
            )
        )
    value = memory.gather_values(torch.tensor([int(slot_number)]))[0]
    value = value if memory.output is None else memory.output @ value
    promoted = trace.logit_lens(
        fact_store.model, fact_store.tokenizer, torch.stack([value, -value]), 10
    )
    summary: dict[str, Any] = {
        "slot": int(slot_number),
        "layer": int(layer),
        "length": round(float(value.norm()), 3),
    }
    summary |= {
        "pushes up": [word for word, _ in promoted[0]],
        "pushes down": [word for word, _ in promoted[1]],
    }
    for key, entry in summary.items():
        out.print_line(f"{key}: {_format_quoted(entry)}")
    out.print_json(summary)


def run_search(args: argparse.Namespace, out: Output) -> None:
    """Facts that have these words, and those asked for in a state like that at the end of the text."""
    fact_store, _ = open_student(args)
    args.query, args.id, args.tag = args.text, None, None
    text_matches = select_facts(fact_store, args)
    state_matches = [
        (fact, cosine)
        for fact, cosine in find_nearest_facts(fact_store, args.text, args.limit)
        if fact not in text_matches
    ]
    cells = [(f.id, f.tag, f.prompt, f.answer.strip(), "words") for f in text_matches[: args.limit]]
    cells += [
        (f.id, f.tag, f.prompt, f.answer.strip(), f"state, cosine {cosine:.2f}")
        for f, cosine in state_matches
    ]
    out.print_table(
        ("fact", "tag", "asked", "answer", "found by"),
        cells,
        "no facts" if fact_store.records else NO_FACTS_MESSAGE,
    )
    payload = [fact_to_dict(fact) | {"by": "words"} for fact in text_matches[: args.limit]]
    out.print_json(
        payload
        + [fact_to_dict(fact) | {"by": "state", "cosine": cosine} for fact, cosine in state_matches]
    )


def run_trace(args: argparse.Namespace, out: Output) -> None:
    """Token by token and layer by layer: which slots, rows and facts were read."""
    fact_store, _ = open_student(args)
    layers = (
        None
        if args.layers is None
        else select_layers(args.layers, fact_store.model.config.num_hidden_layers, "--layers")
    )
    activations = trace.trace_activations(
        fact_store.model,
        fact_store.tokenizer,
        args.text,
        args.most,
        args.lens,
        layers,
        make_fact_lookup(fact_store),
    )
    out.print_renderable(trace.format_table(activations))
    out.print_json(trace.to_json(activations))


def make_fact_lookup(fact_store: FactStore) -> Any:
    def lookup(row_id: int) -> tuple[int, str]:
        fact = fact_store.find_fact_by_row(row_id)
        return fact.id, fact.tag

    return lookup


def _format_quoted(value: Any) -> str:
    return (
        ", ".join(f"{item!r}" for item in value)
        if isinstance(value, list)
        else repr(value)
        if isinstance(value, str)
        else str(value)
    )


MAX_SHOWN = 20
"""Facts that are shown of each kind."""


def run_export(args: argparse.Namespace, out: Output) -> None:
    """Put facts into a pack."""
    path = Path(args.pack)
    if path.exists():
        raise UserError(f"{path} is there already; give a new name, or remove it first")
    check_row_selection(args)
    fact_store, _ = open_student(args)
    if args.rows:
        row_pack = make_row_pack(
            fact_store.model,
            hash_model(fact_store.model),
            args.name or path.stem,
            args.licence,
            set(args.id or ()),
            args.tag,
        )
        packs.save_row_pack(row_pack, path)
        out.print_line(
            f"{path}: {sum(row_pack.manifest['counts'].values()):,} rows of associative memory"
        )
        out.print_json(row_pack.manifest)
        return
    facts = select_facts(fact_store, args)
    if not facts:
        raise UserError(
            "no fact is like that, so there is nothing to export; dmt memory list shows what there is"
        )
    pack = make_fact_pack(
        fact_store, facts, args.name or path.stem, args.licence, hash_model(fact_store.model)
    )
    packs.save_fact_pack(pack, path)
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    out.print_line(
        f"{path}: {len(facts):,} facts in {pack.manifest['counts']['rows']:,} rows, {size:,} bytes"
    )
    out.print_json(pack.manifest | {"bytes": size})


def run_import(args: argparse.Namespace, out: Output) -> None:
    """Write a pack's facts into a student's book."""
    path = Path(args.pack)
    if packs.is_row_pack(path):
        row_pack = packs.load_row_pack(path)
        with open_fact_store(resolve_student_folder(args.student)) as fact_store:
            num_added, num_evicted = import_rows(
                fact_store.model, fact_store.db, row_pack, hash_model(fact_store.model)
            )
        out.print_line(f"{num_added:,} rows taken in, {num_evicted:,} left for them")
        out.print_json({"rows": num_added, "left": num_evicted})
        return
    pack = packs.load_fact_pack(path)
    with open_fact_store(resolve_student_folder(args.student)) as fact_store:
        model_hash = hash_model(fact_store.model)
        check_fact_pack_fits(pack, fact_store, model_hash, path)
        if not fact_store.records:
            out.print_note("a book's first facts are preceded by a measurement of some seconds")
        results = import_pack(fact_store, pack, model_hash)
    counts = print_counts(results, out)
    for result in [result for result in results if result.replaced_fact is not None][:MAX_SHOWN]:
        assert result.replaced_fact is not None
        out.print_line(
            f"fact {result.fact.id} {result.fact.sentence!r} replaces {result.replaced_fact.id} {result.replaced_fact.sentence!r}"
        )
    out.print_json(counts | {"facts": [fact_to_dict(result.fact) for result in results]})


def run_merge(args: argparse.Namespace, out: Output) -> None:
    """Make one pack of several and report where they contradict each other."""
    path = Path(args.output)
    if path.exists():
        raise UserError(f"{path} is there already; give a new name, or remove it first")
    pack, conflicts = merge_packs(
        [packs.load_fact_pack(Path(name)) for name in args.packs],
        args.name or path.stem,
        args.prefer,
    )
    packs.save_fact_pack(pack, path)
    out.print_line(
        f"{path}: {pack.manifest['counts']['facts']:,} facts, {len(conflicts):,} contradictions"
    )
    columns = ("asked", "kept", "left out")
    rows = [
        (kept_fact.prompt, kept_fact.answer.strip(), dropped_fact.answer.strip())
        for kept_fact, dropped_fact in conflicts
    ]
    if rows:
        out.print_table(columns, rows[:MAX_SHOWN], "")
    out.print_json(
        pack.manifest
        | {
            "conflicts": [
                {"kept": fact_to_dict(kept_fact), "left out": fact_to_dict(dropped_fact)}
                for kept_fact, dropped_fact in conflicts
            ]
        }
    )


def run_diff(args: argparse.Namespace, out: Output) -> None:
    """What differs between two packs, students or runs."""
    difference = diff_facts(load_fact_records(args.first), load_fact_records(args.second))
    out.print_line(
        f"{difference.num_same:,} the same, {len(difference.different):,} answered differently, {len(difference.only_first):,} only in "
        f"{args.first}, {len(difference.only_second):,} only in {args.second}"
    )
    rows = [
        (first.prompt, first.answer.strip(), second.answer.strip())
        for first, second in difference.different
    ]
    rows += [(fact.prompt, fact.answer.strip(), "") for fact in difference.only_first]
    rows += [(fact.prompt, "", fact.answer.strip()) for fact in difference.only_second]
    if rows:
        out.print_table(("asked", "first", "second"), rows[: args.limit], "")
    if len(rows) > args.limit:
        out.print_note(f"{len(rows) - args.limit:,} more; --limit {len(rows)} shows all")
    out.print_json(
        {
            "same": difference.num_same,
            "different": [
                [fact_to_dict(first), fact_to_dict(second)]
                for first, second in difference.different
            ],
            "only_first": [fact_to_dict(fact) for fact in difference.only_first],
            "only_second": [fact_to_dict(fact) for fact in difference.only_second],
        }
    )


def load_fact_records(name: str) -> list[FactRecord]:
    """Facts of a pack, or of the book of a student or run; no model is loaded.

    Raises:
        UserError: it is none of them.
    """
    path = Path(name)
    if is_pack(path):
        return packs.load_fact_pack(path).facts
    db_path = resolve_student_folder(path) / FACTS_FILE
    if not db_path.is_file():
        return []
    fact_table = FactTable(RowStore(str(db_path), read_only=True))
    return fact_table.read() if fact_table.exists else []
