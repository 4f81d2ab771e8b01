"""Consolidate a context into a model: read, write or train, save, evaluate as loaded, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt import config_io
from dmt.config import Config
from dmt.consolidation.context import read_context
from dmt.consolidation.module import ConsolidationRun, train_student
from dmt.consolidation.rows import write_context
from dmt.consolidation.targets import check_target, make_student, merge_adapters, prepare_student
from dmt.data.tokenizer import get_prefix_ids, save_tokenizer
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.errors import UserError, format_value
from dmt.evaluation.metrics import FidelityMetrics
from dmt.evaluation.questions import benefit_retained, check_question_lengths, load_questions
from dmt.files import atomic_directory
from dmt.models.fact_files import back_up_facts
from dmt.models.fact_hooks import get_fact_hooks
from dmt.models.forward import ContextTeacher, forward_with_prefix
from dmt.models.loading import SAFE_LOADING, load, load_teacher
from dmt.paths import expand_home
from dmt.report import consolidation
from dmt.report.consolidation import needs_training
from dmt.report.curves import read_curves
from dmt.training.autotune import autotune
from dmt.training.execution import Task, execute
from dmt.training.inputs import check_corpora_vocabulary, check_inputs, identify_inputs
from dmt.training.run_dir import (
    create_run_dir,
    load_run_config,
    newest_checkpoint,
    read_record,
    remove_if_refused,
    write_record,
)
from dmt.training.trainer import keep_freed_memory, select_device

logger = logging.getLogger(__name__)

DEFAULT_STEPS, DEFAULT_LR = 200, 2e-3  # of a target that is trained
CONDITIONS = ("without_context", "with_context", "consolidated")


@dataclass(frozen=True)
class ConsolidationResult:
    """Results of a consolidation.

    Attributes:
        student: folder of the saved student.
        run_dir: the run's folder, with `run.json`, curves and reports.
        rows_written: what was written or trained: facts, rows or weights, and bytes.
        question_types: log-probability and recall of the answers without context, with context and
            consolidated, and the share of the benefit retained, by type of question.
        unrelated: KL and perplexity ratio on unrelated test text, by corpus.
        cost: prompt tokens saved, bytes of the cache, seconds per question.
        seconds: wall time by phase.
    """

    student: Path
    run_dir: Path
    rows_written: dict[str, Any]
    question_types: dict[str, dict[str, Any]]
    unrelated: dict[str, dict[str, float]]
    cost: dict[str, float]
    seconds: dict[str, float]

    def __repr__(self) -> str:
        questions = "".join(
            f"{name}: recall {scores['recall_without_context']:.2f} -> "
            f"{scores['recall_consolidated']:.2f}; "
            for name, scores in self.question_types.items()
        )
        kl = ", ".join(f"{corpus} {scores['kl']:.1e}" for corpus, scores in self.unrelated.items())
        return (
            f"ConsolidationResult({questions}KL of other text: {kl}; student={str(self.student)!r})"
        )


def consolidate(
    model_path: str | Path,
    context: str | Path,
    *,
    target: Literal["memory", "weights", "prompt"] = "memory",
    questions: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    **overrides: Any,
) -> ConsolidationResult:
    """Make a student that predicts without a context what the model predicts with it.

    The model at `model_path` stays as it is.

    Args:
        model_path: a run's folder, a saved student, `embedded`, a hub name or a folder made by
            `save_pretrained`.
        context: the text, or the `Path` of a text file.
        target: where the context goes: rows beside the weights, the weights, or a soft prompt.
        questions: a JSONL file of questions that measure the result.
        output: the run's folder; by default the next `lightning_logs/version_N`.
        resume: whether to continue the run in `output`.
        **overrides: `steps`, `lr`, other settings of `context` such as `row_method="gradient"`, and
            groups of settings as dictionaries such as `data={"seq_len": 64}`.

    Raises:
        UserError: a setting is wrong, or the context does not change the model's predictions.
    """
    settings: dict[str, Any] = {"target": target}
    settings["file" if isinstance(context, Path) else "text"] = context
    if questions is not None:
        settings["questions"] = str(questions)
    changes: dict[str, Any] = {"context": settings}
    steps, lr = overrides.pop("steps", DEFAULT_STEPS), overrides.pop("lr", DEFAULT_LR)
    changes["stages"] = {"end_to_end_steps": steps, "end_to_end_lr": lr}
    groups = {field.name for field in fields(Config)}
    for name, value in overrides.items():
        if name not in groups:
            settings[name] = value
        elif isinstance(value, Mapping):
            changes[name] = changes.get(name, {}) | value
        else:
            changes[name] = value
    run_dir = execute_with_changes(
        "consolidate", run_consolidation, model_path, output, resume, changes
    )
    return read_result(run_dir)


def read_result(run_dir: Path) -> ConsolidationResult:
    """Read the result of a finished consolidation from its `run.json`."""
    record = read_record(run_dir)
    names = ("rows_written", "question_types", "unrelated", "cost", "seconds")
    return ConsolidationResult(
        run_dir / "student", run_dir, **{name: record.get(name, {}) for name in names}
    )


def execute_with_changes(
    task: Literal["consolidate", "sleep"],
    function: Task,
    model_path: str | Path,
    output: str | Path | None,
    resume: bool,
    changes: Mapping[str, Any],
) -> Path:
    """Run a task on a model with changed settings; return the run's folder.

    Args:
        task: the task.
        function: the function of the task.
        model_path: the model it begins with.
        output: the run's folder, None for the next number.
        resume: whether to continue the run in `output`.
        changes: settings that differ from the defaults; groups are dictionaries.

    Raises:
        UserError: a setting is unknown or wrong.
    """
    if resume:
        if output is None:
            raise UserError("resume=True continues the run in `output`; give its folder")
        run_dir = expand_home(output)
        return execute(function, load_run_config(run_dir), run_dir)
    return execute(function, build_config(task, model_path, output, changes))


def build_config(
    task: Literal["consolidate", "sleep"],
    model_path: str | Path,
    output: str | Path | None,
    changes: Mapping[str, Any],
) -> Config:
    """Build and check a config from Python values, see `execute_with_changes`."""
    config = Config(task=task, teacher=str(model_path))
    if output is not None:
        path = expand_home(output)
        folder = {"log_dir": str(path.parent), "run_name": path.name}
        changes = {**changes, "trainer": folder | dict(changes.get("trainer", {}))}
    for name, value in changes.items():
        group: Any = getattr(config, name, None)
        if is_dataclass(group) and isinstance(value, Mapping):
            known_names = [field.name for field in fields(group)]
            if unknown := [key for key in value if key not in known_names]:
                raise UserError(
                    f"{unknown[0]}={format_value(value[unknown[0]])} is not a setting of {name}; "
                    f"there are {', '.join(known_names)}"
                )
            items = {
                key: str(item) if isinstance(item, Path) else item for key, item in value.items()
            }
            section: Any = group
            value = replace(section, **items)
        config = replace(config, **{name: value})
    config_io.check_config(config)
    return config


def run_consolidation(config: Config, run_dir: Path | None) -> Path:
    """Do `task: consolidate`; return the run's folder.

    Args:
        config: the settings; `teacher` is the model that the context goes into.
        run_dir: a run to resume, None for a new one.

    Raises:
        UserError: the context or the questions do not fit the model, or there is nothing to write.
    """
    start_time = time.perf_counter()
    base, tokenizer = load_base(config.teacher)
    check_target(config.context, base)
    max_positions = base.config.max_position_embeddings
    num_memory_tokens = config.context.prompt_length if config.context.target == "prompt" else 0
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
    prefix = get_prefix_ids(tokenizer)
    seq_len = min(config.data.seq_len, max_positions - len(prefix) - num_memory_tokens)
    # Facts are read on the CPU; weights and soft prompts are trained on any device.
    accelerator = config.trainer.accelerator
    if config.context.target == "memory" and accelerator not in ("auto", "cpu"):
        logger.warning(
            "context.target=memory computes on the CPU; trainer.accelerator=%s is not used",
            accelerator,
        )
    if config.context.target == "memory":
        accelerator = "cpu"
    config = replace(
        config,
        data=replace(config.data, seq_len=seq_len),
        trainer=replace(config.trainer, accelerator=accelerator),
    )
    base.to(select_device(config))  # type: ignore[arg-type]
    data = TextDataModule(config, tokenizer, steps)
    data.setup()
    if select_device(config).type == "cpu":
        keep_freed_memory()
    check_corpora_vocabulary(base, tokenizer, data)
    inputs = identify_inputs(
        base,
        tokenizer,
        data.to_record(),
        context=context.text,
        questions="\n".join(map(str, questions)),
    )
    if run_dir is not None:
        check_inputs(run_dir, config, inputs)
    student = make_student(base)
    if steps:
        config = autotune(
            config, student, data.calibration_windows(seq_len * config.data.micro_batch_size)
        )
    elif config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    teachers = [ContextTeacher(base, chunk.ids) for chunk in context.chunks]
    run_state = ConsolidationRun(config, base, tokenizer, prefix, context, questions, teachers)
    is_new = run_dir is None or newest_checkpoint(run_dir) is None
    run_dir = run_dir or create_run_dir(config)
    hooks = get_fact_hooks(base)
    num_facts = 0 if hooks is None else len(hooks)
    consolidation.log_plan(config, run_dir, context, questions, steps, num_facts, data.to_record())
    write_record(run_dir, config, inputs, is_start=True)
    prepare_end = time.perf_counter()
    write_target = write_context if config.context.target == "memory" else _train_target
    with remove_if_refused(run_dir, is_new):
        rows_written = write_target(run_state, student, data, run_dir, is_new)
    write_end = time.perf_counter()
    results = evaluate_student(run_state, run_dir, data) | {"rows_written": rows_written}
    results["seconds"] = {
        "prepare": prepare_end - start_time,
        "consolidate": write_end - prepare_end,
        "measure": time.perf_counter() - write_end,
    }
    results["curves"] = read_curves(run_dir)
    write_record(run_dir, config, results)
    consolidation.write_report(run_dir, config, context, questions, results)
    return run_dir


def find_student_folder(source: str | Path) -> Path | None:
    """Return the folder of a saved student: `source` itself or `student` in it; None if neither."""
    folder = expand_home(source)
    for candidate in (folder / "student", folder):
        config_path = candidate / "config.json"
        if config_path.is_file() and '"dmt_' in config_path.read_text(
            encoding="utf-8", errors="replace"
        ):
            return candidate
    return None


def load_base(source: str) -> tuple[PreTrainedModel, Any]:
    """Load a teacher, or a saved student with its facts; in eval mode, without gradients."""
    folder = find_student_folder(source)
    return load_teacher(source) if folder is None else load(folder, label=f"teacher={source}")


def _train_target(
    run_state: ConsolidationRun,
    student: PreTrainedModel,
    data: TextDataModule,
    run_dir: Path,
    is_new: bool,
) -> dict[str, Any]:
    """Train weights or memory tokens and save the student; return what was trained."""
    config, tokenizer = run_state.config, run_state.tokenizer
    student, trainable = prepare_student(config, student, tokenizer, run_state.context.text)
    prefix = get_prefix_ids(tokenizer)
    train_student(run_state, student, trainable, prefix, data, run_dir, is_new)
    num_weights = sum(parameter.numel() for parameter in trainable.values())
    student = merge_adapters(student.cpu())
    with atomic_directory(run_dir / "student", back_up_facts) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    return {"num_weights": num_weights, "bytes": 4 * num_weights}


@torch.no_grad()
def evaluate_student(
    run_state: ConsolidationRun, run_dir: Path, data: TextDataModule
) -> dict[str, Any]:
    """Evaluate the saved student, loaded again: its answers, unrelated text, and what it costs."""
    student = AutoModelForCausalLM.from_pretrained(
        run_dir / "student", dtype=torch.float32, **SAFE_LOADING
    )
    student = student.eval().to(run_state.device)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "student", trust_remote_code=False)
    prefix = get_prefix_ids(tokenizer)
    results: dict[str, Any] = {"unrelated": {}}
    for corpus in data.corpora:
        metrics = FidelityMetrics()
        test_windows = select_first_windows(corpus.test, run_state.config.data.test_tokens)
        for windows in test_windows.split(run_state.config.data.micro_batch_size):
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
        results |= _evaluate_questions(run_state, student, prefix)
        results["cost"] = consolidation.measure_cost(run_state, student, prefix)
    return results


def _evaluate_questions(
    run_state: ConsolidationRun, student: PreTrainedModel, prefix: list[int]
) -> dict[str, Any]:
    scores = {
        "with_context": run_state.score_with_context(),
        "without_context": run_state.score_questions(run_state.base, run_state.prefix),
        "consolidated": run_state.score_questions(student, prefix),
    }
    question_types: dict[str, dict[str, Any]] = {}
    for question_type in dict.fromkeys(question.type for question in run_state.questions):
        indices = [
            index
            for index, question in enumerate(run_state.questions)
            if question.type == question_type
        ]
        selected = {name: score.select(indices) for name, score in scores.items()}
        retained = benefit_retained(
            selected["with_context"], selected["without_context"], selected["consolidated"]
        )
        question_types[question_type] = {
            "num_questions": len(indices),
            "benefit_retained": None if math.isnan(retained) else retained,
            **{f"log_prob_{name}": score.mean_log_prob for name, score in selected.items()},
            **{f"recall_{name}": score.recall for name, score in selected.items()},
        }
    answers = {
        name: {"nlls": score.nlls, "correct": score.correct} for name, score in scores.items()
    }
    return {"answers": answers, "question_types": question_types}
