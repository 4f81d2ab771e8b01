"""One run from settings to results: prepare, train, measure, save, tell."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dmt import files
from dmt.config import Config, MemoryConfig
from dmt.config_io import resolve_layer_memories
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.distillation.logit_cache import CACHE_FILE, LogitCache, open_logit_cache
from dmt.distillation.module import SCALE_TOKENS, DistillationModule
from dmt.distillation.row_sync import RowStoreSync
from dmt.errors import UserError
from dmt.evaluation.metrics import (
    FidelityMetrics,
    collect_row_stats,
    collect_slot_usage,
    measure_fidelity,
    measure_recall,
    measure_search_recall,
    measure_sizes,
)
from dmt.evaluation.samples import SWEEP_TOKENS, paired_samples, sparsity_sweep
from dmt.files import atomic_directory
from dmt.memory.associative import RetrievalStats
from dmt.models.conversion import (
    TransferReport,
    convert_blocks,
    get_associative_memories,
    get_featural_memories,
)
from dmt.models.external_tensors import find_mmap_memories
from dmt.models.fact_hooks import back_up_facts
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_teacher
from dmt.models.loading import SAFE_LOADING, load_teacher
from dmt.report import distillation
from dmt.report.curves import read_curves
from dmt.report.hparams import SETTING_GROUPS, log_hparams
from dmt.store import RowStore
from dmt.training.autotune import TIMED_WINDOWS, autotune
from dmt.training.callbacks import ChartGroups, SideBySideSamples, SlotUsage, StoredRowUsage
from dmt.training.launch import get_rank, make_on_rank_zero, rank_zero_first
from dmt.training.plan import format_plan
from dmt.training.run_dir import (
    WEIGHT_MAP_FILE,
    check_writable,
    create_run_dir,
    newest_checkpoint,
    write_record,
)
from dmt.training.trainer import fit, keep_freed_memory, select_device, use_training_kernels
from dmt.validation import ArgumentError

logger = logging.getLogger(__name__)


def run_distillation(config: Config, run_dir: Path | None) -> Path:
    """Clone, calibrate, train, measure on test text, save the student; the run's folder."""
    start_time = time.perf_counter()
    teacher, tokenizer = load_teacher(config.teacher)
    layers, max_positions = teacher.config.num_hidden_layers, teacher.config.max_position_embeddings
    if config.data.seq_len > max_positions:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than the {max_positions} positions of teacher={config.teacher}"
        )
    memories, stages = resolve_layer_memories(config, layers), config.stages
    if all(memory.kind == "dense" for memory in memories):
        raise UserError(
            "every layer is left dense, so there is nothing to distil; give a layer memory.kind=featural"
        )
    data = TextDataModule(config, tokenizer, stages.layerwise_steps + stages.end_to_end_steps)
    logger.info("tokenizing %s", ", ".join(config.data.corpora))
    data.setup()
    keep_freed_memory()  # not before: the tokenizer's threads would wait for each other's memory
    try:
        student, transfer_report = convert_blocks(
            teacher, memories, _collect_block_inputs(config, teacher, memories, data)
        )
    except ArgumentError as error:
        raise error.with_prefix("memory.") from None
    config = autotune(
        config,
        student,
        data.calibration_windows(
            config.data.seq_len * min(TIMED_WINDOWS, config.data.micro_batch_size)
        ),
    )
    logit_cache = rank_zero_first(lambda: prepare_logit_cache(config, teacher, data))
    is_new = run_dir is None or newest_checkpoint(run_dir) is None
    has_rows = bool(get_associative_memories(student))
    teacher_hash = hash_model(teacher) if has_rows else ""
    shared_store = (
        _open_store(config.store.url, teacher_hash) if has_rows and config.store.url else None
    )  # refused before a folder is made
    is_resumed, run_dir = (
        run_dir is not None,
        run_dir or make_on_rank_zero(lambda: create_run_dir(config)),
    )
    module = DistillationModule(config, student, teacher)
    module.logit_cache = logit_cache
    if has_rows:
        store = shared_store or _open_store(str(run_dir / "memory.db"), teacher_hash)
        module.row_sync = rank_zero_first(
            lambda: RowStoreSync(config.store, store, student, run_dir)
        )
        if is_resumed and is_new:
            module.row_sync.rollback_run()
    with closing(module):
        _train_and_evaluate(
            config, run_dir, is_new, module, tokenizer, data, transfer_report, start_time
        )
    return run_dir


def _open_store(url: str, teacher_hash: str) -> RowStore:
    """An open store, which of several processes the first alone writes to."""
    return rank_zero_first(lambda: RowStore(url, teacher_hash, read_only=get_rank() > 0))


def prepare_logit_cache(config: Config, teacher: Any, data: TextDataModule) -> LogitCache | None:
    """The teacher's answers to every window of the end-to-end stage, where `logit_cache.dir` says that they are kept."""
    if not config.logit_cache.dir:
        return None
    if not (Path(config.logit_cache.dir).expanduser() / CACHE_FILE).exists():
        check_writable(config.logit_cache.dir, "logit_cache.dir")
    window_ids = data.window_indices_from(config.stages.layerwise_steps)
    teacher.to(select_device(config))
    return open_logit_cache(config, teacher, data.training_dataset().windows, window_ids)


def _train_and_evaluate(
    config: Config,
    run_dir: Path,
    is_new: bool,
    module: DistillationModule,
    tokenizer: Any,
    data: TextDataModule,
    transfer_report: TransferReport,
    start_time: float,
) -> None:
    """From a student in place to results in the folder."""
    student, teacher, stages = module.student, module.teacher, config.stages
    device, checkpoint = select_device(config), newest_checkpoint(run_dir)
    module.to(device)
    teacher.to(device)  # type: ignore[arg-type]
    steps_before = 0 if is_new or checkpoint is None else int(checkpoint.stem[5:])
    logger.info(
        "%s",
        format_plan(config, run_dir, student, module.trainable_parameters(), transfer_report),
    )
    initial_metrics: dict[str, FidelityMetrics] = {}
    if is_new:
        pl.seed_everything(config.seed, workers=True, verbose=False)
        if module.row_sync is not None:
            module.row_sync.load_rows()
        logger.info("calibrating")
        module.calibrate(
            data.calibration_windows(max(stages.calibration_tokens, SCALE_TOKENS)).to(device)
        )
        val_windows = (
            {
                corpus.name: select_first_windows(corpus.validation, config.data.validation_tokens)
                for corpus in data.corpora
            }
            if get_rank() == 0
            else {}
        )
        initial_metrics = {
            name: measure_fidelity(student, teacher, windows, config.data.micro_batch_size)
            for name, windows in val_windows.items()
        }
        distillation.log_untrained_fidelity(initial_metrics)
    if get_rank() == 0:
        files.atomic_write(run_dir / WEIGHT_MAP_FILE, transfer_report.format_table() + "\n")
        record: dict[str, Any] = {}
        if is_new:
            record["before_training"] = {
                name: metrics.to_dict() for name, metrics in initial_metrics.items()
            }
        write_record(run_dir, config, record, is_start=True)
    prepare_seconds = time.perf_counter() - start_time
    if data.steps:
        student.train()
        with use_training_kernels(config, student, teacher):
            fit(
                config,
                module,
                data,
                run_dir,
                [ChartGroups(), SlotUsage(), StoredRowUsage(), SideBySideSamples(tokenizer)],
            )
    if get_rank():
        return  # what is left is for one
    train_seconds = time.perf_counter() - start_time - prepare_seconds
    student = _save_student(run_dir, student.eval().cpu(), tokenizer)
    device = torch.device("cpu") if find_mmap_memories(student) else select_device(config)
    results = evaluate_student(config, student.to(device), teacher.to(device), tokenizer, data)  # type: ignore[arg-type]
    results["budgets"] = _run_sparsity_sweep(config, student, teacher, data)
    results |= _summarize_costs(
        config, data, start_time, prepare_seconds, train_seconds, steps_before
    )
    _write_results(config, run_dir, student.cpu(), teacher.cpu(), tokenizer, data, results)


def _collect_block_inputs(
    config: Config, teacher: Any, memories: list[MemoryConfig], data: TextDataModule
) -> tuple[Tensor, ...] | None:
    """The teacher's block inputs on calibration text, where a memory with other slots than its block is to be made."""
    if not any(memory.copies_block and getattr(memory, "num_slots", None) for memory in memories):
        return None
    return forward_teacher(
        teacher,
        data.calibration_windows(max(config.stages.calibration_tokens, SCALE_TOKENS)),
        capture_blocks=True,
    ).block_inputs


def _run_sparsity_sweep(
    config: Config, student: Any, teacher: Any, data: TextDataModule
) -> dict[str, Any]:
    """How far the student is from its teacher with other budgets than its own."""
    test_windows = {
        corpus.name: select_first_windows(corpus.test, config.data.test_tokens)
        for corpus in data.corpora
    }
    return sparsity_sweep(
        student,
        teacher,
        test_windows,
        data.calibration_windows(SWEEP_TOKENS),
        config.data.micro_batch_size,
    )


def _summarize_costs(
    config: Config,
    data: TextDataModule,
    start_time: float,
    prepare_seconds: float,
    train_seconds: float,
    steps_before: int,
) -> dict[str, Any]:
    """Seconds and tokens; of a resumed run the seconds and the speed are those since it was resumed."""
    step_tokens = config.data.batch_size * config.data.seq_len
    eval_seconds = time.perf_counter() - start_time - prepare_seconds - train_seconds
    return {
        "seconds": {"prepare": prepare_seconds, "train": train_seconds, "measure": eval_seconds},
        "tokens": {
            "trained": data.steps * step_tokens,
            "per_second": (data.steps - steps_before) * step_tokens / max(train_seconds, 1e-9),
        },
    }


def _save_student(run_dir: Path, student: Any, tokenizer: Any) -> Any:
    """Save the student; itself, or where its slots leave RAM or lose digits the one that was saved, to be measured."""
    with atomic_directory(run_dir / "student", back_up_facts) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return (
        AutoModelForCausalLM.from_pretrained(
            run_dir / "student", dtype=torch.float32, **SAFE_LOADING
        )
        if find_mmap_memories(student)
        else student
    )


def _write_results(
    config: Config,
    run_dir: Path,
    student: Any,
    teacher: Any,
    tokenizer: Any,
    data: TextDataModule,
    results: dict[str, Any],
) -> None:
    """Write `run.json`, HParams, `report.md` and `report.html`."""
    results["bytes"] = measure_sizes(teacher, student, run_dir / "student")
    samples = {
        corpus.name: paired_samples(student, teacher, tokenizer, corpus.test)
        for corpus in data.corpora
    }
    results["samples"] = {
        name: [asdict(sample) for sample in corpus_samples]
        for name, corpus_samples in samples.items()
    }
    results["curves"] = read_curves(run_dir)
    write_record(run_dir, config, results)
    steps = config.stages.layerwise_steps + config.stages.end_to_end_steps
    log_hparams(config, run_dir, results, SETTING_GROUPS["distill"], steps)
    distillation.write_report(run_dir, config, samples)


def evaluate_student(
    config: Config, student: Any, teacher: Any, tokenizer: Any, data: TextDataModule
) -> dict[str, Any]:
    """Everything that is reported, on test text: fidelity and recall by corpus, slot usage by layer."""
    for memory in get_featural_memories(student).values():
        memory.count_reads()
    for associative in get_associative_memories(student).values():
        associative.retrieval_stats = RetrievalStats()
    fidelity: dict[str, Any] = {}
    for index, corpus in enumerate(data.corpora, 1):
        logger.info("measuring %s (corpus %d/%d)", corpus.name, index, len(data.corpora))
        windows = select_first_windows(corpus.test, config.data.test_tokens)
        fidelity[corpus.name] = measure_fidelity(
            student, teacher, windows, config.data.micro_batch_size
        ).to_dict()
        fidelity[corpus.name] |= {
            "window": config.data.seq_len,
            "stride": config.data.seq_len,
            "num_windows": len(windows),
        }
    slots, rows = collect_slot_usage(student), collect_row_stats(student)
    for layer, search_recall in measure_search_recall(
        student, data.corpora[0].test[: config.data.micro_batch_size]
    ).items():
        slots[layer]["search_recall"] = search_recall
    for corpus in data.corpora:
        for name, probes in (
            ("recall", corpus.probes),
            ("recall_paraphrased", corpus.unseen_probes),
        ):
            if probes:
                recalls = {
                    "teacher": measure_recall(teacher, tokenizer, probes),
                    "student": measure_recall(student, tokenizer, probes),
                }
                fidelity[corpus.name][name] = recalls | {"num_probes": len(probes)}
    return {"fidelity": fidelity, "slots": slots} | ({"knn": rows} if rows else {})
