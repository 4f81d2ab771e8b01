"""What a pack is on disk: one file, or a folder of two; tensors in safetensors, everything else in a JSON manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmt.errors import UserError
from dmt.records import Floats
from dmt.versions import check_version

FORMAT, VERSION = "dmt-pack", 1
MANIFEST, TENSORS = "manifest.json", "rows.safetensors"
"""Of a pack that is a folder."""
MOST_BYTES = 4 * 2**30
"""Bytes that a pack's tensors may have; and a manifest a sixteenth of them."""
MOST_TEXT = 8_000
"""Characters of a text in a manifest."""


def is_pack(place: Path) -> bool:
    """Whether it looks like one."""
    return place.suffix == ".safetensors" or (place / MANIFEST).is_file()


def write(place: Path, manifest: dict[str, Any], tensors: dict[str, Floats]) -> None:
    """Write a pack, whole or not at all: one file where `place` ends in .safetensors, else a folder.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    if place.exists():
        raise UserError(f"{place} is there already; give a new name, or remove it first")
    text = json.dumps({"format": FORMAT, "version": VERSION, **manifest}, ensure_ascii=False, indent=1)
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    partial = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".safetensors":
            save_file(arrays, partial, metadata={"manifest": text})
        else:
            partial.mkdir(exist_ok=True)
            save_file(arrays, partial / TENSORS)
            (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        partial.replace(place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{place} cannot be written ({reason}); give another place") from None


def read(place: Path, means: Callable[[dict[str, Any]], dict[str, list[int]]]) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Manifest and tensors of a pack. All is checked before memory is taken for it, and nothing in it is ever run.

    Args:
        means: gives the shape of each tensor that a manifest means; anything that it stumbles over is told as damage.

    Raises:
        UserError: it is no pack, of another version, or not what its manifest says.
    """
    try:
        return _read(place, means)
    except OSError as error:
        raise UserError(f"pack {place} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OverflowError, AttributeError) as error:
        reason = " ".join(f"{error}".split())[:160]
        raise UserError(f"pack {place} is damaged or no pack ({type(error).__name__}: {reason}); get another copy") from None


def _read(place: Path, means: Callable[[dict[str, Any]], dict[str, list[int]]]) -> tuple[dict[str, Any], dict[str, Floats]]:
    folder = place.is_dir()
    file = place / TENSORS if folder else place
    for part in (place / TENSORS, place / MANIFEST) if folder else ():  # what a link leads to was not given with the pack
        if part.is_symlink() or (part.exists() and not part.is_file()):
            raise UserError(f"pack {place}: {part.name} is no file of its own; get another copy")
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
        del manifest["format"]
        check_version(manifest.pop("version", None), VERSION, f"pack {place}: version", "export it anew by the dmt that made it")
        for name in ("name", "licence", "model", "model_type"):
            if type(manifest[name]) is not str:
                raise TypeError(f"{name} is {str(manifest[name])[:40]!r}")
        shapes = means(manifest)
        for name, shape in shapes.items():
            part = tensors.get_slice(name)
            if part.get_shape() != shape or part.get_dtype() != "F32":
                raise UserError(
                    f"pack {place}: {name} are {part.get_dtype()} {part.get_shape()}, not F32 {shape} as its manifest says"
                )
        arrays = {name: tensors.get_tensor(name) for name in shapes}
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(f"pack {place}: {broken[0]} are not all finite; get another copy")
    return manifest, arrays


def whole(number: Any, least: int = 0) -> int:
    """`number`, where it is a whole one of at least `least`; else a `TypeError`, told as damage by `read`."""
    if type(number) is not int or not least <= number < 2**62:
        raise TypeError(f"{str(number)[:40]!r} is not a whole number of {least} or more")
    return number


def text(given: Any) -> str:
    """`given`, where it is a text that can be kept; else an error, told as damage by `read`."""
    if not isinstance(given, str) or len(given) > MOST_TEXT:
        raise TypeError(f"{str(given)[:40]!r} is not a text of {MOST_TEXT:,} characters at most")
    given.encode()  # half a character cannot be kept
    return given
