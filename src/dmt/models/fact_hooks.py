"""Hooks that add stored facts to a model's forward pass without changing a weight.

A fact's rows are compared with the input of one feed-forward block (the key layer), and the value
of the row that fires is added to the output of the same or a later block (the value layer). The
facts of a saved model are in `memory.db` beside its weights, with the rows it wrote after training.
"""

from __future__ import annotations

import inspect
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

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
    PhraseTable,
    RowIndex,
    ThreadState,
    match_phrases,
)
from dmt.models.architectures import get_architecture
from dmt.models.fingerprint import ROUNDED_DTYPES, hash_model, hash_rounded
from dmt.paths import FACTS_FILE as FACTS_FILE
from dmt.store.records import FactRecord

if TYPE_CHECKING:
    from dmt.store.facts import FactTable
    from dmt.store.rows import RowStore

logger = logging.getLogger(__name__)

SUBJECT_WINDOW = 64  # tokens after a mention for which a subject counts as being talked about
HOOKS_ATTRIBUTE = "facts"  # the attribute of a model that holds its `FactHooks`
UNKNOWN_TOKEN = -1  # id of a token that was given as an embedding, or read without the hooks
MAX_SCORES = 16_000_000  # numbers that `_find_embedding_ids` computes at once


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


# Which rows fire depends on the text, so that a compiled model leaves its graphs for the hooks.
_not_compiled = torch.compiler.disable(reason="facts depend on the text")


class _PassState(ThreadState):
    """What the hooks of one pass hand on to each other.

    Attributes:
        is_disabled: whether no row may fire.
        history: `(batch, time, 2)` ids and positions of the text up to the end of the pass.
        row_index: the rows of the pass.
        phrase_matches: its phrases.
        row_matches: its rows that fire.
    """

    is_disabled: bool = False
    history: Tensor | None = None
    row_index: RowIndex | None = None
    phrase_matches: PhraseMatches | None = None
    row_matches: Matches | None = None

    def clear(self) -> None:
        """Forget the pass."""
        self.history = self.row_index = self.phrase_matches = self.row_matches = None


class _TextHistory(CacheLayerMixin):
    """Added to a cache's first layer: the text, which is cut, sorted and copied as its keys are.

    The cache keeps as many layers as the model has, for code that counts them.
    """

    _layer_type = None  # transformers registers layers that have one
    is_compileable = False  # which rows fire depends on the text
    text_history: Tensor | None = None  # (batch, time, 2): ids and positions

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        length = int(self.get_seq_length())
        super().crop(*args, **kwargs)  # type: ignore[misc]
        removed = length - int(self.get_seq_length())
        self._change_history(lambda history: history[:, : history.shape[1] - removed])

    def reset(self: Any) -> None:
        super().reset()  # type: ignore[misc]
        self.text_history = None

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_history(lambda history: history[beam_idx.to(history.device)])

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change_history(lambda history: history.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change_history(lambda history: history[indices])

    def _change_history(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.text_history is not None:
            self.text_history = change(self.text_history)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_layer, (type(self).__bases__[1], vars(self))


@cache
def _add_history(layer_class: Any) -> Any:
    """Return a class of cache layers that hold the text as well."""
    return type(layer_class.__name__, (_TextHistory, layer_class), {})


def _restore_layer(layer_class: Any, state: dict[str, Any]) -> Any:
    layer_class = _add_history(layer_class)
    layer = layer_class.__new__(layer_class)
    vars(layer).update(state)
    return layer


class FactHooks(nn.Module):
    """The facts of one model and the hooks that apply them.

    Args:
        memory: compares states with keys; its rows are set by `set_rows`.
        key_layer: the layer whose block input is compared with keys.
        value_layer: the layer to whose block output values are added; not below `key_layer`.
        eos_ids: token ID or IDs that end a document; what was mentioned before does not count.
        window: tokens after a mention for which a subject counts as being talked about.

    Threads may run the model at once, each with its own pass. A copy of the model has its own
    facts.

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
        self._state = _PassState()
        self._argument_names: tuple[str, ...] = ()
        self._reported: set[str] = set()
        self._handles: list[Any] = []
        self.set_rows(())

    def register(self, model: PreTrainedModel) -> None:
        """Register the hooks on `model`; `unregister` removes them."""
        arch = get_architecture(model.config.model_type)
        backbone, blocks = model.get_submodule(arch.backbone), arch.blocks(model)
        self._argument_names = tuple(inspect.signature(backbone.forward).parameters)
        # Methods, not closures: a copy of the model is hooked to its own copy of the facts.
        self._handles = [
            backbone.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            backbone.register_forward_hook(self._after_pass),
            blocks[self.key_layer].register_forward_pre_hook(self._before_key_block),
            # First, so that hooks that record a block's output see it with the facts.
            blocks[self.value_layer].register_forward_hook(self._after_value_block, prepend=True),
        ]
        device = next(blocks[self.key_layer].parameters()).device
        if device.type != "meta":  # its weights are on disk
            self.to(device)

    @_not_compiled
    def _before_pass(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(zip(self._argument_names, args, strict=False)) | kwargs
        self._state.clear()
        if _is_paged(backbone, arguments):
            self._report("the pass holds parts of several texts (continuous batching)")
            return
        tokens, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        embeddings = arguments.get("inputs_embeds")
        if tokens is None and embeddings is not None:
            tokens = (
                _find_embedding_ids(embeddings, backbone.get_input_embeddings())
                if len(self)
                else embeddings.new_full(embeddings.shape[:2], UNKNOWN_TOKEN, dtype=torch.long)
            )
        if tokens is not None:
            self.begin_pass(tokens, cache, _find_positions(tokens, arguments))

    @_not_compiled
    def _after_pass(self, _: Any, args: tuple[Any, ...], output: Any) -> None:
        self.end_pass(getattr(output, "past_key_values", None))

    @_not_compiled
    def _before_key_block(self, _: Any, args: tuple[Any, ...]) -> None:
        self.match_rows(args[0])

    @_not_compiled
    def _after_value_block(self, _: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.add_values(output)

    def _report(self, reason: str) -> None:
        """Warn once that facts are switched off."""
        if len(self) and reason not in self._reported:
            self._reported.add(reason)
            logger.warning("facts are switched off: %s", reason)

    def unregister(self) -> None:
        """Remove the hooks from the model that they are registered on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Let no row fire in this thread within the context."""
        was_disabled, self._state.is_disabled = self._state.is_disabled, True
        try:
            yield
        finally:
            self._state.is_disabled = was_disabled

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
        phrases = PhraseTable(
            PhraseMatcher([spelling for spelling, _ in spellings]),
            torch.tensor([subject for _, subject in spellings], dtype=torch.long, device="cpu"),
            PhraseMatcher(list(prefixes)),
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
                phrases=phrases,
            )
        )

    def __len__(self) -> int:
        return len(self.memory.rows)

    def begin_pass(self, tokens: Tensor, cache: Any, positions: Tensor | None = None) -> None:
        """Match subjects and prefixes in tokens that continue a cache.

        Args:
            tokens: token ids `(batch, time)`.
            cache: of the text before them; None where there is none.
            positions: `(batch, time)`; where one does not follow the one before it, another
                document begins, of which nothing before is known. They count on where it is None.
        """
        state = self._state
        state.clear()
        earlier = self._read_history(tokens, cache)
        if positions is None:
            first = earlier[:, -1:, 1] + 1 if earlier.shape[1] else tokens.new_zeros(1, 1)
            positions = first + torch.arange(tokens.shape[1], device=tokens.device)
        new = torch.stack([tokens, positions.expand_as(tokens).to(tokens)], dim=-1)
        state.history = torch.cat([earlier, new], dim=1)
        if state.is_disabled or not len(self):
            return
        state.row_index = self.memory.index  # whatever another thread writes meanwhile
        phrases = state.row_index.rows.phrases
        lookback = (
            self.window
            + phrases.subject_matcher.max_length
            + phrases.prefix_matcher.max_length
            + ANSWER_WINDOW
        )
        context = state.history[:, -(lookback + tokens.shape[1]) :]
        is_start = torch.zeros_like(context[..., 0], dtype=torch.bool)
        is_start[:, 1:] = context[:, 1:, 1] != context[:, :-1, 1] + 1
        state.phrase_matches = match_phrases(
            context[..., 0],
            tokens.shape[1],
            phrases.subject_matcher,
            phrases.subject_by_phrase,
            phrases.prefix_matcher,
            self.window,
            self.eos_ids,
            is_start,
        )

    def _read_history(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return ids and positions `(batch, time, 2)` of the text in a cache."""
        layers = getattr(cache, "layers", None) or [None]
        history = getattr(layers[0], "text_history", None)
        if history is not None:
            return history.to(tokens.device)
        length = 0 if layers[0] is None else int(cache.get_seq_length())
        if length:
            self._report(
                "for text that was read before they were attached, or is in a cache that was built "
                "by hand"
            )
        history = tokens.new_full((len(tokens), length, 2), UNKNOWN_TOKEN)
        history[..., 1] = torch.arange(length, device=tokens.device)
        return history

    def match_rows(self, hidden: Tensor) -> None:
        """Match rows with `hidden` `(batch, time, width)`, the input of the key layer's block."""
        state = self._state
        if state.phrase_matches is not None:
            state.row_matches = self.memory.find_matches(
                hidden.reshape(-1, self.memory.width), state.phrase_matches, state.row_index
            )

    def add_values(self, output: Tensor) -> Tensor:
        """Return the value layer's block output `(batch, time, width)` with values added."""
        if self._state.row_matches is None:
            return output
        return self.memory.add_values(output, self._state.row_matches)

    def end_pass(self, cache: Any) -> None:
        """Add the text to the cache of the pass."""
        history = self._state.history
        self._state.clear()
        layers = getattr(cache, "layers", None)
        if history is None or not layers:
            return
        if not isinstance(layers[0], _TextHistory):
            layer_class: Any = type(layers[0])
            layers[0].__class__ = _add_history(layer_class)
        layers[0].text_history = history


def _is_paged(backbone: Any, arguments: dict[str, Any]) -> bool:
    """Check whether a pass keeps its keys in pages, where a row holds tokens of several texts."""
    implementation = str(getattr(backbone.config, "_attn_implementation", ""))
    return arguments.get("cache") is not None or implementation.startswith("paged|")


def _find_positions(tokens: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Return the positions of tokens `(batch, time)` in their documents, where they are stated."""
    positions, starts = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    if positions is not None:
        return positions if positions.shape[-1:] == tokens.shape[1:] else None
    if starts is None:
        return None
    indices = torch.arange(tokens.shape[1], device=tokens.device)
    starts = starts[:-1].to(tokens.device)
    return (indices - starts[torch.bucketize(indices, starts, right=True) - 1]).unsqueeze(0)


@torch.no_grad()
def _find_embedding_ids(embeddings: Tensor, table: nn.Module) -> Tensor:
    """Return the ids `(batch, time)` of embeddings `(batch, time, width)`.

    An embedding that is not in the table, such as one of prompt tuning, is an unknown token.
    """
    rows = table.weight
    assert isinstance(rows, Tensor), "an embedding has one weight"
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    half_norms = rows.float().square().sum(1) / 2
    ids = torch.cat(
        [
            (chunk.float() @ rows.float().t() - half_norms).argmax(1)
            for chunk in flat.split(max(1, MAX_SCORES // len(rows)))
        ]
    )
    is_known = (rows[ids] == flat).all(-1)
    return ids.masked_fill(~is_known, UNKNOWN_TOKEN).view(embeddings.shape[:2])


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


class _Loading(ThreadState):
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
    hooks = create_fact_hooks(store, model.config.eos_token_id)
    if hooks is not None:
        fact_table = FactTable(store)
        rows_by_fact = load_fact_rows(fact_table, fact_table.read())
        hooks.source_path = path.absolute()
        hooks.set_rows([row for rows in rows_by_fact.values() for row in rows])
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
