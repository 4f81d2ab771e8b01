"""The page of a teacher's own training, from its record and its curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmt.config import Config
from dmt.pages.distilled import made, percent, places
from dmt.pages.overlaid import overlaid
from dmt.pages.page import Card, Page, Row, Table


def pretrained(run: Path, config: Config, record: Mapping[str, Any]) -> Page:
    """What `run.json` of a finished pretraining says, as a page."""
    lead = (
        f"A teacher of {config.pretrain.layers} layers, width {config.pretrain.width}, trained for {config.pretrain.steps:,} steps."
    )
    if config.pretrain.start:
        lead = f"The teacher {config.pretrain.start} trained for {config.pretrain.steps:,} steps more."
    page = Page(run.name, lead, "pretraining", made=made(record))
    others = ("student", "ask it", "as text")
    page.places = [("teacher", config.pretrain.output), *(place for place in places(run, record) if place[0] not in others)]
    rows = []
    for corpus, found in record["fidelity"].items():
        page.cards.append(Card(f"{found['perplexity']:.3f}", f"perplexity, {corpus}", "lower is better"))
        rows.append(Row(f"{corpus}: perplexity", f"{found['tokens']:,.0f} predicted tokens", (f"{found['perplexity']:.3f}",)))
        for name, what in (("recall", "facts known"), ("recall_unseen", "facts, asked in new words")):
            if said := found.get(name):
                rows.append(Row(f"{corpus}: {what}", f"of {said['probes']:,} questions", (percent(said["teacher"]),)))
    page.tables = [Table("On test text", ("teacher",), rows)]
    page.plots = overlaid({"": record.get("curves", {})})
    page.notes = [f"{record['seconds']['total']:.0f} s in all"]
    return page
