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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dmt.editing.calibration import Calibration
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
from dmt.models.fact_hooks import (
    FACTS_FILE,
    FactHooks,
    FactRow,
    accept_facts_of_any_model,
    attach,
    build_fact_rows,
    create_fact_hooks,
    detach,
    disabled,
    get_fact_hooks,
    load_fact_rows,
)
from dmt.models.fingerprint import hash_model, hash_rounded
from dmt.models.forward import check_length, collect_hidden_states, encode_text
from dmt.models.generation import generate_text
from dmt.models.loading import (
    SHIPPED_MODELS,
    is_student_folder,
    load,
)
from dmt.models.memories import get_associative_memories
from dmt.paths import resolve_student_folder
from dmt.store.facts import TRANSFERRED, FactTable, rebind_model
from dmt.store.records import FactRecord
from dmt.store.rows import RowStore
from dmt.text import add_to_list, find_closing, fold_text, remove_from_list

if TYPE_CHECKING:
    from dmt.editing.packs import FactPack

logger = logging.getLogger(__name__)

WRITE_BATCH_SIZE = 256  # facts written in one transaction
# The tensors of a calibration, by the names under which a store holds them.
CALIBRATION_TENSORS = (
    "mean",
    "metric",
    "prose_negatives",
    "question_negatives",
    "question_cosine_p95",
)
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

    Attributes:
        records: the active facts by ID.
        temporary_packs: facts that are applied but not stored, by pack; see `packs.load_packs`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, db: RowStore | None) -> None:
        self.model, self.tokenizer, self.db = model.eval(), tokenizer, db
        self.records: dict[int, FactRecord] = {}
        self.temporary_packs: dict[str, list[tuple[FactRecord, list[FactRow]]]] = {}
        self._rows: dict[int, list[FactRow]] = {}
        self._temporary_dir: tempfile.TemporaryDirectory[str] | None = None  # removed by `close`
        detach(model)  # the facts that it was loaded with are in the store, if the store is its own
        hooks = None if db is None else create_fact_hooks(db, model.config.eos_token_id)
        if hooks is not None:
            self._attach_hooks(hooks)
            self.records = {record.id: record for record in self.fact_table.read()}
            self._rows = load_fact_rows(self.fact_table, list(self.records.values()))
            self._update_hooks()

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        store: str | None = None,
        read_only: bool = False,
        device: str | torch.device | None = None,
    ) -> FactStore:
        """Load a model with its facts.

        Args:
            path: a run's folder or a student's; None is the student of the newest run. Also
                `embedded`, `reader` or `smollm2`, and with `store` any hub name such as `gpt2`.
            store: file or database URL that holds the facts. Where it is None, `memory.db` in the
                model's folder; for a model without a folder, a temporary file that `close` deletes.
            read_only: take no lock and write nothing; other programs may write meanwhile.
            device: where to put the model; the CPU where it is None.

        Raises:
            UserError: there is no such model, its store is another model's, or another program
                writes to the store.
        """
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
        fact_store = cls(model, tokenizer, db)
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
        history = self._read_history()
        records = [record for record in history if record.deleted_reason != TRANSFERRED]
        if not records:
            raise UserError(NO_FACTS_MESSAGE)
        facts = [fact_from_record(record, self.restore_closing(record)) for record in records]
        with disabled(self.model):
            *layers, calibration = choose_layers(self.model, self.tokenizer, facts, prose)
            prepared = prepare_facts(
                self.model,
                self.tokenizer,
                facts,
                (layers[0], layers[1]),
                calibration,
                FALSE_POSITIVE_RATE,
            )
        entries = [
            (
                replace(
                    record,
                    subject_ids=new.record.subject_ids,
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
            _calibration_arrays(calibration),
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
        rows = sum(len(fact.rows) for fact in self.records.values())
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
            false_positive_rate: share of unrelated positions at which a row may fire.

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
    ) -> WriteResults:
        """Write facts, `WRITE_BATCH_SIZE` in one transaction; later facts replace earlier ones.

        Facts that are added to others are written one by one.

        Args:
            facts: `Fact`s, sentences, or mappings with the arguments of `parse_fact`.
            false_positive_rate: share of unrelated positions at which a row may fire.
            progress: called with the number of facts in each batch when it is written.
            tag: of facts that have none.

        Raises:
            UserError: a fact cannot be written; nothing of its batch is.
        """
        parsed = [_to_fact(fact, tag) for fact in facts]
        if not parsed:
            return []
        if not 0 < false_positive_rate <= 0.5:
            raise UserError(
                f"false_positive_rate must be in (0, 0.5], got {false_positive_rate:g}; it is the "
                "share of unrelated positions at which a row may fire"
            )
        self.initialize(parsed)
        results: WriteResults = []
        for batch in _split_batches(parsed):
            if batch[0].add:
                results.append(self._add_value(batch[0], false_positive_rate))
            else:
                results += self.write_prepared(self.prepare(batch, false_positive_rate))
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
        record = self._require_fact(fact_id)
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
                self.calibration,
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
        with disabled(self.model):
            key_layer, value_layer, calibration = choose_layers(
                self.model, self.tokenizer, facts, prose, layers, value_layer
            )
        self.fact_table.create(
            len(calibration.mean), key_layer, value_layer, _calibration_arrays(calibration)
        )
        hooks = create_fact_hooks(self.fact_table.store, self.model.config.eos_token_id)
        assert hooks is not None, "its tables were just created"
        self._attach_hooks(hooks)

    def write_prepared(
        self, prepared_facts: Sequence[PreparedFact], overwrite: bool = True
    ) -> WriteResults:
        """Write facts whose rows are computed; one transaction unless they contradict each other.

        Args:
            prepared_facts: the facts with their rows.
            overwrite: replace a stored fact that says something else; without it, keep that one.
        """
        candidates = self._build_conflict_candidates()
        results: dict[int, WriteResult] = {}
        pending: list[ConflictCandidate] = []
        try:
            for index, prepared in enumerate(prepared_facts):
                same_subject = candidates.setdefault(fold_text(prepared.record.subject), [])
                conflict = find_conflict(same_subject, prepared)
                if conflict in pending:  # two facts of one batch about the same thing
                    self._commit_pending(pending, prepared_facts, results)
                    pending = []
                if conflict is not None:
                    assert conflict.record is not None, "it was written above"
                    answers = conflict.answer, prepared.record.answer
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
                    prepared.record.prompt,
                    prepared.record.answer,
                    prepared.whitened_key,
                    None,
                    index,
                    None if conflict is None else conflict.record,
                )
                same_subject.append(candidate)
                pending.append(candidate)
            self._commit_pending(pending, prepared_facts, results)
        finally:
            self._update_hooks()  # facts that were written before a failure count, too
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
            self.records[record.id] = record
            self._rows[record.id] = build_fact_rows(
                record, list(zip(prepared.keys, prepared.values, strict=True))
            )
            if candidate.replaced_fact is not None:
                self._remove_facts([candidate.replaced_fact.id])
            results[candidate.index] = WriteResult(
                "written" if candidate.replaced_fact is None else "replaced",
                record,
                candidate.replaced_fact,
                prepared.prob_before,
                prepared.prob_after,
            )

    def _build_conflict_candidates(self) -> dict[str, list[ConflictCandidate]]:
        """List the active facts by subject, with the whitened keys of their first rows."""
        candidates: dict[str, list[ConflictCandidate]] = {}
        for record, key in zip(self.records.values(), self._whitened_keys(), strict=True):
            candidates.setdefault(fold_text(record.subject), []).append(
                ConflictCandidate(record.prompt, record.answer, key, record)
            )
        return candidates

    def _whitened_keys(self) -> Sequence[torch.Tensor]:
        """Return the whitened key of each active fact's first row."""
        if not self.records:
            return []
        keys = torch.stack([self._rows[fact_id][0].key for fact_id in self.records])
        return self.calibration.whiten(keys)  # type: ignore[return-value]

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
        fact_ids = [ids] if isinstance(ids, int) else ids
        facts = [self._require_fact(fact_id) for fact_id in dict.fromkeys(fact_ids)]
        self.fact_table.soft_delete([fact.id for fact in facts], reason)
        self._remove_facts([fact.id for fact in facts])
        self._update_hooks()
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
        history = {fact.id: fact for fact in self._read_history()}
        if ids is not None:
            selected = {
                self.get(fact_id).id for fact_id in ([ids] if isinstance(ids, int) else ids)
            }
        elif tag:
            selected = {fact.id for fact in history.values() if fact.tag == tag}
        else:
            selected = {fact.id for fact in history.values() if fact.deleted_reason is not None}
        num_selected = -1
        while len(selected) != num_selected:  # until nothing more was replaced by one of them
            num_selected = len(selected)
            selected |= {fact.id for fact in history.values() if fact.replaced_by in selected}
        try:
            self.fact_table.purge(sorted(selected))
        finally:
            self._remove_facts(selected & set(self.records))
            if get_fact_hooks(self.model) is not None:
                self._update_hooks()
        return [history[fact_id] for fact_id in sorted(selected)]

    def restore(self, fact_id: int) -> RestoreResult:
        """Restore a fact that was deleted, replaced or pruned; it replaces what contradicts it.

        Raises:
            UserError: the fact never existed, is active, or was transferred to the slots.
        """
        history = {fact.id: fact for fact in self.fact_table.read(include_deleted=True)}
        if fact_id not in history or history[fact_id].deleted_reason is None:
            status = "is active" if fact_id in history else "never existed"
            raise UserError(
                f"fact {fact_id} {status}, so it cannot be restored; dmt memory list --all shows "
                "what can"
            )
        fact = replace(history[fact_id], deleted_reason=None, deleted_at=None, replaced_by=None)
        conflicts = conflicting_facts(history, fact_id)
        self.fact_table.undelete(fact_id, [conflict.id for conflict in conflicts])
        self._remove_facts([conflict.id for conflict in conflicts])
        self.records[fact_id] = fact
        self._rows |= load_fact_rows(self.fact_table, [fact])
        self._update_hooks()
        return RestoreResult(fact, conflicts)

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
        usage = self.fact_table.read_usage()
        # Time and count of the last use, then time of creation.
        recency = {
            fact.id: (*max(usage[row][::-1] for row in fact.rows), fact.created)
            for fact in self.records.values()
        }
        oldest_first = sorted(recency, key=lambda fact_id: recency[fact_id])
        return self.delete(oldest_first[: max(0, len(recency) - keep)], "evicted")

    # Reading.

    def get(self, fact_id: int) -> FactRecord:
        """Return a fact by its ID, a deleted one too.

        Raises:
            UserError: the fact never existed.
        """
        if fact_id in self.records:
            return self.records[fact_id]
        for fact in self._read_history():
            if fact.id == fact_id:
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
        text_matches = self.list(query=text)
        matched_ids = {fact.id for fact in text_matches}
        results = [SearchResult(fact, "text") for fact in text_matches[:k]]
        return results + [
            SearchResult(fact, "hidden_state", cosine)
            for fact, cosine in find_nearest_facts(self, text, k)
            if fact.id not in matched_ids
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

    def get_rows(self, fact_id: int) -> list[FactRow]:
        """Return the rows of an active fact, a temporary pack's included."""
        if fact_id in self._rows:
            return self._rows[fact_id]
        return {fact.id: rows for fact, rows in self._temporary_facts()}[fact_id]

    def find_fact_by_row(self, row_id: int) -> FactRecord:
        """Return the active fact that a row belongs to, a temporary pack's included."""
        temporary = (fact for fact, _ in self._temporary_facts())
        return next(fact for fact in (*self.records.values(), *temporary) if row_id in fact.rows)

    def set_temporary_packs(
        self,
        packs: dict[str, list[tuple[FactRecord, list[FactRow]]]],
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
            self._update_hooks()

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

    @property
    def fact_table(self) -> FactTable:
        """The tables of facts.

        Raises:
            UserError: there is no store.
        """
        if self.db is None:
            raise UserError(NO_FACTS_MESSAGE)
        return FactTable(self.db)

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration of the key layer."""
        arrays = self.fact_table.read_calibration()
        tensors = {name: torch.from_numpy(arrays[name]) for name in CALIBRATION_TENSORS}
        return Calibration(**tensors)  # type: ignore[arg-type]

    @cached_property
    def model_hash(self) -> str:
        """The fingerprint of the model."""
        return hash_model(self.model)

    def _read_history(self) -> FactList:
        if self.db is None or not self.fact_table.exists:
            return []
        return self.fact_table.read(include_deleted=True)

    def _require_fact(self, fact_id: int) -> FactRecord:
        if fact_id not in self.records:
            raise UserError(
                f"fact {fact_id} is not active; dmt memory list shows the {len(self.records):,} "
                "that are"
            )
        return self.records[fact_id]

    def _remove_facts(self, ids: Iterable[int]) -> None:
        for fact_id in ids:
            del self.records[fact_id], self._rows[fact_id]

    def _temporary_facts(self) -> Iterable[tuple[FactRecord, list[FactRow]]]:
        return (entry for entries in self.temporary_packs.values() for entry in entries)

    def _attach_hooks(self, hooks: FactHooks) -> None:
        hooks.source_path = None if self.db is None else self.db.path
        attach(self.model, hooks)

    def _update_hooks(self) -> None:
        rows = [row for fact_rows in self._rows.values() for row in fact_rows]
        rows += [row for _, fact_rows in self._temporary_facts() for row in fact_rows]
        self.hooks.set_rows(rows)

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
        facts = {
            fact.id: fact
            for fact in (self._read_history() if include_deleted else self.records.values())
        }
        missing = sorted(set(ids or ()) - set(facts))
        if missing:
            self._require_fact(missing[0])
        return [
            fact
            for fact in facts.values()
            if (not ids or fact.id in ids)
            and (tag is None or fact.tag == tag)
            and fact.has_words(query or "")
        ]


Memory = FactStore


def _reserve_saved_ids(db: RowStore, model: PreTrainedModel) -> None:
    """Keep the IDs of rows that were saved with the weights from new rows."""
    memories = get_associative_memories(model).values()
    used_ids = (row_id for memory in memories for row_id in memory.rows.index_by_id)
    db.next_id = max([db.next_id, *(row_id + 1 for row_id in used_ids)])


def _calibration_arrays(calibration: Calibration) -> dict[str, np.ndarray]:
    return {name: getattr(calibration, name).cpu().numpy() for name in CALIBRATION_TENSORS}


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
    if not fact_store.records:
        return []
    ids = encode_text(fact_store.tokenizer, text)
    check_length(fact_store.model, fact_store.tokenizer, ids, "the text")
    layer = fact_store.hooks.key_layer
    state = collect_hidden_states(fact_store.model, [ids], [[len(ids) - 1]], [layer])[layer].cpu()
    records = list(fact_store.records.values())
    keys = torch.stack([fact_store.get_rows(record.id)[0].key for record in records])
    cosines = fact_store.calibration.whiten(keys) @ fact_store.calibration.whiten(state)[0]
    top = cosines.topk(min(count, len(records)))
    return [
        (records[index], cosine)
        for cosine, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def has_fact_store(folder: Path) -> bool:
    """Check whether a student has a database of facts and rows."""
    return (folder / FACTS_FILE).is_file()
