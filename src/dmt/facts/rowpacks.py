"""Packs of rows: what associative memories hold, to be given to another student of the same model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

import dmt.facts.containers as containers
from dmt.errors import UserError
from dmt.facts.remembering import drop_rows, rows_about, settle_in
from dmt.models.surgery import associative_of
from dmt.records import Changes, Floats, Insert
from dmt.store import Store
from dmt.store.ledger import BY


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer: keys and values `(n, width)`, and of each its tag, what it stands for and when it was made."""

    keys: Floats
    values: Floats
    tags: list[str]
    entries: list[int]
    created: list[float]


@dataclass(frozen=True)
class RowPack:
    """Rows by layer, and all that is no row: `model`, `licence`, `tags`, `counts`."""

    manifest: dict[str, Any]
    layers: dict[int, LayerRows]


def packed_rows(
    student: PreTrainedModel, model: str, name: str, licence: str = "", ids: set[int] | None = None, tag: str | None = None
) -> RowPack:
    """Rows of a student's associative memories: those with a number in `ids` and the tag, or all.

    Raises:
        UserError: there are none.
    """
    known = rows_about(student)
    if ids and (missing := sorted(ids - {row["row"] for row in known})):
        raise UserError(f"row {missing[0]} is not there; dmt memory list --rows shows the {len(known):,} that are")
    layers: dict[int, LayerRows] = {}
    for layer, memory in associative_of(student).items():
        chosen = [row for row in known if row["layer"] == layer and (not ids or row["row"] in ids)]
        chosen = [row for row in chosen if tag is None or tag in row["tag"].split("\n")]
        if not chosen:
            continue
        at = [memory.rows.place_of[row["row"]] for row in chosen]
        keys, values = (part[at].float().cpu().numpy() for part in (memory.rows.keys, memory.rows.values))
        about = ([row[what] for row in chosen] for what in ("tag", "entries", "created"))
        layers[layer] = LayerRows(keys, values, *about)
    if not layers:
        raise UserError("no row is like that, so there is nothing to export; dmt memory list --rows shows what there is")
    manifest = {
        "kind": "rows", "name": name, "licence": licence, "created": time.time(), "model": model,
        "model_type": student.config.model_type, "width": student.config.hidden_size,
        "tags": sorted({line for rows in layers.values() for tag_ in rows.tags for line in tag_.split("\n") if line}),
        "counts": {str(layer): len(rows.tags) for layer, rows in layers.items()},
    }  # fmt: skip
    return RowPack(manifest, layers)


def save(pack: RowPack, place: Path) -> None:
    """Write a pack, whole or not at all; see `containers.write`."""
    tensors = {f"layer_{layer}.{part}": getattr(rows, part) for layer, rows in pack.layers.items() for part in ("keys", "values")}
    about = {str(layer): {"tags": r.tags, "entries": r.entries, "created": r.created} for layer, r in pack.layers.items()}
    containers.write(place, {**pack.manifest, "layers": about}, tensors)


def load(place: Path) -> RowPack:
    """Read a pack of rows; see `containers.read`.

    Raises:
        UserError: it is no pack of rows, or not what it says.
    """
    about: dict[int, tuple[list[str], list[int], list[float]]] = {}

    def means(manifest: dict[str, Any]) -> dict[str, list[int]]:
        if manifest.get("kind") != "rows":
            raise UserError(f"pack {place} holds {manifest.get('kind', 'facts')}, not rows")
        width = containers.whole(manifest["width"], 1)
        shapes: dict[str, list[int]] = {}
        for layer, rows in manifest.pop("layers").items():
            tags, entries = [containers.text(tag) for tag in rows["tags"]], [containers.whole(n, 1) for n in rows["entries"]]
            created = [float(moment) for moment in rows["created"]]
            if not len(tags) == len(entries) == len(created) or not all(map(math.isfinite, created)) or not tags:
                raise ValueError(f"layer {layer} does not say the same of all its rows")
            about[containers.whole(int(layer))] = tags, entries, created
            shapes |= {f"layer_{layer}.{part}": [len(tags), width] for part in ("keys", "values")}
        return shapes

    manifest, arrays = containers.read(place, means)
    layers = {n: LayerRows(arrays[f"layer_{n}.keys"], arrays[f"layer_{n}.values"], *said) for n, said in about.items()}
    return RowPack(manifest, layers)


def is_of_rows(place: Path) -> bool:
    """Whether a pack holds rows, as far as its manifest says.

    Raises:
        UserError: it is no pack.
    """
    kind: list[Any] = []

    def means(manifest: dict[str, Any]) -> dict[str, list[int]]:
        kind.append(manifest.get("kind"))
        return {}

    containers.read(place, means)
    return kind == ["rows"]


def check_fits(pack: RowPack, student: PreTrainedModel, model: str) -> None:
    """Raise `UserError` where a pack's rows are another model's, or the student has no memory for them."""
    name, known = pack.manifest["name"], pack.manifest
    if known["model"] != model:
        raise UserError(
            f"pack {name} belongs to another model ({known['model_type']} {known['model'][:12]}, this one is "
            f"{student.config.model_type} {model[:12]}): its rows are states of that one; let this student read the text instead"
        )
    memories = associative_of(student)
    if missing := sorted(set(pack.layers) - set(memories)):
        raise UserError(f"pack {name} has rows of layer {missing[0]}, where this student has no associative memory")
    if known["width"] != student.config.hidden_size:
        raise UserError(f"pack {name}: states are {known['width']} wide, this student's {student.config.hidden_size}")


def take_rows(student: PreTrainedModel, store: Store | None, pack: RowPack, model: str) -> tuple[int, int]:
    """Put a pack's rows into a student's associative memories and its store; how many came, and how many left for them.

    Rows that are there to the last number are left out. Where there are more than a memory's capacity the coldest leave.

    Raises:
        UserError: the pack does not fit.
    """
    check_fits(pack, student, model)
    assert store is not None, "opened for writing"
    spaces, came, changes, parts = settle_in(student, store), 0, {}, {}
    for layer, rows in pack.layers.items():
        memory = associative_of(student)[layer]
        at = list(memory.rows.place_of.values())
        there = {row.tobytes() for row in memory.rows.keys[at].float().cpu().numpy()}
        new = np.array([n for n, key in enumerate(rows.keys) if key.tobytes() not in there], np.int64)
        if not len(new):
            continue
        step = int(memory.rows.histories.heat_step.max(initial=0))
        entries = np.array(rows.entries, np.int64)[new]
        part = Insert(
            store.take_ids(len(new)), rows.keys[new], rows.values[new], entries.astype(np.float32),
            [rows.tags[n] for n in new], entries, [rows.created[n] for n in new],
        )  # fmt: skip
        changes[spaces[layer]], parts[layer], came = Changes([part]), (part, step), came + len(new)
    store.commit(BY, 0, changes)
    for layer, (part, step) in parts.items():
        associative_of(student)[layer].rows.put(part, step)
    return came, drop_rows(student, store, keep=lambda memory: memory.policy.capacity)
