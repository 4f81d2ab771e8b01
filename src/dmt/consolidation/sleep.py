"""Move facts and rows of a student into the slots of a new student, where they need no rows.

The teacher is the student with its rows, the new student learns to predict the same without them
(`task: sleep`). Facts that earlier transfers have moved are replayed, so that they are retained.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt import config_io
from dmt.config import Config
from dmt.consolidation.replay import build_replay_set, sample_sentences
from dmt.consolidation.run import execute_with_changes, find_student_folder
from dmt.consolidation.slot_training import (
    RowQueries,
    SlotTransferCharts,
    SlotTransferDataModule,
    SlotTransferModule,
    TransferData,
    ValidationCorpus,
)
from dmt.data.corpora import Corpus, load_corpus
from dmt.data.tokenizer import get_prefix_ids, save_tokenizer
from dmt.data.windows import pack_windows, summarize_corpus
from dmt.editing.fact_store import FactStore
from dmt.editing.online import describe_rows
from dmt.errors import NothingToDoError, UserError
from dmt.evaluation.metrics import measure_fidelity
from dmt.evaluation.questions import Question, score_answers
from dmt.files import atomic_directory
from dmt.models.fact_files import FACTS_FILE, copy_database
from dmt.models.fact_hooks import detach, disabled, get_fact_hooks
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_activations, forward_with_prefix
from dmt.models.loading import load
from dmt.models.memories import get_associative_memories, get_featural_memories
from dmt.paths import expand_home
from dmt.report import slot_transfer
from dmt.report.curves import read_curves
from dmt.store import RowStore
from dmt.store.fact_index import FactIndex
from dmt.store.facts import TRANSFERRED, FactTable, rebind_model
from dmt.store.records import FactRecord, StepChanges
from dmt.training.inputs import check_inputs, identify_inputs
from dmt.training.run_dir import (
    create_run_dir,
    newest_checkpoint,
    read_record,
    remove_if_refused,
    write_record,
)
from dmt.training.trainer import fit

logger = logging.getLogger(__name__)

NUM_STATE_WINDOWS = 8  # windows of text that set the norm and spread of the rows' states


@dataclass(frozen=True)
class SlotTransferResult:
    """Results of a slot transfer.

    Attributes:
        facts: facts that were moved into slots.
        rows: rows that were deleted for them.
        remaining_rows: rows that the new student has.
        recall_before: share of the facts that the student predicted with rows.
        recall_after: share of the facts that the new student predicts without.
        retained: facts of earlier transfers that the student predicted.
        retained_before: share of those before this transfer, 1 or none.
        retained_after: share of those after it.
        row_explained_share: share of the squared output of associative rows that slots explain,
            by layer.
        kl: KL on validation text from the student to the new one, nats per token, by corpus.
        seconds: wall time.
        student: folder of the new student.
    """

    facts: int
    rows: int
    remaining_rows: int
    recall_before: float
    recall_after: float
    retained: int
    retained_before: float
    retained_after: float
    row_explained_share: dict[int, float]
    kl: dict[str, float]
    seconds: float
    student: str

    @property
    def run_dir(self) -> Path:
        """The run's folder, with `run.json`, curves and reports."""
        return Path(self.student).parent

    def __repr__(self) -> str:
        kl = ", ".join(f"{corpus} {value:.1e}" for corpus, value in self.kl.items())
        retained = (
            f", {self.retained_after:.3f} of {self.retained:,} earlier facts retained"
            if self.retained
            else ""
        )
        return (
            f"SlotTransferResult({self.facts:,} facts in {self.rows:,} rows -> slots: recall "
            f"{self.recall_before:.3f} -> {self.recall_after:.3f}{retained}; "
            f"KL of other text: {kl}; student={self.student!r})"
        )


def transfer_to_slots(
    model_path: str | Path,
    *,
    tag: str | None = None,
    min_hits: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    replay_data: Sequence[str] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    **overrides: Any,
) -> SlotTransferResult:
    """Move facts and rows of a student into the slots of a new student.

    The student at `model_path` stays as it is.

    Args:
        model_path: a run's folder or a saved student.
        tag: only facts and rows filed under this tag.
        min_hits: only facts and rows that fired at least this often.
        steps: training steps.
        lr: peak learning rate, in preconditioned units.
        seed: random seed.
        replay_data: corpora for text that should not change; by default those that the student was
            distilled on, else the built-in ones.
        output: the run's folder; by default the next `lightning_logs/version_N`.
        resume: whether to continue the run in `output`.
        **overrides: other settings, groups as dictionaries, as in `sleep={"momentum": 0.8}`.

    Raises:
        UserError: the student has no facts or rows to transfer or no slots that can change, or a
            setting is wrong.
    """
    settings = {"tag": tag, "min_hits": min_hits, "steps": steps, "lr": lr}
    arguments = {name: value for name, value in settings.items() if value is not None}
    changes = overrides | {"sleep": arguments | overrides.get("sleep", {})}
    if seed is not None:
        changes["seed"] = seed
    if replay_data is None:
        data = find_replay_data(Path(model_path))
    else:
        data = {"corpora": list(replay_data)} if replay_data else {}
    if data:
        changes["data"] = data | overrides.get("data", {})
    run_dir = execute_with_changes("sleep", run_slot_transfer, model_path, output, resume, changes)
    return read_result(run_dir)


def read_result(run_dir: Path) -> SlotTransferResult:
    """Read the result of a finished slot transfer from its `run.json`."""
    values = dict(read_record(run_dir)["slot_transfer"])
    shares = {int(layer): share for layer, share in values.pop("row_explained_share").items()}
    return SlotTransferResult(row_explained_share=shares, **values)


def find_replay_data(model_path: Path) -> dict[str, Any]:
    """Return the text of the run that distilled a student: settings of `data` by name.

    They are those that its splits depend on; none if the run is unknown.
    """
    folder = find_student_folder(model_path)
    config_path = None if folder is None else folder.parent / "config.yaml"
    if folder is None or folder.name != "student" or config_path is None:
        return {}
    if not config_path.is_file():
        return {}
    data = config_io.load_config(config_path).data
    return {"corpora": data.corpora, "field": data.field, "seq_len": data.seq_len}


def run_slot_transfer(config: Config, run_dir: Path | None) -> Path:
    """Do `task: sleep`: train, save the new student, evaluate it as it is loaded; the run's folder.

    Args:
        config: settings; `teacher` is the student whose rows are transferred.
        run_dir: a run to resume, None for a new one.

    Raises:
        UserError: there is nothing to transfer or no slots that can change.
    """
    start_time = time.perf_counter()
    # The teacher reads facts on the CPU. Autotuned kernels would change the last digits.
    config = replace(
        config,
        trainer=replace(
            config.trainer,
            accelerator="cpu",
            precision="32-true" if config.trainer.precision == "auto" else config.trainer.precision,
        ),
    )
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    folder = find_student_folder(config.teacher) or expand_home(config.teacher)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"teacher={config.teacher} is not a saved student; give the folder of a run or student"
        )
    plan = plan_slot_transfer(folder, config.sleep.tag, config.sleep.min_hits)
    # Not with `config.seed`: splits are those that the student was most likely distilled on.
    corpora = [
        load_corpus(
            source,
            text_field=config.data.field,
            tokenizer=plan.fact_store.tokenizer,
            min_tokens=config.data.seq_len,
        )
        for source in config.data.corpora
    ]
    corpus_records = [asdict(summarize_corpus(corpus, {})) for corpus in corpora]
    inputs = identify_inputs(plan.fact_store.model, plan.fact_store.tokenizer, corpus_records)
    if run_dir is not None:
        check_inputs(run_dir, config, inputs)
    is_new = run_dir is None or newest_checkpoint(run_dir) is None
    run_dir = run_dir or create_run_dir(config)
    slot_transfer.log_plan(config, run_dir, plan, corpus_records)
    write_record(run_dir, config, inputs, is_start=True)
    with remove_if_refused(run_dir, is_new):
        module = build_module(config, plan, corpora)
    prepare_end = time.perf_counter()
    data = SlotTransferDataModule(
        config.sleep.steps,
        _validation_windows(config, plan, corpora, config.data.validation_tokens),
    )
    fit(config, module, data, run_dir, [SlotTransferCharts()])  # type: ignore[arg-type]
    module.update_student()
    train_end = time.perf_counter()
    save_student(plan, module.student.requires_grad_(False), run_dir / "student")
    shares = {layer: rows.explained_share() for layer, rows in module.data.row_queries.items()}
    metrics = evaluate_transfer(config, plan, run_dir / "student", corpora)
    end_time = time.perf_counter()
    result = SlotTransferResult(
        facts=len(plan.facts),
        rows=sum(len(fact.rows) for fact in plan.facts) + sum(map(len, plan.rows.values())),
        row_explained_share=shares,
        seconds=end_time - start_time,
        student=str(run_dir / "student"),
        **metrics,
    )
    durations = {
        "prepare": prepare_end - start_time,
        "train": train_end - prepare_end,
        "measure": end_time - train_end,
    }
    results = {
        "slot_transfer": asdict(result),
        "seconds": durations,
        "curves": read_curves(run_dir),
    }
    write_record(run_dir, config, results)
    slot_transfer.write_report(run_dir, config)
    return run_dir


@dataclass
class SlotTransferPlan:
    """What is moved from the rows of a student into slots.

    Attributes:
        folder: the student's folder.
        fact_store: the student and its facts.
        facts: facts to be moved.
        retained_facts: facts that earlier transfers have moved and that the student predicts.
        rows: ids of rows of associative memories to be moved, by layer.
        layers: layers whose slots may change. They are not below the layer that matches facts, nor
            below one whose rows remain, so that those rows match exactly as before.
    """

    folder: Path
    fact_store: FactStore
    facts: list[FactRecord]
    retained_facts: list[FactRecord]
    rows: dict[int, list[int]]
    layers: list[int]


def plan_slot_transfer(folder: Path, tag: str | None = None, min_hits: int = 0) -> SlotTransferPlan:
    """Select the facts and rows of a student that are to be moved into slots.

    Args:
        folder: the student's folder.
        tag: only what is filed under this tag.
        min_hits: only what fired at least this often.

    Raises:
        UserError: the student has no slots that may change, or no such facts or rows.
    """
    fact_store = FactStore.open(folder, read_only=True, packs=[])
    model = fact_store.model
    layers = _find_trainable_layers(model)
    fact_table = FactTable(fact_store.db) if fact_store.db is not None else None
    if fact_table is not None and not fact_table.exists:
        fact_table = None
    hit_counts = fact_table.read_usage() if fact_table is not None and min_hits else {}
    facts = [
        fact
        for fact in fact_store.records.values()
        if (tag is None or fact.tag == tag)
        and (not min_hits or max(hit_counts[row][0] for row in fact.rows) >= min_hits)
    ]
    rows, layers = _select_rows(model, layers, tag, min_hits)
    if not facts and not rows:
        selection = "" if tag is None and not min_hits else " with this tag and number of hits"
        raise NothingToDoError(
            f"{folder} has no facts or rows{selection} to transfer; write facts with dmt memory "
            "write, or list them with dmt memory list"
        )
    history = [
        fact
        for fact in (() if fact_table is None else fact_table.read(include_deleted=True))
        if fact.deleted_reason == TRANSFERRED
    ]
    latest = select_latest_facts(history, list(fact_store.records.values()))
    are_predicted = check_facts(model, fact_store.tokenizer, latest)
    retained = [fact for fact, holds in zip(latest, are_predicted, strict=True) if holds]
    return SlotTransferPlan(folder, fact_store, facts, retained, rows, layers)


def _select_rows(
    model: PreTrainedModel, layers: Sequence[int], tag: str | None, min_hits: int
) -> tuple[dict[int, list[int]], list[int]]:
    """Return ids of the associative rows to be moved by layer, and the layers that may change."""
    selected: dict[int, list[int]] = {}
    min_layer = 0
    for row in describe_rows(model):
        if (
            row["layer"] in layers
            and (tag is None or row["tag"] == tag)
            and row["reads"] >= min_hits
        ):
            selected.setdefault(row["layer"], []).append(row["id"])
        else:
            min_layer = max(min_layer, row["layer"])
    return (
        {layer: row_ids for layer, row_ids in selected.items() if layer >= min_layer},
        [layer for layer in layers if layer >= min_layer],
    )


def _find_trainable_layers(model: PreTrainedModel) -> list[int]:
    """Return the layers whose slots may change.

    Raises:
        UserError: there are none.
    """
    memories = get_featural_memories(model)
    if not memories:
        raise UserError(
            "this student has no featural memory, so it has no slots to train; distill one with "
            "dmt distill"
        )
    if getattr(model.config, "external_tensors", None) or any(
        memory.has_external_tensors for memory in memories.values()
    ):
        raise UserError(
            "the slots of this student are memory-mapped or quantized and cannot be trained; "
            "distill a student with memory.offload=none memory.value_dtype=float32"
        )
    hooks = get_fact_hooks(model)
    key_layer = 0 if hooks is None else hooks.key_layer
    if not (layers := [layer for layer in memories if layer >= key_layer]):
        raise UserError(
            f"facts are matched at layer {key_layer}, and this student has no slots at or above "
            "it, so there is nothing to train; distill a student with featural memory in its upper "
            "layers"
        )
    return layers


def select_latest_facts(
    history: Sequence[FactRecord], active_facts: Sequence[FactRecord]
) -> list[FactRecord]:
    """Return the last fact of each prompt in `history`, if no stored fact has the same prompt."""
    active_queries = {fact.query for fact in active_facts}
    latest = {fact.query: fact for fact in history}
    return [fact for query, fact in latest.items() if query not in active_queries]


def check_facts(model: PreTrainedModel, tokenizer: Any, facts: Sequence[FactRecord]) -> list[bool]:
    """Return for each fact whether the model predicts its answer."""
    questions = [Question(fact.prompt, fact.answer) for fact in facts]
    return score_answers(
        partial(forward_with_prefix, model, get_prefix_ids(tokenizer)),
        tokenizer,
        questions,
        next(model.parameters()).device,
    ).correct


def build_module(
    config: Config, plan: SlotTransferPlan, corpora: Sequence[Corpus]
) -> SlotTransferModule:
    """Load the new student, build what it is trained on, and compute the preconditioner."""
    fact_store = plan.fact_store
    teacher = fact_store.model
    if get_fact_hooks(teacher) is not None:
        # Other facts remain rows, so slots should not learn them.
        index = FactIndex()
        index.set_unsaved(fact_store.fact_table.load_rows(plan.facts))
        fact_store.hooks.matcher.index = index
    student = load(plan.folder)[0]
    detach(student)
    memories = get_featural_memories(student)
    drop_rows(student, plan.rows)
    data = _build_transfer_data(config, plan, teacher, student, corpora)
    logger.info(
        "replay: %s examples of %s facts, %s examples of retained facts",
        f"{len(data.new_examples):,}",
        f"{len(plan.facts):,}",
        f"{len(data.retained_examples):,}",
    )
    trained_memories = {layer: memories[layer] for layer in plan.layers}
    return SlotTransferModule(config, teacher, student, trained_memories, data)


def drop_rows(student: PreTrainedModel, rows: dict[int, list[int]]) -> None:
    """Delete rows of a model's associative memories, given by layer."""
    for layer, row_ids in rows.items():
        get_associative_memories(student)[layer].rows.delete_rows(row_ids)


def _build_transfer_data(
    config: Config,
    plan: SlotTransferPlan,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    corpora: Sequence[Corpus],
) -> TransferData:
    settings, seed, tokenizer = config.sleep, config.seed, plan.fact_store.tokenizer
    sentences = sample_sentences(corpora, seed)
    new_examples = build_replay_set(
        teacher, tokenizer, plan.facts, sentences, seed, settings.max_paraphrases
    )
    retained_examples = build_replay_set(
        teacher, tokenizer, plan.retained_facts, sentences, seed + 1, settings.max_paraphrases
    )
    seq_len = _window_length(config, teacher)
    windows_by_corpus = [
        pack_windows(corpus.train, tokenizer, seq_len, settings.num_windows // len(corpora), seed)
        for corpus in corpora
    ]
    order = torch.randperm(
        sum(map(len, windows_by_corpus)), generator=torch.Generator().manual_seed(seed)
    )
    windows = torch.cat(windows_by_corpus)[order]
    row_queries = _build_row_queries(plan, teacher, student, windows)
    return TransferData(new_examples, retained_examples, windows, row_queries)


def _window_length(config: Config, model: PreTrainedModel) -> int:
    return min(config.sleep.max_window_tokens, model.config.max_position_embeddings)


def _build_row_queries(
    plan: SlotTransferPlan, teacher: PreTrainedModel, student: PreTrainedModel, windows: Tensor
) -> dict[int, RowQueries]:
    if not plan.rows:
        return {}
    with torch.no_grad():
        inputs = forward_with_activations(
            student,
            windows[:NUM_STATE_WINDOWS].to(next(student.parameters()).device),
            capture_blocks=True,
        ).block_inputs
    teacher_memories = get_associative_memories(teacher)
    student_memories = get_associative_memories(student)
    return {
        layer: RowQueries(
            teacher_memories[layer], student_memories[layer], row_ids, inputs[layer].flatten(0, 1)
        )
        for layer, row_ids in plan.rows.items()
    }


def _validation_windows(
    config: Config, plan: SlotTransferPlan, corpora: Sequence[Corpus], num_tokens: int
) -> list[ValidationCorpus]:
    seq_len = _window_length(config, plan.fact_store.model)
    tokenizer = plan.fact_store.tokenizer
    return [
        ValidationCorpus(
            corpus.name,
            pack_windows(corpus.validation, tokenizer, seq_len, max(1, num_tokens // seq_len)),
        )
        for corpus in corpora
    ]


def save_student(plan: SlotTransferPlan, student: PreTrainedModel, folder: Path) -> None:
    """Save the new student with the facts that remain, all or nothing."""
    with atomic_directory(folder) as partial_folder:
        student.eval().save_pretrained(partial_folder)
        save_tokenizer(plan.fact_store.tokenizer, partial_folder)
        copy_fact_store(plan, student, partial_folder)


def copy_fact_store(plan: SlotTransferPlan, student: PreTrainedModel, folder: Path) -> None:
    """Copy the fact store without the rows that were moved; the history says where they are."""
    if plan.fact_store.db is None:
        return
    copy_database(plan.folder / FACTS_FILE, folder / FACTS_FILE)
    with closing(RowStore(str(folder / FACTS_FILE))) as store:
        fact_table = FactTable(store)
        history = fact_table.read(include_deleted=True) if fact_table.exists else []
        fact_table.purge(
            [fact.id for fact in history if fact.deleted_reason not in (None, TRANSFERRED)]
        )
        fact_table.soft_delete([fact.id for fact in plan.facts], TRANSFERRED)
        namespaces = {namespace.name: namespace for namespace in store.list_namespaces()}
        changes = {
            namespaces[f"layer_{layer}"]: StepChanges(removals=[(np.array(row_ids), TRANSFERRED)])
            for layer, row_ids in plan.rows.items()
            if f"layer_{layer}" in namespaces
        }
        store.commit("dmt", 0, changes)
        rebind_model(store, hash_model(student))


@torch.no_grad()
def evaluate_transfer(
    config: Config, plan: SlotTransferPlan, folder: Path, corpora: Sequence[Corpus]
) -> dict[str, Any]:
    """Compare the saved student, loaded again, with the student it comes from."""
    teacher, tokenizer = load(plan.folder)
    student = load(folder)[0]
    with disabled(student):
        recalls = [
            _compute_recall(model, tokenizer, facts)
            for facts in (plan.facts, plan.retained_facts)
            for model in (teacher, student)
        ]
    kl = {
        corpus.name: measure_fidelity(student, teacher, corpus.validation).kl
        for corpus in _validation_windows(config, plan, corpora, config.sleep.eval_tokens)
    }
    hooks = get_fact_hooks(student)
    fact_table = None if hooks is None else hooks.index.fact_table
    num_fact_rows = 0 if fact_table is None else fact_table.count_rows()
    recall_names = ("recall_before", "recall_after", "retained_before", "retained_after")
    return dict(zip(recall_names, recalls, strict=True)) | {
        "kl": kl,
        "remaining_rows": num_fact_rows + len(describe_rows(student)),
        "retained": len(plan.retained_facts),
    }


def _compute_recall(model: PreTrainedModel, tokenizer: Any, facts: Sequence[FactRecord]) -> float:
    return sum(check_facts(model, tokenizer, facts)) / len(facts) if facts else 1.0
