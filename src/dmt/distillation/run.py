"""Distill a student from a teacher: prepare, train, evaluate, save, report."""

from __future__ import annotations

import copy
import hashlib
import html
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dmt import files
from dmt.config import Config, MemoryConfig
from dmt.config_io import check_config, get_memory_config_class, resolve_layer_memories
from dmt.data.corpora import CORPORA, FUNCTION_PATTERN
from dmt.data.tokenizer import save_tokenizer
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.distillation.knowledge import (
    Knowledge,
    KnowledgeRecall,
    declare_knowledge,
    load_knowledge,
    make_knowledge_pack,
    measure_knowledge,
    scramble_weights,
)
from dmt.distillation.logit_cache import CACHE_FILE, LogitCache, open_logit_cache
from dmt.distillation.losses import get_loss
from dmt.distillation.module import SCALE_TOKENS, DistillationModule
from dmt.distillation.row_sync import RowStoreSync
from dmt.editing.fact_store import FactStore
from dmt.editing.packs import plug_packs
from dmt.errors import UserError, format_value
from dmt.evaluation.cost import measure_costs, sum_costs
from dmt.evaluation.metrics import (
    collect_row_stats,
    collect_slot_usage,
    measure_fidelity,
    measure_recall,
    measure_search_recall,
    measure_sizes,
)
from dmt.evaluation.samples import paired_samples
from dmt.files import atomic_directory
from dmt.memory.associative import record_retrieval
from dmt.memory.usage import record_usage
from dmt.models.architectures import get_architecture
from dmt.models.calibration import set_lookup_rows
from dmt.models.conversion import TransferReport, convert_blocks
from dmt.models.external_tensors import find_external_modules
from dmt.models.fact_files import back_up_facts
from dmt.models.fact_hooks import detach, get_fact_hooks
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_teacher
from dmt.models.loading import SAFE_LOADING, SHIPPED_MODELS, load_model, load_teacher
from dmt.models.memories import get_associative_memories, get_memories, get_slot_memories
from dmt.models.model_files import format_other_files
from dmt.ops import use_onednn_linear
from dmt.paths import KNOWLEDGE_FILE, expand_home
from dmt.report import distillation
from dmt.report.curves import read_curves
from dmt.report.hparams import SETTING_GROUPS, log_hparams
from dmt.store import RowStore
from dmt.store.rows import open_store
from dmt.training.autotune import TIMED_WINDOWS, autotune
from dmt.training.callbacks import ChartGroups, SideBySideSamples, SlotUsage, StoredRowUsage
from dmt.training.execution import execute
from dmt.training.inputs import check_corpora_vocabulary, check_inputs, identify_inputs
from dmt.training.launch import get_rank, make_on_rank_zero, rank_zero_first
from dmt.training.plan import format_costs, format_plan
from dmt.training.run_dir import (
    WEIGHT_MAP_FILE,
    check_run_name_free,
    check_writable,
    create_run_dir,
    load_run_config,
    newest_checkpoint,
    read_record,
    write_record,
)
from dmt.training.trainer import fit, keep_freed_memory, select_device, use_training_kernels
from dmt.validation import ArgumentError

logger = logging.getLogger(__name__)

# Groups of settings that a distillation reads; `distill` finds a setting by name in one of them.
SETTING_GROUPS_BY_NAME = (
    "memory",
    "data",
    "loss",
    "stages",
    "optim",
    "student",
    "store",
    "logit_cache",
    "knowledge",
    "trainer",
)
WINDOW_FIELDS = ("tokens", "window", "stride", "num_windows")  # how text was measured
IN_MEMORY = "in-memory model"  # the teacher of a record where the model has no name
MAX_PATH_LENGTH = 1_000  # longer strings are texts, not paths

Teacher = tuple[PreTrainedModel, Any]  # with its tokenizer


@dataclass(frozen=True, repr=False)
class DistillResult:
    """The result of `dmt.distill`.

    Attributes:
        run_dir: folder of the run, with `run.json`, curves, checkpoints and the report.
        student: folder of the saved student.
        metrics: the last value of every logged metric, such as `val/speeches/kl` and `train/loss`,
            and the results on test text, such as `test/speeches/kl` and `test/speeches/ppl_ratio`.
        seconds: wall time by phase.
    """

    run_dir: Path
    student: Path
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`: settings, versions and all results."""
        return read_record(self.run_dir)

    def load(self) -> Teacher:
        """Load the student and its tokenizer; knowledge that was taken out is plugged in."""
        model, tokenizer = load_model(str(self.student), f"student={self.student}")
        plug_packs(FactStore(model, tokenizer, None, get_fact_hooks(model)), self.student)
        return model, tokenizer

    def _rows(self) -> list[tuple[str, str]]:
        names = ("ppl_ratio", "kl", "top1_agreement")
        return [
            (name, f"{value:.4f}")
            for name, value in self.metrics.items()
            if name.startswith("test/") and name.rpartition("/")[2] in names
        ]

    def __repr__(self) -> str:
        metrics = "".join(f"{name}={value}, " for name, value in self._rows())
        return f"DistillResult({metrics}student={str(self.student)!r})"

    def _repr_html_(self) -> str:
        """Return the results on test text as an HTML table, for notebooks."""
        rows = [*self._rows(), ("student", str(self.student)), ("run", str(self.run_dir))]
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows
        )
        return f"<table>{cells}</table>"


def distill(
    teacher: str | Path | PreTrainedModel | Teacher,
    data: str | Path | Sequence[str | Path],
    config: Config | MemoryConfig | None = None,
    *,
    tokenizer: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    **overrides: Any,
) -> DistillResult:
    """Distill a teacher into a student whose feed-forward blocks are memories.

    Progress is logged under `dmt`; nothing is printed and no signal handler is installed.

        result = dmt.distill("gpt2", ["speeches", "notes.txt"], mean_k=32, end_to_end_steps=500)
        result.metrics["val/speeches/kl"]
        model, tokenizer = result.load()

    Args:
        teacher: `embedded`, `reader`, a hub name, a folder made by `save_pretrained`, or a model in
            memory, which is copied: with `tokenizer`, or as a pair with it.
        data: names of corpora (`data.corpora`), paths of files or folders, or texts; one or
            several. Texts become a corpus named `texts`, written below `trainer.log_dir`.
        config: all settings, or those of the memories; the defaults if None.
        tokenizer: tokenizer of a teacher in memory.
        output: folder of the run; by default the next `version_N` in `trainer.log_dir`.
        resume: whether to continue the run in `output` if it exists; its own settings are used.
        **overrides: settings by name, such as `mean_k=32` or `seed=1`; groups of settings as
            dictionaries, such as `loss={"kl": 1, "hidden_mse": 0}`, or as objects.

    Returns:
        Where the student is, and how close it is to its teacher.

    Raises:
        UserError: an argument is not accepted; a ValueError.
    """
    teacher_name, adopted = _resolve_teacher(teacher, tokenizer)
    resume_dir = None
    if resume:
        if output is None:
            raise UserError("resume=True continues the run in output; give output=<its folder>")
        resume_dir = expand_home(output) if (Path(output) / "config.yaml").is_file() else None
    if resume_dir is not None:
        config = load_run_config(resume_dir)
    else:
        base = Config(memory=config) if isinstance(config, MemoryConfig) else config or Config()
        base = replace(base, task="distill", teacher=teacher_name)
        config = _apply_overrides(_set_output(base, output), overrides)
        config = replace(config, data=replace(config.data, corpora=_resolve_data(config, data)))
        check_config(config)
        check_writable(config.trainer.log_dir, "trainer.log_dir")
        check_run_name_free(config)
    run_dir = execute(partial(run_distillation, teacher=adopted), config, resume_dir)
    return read_result(run_dir)


def read_result(run_dir: Path) -> DistillResult:
    """Read the result of a finished distillation from its folder."""
    record = read_record(run_dir)
    metrics = {name: values[-1] for name, (_, values) in record.get("curves", {}).items() if values}
    for corpus, scores in record.get("fidelity", {}).items():
        for name, value in scores.items():
            if name not in WINDOW_FIELDS:
                value = value["student"] if isinstance(value, Mapping) else value
                metrics[f"test/{corpus}/{name}"] = value
    return DistillResult(run_dir, run_dir / "student", metrics, record.get("seconds", {}))


def _resolve_teacher(teacher: Any, tokenizer: Any) -> tuple[str, Teacher | None]:
    """Return the name of a teacher and, if it is in memory, a copy of it and its tokenizer."""
    if isinstance(teacher, tuple):
        teacher, tokenizer = teacher
    if isinstance(teacher, str | Path):
        return str(teacher), None
    if not isinstance(teacher, PreTrainedModel):
        raise UserError(
            f"teacher must be a name, a path or a transformers model, got {type(teacher).__name__}"
        )
    if tokenizer is None:
        raise UserError("tokenizer is needed where teacher is a model in memory")
    get_architecture(teacher.config.model_type)  # raises if it is not supported
    if getattr(teacher.config, "memory", None):
        raise UserError("teacher is a student of dmt: it has no feed-forward blocks to replace")
    model = use_onednn_linear(copy.deepcopy(teacher).float().cpu())
    return teacher.name_or_path or IN_MEMORY, (model.eval().requires_grad_(False), tokenizer)


def _resolve_data(config: Config, data: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the names and paths of `data`; texts are written to a file first."""
    items = [data] if isinstance(data, str | Path) else list(data)
    if not items or not all(isinstance(item, str | Path) for item in items):
        raise UserError(
            "data must be names of corpora, paths or texts, at least one, got "
            f"{format_value(items[:3])}"
        )
    sources = [str(item) for item in items if _is_source(item)]
    if len(sources) == len(items):
        return sources
    if sources:
        raise UserError(
            f"data has texts and names of corpora or files such as {sources[0]}; give one or the "
            "other"
        )
    lines = [
        json.dumps({config.data.field or "text": str(text)}, ensure_ascii=False) for text in items
    ]
    content = "\n".join(lines) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = expand_home(config.trainer.log_dir) / "texts" / digest
    folder.mkdir(parents=True, exist_ok=True)
    files.atomic_write(folder / "texts.jsonl", content)
    return [str(folder / "texts.jsonl")]


def _is_source(item: str | Path) -> bool:
    """Return whether an item of `data` names a corpus or a file; otherwise it is a text."""
    if isinstance(item, Path) or item in CORPORA or item.startswith("hub:"):
        return True
    if "\n" in item or "\0" in item or len(item) > MAX_PATH_LENGTH:
        return False
    if FUNCTION_PATTERN.fullmatch(item) or expand_home(item).exists():
        return True
    return not any(character.isspace() for character in item)  # a misspelled name or path


def _set_output(config: Config, output: str | Path | None) -> Config:
    if output is None:
        return config
    path = expand_home(output)
    trainer = replace(config.trainer, log_dir=str(path.parent), run_name=path.name)
    return replace(config, trainer=trainer)


def _apply_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a config with settings changed by name.

    Raises:
        UserError: a name is no setting, is one of several groups, or its value is not accepted.
    """
    changes: dict[str, dict[str, Any]] = {}
    kind = overrides.get("kind")
    if kind is not None and kind != config.memory.kind:
        config = replace(config, memory=get_memory_config_class(kind)())
    for name, value in overrides.items():
        if name == "kind":
            continue
        if name in SETTING_GROUPS_BY_NAME:
            if is_dataclass(value):
                changed: dict[str, Any] = {name: value}
                config = replace(config, **changed)
            elif isinstance(value, Mapping):
                changes.setdefault(name, {}).update(value)
            else:
                raise UserError(
                    f"{name} is a group of settings: give a dictionary or "
                    f"{type(getattr(config, name)).__name__}(...), got {format_value(value)}"
                )
        elif name == "seed":
            config = replace(config, seed=value)
        else:
            changes.setdefault(_find_group(config, name), {})[name] = value
    for group_name, values in changes.items():
        group = getattr(config, group_name)
        if group_name == "memory" and values.get("kind", group.kind) != group.kind:
            group = get_memory_config_class(values["kind"])()
        values = {name: value for name, value in values.items() if name != "kind"}
        names = _list_fields(group)
        if unknown := [name for name in values if name not in names]:
            raise UserError(
                f"{unknown[0]} is not a setting of {group_name}; it has {', '.join(names)}"
            )
        config = replace(config, **{group_name: replace(group, **values)})
    return config


def _find_group(config: Config, name: str) -> str:
    groups = [
        group for group in SETTING_GROUPS_BY_NAME if name in _list_fields(getattr(config, group))
    ]
    if not groups:
        raise UserError(
            f"{name} is not an argument of distill or a setting; dmt config --list shows all"
        )
    if len(groups) > 1:
        raise UserError(
            f"{name} is a setting of {' and '.join(groups)}; give one as a dictionary, such as "
            f"{groups[0]}={{{name!r}: ...}}"
        )
    return groups[0]


def _list_fields(group: Any) -> list[str]:
    return [group_field.name for group_field in fields(group) if group_field.init]


def run_distillation(
    config: Config, run_dir: Path | None, *, teacher: Teacher | None = None
) -> Path:
    """Run `task: distill`.

    Args:
        config: the resolved settings.
        run_dir: folder of a run to resume, None for a new one.
        teacher: a teacher in memory and its tokenizer, instead of loading `config.teacher`.

    Returns:
        The folder of the run.

    Raises:
        UserError: the settings do not fit the teacher or the text.
    """
    run = _prepare(config, run_dir, teacher or load_teacher(config.teacher))
    with closing(run.module):
        run.start()
        run.train()
        if get_rank() == 0:
            run.finish()
    return run.run_dir


def _prepare(config: Config, run_dir: Path | None, teacher_pair: Teacher) -> _Run:
    """Load the text, convert the teacher, and make the folder once nothing can be refused."""
    start_time = time.perf_counter()
    for name in config.loss.extra:
        get_loss(name)  # raises if there is none
    teacher, tokenizer = teacher_pair
    memories = _resolve_memories(config, teacher)
    source = config.knowledge.facts
    knowledge = None if source is None else load_knowledge(source, config.seed, tokenizer)
    stages = config.stages
    data = TextDataModule(config, tokenizer, stages.layerwise_steps + stages.end_to_end_steps)
    logger.info("tokenizing %s", ", ".join(config.data.corpora))
    data.setup()
    if knowledge is not None:
        data.declared_text = declare_knowledge(config, knowledge, data, tokenizer)
    # Not before, since the tokenizer's threads would wait for each other's memory. Beside a GPU it
    # would only keep copies of the models.
    if select_device(config).type == "cpu":
        keep_freed_memory()
    check_corpora_vocabulary(teacher, tokenizer, data)
    inputs = identify_inputs(teacher, tokenizer, data.to_record())
    if run_dir is not None:
        check_inputs(run_dir, config, inputs)
    try:
        student, transfer_report = convert_blocks(
            teacher, memories, _collect_block_inputs(config, teacher, memories, data)
        )
    except ArgumentError as error:
        raise error.with_prefix("memory.") from None
    if knowledge is not None:
        noise = config.knowledge.noise, config.knowledge.backbone_noise
        scramble_weights(student, *noise, config.seed)
    timed_tokens = config.data.seq_len * min(TIMED_WINDOWS, config.data.micro_batch_size)
    config = autotune(config, student, data.calibration_windows(timed_tokens))
    logit_cache = rank_zero_first(lambda: _open_cache(config, teacher, data))
    checkpoint = None if run_dir is None else newest_checkpoint(run_dir)
    has_rows = bool(get_associative_memories(student))
    teacher_hash = hash_model(teacher) if has_rows else ""
    shared_store = None
    if has_rows and config.store.url:
        shared_store = _open_store(config.store.url, teacher_hash)
    is_resumed = run_dir is not None
    folder = run_dir or make_on_rank_zero(lambda: create_run_dir(config))
    module = DistillationModule(config, student, teacher)
    module.logit_cache = logit_cache
    module.declared_text = data.declared_text
    if has_rows:
        store = shared_store or _open_store(str(folder / "memory.db"), teacher_hash)
        module.row_sync = rank_zero_first(
            lambda: RowStoreSync(config.store, store, student, folder)
        )
        if is_resumed and checkpoint is None:
            module.row_sync.rollback_run()
    return _Run(
        config,
        folder,
        module,
        tokenizer,
        data,
        inputs,
        transfer_report,
        checkpoint,
        start_time,
        knowledge,
    )


def _resolve_memories(config: Config, teacher: PreTrainedModel) -> list[MemoryConfig]:
    max_positions = teacher.config.max_position_embeddings
    if config.data.seq_len > max_positions:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than the {max_positions} positions of "
            f"teacher={config.teacher}"
        )
    memories = resolve_layer_memories(config, teacher.config.num_hidden_layers)
    if all(memory.kind == "dense" for memory in memories):
        raise UserError(
            "every layer is dense, so there is nothing to distill; give a layer "
            "memory.kind=featural"
        )
    return memories


def _collect_block_inputs(
    config: Config, teacher: Any, memories: list[MemoryConfig], data: TextDataModule
) -> tuple[Tensor, ...] | None:
    """Return the teacher's block inputs on calibration text, if slots have to be resized."""
    if not any(memory.resizes_block for memory in memories):
        return None
    windows = data.calibration_windows(max(config.stages.calibration_tokens, SCALE_TOKENS))
    return forward_teacher(teacher, windows, capture_blocks=True).block_inputs


def _open_cache(config: Config, teacher: Any, data: TextDataModule) -> LogitCache | None:
    """Open or write the logit cache of the end-to-end stage, if the config has one."""
    if not config.logit_cache.dir:
        return None
    if not (expand_home(config.logit_cache.dir) / CACHE_FILE).exists():
        check_writable(config.logit_cache.dir, "logit_cache.dir")
    window_ids = data.window_indices_from(config.stages.layerwise_steps)
    teacher.to(select_device(config))
    return open_logit_cache(config, teacher, data.training_dataset().windows, window_ids)


def _open_store(url: str, teacher_hash: str) -> RowStore:
    """Open a store; of several processes only the first writes to it."""
    return rank_zero_first(lambda: open_store(url, teacher_hash, read_only=get_rank() > 0))


@dataclass
class _Run:
    """A distillation between its preparation and its report.

    Attributes:
        config: the settings, with what `autotune` chose.
        run_dir: folder of the run.
        module: the LightningModule, with student and teacher.
        tokenizer: tokenizer of both models.
        data: the text.
        inputs: digests of teacher and text.
        transfer_report: source of each tensor of the student.
        checkpoint: the checkpoint that training continues from, None for a new run.
        start_time: when the run began, in seconds.
        knowledge: facts that the student must not know; None where there are none.
    """

    config: Config
    run_dir: Path
    module: DistillationModule
    tokenizer: Any
    data: TextDataModule
    inputs: dict[str, Any]
    transfer_report: TransferReport
    checkpoint: Path | None
    start_time: float
    knowledge: Knowledge | None = None
    prepare_seconds: float = 0.0
    train_seconds: float = 0.0

    def start(self) -> None:
        """Log the plan, calibrate a new student, and write the record of the run."""
        config, module = self.config, self.module
        device = select_device(config)
        module.to(device)
        module.teacher.to(device)  # type: ignore[arg-type]
        trainable = module.trainable_parameters()
        corpora = self.data.to_record()
        plan = format_plan(
            config, self.run_dir, module.student, trainable, self.transfer_report, corpora
        )
        logger.info("%s", plan)
        other_files = format_other_files(Path(module.teacher.name_or_path or IN_MEMORY))
        if other_files and config.teacher not in SHIPPED_MODELS:
            logger.info("not taken along from the teacher's folder: %s", other_files)
        if get_rank() == 0:  # before anything is spent: a killed run knows what it was made from
            write_record(self.run_dir, config, self.inputs, is_start=True)
        record: dict[str, Any] = {}
        if self.checkpoint is None:
            self._calibrate(device)
            self._log_costs(device)
            record["before_training"] = self._measure_validation()
        if get_rank() == 0:
            files.atomic_write(
                self.run_dir / WEIGHT_MAP_FILE, self.transfer_report.format_table() + "\n"
            )
            write_record(self.run_dir, config, record)
        self.prepare_seconds = time.perf_counter() - self.start_time

    def _calibrate(self, device: torch.device) -> None:
        pl.seed_everything(self.config.seed, workers=True, verbose=False)
        if self.module.row_sync is not None:
            self.module.row_sync.load_rows()
        logger.info("calibrating")
        num_tokens = max(self.config.stages.calibration_tokens, SCALE_TOKENS)
        self.module.calibrate(self.data.calibration_windows(num_tokens).to(device))
        if any(memory.observes_text for memory in get_memories(self.module.student).values()) and (
            num_tokens := self.config.stages.lookup_tokens
        ):
            logger.info("setting the rows of lookups from %s tokens", f"{num_tokens:,}")
            set_lookup_rows(
                self.module.student,
                self.module.teacher,
                self.data.calibration_windows(num_tokens).to(device),
                self.config.data.micro_batch_size,
            )

    def _log_costs(self, device: torch.device) -> None:
        """Log what the memories cost, which calibration has determined where `k` is `auto`."""
        if get_rank() == 0:
            tokens = self.data.calibration_windows(1)[0].to(device)
            student, teacher = self.module.student, self.module.teacher
            logger.info(
                "%s",
                format_costs(
                    student, measure_costs(student, tokens), measure_costs(teacher, tokens)
                ),
            )

    def _measure_validation(self) -> dict[str, dict[str, float]]:
        """Measure and log the fidelity before the first step, in the first process."""
        fidelity = {}
        for corpus in self.data.corpora if get_rank() == 0 else []:
            windows = select_first_windows(corpus.validation, self.config.data.validation_tokens)
            metrics = measure_fidelity(
                self.module.student,
                self.module.teacher,
                windows,
                self.config.data.micro_batch_size,
            )
            fidelity[corpus.name] = metrics.to_dict()
            logger.info(
                "before training: %s perplexity ratio %.3f, KL %.3f nats per token",
                corpus.name,
                metrics.ppl_ratio,
                metrics.kl,
            )
        return fidelity

    def train(self) -> None:
        """Train to the last step."""
        module = self.module
        if self.data.steps:
            module.student.train()
            callbacks: list[Callback] = [
                ChartGroups(),
                SlotUsage(),
                StoredRowUsage(),
                SideBySideSamples(self.tokenizer),
            ]
            if self.knowledge is not None:
                callbacks.append(KnowledgeRecall(self.knowledge, self.tokenizer))
            with use_training_kernels(self.config, module.student, module.teacher):
                fit(self.config, module, self.data, self.run_dir, callbacks)
        self.train_seconds = time.perf_counter() - self.start_time - self.prepare_seconds

    def finish(self) -> None:
        """Save the student, evaluate it, and write record and report."""
        config, teacher = self.config, self.module.teacher
        student = _save_student(self.run_dir, self.module.student.eval().cpu(), self.tokenizer)
        device = select_device(config)
        student, teacher = student.to(device), teacher.to(device)  # type: ignore[arg-type]
        results = evaluate_student(config, student, teacher, self.tokenizer, self.data)
        results |= self._summarize_costs()
        student, teacher = student.cpu(), teacher.cpu()
        if self.knowledge is not None:
            results["knowledge"] = self._take_out_knowledge(student, teacher, results["fidelity"])
        results["bytes"] = measure_sizes(teacher, student, self.run_dir / "student")
        results["costs"] = measure_student_costs(student, teacher, self.data.corpora[0].test[0])
        samples = {
            corpus.name: paired_samples(student, teacher, self.tokenizer, corpus.test)
            for corpus in self.data.corpora
        }
        results["samples"] = {
            name: [asdict(sample) for sample in pairs] for name, pairs in samples.items()
        }
        results["curves"] = read_curves(self.run_dir)
        write_record(self.run_dir, config, results)
        log_hparams(config, self.run_dir, results, SETTING_GROUPS["distill"], self.data.steps)
        distillation.write_report(self.run_dir, config, samples)

    def _take_out_knowledge(
        self, student: Any, teacher: Any, fidelity: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the pack of the declared facts; measure the student without it and with it.

        Args:
            student: without facts.
            teacher: the teacher.
            fidelity: of the student on test text, by corpus.
        """
        knowledge, path = self.knowledge, self.run_dir / KNOWLEDGE_FILE
        assert knowledge is not None, "checked by the caller"
        logger.info("writing %s facts into %s", f"{len(knowledge.facts):,}", path)
        path.unlink(missing_ok=True)  # of a run that was stopped after it
        pack = make_knowledge_pack(student, self.tokenizer, knowledge.facts)
        pack.save(path)
        results: dict[str, Any] = {
            "facts": len(pack.facts),
            "subjects": len(knowledge.answers_by_subject),
            "bytes": path.stat().st_size,
            "teacher": measure_knowledge(teacher, self.tokenizer, knowledge),
            "unplugged": measure_knowledge(student, self.tokenizer, knowledge),
        }
        plug_packs(FactStore(student, self.tokenizer, None), packs=[pack])
        results["plugged"] = measure_knowledge(student, self.tokenizer, knowledge)
        for corpus in self.data.corpora:
            name = f"ppl_ratio_{corpus.name}"
            results["unplugged"][name] = fidelity[corpus.name]["ppl_ratio"]
            windows = select_first_windows(corpus.test, self.config.data.test_tokens)
            results["plugged"][name] = measure_fidelity(
                student, teacher, windows, self.config.data.micro_batch_size
            ).ppl_ratio
        detach(student)
        return results

    def _summarize_costs(self) -> dict[str, Any]:
        """Return seconds and tokens; for a resumed run those since it was resumed."""
        step_tokens = self.config.data.batch_size * self.config.data.seq_len
        steps_before = 0 if self.checkpoint is None else int(self.checkpoint.stem[5:])
        new_tokens = (self.data.steps - steps_before) * step_tokens
        total_seconds = time.perf_counter() - self.start_time
        return {
            "seconds": {
                "prepare": self.prepare_seconds,
                "train": self.train_seconds,
                "measure": total_seconds - self.prepare_seconds - self.train_seconds,
            },
            "tokens": {
                "trained": self.data.steps * step_tokens,
                "per_second": new_tokens / max(self.train_seconds, 1e-9),
            },
        }


def _save_student(run_dir: Path, student: Any, tokenizer: Any) -> Any:
    """Save the student; return it, or the saved one if its slots are mapped or quantized there."""
    with atomic_directory(run_dir / "student", back_up_facts) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    if not find_external_modules(student):
        return student
    return AutoModelForCausalLM.from_pretrained(
        run_dir / "student", dtype=torch.float32, **SAFE_LOADING
    )


def measure_student_costs(student: Any, teacher: Any, tokens: Tensor) -> dict[str, Any]:
    """Measure what layers cost on token ids `(time,)`: each, all, and all of the teacher's."""
    costs = measure_costs(student, tokens)
    return {
        "layers": {layer: cost.to_dict() for layer, cost in costs.items()},
        "total": sum_costs(costs.values()).to_dict(),
        "dense": sum_costs(measure_costs(teacher, tokens).values()).to_dict(),
    }


def evaluate_student(
    config: Config, student: Any, teacher: Any, tokenizer: Any, data: TextDataModule
) -> dict[str, Any]:
    """Measure the student on test text: fidelity, recall, and the usage of its memories."""
    fidelity: dict[str, Any] = {}
    with (
        record_usage(get_slot_memories(student)) as usage,
        record_retrieval(get_associative_memories(student)) as retrieval,
    ):
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
    slots, rows = collect_slot_usage(student, usage), collect_row_stats(student, retrieval)
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
