"""The page of a consolidation: what is answered without the context, with it and after, from its record and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmt.config import Config
from dmt.pages.distilled import made, percent, places
from dmt.pages.overlaid import overlaid
from dmt.pages.page import Card, Page, Row, Table

WAYS = ("without", "with", "consolidated")
COLUMNS = ("without", "with the context", "consolidated")


def consolidated(
    run: Path, config: Config, record: Mapping[str, Any], text: str, asked: Sequence[tuple[str, str]], notes: list[str], where: str
) -> Page:
    """What `run.json` of a finished consolidation says, as a page.

    Args:
        text: the context.
        asked: prompts and answers of the questions, in the order of the record's.
        notes: what was written, what it did to other text, what it cost.
        where: what the context was put into, in words.
    """
    lead = f"A context was put into {config.teacher}, into {where}, so that it answers without as it would with it."
    page = Page(run.name, lead, "consolidation", made=made(record), places=places(run, record), notes=notes, text=text)
    page.places = [place for place in page.places if config.stages.end_to_end_steps or place[0] != "curves"]
    kinds = record.get("kinds", {})
    for kind, found in kinds.items():
        if found["share"] is not None:
            meaning = "of what the context does for the log-probability of the right answer"
            page.cards.append(Card(percent(found["share"]), f"of the context's benefit kept, {kind}", meaning))
        page.cards.append(
            Card(percent(found["recall_consolidated"]), f"answered rightly, {kind}", f"{found['questions']} questions")
        )
    for corpus, found in record["unrelated"].items():
        page.cards.append(
            Card(f"{found['kl']:.1e}", f"nats changed per token of {corpus}", "text that the context says nothing of")
        )
    if kinds:
        rows = []
        for kind, found in kinds.items():
            nats = tuple(f"{found[f'log_probability_{way}']:.2f}" for way in WAYS)
            shares = tuple(percent(found[f"recall_{way}"]) for way in WAYS)
            rows.append(Row(f"{kind}: log-probability", "of the right answer, in nats; 0 is certain", nats))
            rows.append(Row(f"{kind}: answered rightly", f"of {found['questions']} questions, said greedily", shares))
        page.tables.append(Table("What is answered", COLUMNS, rows))
    if said := record.get("answers"):
        questions = [
            Row(prompt, answer, tuple(f"{-said[way]['nats'][i]:.2f}{' ✓' if said[way]['right'][i] else ''}" for way in WAYS))
            for i, (prompt, answer) in enumerate(asked)
        ]
        page.tables.append(Table("Question by question", COLUMNS, questions, "Log-probability of the answer; ✓ where it is said."))
    page.plots = overlaid({"": record.get("curves", {})})
    return page
