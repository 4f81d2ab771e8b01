"""Packs: facts or associative rows in a file, for other students of the same model.

A pack is one `.safetensors` file, or a folder of two files: tensors in safetensors, everything
else in a JSON manifest. Nothing in a pack is ever run.
"""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from dmt.editing.edit import PreparedFact, WriteResult
from dmt.editing.fact import fact_from_record, parse_fact
from dmt.editing.fact_store import FactStore
from dmt.editing.online import describe_rows, drop_rows, ensure_namespaces
from dmt.errors import UserError, WrongModelError
from dmt.files import atomic_path, check_version, disk_error_class
from dmt.matching.relations import RelationMatcher, list_tensor_shapes
from dmt.models.fact_hooks import FactHooks, get_fact_hooks
from dmt.models.fingerprint import hash_model
from dmt.models.memories import get_associative_memories
from dmt.paths import find_knowledge_pack
from dmt.store.fact_index import FactIndex
from dmt.store.facts import NO_RUN
from dmt.store.records import FactRecord, FloatArray, RowInsert, StepChanges, StoredFact
from dmt.store.rows import RowStore
from dmt.text import SENTENCE_ENDS, fold_text

logger = logging.getLogger(__name__)

PACK_FORMAT, PACK_VERSION = "dmt-pack", 3
MANIFEST_FILE, TENSORS_FILE = "manifest.json", "rows.safetensors"  # of a pack that is a folder
MAX_TENSOR_BYTES = 4 * 2**30  # of a pack's tensors; a manifest may have a sixteenth
MAX_TEXT_CHARS = 8_000  # of a text in a manifest
REWRITE_HINT = "dmt memory import --rewrite writes its sentences into this one"
FACT_TEXTS = ("prompt", "answer", "subject", "tag", "source")
# Fields of a fact that a pack does not hold: IDs and rows are renumbered, and facts are active.
UNPACKED_FIELDS = ("id", "rows", "deleted_reason", "deleted_at", "replaced_by")

PackT = TypeVar("PackT", bound="Pack")
Arrays = dict[str, FloatArray]


@dataclass(frozen=True)
class Pack(ABC):
    """What packs of all kinds have in common: the manifest and the file format.

    Attributes:
        manifest: everything but facts, rows and tensors: `kind`, `name`, `license`, `created`,
            `model_fingerprint`, `model_type`, `width`, `tags`, `counts`.
    """

    kind: ClassVar[str]

    manifest: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the pack, completely or not at all.

        Args:
            path: one file where it ends in `.safetensors`, else a folder; it must be new.

        Raises:
            UserError: `path` exists already, or it cannot be written.
        """
        if path.exists():
            raise UserError(f"{path} is there already; give a new name, or remove it first")
        extra, tensors = self._contents()
        manifest = {
            "format": PACK_FORMAT,
            "version": PACK_VERSION,
            **self.manifest,
            "kind": self.kind,
            **extra,
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_file = path.suffix == ".safetensors"
            with atomic_path(path, as_folder=not is_file) as partial_path:
                if is_file:
                    save_file(arrays, partial_path, metadata={"manifest": text})
                else:
                    save_file(arrays, partial_path / TENSORS_FILE)
                    (partial_path / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise disk_error_class(error)(
                f"{path} cannot be written ({reason}); give another path"
            ) from None

    def check_model(
        self, model: PreTrainedModel, model_hash: str, path: object, remedy: str
    ) -> None:
        """Check that the pack was made with this model.

        Args:
            model: the model that the pack is for.
            model_hash: its fingerprint.
            path: name of the pack in messages.
            remedy: what to do with the pack of another model.

        Raises:
            WrongModelError: the pack belongs to another model, or its states are of another width.
        """
        manifest, config = self.manifest, model.config
        if manifest["model_fingerprint"] != model_hash:
            raise WrongModelError(
                f"pack {path} belongs to another model ({manifest['model_type']} "
                f"{manifest['model_fingerprint'][:12]}, this one is {config.model_type} "
                f"{model_hash[:12]}): its rows are hidden states of that one; {remedy}"
            )
        if manifest["width"] != config.hidden_size:
            raise WrongModelError(
                f"pack {path}: its states are {manifest['width']} wide, this model's "
                f"{config.hidden_size}; get another copy"
            )

    @abstractmethod
    def _contents(self) -> tuple[dict[str, Any], Arrays]:
        """Return the entries that the manifest has besides, and the tensors."""

    @classmethod
    @abstractmethod
    def _parse(cls: type[PackT], manifest: dict[str, Any], path: Path) -> _Parsed[PackT]:
        """Check a manifest, and remove from it what `_contents` added."""


@dataclass(frozen=True)
class _Parsed(Generic[PackT]):
    """A checked manifest: the shapes of its tensors, and how to build the pack from them."""

    shapes: dict[str, list[int]]
    build: Callable[[Arrays], PackT]


@dataclass(frozen=True)
class FactPack(Pack):
    """Facts with their rows.

    Attributes:
        manifest: as in `Pack`, and `key_layer` and `value_layer`.
        facts: IDs and rows count from 0 within the pack.
        keys: `(rows, width)`.
        values: `(rows, width)`.
        calibration: tensors of the `RelationMatcher` that the facts were written with, by name.
        closings: the marks after the answers, by ID of the fact, where there are some.
    """

    kind: ClassVar[str] = "facts"

    facts: list[FactRecord]
    keys: FloatArray
    values: FloatArray
    calibration: Arrays
    closings: dict[int, str] = field(default_factory=dict)

    def _contents(self) -> tuple[dict[str, Any], Arrays]:
        facts = [
            {name: value for name, value in asdict(fact).items() if name not in UNPACKED_FIELDS}
            | {"closing": self.closings.get(fact.id, "")}
            for fact in self.facts
        ]
        return {"facts": facts}, {"keys": self.keys, "values": self.values} | self.calibration

    @classmethod
    def _parse(cls, manifest: dict[str, Any], path: Path) -> _Parsed[FactPack]:
        width = check_integer(manifest["width"], 1)
        key_layer, value_layer = manifest["key_layer"], manifest["value_layer"]
        if check_integer(value_layer) < check_integer(key_layer):
            raise TypeError(f"key layer {key_layer} is above value layer {value_layer}")
        facts: list[FactRecord] = []
        closings: dict[int, str] = {}
        num_rows = 0
        for index, item in enumerate(manifest.pop("facts")):
            fact = _fact_from_json(item, index, path)
            rows = tuple(range(num_rows, num_rows + len(fact.answer_ids)))
            facts.append(replace(fact, rows=rows))
            closings[index] = item.get("closing", "")
            num_rows += len(rows)
        # As they are, whatever the manifest states.
        manifest["tags"] = _list_tags(fact.tag for fact in facts)
        manifest["counts"] = {"facts": len(facts), "rows": num_rows}
        calibration_shapes = list_tensor_shapes(width)
        shapes = {"keys": [num_rows, width], "values": [num_rows, width]} | calibration_shapes

        def build(arrays: Arrays) -> FactPack:
            calibration = {name: arrays[name] for name in calibration_shapes}
            return cls(manifest, facts, arrays["keys"], arrays["values"], calibration, closings)

        return _Parsed(shapes, build)


@dataclass(frozen=True)
class LayerRows:
    """Associative rows of one layer, sequences over the same `n` rows.

    Attributes:
        keys: `(n, width)`.
        values: `(n, width)`.
        tags: a row's tags, one a line.
        entries: insertions that each row stands for.
        created: seconds since 1970.
    """

    keys: FloatArray
    values: FloatArray
    tags: list[str]
    entries: list[int]
    created: list[float]


@dataclass(frozen=True)
class RowPack(Pack):
    """Rows of associative memories.

    Attributes:
        manifest: as in `Pack`.
        layers: the rows by layer.
    """

    kind: ClassVar[str] = "rows"

    layers: dict[int, LayerRows]

    def _contents(self) -> tuple[dict[str, Any], Arrays]:
        layers = {
            str(layer): {"tags": rows.tags, "entries": rows.entries, "created": rows.created}
            for layer, rows in self.layers.items()
        }
        tensors = {
            f"layer_{layer}.{name}": getattr(rows, name)
            for layer, rows in self.layers.items()
            for name in ("keys", "values")
        }
        return {"layers": layers}, tensors

    @classmethod
    def _parse(cls, manifest: dict[str, Any], path: Path) -> _Parsed[RowPack]:
        width = check_integer(manifest["width"], 1)
        columns: dict[int, tuple[list[str], list[int], list[float]]] = {}
        shapes: dict[str, list[int]] = {}
        for layer, rows in manifest.pop("layers").items():
            tags = [check_text(tag) for tag in rows["tags"]]
            entries = [check_integer(count, 1) for count in rows["entries"]]
            created = [float(timestamp) for timestamp in rows["created"]]
            if not tags or not len(tags) == len(entries) == len(created):
                raise ValueError(f"layer {layer} has columns of different lengths")
            if not all(map(math.isfinite, created)):
                raise ValueError(f"layer {layer} has a date that is not finite")
            columns[check_integer(int(layer))] = tags, entries, created
            shapes |= {f"layer_{layer}.{name}": [len(tags), width] for name in ("keys", "values")}

        def build(arrays: Arrays) -> RowPack:
            layers = {
                layer: LayerRows(
                    arrays[f"layer_{layer}.keys"], arrays[f"layer_{layer}.values"], *lists
                )
                for layer, lists in columns.items()
            }
            return cls(manifest, layers)

        return _Parsed(shapes, build)


PACK_KINDS: dict[str, type[Pack]] = {FactPack.kind: FactPack, RowPack.kind: RowPack}


def is_pack(path: Path) -> bool:
    """Check whether a path looks like a pack, by its name or its manifest."""
    return path.suffix == ".safetensors" or (path / MANIFEST_FILE).is_file()


def load_pack(path: Path) -> FactPack | RowPack:
    """Read a pack. Everything is checked before memory is allocated, and nothing in it is run.

    Raises:
        UserError: the path holds no pack, one of another version, or a damaged one.
    """
    try:
        return _read_pack(path)
    except UserError:
        raise
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
            f"pack {path} is damaged or no pack ({type(error).__name__}: {reason}); get another "
            "copy"
        ) from None


def load_fact_pack(path: Path) -> FactPack:
    """Read a pack of facts; see `load_pack`.

    Raises:
        UserError: the path holds no pack of facts, one of another version, or a damaged one.
    """
    pack = load_pack(path)
    if not isinstance(pack, FactPack):
        raise UserError(
            f"pack {path} holds {pack.kind}, not facts; dmt memory import writes them into "
            "associative memory"
        )
    return pack


def _read_pack(path: Path) -> Any:
    is_folder = path.is_dir()
    tensors_path = path / TENSORS_FILE if is_folder else path
    if is_folder:
        for item in (tensors_path, path / MANIFEST_FILE):
            # The target of a link was not given with the pack.
            if item.is_symlink() or (item.exists() and not item.is_file()):
                raise UserError(f"pack {path}: {item.name} is not a regular file; get another copy")
    if not tensors_path.is_file():
        problem = f"no {TENSORS_FILE} is in it" if is_folder else "nothing is there"
        raise UserError(f"pack {path}: {problem}; name a pack")
    size = tensors_path.stat().st_size
    if size > MAX_TENSOR_BYTES:
        raise UserError(
            f"pack {path} has {size:,} bytes, accepted are {MAX_TENSOR_BYTES:,}; split it"
        )
    with safe_open(tensors_path, framework="numpy") as tensors:
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
            "export it again with the dmt that made it",
        )
        for name in ("kind", "name", "license", "model_fingerprint", "model_type"):
            if type(manifest[name]) is not str:
                raise TypeError(f"{name} is {str(manifest[name])[:40]!r}")
        if manifest["kind"] not in PACK_KINDS:
            raise UserError(
                f"pack {path} holds {manifest['kind'][:40]!r}; accepted are {', '.join(PACK_KINDS)}"
            )
        parsed = PACK_KINDS[manifest["kind"]]._parse(manifest, path)
        for name, shape in parsed.shapes.items():
            tensor = tensors.get_slice(name)
            if tensor.get_shape() != shape or tensor.get_dtype() != "F32":
                raise UserError(
                    f"pack {path}: {name} are {tensor.get_dtype()} {tensor.get_shape()}, not F32 "
                    f"{shape} as its manifest states"
                )
        arrays = {name: tensors.get_tensor(name) for name in parsed.shapes}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"pack {path}: {name} are not all finite; get another copy")
    return parsed.build(arrays)


def check_integer(value: Any, minimum: int = 0) -> int:
    """Return `value` if it is an integer of at least `minimum`, else raise a `TypeError`."""
    if type(value) is not int or not minimum <= value < 2**62:
        raise TypeError(f"{str(value)[:40]!r} is not a whole number of {minimum} or more")
    return value


def check_text(value: Any) -> str:
    """Return `value` if it is a text that can be stored, else raise an error."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise TypeError(
            f"{str(value)[:40]!r} is not a text of {MAX_TEXT_CHARS:,} characters at most"
        )
    value.encode()  # a lone surrogate cannot be stored
    return value


def _fact_from_json(item: Any, index: int, path: Path) -> FactRecord:
    """Check a fact of a manifest in every part."""
    problem = f"pack {path}: fact {index} of its manifest is not one"
    try:
        texts: dict[str, Any] = {name: check_text(item[name]) for name in FACT_TEXTS}
        if check_text(item.get("closing", "")).strip(SENTENCE_ENDS):  # older packs have none
            raise TypeError(f"{item['closing'][:40]!r} holds more than the end of a sentence")
    except TypeError as error:
        raise UserError(f"{problem} ({error}); get another copy") from None
    answer_ids, thresholds = tuple(item["answer_ids"]), tuple(item["thresholds"])
    has_valid_ids = all(isinstance(token, int) and 0 <= token < 2**31 for token in answer_ids)
    has_valid_numbers = all(
        isinstance(number, int | float) and math.isfinite(number)
        for number in (*thresholds, item["created"])
    )
    has_valid_lengths = answer_ids and len(thresholds) == len(answer_ids)
    if not (has_valid_ids and has_valid_numbers and has_valid_lengths):
        raise UserError(f"{problem}; get another copy")
    return FactRecord(
        index,
        **texts,
        created=float(item["created"]),
        answer_ids=answer_ids,
        thresholds=tuple(map(float, thresholds)),
    )


# Packs of facts.


def make_fact_pack(
    fact_store: FactStore,
    facts: Sequence[FactRecord],
    name: str,
    license: str = "",
    model_hash: str | None = None,
) -> FactPack:
    """Make a pack of active facts.

    Args:
        fact_store: holds the facts.
        facts: what to pack.
        name: of the pack.
        license: of the facts.
        model_hash: fingerprint of the model; computed where it is None.
    """
    hooks = fact_store.hooks
    entries = [
        (stored.record, list(stored.keys), list(stored.values))
        for stored in fact_store.load_facts(fact.id for fact in facts)
    ]
    relations = hooks.matcher.relations
    records, keys, values = _renumber(entries, fact_store.model.config.hidden_size)
    manifest = _make_manifest(
        fact_store.model,
        fact_store.model_hash if model_hash is None else model_hash,
        name,
        license,
        _list_tags(fact.tag for fact in records),
        {"facts": len(records), "rows": len(keys)},
    )
    manifest |= {"kind": "facts", "key_layer": hooks.key_layer, "value_layer": hooks.value_layer}
    calibration = {name: tensor.numpy() for name, tensor in relations.tensors.items()}
    closings = {index: fact_store.restore_closing(fact) for index, fact in enumerate(facts)}
    return FactPack(manifest, records, keys, values, calibration, closings)


def _make_manifest(
    model: PreTrainedModel,
    model_hash: str,
    name: str,
    license: str,
    tags: list[str],
    counts: dict[str, int],
) -> dict[str, Any]:
    return {
        "name": name,
        "license": license,
        "created": time.time(),
        "model_fingerprint": model_hash,
        "model_type": model.config.model_type,
        "width": model.config.hidden_size,
        "tags": tags,
        "counts": counts,
    }


def _renumber(
    entries: Iterable[tuple[FactRecord, Sequence[FloatArray], Sequence[FloatArray]]], width: int
) -> tuple[list[FactRecord], FloatArray, FloatArray]:
    """Count facts and rows from 0, and stack keys and values to `(rows, width)`."""
    records: list[FactRecord] = []
    keys: list[FloatArray] = []
    values: list[FloatArray] = []
    for index, (fact, fact_keys, fact_values) in enumerate(entries):
        rows = tuple(range(len(keys), len(keys) + len(fact_keys)))
        records.append(replace(fact, id=index, rows=rows, deleted_reason=None, replaced_by=None))
        keys += fact_keys
        values += fact_values
    no_rows = np.zeros((0, width), np.float32)
    return records, np.stack(keys) if keys else no_rows, np.stack(values) if values else no_rows


def _list_tags(tags: Iterable[str]) -> list[str]:
    return sorted({tag for tag in tags if tag})


def check_fact_pack_fits(
    pack: FactPack, fact_store: FactStore, model_hash: str | None = None, path: object = None
) -> None:
    """Check that a pack's facts can be applied to the model of a fact store.

    Args:
        pack: the facts.
        fact_store: where they are to be applied.
        model_hash: fingerprint of the model; computed where it is None.
        path: name of the pack in messages.

    Raises:
        WrongModelError: the pack belongs to another model.
        UserError: its layers or tokens are not the model's, or not those of the stored facts.
    """
    manifest, config = pack.manifest, fact_store.model.config
    path = manifest["name"] if path is None else path
    pack_hash = manifest["model_fingerprint"]
    db_hashes = {} if fact_store.db is None else fact_store.db.read_fingerprints()
    if model_hash is None and pack_hash in db_hashes.values():
        model_hash = pack_hash  # the same model, perhaps rounded to half precision
    pack.check_model(
        fact_store.model,
        fact_store.model_hash if model_hash is None else model_hash,
        path,
        REWRITE_HINT,
    )
    layers = manifest["key_layer"], manifest["value_layer"]
    if manifest["value_layer"] >= config.num_hidden_layers:
        raise UserError(
            f"pack {path}: value layer {manifest['value_layer']}, of a model that has "
            f"{config.num_hidden_layers} layers; get another copy"
        )
    if any(token >= config.vocab_size for fact in pack.facts for token in fact.answer_ids):
        raise UserError(
            f"pack {path}: a token is not in the model's vocabulary of {config.vocab_size:,}; get "
            "another copy"
        )
    hooks = get_fact_hooks(fact_store.model)
    if hooks is not None and layers != (hooks.key_layer, hooks.value_layer):
        raise UserError(
            f"pack {path}: key layer {layers[0]} and value layer {layers[1]}, the facts of this "
            f"model have {hooks.key_layer} and {hooks.value_layer}; {REWRITE_HINT}"
        )


def load_packs(
    fact_store: FactStore, packs: Sequence[FactPack], model_hash: str | None = None
) -> None:
    """Apply the facts of packs without storing them, in place of packs that were loaded before.

    Args:
        fact_store: whose model the facts are applied to.
        packs: none of them removes the packs that were loaded before.
        model_hash: fingerprint of the model; computed where it is None.

    Raises:
        UserError: a pack does not fit; the packs that were loaded before stay.
    """
    temporary_packs: dict[str, list[StoredFact]] = {}
    first_id = 0
    for index, pack in enumerate(packs):
        check_fact_pack_fits(pack, fact_store, model_hash)
        temporary_packs[f"{index} {pack.manifest['name']}"] = unpack_facts(pack, first_id)
        first_id += max(len(pack.facts), len(pack.keys))
    hooks = _make_hooks(packs[0], fact_store) if packs else None
    fact_store.set_temporary_packs(temporary_packs, hooks)


def plug_packs(
    fact_store: FactStore,
    folder: Path | None = None,
    packs: Sequence[str | Path | FactPack] | None = None,
) -> None:
    """Apply packs to a model: those that are named, or else what was taken out of the student.

    Args:
        fact_store: whose model the facts are applied to.
        folder: of the student; None for a model without one.
        packs: files or packs; None is the knowledge that a run took out of its student, if it did,
            and an empty list is nothing. Knowledge of another model is left out with a warning.

    Raises:
        UserError: a pack cannot be read, or does not fit.
    """
    is_default = packs is None
    if packs is None:
        path = None if folder is None else find_knowledge_pack(folder)
        packs = [] if path is None else [path]
    if not packs and not fact_store.temporary_packs:
        return
    loaded = [pack if isinstance(pack, FactPack) else load_fact_pack(Path(pack)) for pack in packs]
    try:
        load_packs(fact_store, loaded, fact_store.model_hash)
    except WrongModelError as error:
        if not is_default:
            raise
        # The weights have changed since the run.
        logger.warning("the knowledge of the run is not plugged in: %s", error)


def import_pack(
    fact_store: FactStore, pack: FactPack, model_hash: str | None = None
) -> list[WriteResult]:
    """Write the facts of a pack; those that contradict a stored fact replace it.

    Args:
        fact_store: where to write.
        pack: the facts.
        model_hash: fingerprint of the model; computed where it is None.

    Raises:
        UserError: the pack does not fit.
    """
    check_fact_pack_fits(pack, fact_store, model_hash)
    layers = pack.manifest["key_layer"], pack.manifest["value_layer"]
    fact_store.initialize([], layers=layers)
    deduplicated, _ = merge_packs([pack], pack.manifest["name"])  # a pack may contradict itself
    return fact_store.write_prepared(
        [
            PreparedFact(
                stored.record, torch.from_numpy(stored.keys), torch.from_numpy(stored.values)
            )
            for stored in unpack_facts(deduplicated)
        ]
    )


def rewrite_pack(fact_store: FactStore, pack: FactPack) -> list[WriteResult]:
    """Write the facts of a pack from their sentences, whatever model it belongs to; all or none.

    Args:
        fact_store: where to write.
        pack: the facts; they keep their texts and dates.

    Raises:
        UserError: a fact cannot be written into this model.
    """
    name = pack.manifest["name"]
    deduplicated, _ = merge_packs([pack], name)  # a pack may contradict itself
    records = deduplicated.facts
    if not records:
        return []
    try:
        facts = [
            parse_fact(**vars(fact_from_record(record, deduplicated.closings.get(record.id, ""))))
            for record in records
        ]
        fact_store.initialize(facts)
        prepared = fact_store.prepare(facts)
    except UserError as error:
        raise UserError(f"pack {name}: {error}") from None
    return fact_store.write_prepared(
        [
            replace(new, record=replace(new.record, created=record.created))
            for new, record in zip(prepared, records, strict=True)
        ]
    )


def _make_hooks(pack: FactPack, fact_store: FactStore) -> FactHooks:
    relations = RelationMatcher.from_tensors(
        {name: torch.from_numpy(array) for name, array in pack.calibration.items()}
    )
    config = fact_store.model.config
    return FactHooks(
        FactIndex(),
        relations,
        fact_store.codec,
        pack.manifest["key_layer"],
        pack.manifest["value_layer"],
        config.eos_token_id,
        config.bos_token_id,
    )


def unpack_facts(pack: FactPack, first_id: int = 0) -> list[StoredFact]:
    """Return the facts of a pack with their rows; IDs count from `-first_id - 1` downwards."""
    return [
        StoredFact(
            replace(
                fact,
                id=-first_id - fact.id - 1,
                rows=tuple(-first_id - row - 1 for row in fact.rows),
            ),
            pack.keys[list(fact.rows)],
            pack.values[list(fact.rows)],
        )
        for fact in pack.facts
    ]


def merge_packs(
    packs: Sequence[FactPack], name: str, prefer: str = "newest"
) -> tuple[FactPack, list[tuple[FactRecord, FactRecord]]]:
    """Merge packs of the same model into one.

    Args:
        packs: at least one.
        name: of the new pack.
        prefer: of two facts that contradict each other keep the `newest`, or that of the `first`
            pack.

    Returns:
        The new pack, and each conflict: the fact that was kept and the fact that was dropped.

    Raises:
        UserError: the packs belong to different models.
    """
    first = packs[0]
    for pack in packs[1:]:
        for key in ("model_fingerprint", "key_layer", "value_layer", "width"):
            if pack.manifest[key] != first.manifest[key]:
                raise UserError(
                    f"packs of different models cannot be merged: {key} {first.manifest[key]} and "
                    f"{pack.manifest[key]}"
                )
    merged: dict[tuple[str, str], tuple[FactPack, FactRecord]] = {}
    conflicts: list[tuple[FactRecord, FactRecord]] = []
    for pack in packs:
        for fact in pack.facts:
            query = fact.query
            if query not in merged:
                merged[query] = pack, fact
                continue
            _, existing = merged[query]
            is_preferred = prefer == "newest" and fact.created > existing.created
            if fold_text(fact.answer) != fold_text(existing.answer):
                conflicts.append((fact, existing) if is_preferred else (existing, fact))
            if is_preferred:
                merged[query] = pack, fact
    entries = [
        (fact, [pack.keys[row] for row in fact.rows], [pack.values[row] for row in fact.rows])
        for pack, fact in merged.values()
    ]
    facts, keys, values = _renumber(entries, first.manifest["width"])
    licenses = sorted({str(pack.manifest["license"]) or "none stated" for pack in packs})
    manifest = first.manifest | {
        "name": name,
        "created": time.time(),
        "license": "" if licenses == ["none stated"] else " and ".join(licenses),
        "tags": _list_tags(fact.tag for fact in facts),
        "counts": {"facts": len(facts), "rows": len(keys)},
    }
    closings = {
        index: pack.closings.get(fact.id, "") for index, (pack, fact) in enumerate(merged.values())
    }
    return FactPack(manifest, facts, keys, values, first.calibration, closings), conflicts


@dataclass(frozen=True)
class FactDiff:
    """The differences of two lists of facts.

    Attributes:
        only_first: facts whose query only the first list has.
        only_second: facts whose query only the second list has.
        different: pairs with the same query and different answers.
        num_same: pairs with the same query and answer.
    """

    only_first: list[FactRecord]
    only_second: list[FactRecord]
    different: list[tuple[FactRecord, FactRecord]]
    num_same: int


def diff_facts(first: Sequence[FactRecord], second: Sequence[FactRecord]) -> FactDiff:
    """Compare two lists of facts by subject and prompt."""
    first_by_query = {fact.query: fact for fact in first}
    second_by_query = {fact.query: fact for fact in second}
    pairs = [
        (fact, second_by_query[key])
        for key, fact in first_by_query.items()
        if key in second_by_query
    ]
    different = [(a, b) for a, b in pairs if fold_text(a.answer) != fold_text(b.answer)]
    return FactDiff(
        [fact for key, fact in first_by_query.items() if key not in second_by_query],
        [fact for key, fact in second_by_query.items() if key not in first_by_query],
        different,
        len(pairs) - len(different),
    )


# Packs of associative rows.


def make_row_pack(
    student: PreTrainedModel,
    name: str,
    license: str = "",
    ids: set[int] | None = None,
    tag: str | None = None,
    model_hash: str | None = None,
) -> RowPack:
    """Make a pack of the rows of a student's associative memories.

    Args:
        student: holds the rows.
        name: of the pack.
        license: of the rows.
        ids: row IDs; all where it is None or empty.
        tag: only rows that have this tag.
        model_hash: fingerprint of the student; computed where it is None.

    Raises:
        UserError: a row does not exist, or none matches.
    """
    descriptions = describe_rows(student)
    if ids and (missing := sorted(ids - {row["id"] for row in descriptions})):
        raise UserError(
            f"row {missing[0]} does not exist; dmt memory list --rows shows the "
            f"{len(descriptions):,} that do"
        )
    layers: dict[int, LayerRows] = {}
    for layer, memory in get_associative_memories(student).items():
        selected = [
            row
            for row in descriptions
            if row["layer"] == layer
            and (not ids or row["id"] in ids)
            and (tag is None or tag in row["tag"].split("\n"))
        ]
        if not selected:
            continue
        indices = [memory.rows.index_by_id[row["id"]] for row in selected]
        layers[layer] = LayerRows(
            memory.rows.keys[indices].float().cpu().numpy(),
            memory.rows.values[indices].float().cpu().numpy(),
            [row["tag"] for row in selected],
            [row["entries"] for row in selected],
            [row["created"] for row in selected],
        )
    if not layers:
        raise UserError(
            "no row matches, so there is nothing to export; dmt memory list --rows shows the rows"
        )
    tags = _list_tags(
        line for rows in layers.values() for row_tag in rows.tags for line in row_tag.split("\n")
    )
    counts = {str(layer): len(rows.tags) for layer, rows in layers.items()}
    model_hash = hash_model(student) if model_hash is None else model_hash
    manifest = _make_manifest(student, model_hash, name, license, tags, counts)
    return RowPack(manifest | {"kind": "rows"}, layers)


def check_row_pack_fits(
    pack: RowPack, student: PreTrainedModel, model_hash: str | None = None
) -> None:
    """Check that a pack's rows can be written into a student's associative memories.

    Raises:
        WrongModelError: the pack belongs to another model.
        UserError: the student has no associative memory in one of the pack's layers.
    """
    name = pack.manifest["name"]
    model_hash = hash_model(student) if model_hash is None else model_hash
    pack.check_model(student, model_hash, name, "let this student read the text instead")
    if missing := sorted(set(pack.layers) - set(get_associative_memories(student))):
        raise UserError(
            f"pack {name} has rows of layer {missing[0]}, where this student has no associative "
            "memory"
        )


def import_rows(
    student: PreTrainedModel, store: RowStore, pack: RowPack, model_hash: str | None = None
) -> tuple[int, int]:
    """Write a pack's rows into a student's associative memories and their store.

    Rows whose keys are stored already are skipped. Where a memory exceeds its capacity, the rows
    with the lowest scores are evicted.

    Args:
        student: with the pack's rows after the call.
        store: of the student, open for writing.
        pack: the rows.
        model_hash: fingerprint of the student; computed where it is None.

    Returns:
        How many rows were added, and how many were evicted.

    Raises:
        UserError: the pack does not fit.
    """
    check_row_pack_fits(pack, student, model_hash)
    namespaces, memories = ensure_namespaces(student, store), get_associative_memories(student)
    changes, inserts = {}, {}
    for layer, rows in pack.layers.items():
        memory = memories[layer]
        indices = list(memory.rows.index_by_id.values())
        existing_keys = {key.tobytes() for key in memory.rows.keys[indices].float().cpu().numpy()}
        new_rows = np.array(
            [row for row, key in enumerate(rows.keys) if key.tobytes() not in existing_keys],
            np.int64,
        )
        if not len(new_rows):
            continue
        entries = np.array(rows.entries, np.int64)[new_rows]
        inserts[layer] = RowInsert(
            store.reserve_ids(len(new_rows)),
            rows.keys[new_rows],
            rows.values[new_rows],
            entries.astype(np.float32),
            [rows.tags[row] for row in new_rows],
            entries,
            [rows.created[row] for row in new_rows],
        )
        changes[namespaces[layer]] = StepChanges([inserts[layer]])
    store.commit(NO_RUN, 0, changes)
    for layer, insert in inserts.items():
        stats = memories[layer].rows.stats
        memories[layer].rows.insert_rows(insert, int(stats.score_step.max(initial=0)))
    num_evicted = drop_rows(student, store, keep=lambda memory: memory.insert_policy.capacity)
    return sum(len(insert.ids) for insert in inserts.values()), num_evicted
