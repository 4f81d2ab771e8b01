"""The book of a saved model: the file beside its weights that holds its facts, and what it has remembered.

Facts laid over a model: hooks add what their rows say to what feed-forward blocks say; no weight changes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from dmt.store.facts import FactTable, imported_namespaces
from dmt.store.records import FactRecord
from dmt.store.rows import RowStore

SUBJECT_WINDOW = 64
"""Tokens for which somebody is talked about after having been named."""
HOOKS_ATTRIBUTE = "facts"
"""Where a model keeps what is laid over it."""


@dataclass(frozen=True)
class FactRow:
    """One row of a fact: the state that asks for a token of its answer, and what makes the model say it.

    Attributes:
        row: its number.
        key, value: `(width,)`.
        reach: cosine from which on it answers.
        subject: token ids of each way the subject is written; empty where it answers whoever is talked about.
        lead: token ids of the answer said so far.
        answer: of all of it.
    """

    row_id: int
    key: Tensor
    value: Tensor
    threshold: float
    subject_ids: tuple[tuple[int, ...], ...] = ()
    prefix_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()


class _TokenCache(DynamicLayer):
    """Token ids read so far, as one more layer of a cache: it is cut, reordered and copied like the others."""


class FactHooks(nn.Module):
    """Facts of one model: what is asked is heard in one layer, what is answered is said in the same or a higher one.

    Args:
        memory: without rows yet.
        listens: layer whose block's input is compared with keys.
        answers: layer to whose block's output values are added.
        end: token id that ends a document, or several.
        window: tokens for which a subject is talked about after having been named.
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
                f"a fact is heard before it is answered; got layers {key_layer} and {value_layer}"
            )
        self.memory = memory
        self.key_layer, self.value_layer, self.eos_ids, self.window = (
            key_layer,
            value_layer,
            eos_ids,
            window,
        )
        self.disabled = False
        """Nothing is answered while this is set."""
        self.source_path: Path | None = None
        """The book that the facts come from."""
        self._phrase_matches: PhraseMatches | None = None
        self._row_matches: Matches | None = None
        self._handles: list[Any] = []
        self.set_rows(())

    def set_rows(self, fact_rows: Sequence[FactRow]) -> None:
        """Have these rows and no others."""
        subjects: dict[tuple[tuple[int, ...], ...], int] = {}
        prefixes: dict[tuple[int, ...], int] = {}
        for fact_row in fact_rows:
            if fact_row.subject_ids:
                subjects.setdefault(fact_row.subject_ids, len(subjects))
            for prefix in (fact_row.prefix_ids, fact_row.answer_ids):
                if prefix:
                    prefixes.setdefault(prefix, len(prefixes))
        phrases = [
            (phrase, subject_index)
            for subject_phrases, subject_index in subjects.items()
            for phrase in subject_phrases
        ]
        self._subject_matcher, self._phrase_subjects = (
            PhraseMatcher([phrase for phrase, _ in phrases]),
            torch.tensor([subject_index for _, subject_index in phrases]).long(),
        )
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
        rows = EditRows(
            ids=torch.tensor([fact_row.row_id for fact_row in fact_rows]),
            keys=torch.stack([fact_row.key for fact_row in fact_rows]).float(),
            values=torch.stack([fact_row.value for fact_row in fact_rows]).float(),
            thresholds=torch.tensor([fact_row.threshold for fact_row in fact_rows]),
            subjects=torch.tensor(
                [subjects.get(fact_row.subject_ids, NO_SUBJECT) for fact_row in fact_rows]
            ),
            prefixes=torch.tensor(
                [prefixes.get(fact_row.prefix_ids, NO_SUBJECT) for fact_row in fact_rows]
            ),
            answers=torch.tensor(
                [prefixes.get(fact_row.answer_ids, NO_SUBJECT) for fact_row in fact_rows]
            ),
        )
        self.memory.set_rows(rows)

    def __len__(self) -> int:
        return len(self.memory.rows)

    def begin_pass(self, tokens: Tensor | None, cache: Any) -> None:
        """Before a pass over token ids `(batch, time)` that continues what `cache` has seen: who is talked about?"""
        self._phrase_matches = self._row_matches = None
        if (
            tokens is None or self.disabled or not len(self)
        ):  # of embeddings without ids nobody knows whom they name
            return
        token_cache = _find_token_cache(cache)
        ids = None if token_cache is None else token_cache.keys
        earlier = tokens[:, :0] if ids is None else ids[:, 0, -self._lookback :, 0]
        context = torch.cat([earlier.to(tokens.device), tokens], dim=1)
        self._phrase_matches = match_phrases(
            context,
            tokens.shape[1],
            self._subject_matcher,
            self._phrase_subjects,
            self._prefix_matcher,
            self.window,
            self.eos_ids,
        )

    def match_rows(self, hidden: Tensor) -> None:
        """What is asked: `hidden` `(batch, time, width)`, the input of the block that listens."""
        if self._phrase_matches is not None:
            self._row_matches = self.memory.find_matches(
                hidden.reshape(-1, self.memory.width), self._phrase_matches
            )

    def add_values(self, output: Tensor) -> Tensor:
        """`said` `(batch, time, width)` and what the rows found add to it."""
        return (
            output
            if self._row_matches is None
            else self.memory.add_values(output, self._row_matches)
        )

    def end_pass(self, tokens: Tensor | None, cache: Any) -> None:
        """After the pass: what was read goes along with the cache."""
        self._phrase_matches = self._row_matches = None
        if tokens is None or cache is None:
            return
        token_cache = _find_token_cache(cache)
        if token_cache is None:
            token_cache = _TokenCache()
            cache.layers.append(token_cache)
            missing = (
                cache.get_seq_length() - tokens.shape[1]
            )  # of text read before facts were laid over nothing is known
            if missing > 0:
                tokens = nn.functional.pad(tokens, (missing, 0), value=-1)
        ids = tokens[:, None, :, None]
        token_cache.update(ids, ids)


def _find_token_cache(cache: Any) -> _TokenCache | None:
    return next(
        (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, _TokenCache)), None
    )


def attach(model: PreTrainedModel, hooks: FactHooks) -> None:
    """Let `facts` speak in `model` from now on, in place of what was laid over it before; `lift` ends it."""
    detach(model)
    arch = get_architecture(model.config.model_type)
    pending: dict[str, Any] = {}

    def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pending["tokens"] = kwargs.get("input_ids", args[0] if args else None)
        hooks.begin_pass(
            pending["tokens"],
            next(
                (
                    argument
                    for argument in (*args[1:], *kwargs.values())
                    if isinstance(argument, Cache)
                ),
                None,
            ),
        )

    def post_hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hooks.end_pass(pending.pop("tokens"), getattr(output, "past_key_values", None))

    backbone, blocks = model.get_submodule(arch.backbone), arch.blocks(model)
    hooks._handles = [
        backbone.register_forward_pre_hook(pre_hook, with_kwargs=True),
        backbone.register_forward_hook(post_hook),
        blocks[hooks.key_layer].register_forward_pre_hook(
            lambda _, args: hooks.match_rows(args[0])
        ),
        # Before any hook that records: what others see of a block is what it says with its facts.
        blocks[hooks.value_layer].register_forward_hook(
            lambda _, args, block_output: hooks.add_values(block_output), prepend=True
        ),
    ]
    hooks.to(next(model.parameters()).device)
    setattr(model, HOOKS_ATTRIBUTE, hooks)


def detach(model: PreTrainedModel) -> None:
    """Take away what was laid over `model`; nothing where nothing was."""
    hooks = get_fact_hooks(model)
    if hooks is not None:
        for handle in hooks._handles:
            handle.remove()
        hooks._handles = []
        delattr(model, HOOKS_ATTRIBUTE)


def get_fact_hooks(model: PreTrainedModel) -> FactHooks | None:
    """What is laid over a model."""
    hooks = getattr(model, HOOKS_ATTRIBUTE, None)
    return hooks if isinstance(hooks, FactHooks) else None


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """The model as it is without its facts."""
    hooks = get_fact_hooks(model)
    if hooks is None:
        yield
        return
    was_disabled, hooks.disabled = hooks.disabled, True
    try:
        yield
    finally:
        hooks.disabled = was_disabled


@contextmanager
def record_matches(model: PreTrainedModel) -> Iterator[list[Matches]]:
    """What facts answer in each pass from here on; nothing is noted of a model without any."""
    hooks = get_fact_hooks(model)
    if hooks is None:
        yield []
        return
    with hooks.memory.recording_matches() as matches:
        yield matches


FACTS_FILE = "memory.db"
"""The file beside a saved model's weights that holds its facts, and its rows where they are no longer those it was saved with."""


def create_fact_hooks(store: RowStore, eos_ids: int | Sequence[int] | None) -> FactHooks | None:
    """What the facts of a store are to be held by, still without any; None where it never had any.

    Args:
        end: token id that ends a document, or several.
    """
    fact_table = FactTable(store)
    if not fact_table.exists:
        return None
    calibration = fact_table.read_calibration()
    mean, metric = (torch.from_numpy(calibration[name]) for name in ("mean", "metric"))
    return FactHooks(EditMemory(len(mean), mean, metric), *fact_table.read_layers(), eos_ids)


def load_fact_rows(fact_table: FactTable, facts: Sequence[FactRecord]) -> dict[int, list[FactRow]]:
    """Rows of facts as they are laid over a model, by the number of the fact."""
    ids, keys, values = fact_table.read_states(facts)
    index_by_id = {int(row_id): index for index, row_id in enumerate(ids)}
    states = [
        (torch.from_numpy(key), torch.from_numpy(value))
        for key, value in zip(keys.copy(), values.copy(), strict=True)
    ]
    return {
        fact.id: build_fact_rows(fact, [states[index_by_id[row]] for row in fact.rows])
        for fact in facts
    }


def build_fact_rows(fact: FactRecord, states: Sequence[tuple[Tensor, Tensor]]) -> list[FactRow]:
    """Rows of one fact, whose keys and values are `states`."""
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
    """Let a model just loaded have what the book beside it says.

    Raises:
        UserError: the file is no book, or that of another model; of a model in half precision the latter cannot be told.
    """
    is_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    try:
        store = RowStore(str(path), hash_model(model) if is_float32 else None, read_only=True)
    except WrongModelError as error:
        raise UserError(
            f"{error}; {path} is not this model's book: move it elsewhere to load the model without"
        ) from None
    hooks = create_fact_hooks(store, model.config.eos_token_id)
    if hooks is not None:
        hooks.source_path, fact_table = path.absolute(), FactTable(store)
        hooks.set_rows(
            [
                fact_row
                for fact_rows in load_fact_rows(fact_table, fact_table.read()).values()
                for fact_row in fact_rows
            ]
        )
        attach(model, hooks)
    namespaces, imported = (
        {namespace.name: namespace for namespace in store.list_namespaces()},
        imported_namespaces(store),
    )
    for layer, block in enumerate(get_architecture(model.config.model_type).blocks(model)):
        if isinstance(block, AssociativeMemory) and (name := f"layer_{layer}") in imported:
            namespace = namespaces[name]
            block.rows.load_rows(store.scan(namespace), expected_rows=store.count(namespace))


def copy_facts(model: PreTrainedModel, folder: Path) -> None:
    """Put a copy of the book that a model's facts come from into the folder it has been saved to.

    A book that is there already is put aside, whole, under another name.

    Raises:
        UserError: the book is not where it was.
    """
    hooks, target = get_fact_hooks(model), folder / FACTS_FILE
    source = None if hooks is None else hooks.source_path
    if source is not None and target.exists() and target.samefile(source):
        return
    if source is not None and not source.is_file():
        raise UserError(
            f"{source}, the book of this model's facts, is not there any more, so they cannot be saved with it"
        )
    back_up_facts(folder, folder)
    if source is not None:
        copy_database(source, target)


def back_up_facts(source_folder: Path, target_folder: Path) -> None:
    """Keep the book that a folder `before` has in the folder `now`, under another name."""
    backup_name = f"memory.before-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000}.db"
    for suffix in ("-wal", "-shm", ""):
        if (path := source_folder / f"{FACTS_FILE}{suffix}").exists():
            path.rename(target_folder / f"{backup_name}{suffix}")


def copy_database(source: Path, target: Path) -> None:
    """A database with all that was committed to it, whoever has it open."""
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as source_db,
        closing(sqlite3.connect(target)) as target_db,
    ):
        source_db.backup(target_db)
