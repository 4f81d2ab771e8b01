"""Packs of facts, to be given away."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dmt.facts.containers as containers
from dmt.errors import UserError
from dmt.records import Floats, Told

ARRAYS = ("keys", "values", "mean", "metric")
"""Tensors of a pack of facts."""


@dataclass(frozen=True)
class Pack:
    """Facts with their rows, of one model.

    Attributes:
        manifest: all that is no tensor: `model`, `listens`, `answers`, `width`, `licence`, `tags`, `counts`.
        facts: what it says; numbers and rows count from 0 within the pack.
        keys, values: `(rows, width)`.
        mean, metric: `(width,)` and `(width, width)`, in which the maker's model compared states.
    """

    manifest: dict[str, Any]
    facts: list[Told]
    keys: Floats
    values: Floats
    mean: Floats
    metric: Floats


def save(pack: Pack, place: Path) -> None:
    """Write a pack, whole or not at all; see `containers.write`."""
    manifest = {**pack.manifest, "kind": "facts", "facts": [_written(fact) for fact in pack.facts]}
    containers.write(place, manifest, {name: getattr(pack, name) for name in ARRAYS})


def load(place: Path) -> Pack:
    """Read a pack of facts; see `containers.read`.

    Raises:
        UserError: it is no pack of facts, or not what it says.
    """
    facts: list[Told] = []

    def means(manifest: dict[str, Any]) -> dict[str, list[int]]:
        if manifest.get("kind", "facts") != "facts":
            raise UserError(f"pack {place} holds {manifest['kind']}, not facts; dmt memory import takes it into associative memory")
        width = containers.whole(manifest["width"], 1)
        if containers.whole(manifest["answers"]) < containers.whole(manifest["listens"]):
            raise TypeError(f"heard in layer {manifest['listens']} and answered in {manifest['answers']}")
        facts.extend(_read(each, number, place) for number, each in enumerate(manifest.pop("facts")))
        rows = sum(len(fact.answer_ids) for fact in facts)
        return dict(zip(ARRAYS, ([rows, width], [rows, width], [width], [width, width]), strict=True))

    manifest, arrays = containers.read(place, means)
    given = 0
    for number, fact in enumerate(facts):
        facts[number] = replace(fact, rows=tuple(range(given, given + len(fact.answer_ids))))
        given += len(fact.answer_ids)
    manifest["tags"] = sorted({fact.tag for fact in facts if fact.tag})  # as they are, whatever it says
    manifest["counts"] = {"facts": len(facts), "rows": given}
    return Pack(manifest, facts, **arrays)


def _written(fact: Told) -> dict[str, Any]:
    left_out = ("id", "rows", "gone", "gone_at", "replaced_by")
    return {name: value for name, value in asdict(fact).items() if name not in left_out}


def _read(found: Any, number: int, place: Path) -> Told:
    """A fact of a manifest, every part of it checked."""
    names = ("prompt", "answer", "subject", "tag", "source")
    try:
        texts: dict[str, Any] = {name: containers.text(found[name]) for name in names}
    except TypeError as error:
        raise UserError(f"pack {place}: fact {number} of its manifest is not one ({error}); get another copy") from None
    ids = [tuple(way) for way in found["subject_ids"]], tuple(found["answer_ids"])
    reach, created = tuple(found["reach"]), found["created"]
    whole = all(isinstance(token, int) and 0 <= token < 2**31 for part in (*ids[0], ids[1]) for token in part)
    numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in (*reach, created))
    if not (whole and numbers and ids[1] and all(ids[0]) and len(reach) == len(ids[1])):
        raise UserError(f"pack {place}: fact {number} of its manifest is not one; get another copy")
    return Told(
        number, **texts, created=float(created), subject_ids=tuple(ids[0]), answer_ids=ids[1], reach=tuple(map(float, reach))
    )
