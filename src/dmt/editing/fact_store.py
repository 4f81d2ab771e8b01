"""From what a person names, a run's folder or a saved student, to a model with its book.

The book of a model: facts that were written into it, and that can be taken out again. No weight ever changes.

Asking a model that has a book: what it says, and which facts are near to a question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.editing.calibration import Calibration
from dmt.editing.edit import (
    FALSE_POSITIVE_RATE,
    ConflictCandidate,
    PreparedFact,
    WriteResult,
    conflicting_facts,
    find_conflict,
    normalize_text,
    prepare_facts,
)
from dmt.editing.fact import Fact
from dmt.editing.layer_selection import choose_layers
from dmt.errors import UserError
from dmt.models.conversion import get_associative_memories
from dmt.models.fact_hooks import (
    FACTS_FILE,
    FactHooks,
    FactRow,
    attach,
    build_fact_rows,
    create_fact_hooks,
    detach,
    disabled,
    get_fact_hooks,
    load_fact_rows,
)
from dmt.models.fingerprint import hash_model
from dmt.models.forward import check_length, collect_hidden_states, encode_text
from dmt.models.loading import load_model
from dmt.paths import RUNS_DIR, list_runs
from dmt.store import RowStore
from dmt.store.facts import FactTable
from dmt.store.records import FactRecord

WRITE_BATCH_SIZE = 256
"""Facts written in one transaction."""
CALIBRATION_TENSORS = (
    "mean",
    "metric",
    "prose_negatives",
    "question_negatives",
    "question_cosine_p95",
)
"""Of a calibration, as a store keeps them."""


class FactStore:
    """Facts of one model in one store, and the model as it speaks with them.

    Args:
        model: facts are laid over it; in eval mode.
        tokenizer: its own.
        store: of this model; closed by `close`. Without one only guests can be there.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, db: RowStore | None) -> None:
        self.model, self.tokenizer, self.db = model.eval(), tokenizer, db
        self.records: dict[int, FactRecord] = {}
        self.temporary_packs: dict[str, list[tuple[FactRecord, list[FactRow]]]] = {}
        """Facts that are there for now, by where they came from: `packs.load`."""
        self._rows: dict[int, list[FactRow]] = {}
        self._calibration: Calibration | None = None
        detach(model)  # what it was loaded with is in the store too, if the store is its own
        hooks = None if db is None else create_fact_hooks(db, model.config.eos_token_id)
        if hooks is not None:
            self._attach_hooks(hooks)
            self.records = {record.id: record for record in self.fact_table.read()}
            self._rows = load_fact_rows(self.fact_table, list(self.records.values()))
            self._update_hooks()

    def close(self) -> None:
        """Let others write. The model goes on speaking with its facts."""
        if self.db is not None:
            self.db.close()

    def __enter__(self) -> FactStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def hooks(self) -> FactHooks:
        """What is laid over the model.

        Raises:
            UserError: it has never had a fact.
        """
        hooks = get_fact_hooks(self.model)
        if hooks is None:
            raise UserError("no facts were ever written here; dmt memory write begins")
        return hooks

    @property
    def fact_table(self) -> FactTable:
        """Where facts are written down.

        Raises:
            UserError: nowhere, so far.
        """
        if self.db is None:
            raise UserError("no facts were ever written here; dmt memory write begins")
        return FactTable(self.db)

    @property
    def calibration(self) -> Calibration:
        """In which facts are compared."""
        if self._calibration is None:
            arrays = self.fact_table.read_calibration()
            self._calibration = Calibration(
                **{name: torch.from_numpy(arrays[name]) for name in CALIBRATION_TENSORS}
            )  # type: ignore[arg-type]
        return self._calibration

    def initialize(
        self,
        facts: Sequence[Fact],
        prose: Sequence[str] | None = None,
        log: Callable[[str], None] = lambda _: None,
        layers: tuple[int, int] | None = None,
        value_layer: int | None = None,
    ) -> None:
        """Calibrate, once, before the first fact; nothing where that has been done.

        Args:
            facts: the first to be written; a few are tried in several layers.
            prose: held-out text; built-in speeches where it is None.
            told: is given lines about what is going on.
            layers: where facts are heard and answered; measured where it is None.
            answers: where they are answered; the other is measured.
        """
        if self.fact_table.exists:
            return
        with disabled(self.model):
            key_layer, value_layer, calibration = choose_layers(
                self.model, self.tokenizer, facts, prose, log, layers, value_layer
            )
        tensors = {name: getattr(calibration, name).cpu().numpy() for name in CALIBRATION_TENSORS}
        self.fact_table.create(len(calibration.mean), key_layer, value_layer, tensors)
        self._attach_hooks(create_fact_hooks(self.fact_table.store, self.model.config.eos_token_id))

    def write(
        self,
        facts: Sequence[Fact],
        false_positive_rate: float = FALSE_POSITIVE_RATE,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[WriteResult]:
        """Write facts; each is noticed where it is known, and wins where it contradicts an earlier one.

        Args:
            rate: as in `Calibration.reach`.
            progress: is told how many more facts are done.

        Raises:
            UserError: a fact is too long for the model, or its subject is not in its prompt; none of its `AT_ONCE` is written.
        """
        if not facts:
            return []
        self.initialize(facts)
        results: list[WriteResult] = []
        for start in range(0, len(facts), WRITE_BATCH_SIZE):
            try:
                results += self._write_batch(
                    facts[start : start + WRITE_BATCH_SIZE], false_positive_rate
                )
            finally:
                self._update_hooks()  # what was written before something failed, too
            progress(len(facts[start : start + WRITE_BATCH_SIZE]))
        return results

    def _write_batch(self, facts: Sequence[Fact], false_positive_rate: float) -> list[WriteResult]:
        layers = self.hooks.key_layer, self.hooks.value_layer
        with disabled(self.model):
            return self._write_prepared(
                prepare_facts(
                    self.model, self.tokenizer, facts, layers, self.calibration, false_positive_rate
                )
            )

    def write_prepared(
        self, prepared_facts: Sequence[PreparedFact], overwrite: bool = True
    ) -> list[WriteResult]:
        """Write facts whose rows were made elsewhere, all or none; unless one `wins` it gives way to what is there."""
        results = self._write_prepared(prepared_facts, overwrite)
        self._update_hooks()
        return results

    def _write_prepared(
        self, prepared_facts: Sequence[PreparedFact], overwrite: bool = True
    ) -> list[WriteResult]:
        candidates = self._build_conflict_candidates()
        results: dict[int, WriteResult] = {}
        pending: list[ConflictCandidate] = []
        for index, prepared in enumerate(prepared_facts):
            same_subject = candidates.setdefault(prepared.record.subject, [])
            conflict = find_conflict(same_subject, prepared)
            if (
                conflict in pending
            ):  # two facts of one batch about the same thing, one after the other
                self._commit_pending(pending, prepared_facts, results)
                pending = []
            if conflict is not None and (
                not overwrite
                or normalize_text(conflict.answer) == normalize_text(prepared.record.answer)
            ):
                results[index] = WriteResult(
                    "known", conflict.record, None, prepared.prob_before, prepared.prob_after
                )  # type: ignore[arg-type]
                continue
            if conflict is not None:
                same_subject.remove(conflict)
            replaced_fact = None if conflict is None else conflict.record
            same_subject.append(
                ConflictCandidate(
                    prepared.record.prompt,
                    prepared.record.answer,
                    prepared.whitened_key,
                    None,
                    index,
                    replaced_fact,
                )
            )
            pending.append(same_subject[-1])
        self._commit_pending(pending, prepared_facts, results)
        return [results[index] for index in range(len(prepared_facts))]

    def _commit_pending(
        self,
        pending: Sequence[ConflictCandidate],
        prepared_facts: Sequence[PreparedFact],
        results: dict[int, WriteResult],
    ) -> None:
        """Write what is pending, in one transaction."""
        prepared_batch = [prepared_facts[candidate.index] for candidate in pending]
        replacements = {
            candidate.replaced_fact.id: index
            for index, candidate in enumerate(pending)
            if candidate.replaced_fact is not None
        }
        new_records = self.fact_table.add(
            [
                (prepared.record, prepared.keys.numpy(), prepared.values.numpy())
                for prepared in prepared_batch
            ],
            replacements,
        )
        for candidate, record, prepared in zip(pending, new_records, prepared_batch, strict=True):
            candidate.record = record
            self.records[record.id] = record
            self._rows[record.id] = build_fact_rows(
                record, list(zip(prepared.keys, prepared.values, strict=True))
            )
            if candidate.replaced_fact is not None:
                self._remove_facts([candidate.replaced_fact.id])
            status = "written" if candidate.replaced_fact is None else "replaced"
            results[candidate.index] = WriteResult(
                status, record, candidate.replaced_fact, prepared.prob_before, prepared.prob_after
            )

    def add_facts(self, facts: Sequence[tuple[FactRecord, list[FactRow]]]) -> list[WriteResult]:
        """Take in facts that have rows already, such as a pack's; like `write` otherwise."""
        candidates, replacements = self._build_conflict_candidates(), dict[int, int]()
        results: list[WriteResult] = []
        inserts: list[tuple[FactRecord, Any, Any]] = []
        whitened_keys: Any = (
            self.calibration.whiten(torch.stack([rows[0].key for _, rows in facts]))
            if facts
            else []
        )
        for (record, rows), whitened_key in zip(facts, whitened_keys, strict=True):
            keys, values = (
                torch.stack([getattr(row, name) for row in rows]) for name in ("key", "value")
            )
            conflict = find_conflict(
                candidates.get(record.subject, []),
                PreparedFact(record, keys, values, whitened_key, 0, 0),
            )
            if conflict is not None and normalize_text(conflict.answer) == normalize_text(
                record.answer
            ):
                results.append(WriteResult("known", conflict.record))  # type: ignore[arg-type]
                continue
            if (
                conflict is not None
                and conflict.record is not None
                and conflict.record.id not in replacements
            ):
                replacements[conflict.record.id] = len(inserts)
            results.append(
                WriteResult(
                    "written" if conflict is None else "replaced",
                    record,
                    None if conflict is None else conflict.record,
                )
            )
            inserts.append((record, keys.numpy(), values.numpy()))
        inserted_records = iter(self.fact_table.add(inserts, replacements))
        results = [
            result if result.status == "known" else replace(result, fact=next(inserted_records))
            for result in results
        ]
        self._remove_facts(replacements)
        new_records = [result.fact for result in results if result.status != "known"]
        self.records |= {fact.id: fact for fact in new_records}
        self._rows |= load_fact_rows(self.fact_table, new_records)
        self._update_hooks()
        return results

    def get_rows(self, fact_id: int) -> list[FactRow]:
        """Rows of a fact that is there, a guest's included."""
        temporary_rows = {
            record.id: rows for facts in self.temporary_packs.values() for record, rows in facts
        }
        return self._rows[fact_id] if fact_id in self._rows else temporary_rows[fact_id]

    def _build_conflict_candidates(self) -> dict[str, list[ConflictCandidate]]:
        """Facts that are there by subject, with the states that ask for them."""
        candidates: dict[str, list[ConflictCandidate]] = {}
        fact_ids = list(self.records)
        whitened_keys: Any = (
            self.calibration.whiten(torch.stack([self._rows[n][0].key for n in fact_ids]))
            if fact_ids
            else []
        )
        for fact_id, whitened_key in zip(fact_ids, whitened_keys, strict=True):
            record = self.records[fact_id]
            candidates.setdefault(record.subject, []).append(
                ConflictCandidate(record.prompt, record.answer, whitened_key, record)
            )
        return candidates

    def forget(self, ids: Sequence[int], reason: str = "forgotten") -> list[FactRecord]:
        """Take facts out; they stay in the history, from which `restore` brings them back.

        Raises:
            UserError: one of them is not there; then none is taken out.
        """
        facts = [self._require_fact(fact_id) for fact_id in dict.fromkeys(ids)]
        self.fact_table.soft_delete([fact.id for fact in facts], reason)
        self._remove_facts([fact.id for fact in facts])
        self._update_hooks()
        return [replace(fact, deleted_reason=reason, deleted_at=time.time()) for fact in facts]

    def restore(self, fact_id: int) -> tuple[FactRecord, list[FactRecord]]:
        """Bring back a fact that was forgotten, replaced or evicted; with the facts that it now replaces.

        Raises:
            UserError: it was never there, or is there.
        """
        history = {fact.id: fact for fact in self.fact_table.read(include_deleted=True)}
        if fact_id not in history or history[fact_id].deleted_reason is None:
            status = "is there" if fact_id in history else "was never there"
            raise UserError(
                f"fact {fact_id} {status}, so it cannot be brought back; dmt memory list --all shows what can"
            )
        fact = replace(history[fact_id], deleted_reason=None, deleted_at=None, replaced_by=None)
        conflicts = conflicting_facts(history, fact_id)
        self.fact_table.undelete(fact_id, [conflict.id for conflict in conflicts])
        self._remove_facts([conflict.id for conflict in conflicts])
        self.records[fact_id] = fact
        self._rows |= load_fact_rows(self.fact_table, [fact])
        self._update_hooks()
        return fact, conflicts

    def prune(self, keep: int) -> list[FactRecord]:
        """Take out all but the `keep` facts that answered last, of those that never did the newest; who left."""
        uses = self.fact_table.read_usage()
        recency = {
            fact.id: (*max(uses[row][::-1] for row in fact.rows), fact.created)
            for fact in self.records.values()
        }
        pruned_ids = sorted(recency, key=lambda fact_id: recency[fact_id])[
            : max(0, len(recency) - keep)
        ]
        return self.forget(pruned_ids, "evicted")

    def find_fact_by_row(self, row_id: int) -> FactRecord:
        """The fact that a row belongs to, a guest's included."""
        temporary_facts = (fact for facts in self.temporary_packs.values() for fact, _ in facts)
        return next(
            fact for fact in (*self.records.values(), *temporary_facts) if row_id in fact.rows
        )

    def set_temporary_packs(
        self,
        packs: dict[str, list[tuple[FactRecord, list[FactRow]]]],
        hooks: FactHooks | None = None,
    ) -> None:
        """Have these facts, by where they came from, beside those of the book, and no other guests.

        Args:
            overlay: what is laid over the model where nothing is.
        """
        self.temporary_packs = packs
        if get_fact_hooks(self.model) is None and hooks is not None:
            self._attach_hooks(hooks)
        if get_fact_hooks(self.model) is not None:
            self._update_hooks()

    def _require_fact(self, fact_id: int) -> FactRecord:
        if fact_id not in self.records:
            raise UserError(
                f"fact {fact_id} is not there; dmt memory list shows {len(self.records)} that are"
            )
        return self.records[fact_id]

    def _remove_facts(self, ids: Iterable[int]) -> None:
        for fact_id in ids:
            del self.records[fact_id], self._rows[fact_id]

    def _attach_hooks(self, hooks: FactHooks | None) -> None:
        assert hooks is not None, "it has begun"
        hooks.source_path = None if self.db is None else self.db.path
        attach(self.model, hooks)

    def _update_hooks(self) -> None:
        temporary_rows = [
            row for facts in self.temporary_packs.values() for _, rows in facts for row in rows
        ]
        self.hooks.set_rows([row for rows in self._rows.values() for row in rows] + temporary_rows)


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Tensor:
    """Token ids `(time,)` of the prompt, its start token included, and of what the model says next.

    Args:
        tokens: most that are said; fewer where the model says that the text ends, or can read no more.
        temperature: 0 says what is likeliest; above it, drawn with `seed`.
        heard: is given each piece of text as it is said.

    Raises:
        UserError: the prompt is empty, or leaves no room for an answer.
    """
    prompt_ids = encode_text(tokenizer, prompt)
    if not prompt.strip():
        raise UserError(
            "the prompt is empty; ask something, as in dmt generate 'The capital of France is'"
        )
    check_length(model, [*prompt_ids, 0], "the prompt, with room for an answer,")
    free_positions = model.config.max_position_embeddings - len(prompt_ids)
    if temperature > 0:
        torch.manual_seed(seed)
    input_ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
    sampling_args: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    streamer = None if on_text is None else _TextStreamer(tokenizer, on_text)
    output_ids = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(max_new_tokens, free_positions),
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id or 0,
        **sampling_args,
    )
    return output_ids[0]


def generate_text(fact_store: FactStore, prompt: str, max_new_tokens: int = 30) -> str:
    """What the model of a book says next, as text; see `ask`."""
    output_ids = generate_tokens(fact_store.model, fact_store.tokenizer, prompt, max_new_tokens)
    return fact_store.tokenizer.decode(
        output_ids[len(encode_text(fact_store.tokenizer, prompt)) :], skip_special_tokens=True
    )


class _TextStreamer:
    """What transformers tells of a text while it grows; the prompt is told first and left out."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.generated_ids: list[int] | None = None
        self.emitted_text = ""

    def put(self, ids: Tensor) -> None:
        if self.generated_ids is None:
            self.generated_ids = []
            return
        self.generated_ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.generated_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character may take several tokens
            self.on_text(text[len(self.emitted_text) :])
            self.emitted_text = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.generated_ids or [], skip_special_tokens=True)
        self.on_text(text[len(self.emitted_text) :])


def find_nearest_facts(
    fact_store: FactStore, text: str, count: int = 5
) -> list[tuple[FactRecord, float]]:
    """Facts asked for in states nearest to that at the end of `text`, whomever they are about; with cosines."""
    if not fact_store.records:
        return []
    ids = encode_text(fact_store.tokenizer, text)
    check_length(fact_store.model, ids, "the text")
    key_layer = fact_store.hooks.key_layer
    state = collect_hidden_states(fact_store.model, [ids], [[len(ids) - 1]], [key_layer])[
        key_layer
    ].cpu()
    fact_ids = list(fact_store.records)
    keys = fact_store.calibration.whiten(
        torch.stack([fact_store.get_rows(fact_id)[0].key for fact_id in fact_ids])
    )
    top = (keys @ fact_store.calibration.whiten(state)[0]).topk(min(count, len(fact_ids)))
    return [
        (fact_store.records[fact_ids[index]], cosine)
        for cosine, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def resolve_student_folder(path: str | Path | None) -> Path:
    """The folder of a saved student: `place` itself, the `student` of a run, or that of the newest run where `place` is None.

    Raises:
        UserError: there is none.
    """
    if path is None:
        runs = list_runs(Path(RUNS_DIR), required_name="student")
        if not runs:
            raise UserError(
                f"no student is in {RUNS_DIR}/ here; run dmt distill first, or name one: --model FOLDER"
            )
        return runs[-1] / "student"
    folder = Path(path).expanduser()
    for candidate in (folder / "student", folder):
        if (candidate / "config.json").is_file():
            return candidate
    problem = (
        "nothing is there" if not folder.exists() else "it holds no saved student (no config.json)"
    )
    raise UserError(
        f"--model {path}: {problem}; give a run's folder, such as {RUNS_DIR}/version_0, or one made by save_pretrained"
    )


def load_student(folder: Path, label: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A saved student, or a plain GPT-2 or Llama, in eval mode and full precision, and its tokenizer.

    Args:
        called: what a refusal calls it, `--model` and the folder where nothing else is said.

    Raises:
        UserError: what is there cannot be loaded, or is of a family that is not supported.
    """
    model, tokenizer = load_model(str(folder), label or f"--model {folder}")
    return model.eval().requires_grad_(False), tokenizer


def open_fact_store(folder: Path, read_only: bool = False) -> FactStore:
    """A student with its book, which is made where there is none.

    Raises:
        UserError: the student cannot be loaded, its book is another model's or in use, or there is none to be read.
    """
    model, tokenizer = load_student(folder)
    db = RowStore(str(folder / FACTS_FILE), hash_model(model), read_only=read_only)
    used_ids = [
        row_id
        for memory in get_associative_memories(model).values()
        for row_id in memory.rows.index_by_id
    ]
    db.next_id = max(
        [db.next_id, *(row_id + 1 for row_id in used_ids)]
    )  # rows that came with the weights keep theirs
    return FactStore(model, tokenizer, db)


def has_fact_store(folder: Path) -> bool:
    """Whether a student has ever been told a fact, or remembered anything."""
    return (folder / FACTS_FILE).is_file()
