"""Packs of rows: what associative memories hold, to be given to another student of the same model.

What a pack is on disk: one file, or a folder of two; tensors in safetensors, everything else in a JSON manifest.

Packs of facts, to be given away.

Between books and packs: export, import, guests that stay for a while, what differs, one pack of several.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from dmt.editing.edit import FALSE_POSITIVE_RATE, WriteResult, compute_thresholds, normalize_text
from dmt.editing.fact_store import FactStore
from dmt.editing.online import describe_rows, drop_rows, ensure_namespaces
from dmt.errors import UserError
from dmt.files import check_version
from dmt.memory.edit_memory import EditMemory
from dmt.models.conversion import get_associative_memories
from dmt.models.fact_hooks import FactHooks, FactRow, build_fact_rows, get_fact_hooks
from dmt.store import RowStore
from dmt.store.facts import NO_RUN
from dmt.store.records import FactRecord, FloatArray, RowInsert, StepChanges

PACK_FORMAT, PACK_VERSION = "dmt-pack", 1
MANIFEST_FILE, TENSORS_FILE = "manifest.json", "rows.safetensors"
"""Of a pack that is a folder."""
MAX_TENSOR_BYTES = 4 * 2**30
"""Bytes that a pack's tensors may have; and a manifest a sixteenth of them."""
MAX_TEXT_CHARS = 8_000
"""Characters of a text in a manifest."""


def is_pack(path: Path) -> bool:
    """Whether it looks like one."""
    return path.suffix == ".safetensors" or (path / MANIFEST_FILE).is_file()


def write_pack_file(path: Path, manifest: dict[str, Any], tensors: dict[str, FloatArray]) -> None:
    """Write a pack, whole or not at all: one file where `place` ends in .safetensors, else a folder.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} is there already; give a new name, or remove it first")
    manifest_json = json.dumps(
        {"format": PACK_FORMAT, "version": PACK_VERSION, **manifest}, ensure_ascii=False, indent=1
    )
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    partial_path = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(arrays, partial_path, metadata={"manifest": manifest_json})
        else:
            partial_path.mkdir(exist_ok=True)
            save_file(arrays, partial_path / TENSORS_FILE)
            (partial_path / MANIFEST_FILE).write_text(manifest_json + "\n", encoding="utf-8")
        partial_path.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}); give another place") from None


def read_pack_file(
    path: Path, get_shapes: Callable[[dict[str, Any]], dict[str, list[int]]]
) -> tuple[dict[str, Any], dict[str, FloatArray]]:
    """Manifest and tensors of a pack. All is checked before memory is taken for it, and nothing in it is ever run.

    Args:
        means: gives the shape of each tensor that a manifest means; anything that it stumbles over is told as damage.

    Raises:
        UserError: it is no pack, of another version, or not what its manifest says.
    """
    try:
        return _parse_pack_file(path, get_shapes)
    except OSError as error:
        raise UserError(f"pack {path} cannot be read ({error.strerror or error})") from None
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        OverflowError,
        AttributeError,
    ) as error:
        reason = " ".join(f"{error}".split())[:160]
        raise UserError(
            f"pack {path} is damaged or no pack ({type(error).__name__}: {reason}); get another copy"
        ) from None


def _parse_pack_file(
    path: Path, get_shapes: Callable[[dict[str, Any]], dict[str, list[int]]]
) -> tuple[dict[str, Any], dict[str, FloatArray]]:
    is_folder = path.is_dir()
    file = path / TENSORS_FILE if is_folder else path
    for item in (
        (path / TENSORS_FILE, path / MANIFEST_FILE) if is_folder else ()
    ):  # what a link leads to was not given with the pack
        if item.is_symlink() or (item.exists() and not item.is_file()):
            raise UserError(f"pack {path}: {item.name} is no file of its own; get another copy")
    if not file.is_file():
        raise UserError(
            f"pack {path}: {'no ' + TENSORS_FILE + ' is in it' if is_folder else 'nothing is there'}; name a pack"
        )
    if file.stat().st_size > MAX_TENSOR_BYTES:
        raise UserError(
            f"pack {path} has {file.stat().st_size:,} bytes, accepted are {MAX_TENSOR_BYTES:,}; split it"
        )
    with safe_open(file, framework="numpy") as tensors:
        if is_folder:
            if (path / MANIFEST_FILE).stat().st_size > MAX_TENSOR_BYTES // 16:
                raise UserError(f"pack {path}: its {MANIFEST_FILE} is too large; split it")
            manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        else:
            manifest = json.loads((tensors.metadata() or {}).get("manifest", "null"))
        if not isinstance(manifest, dict) or manifest.get("format") != PACK_FORMAT:
            raise UserError(
                f"pack {path}: no manifest of a pack is in it; dmt memory export makes one"
            )
        del manifest["format"]
        check_version(
            manifest.pop("version", None),
            PACK_VERSION,
            f"pack {path}: version",
            "export it anew by the dmt that made it",
        )
        for name in ("name", "licence", "model", "model_type"):
            if type(manifest[name]) is not str:
                raise TypeError(f"{name} is {str(manifest[name])[:40]!r}")
        shapes = get_shapes(manifest)
        for name, shape in shapes.items():
            item = tensors.get_slice(name)
            if item.get_shape() != shape or item.get_dtype() != "F32":
                raise UserError(
                    f"pack {path}: {name} are {item.get_dtype()} {item.get_shape()}, not F32 {shape} as its manifest says"
                )
        arrays = {name: tensors.get_tensor(name) for name in shapes}
    if nonfinite := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(f"pack {path}: {nonfinite[0]} are not all finite; get another copy")
    return manifest, arrays


def check_integer(value: Any, minimum: int = 0) -> int:
    """`number`, where it is a whole one of at least `least`; else a `TypeError`, told as damage by `read`."""
    if type(value) is not int or not minimum <= value < 2**62:
        raise TypeError(f"{str(value)[:40]!r} is not a whole number of {minimum} or more")
    return value


def check_text(value: Any) -> str:
    """`given`, where it is a text that can be kept; else an error, told as damage by `read`."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise TypeError(
            f"{str(value)[:40]!r} is not a text of {MAX_TEXT_CHARS:,} characters at most"
        )
    value.encode()  # half a character cannot be kept
    return value


FACT_PACK_TENSORS = ("keys", "values", "mean", "metric")
"""Tensors of a pack of facts."""


@dataclass(frozen=True)
class FactPack:
    """Facts with their rows, of one model.

    Attributes:
        manifest: all that is no tensor: `model`, `listens`, `answers`, `width`, `licence`, `tags`, `counts`.
        facts: what it says; numbers and rows count from 0 within the pack.
        keys, values: `(rows, width)`.
        mean, metric: `(width,)` and `(width, width)`, in which the maker's model compared states.
    """

    manifest: dict[str, Any]
    facts: list[FactRecord]
    keys: FloatArray
    values: FloatArray
    mean: FloatArray
    metric: FloatArray


def save_fact_pack(pack: FactPack, path: Path) -> None:
    """Write a pack, whole or not at all; see `containers.write`."""
    manifest = {
        **pack.manifest,
        "kind": "facts",
        "facts": [_fact_to_json(fact) for fact in pack.facts],
    }
    write_pack_file(path, manifest, {name: getattr(pack, name) for name in FACT_PACK_TENSORS})


def load_fact_pack(path: Path) -> FactPack:
    """Read a pack of facts; see `containers.read`.

    Raises:
        UserError: it is no pack of facts, or not what it says.
    """
    facts: list[FactRecord] = []

    def get_shapes(manifest: dict[str, Any]) -> dict[str, list[int]]:
        if manifest.get("kind", "facts") != "facts":
            raise UserError(
                f"pack {path} holds {manifest['kind']}, not facts; dmt memory import takes it into associative memory"
            )
        width = check_integer(manifest["width"], 1)
        if check_integer(manifest["answers"]) < check_integer(manifest["listens"]):
            raise TypeError(
                f"heard in layer {manifest['listens']} and answered in {manifest['answers']}"
            )
        facts.extend(
            _fact_from_json(item, index, path) for index, item in enumerate(manifest.pop("facts"))
        )
        row_count = sum(len(fact.answer_ids) for fact in facts)
        return dict(
            zip(
                FACT_PACK_TENSORS,
                ([row_count, width], [row_count, width], [width], [width, width]),
                strict=True,
            )
        )

    manifest, arrays = read_pack_file(path, get_shapes)
    num_rows = 0
    for index, fact in enumerate(facts):
        facts[index] = replace(fact, rows=tuple(range(num_rows, num_rows + len(fact.answer_ids))))
        num_rows += len(fact.answer_ids)
    manifest["tags"] = sorted(
        {fact.tag for fact in facts if fact.tag}
    )  # as they are, whatever it says
    manifest["counts"] = {"facts": len(facts), "rows": num_rows}
    return FactPack(manifest, facts, **arrays)


def _fact_to_json(fact: FactRecord) -> dict[str, Any]:
    excluded = ("id", "rows", "gone", "gone_at", "replaced_by")
    return {name: value for name, value in asdict(fact).items() if name not in excluded}


def _fact_from_json(item: Any, index: int, path: Path) -> FactRecord:
    """A fact of a manifest, every part of it checked."""
    names = ("prompt", "answer", "subject", "tag", "source")
    try:
        texts: dict[str, Any] = {name: check_text(item[name]) for name in names}
    except TypeError as error:
        raise UserError(
            f"pack {path}: fact {index} of its manifest is not one ({error}); get another copy"
        ) from None
    ids = [tuple(token_ids) for token_ids in item["subject_ids"]], tuple(item["answer_ids"])
    thresholds, created = tuple(item["reach"]), item["created"]
    has_valid_ids = all(
        isinstance(token, int) and 0 <= token < 2**31
        for sequence in (*ids[0], ids[1])
        for token in sequence
    )
    has_valid_numbers = all(
        isinstance(value, int | float) and math.isfinite(value) for value in (*thresholds, created)
    )
    if not (
        has_valid_ids
        and has_valid_numbers
        and ids[1]
        and all(ids[0])
        and len(thresholds) == len(ids[1])
    ):
        raise UserError(f"pack {path}: fact {index} of its manifest is not one; get another copy")
    return FactRecord(
        index,
        **texts,
        created=float(created),
        subject_ids=tuple(ids[0]),
        answer_ids=ids[1],
        thresholds=tuple(map(float, thresholds)),
    )


def make_fact_pack(
    fact_store: FactStore,
    facts: Sequence[FactRecord],
    name: str,
    license_name: str = "",
    model_hash: str = "",
) -> FactPack:
    """These facts of a book.

    Args:
        model: fingerprint of the model.
    """
    keys, values, records, num_rows = [], [], [], 0
    for index, fact in enumerate(facts):
        rows = fact_store.get_rows(fact.id)
        keys += [row.key.numpy() for row in rows]
        values += [row.value.numpy() for row in rows]
        records.append(
            replace(
                fact,
                id=index,
                rows=tuple(range(num_rows, num_rows + len(rows))),
                deleted_reason=None,
                replaced_by=None,
            )
        )
        num_rows += len(rows)
    hooks = fact_store.hooks
    width = hooks.memory.width
    manifest = {
        "kind": "facts",
        "name": name,
        "licence": license_name,
        "created": time.time(),
        "model": model_hash,
        "model_type": fact_store.model.config.model_type,
        "width": width,
        "listens": hooks.key_layer,
        "answers": hooks.value_layer,
        "tags": sorted({fact.tag for fact in records if fact.tag}),
        "counts": {"facts": len(records), "rows": num_rows},
    }
    stacked = [
        np.stack(states) if states else np.zeros((0, width), np.float32)
        for states in (keys, values)
    ]
    mean, metric = (tensor.cpu().numpy() for tensor in (hooks.memory.mean, hooks.memory.metric))
    return FactPack(manifest, records, stacked[0], stacked[1], mean, metric)


def check_fact_pack_fits(
    pack: FactPack, fact_store: FactStore, model_hash: str, path: object
) -> None:
    """Raise `UserError` where a pack was made with another model than the book's, or is heard or answered elsewhere."""
    manifest = pack.manifest
    if manifest["model"] != model_hash:
        raise UserError(
            f"pack {path} belongs to another model ({manifest['model_type']} {str(manifest['model'])[:12]}, this one is "
            f"{fact_store.model.config.model_type} {model_hash[:12]}): its rows are states of that one; write its sentences instead, "
            "with dmt memory write"
        )
    config = fact_store.model.config
    if manifest["width"] != config.hidden_size or manifest["answers"] >= config.num_hidden_layers:
        raise UserError(
            f"pack {path}: rows {manifest['width']} wide, answered in layer {manifest['answers']}, of a model that is "
            f"{config.hidden_size} wide and has {config.num_hidden_layers} layers; get another copy"
        )
    vocab_size = config.vocab_size
    if any(
        token >= vocab_size
        for fact in pack.facts
        for token_ids in (*fact.subject_ids, fact.answer_ids)
        for token in token_ids
    ):
        raise UserError(
            f"pack {path}: a token is not in the model's vocabulary of {vocab_size:,}; get another copy"
        )
    if fact_store.records or get_fact_hooks(fact_store.model) is not None:
        layers = fact_store.hooks.key_layer, fact_store.hooks.value_layer
        if (manifest["listens"], manifest["answers"]) != layers:
            raise UserError(
                f"pack {path}: heard in layer {manifest['listens']} and answered in {manifest['answers']}, this book's facts in "
                f"{layers[0]} and {layers[1]}; write its sentences instead, with dmt memory write"
            )


def load_packs(fact_store: FactStore, packs: Sequence[FactPack], model_hash: str) -> None:
    """Let a book have the facts of these packs for now, and no others beside its own; of none, its own alone.

    Raises:
        UserError: a pack does not fit.
    """
    temporary_packs, first_id = {}, 0
    for index, pack in enumerate(packs):
        check_fact_pack_fits(pack, fact_store, model_hash, pack.manifest["name"])
        temporary_packs[f"{index} {pack.manifest['name']}"] = _adapt_thresholds(
            unpack_facts(pack, first_id), pack, fact_store
        )
        first_id += max(len(pack.facts), len(pack.keys))
    fact_store.set_temporary_packs(
        temporary_packs, _make_hooks(packs[0], fact_store) if packs else None
    )


def import_pack(fact_store: FactStore, pack: FactPack, model_hash: str) -> list[WriteResult]:
    """Write a pack's facts into a book, to stay; those it knows are left, those it contradicts are replaced.

    Raises:
        UserError: the pack does not fit.
    """
    check_fact_pack_fits(pack, fact_store, model_hash, pack.manifest["name"])
    fact_store.initialize([], layers=(pack.manifest["listens"], pack.manifest["answers"]))
    deduplicated, _ = merge_packs([pack], pack.manifest["name"])  # a pack may contradict itself
    return fact_store.add_facts(_adapt_thresholds(unpack_facts(deduplicated), pack, fact_store))


def _adapt_thresholds(
    facts: list[tuple[FactRecord, list[FactRow]]], pack: FactPack, fact_store: FactStore
) -> list[tuple[FactRecord, list[FactRow]]]:
    """Facts of a pack, near enough being measured anew where the book compares states in another metric."""
    hooks = get_fact_hooks(fact_store.model)
    if hooks is None or not facts:
        return facts
    if _is_same_metric(
        (hooks.memory.mean.cpu().numpy(), hooks.memory.metric.cpu().numpy()),
        (pack.mean, pack.metric),
    ):
        return facts
    if fact_store.db is None:
        raise UserError(
            f"pack {pack.manifest['name']} compares states otherwise than the facts that are there already; load it alone, or "
            "import it into a student"
        )
    adapted = []
    for record, rows in facts:
        thresholds = compute_thresholds(
            fact_store.calibration,
            torch.stack([row.key for row in rows]),
            FALSE_POSITIVE_RATE,
            bool(record.subject),
        )
        adapted.append(
            (
                replace(record, thresholds=tuple(thresholds.tolist())),
                [
                    replace(row, threshold=float(threshold))
                    for row, threshold in zip(rows, thresholds, strict=True)
                ],
            )
        )
    return adapted


def _make_hooks(pack: FactPack, fact_store: FactStore) -> FactHooks:
    memory = EditMemory(len(pack.mean), torch.from_numpy(pack.mean), torch.from_numpy(pack.metric))
    return FactHooks(
        memory,
        pack.manifest["listens"],
        pack.manifest["answers"],
        fact_store.model.config.eos_token_id,
    )


def unpack_facts(pack: FactPack, first_id: int = 0) -> list[tuple[FactRecord, list[FactRow]]]:
    """Facts of a pack as they are laid over a model; rows and facts are numbered from -`first` - 1 downwards."""
    unpacked = []
    for fact in pack.facts:
        states: Any = [
            (torch.from_numpy(pack.keys[r]), torch.from_numpy(pack.values[r])) for r in fact.rows
        ]
        record = replace(
            fact, id=-first_id - fact.id - 1, rows=tuple(-first_id - row - 1 for row in fact.rows)
        )
        unpacked.append((record, build_fact_rows(record, states)))
    return unpacked


@dataclass(frozen=True)
class FactDiff:
    """Two lists of facts beside each other: what only one has, and what both ask and answer differently."""

    only_first: list[FactRecord]
    only_second: list[FactRecord]
    different: list[tuple[FactRecord, FactRecord]]
    num_same: int


def diff_facts(first: Sequence[FactRecord], second: Sequence[FactRecord]) -> FactDiff:
    """How two lists of facts differ: by what is asked of whom, in the same words."""
    first_by_query, second_by_query = (
        {_make_query_key(fact): fact for fact in facts} for facts in (first, second)
    )
    both = [key for key in first_by_query if key in second_by_query]
    different = [
        (first_by_query[key], second_by_query[key])
        for key in both
        if first_by_query[key].answer.split() != second_by_query[key].answer.split()
    ]
    return FactDiff(
        [fact for key, fact in first_by_query.items() if key not in second_by_query],
        [fact for key, fact in second_by_query.items() if key not in first_by_query],
        different,
        len(both) - len(different),
    )


def merge_packs(
    packs: Sequence[FactPack], name: str, prefer: str = "newest"
) -> tuple[FactPack, list[tuple[FactRecord, FactRecord]]]:
    """One pack of several, and where they contradict each other: the fact kept and the fact left out.

    Args:
        prefer: of two facts that contradict each other the `newest`, or the one of the `first` pack that has it.

    Raises:
        UserError: they belong to different models.
    """
    for pack in packs[1:]:
        if not _is_same_metric((pack.mean, pack.metric), (packs[0].mean, packs[0].metric)):
            raise UserError(
                "packs that compare states in different metrics cannot be merged; import both into one student, export that"
            )
        for key in ("model", "listens", "answers", "width"):
            if pack.manifest[key] != packs[0].manifest[key]:
                raise UserError(
                    f"packs of different models cannot be merged: {key} {packs[0].manifest[key]} and {pack.manifest[key]}"
                )
    merged: dict[tuple[str, str], tuple[FactPack, FactRecord]] = {}
    conflicts = []
    for pack in packs:
        for fact in pack.facts:
            if (existing := merged.get(_make_query_key(fact))) is None:
                merged[_make_query_key(fact)] = pack, fact
                continue
            is_preferred = prefer == "newest" and fact.created > existing[1].created
            if fact.answer.split() != existing[1].answer.split():
                conflicts.append((fact, existing[1]) if is_preferred else (existing[1], fact))
            if is_preferred:
                merged[_make_query_key(fact)] = pack, fact
    facts, keys, values, num_rows = [], [], [], 0
    for index, (pack, fact) in enumerate(merged.values()):
        facts.append(
            replace(fact, id=index, rows=tuple(range(num_rows, num_rows + len(fact.rows))))
        )
        keys += [pack.keys[row] for row in fact.rows]
        values += [pack.values[row] for row in fact.rows]
        num_rows += len(fact.rows)
    licenses = sorted({str(pack.manifest["licence"]) or "none stated" for pack in packs})
    manifest = packs[0].manifest | {
        "name": name,
        "created": time.time(),
        "licence": "" if licenses == ["none stated"] else " and ".join(licenses),
        "tags": sorted({fact.tag for fact in facts if fact.tag}),
        "counts": {"facts": len(facts), "rows": num_rows},
    }
    stacked = [np.stack(states) if states else packs[0].keys[:0] for states in (keys, values)]
    return FactPack(
        manifest, facts, stacked[0], stacked[1], packs[0].mean, packs[0].metric
    ), conflicts


def _make_query_key(fact: FactRecord) -> tuple[str, str]:
    return fact.subject, normalize_text(fact.prompt)


def _is_same_metric(
    first: tuple[FloatArray, FloatArray], second: tuple[FloatArray, FloatArray]
) -> bool:
    """Whether two pairs of a mean and a metric compare states alike."""
    return all(np.allclose(a, b, 1e-3, 1e-5) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer: keys and values `(n, width)`, and of each its tag, what it stands for and when it was made."""

    keys: FloatArray
    values: FloatArray
    tags: list[str]
    entries: list[int]
    created: list[float]


@dataclass(frozen=True)
class RowPack:
    """Rows by layer, and all that is no row: `model`, `licence`, `tags`, `counts`."""

    manifest: dict[str, Any]
    layers: dict[int, LayerRows]


def make_row_pack(
    student: PreTrainedModel,
    model_hash: str,
    name: str,
    license_name: str = "",
    ids: set[int] | None = None,
    tag: str | None = None,
) -> RowPack:
    """Rows of a student's associative memories: those with a number in `ids` and the tag, or all.

    Raises:
        UserError: there are none.
    """
    descriptions = describe_rows(student)
    if ids and (missing := sorted(ids - {row["row"] for row in descriptions})):
        raise UserError(
            f"row {missing[0]} is not there; dmt memory list --rows shows the {len(descriptions):,} that are"
        )
    layers: dict[int, LayerRows] = {}
    for layer, memory in get_associative_memories(student).items():
        selected = [
            row for row in descriptions if row["layer"] == layer and (not ids or row["row"] in ids)
        ]
        selected = [row for row in selected if tag is None or tag in row["tag"].split("\n")]
        if not selected:
            continue
        indices = [memory.rows.index_by_id[row["row"]] for row in selected]
        keys, values = (
            tensor[indices].float().cpu().numpy()
            for tensor in (memory.rows.keys, memory.rows.values)
        )
        columns = ([row[column] for row in selected] for column in ("tag", "entries", "created"))
        layers[layer] = LayerRows(keys, values, *columns)
    if not layers:
        raise UserError(
            "no row is like that, so there is nothing to export; dmt memory list --rows shows what there is"
        )
    manifest = {
        "kind": "rows",
        "name": name,
        "licence": license_name,
        "created": time.time(),
        "model": model_hash,
        "model_type": student.config.model_type,
        "width": student.config.hidden_size,
        "tags": sorted(
            {
                tag_line
                for rows in layers.values()
                for tag_ in rows.tags
                for tag_line in tag_.split("\n")
                if tag_line
            }
        ),
        "counts": {str(layer): len(rows.tags) for layer, rows in layers.items()},
    }
    return RowPack(manifest, layers)


def save_row_pack(pack: RowPack, path: Path) -> None:
    """Write a pack, whole or not at all; see `containers.write`."""
    tensors = {
        f"layer_{layer}.{part}": getattr(rows, part)
        for layer, rows in pack.layers.items()
        for part in ("keys", "values")
    }
    layer_info = {
        str(layer): {"tags": r.tags, "entries": r.entries, "created": r.created}
        for layer, r in pack.layers.items()
    }
    write_pack_file(path, {**pack.manifest, "layers": layer_info}, tensors)


def load_row_pack(path: Path) -> RowPack:
    """Read a pack of rows; see `containers.read`.

    Raises:
        UserError: it is no pack of rows, or not what it says.
    """
    layer_info: dict[int, tuple[list[str], list[int], list[float]]] = {}

    def get_shapes(manifest: dict[str, Any]) -> dict[str, list[int]]:
        if manifest.get("kind") != "rows":
            raise UserError(f"pack {path} holds {manifest.get('kind', 'facts')}, not rows")
        width = check_integer(manifest["width"], 1)
        shapes: dict[str, list[int]] = {}
        for layer, rows in manifest.pop("layers").items():
            tags, entries = (
                [check_text(tag) for tag in rows["tags"]],
                [check_integer(n, 1) for n in rows["entries"]],
            )
            created = [float(timestamp) for timestamp in rows["created"]]
            if (
                not len(tags) == len(entries) == len(created)
                or not all(map(math.isfinite, created))
                or not tags
            ):
                raise ValueError(f"layer {layer} does not say the same of all its rows")
            layer_info[check_integer(int(layer))] = tags, entries, created
            shapes |= {f"layer_{layer}.{part}": [len(tags), width] for part in ("keys", "values")}
        return shapes

    manifest, arrays = read_pack_file(path, get_shapes)
    layers = {
        n: LayerRows(arrays[f"layer_{n}.keys"], arrays[f"layer_{n}.values"], *info)
        for n, info in layer_info.items()
    }
    return RowPack(manifest, layers)


def is_row_pack(path: Path) -> bool:
    """Whether a pack holds rows, as far as its manifest says.

    Raises:
        UserError: it is no pack.
    """
    kind: list[Any] = []

    def get_shapes(manifest: dict[str, Any]) -> dict[str, list[int]]:
        kind.append(manifest.get("kind"))
        return {}

    read_pack_file(path, get_shapes)
    return kind == ["rows"]


def check_row_pack_fits(pack: RowPack, student: PreTrainedModel, model_hash: str) -> None:
    """Raise `UserError` where a pack's rows are another model's, or the student has no memory for them."""
    name, manifest = pack.manifest["name"], pack.manifest
    if manifest["model"] != model_hash:
        raise UserError(
            f"pack {name} belongs to another model ({manifest['model_type']} {manifest['model'][:12]}, this one is "
            f"{student.config.model_type} {model_hash[:12]}): its rows are states of that one; let this student read the text instead"
        )
    memories = get_associative_memories(student)
    if missing := sorted(set(pack.layers) - set(memories)):
        raise UserError(
            f"pack {name} has rows of layer {missing[0]}, where this student has no associative memory"
        )
    if manifest["width"] != student.config.hidden_size:
        raise UserError(
            f"pack {name}: states are {manifest['width']} wide, this student's {student.config.hidden_size}"
        )


def import_rows(
    student: PreTrainedModel, store: RowStore | None, pack: RowPack, model_hash: str
) -> tuple[int, int]:
    """Put a pack's rows into a student's associative memories and its store; how many came, and how many left for them.

    Rows that are there to the last number are left out. Where there are more than a memory's capacity the coldest leave.

    Raises:
        UserError: the pack does not fit.
    """
    check_row_pack_fits(pack, student, model_hash)
    assert store is not None, "opened for writing"
    namespaces, num_added, changes, inserts = ensure_namespaces(student, store), 0, {}, {}
    for layer, rows in pack.layers.items():
        memory = get_associative_memories(student)[layer]
        indices = list(memory.rows.index_by_id.values())
        existing_keys = {row.tobytes() for row in memory.rows.keys[indices].float().cpu().numpy()}
        new_indices = np.array(
            [n for n, key in enumerate(rows.keys) if key.tobytes() not in existing_keys], np.int64
        )
        if not len(new_indices):
            continue
        step = int(memory.rows.stats.score_step.max(initial=0))
        entries = np.array(rows.entries, np.int64)[new_indices]
        insert = RowInsert(
            store.reserve_ids(len(new_indices)),
            rows.keys[new_indices],
            rows.values[new_indices],
            entries.astype(np.float32),
            [rows.tags[n] for n in new_indices],
            entries,
            [rows.created[n] for n in new_indices],
        )
        changes[namespaces[layer]], inserts[layer], num_added = (
            StepChanges([insert]),
            (insert, step),
            num_added + len(new_indices),
        )
    store.commit(NO_RUN, 0, changes)
    for layer, (insert, step) in inserts.items():
        get_associative_memories(student)[layer].rows.insert_rows(insert, step)
    return num_added, drop_rows(student, store, keep=lambda memory: memory.insert_policy.capacity)
