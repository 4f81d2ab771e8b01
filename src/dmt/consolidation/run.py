"""One consolidation from start to end: read, write or train, save a student, measure it as it is loaded, report."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt.config import Config
from dmt.consolidation.context import read_context
from dmt.consolidation.module import ConsolidationRun, train_student
from dmt.consolidation.rows import write_context
from dmt.consolidation.targets import check_target, make_student, merge_adapters, prepare_student
from dmt.data.windows import TextDataModule, get_prefix_ids, select_first_windows
from dmt.editing.fact_store import load_student
from dmt.evaluation.metrics import FidelityMetrics
from dmt.evaluation.questions import benefit_retained, check_question_lengths, load_questions
from dmt.files import atomic_directory
from dmt.models.fact_hooks import back_up_facts, get_fact_hooks
from dmt.models.forward import ContextTeacher, forward_with_prefix
from dmt.models.loading import SAFE_LOADING, load_teacher
from dmt.report import consolidation
from dmt.report.consolidation import needs_training
from dmt.report.curves import read_curves
from dmt.training.autotune import autotune
from dmt.training.run_dir import create_run_dir, newest_checkpoint, remove_if_refused, write_record
from dmt.training.trainer import keep_freed_memory, select_device


def consolidate(config: Config, run_dir: Path | None) -> Path:
    """Read the context, put it where the config says, save and measure; the run's folder."""
    start_time = time.perf_counter()
    base, tokenizer = load_base(config.teacher)
    check_target(config.context, base)
    max_positions, num_memory_tokens = (
        base.config.max_position_embeddings,
        config.context.prompt_length if config.context.target == "prompt" else 0,
    )
    context = read_context(config.context, tokenizer, max_positions, num_memory_tokens)
    questions = load_questions(config.context.questions) if config.context.questions else []
    max_chunk_len = max(len(chunk.ids) for chunk in context.chunks)
    check_question_lengths(
        questions,
        config.context.questions,
        tokenizer,
        max_positions - max_chunk_len - num_memory_tokens,
    )
    steps = config.stages.end_to_end_steps if needs_training(config) else 0
    seq_len = min(
        config.data.seq_len, max_positions - len(get_prefix_ids(tokenizer)) - num_memory_tokens
    )
    # Books are read where the processor is; weights and tokens are trained wherever there is something to compute on.
    accelerator = "cpu" if config.context.target == "memory" else config.trainer.accelerator
    config = replace(
        config,
        data=replace(config.data, seq_len=seq_len),
        trainer=replace(config.trainer, accelerator=accelerator),
    )
    base.to(select_device(config))  # type: ignore[arg-type]
    data = TextDataModule(config, tokenizer, steps)
    data.setup()
    keep_freed_memory()
    prefix = get_prefix_ids(tokenizer)
    student = make_student(base)
    if steps:
        config = autotune(
            config, student, data.calibration_windows(seq_len * config.data.micro_batch_size)
        )
    elif config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    run_state = ConsolidationRun(
        config,
        base,
        tokenizer,
        prefix,
        context,
        questions,
        [ContextTeacher(base, chunk.ids) for chunk in context.chunks],
    )
    from_scratch = run_dir is None or newest_checkpoint(run_dir) is None
    run_dir = run_dir or create_run_dir(config)
    fact_overlay = get_fact_hooks(base)
    consolidation.log_plan(
        config, run_dir, context, questions, steps, 0 if fact_overlay is None else len(fact_overlay)
    )
    write_record(run_dir, config, {}, is_start=True)
    prepare_end = time.perf_counter()
    with remove_if_refused(run_dir, from_scratch):
        write_stats = (write_context if config.context.target == "memory" else _train_into_model)(
            run_state, student, data, run_dir, from_scratch
        )
    durations = {
        "prepare": prepare_end - start_time,
        "consolidate": time.perf_counter() - prepare_end,
    }
    results = evaluate_student(run_state, run_dir, data) | {"rows_written": write_stats}
    results["seconds"] = durations | {
        "measure": time.perf_counter() - start_time - sum(durations.values())
    }
    results["curves"] = read_curves(run_dir)
    write_record(run_dir, config, results)
    consolidation.write_report(run_dir, config, context, questions, results)
    return run_dir


def load_base(source: str) -> tuple[PreTrainedModel, Any]:
    """A teacher, or a saved student with its facts; in eval mode, without gradients."""
    folder = Path(source).expanduser()
    for candidate in (folder / "student", folder):
        if (candidate / "config.json").is_file() and '"dmt_' in (
            candidate / "config.json"
        ).read_text(encoding="utf-8", errors="replace"):
            return load_student(candidate, f"teacher={source}")
    return load_teacher(source)


def _train_into_model(
    run_state: ConsolidationRun,
    student: PreTrainedModel,
    data: TextDataModule,
    run_dir: Path,
    from_scratch: bool,
) -> dict[str, Any]:
    """Train weights or memory tokens, save the student; what was trained."""
    config, tokenizer = run_state.config, run_state.tokenizer
    student, trainable = prepare_student(config, student, tokenizer, run_state.context.text)
    prefix = get_prefix_ids(tokenizer)
    train_student(run_state, student, trainable, prefix, data, run_dir, from_scratch)
    num_weights = sum(parameter.numel() for parameter in trainable.values())
    student = merge_adapters(student.cpu())
    with atomic_directory(run_dir / "student", back_up_facts) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"num_weights": num_weights, "bytes": 4 * num_weights}


@torch.no_grad()
def evaluate_student(
    run_state: ConsolidationRun, run_dir: Path, data: TextDataModule
) -> dict[str, Any]:
    """What the student answers that was saved, loaded anew; what unrelated text has become for it; what it costs."""
    student = (
        AutoModelForCausalLM.from_pretrained(
            run_dir / "student", dtype=torch.float32, **SAFE_LOADING
        )
        .eval()
        .to(run_state.device)
    )
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "student", trust_remote_code=False)
    prefix = get_prefix_ids(tokenizer)
    results: dict[str, Any] = {"unrelated": {}}
    for corpus in data.corpora:
        metrics = FidelityMetrics()
        for windows in select_first_windows(corpus.test, run_state.config.data.test_tokens).split(
            run_state.config.data.micro_batch_size
        ):
            windows = windows.to(run_state.device)
            metrics.update(
                forward_with_prefix(student, prefix, windows).logits,
                forward_with_prefix(run_state.base, run_state.prefix, windows).logits,
                windows,
            )
        results["unrelated"][corpus.name] = {
            "kl": metrics.kl,
            "ppl_ratio": metrics.ppl_ratio,
            "tokens": metrics.tokens,
        }
    if run_state.questions:
        scores = {
            "with_context": run_state.score_with_context(),
            "without_context": run_state.score_questions(run_state.base, run_state.prefix),
            "consolidated": run_state.score_questions(student, prefix),
        }
        results["answers"] = {
            name: {"nlls": score.nlls, "correct": score.correct} for name, score in scores.items()
        }
        for question_type in dict.fromkeys(question.kind for question in run_state.questions):
            indices = [
                index
                for index, question in enumerate(run_state.questions)
                if question.kind == question_type
            ]
            type_scores = {name: score.select(indices) for name, score in scores.items()}
            retained = benefit_retained(
                type_scores["with_context"],
                type_scores["without_context"],
                type_scores["consolidated"],
            )
            results.setdefault("question_types", {})[question_type] = {
                "num_questions": len(indices),
                "benefit_retained": None if math.isnan(retained) else retained,
                **{f"log_prob_{name}": score.mean_log_prob for name, score in type_scores.items()},
                **{f"recall_{name}": score.recall for name, score in type_scores.items()},
            }
        results["cost"] = consolidation.measure_cost(run_state, student, prefix)
    return results
