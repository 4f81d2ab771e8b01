"""Hooks that add stored facts to a model's forward pass without changing a weight.

A fact's rows are compared with the input of one feed-forward block (the key layer), and the value
of the row that fires is added to the output of the same or a later block (the value layer). The
facts of a saved model are in `memory.db` beside its weights, with the rows it wrote after training.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dmt.errors import UserError, WrongModelError
from dmt.memory import AssociativeMemory
from dmt.memory.edit_memory import (
    ANSWER_WINDOW,
    NO_SUBJECT,
    EditMemory,
    EditRows,
    Matches,
    PhraseMatcher,
    PhraseMatches,
    match_phrases,
)
from dmt.models.architectures import get_architecture
from dmt.models.fingerprint import hash_model
from dmt.store.records import FactRecord

if TYPE_CHECKING:
    from dmt.store.facts import FactTable
    from dmt.store.rows import RowStore

FACTS_FILE = "memory.db"  # holds facts and rows written online, beside a saved model's weights
SUBJECT_WINDOW = 64  # tokens after a mention for which a subject counts as being talked about
HOOKS_ATTRIBUTE = "facts"  # the attribute of a model that holds its `FactHooks`


@dataclass(frozen=True)
class FactRow:
    """One row of a fact, which makes the model predict one token of the answer.

    Attributes:
        row_id: ID of the row.
        key: `(width,)` the hidden state in which the row was written.
        value: `(width,)` what it adds to the block's output.
        threshold: the cosine with `key` from which on the row fires.
        subject_ids: token IDs of each spelling of the subject; empty where any subject will do.
        prefix_ids: token IDs of the answer before this token.
        answer_ids: token IDs of the whole answer.
    """

    row_id: int
    key: Tensor
    value: Tensor
    threshold: float
    subject_ids: tuple[tuple[int, ...], ...] = ()
    prefix_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()


class _TokenCache(DynamicLayer):
    """Token IDs read so far, as one more layer of a cache.

    Cropping, reordering and copying the cache changes them as it does keys and values.
    """


class FactHooks(nn.Module):
    """The facts of one model and the hooks that apply them.

    Args:
        memory: compares states with keys; its rows are set by `set_rows`.
        key_layer: the layer whose block input is compared with keys.
        value_layer: the layer to whose block output values are added; not below `key_layer`.
        eos_ids: token ID or IDs that end a document; what was mentioned before does not count.
        window: tokens after a mention for which a subject counts as being talked about.

    Attributes:
        source_path: the database that the facts come from; None where there is none.

    Raises:
        ValueError: `value_layer` is below `key_layer`.
    """

    def __init__(
        self,
        memory: EditMemory,
        key_layer: int,
        value_layer: int,
        eos_ids: int | Sequence[int] | None,
        window: int = SUBJECT_WINDOW,
    ) -> None:
        super().__init__()
        if not 0 <= key_layer <= value_layer:
            raise ValueError(
                f"value_layer must be key_layer={key_layer} or above, got {value_layer}"
            )
        self.memory = memory
        self.key_layer, self.value_layer = key_layer, value_layer
        self.eos_ids, self.window = eos_ids, window
        self.source_path: Path | None = None
        self._is_disabled = False
        self._phrase_matches: PhraseMatches | None = None
        self._row_matches: Matches | None = None
        self._handles: list[Any] = []
        self.set_rows(())

    def register(self, model: PreTrainedModel) -> None:
        """Register the hooks on `model`; `unregister` removes them."""
        arch = get_architecture(model.config.model_type)
        backbone, blocks = model.get_submodule(arch.backbone), arch.blocks(model)
        pending: dict[str, Any] = {}

        def before_pass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pending["tokens"] = kwargs.get("input_ids", args[0] if args else None)
            caches = (value for value in (*args[1:], *kwargs.values()) if isinstance(value, Cache))
            self.begin_pass(pending["tokens"], next(caches, None))

        def after_pass(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.end_pass(pending.pop("tokens"), getattr(output, "past_key_values", None))

        def before_key_block(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.match_rows(args[0])

        def after_value_block(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.add_values(output)

        self._handles = [
            backbone.register_forward_pre_hook(before_pass, with_kwargs=True),
            backbone.register_forward_hook(after_pass),
            blocks[self.key_layer].register_forward_pre_hook(before_key_block),
            # First, so that hooks that record a block's output see it with the facts.
            blocks[self.value_layer].register_forward_hook(after_value_block, prepend=True),
        ]
        self.to(next(model.parameters()).device)

    def unregister(self) -> None:
        """Remove the hooks from the model that they are registered on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Let no row fire within the context."""
        was_disabled, self._is_disabled = self._is_disabled, True
        try:
            yield
        finally:
            self._is_disabled = was_disabled

    def set_rows(self, fact_rows: Sequence[FactRow]) -> None:
        """Replace all rows by these."""
        subjects: dict[tuple[tuple[int, ...], ...], int] = {}
        prefixes: dict[tuple[int, ...], int] = {}
        for row in fact_rows:
            if row.subject_ids:
                subjects.setdefault(row.subject_ids, len(subjects))
            for prefix in (row.prefix_ids, row.answer_ids):
                if prefix:
                    prefixes.setdefault(prefix, len(prefixes))
        spellings = [
            (spelling, subject)
            for subject_spellings, subject in subjects.items()
            for spelling in subject_spellings
        ]
        self._subject_matcher = PhraseMatcher([spelling for spelling, _ in spellings])
        self._subject_by_phrase = torch.tensor([subject for _, subject in spellings]).long()
        self._prefix_matcher = PhraseMatcher(list(prefixes))
        self._lookback = (
            self.window
            + self._subject_matcher.max_length
            + self._prefix_matcher.max_length
            + ANSWER_WINDOW
        )
        if not fact_rows:
            self.memory.set_rows(EditRows.empty(self.memory.width))
            return
        subject_indices = [subjects.get(row.subject_ids, NO_SUBJECT) for row in fact_rows]
        prefix_indices = [prefixes.get(row.prefix_ids, NO_SUBJECT) for row in fact_rows]
        answer_indices = [prefixes.get(row.answer_ids, NO_SUBJECT) for row in fact_rows]
        self.memory.set_rows(
            EditRows(
                ids=torch.tensor([row.row_id for row in fact_rows]),
                keys=torch.stack([row.key for row in fact_rows]).float(),
                values=torch.stack([row.value for row in fact_rows]).float(),
                thresholds=torch.tensor([row.threshold for row in fact_rows]),
                subjects=torch.tensor(subject_indices),
                prefixes=torch.tensor(prefix_indices),
                answers=torch.tensor(answer_indices),
            )
        )

    def __len__(self) -> int:
        return len(self.memory.rows)

    def begin_pass(self, tokens: Tensor | None, cache: Any) -> None:
        """Match subjects and prefixes in token IDs `(batch, time)` that continue `cache`."""
        self._phrase_matches = self._row_matches = None
        # Embeddings without token IDs mention no subject.
        if tokens is None or self._is_disabled or not len(self):
            return
        token_cache = _find_token_cache(cache)
        ids = None if token_cache is None else token_cache.keys
        earlier = tokens[:, :0] if ids is None else ids[:, 0, -self._lookback :, 0]
        context = torch.cat([earlier.to(tokens.device), tokens], dim=1)
        self._phrase_matches = match_phrases(
            context,
            tokens.shape[1],
            self._subject_matcher,
            self._subject_by_phrase,
            self._prefix_matcher,
            self.window,
            self.eos_ids,
        )

    def match_rows(self, hidden: Tensor) -> None:
        """Match rows with `hidden` `(batch, time, width)`, the input of the key layer's block."""
        if self._phrase_matches is not None:
            self._row_matches = self.memory.find_matches(
                hidden.reshape(-1, self.memory.width), self._phrase_matches
            )

    def add_values(self, output: Tensor) -> Tensor:
        """Return the value layer's block output `(batch, time, width)` with values added."""
        if self._row_matches is None:
            return output
        return self.memory.add_values(output, self._row_matches)

    def end_pass(self, tokens: Tensor | None, cache: Any) -> None:
        """Append the token IDs of the pass to the cache."""
        self._phrase_matches = self._row_matches = None
        if tokens is None or cache is None:
            return
        token_cache = _find_token_cache(cache)
        if token_cache is None:
            token_cache = _TokenCache()
            cache.layers.append(token_cache)
            # The cache may hold text from before the hooks were registered; its IDs are unknown.
            missing = cache.get_seq_length() - tokens.shape[1]
            if missing > 0:
                tokens = nn.functional.pad(tokens, (missing, 0), value=-1)
        ids = tokens[:, None, :, None]
        token_cache.update(ids, ids)


def _find_token_cache(cache: Any) -> _TokenCache | None:
    return next(
        (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, _TokenCache)), None
    )


def attach(model: PreTrainedModel, hooks: FactHooks) -> None:
    """Apply `hooks` in `model`'s forward pass, in place of earlier ones; `detach` ends it."""
    detach(model)
    hooks.register(model)
    setattr(model, HOOKS_ATTRIBUTE, hooks)


def detach(model: PreTrainedModel) -> None:
    """Remove the fact hooks of `model`, if it has any."""
    hooks = get_fact_hooks(model)
    if hooks is not None:
        hooks.unregister()
        delattr(model, HOOKS_ATTRIBUTE)


def get_fact_hooks(model: PreTrainedModel) -> FactHooks | None:
    """Return the fact hooks of `model`, or None."""
    hooks = getattr(model, HOOKS_ATTRIBUTE, None)
    return hooks if isinstance(hooks, FactHooks) else None


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` without its facts within the context."""
    hooks = get_fact_hooks(model)
    with nullcontext() if hooks is None else hooks.disable():
        yield


@contextmanager
def record_matches(model: PreTrainedModel) -> Iterator[list[Matches]]:
    """Collect the rows that fire in each pass within the context; none without facts."""
    hooks = get_fact_hooks(model)
    if hooks is None:
        yield []
        return
    with hooks.memory.recording_matches() as recorded:
        yield recorded


def create_fact_hooks(store: RowStore, eos_ids: int | Sequence[int] | None) -> FactHooks | None:
    """Create hooks without rows for the facts of a store; None where it never held a fact.

    Args:
        store: holds the layers and the calibration.
        eos_ids: token ID or IDs that end a document.
    """
    from dmt.store.facts import FactTable  # needs SQLAlchemy, which most models do without

    fact_table = FactTable(store)
    if not fact_table.exists:
        return None
    calibration = fact_table.read_calibration()
    mean, metric = (torch.from_numpy(calibration[name]) for name in ("mean", "metric"))
    return FactHooks(EditMemory(len(mean), mean, metric), *fact_table.read_layers(), eos_ids)


def load_fact_rows(fact_table: FactTable, facts: Sequence[FactRecord]) -> dict[int, list[FactRow]]:
    """Read the rows of `facts`, by fact ID."""
    ids, keys, values = fact_table.read_states(facts)
    states = {
        int(row_id): (torch.from_numpy(key), torch.from_numpy(value))
        for row_id, key, value in zip(ids, keys.copy(), values.copy(), strict=True)
    }
    return {fact.id: build_fact_rows(fact, [states[row] for row in fact.rows]) for fact in facts}


def build_fact_rows(fact: FactRecord, states: Sequence[tuple[Tensor, Tensor]]) -> list[FactRow]:
    """Build the rows of one fact from its keys and values, one pair for each answer token."""
    return [
        FactRow(
            row_id,
            key,
            value,
            threshold,
            fact.subject_ids,
            fact.answer_ids[:position],
            fact.answer_ids,
        )
        for position, (row_id, threshold, (key, value)) in enumerate(
            zip(fact.rows, fact.thresholds, states, strict=True)
        )
    ]


def load_facts(model: PreTrainedModel, path: Path) -> None:
    """Attach the facts of a database to a model, and load the rows that it wrote online.

    Raises:
        WrongModelError: the file is no store, or the store of another model. A model in half
            precision accepts the store of any model, since its fingerprint is not comparable.
        UserError: the store cannot be read.
    """
    from dmt.store.facts import FactTable, imported_namespaces
    from dmt.store.rows import RowStore

    is_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    try:
        store = RowStore(str(path), hash_model(model) if is_float32 else None, read_only=True)
    except WrongModelError as error:
        raise WrongModelError(
            f"{error}; {path} does not belong to this model: move it elsewhere to load the model "
            "without facts"
        ) from None
    hooks = create_fact_hooks(store, model.config.eos_token_id)
    if hooks is not None:
        fact_table = FactTable(store)
        rows_by_fact = load_fact_rows(fact_table, fact_table.read())
        hooks.source_path = path.absolute()
        hooks.set_rows([row for rows in rows_by_fact.values() for row in rows])
        attach(model, hooks)
    namespaces = {namespace.name: namespace for namespace in store.list_namespaces()}
    imported = imported_namespaces(store)
    for layer, block in enumerate(get_architecture(model.config.model_type).blocks(model)):
        if isinstance(block, AssociativeMemory) and f"layer_{layer}" in imported:
            namespace = namespaces[f"layer_{layer}"]
            block.rows.load_rows(store.scan(namespace), expected_rows=store.count(namespace))


def copy_facts(model: PreTrainedModel, folder: Path) -> None:
    """Copy the database of a model's facts into the folder that the model was saved to.

    A database that is in the folder already is renamed, not overwritten.

    Raises:
        UserError: the database of the facts no longer exists.
    """
    hooks, target = get_fact_hooks(model), folder / FACTS_FILE
    source = None if hooks is None else hooks.source_path
    if source is not None and target.exists() and target.samefile(source):
        return
    if source is not None and not source.is_file():
        raise UserError(
            f"{source}, the database of this model's facts, no longer exists, so they cannot be "
            "saved with it"
        )
    back_up_facts(folder, folder)
    if source is not None:
        copy_database(source, target)


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
