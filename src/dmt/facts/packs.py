"""Packs: facts to be given away. One file, or a folder of two: tensors in safetensors, everything else in a JSON manifest."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmt.errors import UserError
from dmt.records import Floats, Told

FORMAT, VERSION = "dmt-pack", 1
MANIFEST, TENSORS = "manifest.json", "rows.safetensors"
"""Of a pack that is a folder."""
ARRAYS = ("keys", "values", "mean", "metric")
"""Its tensors."""
MOST_BYTES = 4 * 2**30
"""Bytes that a pack's tensors may have; and a manifest a sixteenth of them."""
MOST_TEXT = 8_000
"""Characters of a text in a manifest."""


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
    """Write a pack, whole or not at all: one file where `place` ends in .safetensors, else a folder.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    if place.exists():
        raise UserError(f"{place} is there already; give a new name, or remove it first")
    manifest = json.dumps({**pack.manifest, "facts": [_written(fact) for fact in pack.facts]}, ensure_ascii=False, indent=1)
    tensors = {name: np.ascontiguousarray(getattr(pack, name), np.float32) for name in ARRAYS}
    partial = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".safetensors":
            save_file(tensors, partial, metadata={"manifest": manifest})
        else:
            partial.mkdir(exist_ok=True)
            save_file(tensors, partial / TENSORS)
            (partial / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        partial.replace(place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{place} cannot be written ({reason}); give another place") from None


def load(place: Path) -> Pack:
    """Read a pack. Everything is checked before memory is taken for it, and nothing in it is ever run.

    Raises:
        UserError: it is no pack, of another version, or not what its manifest says.
    """
    try:
        return _load(place)
    except OSError as error:
        raise UserError(f"pack {place} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(f"{error}".split())[:160]
        raise UserError(f"pack {place} is damaged or no pack ({type(error).__name__}: {reason}); get another copy") from None


def _load(place: Path) -> Pack:
    folder = place.is_dir()
    file = place / TENSORS if folder else place
    if not file.is_file():
        raise UserError(f"pack {place}: {'no ' + TENSORS + ' is in it' if folder else 'nothing is there'}; name a pack")
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"pack {place} has {file.stat().st_size:,} bytes, accepted are {MOST_BYTES:,}; split it")
    with safe_open(file, framework="numpy") as tensors:
        if folder:
            if (place / MANIFEST).stat().st_size > MOST_BYTES // 16:
                raise UserError(f"pack {place}: its {MANIFEST} is too large; split it")
            manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        else:
            manifest = json.loads((tensors.metadata() or {}).get("manifest", "null"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"pack {place}: no manifest of a pack is in it; dmt memory export makes one")
        if manifest.get("version") != VERSION:
            raise UserError(f"pack {place}: version {manifest.get('version')}, this dmt knows {VERSION}; export it anew")
        _check(manifest)
        facts = [_read(each, number, place) for number, each in enumerate(manifest.pop("facts"))]
        rows, width = sum(len(fact.answer_ids) for fact in facts), manifest["width"]
        shapes = dict(zip(ARRAYS, ([rows, width], [rows, width], [width], [width, width]), strict=True))
        for name, shape in shapes.items():
            part = tensors.get_slice(name)
            if part.get_shape() != shape or part.get_dtype() != "F32":
                raise UserError(
                    f"pack {place}: {name} are {part.get_dtype()} {part.get_shape()}, not F32 {shape} as its manifest says"
                )
        arrays = [tensors.get_tensor(name) for name in ARRAYS]
        if broken := [name for name, array in zip(ARRAYS, arrays, strict=True) if not np.isfinite(array).all()]:
            raise UserError(f"pack {place}: {broken[0]} are not all finite; get another copy")
    given = 0
    for number, fact in enumerate(facts):
        facts[number] = replace(fact, rows=tuple(range(given, given + len(fact.answer_ids))))
        given += len(fact.answer_ids)
    manifest["tags"] = sorted({fact.tag for fact in facts if fact.tag})  # as they are, whatever it says
    manifest["counts"] = {"facts": len(facts), "rows": given}
    return Pack(manifest, facts, arrays[0], arrays[1], arrays[2], arrays[3])


def _check(manifest: dict[str, Any]) -> None:
    """Raise `TypeError` or `KeyError` where what is said of all facts is not of the kind that is needed."""
    for name, kind in {"name": str, "licence": str, "model": str, "model_type": str, "width": int, "listens": int}.items():
        if type(manifest[name]) is not kind:
            raise TypeError(f"{name} is {str(manifest[name])[:40]!r}")
    if type(manifest["answers"]) is not int or not 0 <= manifest["listens"] <= manifest["answers"]:
        raise TypeError(f"heard in layer {manifest['listens']} and answered in {manifest['answers']}")


def _written(fact: Told) -> dict[str, Any]:
    left_out = ("id", "rows", "gone", "gone_at", "replaced_by")
    return {name: value for name, value in asdict(fact).items() if name not in left_out}


def _read(found: Any, number: int, place: Path) -> Told:
    """A fact of a manifest, every part of it checked."""
    names = ("prompt", "answer", "subject", "tag", "source")
    texts = {name: found[name] for name in names}
    ids = [tuple(way) for way in found["subject_ids"]], tuple(found["answer_ids"])
    reach, created = tuple(found["reach"]), found["created"]
    whole = all(isinstance(token, int) and 0 <= token < 2**31 for part in (*ids[0], ids[1]) for token in part)
    numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in (*reach, created))
    plain = all(isinstance(text, str) and len(text) <= MOST_TEXT for text in texts.values())
    if not (whole and numbers and plain and ids[1] and all(ids[0]) and len(reach) == len(ids[1])):
        raise UserError(f"pack {place}: fact {number} of its manifest is not one; get another copy")
    "".join(texts.values()).encode()  # half a character cannot be kept
    return Told(
        number, **texts, created=float(created), subject_ids=tuple(ids[0]), answer_ids=ids[1], reach=tuple(map(float, reach))
    )
