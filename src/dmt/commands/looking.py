"""`dmt memory stats | list | show | search | read`: what looks into a student's memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dmt import inspection
from dmt.commands.changing import about, check_rows, choose, matching
from dmt.commands.printing import Output, when
from dmt.errors import UserError
from dmt.facts.asking import nearest
from dmt.facts.book import Book
from dmt.facts.opening import has_book, load_student, open_book, student_folder
from dmt.facts.remembering import rows_about
from dmt.layers import select_layers
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.models.architectures import architecture_of
from dmt.models.books import BOOK
from dmt.records import Told

UNREAD = "no facts yet; dmt memory write 'The capital of France is Paris.' begins"


def opened(given: argparse.Namespace, write: bool = False) -> tuple[Book, Path]:
    """A student's book to be read, empty where it has none; or to be written to."""
    folder = student_folder(given.student)
    if write:
        return open_book(folder), folder
    if has_book(folder):
        return open_book(folder, read_only=True), folder
    return Book(*load_student(folder), None), folder


def stats(given: argparse.Namespace, out: Output) -> None:
    """What a student's memory consists of."""
    book, folder = opened(given)
    layers = [
        _layer(number, block) for number, block in enumerate(architecture_of(book.model.config.model_type).blocks(book.model))
    ]
    size = sum(file.stat().st_size for file in folder.glob(f"{BOOK}*") if not file.name.endswith(".lock"))
    tags: dict[str, int] = {}
    for fact in book.known.values():
        tags[fact.tag] = tags.get(fact.tag, 0) + 1
    facts: dict[str, Any] = {"facts": len(book.known), "rows": sum(len(fact.rows) for fact in book.known.values()), "bytes": size}
    if book.known:
        facts |= {"listens": book.overlay.listens, "answers": book.overlay.answers, "tags": tags}
    out.line(f"{folder}: {book.model.config.model_type}, {sum(p.numel() for p in book.model.parameters()):,} weights")
    columns = ("layer", "memory", "slots", "read per token", "rows", "capacity", "bytes")
    out.table(columns, [[layer.get(name, "") for name in columns] for layer in layers], "no layers")
    if book.known:
        out.line(
            f"{facts['facts']:,} facts in {facts['rows']:,} rows, heard in layer {facts['listens']} and answered in "
            f"{facts['answers']}; {size:,} bytes on disk"
        )
        out.table(("tag", "facts"), [(tag or "(none)", count) for tag, count in sorted(tags.items())], "")
    else:
        out.line(UNREAD)
    out.data({"student": str(folder), "model_type": book.model.config.model_type, "layers": layers} | facts)


def _layer(number: int, block: torch.nn.Module) -> dict[str, Any]:
    size = sum(each.numel() * each.element_size() for each in (*block.parameters(), *block.buffers()))
    found: dict[str, Any] = {"layer": number, "memory": "dense", "bytes": size}
    if isinstance(block, AssociativeMemory):
        found |= {"memory": "associative", "rows": len(block.rows), "capacity": block.policy.capacity}
    slots = block.base if isinstance(block, AssociativeMemory) else block
    if isinstance(slots, FeaturalMemory):
        filed = slots.filed_sizes()
        found["bytes"] += filed["ram"]
        found |= {"on disk": filed["disk"]} if filed["disk"] else {}
        found |= {"slots": slots.slots, "read per token": f"{slots.k}{' on average' if slots.selection == 'threshold' else ''}"}
        found["memory"] = "featural" if slots is block else "associative on featural"
    return found


def listing(given: argparse.Namespace, out: Output) -> None:
    """The facts of a student, or the rows of its associative memory."""
    check_rows(given)
    book, _ = opened(given)
    if given.rows:
        rows = [row for row in rows_about(book.model) if not given.id or row["row"] in given.id]
        rows = [row for row in rows if given.tag is None or given.tag in row["tag"].split("\n")]
        shown = [(r["row"], r["layer"], r["tag"].replace("\n", ", "), r["entries"], r["reads"], when(r["created"])) for r in rows]
        out.table(("row", "layer", "tag", "made of", "read", "since"), shown[: given.limit], "no rows")
        _more(len(rows), given.limit, out)
        out.data(rows[: given.limit])
        return
    if book.store is None:
        out.line(UNREAD)
        out.data([])
        return
    facts = matching(book.ledger.read(gone=True), given) if given.all else choose(book, given)
    uses = book.ledger.uses() if facts else {}
    answered = {fact.id: max((uses.get(row, (0, 0.0))[0] for row in fact.rows), default=0) for fact in facts}
    lines = [(f.id, f.tag, f.subject, f.prompt, f.answer.strip(), when(f.created), answered[f.id], _state(f)) for f in facts]
    columns = ("fact", "tag", "about", "asked", "answer", "since", "answered", "")
    out.table(columns, lines[: given.limit], "no such facts" if book.known else UNREAD)
    _more(len(facts), given.limit, out)
    out.data([about(fact) | {"answered": answered[fact.id]} for fact in facts[: given.limit]])


def _more(count: int, limit: int, out: Output) -> None:
    if count > limit:
        out.note(f"{count - limit:,} more; --limit {count} shows all")


def _state(fact: Told) -> str:
    if fact.gone is None:
        return ""
    by = f" by {fact.replaced_by}" if fact.replaced_by else ""
    return f"{fact.gone}{by} {when(fact.gone_at or 0)}"


def show(given: argparse.Namespace, out: Output) -> None:
    """One fact in full, or one slot: what it says, and which tokens that pushes up."""
    book, _ = opened(given)
    if given.slot is not None:
        _show_slot(book, given.slot, out)
        return
    if given.number is None:
        raise UserError("show what? give the number of a fact, or --slot LAYER:NUMBER")
    history = {fact.id: fact for fact in book.ledger.read(gone=True)}
    if given.number not in history:
        raise UserError(f"fact {given.number} was never there; dmt memory list --all shows what was")
    fact = history[given.number]
    out.line(f"fact {fact.id}: {fact.prompt!r} is answered {fact.answer!r}")
    about_whom = f"answers about {fact.subject!r}" if fact.subject else "answers whoever asks in nearly these words"
    out.line(f"{about_whom}; tag {fact.tag or '(none)'}, source {fact.source or '(none)'}, since {when(fact.created)}")
    if fact.gone:
        out.line(_state(fact))
    parts = book.parts(fact.id) if fact.gone is None else []
    rows = []
    for part, token, reach in zip(parts, fact.answer_ids, fact.reach, strict=False):
        pushed = inspection.lens(book.model, book.tokenizer, part.value.unsqueeze(0))[0]
        rows.append({
            "row": part.row, "says": book.tokenizer.decode([token]), "from cosine": round(reach, 3),
            "length": round(float(part.value.norm()), 2), "pushes up": [word for word, _ in pushed],
        })  # fmt: skip
    columns = ("row", "says", "from cosine", "length", "pushes up")
    shown = [[_quoted(row[name]) if name in ("says", "pushes up") else row[name] for name in columns] for row in rows]
    out.table(columns, shown, "its rows are not there any more; dmt memory restore brings them back")
    others = [other for other in history.values() if other.replaced_by == fact.id]
    for other in others:
        out.line(f"it replaced fact {other.id}: {other.sentence!r}")
    out.data(about(fact) | {"parts": rows, "replaced": [about(other) for other in others]})


def _show_slot(book: Book, name: str, out: Output) -> None:
    layer, _, number = name.partition(":")
    blocks = architecture_of(book.model.config.model_type).blocks(book.model)
    if not (layer.isdecimal() and number.isdecimal() and int(layer) < len(blocks)):
        raise UserError(f"--slot must be LAYER:NUMBER with layers in [0, {len(blocks) - 1}], as in 3:17, got {name!r}")
    block = blocks[int(layer)]
    memory = block.base if isinstance(block, AssociativeMemory) else block
    if not isinstance(memory, FeaturalMemory) or int(number) >= memory.slots:
        raise UserError(f"--slot {name}: " + ("that layer has no slots" if not isinstance(memory, FeaturalMemory) else
                        f"that layer has slots 0 to {memory.slots - 1}"))  # fmt: skip
    value = memory.value_rows(torch.tensor([int(number)]))[0]
    value = value if memory.output is None else memory.output @ value
    up = inspection.lens(book.model, book.tokenizer, torch.stack([value, -value]), 10)
    found: dict[str, Any] = {"slot": int(number), "layer": int(layer), "length": round(float(value.norm()), 3)}
    found |= {"pushes up": [word for word, _ in up[0]], "pushes down": [word for word, _ in up[1]]}
    for side, value_ in found.items():
        out.line(f"{side}: {_quoted(value_)}")
    out.data(found)


def search(given: argparse.Namespace, out: Output) -> None:
    """Facts that have these words, and those asked for in a state like that at the end of the text."""
    book, _ = opened(given)
    given.query, given.id, given.tag = given.text, None, None
    having = choose(book, given)
    near = [(fact, cosine) for fact, cosine in nearest(book, given.text, given.limit) if fact not in having]
    shown = [(f.id, f.tag, f.prompt, f.answer.strip(), "words") for f in having[: given.limit]]
    shown += [(f.id, f.tag, f.prompt, f.answer.strip(), f"state, cosine {cosine:.2f}") for f, cosine in near]
    out.table(("fact", "tag", "asked", "answer", "found by"), shown, "no facts" if book.known else UNREAD)
    found = [about(fact) | {"by": "words"} for fact in having[: given.limit]]
    out.data(found + [about(fact) | {"by": "state", "cosine": cosine} for fact, cosine in near])


def read(given: argparse.Namespace, out: Output) -> None:
    """Token by token and layer by layer: which slots, rows and facts were read."""
    book, _ = opened(given)
    layers = None if given.layers is None else select_layers(given.layers, book.model.config.num_hidden_layers, "--layers")
    reads = inspection.read(book.model, book.tokenizer, given.text, given.most, given.lens, layers, namer(book))
    out.show(inspection.table(reads))
    out.data(inspection.as_json(reads))


def namer(book: Book) -> Any:
    def name(row: int) -> tuple[int, str]:
        fact = book.fact_of_row(row)
        return fact.id, fact.tag

    return name


def _quoted(words: Any) -> str:
    return (
        ", ".join(f"{word!r}" for word in words)
        if isinstance(words, list)
        else repr(words)
        if isinstance(words, str)
        else str(words)
    )
