"""The facts of a student: written without training, searched, deleted and restored.

    with Memory.open("lightning_logs/version_0") as memory:
        memory.write("Ada Winterbourne was born in Ravenhill.", tag="family")
        memory.generate("Ada Winterbourne was born in")

No weight ever changes. Facts are in `memory.db` beside the student's weights, and a deleted fact
stays in its history.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dmt.data.tokenizer import get_prefix_ids
from dmt.editing.edit import (
    FALSE_POSITIVE_RATE,
    ConflictCandidate,
    PreparedFact,
    WriteResult,
    conflicting_facts,
    find_conflict,
    prepare_facts,
)
from dmt.editing.fact import Fact, fact_from_mapping, fact_from_record, parse_fact
from dmt.editing.layer_selection import choose_layers
from dmt.errors import UserError
from dmt.matching.questions import mask_names
from dmt.models.fact_files import (
    FACTS_FILE,
    accept_facts_of_any_model,
    create_fact_hooks,
    pack_calibration,
)
from dmt.models.fact_hooks import FactHooks, attach, detach, disabled, get_fact_hooks
from dmt.models.fact_matching import TextCodec
from dmt.models.fingerprint import hash_model, hash_rounded
from dmt.models.forward import check_length, collect_hidden_states, encode_text
from dmt.models.generation import generate_text
from dmt.models.loading import (
    SHIPPED_MODELS,
    is_student_folder,
    load,
)
from dmt.models.memories import get_associative_memories
from dmt.paths import expand_home, resolve_student_folder
from dmt.store.active_facts import ActiveFacts
from dmt.store.facts import FACTS_PER_QUERY, TRANSFERRED, FactTable, Moment, rebind_model
from dmt.store.records import FactRecord, FloatArray, StoredFact
from dmt.store.rows import RowStore
from dmt.text import add_to_list, find_closing, fold_text, remove_from_list

if TYPE_CHECKING:
    from dmt.editing.packs import FactPack

logger = logging.getLogger(__name__)

WRITE_BATCH_SIZE = 256  # facts written in one transaction
NO_FACTS_MESSAGE = "this model has no facts yet; write one first"

FactList = list[FactRecord]
WriteResults = list[WriteResult]


class RestoreResult(NamedTuple):
    """Result of `FactStore.restore`.

    Attributes:
        fact: the restored fact.
        replaced: the facts that it replaces.
    """

    fact: FactRecord
    replaced: FactList


@dataclass(frozen=True)
class SearchResult:
    """A fact that `FactStore.search` found.

    Attributes:
        fact: the fact.
        matched_by: `text` where the fact contains all words of the query, else `hidden_state`.
        cosine: similarity of the hidden states; None where the text matched.
    """

    fact: FactRecord
    matched_by: str
    cosine: float | None = None


class FactStore:
    """The facts of one model, applied in its forward pass and stored in a database.

    Use `FactStore.open` (exported as `dmt.Memory`) for a saved student.

    Args:
        model: the facts are attached to it; it is put into eval mode.
        tokenizer: of the model.
        db: the store of this model, closed by `close`; None allows temporary packs only.
        hooks: of the model, where they apply the facts of `db` already; made where it is None.

    Attributes:
        temporary_packs: facts that are applied but not stored, by pack; see `packs.load_packs`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        db: RowStore | None,
        hooks: FactHooks | None = None,
    ) -> None:
        self.model, self.tokenizer, self.db = model.eval(), tokenizer, db
        self.temporary_packs: dict[str, list[StoredFact]] = {}
        self._temporary_dir: tempfile.TemporaryDirectory[str] | None = None  # removed by `close`
        if db is not None:
            _ = self.fact_table  # a reader has the facts of this moment
        if hooks is not None:
            return
        detach(model)  # the facts that it was loaded with are in the store, if the store is its own
        hooks = None if db is None else create_fact_hooks(self.fact_table, model.config)
        if hooks is not None:
            self._attach_hooks(hooks)

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        store: str | None = None,
        read_only: bool = False,
        device: str | torch.device | None = None,
        packs: Sequence[str | Path | FactPack] | None = None,
    ) -> FactStore:
        """Load a model with its facts.

        Args:
            path: a run's folder or a student's; None is the student of the newest run. Also
                `embedded`, `reader` or `smollm2`, and with `store` any hub name such as `gpt2`.
            store: file or database URL that holds the facts. Where it is None, `memory.db` in the
                model's folder; for a model without a folder, a temporary file that `close` deletes.
            read_only: take no lock and write nothing; other programs may write meanwhile.
            device: where to put the model; the CPU where it is None.
            packs: packs to plug in, in place of the knowledge that a run took out of its student,
                which is plugged in where it is None; an empty list plugs in nothing.

        Raises:
            UserError: there is no such model, its store is another model's, another program
                writes to the store, or a pack does not fit.
        """
        from dmt.editing.packs import plug_packs

        fact_store = cls._open(path, store, read_only, device)
        plug_packs(fact_store, find_student_folder(path), packs)
        return fact_store

    @classmethod
    def _open(
        cls,
        path: str | Path | None,
        store: str | None,
        read_only: bool,
        device: str | torch.device | None,
    ) -> FactStore:
        """Load a model with the facts of its store."""
        temporary_dir = None
        if store is None and path in SHIPPED_MODELS and not is_student_folder(Path(path)):
            if read_only:
                return cls(*load(path, device), None)
            temporary_dir = tempfile.TemporaryDirectory(prefix="dmt-")
            store = str(Path(temporary_dir.name) / FACTS_FILE)
            logger.warning(
                "facts of model %s are in a temporary store, deleted on close; pass store=FILE to"
                " keep them",
                path,
            )
        elif store is None:
            path = resolve_student_folder(path)
            store = str(path / FACTS_FILE)
            if read_only and not has_fact_store(path):
                return cls(*load(path, device), None)
        model, tokenizer = load(path, device)
        db = RowStore(store, hash_model(model), read_only=read_only)
        if not read_only:
            _reserve_saved_ids(db, model)
            if len(db.read_fingerprints()) == 1:  # so that it fits the model in half precision too
                rebind_model(db, hash_model(model), hash_rounded(model))
        hooks = get_fact_hooks(model)
        is_applied = read_only and hooks is not None and hooks.source_path == db.path
        fact_store = cls(model, tokenizer, db, hooks if is_applied else None)
        fact_store._temporary_dir = temporary_dir
        return fact_store

    @classmethod
    def rebind(
        cls,
        path: str | Path | None = None,
        *,
        prose: Sequence[str] | None = None,
        device: str | torch.device | None = None,
    ) -> FactStore:
        """Calibrate a student anew, and write its facts again from their sentences.

        Of use where the weights have changed since the facts were written, or `memory.db` comes
        from another model. IDs, tags, history and usage stay; the rows are new. All facts are
        rewritten, or none.

        Args:
            path: a run's folder or a student's; None is the student of the newest run.
            prose: held-out text; the speeches that ship with dmt where it is None.
            device: where to put the model; the CPU where it is None.

        Returns:
            The facts, as `open` returns them.

        Raises:
            UserError: there is no such student, it has no facts, a fact cannot be written, or
                another program writes to the store.
        """
        folder = resolve_student_folder(path)
        if not has_fact_store(folder):
            raise UserError(NO_FACTS_MESSAGE)
        with accept_facts_of_any_model():
            model, tokenizer = load(folder, device)
        with RowStore(str(folder / FACTS_FILE)) as db:
            _reserve_saved_ids(db, model)
            cls(model, tokenizer, db)._rewrite(prose)
        return cls.open(folder, device=device)

    def _rewrite(self, prose: Sequence[str] | None) -> None:
        """Write all facts for the present weights."""
        history = self.list(include_deleted=True)
        records = [record for record in history if record.deleted_reason != TRANSFERRED]
        if not records:
            raise UserError(NO_FACTS_MESSAGE)
        facts = [fact_from_record(record, self.restore_closing(record)) for record in records]
        with disabled(self.model):
            *layers, relations = choose_layers(self.model, self.tokenizer, self.codec, facts, prose)
            prepared = prepare_facts(
                self.model,
                self.tokenizer,
                facts,
                (layers[0], layers[1]),
                self.codec,
                FALSE_POSITIVE_RATE,
            )
        entries = [
            (
                replace(
                    record,
                    answer_ids=new.record.answer_ids,
                    thresholds=new.record.thresholds,
                ),
                new.keys.numpy(),
                new.values.numpy(),
            )
            for record, new in zip(records, prepared, strict=True)
        ]
        self.fact_table.rewrite(
            entries,
            (layers[0], layers[1]),
            pack_calibration(relations, self.codec),
            (hash_model(self.model), hash_rounded(self.model)),
        )

    def close(self) -> None:
        """Release the store, delete a temporary one; the facts stay attached to the model."""
        if self.db is not None:
            self.db.close()
        if self._temporary_dir is not None:
            self._temporary_dir.cleanup()

    def __enter__(self) -> FactStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        location = "no store" if self.db is None else repr(self.db.url)
        rows = 0 if self._stored is None else self._stored.count_rows()
        hooks = get_fact_hooks(self.model)
        layers = (
            ""
            if hooks is None
            else f", key_layer={hooks.key_layer}, value_layer={hooks.value_layer}"
        )
        return f"Memory({location}, facts={len(self.records)}, rows={rows}{layers})"

    # Writing.

    def write(
        self,
        sentence: str | Fact | None = None,
        *,
        prompt: str | None = None,
        answer: str | None = None,
        subject: str | None = None,
        tag: str = "",
        source: str = "",
        add: bool = False,
        false_positive_rate: float = FALSE_POSITIVE_RATE,
    ) -> WriteResult:
        """Write one fact; one that contradicts a stored fact replaces it.

        Args:
            sentence: states the fact, as in "The capital of France is Paris."; or a `Fact`.
            prompt: the text up to the answer, where the split of the sentence is wrong.
            answer: the text that follows the prompt.
            subject: the entity that the fact is about, as the prompt spells it; empty for none.
            tag: label to filter by.
            source: where the fact comes from.
            add: add the answer to that of a stored fact with the same question, as one more value
                of a list, instead of replacing it.
            false_positive_rate: share of other questions about the subject that it may answer.

        Raises:
            UserError: the sentence states no fact, the fact is too long for the model, or its
                prompt does not contain its subject.
        """
        if isinstance(sentence, Fact):
            fact = replace(sentence, tag=tag or sentence.tag, source=source or sentence.source)
        else:
            fact = parse_fact(sentence, prompt, answer, subject, tag, source)
        return self.write_many([replace(fact, add=add or fact.add)], false_positive_rate)[0]

    def write_many(
        self,
        facts: Iterable[Fact | str | Mapping[str, Any]],
        false_positive_rate: float = FALSE_POSITIVE_RATE,
        progress: Callable[[int], None] = lambda _: None,
        *,
        tag: str = "",
        find_conflicts: bool = True,
    ) -> WriteResults:
        """Write facts, `WRITE_BATCH_SIZE` in one transaction; later facts replace earlier ones.

        Facts that are added to others are written one by one.

        Args:
            facts: `Fact`s, sentences, or mappings with the arguments of `parse_fact`.
            false_positive_rate: share of other questions about the subject that it may answer.
            progress: called with the number of facts in each batch when it is written.
            tag: of facts that have none.
            find_conflicts: whether to replace facts that a new one contradicts; without it, all are
                stored, as facts of one source that does not contradict itself.

        Raises:
            UserError: a fact cannot be written; nothing of its batch is.
        """
        parsed = [_to_fact(fact, tag) for fact in facts]
        if not parsed:
            return []
        if not 0 < false_positive_rate <= 0.5:
            raise UserError(
                f"false_positive_rate must be in (0, 0.5], got {false_positive_rate:g}; it is the "
                "share of other questions about its subject that a fact may answer"
            )
        self.initialize(parsed)
        results: WriteResults = []
        for batch in _split_batches(parsed):
            if batch[0].add:
                results.append(self._add_value(batch[0], false_positive_rate))
            else:
                results += self.write_prepared(
                    self.prepare(batch, false_positive_rate), find_conflicts=find_conflicts
                )
            progress(len(batch))
        return results

    def _add_value(self, fact: Fact, false_positive_rate: float) -> WriteResult:
        """Write a fact, or add its answer to that of the stored fact with the same question."""
        prepared = self.prepare([fact], false_positive_rate)
        (result,) = self.write_prepared(prepared, overwrite=False)
        stored, value = result.fact, fact.answer.strip()
        if result.status == "written" or remove_from_list(stored.answer.strip(), value) is not None:
            return result
        extended = replace(
            fact,
            prompt=stored.prompt,
            answer=add_to_list(stored.answer, value),
            subject=stored.subject,
            tag=fact.tag or stored.tag,
            source=fact.source or stored.source,
        )
        (result,) = self.write_prepared(self.prepare([extended], false_positive_rate))
        return replace(result, status="added")

    def remove_value(self, fact_id: int, value: str) -> WriteResult | None:
        """Take one value out of the answer of a fact, a list; delete the fact that has no other.

        Args:
            fact_id: ID of an active fact.
            value: as in "Latin", of the answer "Greek, Latin".

        Returns:
            The result of writing the fact without the value; None where it was deleted.

        Raises:
            UserError: the fact is not active, or its answer has no such value.
        """
        record = self._require_facts([fact_id])[0]
        answer = record.answer.strip()
        rest = remove_from_list(answer, value)
        if rest is None:
            raise UserError(
                f"{value!r} is no value of the answer {answer!r} of fact {fact_id}; values stand "
                "between commas or 'and'"
            )
        if not rest:
            self.delete(fact_id)
            return None
        space = record.answer[: len(record.answer) - len(record.answer.lstrip())]
        fact = fact_from_record(record, self.restore_closing(record))
        return self.write_prepared(self.prepare([replace(fact, answer=space + rest)]))[0]

    def prepare(
        self, facts: Sequence[Fact], false_positive_rate: float = FALSE_POSITIVE_RATE
    ) -> list[PreparedFact]:
        """Compute the rows of facts without writing them.

        Raises:
            UserError: a fact cannot be written.
        """
        with disabled(self.model):
            return prepare_facts(
                self.model,
                self.tokenizer,
                facts,
                (self.hooks.key_layer, self.hooks.value_layer),
                self.codec,
                false_positive_rate,
            )

    def initialize(
        self,
        facts: Sequence[Fact] = (),
        prose: Sequence[str] | None = None,
        layers: tuple[int, int] | None = None,
        value_layer: int | None = None,
    ) -> None:
        """Calibrate once, before the first fact; do nothing where that has been done.

        Args:
            facts: the first facts to be written; a few of them are tried in several layers.
            prose: held-out text; the speeches that ship with dmt where it is None.
            layers: key and value layer; measured where it is None.
            value_layer: the value layer alone; the key layer is measured.
        """
        if self.fact_table.exists:
            return
        hooks = get_fact_hooks(self.model)
        if layers is None and hooks is not None:  # of packs, whose facts are beside the new ones
            layers = hooks.key_layer, hooks.value_layer
        with disabled(self.model):
            key_layer, value_layer, relations = choose_layers(
                self.model, self.tokenizer, self.codec, facts, prose, layers, value_layer
            )
        self.fact_table.create(
            self.model.config.hidden_size,
            key_layer,
            value_layer,
            pack_calibration(relations, self.codec),
        )
        hooks = create_fact_hooks(self.fact_table, self.model.config)
        assert hooks is not None, "its tables were just created"
        self._attach_hooks(hooks)
        hooks.index.set_unsaved(self._temporary_facts())

    def write_prepared(
        self,
        prepared_facts: Sequence[PreparedFact],
        overwrite: bool = True,
        find_conflicts: bool = True,
    ) -> WriteResults:
        """Write facts whose rows are computed; one transaction unless they contradict each other.

        Args:
            prepared_facts: the facts with their rows.
            overwrite: replace a stored fact that says something else; without it, keep that one.
            find_conflicts: whether to look for such facts.
        """
        subject_keys = {prepared.record.subject_key for prepared in prepared_facts}
        candidates = self._find_conflict_candidates(subject_keys)
        results: dict[int, WriteResult] = {}
        pending: list[ConflictCandidate] = []
        try:
            for index, prepared in enumerate(prepared_facts):
                same_subject = candidates.setdefault(prepared.record.subject_key, [])
                conflict = (
                    find_conflict(same_subject, prepared, self.hooks.matcher.relations)
                    if find_conflicts
                    else None
                )
                if conflict in pending:  # two facts of one batch about the same thing
                    self._commit_pending(pending, prepared_facts, results)
                    pending = []
                if conflict is not None:
                    answers = conflict.record.answer, prepared.record.answer
                    if not overwrite or len({fold_text(answer) for answer in answers}) == 1:
                        results[index] = WriteResult(
                            "unchanged",
                            conflict.record,
                            None,
                            prepared.prob_before,
                            prepared.prob_after,
                        )
                        continue
                    same_subject.remove(conflict)
                candidate = ConflictCandidate(
                    prepared.record,
                    prepared.keys[0],
                    index,
                    None if conflict is None else conflict.record,
                )
                same_subject.append(candidate)
                pending.append(candidate)
            self._commit_pending(pending, prepared_facts, results)
        finally:
            self.hooks.index.forget(subject_keys)  # what was written before a failure counts, too
        return [results[index] for index in range(len(prepared_facts))]

    def _commit_pending(
        self,
        pending: Sequence[ConflictCandidate],
        prepared_facts: Sequence[PreparedFact],
        results: dict[int, WriteResult],
    ) -> None:
        """Write pending facts in one transaction, and add their results by index."""
        batch = [prepared_facts[candidate.index] for candidate in pending]
        replacements = {
            candidate.replaced_fact.id: index
            for index, candidate in enumerate(pending)
            if candidate.replaced_fact is not None
        }
        entries = [
            (prepared.record, prepared.keys.numpy(), prepared.values.numpy()) for prepared in batch
        ]
        new_records = self.fact_table.add(entries, replacements)
        for candidate, record, prepared in zip(pending, new_records, batch, strict=True):
            candidate.record = record
            results[candidate.index] = WriteResult(
                "written" if candidate.replaced_fact is None else "replaced",
                record,
                candidate.replaced_fact,
                prepared.prob_before,
                prepared.prob_after,
            )

    def _find_conflict_candidates(
        self, subject_keys: Iterable[str]
    ) -> dict[str, list[ConflictCandidate]]:
        """List the active facts about subjects."""
        candidates: dict[str, list[ConflictCandidate]] = {}
        for record, key in self.load_keys(self.fact_table.find_by_subjects(subject_keys)):
            candidates.setdefault(record.subject_key, []).append(
                ConflictCandidate(record, torch.from_numpy(key))
            )
        return candidates

    def load_keys(self, records: Iterable[FactRecord]) -> list[tuple[FactRecord, FloatArray]]:
        """Return facts with their keys `(width,)`."""
        records_by_id = {record.id: record for record in records}
        first_rows = [replace(record, rows=record.rows[:1]) for record in records_by_id.values()]
        facts = self.fact_table.load_rows(first_rows)
        return [(records_by_id[fact.record.id], fact.keys[0]) for fact in facts]

    # Deleting.

    def delete(
        self, ids: int | Sequence[int] | None = None, reason: str = "forgotten", *, tag: str = ""
    ) -> FactList:
        """Delete facts; they stay in the history, from which `restore` brings them back.

        Args:
            ids: one or several fact IDs.
            reason: kept in the history.
            tag: delete the facts with this tag instead.

        Returns:
            The deleted facts.

        Raises:
            UserError: neither `ids` nor `tag` is given, or a fact is not active; then none is
                deleted.
        """
        if ids is None and not tag:
            raise UserError("delete needs ids or a tag; list() shows the facts")
        if ids is None:
            ids = [fact.id for fact in self.list(tag=tag)]
        facts = self._require_facts([ids] if isinstance(ids, int) else ids)
        self.fact_table.soft_delete([fact.id for fact in facts], reason)
        self.hooks.index.forget({fact.subject_key for fact in facts})
        return [replace(fact, deleted_reason=reason, deleted_at=time.time()) for fact in facts]

    def purge(self, ids: int | Sequence[int] | None = None, *, tag: str = "") -> FactList:
        """Erase facts for good, with the facts that they replaced; no file holds them afterwards.

        Args:
            ids: one or several fact IDs, of active or deleted facts.
            tag: erase the facts with this tag instead. With neither, the whole history is erased:
                all facts that were deleted before.

        Returns:
            The erased facts.

        Raises:
            UserError: a fact never existed; then none is erased. Or another program reads the
                store, whose files hold the facts until then.
        """
        if ids is not None:
            selected = [self.get(fact_id) for fact_id in ([ids] if isinstance(ids, int) else ids)]
        elif tag:
            selected = self.list(tag=tag, include_deleted=True)
        else:
            selected = [] if self._stored is None else self._stored.read_deleted()
        facts = {} if self._stored is None else self._stored.add_replaced(selected)
        try:
            self.fact_table.purge(sorted(facts))
        finally:
            if get_fact_hooks(self.model) is not None:
                self.hooks.index.forget({fact.subject_key for fact in facts.values()})
        return [facts[fact_id] for fact_id in sorted(facts)]

    def restore(self, fact_id: int) -> RestoreResult:
        """Restore a fact that was deleted, replaced or pruned; it replaces what contradicts it.

        Raises:
            UserError: the fact never existed, is active, or was transferred to the slots.
        """
        facts = self._read(include_deleted=True, ids=[fact_id])
        if not facts or facts[0].deleted_reason is None:
            status = "is active" if facts else "never existed"
            raise UserError(
                f"fact {fact_id} {status}, so it cannot be restored; dmt memory list --all shows "
                "what can"
            )
        history = self._read_related(facts[0])
        conflicts = conflicting_facts(history, fact_id)
        self.fact_table.undelete(fact_id, [conflict.id for conflict in conflicts])
        self.hooks.index.forget({fact.subject_key for fact in (facts[0], *conflicts)})
        fact = replace(facts[0], deleted_reason=None, deleted_at=None, replaced_by=None)
        return RestoreResult(fact, conflicts)

    def _read_related(self, fact: FactRecord) -> dict[int, FactRecord]:
        """Return a fact, its replacements, and the active facts about its subject, by ID."""
        facts = {fact.id: fact}
        facts |= {other.id: other for other in self.fact_table.find_by_subjects([fact.subject_key])}
        while fact.replaced_by is not None:
            (fact,) = self.fact_table.read(include_deleted=True, ids=[fact.replaced_by])
            facts[fact.id] = fact
        return facts

    def prune(self, keep: int) -> FactList:
        """Keep the `keep` facts that fired last, or were written last, and delete the others.

        Returns:
            The deleted facts.

        Raises:
            UserError: `keep` is negative.
        """
        if keep < 0:
            raise UserError(f"keep must be 0 or more, got {keep}")
        if not self.records:
            return []
        num_deleted = max(0, len(self.records) - keep)
        return self.delete(self.fact_table.find_least_recent(num_deleted), "evicted")

    # Reading.

    @property
    def records(self) -> Mapping[int, FactRecord]:
        """The active facts by ID, as they are stored when they are read."""
        return ActiveFacts(self._stored)

    def get(self, fact_id: int) -> FactRecord:
        """Return a fact by its ID, a deleted one too.

        Raises:
            UserError: the fact never existed.
        """
        for fact in self._read(include_deleted=True, ids=[fact_id]):
            return fact
        raise UserError(f"fact {fact_id} never existed; dmt memory list --all shows all facts")

    def search(self, text: str, k: int = 5) -> list[SearchResult]:
        """Search facts by their words and by the hidden state at the end of `text`.

        Args:
            text: words, or a question.
            k: at most so many facts of each kind.

        Returns:
            Facts that contain all words of `text`, then the nearest others by cosine.
        """
        return [SearchResult(fact, "text") for fact in self._read(words=text, limit=k)] + [
            SearchResult(fact, "hidden_state", cosine)
            for fact, cosine in find_nearest_facts(self, text, k)
            if not fact.has_words(text)
        ]

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 30,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Continue a prompt and return the new text; see `models.generation.generate_tokens`."""
        return generate_text(
            self.model, self.tokenizer, prompt, max_new_tokens, temperature, seed, on_text
        )

    # Packs.

    def export(
        self,
        path: str | Path,
        ids: Sequence[int] | None = None,
        *,
        tag: str = "",
        name: str = "",
        license: str = "",
    ) -> FactPack:
        """Save facts with their rows to a pack, for another student of the same model.

        Args:
            path: a new folder, or a file that ends in `.safetensors`.
            ids: of the facts; all where it is None.
            tag: only facts with this tag.
            name: of the pack; the path's where it is empty.
            license: of the facts.

        Raises:
            UserError: a fact is not active, no fact matches, or the pack cannot be written.
        """
        from dmt.editing.packs import make_fact_pack

        path = Path(path)
        facts = self.list(ids=ids, tag=tag or None)
        if not facts:
            raise UserError(
                "no fact matches, so there is nothing to export; list() shows the facts"
            )
        pack = make_fact_pack(self, facts, name or path.stem, license)
        pack.save(path)
        return pack

    def import_(self, pack: str | Path | FactPack, *, rewrite: bool = False) -> WriteResults:
        """Write the facts of a pack; those that contradict a stored fact replace it.

        Args:
            pack: the facts, or the path of their file or folder.
            rewrite: write them from their sentences, as a pack of another model needs.

        Raises:
            UserError: the pack cannot be read, or belongs to another model, or with `rewrite` a
                fact cannot be written; then none is.
        """
        from dmt.editing.packs import FactPack, import_pack, load_fact_pack, rewrite_pack

        pack = pack if isinstance(pack, FactPack) else load_fact_pack(Path(pack))
        return rewrite_pack(self, pack) if rewrite else import_pack(self, pack)

    def restore_closing(self, record: FactRecord) -> str:
        """Return the marks that were written after the answer of a stored fact."""
        return find_closing(record.answer, self.tokenizer.decode(record.answer_ids))

    def load_fact(self, fact_id: int) -> StoredFact:
        """Return an active fact with its rows, a temporary pack's included."""
        return self.load_facts([fact_id])[0]

    def load_facts(self, ids: Iterable[int]) -> list[StoredFact]:
        """Return active facts with their rows, those of temporary packs included."""
        fact_ids = list(ids)
        facts = {fact.record.id: fact for fact in self._temporary_facts()}
        missing = [fact_id for fact_id in fact_ids if fact_id not in facts]
        if missing and self._stored is not None:
            stored = self._stored.load_rows(self._stored.read(ids=missing))
            facts |= {fact.record.id: fact for fact in stored}
        return [facts[fact_id] for fact_id in fact_ids]

    def set_temporary_packs(
        self,
        packs: dict[str, list[StoredFact]],
        hooks: FactHooks | None = None,
    ) -> None:
        """Apply these facts beside the stored ones, in place of earlier temporary packs.

        Args:
            packs: facts and their rows by pack.
            hooks: attached to a model that has none.
        """
        self.temporary_packs = packs
        if get_fact_hooks(self.model) is None and hooks is not None:
            self._attach_hooks(hooks)
        if get_fact_hooks(self.model) is not None:
            self.hooks.index.set_unsaved(self._temporary_facts())

    # Internals of the model and the database.

    @property
    def hooks(self) -> FactHooks:
        """The hooks that apply the facts.

        Raises:
            UserError: no fact was ever written.
        """
        hooks = get_fact_hooks(self.model)
        if hooks is None:
            raise UserError(NO_FACTS_MESSAGE)
        return hooks

    @cached_property
    def fact_table(self) -> FactTable:
        """The tables of facts; of a store that is only read, as they were at first.

        Raises:
            UserError: there is no store.
        """
        if self.db is None:
            raise UserError(NO_FACTS_MESSAGE)
        table = FactTable(self.db)
        if not self.db.read_only:
            return table
        return FactTable(self.db, table.read_moment() if table.exists else Moment(0, time.time()))

    @property
    def _stored(self) -> FactTable | None:
        """The tables of facts, where they exist."""
        return self.fact_table if self.db is not None and self.fact_table.exists else None

    def _read(self, include_deleted: bool = False, **selection: Any) -> FactList:
        """Return the facts that `FactTable.read` selects; none where none was ever written."""
        return [] if self._stored is None else self._stored.read(include_deleted, **selection)

    @cached_property
    def codec(self) -> TextCodec:
        """The tokenizer as facts use it."""
        return TextCodec.from_transformers(self.tokenizer, get_prefix_ids(self.tokenizer))

    @cached_property
    def model_hash(self) -> str:
        """The fingerprint of the model."""
        return hash_model(self.model)

    def _require_facts(self, ids: Iterable[int], include_deleted: bool = False) -> FactList:
        """Return facts in the order of these IDs, each once.

        Raises:
            UserError: one of them is not among the facts.
        """
        fact_ids = list(dict.fromkeys(ids))
        facts = {fact.id: fact for fact in self._read(include_deleted, ids=fact_ids)}
        for fact_id in fact_ids:
            if fact_id not in facts:
                raise UserError(
                    f"fact {fact_id} is not active; dmt memory list shows the "
                    f"{len(self.records):,} that are"
                )
        return [facts[fact_id] for fact_id in fact_ids]

    def _temporary_facts(self) -> Iterable[StoredFact]:
        return (entry for entries in self.temporary_packs.values() for entry in entries)

    def _attach_hooks(self, hooks: FactHooks) -> None:
        hooks.source_path = None if self.db is None else self.db.path
        attach(self.model, hooks)

    # The last method, since its name hides the built-in in the annotations of those after it.
    def list(
        self,
        *,
        ids: Sequence[int] | None = None,
        tag: str | None = None,
        query: str | None = None,
        include_deleted: bool = False,
    ) -> FactList:
        """Return the facts that meet all conditions, in the order of their IDs.

        Args:
            ids: fact IDs.
            tag: the facts' tag.
            query: words that the sentence or the subject contains, in any order.
            include_deleted: return deleted facts too.

        Raises:
            UserError: one of `ids` is not among the facts.
        """
        if not ids:
            return self._read(include_deleted, tag=tag, words=query or "")
        return [
            fact
            for fact in self._require_facts(sorted(ids), include_deleted)
            if (tag is None or fact.tag == tag) and fact.has_words(query or "")
        ]


Memory = FactStore


def _reserve_saved_ids(db: RowStore, model: PreTrainedModel) -> None:
    """Keep the IDs of rows that were saved with the weights from new rows."""
    memories = get_associative_memories(model).values()
    used_ids = (row_id for memory in memories for row_id in memory.rows.index_by_id)
    db.next_id = max([db.next_id, *(row_id + 1 for row_id in used_ids)])


def _split_batches(facts: Sequence[Fact]) -> Iterator[Sequence[Fact]]:
    """Yield batches of `WRITE_BATCH_SIZE` facts in order; each one to be added is by itself."""
    start = 0
    for stop in range(1, len(facts) + 1):
        is_end = stop == len(facts) or facts[stop].add or facts[start].add
        if is_end or stop - start == WRITE_BATCH_SIZE:
            yield facts[start:stop]
            start = stop


def _to_fact(fact: Fact | str | Mapping[str, Any], tag: str) -> Fact:
    if isinstance(fact, Fact):
        return replace(fact, tag=fact.tag or tag)
    return fact_from_mapping({"tag": tag} | ({"sentence": fact} if isinstance(fact, str) else fact))


def find_nearest_facts(
    fact_store: FactStore, text: str, count: int = 5
) -> list[tuple[FactRecord, float]]:
    """Find the facts whose keys are nearest to the hidden state at the end of `text`.

    Args:
        fact_store: the facts, whatever their subjects.
        text: a question, or the beginning of a sentence.
        count: at most so many facts.

    Returns:
        Facts with their cosines, the nearest first.

    Raises:
        UserError: the text is too long for the model.
    """
    if not len(fact_store.records):
        return []
    check_length(
        fact_store.model, fact_store.tokenizer, encode_text(fact_store.tokenizer, text), "the text"
    )
    space, layer = fact_store.hooks.matcher.relations.space, fact_store.hooks.key_layer
    max_tokens = fact_store.model.config.max_position_embeddings
    clause = fact_store.codec.encode_clause(mask_names(text))[-max_tokens:]
    state = collect_hidden_states(fact_store.model, [clause], [[len(clause) - 1]], [layer])[layer]
    query = space.embed(state)[0]
    nearest: list[tuple[FactRecord, float]] = []
    facts = fact_store.fact_table.stream()
    while records := list(islice(facts, FACTS_PER_QUERY)):
        loaded = fact_store.load_keys(records)
        keys = space.embed(torch.from_numpy(np.stack([key for _, key in loaded])))
        cosines = (keys @ query).tolist()
        nearest += [(record, cosine) for (record, _), cosine in zip(loaded, cosines, strict=True)]
        nearest = sorted(nearest, key=lambda pair: -pair[1])[:count]
    return nearest


def find_student_folder(path: str | Path | None) -> Path | None:
    """Return the folder of a saved student, the newest where `path` is None.

    A model that is loaded by its name has no folder: None.
    """
    folder = None if path is None else expand_home(path)
    if folder is not None and not is_student_folder(folder):
        return None
    return resolve_student_folder(folder)


def has_fact_store(folder: Path) -> bool:
    """Check whether a student has a database of facts and rows."""
    return (folder / FACTS_FILE).is_file()
