"""Distill the predictions of a model with a context into a student without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import LOSS_TERMS, Config, LossConfig
from dmt.consolidation.context import Context
from dmt.consolidation.sampling import BatchSampler, DistillationBatch
from dmt.data.windows import TextDataModule
from dmt.distillation.losses import (
    Batch,
    LossScales,
    compute_loss_terms,
    next_token_mask,
    sum_weighted_terms,
)
from dmt.evaluation.metrics import FidelityMetrics
from dmt.evaluation.questions import (
    AnswerScores,
    Question,
    benefit_retained,
    best_scores,
    score_answers,
)
from dmt.models.forward import ContextTeacher, ForwardOutputs, forward_with_prefix
from dmt.training.callbacks import ChartGroups, ChartLayout
from dmt.training.module import TrainingModule
from dmt.training.optimization import build_adamw, lr_schedule
from dmt.training.trainer import fit, use_training_kernels

# Loss term of each objective.
OBJECTIVE_TERMS = {
    "causal_lm": "ce",
    "logits": "kl",
    "hidden_last": "hidden_mse",
    "hidden_all": "block_fvu",
    "generated": "kl",
}


def build_loss_config(config: Config) -> LossConfig:
    """Return the loss of the objective alone, with its weight in `loss`, or 1 where that is 0."""
    term = OBJECTIVE_TERMS[config.context.objective]
    weights = dict.fromkeys(LOSS_TERMS, 0.0) | {term: getattr(config.loss, term) or 1.0}
    return replace(config.loss, extra={}, **weights)


class ContextDistillationModule(TrainingModule):
    """Train a student to predict without a context what its teacher predicts with it.

    A step is one batch of texts after the context, and windows of unrelated text on which the
    student is to stay as it was.

    Args:
        config: settings; `context`, `loss`, `optim` and `stages` are used here.
        student: the model that learns.
        base: the model as it was, in eval mode; it is no submodule, so it is in no checkpoint.
        trainable: parameters of the student that are trained, by name.
        get_batch: returns the batch of a step.
        prefixes: token ids in front of every text of the student, and of the base.
        evaluate_questions: returns metrics to log at each validation; None if there are none.
    """

    def __init__(
        self,
        config: Config,
        student: PreTrainedModel,
        base: PreTrainedModel,
        trainable: dict[str, nn.Parameter],
        get_batch: Callable[[int], DistillationBatch],
        prefixes: tuple[Sequence[int], Sequence[int]],
        evaluate_questions: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        super().__init__(config)
        self.loss_config = build_loss_config(config)
        self.trainable = nn.ParameterDict(
            {name.replace(".", "/"): parameter for name, parameter in trainable.items()}
        )
        self._models = (student, base)  # not as submodules: checkpoints hold `trainable` alone
        self.get_batch, self.prefixes = get_batch, prefixes
        self.evaluate_questions = evaluate_questions
        self.register_buffer("layer_scales", torch.ones(student.config.num_hidden_layers))
        self.register_buffer("hidden_scale", torch.ones(()))
        self.val_metrics: list[FidelityMetrics] = []

    @property
    def student(self) -> PreTrainedModel:
        """The model that learns."""
        return self._models[0]

    @property
    def base(self) -> PreTrainedModel:
        """The model as it was."""
        return self._models[1]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.settings.stages.end_to_end_steps

    @property
    def trained_model(self) -> PreTrainedModel:
        """The student."""
        return self.student

    @property
    def scales(self) -> LossScales:
        """Variances of the teacher's states."""
        return LossScales(self.layer_scales, self.hidden_scale)  # type: ignore[arg-type]

    @property
    def compares_layers(self) -> bool:
        """Whether the outputs of all layers are compared."""
        return bool(self.loss_config.block_fvu)

    @torch.no_grad()
    def measure_scales(self) -> None:
        """Measure the variances of the teacher's states on its first batch.

        Call it once, before the first step of a new run; checkpoints hold the result.
        """
        batch = self.get_batch(0)
        if batch.teacher_signals is None:
            return
        states = [batch.teacher_signals.hidden, *batch.teacher_signals.layer_outputs]
        variances = [state[batch.mask].float().var(0).sum() for state in states]
        self.hidden_scale.copy_(variances[0])  # type: ignore[operator]
        if len(variances) > 1:
            self.layer_scales.copy_(torch.stack(variances[1:]))  # type: ignore[operator]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW on the trainable parameters."""
        return build_adamw(self.trainable.values(), self.settings.optim)

    def on_fit_start(self) -> None:
        """Move both models, which are no submodules, to the device."""
        for model in self._models:
            model.to(self.device)  # type: ignore[arg-type]

    def get_lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return lr_schedule(
            step, self.total_steps, self.settings.stages.end_to_end_lr, self.settings.optim
        )

    def split_batch(self, batch: Tensor) -> list[DistillationBatch | tuple[Tensor, int]]:
        """Return the texts of the step, then micro-batches of unrelated windows."""
        micro_batches: list[Any] = [self.get_batch(self.global_step)]
        if self.settings.context.unrelated_kl_weight:
            windows = batch.split(self.settings.data.micro_batch_size)
            micro_batches += [(micro_batch, len(batch)) for micro_batch in windows]
        return micro_batches

    def compute_terms(
        self, micro_batch: DistillationBatch | tuple[Tensor, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss on texts after the context, or the KL on unrelated windows."""
        if isinstance(micro_batch, DistillationBatch):
            terms = self._compute_context_terms(micro_batch)
            loss = sum_weighted_terms(terms, self.loss_config)
            return loss, {"loss": loss, **terms}
        unrelated_kl = self._compute_unrelated_kl(*micro_batch)
        weight = self.settings.context.unrelated_kl_weight
        return weight * unrelated_kl, {"kl_unrelated": unrelated_kl}

    def _compute_context_terms(self, batch: DistillationBatch) -> dict[str, Tensor]:
        student_signals = forward_with_prefix(
            self.student, self.prefixes[0], batch.tokens, blocks=self.compares_layers
        )
        teacher_signals = batch.teacher_signals or student_signals
        token_counts = float(batch.mask.sum()), float(next_token_mask(batch.mask).sum())
        return compute_loss_terms(
            compare_layer_outputs(student_signals),
            compare_layer_outputs(teacher_signals),
            Batch(batch.tokens, batch.mask, *token_counts),
            self.loss_config,
            self.scales,
        )

    def _compute_unrelated_kl(self, windows: Tensor, num_windows: int) -> Tensor:
        """Return the KL from the base, per token of a step of `num_windows` windows."""
        with torch.no_grad():
            base_signals = forward_with_prefix(self.base, self.prefixes[1], windows)
        student_signals = forward_with_prefix(self.student, self.prefixes[0], windows)
        mask = torch.ones_like(windows, dtype=torch.bool)
        batch = Batch(windows, mask, float(num_windows * windows.shape[1]), 1.0)
        kl_only = LossConfig(
            kl=1.0, hidden_mse=0.0, block_fvu=0.0, chunk_size=self.loss_config.chunk_size
        )
        return compute_loss_terms(student_signals, base_signals, batch, kl_only, self.scales)["kl"]

    def on_validation_start(self) -> None:
        """Start new sums."""
        self.val_metrics = [FidelityMetrics() for _ in self.trainer.datamodule.corpora]  # type: ignore[attr-defined]

    def validation_step(self, windows: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch of one corpus to its sums."""
        base_logits = forward_with_prefix(self.base, self.prefixes[1], windows).logits
        self.val_metrics[dataloader_idx].update(
            forward_with_prefix(self.student, self.prefixes[0], windows).logits,
            base_logits,
            windows,
        )

    def on_validation_epoch_end(self) -> None:
        """Log the KL by corpus, and the questions."""
        for corpus, metrics in zip(self.trainer.datamodule.corpora, self.val_metrics, strict=True):  # type: ignore[attr-defined]
            self.log(f"val/{corpus.name}/kl", metrics.kl)
        if self.evaluate_questions is not None:
            for name, value in self.evaluate_questions().items():
                self.log(name, value, prog_bar=True)


def compare_layer_outputs(signals: ForwardOutputs) -> ForwardOutputs:
    """Return signals whose block terms compare the outputs of whole layers."""
    return replace(signals, block_outputs=signals.layer_outputs)


@dataclass
class ConsolidationRun:
    """What the parts of a consolidation share.

    Attributes:
        config: the resolved settings.
        base: the model as it is.
        tokenizer: its tokenizer.
        prefix: token ids in front of every text of the model.
        context: the context.
        questions: questions that measure the result.
        teachers: the model with each chunk of the context in its cache.
    """

    config: Config
    base: PreTrainedModel
    tokenizer: Any
    prefix: list[int]
    context: Context
    questions: list[Question]
    teachers: list[ContextTeacher]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.base.parameters()).device

    def score_questions(self, model: PreTrainedModel, prefix: list[int]) -> AnswerScores:
        """Score the answers of a model without the context."""
        predict = partial(forward_with_prefix, model, prefix)
        return score_answers(predict, self.tokenizer, self.questions, self.device)

    def score_with_context(self) -> AnswerScores:
        """Score the answers of the model with the chunk of the context that helps most."""
        return best_scores(
            [
                score_answers(teacher.predict, self.tokenizer, self.questions, self.device)
                for teacher in self.teachers
            ]
        )


class ConsolidationCharts(ChartGroups):
    """TensorBoard charts of a consolidation: what is learned, and what changes elsewhere."""

    def build_layout(self, module: Any, corpora: list[str]) -> ChartLayout:
        """Return the charts of losses, questions and validation KL."""
        terms = (
            "loss",
            OBJECTIVE_TERMS[module.settings.context.objective],
            *(["kl_unrelated"] if module.settings.context.unrelated_kl_weight else []),
        )
        layout: ChartLayout = {
            "context": {"loss": ["Multiline", [f"train/{name}" for name in terms]]}
        }
        if module.evaluate_questions is not None:
            layout["context"] |= {
                "benefit retained": ["Multiline", ["val/benefit_retained"]],
                "recall": ["Multiline", ["val/question_recall"]],
            }
        layout["unrelated text"] = {"kl": ["Multiline", [f"val/{corpus}/kl" for corpus in corpora]]}
        return layout


def train_student(
    run_state: ConsolidationRun,
    student: PreTrainedModel,
    trainable: dict[str, nn.Parameter],
    prefix: list[int],
    data: TextDataModule,
    run_dir: Path,
    is_new: bool,
) -> None:
    """Train parameters of the student to the last step.

    Args:
        run_state: the model with context, the settings and the questions.
        student: the model that learns.
        trainable: parameters of the student to train, by name.
        prefix: token ids in front of every text of the student.
        data: unrelated text.
        run_dir: the run's folder.
        is_new: whether the run has no checkpoint yet.
    """
    config = run_state.config
    sampler = BatchSampler(
        run_state.teachers,
        run_state.tokenizer,
        run_state.context,
        config.context,
        config.data.micro_batch_size * 2,
        config.seed,
        blocks=config.context.objective == "hidden_all",
    )

    def get_batch(step: int) -> DistillationBatch:
        # The cache of the context is in full precision.
        with torch.autocast(run_state.device.type, enabled=False):
            return sampler.get_batch(step)

    def evaluate_questions() -> dict[str, float]:
        consolidated = run_state.score_questions(student, prefix)
        return {
            "val/benefit_retained": benefit_retained(with_context, without_context, consolidated),
            "val/question_recall": consolidated.recall,
        }

    if run_state.questions:
        with_context = run_state.score_with_context()
        without_context = run_state.score_questions(run_state.base, run_state.prefix)
    module = ContextDistillationModule(
        config,
        student,
        run_state.base,
        trainable,
        get_batch,
        (prefix, run_state.prefix),
        evaluate_questions if run_state.questions else None,
    )
    if is_new:
        module.measure_scales()
    with use_training_kernels(config, student):
        fit(config, module, data, run_dir, [ConsolidationCharts()])
