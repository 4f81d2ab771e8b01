"""Between books and packs: export, import, guests that stay for a while, what differs, one pack of several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dmt.errors import UserError
from dmt.facts.book import Book
from dmt.facts.lines import RATE, Outcome, plain, reach_of
from dmt.facts.packs import Pack
from dmt.memory.facts import FactMemory
from dmt.models.books import parts_of
from dmt.models.overlay import Overlay, Part, overlay_of
from dmt.records import Floats, Told


def packed(book: Book, facts: Sequence[Told], name: str, licence: str = "", model: str = "") -> Pack:
    """These facts of a book.

    Args:
        model: fingerprint of the model.
    """
    keys, values, told, given = [], [], [], 0
    for number, fact in enumerate(facts):
        parts = book.parts(fact.id)
        keys += [part.key.numpy() for part in parts]
        values += [part.value.numpy() for part in parts]
        told.append(replace(fact, id=number, rows=tuple(range(given, given + len(parts))), gone=None, replaced_by=None))
        given += len(parts)
    overlay = book.overlay
    width = overlay.memory.width
    manifest = {
        "kind": "facts", "name": name, "licence": licence, "created": time.time(), "model": model,
        "model_type": book.model.config.model_type, "width": width, "listens": overlay.listens, "answers": overlay.answers,
        "tags": sorted({fact.tag for fact in told if fact.tag}), "counts": {"facts": len(told), "rows": given},
    }  # fmt: skip
    stacked = [np.stack(states) if states else np.zeros((0, width), np.float32) for states in (keys, values)]
    mean, metric = (tensor.cpu().numpy() for tensor in (overlay.memory.mean, overlay.memory.metric))
    return Pack(manifest, told, stacked[0], stacked[1], mean, metric)


def check_fits(pack: Pack, book: Book, model: str, place: object) -> None:
    """Raise `UserError` where a pack was made with another model than the book's, or is heard or answered elsewhere."""
    known = pack.manifest
    if known["model"] != model:
        raise UserError(
            f"pack {place} belongs to another model ({known['model_type']} {str(known['model'])[:12]}, this one is "
            f"{book.model.config.model_type} {model[:12]}): its rows are states of that one; write its sentences instead, "
            "with dmt memory write"
        )
    config = book.model.config
    if known["width"] != config.hidden_size or known["answers"] >= config.num_hidden_layers:
        raise UserError(
            f"pack {place}: rows {known['width']} wide, answered in layer {known['answers']}, of a model that is "
            f"{config.hidden_size} wide and has {config.num_hidden_layers} layers; get another copy"
        )
    vocabulary = config.vocab_size
    if any(token >= vocabulary for fact in pack.facts for part in (*fact.subject_ids, fact.answer_ids) for token in part):
        raise UserError(f"pack {place}: a token is not in the model's vocabulary of {vocabulary:,}; get another copy")
    if book.known or overlay_of(book.model) is not None:
        there = book.overlay.listens, book.overlay.answers
        if (known["listens"], known["answers"]) != there:
            raise UserError(
                f"pack {place}: heard in layer {known['listens']} and answered in {known['answers']}, this book's facts in "
                f"{there[0]} and {there[1]}; write its sentences instead, with dmt memory write"
            )


def hold(book: Book, packs: Sequence[Pack], model: str) -> None:
    """Let a book have the facts of these packs for now, and no others beside its own; of none, its own alone.

    Raises:
        UserError: a pack does not fit.
    """
    guests, first = {}, 0
    for number, pack in enumerate(packs):
        check_fits(pack, book, model, pack.manifest["name"])
        guests[f"{number} {pack.manifest['name']}"] = _fitted(rows_of(pack, first), pack, book)
        first += max(len(pack.facts), len(pack.keys))
    book.hold_guests(guests, _overlay(packs[0], book) if packs else None)


def take_in(book: Book, pack: Pack, model: str) -> list[Outcome]:
    """Write a pack's facts into a book, to stay; those it knows are left, those it contradicts are replaced.

    Raises:
        UserError: the pack does not fit.
    """
    check_fits(pack, book, model, pack.manifest["name"])
    book.begin([], layers=(pack.manifest["listens"], pack.manifest["answers"]))
    alone, _ = merge([pack], pack.manifest["name"])  # a pack may contradict itself
    return book.add(_fitted(rows_of(alone), pack, book))


def _fitted(facts: list[tuple[Told, list[Part]]], pack: Pack, book: Book) -> list[tuple[Told, list[Part]]]:
    """Facts of a pack, near enough being measured anew where the book compares states in another metric."""
    overlay = overlay_of(book.model)
    if overlay is None or not facts:
        return facts
    if _same_metric((overlay.memory.mean.cpu().numpy(), overlay.memory.metric.cpu().numpy()), (pack.mean, pack.metric)):
        return facts
    if book.store is None:
        raise UserError(
            f"pack {pack.manifest['name']} compares states otherwise than the facts that are there already; load it alone, or "
            "import it into a student"
        )
    found = []
    for told, parts in facts:
        reach = reach_of(book.calibration, torch.stack([part.key for part in parts]), RATE, bool(told.subject))
        found.append(
            (replace(told, reach=tuple(reach.tolist())), [replace(p, reach=float(r)) for p, r in zip(parts, reach, strict=True)])
        )
    return found


def _overlay(pack: Pack, book: Book) -> Overlay:
    memory = FactMemory(len(pack.mean), torch.from_numpy(pack.mean), torch.from_numpy(pack.metric))
    return Overlay(memory, pack.manifest["listens"], pack.manifest["answers"], book.model.config.eos_token_id)


def rows_of(pack: Pack, first: int = 0) -> list[tuple[Told, list[Part]]]:
    """Facts of a pack as they are laid over a model; rows and facts are numbered from -`first` - 1 downwards."""
    found = []
    for fact in pack.facts:
        states: Any = [(torch.from_numpy(pack.keys[r]), torch.from_numpy(pack.values[r])) for r in fact.rows]
        guest = replace(fact, id=-first - fact.id - 1, rows=tuple(-first - row - 1 for row in fact.rows))
        found.append((guest, parts_of(guest, states)))
    return found


@dataclass(frozen=True)
class Difference:
    """Two lists of facts beside each other: what only one has, and what both ask and answer differently."""

    only_first: list[Told]
    only_second: list[Told]
    different: list[tuple[Told, Told]]
    same: int


def diff(first: Sequence[Told], second: Sequence[Told]) -> Difference:
    """How two lists of facts differ: by what is asked of whom, in the same words."""
    ours, theirs = ({_asked(fact): fact for fact in facts} for facts in (first, second))
    both = [key for key in ours if key in theirs]
    different = [(ours[key], theirs[key]) for key in both if ours[key].answer.split() != theirs[key].answer.split()]
    return Difference(
        [fact for key, fact in ours.items() if key not in theirs],
        [fact for key, fact in theirs.items() if key not in ours],
        different,
        len(both) - len(different),
    )


def merge(packs: Sequence[Pack], name: str, prefer: str = "newest") -> tuple[Pack, list[tuple[Told, Told]]]:
    """One pack of several, and where they contradict each other: the fact kept and the fact left out.

    Args:
        prefer: of two facts that contradict each other the `newest`, or the one of the `first` pack that has it.

    Raises:
        UserError: they belong to different models.
    """
    for pack in packs[1:]:
        if not _same_metric((pack.mean, pack.metric), (packs[0].mean, packs[0].metric)):
            raise UserError(
                "packs that compare states in different metrics cannot be merged; import both into one student, export that"
            )
        for part in ("model", "listens", "answers", "width"):
            if pack.manifest[part] != packs[0].manifest[part]:
                raise UserError(
                    f"packs of different models cannot be merged: {part} {packs[0].manifest[part]} and {pack.manifest[part]}"
                )
    kept: dict[tuple[str, str], tuple[Pack, Told]] = {}
    conflicts = []
    for pack in packs:
        for fact in pack.facts:
            if (there := kept.get(_asked(fact))) is None:
                kept[_asked(fact)] = pack, fact
                continue
            wins = prefer == "newest" and fact.created > there[1].created
            if fact.answer.split() != there[1].answer.split():
                conflicts.append((fact, there[1]) if wins else (there[1], fact))
            if wins:
                kept[_asked(fact)] = pack, fact
    facts, keys, values, given = [], [], [], 0
    for number, (pack, fact) in enumerate(kept.values()):
        facts.append(replace(fact, id=number, rows=tuple(range(given, given + len(fact.rows)))))
        keys += [pack.keys[row] for row in fact.rows]
        values += [pack.values[row] for row in fact.rows]
        given += len(fact.rows)
    licences = sorted({str(pack.manifest["licence"]) or "none stated" for pack in packs})
    manifest = packs[0].manifest | {
        "name": name, "created": time.time(), "licence": "" if licences == ["none stated"] else " and ".join(licences),
        "tags": sorted({fact.tag for fact in facts if fact.tag}), "counts": {"facts": len(facts), "rows": given},
    }  # fmt: skip
    stacked = [np.stack(states) if states else packs[0].keys[:0] for states in (keys, values)]
    return Pack(manifest, facts, stacked[0], stacked[1], packs[0].mean, packs[0].metric), conflicts


def _asked(fact: Told) -> tuple[str, str]:
    return fact.subject, plain(fact.prompt)


def _same_metric(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> bool:
    """Whether two pairs of a mean and a metric compare states alike."""
    return all(np.allclose(mine, its, 1e-3, 1e-5) for mine, its in zip(one, other, strict=True))
