"""The facts of saved models: loaded with the model, copied where it is saved.

They are in `memory.db` beside its weights, with the rows it wrote after training.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError, WrongModelError
from dmt.matching.relations import RelationMatcher
from dmt.memory import AssociativeMemory
from dmt.models.architectures import get_architecture
from dmt.models.fact_hooks import FactHooks, attach, get_fact_hooks
from dmt.models.fact_matching import TextCodec
from dmt.models.fingerprint import ROUNDED_DTYPES, hash_model, hash_rounded
from dmt.paths import FACTS_FILE as FACTS_FILE
from dmt.store.fact_index import FactIndex

if TYPE_CHECKING:
    from dmt.store.facts import FactTable
    from dmt.store.rows import RowStore

logger = logging.getLogger(__name__)


def pack_calibration(relations: RelationMatcher, codec: TextCodec) -> dict[str, Any]:
    """Return the arrays of a calibration, as a store holds them.

    The tokenizer is one of them: facts are matched in text, and the folder or hub that a model is
    loaded from may not have its tokenizer.
    """
    arrays = {name: tensor.numpy() for name, tensor in relations.tensors.items()}
    text = json.dumps({"prefix_ids": codec.prefix_ids, "tokenizer": codec.tokenizer.to_str()})
    return arrays | {"tokenizer": np.frombuffer(zlib.compress(text.encode()), np.uint8)}


def unpack_calibration(arrays: Mapping[str, Any]) -> tuple[RelationMatcher, TextCodec]:
    """Return the matcher and the tokenizer of a calibration that a store holds."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    packed = json.loads(zlib.decompress(tensors.pop("tokenizer").numpy().tobytes()))
    relations = RelationMatcher.from_tensors(tensors)
    return relations, TextCodec(Tokenizer.from_str(packed["tokenizer"]), packed["prefix_ids"])


def create_fact_hooks(fact_table: FactTable, config: Any) -> FactHooks | None:
    """Create hooks for stored facts; None where no fact was ever stored.

    Args:
        fact_table: holds the facts, the layers and the calibration.
        config: of the model.
    """
    if not fact_table.exists:
        return None
    relations, codec = unpack_calibration(fact_table.read_calibration())
    return FactHooks(
        FactIndex(fact_table),
        relations,
        codec,
        *fact_table.read_layers(),
        config.eos_token_id,
        config.bos_token_id,
    )


class _Loading(threading.local):
    accepts_any_model: bool = False


_loading = _Loading()


@contextmanager
def accept_facts_of_any_model() -> Iterator[None]:
    """Load models within the context with facts that were written for other weights."""
    _loading.accepts_any_model = True
    try:
        yield
    finally:
        _loading.accepts_any_model = False


def load_facts(model: PreTrainedModel, path: Path) -> None:
    """Attach the facts of a database to a model, and load the rows that it wrote online.

    Raises:
        WrongModelError: the file is no store, or the store of another model. The store of a model
            is also that of the same model in half precision.
        UserError: the store cannot be read.
    """
    from dmt.store.facts import WRITTEN_FOR, FactTable, imported_namespaces
    from dmt.store.rows import RowStore

    store = RowStore(str(path), read_only=True)
    if not _loading.accepts_any_model and _is_comparable(model, store):
        try:
            store.check_model(hash_model(model))
        except WrongModelError as error:
            raise WrongModelError(
                f"{error}; {path} does not belong to this model: dmt memory rebind writes its "
                "facts for this model; to load the model without them, move the file elsewhere"
            ) from None
    fact_table = FactTable(store)
    hooks = create_fact_hooks(fact_table, model.config)
    if hooks is not None:
        hooks.source_path = path.absolute()
        attach(model, hooks)
        if len(hooks) and fact_table.read_metadata(WRITTEN_FOR):
            logger.warning(
                "%s: the weights have changed since these facts were written, so that some may be "
                "recalled no longer; dmt memory rebind writes them for the present weights",
                path,
            )
    namespaces = {namespace.name: namespace for namespace in store.list_namespaces()}
    imported = imported_namespaces(store)
    for layer, block in enumerate(get_architecture(model.config.model_type).blocks(model)):
        if isinstance(block, AssociativeMemory) and f"layer_{layer}" in imported:
            namespace = namespaces[f"layer_{layer}"]
            block.rows.load_rows(store.scan(namespace), expected_rows=store.count(namespace))


def _is_comparable(model: PreTrainedModel, store: RowStore) -> bool:
    """Check whether the store has a fingerprint of the model in the type that it has."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes == {torch.float32}:
        return True
    # Quantized weights have none; neither have stores of before, in half precision.
    return len(dtypes) == 1 and dtypes <= set(ROUNDED_DTYPES) and len(store.read_fingerprints()) > 1


def copy_facts(
    model: PreTrainedModel,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
    with_history: bool = False,
) -> None:
    """Copy the database of a model's facts into the folder that the model was saved to.

    The copy belongs to the model as it was saved, which training may have changed. A database that
    is in the folder already is renamed, not overwritten.

    Args:
        model: the model.
        folder: where it was saved.
        state_dict: the weights that were saved, where they are not the model's own.
        with_history: copy deleted facts too.

    Raises:
        UserError: the database of the facts no longer exists, or another program writes to it.
    """
    from dmt.store.database import FINGERPRINT
    from dmt.store.facts import rebind_model, strip_history
    from dmt.store.rows import RowStore

    hooks, target = get_fact_hooks(model), folder / FACTS_FILE
    source = None if hooks is None else hooks.source_path
    if source is None:
        if hooks is not None and len(hooks):
            logger.warning("%s: saved without its facts, which are not in a file", folder)
        back_up_facts(folder, folder)
        return
    if not (target.exists() and target.samefile(source)):
        if not source.is_file():
            raise UserError(
                f"{source}, the database of this model's facts, no longer exists, so they cannot "
                "be saved with it"
            )
        back_up_facts(folder, folder)
        copy_database(source, target)
        if not with_history:
            strip_history(target)
    model_hash = hash_model(model, state_dict=state_dict)
    hashes = RowStore(str(target), read_only=True).read_fingerprints()
    stored_hash = hashes.pop(FINGERPRINT)
    if model_hash == stored_hash:
        return
    is_rounded = model_hash in hashes.values()
    with RowStore(str(target)) as store:
        rounded_hashes = {} if state_dict else hash_rounded(model)
        if is_rounded:  # packs of the model in full precision fit the rounded one
            rounded_hashes |= {"float32": stored_hash}
        rebind_model(store, model_hash, rounded_hashes, "" if is_rounded else stored_hash)
    if not is_rounded:
        logger.warning(
            "%s: the weights have changed since its facts were written, so that some may be "
            "recalled no longer; dmt memory rebind writes them for the saved weights",
            target,
        )


def back_up_facts(source_folder: Path, target_folder: Path) -> None:
    """Move the database of facts from one folder to another, under a name with the time."""
    backup_name = f"memory.before-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000}.db"
    for suffix in ("-wal", "-shm", ""):
        if (path := source_folder / f"{FACTS_FILE}{suffix}").exists():
            path.rename(target_folder / f"{backup_name}{suffix}")


def copy_database(source: Path, target: Path) -> None:
    """Copy an SQLite database with all committed transactions, even while it is written."""
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as source_db,
        closing(sqlite3.connect(target)) as target_db,
    ):
        source_db.backup(target_db)
